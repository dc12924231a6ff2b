"""One number of visual tokens and one batch size: the gate, and the rounds that are timed."""

import argparse
import statistics
from collections.abc import Iterator

import torch

from nanoglimpse.benchmark.contenders import Ours, Peer, Static, Transformers, methods
from nanoglimpse.benchmark.lengths import NewLengths
from nanoglimpse.benchmark.measuring import Figures, differences, distance, run_rounds, say
from nanoglimpse.benchmark.models import Forced, Workload, make_engine, visual_sizes
from nanoglimpse.benchmark.output import Output
from nanoglimpse.benchmark.roofs import Roofs
from nanoglimpse.engine import Engine


class Case:
    """One number of visual tokens and one batch size, with all contenders.

    Attributes:
        visual: visual tokens of a prompt.
        ours: this engine, by the name of a method.
        peers: transformers by name, in none, one or two ways; the first one is the plain one.
        new_lengths: the dense engine at lengths that are new in every round; None if the context
            is too short for them.
        cold: by contender and stage, milliseconds of its first answer.
        figures: by contender and stage the values of all rounds.
    """

    def __init__(self, workload: Workload, transformers: Transformers | None, roofs: Roofs):
        self.workload, self.engine, self.args = workload, workload.engine, workload.args
        self.roofs, prompt = roofs, workload.prompts[0]
        self.visual = int(prompt.visual.sum())
        batch = len(workload.prompts)
        self.title = f"{self.visual} visual tokens, {len(prompt)} rows, batch {batch}"
        ours = methods(self.engine, self.args).items()
        self.ours = {name: Ours(workload, method) for name, method in ours}
        self.peers: dict[str, Peer] = {}
        if transformers:
            for kind in (Peer, Static) if self.args.static else (Peer,):
                peer = kind(transformers, workload)
                self.peers[peer.name] = peer
        lengths = NewLengths(workload)
        self.new_lengths = lengths if lengths.fits(self.args.rounds) else None
        self.cold: dict[str, dict[str, float]] = {}
        self.figures: Figures = {}

    def first(self) -> None:
        """Times the first answer of each contender: of the process, at these lengths."""
        for name, one in self.contenders.items():
            say(f"{self.title}: the first answer, {name}")
            answer = one.answer()
            spent = answer[1] if isinstance(answer, tuple) else answer
            self.cold[name] = {stage: spent[stage] for stage in ("first token", "end to end")}

    def faults(self) -> list[str]:
        """What a contender computes differently from another one that has to agree with it."""
        say(f"{self.title}: checking")
        return [*self._unlike_transformers(), *self._unlike_each_other()]

    def _unlike_transformers(self) -> Iterator[str]:
        if not self.peers or self.engine.model.quantized:
            return
        dense, (peer, *others), new = self.ours["dense"], self.peers.values(), self.args.new
        logits = dense.prefill(2).logits
        yield from differences("logits from transformers'", self.engine, logits, peer.logits())
        if self.engine.dtype == torch.float32:
            count = min(new, 16)
            steps = self.engine.decode_many(dense.prefill(count), count, ignore_eos=True)
            if list(map(list, zip(*steps, strict=True))) != peer.tokens(count).tolist():
                yield "tokens differ from transformers'"
        for other in others:
            if not torch.equal(other.tokens(new), peer.tokens(new)):
                yield f"tokens of {other.name} differ"

    def _unlike_each_other(self) -> Iterator[str]:
        engine, text = self.engine, self.engine.config.text_config
        if engine.glimpse:
            every, dense = Ours(self.workload, Forced(1.0)), self.ours["dense"]
            logits = every.prefill(2).logits, dense.prefill(2).logits
            yield from differences("keeping all and dense", engine, *logits)
        for name, ours in self.ours.items():
            inside = ours.prefill(2)
            if len(self.workload.prompts) == 1:
                session, question = self.workload.begin(ours.method)
                session.prefill(question, max_new_tokens=2)
                further = session.prefill(question, max_new_tokens=2).logits[None]
                what = f"{name} in a session and without one"
                yield from differences(what, engine, further, inside.logits)
            if name != "dense":
                after = ours.prefill(2, trace=True).logits
                what = f"{name} inside and after layer K"
                yield from differences(what, engine, inside.logits, after)
                if inside.cache.num_rows != inside.positions.shape[1] * text.num_hidden_layers:
                    yield f"{name} leaves other rows in the cache"

    @property
    def contenders(self) -> dict[str, Ours | Peer]:
        """Ours and theirs."""
        return {**self.ours, **self.peers}

    @property
    def rounds(self) -> int:
        """How many were counted; fewer than asked for if time ran out."""
        return len(self.figures["dense"]["a token"])

    def measure(self) -> None:
        """Runs the rounds, and measures the roofs before and after them."""
        rounds = {name: one.round for name, one in self.contenders.items()}
        if self.new_lengths:
            rounds[self.new_lengths.name] = self.new_lengths.round
        self.roofs.renew()
        self.figures = run_rounds(self.title, rounds, self.args.rounds, self.args.until)
        self.roofs.measure()
        self.roofs.settle(lambda: any(self.below(name) for name in self.ours))

    def below(self, name: str) -> list[str]:
        """The stages of one of ours that took less than their floors."""
        floors = self.ours[name].floors(self.roofs)
        return [s for s in self.figures[name] if s in floors and self.middle(name, s) < floors[s]]

    def middle(self, name: str, stage: str) -> float:
        """The median over rounds."""
        return statistics.median(self.figures[name][stage])


def accuracy(engine: Engine, args: argparse.Namespace, out: Output) -> dict[str, float]:
    """How far logits of quantised weights, and in bfloat16, are from those in float32."""

    def build(dtype: str) -> Engine:
        return make_engine(argparse.Namespace(**vars(args) | {"quantize": None, "dtype": dtype}))

    prompt = Workload(engine, args, visual_sizes(args)[0]).prompts[0]
    exact = build("float32").prefill(prompt, "dense").logits
    engines = {args.quantize: engine, "bfloat16": build("bfloat16")}
    errors = {n: distance(e.prefill(prompt, "dense").logits, exact) for n, e in engines.items()}
    words = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    out.note(f"accuracy: distance of the first logits from those in float32: {words}")
    return errors
