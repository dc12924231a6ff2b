"""The engine: a prompt through vision encoder, decoder and GlimpsePrune to an answer.

The pruning step is control flow here and nowhere else: `Engine.prefill_many` is written as the
method proceeds.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from nanoglimpse.inference.cuda_graph import DecodeGraphPool
from nanoglimpse.inference.decode import decode_many
from nanoglimpse.inference.outputs import Answer, Clock, Prefill
from nanoglimpse.inference.prefill import PrefillState
from nanoglimpse.inference.prefix import Prefix
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.inference.scheduler import AnswerOrError, BatchOptions, Query, Scheduler
from nanoglimpse.inference.session import Session, begin
from nanoglimpse.inference.session_file import load_session
from nanoglimpse.inference.stream import AskOptions, PrefillOptions, Stream, split
from nanoglimpse.inference.warm_up import check_ops
from nanoglimpse.inputs.images import joined
from nanoglimpse.inputs.processor import SYSTEM, Processor
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.kernels.checked import OpCheck
from nanoglimpse.methods.options import PruningLike, PruningOptions, ResolvedPruning, resolve
from nanoglimpse.model.model import Model, ModelHolder
from nanoglimpse.model.vision import VisionOutput
from nanoglimpse.pictures.video import Visual


class Engine(ModelHolder):
    """A loaded model with its processor. It keeps no state between calls.

    Attributes:
        model: the networks.
        processor: builds prompts.
        graphs: decode steps to replay; None where they run eagerly.
    """

    def __init__(self, model: Model, processor: Processor):
        self.processor = processor
        self._take(model)

    def _take(self, model: Model) -> None:
        captured = model.ops.graph_safe and model.device.type == "cuda"
        self.model, self.graphs = model, DecodeGraphPool(model) if captured else None

    def prompt(
        self, images: Visual | Sequence[Visual], question: str | Sequence[Visual], **options: Any
    ) -> Prompt:
        """A prompt from pictures and a question; arguments as `Processor.prompt`."""
        return self.processor.prompt(images, question, **options)

    def prefill(
        self, prompt: Prompt, pruning: PruningLike = None, **options: Unpack[PrefillOptions]
    ) -> Prefill:
        """Runs one prompt; arguments as `prefill_many`. `logits` is [vocab]."""
        prefill = self.prefill_many([prompt], pruning, **options)
        prefill.logits = prefill.logits[0]
        return prefill

    @torch.inference_mode()
    def prefill_many(
        self,
        prompts: Sequence[Prompt],
        pruning: PruningLike | ResolvedPruning = None,
        *,
        max_new_tokens: int = 128,
        seed: int | Sequence[int] = 0,
        evidence: Sequence[Tensor] | None = None,
        trace: bool = False,
        vision: VisionOutput | None = None,
        prefix: Prefix | None = None,
        **options: Unpack[PruningOptions],
    ) -> Prefill:
        """Runs prompts of any lengths, packed, up to the logits of their first answer tokens.

        Args:
            prompts: with any number of pictures each, or none.
            pruning: which visual tokens are dropped, or a method alone; `options` are its fields.
            max_new_tokens: room for the answer in the cache.
            seed: for methods that draw, for all prompts or each.
            evidence: bool [N] of each prompt, the visual tokens that its answer needs; the method
                "oracle" keeps them.
            trace: keep `hidden`; pruning then waits for the end of layer K.
            vision: output of the vision encoder where it has run for these pictures.
            prefix: the first rows of the one prompt, where they have run (`Session`).

        Raises:
            UsageError: a prompt exceeds the context, or an argument makes no sense.
        """
        pruning = resolve(self.model, pruning, options)
        self.model.check_context([len(prompt) for prompt in prompts], max_new_tokens)
        clock, videos = Clock(self.device), pruning.prune_videos
        batch = PackedBatch.pack(prompts, self.config, self.device, videos, seed, evidence)
        if vision is None:  # visual [N, C], taps [M, N, Cv]
            patches, needs = joined([prompt.patches for prompt in prompts]), pruning.needs
            vision = self.model.encode(patches, batch.all_grids, needs.taps, needs.vision_blocks)
        clock.lap("vision")
        rest = (clock, max_new_tokens, prefix, trace)
        state = PrefillState(self.model, batch, vision, pruning, *rest)  # hidden [T, C], caches
        for layer in pruning.layers[state.stage :]:  # K for GlimpsePrune, none for dense
            attention = state.run_to(layer)  # writes K/V; the last layer's attention waits
            decision = pruning.method.choose(state.context(attention))  # kept [N]
            state.keep(decision)  # one gather; the survivors finish the waiting layer
        return state.finish()  # layers K … L-1; the last one for the last rows only

    def decode(
        self,
        prefill: Prefill,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        ahead: int = 0,
    ) -> Iterator[int]:
        """Tokens of the answer to one prompt, as they are chosen; arguments as `decode_many`."""
        for (token,) in self.decode_many(prefill, max_new_tokens, ignore_eos, sampling, ahead):
            if token is not None:
                yield token

    @torch.inference_mode()
    def decode_many(
        self,
        prefill: Prefill,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        ahead: int = 0,
    ) -> Iterator[list[int | None]]:
        """Answers all prompts of a prefill in step; a second call starts again after the prompts.

        Args:
            prefill: from `prefill` or `prefill_many`.
            max_new_tokens: upper limit for each prompt.
            ignore_eos: continue after tokens that end an answer.
            sampling: greedy if None.
            ahead: steps to queue before tokens are read back, so that a GPU does not wait for the
                host between them; it may compute as many in vain.

        Yields:
            One token a prompt, the ending one included; None for a prompt that has ended.
        """
        options = (max_new_tokens, ignore_eos, sampling, ahead)
        yield from decode_many(self.model, self.graphs, prefill, *options)

    def stream(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[Visual],
        pruning: PruningLike = None,
        **options: Unpack[AskOptions],
    ) -> Stream:
        """The answer to a question about pictures, piece by piece.

        Args:
            images, question: as `Processor.prompt`; `prompt_options` are its further arguments.
            pruning: as `prefill_many`.
            options: `prompt_options`, and keywords of `prefill_many` and `decode_many`.

        Raises:
            UsageError, NanoglimpseError: from these.
        """
        prompt, prefill, decode, fields = split(options, self.model)
        return Stream(
            self.model,
            self.processor,
            partial(self.prompt, images, question, **prompt),
            partial(self.prefill, pruning=pruning, **prefill, **fields),
            self.decode,
            decode,
        )

    def ask(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[Visual],
        pruning: PruningLike = None,
        **options: Unpack[AskOptions],
    ) -> Answer:
        """The answer to a question about pictures; arguments as `stream`."""
        return self.stream(images, question, pruning, **options).finish()

    def answers(
        self,
        queries: Iterable[Query],
        pruning: PruningLike = None,
        *,
        max_batch_tokens: int = 8192,
        **options: Unpack[AskOptions],
    ) -> Iterator[tuple[int, AnswerOrError]]:
        """Answers to many questions as they finish, with the number of each.

        Every answer is that of `ask`. A question whose pictures cannot be used, or that is too
        long, gets its error in place of an answer and does not affect the others.

        Args:
            queries: (images, question) each, as `ask` takes them; opened when their turn comes.
            pruning, options: as `stream`, for all prompts.
            max_batch_tokens: rows that are prefilled at once, and that the cache holds; a prompt
                counts as its tokens and `max_new_tokens`. A longer one runs alone.

        Raises:
            UsageError: an option makes no sense, whatever the question.
        """
        prompt, prefill, decode, fields = split(options, self.model)
        # The pool has the rows for answers, so a prefill needs room for one token only.
        prefill |= {"pruning": resolve(self.model, pruning, fields), "max_new_tokens": 1}
        steps = partial(self.prompt, **prompt), partial(self.prefill_many, **prefill), self.graphs
        parts = (self.model, self.processor, *steps, queries)
        return iter(Scheduler(*parts, max_batch_tokens=max_batch_tokens, **decode))

    def ask_many(
        self, queries: Iterable[Query], pruning: PruningLike = None, **options: Unpack[BatchOptions]
    ) -> list[AnswerOrError]:
        """Answers to many questions in their order; arguments as `answers`."""
        found = dict(self.answers(queries, pruning, **options))
        return [found[index] for index in range(len(found))]

    def session(
        self,
        images: Visual | Sequence[Visual] | Prompt,
        pruning: PruningLike = None,
        *,
        seed: int = 0,
        system: str = SYSTEM,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Unpack[PruningOptions],
    ) -> Session:
        """Runs pictures once, for any number of questions.

        Args:
            images: one picture, several or none; or a prompt with which all prompts begin, and
                which ends with a picture or with a control token.
            pruning, seed, options: as `prefill_many`.
            system, min_pixels, max_pixels: as `Processor.prompt`.

        Raises:
            UsageError: the method reads the question before the decoder, or an argument makes no
                sense.
        """
        resolved, limits = resolve(self.model, pruning, options), (min_pixels, max_pixels)
        data = begin(self.model, self.processor, resolved, images, seed, system, *limits)
        return Session(self.model, self.processor, self.prefill_many, self.decode, data)

    def load_session(self, path: str | Path) -> Session:
        """A session that `Session.save` has written.

        Raises:
            UsageError, NanoglimpseError: there is none, it is broken, or of another model.
        """
        data = load_session(self.model, Path(path))
        return Session(self.model, self.processor, self.prefill_many, self.decode, data)

    def warm_up(
        self, pruning: PruningLike = None, batches: Collection[int] = (1,), rows: int = 1024
    ) -> list[OpCheck]:
        """Compiles, checks and captures on a GPU what answers would wait for. CPUs need none of it.

        Args:
            pruning: what the answers will use, as `prefill_many`.
            batches: numbers of prompts that will be answered together.
            rows: what the longest of them needs in the cache, with its answer.

        Returns:
            Each kernel beside torch's result; those at fault are no longer used.
        """

        def prefill(model: Model) -> Callable[..., Prefill]:
            return Engine(model, self.processor).prefill_many

        chosen = resolve(self.model, pruning, {})
        model, checks = check_ops(self.model, self.processor, prefill, chosen, batches)
        self._take(model)
        if self.graphs is not None:
            self.graphs.prepare(batches, rows)
        return checks
