"""Positions and rotation tables: M-RoPE for the decoder, 2-D RoPE for vision and predictor."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nanoglimpse.config import Config, TextConfig
from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import upload

Grid = tuple[int, int, int]


def mrope_positions(
    token_ids: Tensor,
    grids: Sequence[Grid],
    config: Config,
    seconds_per_grid: float | Sequence[float] | None = None,
) -> Tensor:
    """Position ids of a prompt on the axes time, height and width (arXiv 2502.13923, Sec. 2.1.2).

    Text advances all three axes together. The tokens of an image share one time and carry their row
    and column; those of a video also advance in time. What follows starts after the largest id so
    far, as in transformers 4.51, with which the models were trained (5.x forgets the time axis).

    Args:
        token_ids: int64 [T].
        grids: (t, h, w) in patches of each image and video, in order of appearance.
        config: of the model; names the placeholder ids.
        seconds_per_grid: seconds between temporal patches, for all videos or for each; 1 if None.

    Returns:
        int64 [3, T]

    Raises:
        UsageError: the placeholders or the seconds do not fit the grids.
    """
    merge, per_second = (
        config.vision_config.spatial_merge_size,
        config.vision_config.tokens_per_second,
    )
    visual_rows = visual_mask(token_ids, config).nonzero().flatten().tolist()
    expected = sum(visual_tokens(grid, config) for grid in grids)
    if len(visual_rows) != expected:
        raise UsageError(
            f"the prompt has {len(visual_rows)} placeholders for visual tokens, "
            f"its {len(grids)} grids make {expected}"
        )
    parts, row, following, taken, videos = [], 0, 0, 0, 0
    for grid in grids:
        count, start = visual_tokens(grid, config), visual_rows[taken]
        placeholders = token_ids[start : start + count]
        if not bool((placeholders == placeholders[0]).all()):
            raise UsageError(f"grid {tuple(grid)} needs {count} equal placeholders in a row")
        interval = 0.0
        if int(placeholders[0]) == config.video_token_id:
            interval, videos = _seconds(seconds_per_grid, videos), videos + 1
        parts.append(_text(start - row, following))
        time = (torch.arange(grid[0]) * interval * per_second).long()
        axes = (time, torch.arange(grid[1] // merge), torch.arange(grid[2] // merge))
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        parts.append(cells + following + start - row)
        following = int(parts[-1].max()) + 1
        row, taken = start + count, taken + count
    if isinstance(seconds_per_grid, Sequence) and len(seconds_per_grid) != videos:
        raise UsageError(f"seconds_per_grid has {len(seconds_per_grid)} values for {videos} videos")
    parts.append(_text(len(token_ids) - row, following))
    return torch.cat(parts, dim=1)


def _seconds(seconds_per_grid: float | Sequence[float] | None, video: int) -> float:
    if seconds_per_grid is None:
        return 1.0
    if isinstance(seconds_per_grid, int | float):
        return float(seconds_per_grid)
    # Too few are reported with their number, once all videos are counted.
    return float(seconds_per_grid[video]) if video < len(seconds_per_grid) else 1.0


def _text(count: int, start: int) -> Tensor:
    return torch.arange(start, start + count).expand(3, -1)


def visual_mask(token_ids: Tensor, config: Config) -> Tensor:
    """Bool [T]: the placeholders that visual tokens replace."""
    return (token_ids == config.image_token_id) | (token_ids == config.video_token_id)


def visual_tokens(grid: Grid, config: Config) -> int:
    """Visual tokens of a grid of patches."""
    t, h, w = grid
    return t * h * w // config.vision_config.merge_unit


def mrope(positions: Tensor, config: TextConfig) -> Rope:
    """Decoder tables for positions [3, T].

    The frequencies of a head are dealt out to the axes in three neighbouring sections.
    """
    axis = _axis_of_frequency(tuple(config.mrope_section), positions.device)
    return Rope.of(positions[axis].T * frequencies(config, positions.device))


@lru_cache
def _axis_of_frequency(section: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [D/2]"""
    with torch.inference_mode(False):
        return upload(torch.arange(3).repeat_interleave(torch.tensor(section)), device)


@lru_cache
def frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """fp32 [D/2], by how many radians a decoder head turns from one position to the next."""
    half = config.head_dim // 2
    with torch.inference_mode(False):
        steps = torch.arange(half, dtype=torch.float32, device=device)
        return config.rope_theta ** (-steps / half)


def axial_rope(rows: Tensor, columns: Tensor, head_dim: int) -> Rope:
    """2-D tables: the first quarter of a head turns with the row, the second with the column.

    Args:
        rows, columns: int64 [T].
        head_dim: D, a multiple of 4.

    Returns:
        Tables [T, D], θ = 10⁴.
    """
    steps = torch.arange(head_dim // 4, dtype=torch.float32, device=rows.device)
    inv_freq = 10000.0 ** (-steps / (head_dim // 4))
    return Rope.of(torch.cat((rows[:, None] * inv_freq, columns[:, None] * inv_freq), -1))
