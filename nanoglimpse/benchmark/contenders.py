"""What runs against each other: this engine with one method, and transformers."""

import argparse
import statistics
from itertools import pairwise
from math import isqrt

import torch
from PIL import Image
from torch import Tensor

from nanoglimpse.benchmark.measuring import Memory, best, now, say
from nanoglimpse.benchmark.models import random_tensors, shape_config, skeleton
from nanoglimpse.engine import Engine
from nanoglimpse.flops import RowCounts, session_prefix, session_question
from nanoglimpse.inference.session import Session
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.methods.base import PruningMethod

QUESTION = "Which number does the diamond show?"


class Task:
    """What is asked: B copies of a picture and a question, and how the prompt is made."""

    def __init__(self, engine: Engine, args: argparse.Namespace, visual: int, batch: int):
        self.engine, self.args, self.batch = engine, args, batch
        self.picture = noise(visual) if visual else Image.open(args.image).convert("RGB")
        self.prompt = self.preprocess()

    def preprocess(self) -> Prompt:
        """The prompt from the picture."""
        question = QUESTION if self.engine.processor.tokenizer else self.args.text
        return self.engine.prompt(self.picture, question)

    def begin(self, method: str | PruningMethod) -> tuple[Session, Tensor]:
        """A session that has read the picture, and the token ids of the question."""
        prompt, config = self.preprocess(), self.engine.config
        stop = int(prompt.visual.nonzero()[-1]) + 2  # behind <|vision_end|>
        before, behind = prompt.token_ids.tensor_split([stop])
        begun = Prompt.from_tokens(before, prompt.patches, prompt.grids, config=config)
        return self.engine.session(begun, method), behind


