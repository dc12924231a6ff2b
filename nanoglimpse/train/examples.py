"""From pictures with questions to packed training batches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from ..config import Config
from ..processor import Processor, preprocess_image
from ..rope import Grid, mrope_positions
from .branches import Branches

Box = tuple[float, float, float, float]
IGNORED = -100
SHORT_WEIGHT = 3.0


@dataclass(frozen=True)
class Asked:
    """A question, the wanted reply, the part of it that matters most, and where to look."""

    question: str
    answer: str
    short: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Example:
    """A picture and what is asked about it."""

    image: Image.Image
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Batch:
    """B pictures of one size with n questions each, as packed rows; see `Branches`.

    Attributes:
        patches: [P, patch_dim] of all pictures, fp32 or raw.
        grids: of the pictures.
        layout: of the rows.
        token_ids: int64 [T]; behind a branch's end, padding.
        positions: int64 [3, T].
        visual_rows: int64 [N].
        labels: int64 [B · n · S], what each row of a branch has to predict, or IGNORED.
        weights: fp32 [B · n · S], how much that counts.
        value_rows: int64 [B · n], where the first token of the short answer is predicted.
        probe_rows: int64 [B · n], where the glimpse rides; empty without one.
        evidence: bool [B · n, N / B], the visual tokens that the answer needs.
        located: bool [B · n], whether the example says where to look.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    layout: Branches
    token_ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    labels: Tensor
    weights: Tensor
    value_rows: Tensor
    probe_rows: Tensor
    evidence: Tensor
    located: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The batch on a device, patches in `dtype` unless they are raw."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.patches.is_floating_point():
            moved["patches"] = moved["patches"].to(dtype)
        return replace(self, **moved)


@dataclass(frozen=True)
class _Branch:
    token_ids: list[int]
    labels: list[int]
    weights: list[float]
    value: int
    probe: int


def collate(
    examples: Sequence[Example], processor: Processor, *, probes: bool, gap: int = 0
) -> Batch:
    """A batch of pictures that come out of preprocessing in one size, with equally many questions.

    Args:
        examples: each with the same number of questions.
        processor: of the checkpoint.
        probes: leave a row for the glimpse before each answer (official `insert_learnable…`).
        gap: how many positions further from the picture questions begin, as if text came between.
    """
    config = processor.config
    pictures = [preprocess_image(e.image, config=processor.pixels) for e in examples]
    grid = pictures[0][1]
    prefix = _prefix(processor, grid)
    branches = [_branch(processor, grid, a, probes) for e in examples for a in e.asked]
    length = max(len(branch.token_ids) for branch in branches)
    layout = Branches(len(examples), len(prefix), len(examples[0].asked), length)
    ids = torch.tensor(prefix)
    positions = mrope_positions(ids, [grid], config)
    following = positions.max() + 1 + gap + torch.arange(length)
    pad = prefix[0]
    visual = (ids == config.image_token_id).nonzero().flatten()
    first = torch.arange(layout.pictures)[:, None] * layout.prefix
    starts = layout.split + torch.arange(len(branches)) * length
    return Batch(
        patches=torch.cat([patches for patches, _ in pictures]),
        grids=tuple(grid for _, grid in pictures),
        layout=layout,
        token_ids=torch.cat(
            [
                ids.repeat(layout.pictures),
                torch.tensor([_padded(b.token_ids, length, pad) for b in branches]).flatten(),
            ]
        ),
        positions=torch.cat(
            [positions.repeat(1, layout.pictures), following.repeat(3, len(branches))], dim=1
        ),
        visual_rows=(visual + first).flatten(),
        labels=torch.tensor([_padded(b.labels, length, IGNORED) for b in branches]).flatten(),
        weights=torch.tensor([_padded(b.weights, length, 0.0) for b in branches]).flatten(),
        value_rows=starts + torch.tensor([b.value for b in branches]),
        probe_rows=starts + torch.tensor([b.probe for b in branches])
        if probes
        else torch.empty(0, dtype=torch.int64),
        evidence=torch.stack(
            [token_mask(a.boxes, grid, config) for e in examples for a in e.asked]
        ),
        located=torch.tensor([bool(a.boxes) for e in examples for a in e.asked]),
    )


def _padded(values: list, length: int, filler: float) -> list:
    return values + [filler] * (length - len(values))


def _turn(processor: Processor, grid: Grid, question: str) -> list[str | int]:
    config = processor.config
    count = grid[0] * grid[1] * grid[2] // config.vision_config.merge_unit
    pads = [config.image_token_id] * count
    return [config.vision_start_token_id, *pads, config.vision_end_token_id, question]


def _prefix(processor: Processor, grid: Grid) -> list[int]:
    """Tokens of a prompt up to its question."""
    ids = processor.encode(processor.chat(_turn(processor, grid, "")))
    return ids[: ids.index(processor.config.vision_end_token_id) + 1]


def _branch(processor: Processor, grid: Grid, asked: Asked, probe: bool) -> _Branch:
    """Question, answer and end, with what each row has to predict.

    As in the official training, the answer, <|im_end|> and the line break behind it count; the row
    before the answer, which is the glimpse where there is one, predicts its first token.
    """
    ids = processor.encode(processor.chat(_turn(processor, grid, asked.question)))
    question = ids[ids.index(processor.config.vision_end_token_id) + 1 :]
    answer, weights = _answer(processor, asked)
    tail = processor.encode([processor.control("<|im_end|>"), "\n"])
    wanted, weights = answer + tail, weights + [1.0] * len(tail)
    body = question + [question[-1]] * probe
    token_ids = (body + wanted)[:-1]
    silent = len(body) - 1
    value = silent + (weights.index(SHORT_WEIGHT) if SHORT_WEIGHT in weights else 0)
    labels, weights = [IGNORED] * silent + wanted, [0.0] * silent + weights
    return _Branch(token_ids, labels, weights, value, silent)


def _answer(processor: Processor, asked: Asked) -> tuple[list[int], list[float]]:
    """Tokens of the answer; those of its short form weigh more."""
    encoded = processor.tokenizer.encode(asked.answer, add_special_tokens=False)
    found = re.search(rf"(?<!\w){re.escape(asked.short)}(?!\w)", asked.answer, re.IGNORECASE)
    start, stop = found.span() if found else (0, 0)
    weights = [SHORT_WEIGHT if a < stop and b > start else 1.0 for a, b in encoded.offsets]
    return encoded.ids, weights


def token_mask(boxes: Sequence[Box], grid: Grid, config: Config) -> Tensor:
    """Bool [N], the visual tokens under boxes (official `bbox → mask`, both ends inclusive).

    A box that ends exactly on the border of a cell also marks the next one, as there.
    """
    merge = config.vision_config.spatial_merge_size
    height, width = grid[1] // merge, grid[2] // merge
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        columns = slice(int(x0 * width), min(int(x1 * width), width - 1) + 1)
        rows = slice(int(y0 * height), min(int(y1 * height), height - 1) + 1)
        mask[rows, columns] = True
    return mask.flatten()
