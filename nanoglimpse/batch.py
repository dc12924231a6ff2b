"""Prompts packed one after the other, and the row arithmetic that pruning needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Config
from .processor import Prompt
from .rope import Grid, visual_tokens


@dataclass(frozen=True)
class Batch:
    """B prompts as T packed rows with N visual tokens.

    With a probe row behind every prompt the same rows become T + B: `prompt_rows` and `probe_rows`
    say which is which there.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [3, T].
        visual_rows: int64 [N], the rows that visual tokens take.
        pools: int64 [N], tokens that compete for being kept have one number: those of a prompt's
            images together, those of a video alone; -1 where all stay.
        grids: of each prompt.
        pool_sizes: (rows, columns) in visual tokens of each pool's images, or pairs of frames.
        clips: the pools that are videos.
        counts: rows of each prompt.
        visual_counts: visual tokens of each prompt.
        next_position: int64 [B], the largest position of each prompt + 1.
        prompt_rows: int64 [T].
        probe_rows: int64 [B].
    """

    token_ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    pools: Tensor
    grids: list[tuple[Grid, ...]]
    pool_sizes: list[list[tuple[int, int]]]
    clips: frozenset[int]
    counts: list[int]
    visual_counts: list[int]
    next_position: Tensor
    prompt_rows: Tensor
    probe_rows: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        config: Config,
        device: torch.device,
        prune_videos: bool = True,
    ) -> "Batch":
        """Packs prompts and moves them to the device; without `prune_videos` all of these stay."""
        token_ids = torch.cat([prompt.token_ids for prompt in prompts])
        visual_rows = torch.cat([prompt.visual for prompt in prompts]).nonzero().flatten()
        counts = torch.tensor([len(prompt) for prompt in prompts])
        order = torch.arange(len(prompts))
        pools, pool_sizes, clips = _pools(prompts, config, prune_videos)
        return cls(
            token_ids=token_ids.to(device),
            positions=torch.cat([prompt.positions for prompt in prompts], dim=1).to(device),
            visual_rows=visual_rows.to(device),
            pools=pools.to(device),
            grids=[prompt.grids for prompt in prompts],
            pool_sizes=pool_sizes,
            clips=clips,
            counts=counts.tolist(),
            visual_counts=[
                sum(visual_tokens(grid, config) for grid in prompt.grids) for prompt in prompts
            ],
            next_position=torch.stack([p.positions.max() + 1 for p in prompts]).to(device),
            prompt_rows=(torch.arange(len(token_ids)) + order.repeat_interleave(counts)).to(device),
            probe_rows=(counts.cumsum(0) + order).to(device),
        )

    @property
    def all_grids(self) -> tuple[Grid, ...]:
        """The grids of all prompts in order."""
        return tuple(grid for grids in self.grids for grid in grids)

    @property
    def prunable(self) -> Tensor:
        """Bool [N], the visual tokens that may go."""
        return self.pools >= 0

    def with_probes(self, rows: Tensor, probes: Tensor | float) -> Tensor:
        """[T, …] and [B, …] as [T + B, …], every prompt followed by its probe."""
        both = rows.new_empty(len(rows) + len(self.counts), *rows.shape[1:])
        both[self.prompt_rows], both[self.probe_rows] = rows, probes
        return both

    def survivors(self, kept: Tensor) -> tuple[Tensor, list[int]]:
        """Rows left when of the visual tokens only `kept` [N] stay, and how many of each prompt."""
        stays = torch.ones(len(self.token_ids), dtype=torch.bool, device=kept.device)
        stays[self.visual_rows] = kept
        counts = [int(part.sum()) for part in stays.split(self.counts)]
        return stays.nonzero().flatten(), counts

    def keep(self, rows: Tensor, kept: Tensor, counts: list[int]) -> "Batch":
        """The batch of the rows that survive; arguments as `survivors` takes and gives them."""
        stands = torch.zeros(len(self.token_ids), dtype=torch.bool, device=rows.device)
        stands[self.visual_rows] = True
        left = torch.tensor(counts)
        order = torch.arange(len(counts))
        return replace(
            self,
            token_ids=self.token_ids[rows],
            positions=self.positions[:, rows],
            visual_rows=stands[rows].nonzero().flatten(),
            pools=self.pools[kept],
            counts=counts,
            visual_counts=[int(part.sum()) for part in kept.split(self.visual_counts)],
            prompt_rows=(torch.arange(len(rows)) + order.repeat_interleave(left)).to(rows.device),
            probe_rows=(left.cumsum(0) + order).to(rows.device),
        )


def _pools(
    prompts: Sequence[Prompt], config: Config, prune_videos: bool
) -> tuple[Tensor, list[list[tuple[int, int]]], frozenset[int]]:
    """Pool of every visual token, the sizes of what each pool is made of, and which are videos."""
    merge, numbers, sizes, clips = config.vision_config.spatial_merge_size, [], [], []
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
    """int64 [B], the last row of each of the packed sequences of these lengths."""
    return torch.tensor(counts, device=device).cumsum(0) - 1
