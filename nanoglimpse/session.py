"""Sessions: many questions about the same pictures.

Visual tokens stand before the question. The vision encoder and the first layers of the decoder
therefore have to see them once; only the rows of text, and the glimpse behind them, run for every
question, which then chooses among all visual tokens anew. Answers are those of `Engine.ask`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .engine import Engine, Plan, Request, Sight
from .errors import UsageError
from .methods import Choice, Look, Method
from .prefix import Prefix, Resumed, Stretch
from .processor import SYSTEM, Prompt, Visual, pictures_of
from .reading import Reading
from .results import Answer, Clock, Prefill
from .sampling import Sampling
from .stream import Stream
from .vision import Watch


class NeedsQuestion(Exception):
    """A method wants to know the question where there is none yet."""


class Unasked:
    """Stands for what depends on the question; whatever is done with it raises NeedsQuestion."""

    @classmethod
    def _refuse(cls, *_, **__):
        raise NeedsQuestion

    __torch_function__ = __getattr__ = __getitem__ = __len__ = __iter__ = __bool__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __hash__ = _refuse
    __add__ = __radd__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __index__ = _refuse


class Session:
    """Pictures that have been read, for any number of questions in any order.

    Sessions of one engine are independent of each other.

    Attributes:
        engine: that reads and answers.
        plan: the method and its rule, the same for all questions.
        prompt: what is shared, up to the last picture's end, without its patches.
        sight: of the pictures.
        prefix: the shared rows behind the first layers.
        options: system, min_pixels and max_pixels, for what is still to come.
        seed: of methods that draw.
        turns: questions and answers of the conversation that `chat` leads.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        prompt: Prompt,
        sight: Sight,
        prefix: Prefix,
        seed: int = 0,
        system: str = SYSTEM,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ):
        self.engine, self.plan, self.seed, self.system = engine, plan, seed, system
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.prompt, self.sight, self.prefix = prompt, sight, prefix
        self._turns, self._open = list(turns), None

    @classmethod
    def begin(
        cls,
        engine: Engine,
        images: Visual | Sequence[Visual] | Prompt,
        method: str | None = None,
        *,
        seed: int = 0,
        system: str = SYSTEM,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **rule,
    ) -> "Session":
        """Reads pictures.

        Args:
            engine: reads.
            images: one picture, several or none; or a prompt that all prompts are to begin with,
                which ends with a picture or with a control token.
            method: as `Engine.prefill_many`.
            seed: of methods that draw.
            system, min_pixels, max_pixels: as `Processor.prompt`.
            rule: threshold, max_ratio, max_frame_ratio, min_tokens, anchors, kv_drop and
                prune_videos as `Engine.prefill_many`.

        Raises:
            UsageError: the method has to know the question before the decoder, or an argument makes
                no sense.
        """
        plan = engine.plan(method, **rule)
        if isinstance(images, Prompt):
            prompt = images
        else:
            # Without pictures the last text before the question is encoded together with it.
            parts, pictures = engine.processor.opening(system), pictures_of(images)
            parts = [*parts, *pictures] if pictures else parts[:-1]
            prompt = engine.processor.fill(parts, min_pixels, max_pixels)
        prompt, sight, prefix = _begin(engine, plan, prompt, seed)
        return cls(engine, plan, prompt, sight, prefix, seed, system, min_pixels, max_pixels)

    @property
    def bytes(self) -> int:
        """Bytes that the session holds: cache, hidden rows, visual tokens and features."""
        watch = self.sight.watch
        tensors = (*watch.received.values(), *watch.keys.values())
        own = (self.sight.visual, self.sight.taps, self.prompt.token_ids, self.prompt.positions)
        return self.prefix.nbytes + sum(tensor.nbytes for tensor in (*own, *tensors))

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Questions and answers of the conversation; of an unfinished answer what there is."""
        if self._open is None:
            return list(self._turns)
        question, stream = self._open
        said = [(question, stream.text)] if stream.token_ids else []
        return [*self._turns, *said]

    def reset(self) -> None:
        """Forgets the conversation; the pictures stay."""
        self._turns, self._open = [], None

    def add(self, images: Visual | Sequence[Visual] | Prompt) -> None:
        """Adds pictures behind those there are, before the first question of the conversation.

        Only they are read, unless the method has chosen before the decoder: it then chooses again.

        Args:
            images: as `begin`; a prompt is what follows the present one.

        Raises:
            UsageError, NanoglimpseError: as `begin`; the session is then as before.
        """
        more = images
        if not isinstance(images, Prompt):
            parts = [*([] if self.prompt.grids else ["user\n"]), *pictures_of(images)]
            more = self.engine.processor.fill(parts, self.min_pixels, self.max_pixels)
        self.prompt, self.sight, self.prefix = _add(self, more)

    def tail(self, question: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """What follows the pictures: earlier turns and the question, in the chat layout."""
        if not isinstance(question, str):
            raise UsageError("a session is asked in text; pictures are added with session.add")
        processor = self.engine.processor
        parts = processor.conversation([question], history)
        return processor.fill(parts if self.prompt.grids else ["user\n", *parts])

    @torch.inference_mode()
    def prefill(
        self,
        tail: Prompt | Sequence[int],
        *,
        max_new_tokens: int = 128,
        evidence: Tensor | None = None,
        trace: bool = False,
    ) -> Prefill:
        """Reads what follows the pictures; `logits` is [vocab].

        Args:
            tail: text as `tail` makes it, or its token ids.
            max_new_tokens, evidence, trace: as `Engine.prefill_many`, of this one prompt.

        Raises:
            UsageError: there are pictures in it, or the prompt exceeds the context.
        """
        engine, config = self.engine, self.engine.config
        if not isinstance(tail, Prompt):
            tail = Prompt.from_tokens(tail, config=config)
        if bool(tail.visual.any()):
            raise UsageError("a session is asked in text; pictures are added with session.add")
        whole = self.prompt.then(tail)
        engine.check_context([len(whole)], max_new_tokens)
        clock = Clock(engine.device)
        batch = Batch.of([whole], config, engine.device, self.plan.prune_videos)
        known = None if evidence is None else evidence.to(engine.device)
        prefix, left = self.prefix, batch
        if prefix.choice:
            rows, counts = batch.survivors(prefix.kept)
            left = batch.keep(rows, prefix.kept, counts)
        model = (engine.decoder, config.text_config, engine.ops)
        reading = Resumed(*model, left, self.sight.visual, prefix)
        seeds, begun = [self.seed], 0 if prefix.choice is None else 1
        request = Request(batch, self.sight, self.plan, max_new_tokens, seeds, known, trace)
        prefill = engine.read(reading, request, clock, begun, prefix.choice)
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
        **prefill_options,
    ) -> Stream:
        """The answer to a question, piece by piece.

        Args:
            question: text.
            follow_up: ask it in the conversation, as `chat`, not by itself.
            max_new_tokens, ignore_eos, sampling: as `Engine.decode`.
            prefill_options: of `prefill`.
        """
        history = self.turns if follow_up else []
        stream = Stream(
            self.engine,
            lambda: self.tail(question, history),
            lambda tail: self.prefill(tail, max_new_tokens=max_new_tokens, **prefill_options),
            {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "sampling": sampling},
        )
        if follow_up:
            self._turns, self._open = history, (question, stream)
        return stream

    def ask(self, question: str, **options) -> Answer:
        """The answer to a question by itself; arguments as `stream`."""
        return self.stream(question, **options).finish()

    def chat(self, question: str, **options) -> Answer:
        """The answer to a question after those before it; arguments as `stream`.

        Earlier turns are text of the prompt. The visual tokens are chosen anew for each.
        """
        return self.ask(question, follow_up=True, **options)

    def save(self, path: str | Path) -> None:
        """Writes the session as one safetensors file, whole or not at all.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        from .session_file import save_session  # which needs this module

        save_session(self, path)


