"""One number of visual tokens and one batch size: what computes wrong, how long the rest takes."""

import argparse
import statistics
from collections import defaultdict

import torch
from torch import Tensor

from nanoglimpse.benchmark.contenders import Ours, Static, Task
from nanoglimpse.benchmark.measuring import say
from nanoglimpse.benchmark.models import Forced, random_engine, stored_engine
from nanoglimpse.benchmark.work import Cost, Work
from nanoglimpse.engine import Engine
from nanoglimpse.methods.base import PruningMethod

# How far logits may be from those of the same weights elsewhere, relative to their norm.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def methods(engine: Engine, args: argparse.Namespace) -> dict[str, str | PruningMethod]:
    """Our contenders, and the method of each."""
    shares = args.retain or ([0.111] if args.shape else [])
    if not engine.glimpse:
        return {"dense": "dense"}
    forced = {method.name: method for method in map(Forced, shares) if method.share_kept < 1}
    return {"dense": "dense", **(forced if shares else {"pruned": "glimpse"})}


class Case:
    """One number of visual tokens and one batch size, with all arms."""

    def __init__(self, engine, peer, roofs, args, visual, batch):
        self.engine, self.roofs, self.args = engine, roofs, args
        self.task = task = Task(engine, args, visual, batch)
        self.visual = int(task.prompt.visual.sum())
        self.title = f"{self.visual} visual tokens, {len(task.prompt)} rows, batch {batch}"
        self.arms = {name: Ours(task, method) for name, method in methods(engine, args).items()}
        self.peer = peer.at(task) if peer else None
        if self.peer:
            self.arms[peer.name] = self.peer
            if args.static:
                static = Static(peer.model, peer.pixels, peer.version).at(task)
                self.arms[static.name] = static

    def faults(self) -> list[str]:
        """What computes something else than it should."""
        say(f"{self.title}: checking")
        limit, found = CLOSE[self.engine.dtype], []
        dense = self.arms["dense"]

        def check(what: str, ours: Tensor, theirs: Tensor) -> None:
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error <= limit:
                found.append(f"{what} differ by {error:.1e}, more than {limit:g}")

        logits = dense.prefill(2).logits
        if self.peer and not self.engine.model.quantized:
            check("logits from transformers'", logits, self.peer.logits())
            if self.engine.dtype == torch.float32:
                count = min(self.args.new, 16)
                steps = self.engine.decode_many(dense.prefill(count), count, ignore_eos=True)
                if list(map(list, zip(*steps, strict=True))) != self.peer.tokens(count).tolist():
                    found.append("tokens differ from transformers'")
            for name, arm in self.arms.items():
                if isinstance(arm, Static):
                    same = torch.equal(arm.tokens(self.args.new), self.peer.tokens(self.args.new))
                    found += [] if same else [f"tokens of {name} differ"]
        if self.engine.glimpse:
            every = Ours(self.task, Forced(1.0))
            check("keeping all and dense", every.prefill(2).logits, logits)
        for name, arm in self.arms.items():
            if isinstance(arm, Ours) and self.task.batch == 1:
                session, question = self.task.begin(arm.method)
                session.prefill(question, max_new_tokens=2)
                further = session.prefill(question, max_new_tokens=2).logits[None]
                check(f"{name} in a session and without one", further, arm.prefill(2).logits)
            if isinstance(arm, Ours) and name != "dense":
                inside, after = arm.prefill(2), arm.prefill(2, trace=True)
                check(f"{name} inside and after layer K", inside.logits, after.logits)
                left = inside.positions.shape[1]
                if inside.cache.num_rows != left * self.engine.config.text_config.num_hidden_layers:
                    found.append(f"{name} leaves other rows in the cache")
        return found

    def measure(self) -> None:
        """Rounds that alternate between the arms; the first warms up."""
        self.figures = {name: defaultdict(list) for name in self.arms}
        for number in range(self.args.rounds + 1):
            say(f"{self.title}: round {number} of {self.args.rounds}")
            for name, arm in self.arms.items():
                for stage, value in arm.round(self.args.new).items():
                    if number:
                        self.figures[name][stage].append(value)

    def costs(self, arm: Ours) -> dict[str, Cost]:
        """Of the stages of an arm."""
        work = Work(self.engine, self.task.prompt.grids, arm.rows, self.task.batch)
        layers, stop = arm.rows.prefill(), arm.rows.stop
        costs = {"vision": work.vision()}
        if arm.method == "dense":
            costs["prefill"] = work.layers(layers)
        else:
            costs |= {
                f"prefill < {stop}": work.layers(layers[:stop]),
                "score": work.score(),
                "keep": work.keep(),
                f"prefill ≥ {stop}": work.layers(layers[stop:]),
            }
        self.stages = [*costs]
        costs["lm_head"] = work.head()
        costs["a token"] = work.step(self.args.new // 2)
        if self.task.batch == 1:
            choice = Cost(0, 0) if arm.method == "dense" else costs["score"] + costs["keep"]
            further = work.layers(arm.question) + choice + costs["lm_head"]
            costs["first question"] = costs["vision"] + work.layers(arm.prefix) + further
            costs["further question"] = further
        return costs

    def floors(self, arm: Ours) -> dict[str, float]:
        """Least milliseconds of the stages, and of what they add up to."""
        floors = {stage: self.roofs.floor(cost) for stage, cost in self.costs(arm).items()}
        prefill = [stage for stage in self.stages if stage != "vision"]
        floors["all prefill"] = sum(floors[stage] for stage in [*prefill, "lm_head"])
        floors["first token"] = floors["vision"] + floors["all prefill"]
        floors["end to end"] = floors["first token"] + (self.args.new - 1) * floors["a token"]
        return floors

    def middle(self, name: str, stage: str) -> float | None:
        """The median."""
        values = self.figures[name][stage]
        return statistics.median(values) if values else None


def accuracy(engine: Engine, args: argparse.Namespace) -> dict:
    """How far logits in few bits, and in bfloat16, are from those of the weights as they are."""
    plain = argparse.Namespace(**vars(args) | {"quantize": None})

    def build(dtype: str) -> Engine:
        plain.dtype = dtype
        return random_engine(plain, None) if args.shape else stored_engine(plain)

    task = Task(engine, args, args.visual_tokens[0] if args.shape else 0, 1)
    exact = build("float32").prefill(task.prompt, "dense").logits.float()
    errors = {}
    for name, one in {args.quantize: engine, "bfloat16": build("bfloat16")}.items():
        logits = one.prefill(task.prompt, "dense").logits.float()
        errors[name] = float((logits - exact).norm() / exact.norm())
    words = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    print(f"accuracy: distance of the first logits from those in float32: {words}")
    return errors
