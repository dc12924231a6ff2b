"""Questions through the engine to results: one flat record each."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..cost import Rows, count
from ..engine import Engine, Sight
from ..methods import METHODS, Method
from ..results import Clock, Prefill, peak_bytes
from ..rope import Grid
from ..train.examples import Example, token_mask
from .arms import Arm
from .questions import Item
from .scores import anls, contains, exact, overlap, token_f1

MAX_NEW_TOKENS = 64
THUMB = 448


@dataclass(frozen=True)
class Shown:
    """What the vision encoder said of a batch's pictures, its milliseconds, and its peak memory."""

    sight: Sight
    vision: float
    peak: int | None


class Lot:
    """A batch of questions whose pictures are read and seen once, however they are answered.

    Attributes:
        items: the questions, with their pictures.
        prompts: of them.
        masks: bool [N] of each, the visual tokens of its evidence.
        preprocess: milliseconds.
    """

    def __init__(
        self,
        engine: Engine,
        items: Sequence[Item],
        *,
        shown: dict[tuple, Shown] | None = None,
        prompt_options: dict | None = None,
    ):
        """Reads the pictures.

        Args:
            engine: that answers.
            items: what is asked.
            shown: of another lot about the same pictures; takes what this one sees.
            prompt_options: of `Processor.prompt`.
        """
        self.engine, begun = engine, time.perf_counter()
        self.items = [item.opened() for item in items]
        self.prompts = [
            engine.prompt(item.picture, item.asked.question, **prompt_options or {})
            for item in self.items
        ]
        self.preprocess = 1000 * (time.perf_counter() - begun)
        self.masks = [
            token_mask(item.asked.boxes, prompt.grids[0], engine.config)
            for item, prompt in zip(self.items, self.prompts, strict=True)
        ]
        self.shown = {} if shown is None else shown

    def see(self, patches: Tensor, grids: Sequence[Grid], method: Method) -> Sight:
        """`Engine.see`, once for all methods that want to know the same."""
        key = self._key(method)
        if key not in self.shown:
            clock = Clock(self.engine.device)
            sight = self.engine.see(patches, grids, method)
            clock.lap("vision")
            spent = clock.milliseconds()["vision"]
            self.shown[key] = Shown(sight, spent, _peak(self.engine.device))
        return self.shown[key].sight

    def seen(self, method: Method) -> Shown:
        """What `see` gave this method, and what that cost."""
        return self.shown[self._key(method)]

    def _key(self, method: Method) -> tuple:
        return tuple(self.engine.taps(method)), tuple(method.watches(self.engine))


def answer(
    lot: Lot, arm: Arm, *, max_new_tokens: int = MAX_NEW_TOKENS, gallery: int = 0
) -> list[dict]:
    """A result for each question of a lot, computed in one batch, greedily.

    Times are the batch's, shared evenly; so at a batch of one they are what a user waits. Every
    method is charged with what seeing the pictures cost, whether it was the first to ask for it.

    Args:
        lot: what is asked.
        arm: how.
        max_new_tokens: at most so many for each.
        gallery: the first so many questions of a group carry kept cells and importance.
    """
    engine, items = lot.engine, lot.items
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    prefill = engine.prefill_many(
        lot.prompts,
        max_new_tokens=max_new_tokens,
        evidence=lot.masks,
        seed=[item.number for item in items],
        see=lot.see,
        **arm.options,
    )
    tokens, decode = _decode(engine, prefill, max_new_tokens)
    shown, peak = lot.seen(METHODS[arm.method]), _peak(engine.device)
    stages = {"preprocess": lot.preprocess} | _stages(prefill.timings) | {"vision": shown.vision}
    batch = {
        "ms": {name: spent / len(items) for name, spent in stages.items()} | {"decode": decode},
        "batch": len(items),
        "peak_bytes": None if peak is None else max(peak, shown.peak),
    }
    results = []
    for i, item in enumerate(items):
        result = _asked(item, arm) | _scored(item, engine.processor.decode(tokens[i]))
        result |= _kept(prefill, i, lot.masks[i])
        result |= _spent(engine, prefill, i, len(tokens[i])) | batch
        results.append(result | (_seen(engine, prefill, i, item) if item.number < gallery else {}))
    return results


def _peak(device: torch.device) -> int | None:
    return peak_bytes(device) if device.type == "cuda" else None


def _asked(item: Item, arm: Arm) -> dict:
    return {
        "question": item.name,
        "arm": arm.name,
        "method": arm.method,
        "ratio": arm.ratio,
        "brief": arm.brief,
        "kv_drop": arm.kv_drop,
        "group": item.group,
        "kind": item.kind,
        "asked": item.asked.question,
        "wanted": item.asked.answer,
        "short": item.asked.short,
    }


