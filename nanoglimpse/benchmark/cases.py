"""One number of visual tokens and one batch size: the gate, and the rounds that are timed."""

import argparse
import statistics
from collections.abc import Iterator

import torch

from nanoglimpse.benchmark.contenders import Ours, Peer, Static, Transformers, methods
from nanoglimpse.benchmark.measuring import Figures, Roofs, differences, distance, run_rounds, say
from nanoglimpse.benchmark.models import Forced, Workload, make_engine
from nanoglimpse.engine import Engine


class Case:
    """One number of visual tokens and one batch size, with all contenders.

    Attributes:
        visual: visual tokens of a prompt.
        ours: this engine, by the name of a method.
        peers: transformers by name, in none, one or two ways; the first one is the plain one.
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
        self.figures: Figures = {}

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

    def measure(self) -> None:
        """Runs the rounds."""
        rounds = {name: one.round for name, one in (self.ours | self.peers).items()}
        self.figures = run_rounds(self.title, rounds, self.args.rounds)

    def middle(self, name: str, stage: str) -> float:
        """The median over rounds."""
        return statistics.median(self.figures[name][stage])


def accuracy(engine: Engine, args: argparse.Namespace) -> dict[str, float]:
    """How far logits of quantised weights, and in bfloat16, are from those in float32."""

    def build(dtype: str) -> Engine:
        return make_engine(argparse.Namespace(**vars(args) | {"quantize": None, "dtype": dtype}))

    prompt = Workload(engine, args, args.visual_tokens[0] if args.shape else 0).prompts[0]
    exact = build("float32").prefill(prompt, "dense").logits
    engines = {args.quantize: engine, "bfloat16": build("bfloat16")}
    errors = {n: distance(e.prefill(prompt, "dense").logits, exact) for n, e in engines.items()}
    words = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    print(f"accuracy: distance of the first logits from those in float32: {words}")
    return errors
