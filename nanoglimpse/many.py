"""Many questions at once: continuous batching over one contiguous cache.

Prompts of any lengths are read in packed chunks, each pruned to its own length, and answered in
step. A sequence owns one span of neighbouring cache rows, so that nothing is paged; when it ends,
its rows go to prompts that wait. Memory is bounded by one number, which counts a prompt as its
tokens and those that it may answer with: so many rows are read at a time, and so many does the
cache hold. What waits for rows has been read and pruned, and is at most one chunk.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import Cache, Stack
from .errors import NanoglimpseError, UsageError
from .processor import Prompt, Visual
from .results import Answer, Prefill, Stats, peak_bytes
from .sampling import Sampler, Sampling

if TYPE_CHECKING:
    from .engine import Engine

Item = tuple[Visual | Sequence[Visual], str | Sequence[Visual]]
Outcome = Answer | NanoglimpseError


class Pool(Cache):
    """A cache of fixed size whose rows pass from sequences that have ended to those that wait.

    Spans are given first fit. Who finds no gap waits until neighbours have ended; since nobody
    overtakes, the pool is empty at last.
    """

    def __init__(self, rows: int, like: Cache):
        super().__init__(like.config, len(like.k), [rows], like.next_position[:0], like.k, like.ops)
        self.size, self.capacity, self.starts, self.lengths = rows, [], [], []

    def gap(self, rows: int) -> int | None:
        """The first row of the first gap of this size; None if there is none."""
        end = 0
        for start, capacity in sorted(zip(self.starts, self.capacity, strict=True)):
            if start - end >= rows:
                return end
            end = start + capacity
        return end if self.size - end >= rows else None

    def admit(self, source: Cache, sequence: int, room: int) -> None:
        """Copies a sequence of another cache into a gap, with rows left free behind it."""
        rows, old = source.lengths[sequence], source.starts[sequence]
        new = self.gap(rows + room)
        self.k[:, new : new + rows] = source.k[:, old : old + rows]
        self.v[:, new : new + rows] = source.v[:, old : old + rows]
        self.starts.append(new)
        self.lengths.append(rows)
        self.capacity.append(rows + room)
        position = source.next_position[sequence : sequence + 1]
        self.next_position = torch.cat((self.next_position, position))

    def release(self, stay: Sequence[int]) -> None:
        """Goes on with some of the sequences; the rows of the others are free."""
        self.starts = [self.starts[i] for i in stay]
        self.lengths = [self.lengths[i] for i in stay]
        self.capacity = [self.capacity[i] for i in stay]
        self.next_position = self.next_position[list(stay)]


@dataclass
class Reply:
    """One answer in the making.

    Attributes:
        index: of the question.
        begun: when its pictures were opened.
        answer: without text yet.
        moments: when its first token was chosen, and its last one so far.
    """

    index: int
    begun: float
    answer: Answer
    token_ids: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    def push(self, token: int) -> None:
        """Takes the next token."""
        self.token_ids.append(token)
        self.moments = [*self.moments[:1], time.perf_counter()]

    def finished(self, engine: "Engine", reason: str) -> Answer:
        """The answer and what it cost."""
        first, last, later = self.moments[0], self.moments[-1], len(self.token_ids) - 1
        stats = replace(
            self.answer.stats,
            first_token=1000 * (first - self.begun),
            decode=1000 * (last - first) / later if later else 0.0,
            peak_bytes=peak_bytes(engine.device),
        )
        text = engine.processor.decode(self.token_ids)
        token_ids = self.token_ids
        return replace(
            self.answer, text=text, token_ids=token_ids, finish_reason=reason, stats=stats
        )


@dataclass(frozen=True)
class Read:
    """A prompt that has been read and pruned, and waits for rows.

    Attributes:
        reply: its answer to be.
        prompt: int64 [T], its tokens.
        logits: [1, vocab], of its first new token.
        caches: of its chunk, one for each group of layers that hold the same rows.
        number: of the sequence there.
    """

    reply: Reply
    prompt: Tensor
    logits: Tensor
    caches: list[Cache]
    number: int

    @property
    def rows(self) -> int:
        """Rows that it takes in the layers that hold most of it."""
        return max(cache.lengths[self.number] for cache in self.caches)


@dataclass(frozen=True)
class Unread:
    """A question whose prompt has been built, or could not be."""

    index: int
    begun: float
    prompt: Prompt | NanoglimpseError
    milliseconds: float


class Many:
    """Answers to many questions, as they finish: iterate over (index, answer or error).

    Arguments as `Engine.answers`.
    """

    def __init__(
        self,
        engine: "Engine",
        items: Iterable[Item],
        *,
        max_batch_tokens: int,
        max_new_tokens: int,
        ignore_eos: bool,
        sampling: Sampling | None,
        prompt_options: dict,
        prefill_options: dict,
    ):
        if max_batch_tokens < 1:
            raise UsageError(f"max_batch_tokens {max_batch_tokens} must be at least 1")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {max_new_tokens} must be at least 1")
        self.engine, self.items = engine, enumerate(items)
        self.limit, self.room = max_batch_tokens, max_new_tokens
        self.ignore_eos = ignore_eos
        self.sampling = sampling or Sampling()
        self.prompt_options, self.prefill_options = prompt_options, prefill_options
        self.unread: Unread | None = None
        self.waiting: deque[Read] = deque()
        self.running: list[Reply] = []
        self.pool: Stack | None = None
        self.sampler: Sampler | None = None
        self.logits: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        while True:
            if not self.waiting:
                yield from self._read()
            self._admit()
            if not self.running:
                return
            yield from self._step()

    def _read(self) -> Iterator[tuple[int, NanoglimpseError]]:
        """Reads the next chunk; what cannot be read is said at once."""
        chunk: list[Unread] = []
        cost = 0
        while unread := self._next():
            if isinstance(unread.prompt, NanoglimpseError):
                yield unread.index, unread.prompt
                continue
            cost += len(unread.prompt) + self.room
            if chunk and cost > self.limit:
                self.unread = unread
                break
            chunk.append(unread)
        if chunk:
            # Rows for the answers are the pool's, hence room for no more than a prefill asks.
            prompts = [unread.prompt for unread in chunk]
            prefill = self.engine.prefill_many(prompts, max_new_tokens=1, **self.prefill_options)
            self.waiting.extend(_parts(self.engine, chunk, prefill))

    def _next(self) -> Unread | None:
        if self.unread:
            unread, self.unread = self.unread, None
            return unread
        for index, (images, question) in self.items:
            begun = time.perf_counter()
            try:
                prompt = self.engine.prompt(images, question, **self.prompt_options)
                self.engine.check_context([len(prompt)], self.room)
            except NanoglimpseError as error:
                prompt = error
            # Whatever a picture's bytes do to Pillow: the other questions are to be answered.
            except Exception as error:
                prompt = NanoglimpseError(f"{type(error).__name__}: {error}")
                prompt.__cause__ = error
            return Unread(index, begun, prompt, 1000 * (time.perf_counter() - begun))
        return None

    @torch.inference_mode()
    def _admit(self) -> None:
        """Gives rows to those that wait, as far as there are any."""
        admitted = []
        while self.waiting and self._fits(self.waiting[0].rows + self.room):
            read = self.waiting.popleft()
            for pool, cache in zip(self.pool.caches, read.caches, strict=True):
                pool.admit(cache, read.number, self.room)
            self.running.append(read.reply)
            admitted.append(read)
        if not admitted:
            return
        vocab = self.engine.config.text_config.vocab_size
        sampler = Sampler(self.sampling, [read.prompt for read in admitted], vocab)
        logits = torch.cat([read.logits for read in admitted])
        if self.sampler is None:
            self.sampler, self.logits = sampler, logits
        else:
            self.sampler.join(sampler)
            self.logits = torch.cat((self.logits, logits))

    def _fits(self, rows: int) -> bool:
        """Whether so many rows are free; where nobody runs, a pool is made that has them."""
        if self.pool and all(pool.gap(rows) is not None for pool in self.pool.caches):
            return True
        if self.running:
            return False
        self.pool = None  # its memory first
        like = self.waiting[0].caches
        self.pool = Stack([Pool(max(self.limit, rows), cache) for cache in like])
        return True

    @torch.inference_mode()
    def _step(self) -> list[tuple[int, Answer]]:
        """One token for everybody; those that end are answered and leave."""
        tokens, running = self.sampler(self.logits), self.running
        for reply, token in zip(running, tokens.tolist(), strict=True):
            reply.push(token)
        reasons = [self._reason(reply) for reply in running]
        stay = [i for i, reason in enumerate(reasons) if reason is None]
        if len(stay) < len(running):
            self._leave(stay)
            tokens = tokens[stay]
        if stay:
            rope = self.engine.decode_rope(self.pool.next_position, 1)[0]
            self.logits = self.engine.decoder.step(tokens, rope, self.pool)
            self.pool.next_position = self.pool.next_position + 1
        return [
            (reply.index, reply.finished(self.engine, reason))
            for reply, reason in zip(running, reasons, strict=True)
            if reason
        ]

    def _reason(self, reply: Reply) -> str | None:
        full = len(reply.token_ids) == self.room
        if reply.token_ids[-1] in self.engine.eos_token_id and (full or not self.ignore_eos):
            return "eos"
        return "length" if full else None

    def _leave(self, stay: list[int]) -> None:
        self.running = [self.running[i] for i in stay]
        self.logits = self.logits[stay]
        self.sampler.keep(stay)
        for pool in self.pool.caches:
            pool.release(stay)


def _parts(engine: "Engine", chunk: Sequence[Unread], prefill: Prefill) -> Iterator[Read]:
    """The prompts of a chunk one by one, without what only the chunk needed."""
    batch, importance = prefill.batch, prefill.importance
    caches = prefill.cache.caches if isinstance(prefill.cache, Stack) else [prefill.cache]
    prompts, kept = batch.token_ids.split(batch.counts), prefill.kept.split(batch.visual_counts)
    scores = importance.split(batch.visual_counts) if importance is not None else None
    for number, unread in enumerate(chunk):
        answer = Answer(
            text="",
            token_ids=[],
            finish_reason="stopped",
            # Copies, so that an answer that is kept does not keep its chunk.
            kept=kept[number].clone(),
            importance=None if scores is None else scores[number].clone(),
            grids=batch.grids[number],
            stats=_stats(engine, prefill, number, caches, unread.milliseconds),
        )
        reply = Reply(unread.index, unread.begun, answer)
        yield Read(reply, prompts[number], prefill.logits[number, None], caches, number)


def _stats(
    engine: "Engine", prefill: Prefill, number: int, caches: Sequence[Cache], preprocess: float
) -> Stats:
    batch, layers = prefill.batch, engine.config.text_config.num_hidden_layers
    total = batch.counts[number]
    held = [cache.lengths[number] for cache in caches for _ in range(len(cache.k))]
    row_bytes = prefill.cache.nbytes // prefill.cache.rows
    return Stats(
        method=prefill.method,
        prompt_tokens=total,
        visual_tokens=batch.visual_counts[number],
        kept_tokens=int(prefill.kept.split(batch.visual_counts)[number].sum()),
        budgets=prefill.budgets_of(number),
        kv_rows=(layers * total, sum(held)),
        kv_bytes=(layers * total * row_bytes, sum(held) * row_bytes),
        timings={"preprocess": preprocess} | prefill.timings,
        first_token=0.0,
        decode=0.0,
        peak_bytes=0,
    )
