"""Packs pictures and their questions into training batches."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoglimpse.data.qa import QA, Example, token_mask
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.model.rope import Grid, mrope_positions, visual_tokens
from nanoglimpse.train.shared_prefix import SharedPrefixLayout

IGNORED = -100
SHORT_WEIGHT = 3.0


@dataclass(frozen=True)
class TrainBatch:
    """B pictures of one size with n questions each, as packed rows; see `SharedPrefixLayout`.

    Attributes:
        patches: [P, patch_dim], the patches of all pictures, fp32 or raw.
        grids: the grid of each picture.
        layout: the layout of the rows.
        token_ids: int64 [T], with padding at the end of branches.
        positions: int64 [3, T], the M-RoPE positions.
        visual_rows: int64 [N], the rows of the visual tokens.
        labels: int64 [B · n · S], the token that each row of a branch has to predict, or IGNORED.
        weights: fp32 [B · n · S], the weight of each label.
        value_rows: int64 [B · n], the rows that predict the first token of the short answer.
        probe_rows: int64 [B · n], the rows before the answers, which are those of the glimpse token
            if there is one.
        evidence: bool [B · n, N / B], the visual tokens under the evidence.
        located: bool [B · n], whether a question has evidence in its picture.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    layout: SharedPrefixLayout
    token_ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    labels: Tensor
    weights: Tensor
    value_rows: Tensor
    probe_rows: Tensor
    evidence: Tensor
    located: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "TrainBatch":
        """The batch on a device; patches are converted to `dtype` unless they are raw."""
        moved: dict[str, Any] = {
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
) -> TrainBatch:
    """Packs examples whose pictures have one size after preprocessing.

    Args:
        examples: examples with the same number of questions each.
        processor: the processor of the checkpoint.
        probes: whether to insert a row for the glimpse before each answer, as the official
            `insert_learnable…` does.
        gap: distance to add between the positions of the picture and the question, as if there
            were text between them.
    """
    config = processor.config
    pictures = [preprocess_image(e.image, config=processor.pixels) for e in examples]
    grid = pictures[0][1]
    qas = [qa for example in examples for qa in example.qas]
    prefix = _prefix(processor, grid)
    branches = [_branch(processor, grid, qa, probes) for qa in qas]
    length = max(len(branch.token_ids) for branch in branches)
    layout = SharedPrefixLayout(len(examples), len(prefix), len(examples[0].qas), length)
    ids = torch.tensor(prefix)
    positions = mrope_positions(ids, [grid], config)
    following = positions.max() + 1 + gap + torch.arange(length)
    visual = (ids == config.image_token_id).nonzero().flatten()
    first = torch.arange(layout.pictures)[:, None] * layout.prefix_rows
    starts = layout.branch_start + torch.arange(len(branches)) * length

    evidence = torch.stack([token_mask(qa.boxes, grid, config) for qa in qas])

    def padded(values: list[list], filler: float) -> Tensor:
        return torch.tensor([own + [filler] * (length - len(own)) for own in values]).flatten()

    return TrainBatch(
        patches=torch.cat([patches for patches, _ in pictures]),
        grids=tuple(grid for _, grid in pictures),
        layout=layout,
        token_ids=torch.cat(
            [ids.repeat(layout.pictures), padded([b.token_ids for b in branches], prefix[0])]
        ),
        positions=torch.cat(
            [positions.repeat(1, layout.pictures), following.repeat(3, len(branches))], dim=1
        ),
        visual_rows=(visual + first).flatten(),
        labels=padded([b.labels for b in branches], IGNORED),
        weights=padded([b.weights for b in branches], 0.0),
        value_rows=starts + torch.tensor([b.value for b in branches]),
        probe_rows=starts + torch.tensor([b.probe for b in branches]),
        evidence=evidence,
        located=evidence.any(1),
    )


def _turn(processor: Processor, grid: Grid, question: str) -> list[str | int]:
    config = processor.config
    pads = [config.image_token_id] * visual_tokens(grid, config)
    return [config.vision_start_token_id, *pads, config.vision_end_token_id, question]


def _prefix(processor: Processor, grid: Grid) -> list[int]:
    """The tokens of a prompt before its question."""
    ids = processor.encode(processor.chat(_turn(processor, grid, "")))
    return ids[: ids.index(processor.config.vision_end_token_id) + 1]


def _branch(processor: Processor, grid: Grid, qa: QA, probe: bool) -> _Branch:
    """Question and answer, and the label of each row.

    As in the official training, the labels are the answer, <|im_end|> and a line break. The row
    before the answer, which is the glimpse if there is one, predicts the first of them.
    """
    ids = processor.encode(processor.chat(_turn(processor, grid, qa.question)))
    question = ids[ids.index(processor.config.vision_end_token_id) + 1 :]
    answer, weights = _answer(processor, qa)
    tail = processor.encode([processor.control("<|im_end|>"), "\n"])
    wanted, weights = answer + tail, weights + [1.0] * len(tail)
    body = question + [question[-1]] * probe
    token_ids = (body + wanted)[:-1]
    silent = len(body) - 1
    value = silent + (weights.index(SHORT_WEIGHT) if SHORT_WEIGHT in weights else 0)
    labels, weights = [IGNORED] * silent + wanted, [0.0] * silent + weights
    return _Branch(token_ids, labels, weights, value, silent)


def _answer(processor: Processor, qa: QA) -> tuple[list[int], list[float]]:
    """The tokens of the answer and their weights; the short answer has larger ones."""
    encoded = processor.need_tokenizer().encode(qa.answer, add_special_tokens=False)
    found = re.search(rf"(?<!\w){re.escape(qa.short)}(?!\w)", qa.answer, re.IGNORECASE)
    start, stop = found.span() if found else (0, 0)
    weights = [SHORT_WEIGHT if a < stop and b > start else 1.0 for a, b in encoded.offsets]
    return encoded.ids, weights
