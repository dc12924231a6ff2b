"""Many questions at once: continuous batching over one contiguous cache.

Prompts of any lengths are prefilled in packed chunks, each is pruned to its own length, and all are
decoded in step. A sequence owns one span of adjacent cache rows, so that nothing is paged; when it
ends, its rows are given to waiting prompts. One number limits both the rows of a prefill and the
rows of the cache, where a prompt counts as its tokens and the maximum of its answer. Prompts that
wait for rows have been prefilled and pruned; they are at most one chunk.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.inference.cuda_graph import DecodeGraph, DecodeGraphPool
from nanoglimpse.inference.decode import decode_rope
from nanoglimpse.inference.outputs import Answer, Prefill
from nanoglimpse.inference.sampling import NOT_FINITE, Sampler, Sampling, check_finite
from nanoglimpse.inference.stream import AskOptions
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.kernels.varlen import upload
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.layered import LayeredKVCache
from nanoglimpse.kvcache.pool import KVPool
from nanoglimpse.model.model import Model
from nanoglimpse.pictures.video import Visual

# Steps of so many sequences before they are captured, which takes as long as many steps.
EAGER_STEPS = 16

Query = tuple[Visual | Sequence[Visual], str | Sequence[Visual]]
AnswerOrError = Answer | NanoglimpseError


class BatchOptions(AskOptions, total=False):
    """Keywords of `Engine.ask_many`."""

    max_batch_tokens: int


@dataclass
class Reply:
    """An unfinished answer.

    Attributes:
        index: number of the question.
        begun: time at which its pictures were opened.
        answer: the answer without tokens.
        token_ids: tokens generated so far.
        moments: times of the first token and of the latest one.
    """

    index: int
    begun: float
    answer: Answer
    token_ids: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    def push(self, token: int) -> None:
        """Adds the next token."""
        self.token_ids.append(token)
        self.moments = [*self.moments[:1], time.perf_counter()]


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been prefilled and pruned, and waits for rows.

    Attributes:
        reply: its answer.
        prompt: int64 [T], its tokens.
        logits: [1, vocab], the logits of its first new token.
        caches: caches of its chunk, one for each group of layers with the same rows.
        number: number of its sequence in these caches.
    """

    reply: Reply
    prompt: Tensor
    logits: Tensor
    caches: list[KVCache]
    number: int

    @property
    def num_rows(self) -> int:
        """Rows in the layers with the most rows."""
        return max(cache.lengths[self.number] for cache in self.caches)


@dataclass(frozen=True)
class Pending:
    """A question with its prompt, or with the error of building it."""

    index: int
    begun: float
    prompt: Prompt | NanoglimpseError
    milliseconds: float


