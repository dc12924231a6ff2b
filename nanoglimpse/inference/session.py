"""Sessions: many questions about the same pictures.

Visual tokens stand before the question. The vision encoder and the first layers of the decoder
therefore run over them once; only the rows of text, and the glimpse after them, run for every
question, which then chooses among all visual tokens anew. Answers are those of `Engine.ask`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from nanoglimpse.errors import UsageError
from nanoglimpse.inference.outputs import Answer, Clock, Prefill
from nanoglimpse.inference.prefill import PrefillState
from nanoglimpse.inference.prefix import Prefix, SharedLayers
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.inference.session_file import SessionData, save_session
from nanoglimpse.inference.stream import Stream
from nanoglimpse.inputs.processor import Processor, as_visuals
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.inputs.video import Visual
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import VisionOutput


class QuestionOptions(TypedDict, total=False):
    """Keywords of `Session.ask` and `chat`."""

    max_new_tokens: int
    ignore_eos: bool
    sampling: Sampling | None
    evidence: Tensor | None
    trace: bool


class Session:
    """Pictures that have been encoded, for any number of questions in any order.

    Sessions of one engine are independent of each other.

    Args:
        model, processor: of the engine.
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

    @property
    def pruning(self) -> ResolvedPruning:
        """Method and rule, the same for all questions."""
        return self.data.pruning

    @property
    def prompt(self) -> Prompt:
        """What is shared, up to the end of the last picture, without its patches."""
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
        """Bytes that the session holds: cache, hidden rows, visual tokens and features."""
        own = (self.prompt.token_ids, self.prompt.positions)
        return self.prefix.nbytes + self.vision.nbytes + sum(tensor.nbytes for tensor in own)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Questions and answers of the conversation; of an unfinished answer what there is."""
        if self._open is None:
            return list(self._turns)
        question, stream = self._open
        return [*self._turns, *([(question, stream.text)] if stream.token_ids else [])]

    def reset(self) -> None:
        """Forgets the conversation; the pictures stay."""
        self._turns, self._open = [], None

    def add(self, images: Visual | Sequence[Visual] | Prompt) -> None:
        """Adds pictures after the present ones, before the first question of the conversation.

        Only the new ones run, unless the method prunes before the decoder: it then decides again.

        Args:
            images: as `Engine.session`; a prompt continues the present one.

        Raises:
            UsageError, NanoglimpseError: as `Engine.session`; the session is then as before.
        """
        data, more = self.data, images
        if not isinstance(more, Prompt):
            parts = [*([] if self.prompt.grids else ["user\n"]), *as_visuals(more)]
            more = self.processor.fill(parts, data.min_pixels, data.max_pixels)
        self.data = _extended(self.model, data, more)

    def tail(self, question: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """What follows the pictures: earlier turns and the question, in the chat layout."""
        if not isinstance(question, str):
            raise UsageError("a session is asked in text; pictures are added with session.add")
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
        """Runs what follows the pictures; `logits` is [vocab].

        Args:
            tail: text as `tail` makes it, or its token ids.
            max_new_tokens, evidence, trace: as `Engine.prefill_many`, for this one prompt.

        Raises:
            UsageError: there are pictures in it, or the prompt exceeds the context.
        """
        if not isinstance(tail, Prompt):
            tail = Prompt.from_tokens(tail, config=self.model.config)
        if bool(tail.visual.any()):
            raise UsageError("a session is asked in text; pictures are added with session.add")
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
        self,
        question: str,
        *,
        follow_up: bool = False,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        evidence: Tensor | None = None,
        trace: bool = False,
    ) -> Stream:
        """The answer to a question, piece by piece.

        Args:
            question: text.
            follow_up: ask it in the conversation, as `chat`, not by itself.
            max_new_tokens, ignore_eos, sampling: as `Engine.decode`.
            evidence, trace: as `prefill`.
        """
        history = self.turns if follow_up else []
        stream = Stream(
            self.model,
            self.processor,
            lambda: self.tail(question, history),
            partial(self.prefill, max_new_tokens=max_new_tokens, evidence=evidence, trace=trace),
            self._decode,
            {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "sampling": sampling},
        )
        if follow_up:
            self._turns, self._open = history, (question, stream)
        return stream

    def ask(
        self, question: str, *, follow_up: bool = False, **options: Unpack[QuestionOptions]
    ) -> Answer:
        """The answer to a question by itself; arguments as `stream`."""
        return self.stream(question, follow_up=follow_up, **options).finish()

    def chat(self, question: str, **options: Unpack[QuestionOptions]) -> Answer:
        """The answer to a question after those before it; arguments as `stream`.

        Earlier turns are text of the prompt. The visual tokens are chosen anew for each question.
        """
        return self.ask(question, follow_up=True, **options)

    def save(self, path: str | Path) -> None:
        """Writes the session as one safetensors file, whole or not at all.

        Raises:
            UsageError: its method is not a built-in one.
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
    """Runs pictures; arguments as `Engine.session`."""
    if isinstance(images, Prompt):
        prompt = images
    else:
        # Without pictures the last text before the question is encoded together with it.
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
    """The rows of pictures through the shared layers, pruned first if the method does so."""
    state = _state(model, pruning, prompt, vision, seed)
    if 0 in pruning.layers:
        if pruning.needs.question:
            raise UsageError(
                f"method {pruning.method.name} looks at the question before the decoder, so that "
                "nothing of a picture can be kept for the next one; ask without a session"
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
    """A session's content with more pictures."""
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