@torch.inference_mode()
def _begin(engine: Engine, plan: Plan, prompt: Prompt, seed: int) -> tuple[Prompt, Sight, Prefix]:
    """The prompt without its patches, what is seen in them, and the rows read."""
    engine.check_context([len(prompt)], 1)
    sight = engine.see(prompt.patches, prompt.grids, plan.method)
    prompt = replace(prompt, patches=prompt.patches[:0])
    return prompt, sight, _read(engine, plan, prompt, sight, seed)


def _read(engine: Engine, plan: Plan, prompt: Prompt, sight: Sight, seed: int) -> Prefix:
    batch = Batch.of([prompt], engine.config, engine.device, plan.prune_videos)
    text = engine.config.text_config
    reading = Reading(engine.decoder, text, engine.ops, batch, sight.visual)
    choice = None
    if 0 in plan.method.stops(engine):
        choice = _choose(plan, _look_unasked(engine, plan, batch, sight, seed))
        reading.run(0, None, ())
        reading.keep(choice.kept, choice.values, plan.kv_drop, 0)
    return Prefix.of(reading, stretch_of(plan.method, engine), choice)


def _choose(plan: Plan, look: Look) -> Choice:
    try:
        return plan.method.choose(look)
    except NeedsQuestion:
        raise UsageError(
            f"method {plan.method.name} looks at the question before the decoder, so that nothing "
            "of a picture can be kept for the next one; ask without a session"
        ) from None


