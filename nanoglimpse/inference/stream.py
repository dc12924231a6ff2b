"""One answer, piece by piece: its options, its text, and its costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from nanoglimpse.config import GREEDY, UNSET, Sampling
from nanoglimpse.inference.decode import lookahead
from nanoglimpse.inference.outputs import Answer, Prefill
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
        prompt: options of `Processor.prompt`.
        prefill: options of `Engine.prefill_many`, without the fields of `Pruning`.
        decode: options of `Engine.decode`.
        pruning: all others, fields of `Pruning`.
    """

    prompt: dict[str, Any]
    prefill: dict[str, Any]
    decode: dict[str, Any]
    pruning: PruningOptions


def split(options: AskOptions, model: Model) -> SplitOptions:
    """The options by the function that takes them, with defaults for those that are missing.

    Fields of `sampling` that are unset are those of the model's checkpoint.
    """
    rest: dict[str, Any] = dict(options)
    limit = {"max_new_tokens": rest.pop("max_new_tokens", 128)}
    sampling = (rest.pop("sampling", None) or UNSET).over(model.sampling).over(GREEDY)
    return SplitOptions(
        prompt=rest.pop("prompt_options", None) or {},
        prefill=limit | {k: rest.pop(k) for k in ("seed", "evidence", "trace") if k in rest},
        decode=limit | {"ignore_eos": rest.pop("ignore_eos", False), "sampling": sampling},
        pruning=cast(PruningOptions, rest),
    )


class Stream:
    """The text of one answer in pieces, each of whole characters.

    The constructor builds and prefills the prompt. `answer` is the answer so far, at any time.

    Args:
        model: model that answers.
        processor: decodes tokens.
        prepare: builds the prompt.
        prefill: runs the prompt.
        decode: `Engine.decode`.
        options: arguments of `decode`.

    Attributes:
        prefill: prefill of the prompt.
        token_ids: tokens generated so far.
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
        self.token_ids: list[int] = []
        # Seconds spent on the prompt, on the prefill, and on each token.
        self.seconds = [moments[1] - moments[0], moments[2] - moments[1]]
        self._rows, self._ahead = self.prefill.cache.num_rows, 0
        self._tokens = self._decode(decode)
        self._text = TextStream(processor)

    def _decode(self, decode: Callable[..., Iterator[int]]) -> Iterator[int]:
        """The tokens; `_ahead` is read when the first one is needed."""
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
        """The whole answer, for a caller that does not need its pieces."""
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
        reason, later = "stopped", self.seconds[3:]
        if self.token_ids and self.token_ids[-1] in self.model.eos_token_id:
            reason = "eos"
        elif len(self.token_ids) == self.options["max_new_tokens"]:
            reason = "length"
        return self.prefill.answer(0, self._rows, 1000 * self.seconds[0]).finished(
            self.text,
            list(self.token_ids),
            reason,
            first_token=1000 * sum(self.seconds[:3]),
            decode=1000 * sum(later) / len(later) if later else 0.0,
            sampling=self.options["sampling"],
            checkpoint=self.model.sampling,
        )
