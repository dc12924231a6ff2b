"""The contenders: this engine with one method, and transformers with the same weights."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.benchmark.measuring import Memory, best, now, say, wall
from nanoglimpse.benchmark.models import Forced, Workload, random_tensors, shape_config, skeleton
from nanoglimpse.benchmark.roofs import Roofs
from nanoglimpse.benchmark.work import Cost, Work
from nanoglimpse.engine import Engine
from nanoglimpse.flops import RowCounts, session_prefix, session_question
from nanoglimpse.inference.decode import lookahead
from nanoglimpse.inference.outputs import Prefill
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.kernels.backends import TORCH
from nanoglimpse.methods.base import PruningMethod

# Stages that are not a part of the decoder's prefill.
APART = ("vision", "a token", "first question", "further question")
Answers = list[list[int]]


def methods(engine: Engine, args: argparse.Namespace) -> dict[str, str | PruningMethod]:
    """The contenders of this engine by name, and the method of each."""
    shares = args.retain or ([0.111] if args.shape else [])
    if not engine.glimpse:
        return {"dense": "dense"}
    forced = {method.name: method for method in map(Forced, shares) if method.share_kept < 1}
    return {"dense": "dense", **(forced if shares else {"pruned": "glimpse"})}


class Ours:
    """This engine with one method; a round is an answer from the picture to the last token."""

    def __init__(self, workload: Workload, method: str | PruningMethod):
        self.workload, self.engine, self.method = workload, workload.engine, method
        self.new = workload.args.new

    def prefill(self, max_new_tokens: int, trace: bool = False) -> Prefill:
        """A prefill of all prompts."""
        read = partial(self.engine.prefill_many, self.workload.prompts, self.method)
        return read(max_new_tokens=max_new_tokens, trace=trace)

    def answer(self) -> tuple[Prefill, dict[str, float]]:
        """Answers as `Engine.ask` does, from the picture on.

        Returns:
            The prefill; and milliseconds by stage, with the peak of memory in bytes.
        """
        device = self.engine.device
        memory, start = Memory(device), now(device)
        self.workload.preprocess()
        prepared = now(device)
        prefill = self.prefill(self.new)
        moments = self.decode(prefill, lookahead(device))
        return prefill, {
            "preprocess": 1000 * (prepared - start),
            "first token": 1000 * (moments[0] - start),
            "a token": per_token(moments),
            "end to end": 1000 * (moments[-1] - start),
            "memory": memory.peak(),
        }

    def decode(self, prefill: Prefill, ahead: int) -> list[float]:
        """The moments in seconds at which the host gets each token."""
        steps = self.engine.decode_many(prefill, self.new, ignore_eos=True, ahead=ahead)
        return [time.perf_counter() for _ in steps]

    def round(self) -> dict[str, float]:
        """Milliseconds by stage; the peak of memory in bytes."""
        device = self.engine.device
        start = now(device)
        preprocess_image(self.workload.items[0][0], config=self.engine.processor.pixels)
        pixels = 1000 * (now(device) - start)
        prefill, spent = self.answer()
        stages, head = prefill.timings, self.head()
        vision = stages.pop("vision")
        stages[next(reversed(stages))] -= head  # the layers that end with the head
        streamed = {}
        if lookahead(device):  # The steps of a GPU run ahead unless tokens are shown one by one.
            streamed["a token, streamed"] = per_token(self.decode(prefill, 0))
        return {
            "pixels": pixels,
            "preprocess": spent.pop("preprocess"),
            "vision": vision,
            **{name.replace("layers", "prefill"): value for name, value in stages.items()},
            "lm_head": head,
            "all prefill": sum(stages.values()) + head,
            "first token": spent.pop("first token"),
            "a token": spent.pop("a token"),
            **streamed,
            **spent,
            **(self.questions() if len(self.workload.prompts) == 1 else {}),
        }

    def questions(self) -> dict[str, float]:
        """Milliseconds from the picture to a question's logits, and of one more in the session."""
        moments = [now(self.engine.device)]
        session, question = self.workload.begin(self.method)
        for _ in range(2):
            session.prefill(question, max_new_tokens=self.new)
            moments.append(now(self.engine.device))
        first, further = (1000 * (after - before) for before, after in pairwise(moments))
        return {"first question": first, "further question": further}

    @torch.inference_mode()
    def head(self) -> float:
        """Milliseconds of the final norm and the head alone."""
        size = len(self.workload.prompts), self.engine.config.text_config.hidden_size
        hidden = torch.ones(size, device=self.engine.device, dtype=self.engine.dtype)
        return 1000 * best(lambda: self.engine.decoder.logits(hidden), 1, self.engine.device)

    @cached_property
    def counts(self) -> tuple[RowCounts, int, int]:
        """The rows of a prompt on their way; the rows and the bytes of the cache of all prompts."""
        prefill = self.prefill(self.new)
        return RowCounts.of(prefill), prefill.cache.num_rows, prefill.cache.nbytes

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """The costs of all stages, and of questions to a session where there is one prompt."""
        rows, prompts = self.counts[0], self.workload.prompts
        work = Work(self.engine, prompts[0].grids, rows, len(prompts))
        layers, stop, costs = rows.prefill(), rows.stop, {"vision": work.vision()}
        if self.method == "dense":
            costs["prefill"] = work.layers(layers)
        else:
            costs |= {
                f"prefill < {stop}": work.layers(layers[:stop]),
                "score": work.score(),
                "keep": work.keep(),
                f"prefill ≥ {stop}": work.layers(layers[stop:]),
            }
        costs |= {"lm_head": work.head(), "a token": work.step(self.new // 2)}
        if len(prompts) == 1:
            session, question = self.workload.begin(self.method)
            session.prefill(question, max_new_tokens=self.new)
            chosen = [costs[stage] for stage in ("score", "keep", "lm_head") if stage in costs]
            further = sum(chosen, work.layers(session_question(session, rows)))
            prefix = work.layers(session_prefix(session))
            costs["first question"] = costs["vision"] + prefix + further
            costs["further question"] = further
        return costs

    def prefill_stages(self) -> list[str]:
        """The stages between the vision encoder and the first token."""
        return [stage for stage in self.costs if stage not in APART]

    def floors(self, roofs: Roofs) -> dict[str, float]:
        """The least milliseconds of the stages, and of what they add up to."""
        floors = {stage: roofs.floor(cost) for stage, cost in self.costs.items()}
        floors["all prefill"] = sum(floors[stage] for stage in self.prefill_stages())
        floors["first token"] = floors["vision"] + floors["all prefill"]
        floors["end to end"] = floors["first token"] + (self.new - 1) * floors["a token"]
        return floors


@dataclass(frozen=True)
class Transformers:
    """The same weights in transformers.

    Attributes:
        model: the model, with SDPA attention.
        pixels: the image processor.
        version: the version of transformers.
    """

    model: Any
    pixels: Any
    version: str

    @classmethod
    def load(cls, engine: Engine, args: argparse.Namespace) -> "Transformers | None":
        """None where transformers is not installed."""
        try:
            import transformers
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
                Qwen2VLImageProcessorPil,
            )
        except ImportError:
            return None
        say("building transformers")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        source, more = engine.processor.folder if not args.shape else None, {}
        if args.shape:
            meta, vision = skeleton(engine.config, TORCH), engine.config.vision_config
            tensors = {n: t for _, n, t in random_tensors(meta, engine.device, engine.dtype)}
            kernel = (-1, vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
            patch = "visual.patch_embed.proj.weight"
            tensors[patch] = tensors[patch].view(kernel)
            config = transformers.Qwen2_5_VLConfig.from_dict(shape_config(args))
            more = {"config": config, "state_dict": tensors}
        build: Any = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
        model = build(source, dtype=engine.dtype, attn_implementation="sdpa", **more)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        own = engine.processor.pixels
        names = ("min_pixels", "max_pixels", "image_mean", "image_std")
        pixels = Qwen2VLImageProcessorPil(**{name: getattr(own, name) for name in names})
        return cls(model.to(engine.device).eval(), pixels, transformers.__version__)


class Peer:
    """transformers as its users run it: SDPA, DynamicCache, `generate`, logits of the last row."""

    kind = "SDPA"

    def __init__(self, loaded: Transformers, workload: Workload):
        self.model, self.pixels, self.workload = loaded.model, loaded.pixels, workload
        self.name = f"transformers {loaded.version}, {self.kind}"
        self.inputs = self.preprocess()

    def preprocess(self) -> dict[str, Tensor]:
        """The inputs of a batch padded on the left; token ids are those of the engine's prompts."""
        prompts, engine = self.workload.prompts, self.workload.engine
        longest = max(map(len, prompts))

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])

        ids = padded([prompt.token_ids for prompt in prompts])
        inputs = {
            "input_ids": ids,
            "attention_mask": padded([torch.ones_like(prompt.token_ids) for prompt in prompts]),
            "mm_token_type_ids": (ids == engine.config.image_token_id).int(),
        }
        for name, tensor in self.read().items():
            inputs[name] = torch.cat([tensor] * self.workload.copies)
        return {name: tensor.to(engine.device) for name, tensor in inputs.items()}

    def read(self) -> dict[str, Tensor]:
        """The pixels of the different pictures alone."""
        pictures = [picture for picture, _ in self.workload.items]
        return self.pixels(images=pictures, return_tensors="pt")

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """The logits of the last rows, [B, vocab]."""
        return self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def vision(self) -> object:
        """The output of the vision encoder."""
        patches = self.inputs["pixel_values"].to(self.model.dtype)
        return self.model.model.visual(patches, grid_thw=self.inputs["image_grid_thw"])

    def tokens(self, count: int, **options: Any) -> Tensor:
        """The first tokens, [B, count]."""
        out = self.model.generate(**self.inputs, max_new_tokens=count, do_sample=False, **options)
        return out[:, self.inputs["input_ids"].shape[1] :]

    @torch.inference_mode()
    def answers(self) -> Answers:
        """The token ids of all answers from the pictures on, each with the token that ends it."""
        self.inputs, ends = self.preprocess(), self.workload.engine.model.eos_token_id
        eos = {"eos_token_id": sorted(ends)} if ends else {}
        rows = self.tokens(self.workload.args.new, **eos).tolist()
        last = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
        return [row[: i + 1] for row, i in zip(rows, last, strict=True)]

    def answer(self) -> dict[str, float]:
        """Milliseconds from the picture on, and the peak of memory in bytes."""
        device = self.workload.engine.device
        memory, moments, start = Memory(device), Moments(device), now(device)
        self.preprocess()
        self.tokens(self.workload.args.new, streamer=moments)
        tokens = moments.of_tokens
        return {
            "first token": 1000 * (tokens[0] - start),
            "a token": per_token(tokens),
            "end to end": 1000 * (tokens[-1] - start),
            "memory": memory.peak(),
        }

    def round(self) -> dict[str, float]:
        """Milliseconds by stage; the peak of memory in bytes."""
        spent, device = {}, self.workload.engine.device
        for stage in ("read", "preprocess", "vision", "logits"):
            spent[stage] = 1000 * wall(getattr(self, stage), device)
        return {
            "pixels": spent["read"],
            "preprocess": spent["preprocess"],
            "vision": spent["vision"],
            # Of two runs, so that noise may show: nothing is clamped.
            "all prefill": spent["logits"] - spent["vision"],
            **self.answer(),
        }


class Static(Peer):
    """transformers with a static cache and a compiled decode step, on a CPU as well."""

    kind = "static cache, compiled"

    def tokens(self, count: int, **options: Any) -> Tensor:
        """As `Peer.tokens`."""
        from transformers import CompileConfig

        compiled: Any = CompileConfig()
        compiled._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": compiled}
        return super().tokens(count, **static, **options)


class Moments:
    """A streamer for transformers that notes when each token comes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.prompt_seen = device, False
        self.of_tokens: list[float] = []

    def put(self, value: Tensor) -> None:
        """Is given the prompt first, then each token."""
        if self.prompt_seen:
            self.of_tokens.append(now(self.device))
        self.prompt_seen = True

    def end(self) -> None:
        """Is called at the end of the answer."""


def per_token(moments: Sequence[float]) -> float:
    """Mean milliseconds of the tokens after the first, from the moments of all."""
    return 1000 * (moments[-1] - moments[0]) / (len(moments) - 1)
