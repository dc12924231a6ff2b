"""Answers questions in batches and records what each answer is worth and what it costs."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanoglimpse.data.qa import Example, token_mask
from nanoglimpse.engine import Engine
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.evaluate.questions import EvalQuestion, QuestionSource
from nanoglimpse.evaluate.scores import anls, best, contains, exact, overlap, token_f1
from nanoglimpse.evaluate.variants import Variant
from nanoglimpse.flops import RowCounts, count
from nanoglimpse.inference.decode import lookahead
from nanoglimpse.inference.outputs import Clock, Prefill, peak_bytes
from nanoglimpse.inputs.images import joined
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.methods.base import Needs
from nanoglimpse.model.vision import VisionOutput
from nanoglimpse.pictures.picture import load_picture

MAX_NEW_TOKENS = 64
THUMB = 448
Item = TypeVar("Item")


@dataclass(frozen=True)
class CachedVision:
    """The vision encoder's output for the pictures of a batch, and what it cost."""

    output: VisionOutput
    ms: float
    peak_bytes: int | None


class QuestionBatch:
    """A batch of questions; its pictures are read and encoded once for all variants.

    Attributes:
        questions: the questions with their pictures in memory, without those in `failed`.
        failed: a record for each question whose picture cannot be used.
        prompts: a prompt for each question.
        masks: bool [N] for each question, the visual tokens of its evidence.
        preprocess: the milliseconds spent on reading the pictures.
        vision: the cached outputs of the vision encoder.
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[EvalQuestion],
        vision: dict[tuple, CachedVision] | None = None,
        **prompt_options: Any,
    ):
        """Reads the pictures and makes the prompts.

        Args:
            engine: the engine that answers.
            questions: the questions.
            vision: the cache of another batch about the same pictures, to share with it.
            prompt_options: keyword arguments of `Engine.prompt`.
        """
        self.engine, begun = engine, time.perf_counter()
        self.questions: list[EvalQuestion] = []
        self.prompts: list[Prompt] = []
        self.failed: list[dict] = []
        for question in questions:
            try:
                loaded = question.loaded()
                asked = loaded.qa.question
                self.prompts.append(engine.prompt(loaded.picture, asked, **prompt_options))
                self.questions.append(loaded)
            except NanoglimpseError as error:
                self.failed.append({"question": question.name, "error": str(error)})
        self.preprocess = 1000 * (time.perf_counter() - begun)
        self.masks = [
            token_mask(question.qa.boxes, prompt.grids[0], engine.config)
            for question, prompt in zip(self.questions, self.prompts, strict=True)
        ]
        self.vision = {} if vision is None else vision

    @torch.inference_mode()
    def vision_for(self, needs: Needs) -> CachedVision:
        """The vision encoder's output, once for all methods that need the same of it."""
        key = needs.taps, needs.vision_blocks
        if key not in self.vision:
            clock, grids = Clock(self.engine.device), [g for p in self.prompts for g in p.grids]
            patches = joined([prompt.patches for prompt in self.prompts])
            output = self.engine.model.encode(patches, grids, *key)
            clock.lap("vision")
            spent = clock.milliseconds()["vision"]
            self.vision[key] = CachedVision(output, spent, _peak(self.engine.device))
        return self.vision[key]


def answer_batch(
    batch: QuestionBatch, variant: Variant, max_new_tokens: int = MAX_NEW_TOKENS, gallery: int = 0
) -> list[dict]:
    """Answers a batch greedily and returns a result for each of its questions.

    The times of the batch are divided evenly among its questions, so that only a batch of one
    measures the latency of an answer. Every variant is charged for the vision encoder, whether it
    ran for this variant or for an earlier one.

    Args:
        batch: the questions.
        variant: how to answer them.
        max_new_tokens: limit for each answer.
        gallery: results of the first `gallery` questions of a group include kept cells and
            importance.
    """
    engine, questions = batch.engine, batch.questions
    if not questions:
        return []
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    pruning = variant.pruning.resolve(engine.model)
    vision = batch.vision_for(pruning.needs)
    prefill = engine.prefill_many(
        batch.prompts,
        pruning,
        max_new_tokens=max_new_tokens,
        evidence=batch.masks,
        seed=[question.number for question in questions],
        vision=vision.output,
    )
    tokens, decode = _decode(engine, prefill, max_new_tokens)
    peak = _peak(engine.device)
    stages = {"preprocess": batch.preprocess} | _stages(prefill.timings) | {"vision": vision.ms}
    shared = {
        "ms": {name: spent / len(questions) for name, spent in stages.items()} | {"decode": decode},
        "batch": len(questions),
        "peak_bytes": None if peak is None else max(peak, vision.peak_bytes or 0),
    }
    results = []
    for i, question in enumerate(questions):
        reply = engine.processor.decode(tokens[i])
        result = _scored(question, variant, reply) | _kept(prefill, i, batch.masks[i])
        result |= _costs(engine, prefill, i, len(tokens[i])) | shared
        if question.number < gallery:
            result |= _gallery_entry(engine, prefill, i, question)
        results.append(result)
    return results


def _peak(device: torch.device) -> int | None:
    return peak_bytes(device) if device.type == "cuda" else None


