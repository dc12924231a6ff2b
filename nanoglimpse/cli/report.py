"""An answer as lines of statistics, and as a JSON object."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanoglimpse.cli.options import in_bytes
from nanoglimpse.inference.outputs import Answer
from nanoglimpse.model.model import Model
from nanoglimpse.version import VERSION


def report(answer: Answer) -> list[str]:
    """The statistics of an answer, one line each."""
    s, b = answer.stats, answer.stats.budgets
    share = f" ({s.kept_tokens / s.visual_tokens:.1%})" if s.visual_tokens else ""
    stages = " + ".join(f"{name} {ms:.1f}" for name, ms in s.timings.items())
    lines = [
        f"visual      {s.visual_tokens} tokens, {s.kept_tokens} kept{share}, method {s.method}",
        f"budgets     input {b.input_ratio:.1%}, prefill {b.prefill_ratio:.1%}, "
        f"decode KV {b.decode_kv_ratio:.1%} of the visual tokens",
        f"KV cache    {s.kv_rows[0]} rows, {in_bytes(s.kv_bytes[0])} without pruning; "
        f"{s.kv_rows[1]} rows, {in_bytes(s.kv_bytes[1])} with",
        f"first token {s.first_token:.1f} ms ({stages})",
        f"decode      {len(answer.token_ids)} tokens, {s.decode:.2f} ms a token, "
        f"ended by {answer.finish_reason}",
    ]
    effective = ["repetition_penalty"] if s.sampling.repetition_penalty != 1 else []
    if s.sampling.temperature:
        effective = ["temperature", "top_p", "top_k", *effective]
    if effective:
        told = [f"{name} {getattr(s.sampling, name):g}" for name in effective]
        own = [name for name in effective if name in s.sampling_defaults]
        source = f" (generation_config.json: {', '.join(own)})" if own else ""
        lines.append(f"sampling    {', '.join(told)}{source}")
    if s.peak_bytes:
        lines.append(f"peak memory {in_bytes(s.peak_bytes)}")
    return lines


def as_dict(
    model: Model, question: str, images: Sequence[str | None], answer: Answer
) -> dict[str, Any]:
    """The object that `--json` prints; `images` are names, None for those of a saved session."""
    stats = asdict(answer.stats)
    return {
        "answer": answer.text,
        "question": question,
        "images": list(images),
        "tokens": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "visual_tokens": stats.pop("visual_tokens"),
        "kept_tokens": stats.pop("kept_tokens"),
        "kept": answer.kept.nonzero().flatten().tolist(),
        "grids": answer.grids,
        **stats,
        "versions": {
            "nanoglimpse": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": model.name,
            "device": str(model.device),
            "dtype": str(model.dtype)[6:],
            "quantize": model.quantized,
        },
    }


def overlay_lines(path: str | Path, left_out: str) -> list[str]:
    """What is said of an overlay that has been written, from the result of `save_overlay`."""
    if not left_out:
        return [f"overlay     {path}"]
    return [
        f"overlay     {path}, without {left_out}: no font has all of the letters; install one, or "
        "name it with --font"
    ]
