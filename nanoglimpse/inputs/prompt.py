"""Prompts, single and packed, and the row arithmetic of pruning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoglimpse.config import Config
from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.images import joined
from nanoglimpse.kernels.varlen import upload
from nanoglimpse.model.rope import Grid, mrope_positions, visual_mask, visual_tokens


@dataclass(frozen=True)
class Prompt:
    """The input of the model: T tokens, of which N are placeholders for visual tokens.

    Attributes:
        token_ids: int64 [T], with a placeholder for each visual token.
        positions: int64 [3, T], M-RoPE ids on the axes time, height, width.
        visual: bool [T], the placeholders.
        patches: fp32 [P, patch_dim], or raw; all images and videos in order of appearance.
        grids: (t, h, w) in patches of each image and video.
    """

    token_ids: Tensor
    positions: Tensor
    visual: Tensor
    patches: Tensor
    grids: tuple[Grid, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_tokens(
        cls,
        token_ids: Tensor | Sequence[int],
        patches: Tensor | None = None,
        grids: Sequence[Sequence[int]] = (),
        seconds_per_grid: float | Sequence[float] | Tensor | None = None,
        *,
        config: Config,
    ) -> "Prompt":
        """A prompt from tensors.

        Args:
            token_ids: [T], with an image or video placeholder for each visual token.
            patches: [P, patch_dim], in order of appearance; or raw uint8 patches of
                `preprocess_image`, [P, patch_dim] or with a single frame.
            grids: (t, h, w) in patches of each image and video, in order of appearance.
            seconds_per_grid: seconds between temporal patches, for all videos or each; 1 if None.
            config: configuration of the model.

        Raises:
            UsageError: the arguments do not fit each other or the model.
        """
        vision = config.vision_config
        ids = torch.as_tensor(token_ids, dtype=torch.int64).flatten()
        sizes = tuple((int(t), int(h), int(w)) for t, h, w in grids)
        patches = torch.empty(0, vision.patch_dim) if patches is None else patches
        if isinstance(seconds_per_grid, Tensor):
            seconds_per_grid = seconds_per_grid.tolist()
        if not len(ids):
            raise UsageError("a prompt needs at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= config.text_config.vocab_size:
            raise UsageError(f"token_ids must be in 0 to {config.text_config.vocab_size - 1}")
        if any(h % vision.spatial_merge_size or w % vision.spatial_merge_size for _, h, w in sizes):
            raise UsageError(f"grids {sizes} do not consist of whole visual tokens")
        expected = [sum(math.prod(grid) for grid in sizes), vision.patch_dim]
        one = vision.patch_dim // vision.temporal_patch_size
        if patches.dtype == torch.uint8 and patches.shape[1:] == (one,):
            expected[1] = one
        if list(patches.shape) != expected:
            raise UsageError(f"patches must have shape {expected}, got {list(patches.shape)}")
        positions = mrope_positions(ids, sizes, config, seconds_per_grid)
        return cls(ids, positions, visual_mask(ids, config), patches, sizes)

    def then(self, other: "Prompt") -> "Prompt":
        """This prompt followed by another one, whose positions continue from here."""
        return Prompt(
            torch.cat((self.token_ids, other.token_ids)),
            torch.cat((self.positions, other.positions + self.positions.max() + 1), dim=1),
            torch.cat((self.visual, other.visual)),
            joined((self.patches, other.patches)),
            self.grids + other.grids,
        )


@dataclass(frozen=True)
class PackedBatch:
    """B prompts as T packed rows with N visual tokens.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [3, T].
        visual_rows: int64 [N], the rows of the visual tokens.
        pools: int64 [N], the pool of each visual token; pruning selects among the tokens of a pool.
            All images of a prompt are one pool, and each video is one. -1 for tokens always kept.
        grids: (t, h, w) in patches of the images and videos of each prompt.
        pool_sizes: (rows, columns) in visual tokens of each image, or pair of frames, by pool.
        pool_counts: visual tokens of each pool.
        clips: the pools that are videos.
        counts: rows of each prompt.
        visual_counts: visual tokens of each prompt.
        next_position: int64 [B], the largest position of each prompt + 1.
        seeds: seed of each prompt, for methods that sample.
        evidence: bool [N], the visual tokens that the answers need; None if unknown.
    """

    token_ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    pools: Tensor
    grids: list[tuple[Grid, ...]]
    pool_sizes: list[list[tuple[int, int]]]
    pool_counts: list[int]
    clips: frozenset[int]
    counts: list[int]
    visual_counts: list[int]
    next_position: Tensor
    seeds: list[int]
    evidence: Tensor | None = None

    @classmethod
    def pack(
        cls,
        prompts: Sequence[Prompt],
        config: Config,
        device: torch.device,
        prune_videos: bool = True,
        seed: int | Sequence[int] = 0,
        evidence: Sequence[Tensor] | None = None,
    ) -> "PackedBatch":
        """Packs prompts and moves them to the device.

        Args:
            prompts: at least one prompt.
            config: configuration of the model.
            device: device of the model.
            prune_videos: whether visual tokens of videos may be dropped.
            seed: seed of all prompts, or of each.
            evidence: bool [N] of each prompt.
        """
        token_ids = torch.cat([prompt.token_ids for prompt in prompts])
        visual_rows = torch.cat([prompt.visual for prompt in prompts]).nonzero().flatten()
        pools, pool_sizes, clips = _pools(prompts, config, prune_videos)
        return cls(
            token_ids=upload(token_ids, device),
            positions=upload(torch.cat([prompt.positions for prompt in prompts], dim=1), device),
            visual_rows=upload(visual_rows, device),
            pools=upload(pools, device),
            grids=[prompt.grids for prompt in prompts],
            pool_sizes=pool_sizes,
            pool_counts=[sum(rows * columns for rows, columns in sizes) for sizes in pool_sizes],
            clips=clips,
            counts=[len(prompt) for prompt in prompts],
            visual_counts=[int(prompt.visual.sum()) for prompt in prompts],
            next_position=upload(torch.stack([p.positions.max() + 1 for p in prompts]), device),
            seeds=[seed] * len(prompts) if isinstance(seed, int) else list(seed),
            evidence=None if evidence is None else upload(torch.cat(list(evidence)), device),
        )

    @property
    def all_grids(self) -> tuple[Grid, ...]:
        """The grids of all prompts in order."""
        return tuple(grid for grids in self.grids for grid in grids)

    @property
    def prunable(self) -> Tensor:
        """Bool [N], the visual tokens that may be dropped."""
        return self.pools >= 0

    def keep(self, kept: Tensor) -> tuple["PackedBatch", Tensor]:
        """What remains when only the visual tokens `kept`, bool [N], stay.

        The tables are computed where `kept` is; the host waits once, for the counts of prompts and
        pools.

        Returns:
            The batch of the S rows that remain, and int64 [S], which rows these are.
        """
        stays = torch.ones(len(self.token_ids), dtype=torch.bool, device=kept.device)
        stays[self.visual_rows] = kept
        ranks, rows = _compact(stays)
        _, tokens = _compact(kept)
        pools = ranks.new_zeros(1 + len(self.pool_counts))
        pools.index_add_(0, self.pools + 1, kept.long())
        numbers = torch.cat((ranks[last_rows(self.counts, kept.device)], pools)).tolist()
        ends, pool_counts = numbers[: len(self.counts)], numbers[1 + len(self.counts) :]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        # Rows of text all stay.
        dropped = [old - new for old, new in zip(self.counts, counts, strict=True)]
        visual_counts = [n - d for n, d in zip(self.visual_counts, dropped, strict=True)]
        rows, tokens = rows[: ends[-1]], tokens[: sum(visual_counts)]
        batch = replace(
            self,
            token_ids=self.token_ids[rows],
            positions=self.positions[:, rows],
            visual_rows=ranks[self.visual_rows[tokens]] - 1,
            pools=self.pools[tokens],
            pool_counts=pool_counts,
            counts=counts,
            visual_counts=visual_counts,
            evidence=None if self.evidence is None else self.evidence[tokens],
        )
        return batch, rows


def _compact(stays: Tensor) -> tuple[Tensor, Tensor]:
    """How many of bool [T] are true up to each, and where those are, int64 [T + 1].

    Only as many entries of the second are meant as there are true ones. In this way no size depends
    on a value, for which the host would have to wait.
    """
    ranks = stays.cumsum(0)
    slots = torch.where(stays, ranks - 1, len(stays))
    numbers = torch.arange(len(stays), device=stays.device)
    return ranks, ranks.new_empty(len(stays) + 1).scatter_(0, slots, numbers)


def _pools(
    prompts: Sequence[Prompt], config: Config, prune_videos: bool
) -> tuple[Tensor, list[list[tuple[int, int]]], frozenset[int]]:
    """`pools`, `pool_sizes` and `clips` of a packed batch."""
    merge, numbers, clips = config.vision_config.spatial_merge_size, [], []
    sizes: list[list[tuple[int, int]]] = []
    for prompt in prompts:
        stills, placeholders, first = -1, prompt.token_ids[prompt.visual].tolist(), 0
        for grid in prompt.grids:
            number, count = -1, visual_tokens(grid, config)
            if placeholders[first] == config.video_token_id:
                if prune_videos:
                    number = len(sizes)
                    clips.append(number)
            else:
                number = stills = stills if stills >= 0 else len(sizes)
            if number == len(sizes):
                sizes.append([])
            if number >= 0:
                sizes[number] += [(grid[1] // merge, grid[2] // merge)] * grid[0]
            numbers.append(torch.full((count,), number))
            first += count
    pools = torch.cat([torch.empty(0, dtype=torch.int64), *numbers])
    return pools, sizes, frozenset(clips)


def last_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    """int64 [B], the last row of each packed sequence, given their lengths."""
    return upload(torch.tensor(counts).cumsum(0) - 1, device)


def interleave(rows: Tensor, probes: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inserts one more row after each packed sequence.

    Args:
        rows: [T, …], the packed sequences.
        probes: [B, …], the rows to insert.
        counts: rows of each sequence.

    Returns:
        [T + B, …], and int64 [T], the new places of `rows`.
    """
    index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = upload(torch.arange(len(rows)) + index, rows.device)
    both = rows.new_empty(len(rows) + len(counts), *rows.shape[1:])
    both[index] = rows
    both[last_rows([n + 1 for n in counts], rows.device)] = probes
    return both, index