def _scored(question: EvalQuestion, variant: Variant, reply: str) -> dict:
    """A reply with its scores, and the question and the variant that it comes from."""
    qa = question.qa
    answers, shorts = qa.answers or (qa.answer,), qa.shorts or (qa.short,)
    return {
        "question": question.name,
        "arm": variant.name,
        **vars(variant),
        "group": question.group,
        "kind": question.kind,
        "asked": qa.question,
        "wanted": " or ".join(answers),
        "short": " or ".join(shorts),
        "reply": reply,
        "contains": best(contains, reply, shorts),
        "exact": best(exact, reply, answers),
        "anls": best(anls, reply, answers),
        "f1": best(token_f1, reply, answers),
        **({"outside": True} if question.outside else {}),
    }


def _kept(prefill: Prefill, i: int, mask: Tensor) -> dict:
    kept = _of_prompt(prefill, prefill.kept, i)
    recall, iou = overlap(kept, mask)
    return {"visual": len(kept), "kept": int(kept.sum()), "recall": recall, "iou": iou}


def _of_prompt(prefill: Prefill, values: Tensor, i: int) -> Tensor:
    """The part of prompt `i` in values of the visual tokens of all prompts."""
    return values.split(prefill.batch.visual_counts)[i].cpu()


def _decode(engine: Engine, prefill: Prefill, limit: int) -> tuple[list[list[int]], float | None]:
    """Token ids of each answer, and milliseconds per token after the first ones."""
    answers: list[list[int]] = [[] for _ in prefill.batch.counts]
    moments = []
    for tokens in engine.decode_many(prefill, limit, ahead=lookahead(engine.device)):
        moments.append(time.perf_counter())
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    later = sum(map(len, answers)) - len(answers)
    return answers, 1000 * (moments[-1] - moments[0]) / later if later else None


def _stages(timings: dict[str, float]) -> dict[str, float]:
    """Milliseconds by stage; the layers are split at the first pruning step, whatever its layer."""
    stages = {"vision": 0.0, "before": 0.0, "score": 0.0, "keep": 0.0, "after": 0.0}
    for name, spent in timings.items():
        if name.startswith("layers"):
            name = "before" if "<" in name else "after"
        stages[name] += spent
    return stages


def _costs(engine: Engine, prefill: Prefill, i: int, tokens: int) -> dict:
    """Budgets, cache and FLOPs of one prompt of the batch and its answer."""
    config, rows = engine.config.text_config, RowCounts.of(prefill, i)
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
        "flops": count(engine.model, prefill, i, tokens),
    }


def _gallery_entry(engine: Engine, prefill: Prefill, i: int, question: EvalQuestion) -> dict:
    """Grid, boxes, kept cells as bits and importance as bytes, the last two in hexadecimal."""
    merge, importance = engine.config.vision_config.spatial_merge_size, prefill.importance
    encoded = None
    # After several pruning steps importance covers only the tokens that reached the last one.
    if importance is not None and len(importance) == len(prefill.kept):
        own = _of_prompt(prefill, importance, i)
        encoded = bytes((255 * own.float().sigmoid()).round().int().tolist()).hex()
    return {
        "grid": [side // merge for side in prefill.batch.grids[i][0][1:]],
        "boxes": question.qa.boxes,
        "cells": bits(_of_prompt(prefill, prefill.kept, i)),
        "importance": encoded,
    }


def bits(mask: Tensor) -> str:
    """Bool [N] as hexadecimal digits, the first cell as the highest bit, padded with zeros."""
    text = "".join("01"[value] for value in mask.tolist())
    text += "0" * (-len(text) % 8)
    return f"{int(text or '0', 2):0{len(text) // 4}x}"


def pictures(batch: QuestionBatch, gallery: int) -> Iterator[dict]:
    """Records of small pictures, for the first `gallery` questions of each group."""
    for question in [question for question in batch.questions if question.number < gallery]:
        image, data = load_picture(question.picture).copy(), io.BytesIO()
        image.thumbnail((THUMB, THUMB))
        image.save(data, "JPEG", quality=85)
        uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        yield {"picture": question.name, "uri": uri}


def rounds(
    source: QuestionSource, variants: Sequence[Variant], size: int, processes: int
) -> Iterator[list[dict[bool, list[EvalQuestion]]]]:
    """Rounds of one batch per process, each batch in all forms of prompts that are needed."""
    forms = sorted({variant.brief for variant in variants})
    every = zip(*(batches(source.questions(form), size) for form in forms), strict=True)
    yield from batches((dict(zip(forms, batch, strict=True)) for batch in every), processes)


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


def score_examples(engine: Engine, examples: Sequence[Example], size: int = 8) -> dict[str, float]:
    """Means of retention, recall of the evidence and accuracy over the questions of examples.

    GlimpsePrune answers them with the rule of its weights.

    Args:
        engine: the engine that answers.
        examples: pictures with questions; those without evidence do not count for the recall.
        size: questions in a batch.
    """
    pairs = [(example.image, qa) for example in examples for qa in example.qas]
    questions = (
        EvalQuestion(str(n), "", "", image, qa, number=n) for n, (image, qa) in enumerate(pairs)
    )
    rows = [
        row
        for some in batches(questions, size)
        for row in answer_batch(QuestionBatch(engine, some), Variant("glimpse"))
    ]
    values = {
        "retention": [row["kept"] / row["visual"] for row in rows],
        "recall": [row["recall"] for row in rows if row["recall"] is not None],
        "accuracy": [float(row["contains"]) for row in rows],
    }
    return {name: sum(column) / max(len(column), 1) for name, column in values.items()}
