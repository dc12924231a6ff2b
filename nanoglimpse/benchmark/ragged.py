"""Questions of different sizes: asked at once, asked one by one, and answered by transformers.

Their pictures and texts have different lengths, and their answers end at different places.
`Engine.ask_many` takes them at once and `Engine.ask` one by one; the `generate` of transformers
takes one batch that is padded on the left, and goes on until the last answer has ended. All of them
begin with pictures. Answers of a pruned model may have other lengths, so that both questions and
tokens a second are reported.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nanoglimpse.benchmark import measuring
from nanoglimpse.benchmark.contenders import Answers, Peer, Transformers, methods
from nanoglimpse.benchmark.figures import Ratios, spread
from nanoglimpse.benchmark.models import Workload
from nanoglimpse.benchmark.output import Output
from nanoglimpse.benchmark.report import times
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.methods.base import PruningMethod


class Ragged:
    """A number of questions of different sizes, with all contenders.

    Attributes:
        contenders: by name; each answers all questions, from the pictures on, with token ids.
        answers: the last answers of each contender.
        figures: by contender the milliseconds and the peak of memory of all rounds.
    """

    def __init__(self, workload: Workload, transformers: Transformers | None):
        self.workload, self.engine, self.args = workload, workload.engine, workload.args
        self.methods = methods(self.engine, self.args)
        self.contenders: dict[str, Callable[[], Answers]] = {}
        for name, method in self.methods.items():
            self.contenders[f"{name}, at once"] = partial(self.at_once, method)
            self.contenders[f"{name}, one by one"] = partial(self.one_by_one, method)
        self.peer = Peer(transformers, workload) if transformers else None
        if self.peer:
            self.contenders[self.peer.name] = self.peer.answers
        self.answers: dict[str, Answers] = {}
        self.figures: measuring.Figures = {}
        lengths = [len(prompt) for prompt in workload.prompts]
        visuals = [int(prompt.visual.sum()) for prompt in workload.prompts]
        self.title = (
            f"{len(lengths)} questions at once, {min(visuals)} to {max(visuals)} visual tokens, "
            f"{min(lengths)} to {max(lengths)} rows"
        )

    def at_once(self, method: str | PruningMethod) -> Answers:
        """All questions in one packed batch, which answers leave as they end."""
        prompts, new = self.workload.prompts, self.args.new
        rows = sum(map(len, prompts)) + len(prompts) * new
        answers = []
        for answer in self.engine.ask_many(
            self.workload.items, method, max_batch_tokens=rows, max_new_tokens=new
        ):
            if isinstance(answer, NanoglimpseError):
                raise answer
            answers.append(answer.token_ids)
        return answers

    def one_by_one(self, method: str | PruningMethod) -> Answers:
        """The same questions, each by itself."""
        ask = partial(self.engine.ask, pruning=method, max_new_tokens=self.args.new)
        return [ask(*item).token_ids for item in self.workload.items]

    def faults(self) -> list[str]:
        """Contenders that differ from questions asked one by one, a line each.

        In float32 their tokens are compared, in lower precision their logits.
        """
        measuring.say(f"{self.title}: checking")
        exact = self.engine.dtype == torch.float32
        return [*(self._unlike_tokens() if exact else self._unlike_logits())]

    def _unlike_tokens(self) -> Iterator[str]:
        answers = {name: contender() for name, contender in self.contenders.items()}
        for name in self.methods:
            if answers[f"{name}, at once"] != answers[f"{name}, one by one"]:
                yield f"tokens, {name} at once and one by one differ"
        peer = self._compared()
        if peer and answers[peer.name] != answers["dense, one by one"]:
            yield "tokens differ from transformers'"

    def _unlike_logits(self) -> Iterator[str]:
        for name, method in self.methods.items():
            read = partial(self.engine.prefill_many, pruning=method, max_new_tokens=1)
            logits = torch.cat([read([prompt]).logits for prompt in self.workload.prompts])
            others = {"at once and one by one": read(self.workload.prompts).logits}
            if (peer := self._compared()) and method == "dense":
                others["and transformers"] = peer.logits()
            for what, other in others.items():
                pair = f"logits, {name} {what}"
                yield from measuring.differences(pair, self.engine, other, logits)

    def _compared(self) -> Peer | None:
        """transformers, if it has the same weights."""
        return None if self.engine.model.quantized else self.peer

    def measure(self) -> None:
        """Runs the rounds."""
        rounds = {name: partial(self.round, name) for name in self.contenders}
        self.figures = measuring.run_rounds(self.title, rounds, self.args.rounds, self.args.until)

    def round(self, name: str) -> dict[str, float]:
        """The milliseconds and the peak of memory of all answers of a contender."""
        memory, start = measuring.Memory(self.engine.device), measuring.now(self.engine.device)
        self.answers[name] = self.contenders[name]()
        spent = 1000 * (measuring.now(self.engine.device) - start)
        return {"ms": spent, "memory": memory.peak()}

    def report(self, out: Output) -> dict[str, Any]:
        """Writes the tables; returns the entry of the JSON line."""
        lengths = [len(answer) for answer in self.answers["dense, one by one"]]
        rounds = len(self.figures["dense, at once"]["ms"])
        out.note(
            f"{self.title}, answers of {min(lengths)} to {max(lengths)} tokens, "
            f"medians of {rounds} rounds, ± half their quartiles"
        )
        entries = {name: self._summary(name) for name in self.contenders}
        columns = ("ms", "ms_spread", "questions/s", "tokens/s", "tokens/s_spread")
        rows = [
            [name, *(entry[column] for column in columns), entry["peak_bytes"] / 1e6]
            for name, entry in entries.items()
        ]
        head = ["contender", "ms", "±", "questions/s", "tokens/s", "±", "peak MB"]
        out.table("all questions", head, rows)
        told = Ratios()
        ratios = {name: self._ratios(name, told) for name in self.methods}
        over = [*dict.fromkeys(what for others in ratios.values() for what in others)]
        rows = [[name, *(one.get(what) for what in over)] for name, one in ratios.items()]
        heading = "at once, times as many questions a second"
        out.table(heading, ["contender", *(f"over {what}" for what in over)], rows)
        told.write(out)
        count = len(self.workload.items)
        return {"title": self.title, "questions": count, "arms": entries, "ratios": ratios}

    def _summary(self, name: str) -> dict[str, Any]:
        """The figures of a contender."""
        times, tokens = self.figures[name]["ms"], sum(map(len, self.answers[name]))
        speeds = [1000 * tokens / value for value in times]
        return {
            "ms": statistics.median(times),
            "ms_spread": spread(times),
            "questions/s": 1000 * len(self.workload.items) / statistics.median(times),
            "tokens/s": statistics.median(speeds),
            "tokens/s_spread": spread(speeds),
            "tokens": tokens,
            "peak_bytes": statistics.median(self.figures[name]["memory"]),
        }

    def _ratios(self, name: str, told: Ratios) -> dict[str, float | None]:
        """How many times as fast as others a method is at once."""
        others = {"one by one": f"{name}, one by one"}
        if self.peer:
            others["transformers"] = self.peer.name
        if name != "dense":
            others["dense"] = "dense, at once"
        own = self.figures[f"{name}, at once"]["ms"]
        return {
            what: told.tell(f"{name} over {what}", self.figures[other]["ms"], own)
            for what, other in others.items()
        }


def gains_at_once(entry: dict[str, Any]) -> str:
    """What was gained by what, in a line; ? stands for a ratio that means nothing."""
    parts = []
    for name, ratios in entry["ratios"].items():
        words = [f"{times(ratio)} times {what}" for what, ratio in ratios.items()]
        parts.append(f"{name} {', '.join(words)}")
    return f"{entry['title']}: questions a second, " + "; ".join(parts)