def _scored(item: Item, reply: str) -> dict:
    wanted, short = item.asked.answer, item.asked.short
    return {
        "reply": reply,
        "contains": contains(reply, short),
        "exact": exact(reply, wanted),
        "anls": anls(reply, wanted),
        "f1": token_f1(reply, wanted),
    }


def _kept(prefill: Prefill, i: int, mask: Tensor) -> dict:
    kept = _own(prefill, prefill.kept, i)
    recall, iou = overlap(kept, mask)
    return {"visual": len(kept), "kept": int(kept.sum()), "recall": recall, "iou": iou}


def _own(prefill: Prefill, values: Tensor, i: int) -> Tensor:
    """What belongs to one prompt, of values of all visual tokens."""
    return values.split(prefill.batch.visual_counts)[i].cpu()


def _decode(engine: Engine, prefill: Prefill, limit: int) -> tuple[list[list[int]], float | None]:
    """Token ids of each answer, and milliseconds a token after the first ones."""
    answers: list[list[int]] = [[] for _ in prefill.batch.counts]
    moments = []
    for tokens in engine.decode_many(prefill, limit, ahead=engine.ahead):
        moments.append(time.perf_counter())
        for own, token in zip(answers, tokens, strict=True):
            if token is not None:
                own.append(token)
    later = sum(map(len, answers)) - len(answers)
    return answers, 1000 * (moments[-1] - moments[0]) / later if later else None


def _stages(timings: dict[str, float]) -> dict[str, float]:
    """Stages under names that do not tell K: layers before the first pruning and behind it."""
    stages = {"vision": 0.0, "before": 0.0, "score": 0.0, "keep": 0.0, "after": 0.0}
    for name, spent in timings.items():
        if name.startswith("layers"):
            name = "before" if "<" in name else "after"
        stages[name] += spent
    return stages


def _spent(engine: Engine, prefill: Prefill, i: int, tokens: int) -> dict:
    """Budgets, cache and FLOPs of one prompt of a batch and its answer."""
    config, rows = engine.config.text_config, Rows.of(engine, prefill, i)
    budgets = prefill.budgets_of(i)
    cached = config.num_hidden_layers * rows.text + sum(rows.cached)
    row_bytes = 2 * config.num_key_value_heads * config.head_dim * engine.dtype.itemsize
    return {
        "prompt": rows.total,
        "tokens": tokens,
        "stop": next(iter(rows.stops), None),
        "input": budgets.input_ratio,
        "prefill": budgets.prefill_ratio,
        "decode_kv": budgets.decode_kv_ratio,
        "kv_rows": cached / config.num_hidden_layers,
        "kv_bytes": cached * row_bytes,
        "flops": count(engine, prefill, i, tokens),
    }


def _seen(engine: Engine, prefill: Prefill, i: int, item: Item) -> dict:
    """What the gallery shows: grid, kept cells as bits, importance as bytes, both in hex."""
    merge, importance = engine.config.vision_config.spatial_merge_size, prefill.importance
    shown = None
    # A method that looks several times has importance for what was left at the last look alone.
    if importance is not None and len(importance) == len(prefill.kept):
        own = _own(prefill, importance, i)
        shown = bytes((255 * own.float().sigmoid()).round().int().tolist()).hex()
    return {
        "grid": [side // merge for side in prefill.batch.grids[i][0][1:]],
        "boxes": item.asked.boxes,
        "cells": bits(_own(prefill, prefill.kept, i)),
        "importance": shown,
    }


def bits(mask: Tensor) -> str:
    """bool [N] as hex digits, the first cell the highest bit, filled up with zeros."""
    text = "".join("01"[value] for value in mask.tolist())
    text += "0" * (-len(text) % 8)
    return f"{int(text or '0', 2):0{len(text) // 4}x}"


def thumbnail(item: Item) -> str:
    """A small JPEG of the picture as a data URI."""
    image, data = item.opened().picture.copy(), io.BytesIO()
    image.thumbnail((THUMB, THUMB))
    image.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


def figures(
    engine: Engine, examples: Sequence[Example], arm: Arm | None = None, batch: int = 8
) -> dict[str, float]:
    """Retention, recall of the evidence's visual tokens, and accuracy, each a mean over questions.

    Args:
        engine: answers greedily, with the pruning rule of its weights.
        examples: pictures with questions; the recall is over those that have evidence.
        arm: GlimpsePrune without a cap if None.
        batch: questions at a time.
    """
    asked = [(example.image, one) for example in examples for one in example.asked]
    items = (Item(str(n), "", "", n, image, one) for n, (image, one) in enumerate(asked))
    lots = (Lot(engine, some) for some in batches(items, batch))
    rows = [row for lot in lots for row in answer(lot, arm or Arm("glimpse"))]
    values = {
        "retention": [row["kept"] / row["visual"] for row in rows],
        "recall": [row["recall"] for row in rows if row["recall"] is not None],
        "accuracy": [float(row["contains"]) for row in rows],
    }
    return {name: sum(own) / max(len(own), 1) for name, own in values.items()}