def stretch_of(method: Method, engine: Engine) -> Stretch:
    """The layers that no question changes."""
    stop = next((stop for stop in method.stops(engine) if stop), None)
    reads = tuple(layer for layer in method.reads(engine) if stop and layer < stop)
    return Stretch(stop, reads, engine.config.text_config.num_hidden_layers)


def _look_unasked(engine: Engine, plan: Plan, batch: Batch, sight: Sight, seed: int) -> Look:
    """What a method sees of pictures alone."""
    unasked: Any = Unasked()
    rows = ("token_ids", "positions", "counts", "next_position", "prompt_rows", "probe_rows")
    return Look(
        engine=engine,
        stage=0,
        batch=replace(batch, **dict.fromkeys(rows, unasked)),
        hidden=unasked,
        source=sight.visual,
        source_counts=batch.visual_counts,
        visual=sight.visual,
        taps=sight.taps,
        watch=sight.watch,
        asking=unasked,
        layers={},
        rule=plan.rule,
        seeds=[seed],
        evidence=unasked,
    )


@torch.inference_mode()
def _add(session: Session, more: Prompt) -> tuple[Prompt, Sight, Prefix]:
    engine, plan, prefix = session.engine, session.plan, session.prefix
    engine.check_context([len(session.prompt) + len(more)], 1)
    new = engine.see(more.patches, more.grids, plan.method)
    sight = _joined(session.sight, new)
    prompt = session.prompt.then(replace(more, patches=more.patches[:0]))
    if prefix.choice:
        return prompt, sight, _read(engine, plan, prompt, sight, session.seed)
    own = Batch.of([more], engine.config, engine.device, plan.prune_videos)
    text = engine.config.text_config
    hidden = Reading(engine.decoder, text, engine.ops, own, new.visual).hidden
    batch = Batch.of([prompt], engine.config, engine.device, plan.prune_videos)
    kept = torch.ones(len(sight.visual), dtype=torch.bool, device=engine.device)
    return prompt, sight, prefix.followed(engine.decoder, batch, kept, hidden)


def _joined(sight: Sight, more: Sight) -> Sight:
    """What is seen in both pictures' visual tokens."""
    watch, both = Watch(sight.watch.blocks), (sight.watch, more.watch)
    for block in watch.blocks:
        watch.received[block] = torch.cat([one.received[block] for one in both])
        watch.keys[block] = torch.cat([one.keys[block] for one in both])
    visual = torch.cat((sight.visual, more.visual))
    return Sight(visual, torch.cat((sight.taps, more.taps), dim=1), watch)