def noise(visual: int) -> Image.Image:
    """A picture of so many visual tokens, as square as their number allows."""
    root = isqrt(visual)
    rows = next((r for r in range(root, root // 2, -1) if visual % r == 0), root)
    return Image.effect_noise((28 * max(visual // rows, 1), 28 * rows), 64).convert("RGB")


class Ours:
    """This engine with one method; a round is an answer from the picture to the last token."""

    def __init__(self, task: Task, method: str | PruningMethod):
        self.task, self.engine, self.method = task, task.engine, method

    def prefill(self, count: int, **options):
        """The task's prompts, read."""
        prompts = [self.task.prompt] * self.task.batch
        return self.engine.prefill_many(prompts, self.method, max_new_tokens=count, **options)

    def round(self, new: int) -> dict:
        """Milliseconds by stage, and of each token in a list."""
        begun = now()
        preprocess_image(self.task.picture, config=self.engine.processor.pixels)
        memory, start = Memory(self.engine.device), now()
        self.task.preprocess()
        prepared = now()
        prefill = self.prefill(new)
        self.kv = prefill.cache.num_rows, prefill.cache.nbytes
        moments = [now() for _ in self.engine.decode_many(prefill, new, ignore_eos=True)]
        peak = memory.peak()
        stages = prefill.timings
        vision = stages.pop("vision")
        head = self.head()
        upper = next(reversed(stages))  # the layers that end with the head
        stages[upper] = max(stages[upper] - head, 0.0)
        self.rows = RowCounts.of(prefill)
        return {
            "pixels": 1000 * (start - begun),
            "preprocess": 1000 * (prepared - start),
            "vision": vision,
            **{name.replace("layers", "prefill"): value for name, value in stages.items()},
            "lm_head": head,
            "all prefill": sum(stages.values()) + head,
            "first token": 1000 * (moments[0] - start),
            **per_token(moments),
            "end to end": 1000 * (moments[-1] - start),
            **(self.questions(new) if self.task.batch == 1 else {}),
            "memory": peak,
        }

    def questions(self, new: int) -> dict:
        """Milliseconds from the picture to a question's logits, and of one more in the session."""
        moments = [now()]
        session, question = self.task.begin(self.method)
        for _ in range(2):
            session.prefill(question, max_new_tokens=new)
            moments.append(now())
        self.prefix, self.question = session_prefix(session), session_question(session, self.rows)
        first, further = (1000 * (after - before) for before, after in pairwise(moments))
        return {"first question": first, "further question": further}

    @torch.inference_mode()
    def head(self) -> float:
        """Milliseconds of the final norm and the head alone."""
        hidden = torch.ones(
            self.task.batch, self.engine.config.text_config.hidden_size, device=self.engine.device
        )
        hidden = hidden.to(self.engine.dtype)
        return 1000 * best(lambda: self.engine.decoder.logits(hidden), 1)


class Peer:
    """transformers as its users run it: SDPA, DynamicCache, `generate`, last-row logits."""

    def __init__(self, model, pixels, version: str):
        self.model, self.pixels, self.version = model.eval(), pixels, version

    @classmethod
    def load(cls, engine: Engine, args: argparse.Namespace) -> "Peer | None":
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
        options = {"dtype": engine.dtype, "attn_implementation": "sdpa"}
        build = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
        if args.shape:
            meta, vision = skeleton(engine.config, TORCH), engine.config.vision_config
            tensors = {n: t for _, n, t in random_tensors(meta, engine.device, engine.dtype)}
            kernel = (-1, vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
            patch = "visual.patch_embed.proj.weight"
            tensors[patch] = tensors[patch].view(kernel)
            config = transformers.Qwen2_5_VLConfig.from_dict(shape_config(args))
            model = build(None, config=config, state_dict=tensors, **options)
        else:
            model = build(engine.processor.folder, **options)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        own = engine.processor.pixels
        names = ("min_pixels", "max_pixels", "image_mean", "image_std")
        pixels = Qwen2VLImageProcessorPil(**{name: getattr(own, name) for name in names})
        return cls(model.to(engine.device), pixels, transformers.__version__)

    @property
    def name(self) -> str:
        """In tables."""
        return f"transformers {self.version}, SDPA"

    def at(self, task: Task) -> "Peer":
        """The same model on a task."""
        peer = type(self)(self.model, self.pixels, self.version)
        peer.task = task
        peer.inputs = peer.preprocess()
        return peer

    def preprocess(self) -> dict[str, Tensor]:
        """Pixels from the picture; token ids are taken over, which spares it the chat template."""
        task, device = self.task, self.task.engine.device
        pixels = self.read()
        ids = task.prompt.token_ids[None].expand(task.batch, -1).contiguous()
        kinds = (ids == task.engine.config.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = kinds
        copies = {name: torch.cat([tensor] * task.batch) for name, tensor in pixels.items()}
        return {name: tensor.to(device) for name, tensor in (inputs | copies).items()}

    def read(self) -> dict[str, Tensor]:
        """Pixels from the picture, nothing else."""
        return self.pixels(images=self.task.picture, return_tensors="pt")

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of the last rows, [B, vocab]."""
        return self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def vision(self):
        """Visual tokens."""
        patches = self.inputs["pixel_values"].to(self.model.dtype)
        return self.model.model.visual(patches, grid_thw=self.inputs["image_grid_thw"])

    def tokens(self, count: int, **options) -> Tensor:
        """The first tokens, [B, count]."""
        out = self.model.generate(**self.inputs, max_new_tokens=count, do_sample=False, **options)
        return out[:, self.inputs["input_ids"].shape[1] :]

    def round(self, new: int) -> dict:
        """Milliseconds by stage."""
        spent = {}
        for stage in ("read", "preprocess", "vision", "logits"):
            start = now()
            getattr(self, stage)()
            spent[stage] = 1000 * (now() - start)
        memory, moments, start = Memory(self.task.engine.device), Moments(), now()
        self.tokens(new, streamer=moments)
        before, tokens = spent["preprocess"] - 1000 * start, moments.of_tokens
        return {
            "pixels": spent["read"],
            "preprocess": spent["preprocess"],
            "vision": spent["vision"],
            "all prefill": max(spent["logits"] - spent["vision"], 0.0),
            "first token": before + 1000 * tokens[0],
            **per_token(tokens),
            "end to end": before + 1000 * tokens[-1],
            "memory": memory.peak(),
        }


class Static(Peer):
    """transformers with a static cache, its decode step compiled, on a CPU as well."""

    @property
    def name(self) -> str:
        """In tables."""
        return f"transformers {self.version}, static cache, compiled"

    def tokens(self, count: int, **options) -> Tensor:
        """As `Peer.tokens`."""
        from transformers import CompileConfig

        compiled = CompileConfig()
        compiled._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": compiled}
        return super().tokens(count, **static, **options)


class Moments:
    """A streamer of transformers that notes when each token came."""

    def __init__(self):
        self.of_tokens: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        if self.prompt_seen:
            self.of_tokens.append(now())
        self.prompt_seen = True

    def end(self) -> None:
        """The answer ends."""


def per_token(moments: list[float]) -> dict:
    """Milliseconds of each token behind the first, and their mean."""
    tokens = [1000 * (after - before) for before, after in pairwise(moments)]
    return {"a token": statistics.mean(tokens), "tokens": tokens}
