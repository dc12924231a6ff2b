"""One answer, piece by piece, and what it cost."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .processor import TextStream
from .results import Answer, Prefill, Stats, peak_bytes

if TYPE_CHECKING:
    from .engine import Engine


class Stream:
    """Text pieces of one answer, whole characters each.

    The prompt is read when the object is made. `answer` says at any time what there is so far.

    Args:
        engine: decodes.
        prepare: makes a prompt.
        prefill: reads it.
        decode: arguments of `Engine.decode`.

    Attributes:
        prefill: of the prompt.
        token_ids: said so far.
    """

    def __init__(
        self,
        engine: "Engine",
        prepare: Callable[[], Any],
        prefill: Callable[[Any], Prefill],
        decode: dict[str, Any],
    ):
        self.engine, self.max_new_tokens = engine, decode["max_new_tokens"]
        moments = [time.perf_counter()]
        prepared = prepare()
        moments.append(time.perf_counter())
        self.prefill = prefill(prepared)
        moments.append(time.perf_counter())
        self.kv_rows, self.kv_bytes = self.prefill.cache.rows, self.prefill.cache.nbytes
        self.token_ids: list[int] = []
        # Seconds to the prompt, to the prefill, and for each token.
        self.seconds = [moments[1] - moments[0], moments[2] - moments[1]]
        self._decode, self._tokens = decode, None
        self._text = TextStream(engine.processor)

    def __iter__(self) -> Iterator[str]:
        while (token := self._next()) is not None:
            self.token_ids.append(token)
            if piece := self._text.push(token):
                yield piece
        if rest := self._text.finish():
            yield rest

    def _next(self) -> int | None:
        begun = time.perf_counter()
        self._tokens = self._tokens or self.engine.decode(self.prefill, **self._decode)
        token = next(self._tokens, None)
        if token is not None:
            self.seconds.append(time.perf_counter() - begun)
        return token

    def finish(self) -> Answer:
        """The whole answer, for whom its pieces do not matter."""
        self._decode["ahead"] = self.engine.ahead
        for _ in self:
            pass
        return self.answer

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self.engine.processor.decode(self.token_ids)

    @property
    def answer(self) -> Answer:
        """What has been said so far, and what it cost."""
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
        if self.token_ids and self.token_ids[-1] in self.engine.eos_token_id:
            return "eos"
        return "length" if len(self.token_ids) == self.max_new_tokens else "stopped"

    def _stats(self) -> Stats:
        prefill = self.prefill
        rows = prefill.batch.counts[0] * self.engine.config.text_config.num_hidden_layers
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
            peak_bytes=peak_bytes(self.engine.device),
        )