class Scheduler:
    """Answers many questions; iterating gives (index, answer or error) as they finish.

    Args:
        model, processor: model and processor of the engine.
        prompt: builds a prompt from pictures and a question.
        prefill: runs prompts, with room for one token each.
        graphs: captures decode steps; None where they run eagerly.
        queries, max_batch_tokens, max_new_tokens, ignore_eos, sampling: as `Engine.answers`.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        prompt: Callable[..., Prompt],
        prefill: Callable[[list[Prompt]], Prefill],
        graphs: DecodeGraphPool | None,
        queries: Iterable[Query],
        *,
        max_batch_tokens: int,
        max_new_tokens: int,
        ignore_eos: bool,
        sampling: Sampling | None,
    ):
        if max_batch_tokens < 1:
            raise UsageError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if sampling is not None and sampling.samples != 1:
            raise UsageError("samples of a prompt run in step; decode them with decode_many")
        self.model, self.processor, self.queries = model, processor, enumerate(queries)
        self.prompt, self.prefill, self.graphs = prompt, prefill, graphs
        self.limit, self.headroom = max_batch_tokens, max_new_tokens
        self.ignore_eos = ignore_eos
        self.sampling = sampling or Sampling()
        self.pending: Pending | None = None
        self.waiting: deque[Prefilled] = deque()
        self.running: list[Reply] = []
        self.pools: list[KVPool] = []
        # Captured steps in the memory of the pool, by the largest number of sequences; the one that
        # replays now, until sequences come or go; and how many steps each number has run.
        self.captured: dict[int, DecodeGraph] = {}
        self.replaying: DecodeGraph | None = None
        self.steps: Counter[int] = Counter()
        self.sampler = self._sampler([])
        self.logits = torch.empty(0)

    def __iter__(self) -> Iterator[tuple[int, AnswerOrError]]:
        while True:
            if not self.waiting:
                yield from self._prefill_chunk()
            self._admit()
            if not self.running:
                return
            yield from self._step()

    def _prefill_chunk(self) -> Iterator[tuple[int, NanoglimpseError]]:
        """Prefills the next chunk; gives the errors of its questions."""
        chunk: list[tuple[Pending, Prompt]] = []
        cost = 0
        while pending := self._next():
            if isinstance(pending.prompt, NanoglimpseError):
                yield pending.index, pending.prompt
                continue
            cost += len(pending.prompt) + self.headroom
            if chunk and cost > self.limit:
                self.pending = pending
                break
            chunk.append((pending, pending.prompt))
        if chunk:
            prefill = self.prefill([prompt for _, prompt in chunk])
            self.waiting.extend(self._parts([pending for pending, _ in chunk], prefill))

    def _next(self) -> Pending | None:
        if self.pending:
            pending, self.pending = self.pending, None
            return pending
        for index, (images, question) in self.queries:
            begun = time.perf_counter()
            prompt: Prompt | NanoglimpseError
            try:
                prompt = self.prompt(images, question)
                self.model.check_context([len(prompt)], self.headroom)
            except NanoglimpseError as error:
                prompt = error
            # Any error that Pillow raises for a picture must not stop the other questions.
            except Exception as error:
                prompt = NanoglimpseError(f"{type(error).__name__}: {error}")
                prompt.__cause__ = error
            return Pending(index, begun, prompt, 1000 * (time.perf_counter() - begun))
        return None

    @torch.inference_mode()
    def _admit(self) -> None:
        """Gives rows to waiting prompts, as long as there are free ones."""
        admitted = []
        while self.waiting and self._fits(self.waiting[0]):
            prefilled = self.waiting.popleft()
            for pool, cache in zip(self.pools, prefilled.caches, strict=True):
                pool.admit(cache, prefilled.number, self.headroom)
            self.running.append(prefilled.reply)
            admitted.append(prefilled)
        if not admitted:
            return
        self.replaying = None
        prompts = [prefilled.prompt for prefilled in admitted]
        logits = torch.cat([prefilled.logits for prefilled in admitted])
        sampler = self._sampler(prompts)
        if len(self.running) > len(admitted):
            self.sampler.join(sampler)
            self.logits = torch.cat((self.logits, logits))
        else:
            self.sampler, self.logits = sampler, logits

    def _sampler(self, prompts: Sequence[Tensor]) -> Sampler:
        return Sampler(self.sampling, prompts, self.model.text.vocab_size, self.model.device)

    def _fits(self, prefilled: Prefilled) -> bool:
        """Whether there are rows for a prompt; makes a larger pool if no answer is running."""
        rows = prefilled.num_rows + self.headroom
        if self.pools and all(pool.gap(rows) is not None for pool in self.pools):
            return True
        if self.running:
            return False
        self.pools, self.captured, self.replaying = [], {}, None  # frees their memory first
        self.pools = [KVPool(max(self.limit, rows), cache) for cache in prefilled.caches]
        return True

    @torch.inference_mode()
    def _step(self) -> list[tuple[int, AnswerOrError]]:
        """Generates one token for each running answer; returns the answers that end."""
        tokens, running = self.sampler(self.logits), self.running
        for reply, token in zip(running, tokens.tolist(), strict=True):
            reply.push(token)
        reasons = [self._reason(reply) for reply in running]
        stay = [i for i, reason in enumerate(reasons) if reason is None]
        if len(stay) < len(running):
            tokens = tokens[self._leave(stay)]
        if stay:
            self.logits = self._decode(tokens)
        ended = [pair for pair in zip(running, reasons, strict=True) if pair[1]]
        return [(reply.index, self._finished(reply, str(reason))) for reply, reason in ended]

    def _finished(self, reply: Reply, reason: str) -> AnswerOrError:
        try:
            check_finite(reply.token_ids[-1:], self.model.dtype)
        except NanoglimpseError as error:
            return error
        first, last, later = reply.moments[0], reply.moments[-1], len(reply.token_ids) - 1
        return reply.answer.finished(
            self.processor.decode(reply.token_ids),
            reply.token_ids,
            reason,
            first_token=1000 * (first - reply.begun),
            decode=1000 * (last - first) / later if later else 0.0,
            sampling=self.sampling,
            checkpoint=self.model.sampling,
        )

    def _reason(self, reply: Reply) -> str | None:
        full = len(reply.token_ids) == self.headroom
        if reply.token_ids[-1] == NOT_FINITE:
            return "not finite"
        if reply.token_ids[-1] in self.model.eos_token_id and (full or not self.ignore_eos):
            return "eos"
        return "length" if full else None

    def _leave(self, stay: list[int]) -> Tensor:
        """Keeps only some of the answers, by number; returns their numbers on the device."""
        places = upload(torch.tensor(stay, dtype=torch.int64), self.model.device)
        self.running, self.replaying = [self.running[i] for i in stay], None
        self.sampler.keep(stay, places)
        for pool in self.pools:
            pool.release(stay, places)
        return places

    def _decode(self, tokens: Tensor) -> Tensor:
        """Logits [B, vocab] after one more token, int64 [B], of each running answer."""
        size = 1 << (len(tokens) - 1).bit_length()
        self.steps[size] += 1
        cache, graphs = LayeredKVCache(self.pools), self.graphs
        if graphs is None or len(self.pools) > 1 or self.steps[size] <= EAGER_STEPS:
            rope = decode_rope(self.model, cache.next_position, 1)[0]
            logits = self.model.decoder.step(tokens, rope, cache)
        else:
            (pool,) = self.pools
            if self.replaying is None:
                if size not in self.captured:
                    graph = DecodeGraph(self.model, pool, size, graphs.capture)
                    self.captured[size] = graph
                self.replaying = self.captured[size]
                self.replaying.begin(pool)
            logits = self.replaying(tokens)
            pool.lengths = [length + 1 for length in pool.lengths]
        cache.next_position = cache.next_position + 1
        return logits

    def _parts(self, chunk: Sequence[Pending], prefill: Prefill) -> Iterator[Prefilled]:
        """The prompts of a chunk one by one."""
        cache = prefill.cache
        caches = cache.caches if isinstance(cache, LayeredKVCache) else [cache]
        prompts = prefill.batch.token_ids.split(prefill.batch.counts)
        for number, pending in enumerate(chunk):
            rows = sum(part.lengths[number] * len(part.layers) for part in caches)
            answer = prefill.answer(number, rows, pending.milliseconds)
            reply = Reply(pending.index, pending.begun, answer)
            yield Prefilled(reply, prompts[number], prefill.logits[number, None], caches, number)
