"""Sessions: many questions about the same pictures.

Visual tokens precede the question. The vision encoder and the first layers of the decoder therefore
process them once; for each question only its text and the glimpse run, and the method selects among
all visual tokens again. Answers are those of `Engine.ask`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock
from typing import cast

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from nanoglimpse.errors import UsageError
from nanoglimpse.inference.outputs import Answer, Clock, Prefill
from nanoglimpse.inference.prefill import PrefillState
from nanoglimpse.inference.prefix import Prefix, SharedLayers
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.inference.session_file import SessionData, save_session
from nanoglimpse.inference.stream import AskOptions, Stream, split
from nanoglimpse.inputs.processor import Processor, as_visuals
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import VisionOutput
from nanoglimpse.pictures.video import Visual


class QuestionOptions(TypedDict, total=False):
    """Keywords of `Session.stream`, `ask` and `chat`."""

    max_new_tokens: int
    ignore_eos: bool
    sampling: Sampling | None
    evidence: Tensor | None
    trace: bool


class Session:
    """Encoded pictures, for any number of questions in any order.

    Sessions of the same engine are independent of each other. Threads may share a session: the
    turns of `chat` follow each other, and none is lost.

    Args:
        model, processor: model and processor of the engine.
        prefill: `Engine.prefill_many`.
        decode: `Engine.decode`.
        data: pictures, options and conversation.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        prefill: Callable[..., Prefill],
        decode: Callable[..., Iterator[int]],
        data: SessionData,
    ):
        self.model, self.processor, self.data = model, processor, data
        self._prefill, self._decode = prefill, decode
        self._turns = list(data.turns)
        self._open: tuple[str, Stream] | None = None
        self._lock = RLock()

    @property
    def pruning(self) -> ResolvedPruning:
        """Method and rule for all questions."""
        return self.data.pruning

    @property
    def prompt(self) -> Prompt:
        """The shared part of all prompts, up to the last picture, without patches."""
        return self.data.prompt

    @property
    def vision(self) -> VisionOutput:
        """Output of the vision encoder for the pictures."""
        return self.data.vision

    @property
    def prefix(self) -> Prefix:
        """The shared rows after the first layers."""
        return self.data.prefix

    @property
    def bytes(self) -> int:
        """Bytes of the session: cache, hidden rows, visual tokens and features."""
        own = (self.prompt.token_ids, self.prompt.positions)
        return self.prefix.nbytes + self.vision.nbytes + sum(tensor.nbytes for tensor in own)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Questions and answers of the conversation, including an unfinished answer."""
        with self._lock:
            if self._open is None:
                return list(self._turns)
            question, stream = self._open
        return [*self._turns, *([(question, stream.text)] if stream.token_ids else [])]

    def reset(self) -> None:
        """Forgets the conversation, and keeps the pictures."""
        with self._lock:
            self._turns, self._open = [], None

    def add(self, images: Visual | Sequence[Visual] | Prompt) -> None:
        """Adds pictures after the existing ones, before the first question of the conversation.

        Only the new pictures run. A method that prunes before the decoder selects again.

        Args:
            images: as `Engine.session`; a prompt continues the existing one.

        Raises:
            UsageError, NanoglimpseError: as `Engine.session`; the session is unchanged.
        """
        with self._lock:
            data, more = self.data, images
            if not isinstance(more, Prompt):
                parts = [*([] if self.prompt.grids else ["user\n"]), *as_visuals(more)]
                more = self.processor.fill(parts, data.min_pixels, data.max_pixels)
            self.data = _extended(self.model, data, more)

    def tail(self, question: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """The prompt after the pictures: earlier turns and the question, in the chat layout."""
        if not isinstance(question, str):
            raise UsageError("a question to a session must be text; add pictures with session.add")
        parts = self.processor.conversation([question], history)
        return self.processor.fill(parts if self.prompt.grids else ["user\n", *parts])

    def prefill(
        self,
        tail: Prompt | Sequence[int],
        *,
        max_new_tokens: int = 128,
        evidence: Tensor | None = None,
        trace: bool = False,
    ) -> Prefill:
        """Runs the prompt after the pictures; `logits` is [vocab].

        Args:
            tail: result of the method `tail`, or token ids.
            max_new_tokens, evidence, trace: as `Engine.prefill_many`, for one prompt.

        Raises:
            UsageError: the tail contains pictures, or the prompt exceeds the context.
        """
        if not isinstance(tail, Prompt):
            tail = Prompt.from_tokens(tail, config=self.model.config)
        if bool(tail.visual.any()):
            raise UsageError("a question to a session must be text; add pictures with session.add")
        prefill = self._prefill(
            [self.prompt.then(tail)],
            self.pruning,
            max_new_tokens=max_new_tokens,
            seed=self.data.seed,
            evidence=None if evidence is None else [evidence],
            trace=trace,
            vision=self.vision,
            prefix=self.prefix,
        )
        prefill.logits = prefill.logits[0]
        return prefill

    def stream(
        self, question: str, *, follow_up: bool = False, **options: Unpack[QuestionOptions]
    ) -> Stream:
        """The answer to a question, piece by piece.

        Args:
            question: text.
            follow_up: whether the question continues the conversation, as in `chat`.
            options: keywords of `prefill` and `Engine.decode`.
        """
        with self._lock if follow_up else nullcontext():
            history = self.turns if follow_up else []
            prompt, prefill, decode, others = split(cast(AskOptions, options), self.model)
            prefill.update(others)  # which `prefill` refuses, as a session has its own pruning
            stream = Stream(
                self.model,
                self.processor,
                partial(self.tail, question, history, **prompt),
                partial(self.prefill, **prefill),
                self._decode,
                decode,
            )
            if follow_up:
                self._turns, self._open = history, (question, stream)
        return stream

    def ask(
        self, question: str, *, follow_up: bool = False, **options: Unpack[QuestionOptions]
    ) -> Answer:
        """The answer to a question on its own; arguments as `stream`."""
        with self._lock if follow_up else nullcontext():
            return self.stream(question, follow_up=follow_up, **options).finish()

    def chat(self, question: str, **options: Unpack[QuestionOptions]) -> Answer:
        """The answer to the next question of the conversation; arguments as `stream`.

        Earlier turns are text of the prompt. Visual tokens are selected again for each question.
        """
        return self.ask(question, follow_up=True, **options)

    def save(self, path: str | Path) -> None:
        """Writes the session as one safetensors file, completely or not at all.

        Raises:
            UsageError: the method is not built in.
            NanoglimpseError: the file cannot be written.
        """
        save_session(self.model, replace(self.data, turns=tuple(self.turns)), Path(path))


@torch.inference_mode()
def begin(
    model: Model,
    processor: Processor,
    pruning: ResolvedPruning,
    images: Visual | Sequence[Visual] | Prompt,
    seed: int,
    system: str,
    min_pixels: int | None,
    max_pixels: int | None,
) -> SessionData:
    """Encodes pictures; arguments as `Engine.session`."""
    if isinstance(images, Prompt):
        prompt = images
    else:
        # Without pictures, the text before the question is encoded together with it.
        opening, pictures = processor.opening(system), as_visuals(images)
        parts = [*opening, *pictures] if pictures else opening[:-1]
        prompt = processor.fill(parts, min_pixels, max_pixels)
    model.check_context([len(prompt)], 1)
    needs = pruning.needs
    vision = model.encode(prompt.patches, prompt.grids, needs.taps, needs.vision_blocks)
    prompt = replace(prompt, patches=prompt.patches[:0])
    prefix = _run(model, pruning, prompt, vision, seed)
    return SessionData(pruning, prompt, vision, prefix, seed, system, min_pixels, max_pixels)


def _run(
    model: Model, pruning: ResolvedPruning, prompt: Prompt, vision: VisionOutput, seed: int
) -> Prefix:
    """Runs pictures through the shared layers, after pruning if the method prunes before them."""
    state = _state(model, pruning, prompt, vision, seed)
    if 0 in pruning.layers:
        if pruning.needs.question:
            raise UsageError(
                f"method {pruning.method.name} looks at the question before the decoder, so that a "
                "session has nothing to share between questions; ask without a session"
            )
        state.keep(pruning.method.choose(state.context(state.run_to(0))))
    shared = SharedLayers.of(pruning, model.depth)
    rows = (state.batch, state.kept, state.hidden)
    return Prefix.begin(model, shared, *rows, state.stage, state.importance)


def _state(
    model: Model, pruning: ResolvedPruning, prompt: Prompt, vision: VisionOutput, seed: int
) -> PrefillState:
    batch = PackedBatch.pack([prompt], model.config, model.device, pruning.prune_videos, seed)
    return PrefillState(model, batch, vision, pruning, Clock(model.device), headroom=0)


@torch.inference_mode()
def _extended(model: Model, data: SessionData, more: Prompt) -> SessionData:
    """The state of a session with more pictures."""
    pruning, prefix, needs = data.pruning, data.prefix, data.pruning.needs
    model.check_context([len(data.prompt) + len(more)], 1)
    new = model.encode(more.patches, more.grids, needs.taps, needs.vision_blocks)
    vision = data.vision.joined(new)
    prompt = data.prompt.then(replace(more, patches=more.patches[:0]))
    if prefix.stage:
        prefix = _run(model, pruning, prompt, vision, data.seed)
    else:
        hidden = _state(model, pruning, more, new, data.seed).hidden
        batch = PackedBatch.pack([prompt], model.config, model.device, pruning.prune_videos)
        kept = torch.ones(len(vision.visual), dtype=torch.bool, device=model.device)
        prefix = prefix.extended(model, batch, kept, hidden)
    return replace(data, prompt=prompt, vision=vision, prefix=prefix)
