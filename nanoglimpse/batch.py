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
        prunable: bool [N]; tokens of videos are not, as in the official code.
        grids: of each prompt.
        image_sizes: (rows, columns) in visual tokens of each prompt's images, videos left out.
        counts: rows of each prompt.
        visual_counts: visual tokens of each prompt.
        next_position: int64 [B], the largest position of each prompt + 1.
        prompt_rows: int64 [T].
        probe_rows: int64 [B].
    """

    token_ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    prunable: Tensor
    grids: list[tuple[Grid, ...]]
    image_sizes: list[list[tuple[int, int]]]
    counts: list[int]
    visual_counts: list[int]
    next_position: Tensor
    prompt_rows: Tensor
    probe_rows: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], config: Config, device: torch.device) -> "Batch":
        """Packs prompts and moves them to the device."""
        token_ids = torch.cat([prompt.token_ids for prompt in prompts])
        visual_rows = torch.cat([prompt.visual for prompt in prompts]).nonzero().flatten()
        counts = torch.tensor([len(prompt) for prompt in prompts])
        order = torch.arange(len(prompts))
        return cls(
            token_ids=token_ids.to(device),
            positions=torch.cat([prompt.positions for prompt in prompts], dim=1).to(device),
            visual_rows=visual_rows.to(device),
            prunable=(token_ids[visual_rows] == config.image_token_id).to(device),
            grids=[prompt.grids for prompt in prompts],
            image_sizes=[_image_sizes(prompt, config) for prompt in prompts],
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
            prunable=self.prunable[kept],
            counts=counts,
            visual_counts=[int(part.sum()) for part in kept.split(self.visual_counts)],
            prompt_rows=(torch.arange(len(rows)) + order.repeat_interleave(left)).to(rows.device),
            probe_rows=(left.cumsum(0) + order).to(rows.device),
        )


def _image_sizes(prompt: Prompt, config: Config) -> list[tuple[int, int]]:
    merge, placeholders = config.vision_config.spatial_merge_size, prompt.token_ids[prompt.visual]
    sizes, first = [], 0
    for grid in prompt.grids:
        if int(placeholders[first]) == config.image_token_id:
            sizes.append((grid[1] // merge, grid[2] // merge))
        first += visual_tokens(grid, config)
    return sizes


def last_rows(counts: Sequence[int], device: torch.device) -> Tensor:
    """int64 [B], the last row of each of the packed sequences of these lengths."""
    return torch.tensor(counts, device=device).cumsum(0) - 1
