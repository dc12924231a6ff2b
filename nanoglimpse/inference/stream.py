"""One answer, piece by piece: its options, its text, and its costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from nanoglimpse.inference.decode import lookahead
from nanoglimpse.inference.outputs import Answer, Prefill, Stats, peak_bytes
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.inputs.processor import Processor, TextStream
from nanoglimpse.methods.options import PruningOptions
from nanoglimpse.model.model import Model


class PrefillOptions(PruningOptions, total=False):
    """Keywords of `Engine.prefill`: the fields of `Pruning`, and those of `prefill_many`."""

    max_new_tokens: int
    seed: int
    evidence: Sequence[Tensor] | None
    trace: bool


class AskOptions(PrefillOptions, total=False):
    """Keywords of `Engine.ask`: those of `prefill` and `decode`, and of `Processor.prompt`."""

    ignore_eos: bool
    sampling: Sampling | None
    prompt_options: dict[str, Any] | None


class SplitOptions(NamedTuple):
    """`AskOptions` by the function that takes them.

    Attributes:
        prompt: of `Processor.prompt`.
        prefill: of `Engine.prefill_many`, without those of `Pruning`.
        decode: of `Engine.decode`.
        pruning: the rest, fields of `Pruning`.
    """

    prompt: dict[str, Any]
    prefill: dict[str, Any]
    decode: dict[str, Any]
    pruning: PruningOptions


def split(options: AskOptions) -> SplitOptions:
    """The options by the function that takes them, with the defaults of those left out."""
    rest: dict[str, Any] = dict(options)
    limit = {"max_new_tokens": rest.pop("max_new_tokens", 128)}
    return SplitOptions(
        prompt=rest.pop("prompt_options", None) or {},
        prefill=limit | {k: rest.pop(k) for k in ("seed", "evidence", "trace") if k in rest},
        decode=limit
        | {"ignore_eos": rest.pop("ignore_eos", False), "sampling": rest.pop("sampling", None)},
        pruning=cast(PruningOptions, rest),
    )


class Stream:
    """Text pieces of one answer, whole characters each.

    The prompt is built and prefilled when the object is made. `answer` gives the answer so far at
    any time.

    Args:
        model: answers.
        processor: decodes tokens.
        prepare: makes a prompt.
        prefill: runs it.
        decode: `Engine.decode`.
        options: its arguments.

    Attributes:
        prefill: of the prompt.
        token_ids: generated so far.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        prepare: Callable[[], Any],
        prefill: Callable[[Any], Prefill],
        decode: Callable[..., Iterator[int]],
        options: dict[str, Any],
    ):
        self.model, self.processor, self.options = model, processor, options
        moments = [time.perf_counter()]
        prepared = prepare()
        moments.append(time.perf_counter())
        self.prefill = prefill(prepared)
        moments.append(time.perf_counter())
        self.kv_rows, self.kv_bytes = self.prefill.cache.num_rows, self.prefill.cache.nbytes
        self.token_ids: list[int] = []
        # Seconds to the prompt, to the prefill, and for each token.
        self.seconds = [moments[1] - moments[0], moments[2] - moments[1]]
        self._ahead = 0
        self._tokens = self._decode(decode)
        self._text = TextStream(processor)

    def _decode(self, decode: Callable[..., Iterator[int]]) -> Iterator[int]:
        """The tokens; `_ahead` is read when the first one is asked for."""
        yield from decode(self.prefill, ahead=self._ahead, **self.options)

    def __iter__(self) -> Iterator[str]:
        while (token := self._next()) is not None:
            self.token_ids.append(token)
            if piece := self._text.push(token):
                yield piece
        if rest := self._text.finish():
            yield rest

    def _next(self) -> int | None:
        begun = time.perf_counter()
        token = next(self._tokens, None)
        if token is not None:
            self.seconds.append(time.perf_counter() - begun)
        return token

    def finish(self) -> Answer:
        """The whole answer, for a caller that does not show its pieces."""
        self._ahead = lookahead(self.model.device)
        for _ in self:
            pass
        return self.answer

    @property
    def text(self) -> str:
        """The text so far."""
        return self.processor.decode(self.token_ids)

    @property
    def answer(self) -> Answer:
        """The answer so far, and its costs."""
        prefill = self.prefill
        return Answer(
            text=self.text,
            token_ids=list(self.token_ids),
            finish_reason=self._finish_reason(),
            kept=prefill.kept,
            importance=prefill.importance,
            grids=prefill.batch.all_grids,
            stats=self._stats(),
        )

    def _finish_reason(self) -> str:
        if self.token_ids and self.token_ids[-1] in self.model.eos_token_id:
            return "eos"
        return "length" if len(self.token_ids) == self.options["max_new_tokens"] else "stopped"

    def _stats(self) -> Stats:
        prefill = self.prefill
        rows = prefill.batch.counts[0] * self.model.depth
        later = self.seconds[3:]
        return Stats(
            method=prefill.method,
            prompt_tokens=prefill.batch.counts[0],
            visual_tokens=len(prefill.kept),
            kept_tokens=int(prefill.kept.sum()),
            budgets=prefill.budgets,
            kv_rows=(rows, self.kv_rows),
            kv_bytes=(self.kv_bytes * rows // self.kv_rows, self.kv_bytes),
            timings={"preprocess": 1000 * self.seconds[0]} | prefill.timings,
            first_token=1000 * sum(self.seconds[:3]),
            decode=1000 * sum(later) / len(later) if later else 0.0,
            peak_bytes=peak_bytes(self.model.device),
        )
