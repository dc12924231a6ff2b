"""The training loop: numbered data, learning-rate schedule, several processes, exact resuming.

A micro-batch is a function of its number, so that neither interruptions nor the number of processes
change the result: with w processes and a micro-batches per process, step i uses the mean gradient
of the micro-batches i·w·a … (i+1)·w·a - 1.
"""

import io
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanoglimpse.cli.console import Terminated, say
from nanoglimpse.distributed import ProcessGroup
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.files import write_whole
from nanoglimpse.jsonl import Journal

STATE, LOG = "state.pt", "log.jsonl"
SCHEDULES = ("cosine", "trapezoid")


@dataclass(frozen=True)
class Recipe:
    """The optimisation; the defaults are those of the paper's stage A (AdamW, cosine).

    Attributes:
        steps: the number of optimiser steps.
        lr: the peak learning rate.
        schedule: one of SCHEDULES.
        warmup: the share of the steps in which the learning rate rises.
        decay: the share of the steps in which a trapezoid falls.
        betas, weight_decay: of AdamW; only matrices decay.
        grad_norm: the norm to which gradients are clipped.
        accumulate: micro-batches per step and process.
        save_every, evaluate_every, log_every: intervals in steps.
        workers: subprocesses that make batches; 0 makes them in the process itself.
    """

    steps: int
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_norm: float = 1.0
    accumulate: int = 8
    save_every: int = 500
    evaluate_every: int = 500
    log_every: int = 10
    workers: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        done = (step + 0.5) / self.steps
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == "cosine":
            angle = math.pi * (done - self.warmup) / (1 - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(angle))
        return self.lr * min(1.0, (1 - done) / self.decay)


class TrainTask(Protocol):
    """A model with its data and its loss.

    Attributes:
        module: its parameters that require gradients are trained.
        rates: the shares of the learning rate of those children of `module` that do not use all
            of it.
    """

    module: nn.Module
    rates: dict[str, float]

    def batch(self, micro: int) -> Any:
        """The micro-batch of this number, on the CPU."""

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a micro-batch, and figures to log."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data."""

    def save(self, folder: Path) -> None:
        """Writes the weights as a checkpoint."""


class MasterWeights:
    """Fp32 copies of the trained parameters, and AdamW, which works on them and decays matrices.

    Args:
        module: its parameters that require gradients are trained.
        recipe: the optimisation.
        rates: as in `TrainTask`.

    Attributes:
        parameters: the trained parameters.
        copies: their copies.
        grads: the gradients of the copies.
        optimiser: of the copies; `share` is a group's share of the learning rate.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, rates: dict[str, float]):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.copies = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        self.grads = [torch.zeros_like(copy) for copy in self.copies]
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for (name, _), copy, grad in zip(named, self.copies, self.grads, strict=True):
            copy.grad = grad
            share = rates.get(name.partition(".")[0], 1.0)
            groups.setdefault((share, copy.ndim > 1), []).append(copy)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": params, "share": share, "weight_decay": recipe.weight_decay * decays}
                for (share, decays), params in groups.items()
            ],
            lr=recipe.lr,
            betas=recipe.betas,
        )

    def gather(self) -> None:
        """Moves the gradients of the parameters to the copies, adding up."""
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            if parameter.grad is not None:
                grad += parameter.grad
                parameter.grad = None

    def step(self, rate: float, grad_norm: float) -> float:
        """Steps with the gradients of the copies, clipped to a norm; returns the norm they had."""
        norm = nn.utils.clip_grad_norm_(self.copies, grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = group["share"] * rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        self.publish()
        return float(norm)

    def moments(self) -> list[list[torch.Size]]:
        """The shapes of the optimiser's step and moments of each parameter, in its order."""
        params = [p for group in self.optimiser.param_groups for p in group["params"]]
        return [[torch.Size(), param.shape, param.shape] for param in params]

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the copies into the parameters."""
        torch._foreach_copy_(self.parameters, self.copies)


class GracefulStop:
    """Turns a first Ctrl-C or SIGTERM into a request to stop after the step; a second interrupts.

    Attributes:
        requested: the first one; None as long as there is none.
    """

    def __init__(self):
        self.requested: KeyboardInterrupt | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, *_: object) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.requested:
            raise kind
        self.requested = kind()
        say("\nstopping after this step; press Ctrl-C again to stop at once")


def train(
    task: TrainTask, recipe: Recipe, folder: Path, *, settings: dict, log: Callable[[str], None]
) -> KeyboardInterrupt | None:
    """Trains up to `recipe.steps`, resuming from the state in `folder` if there is one.

    Args:
        task: the model with its data and its loss.
        recipe: the optimisation.
        folder: holds state, log and weights.
        settings: must be equal to the settings of a state that is resumed.
        log: is called with lines for the user.

    Returns:
        None if all steps are done; else the interruption, after which the state was saved.

    Raises:
        NanoglimpseError: the state in `folder` is damaged, belongs to another run, or cannot be
            written.
    """
    masters, state = MasterWeights(task.module, recipe, task.rates), folder / STATE
    group = ProcessGroup(masters.copies[0].device)
    first, leads = _restore(state, settings, masters), group.rank == 0
    masters.publish()
    training_log = TrainingLog(folder / LOG, first, recipe, log if leads else None)
    batches, done = _batches(task, _numbers(first, recipe, group), recipe.workers), first
    with GracefulStop() as stop:
        while done < recipe.steps:
            for _ in range(recipe.accumulate):
                loss, figures = task.loss(next(batches))
                (loss / (recipe.accumulate * group.count)).backward()
                masters.gather()
                training_log.add(figures)
            group.sum(masters.grads)
            rate = recipe.rate(done)
            norm = masters.step(rate, recipe.grad_norm)
            done += 1
            training_log.step(done, lr=rate, norm=norm)
            stopping = group.any(stop.requested is not None) or done == recipe.steps
            if leads and (done % recipe.evaluate_every == 0 or done == recipe.steps):
                training_log.evaluation(done, task.evaluate())
            if leads and (done % recipe.save_every == 0 or stopping):
                # A state says that the weights of its step are there.
                task.save(folder)
                _save(state, done, settings, masters)
            if stopping:
                break
    if leads and first == recipe.steps:
        task.save(folder)  # Of a finished run, whose weights may have been lost since.
    group.close()
    return None if done >= recipe.steps else stop.requested or KeyboardInterrupt()


def _numbers(first: int, recipe: Recipe, group: ProcessGroup) -> list[int]:
    """The numbers of the micro-batches of this process."""
    local = range(recipe.accumulate * group.rank, recipe.accumulate * (group.rank + 1))
    per_step = recipe.accumulate * group.count
    return [step * per_step + a for step in range(first, recipe.steps) for a in local]


def _batches(task: TrainTask, numbers: list[int], workers: int) -> Iterator[Any]:
    if not workers:
        return map(task.batch, numbers)
    # Any sequence will do as a data set; without a batch size, collate_fn is given a single entry.
    dataset, make = cast(Dataset, numbers), cast(Callable[[list], Any], task.batch)
    loader = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=make,
        num_workers=workers,
        prefetch_factor=4,
        worker_init_fn=_ignore_signals,
    )
    return iter(loader)


def _ignore_signals(_: int) -> None:
    """Leaves Ctrl-C and SIGTERM, which also reach subprocesses, to the process that trains.

    It still needs their batches to finish its step, and ends them itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _save(path: Path, step: int, settings: dict, masters: MasterWeights) -> None:
    content = io.BytesIO()
    state = {
        "step": step,
        "same": settings,
        "parameters": [copy.detach() for copy in masters.copies],
        "optimizer": masters.optimiser.state_dict(),
    }
    torch.save(state, content)
    write_whole(path, content.getvalue())


def _restore(path: Path, settings: dict, masters: MasterWeights) -> int:
    """Loads the state in `path` and returns the number of steps done; 0 where there is none.

    An empty file is none: it is what a crash of the machine leaves of a file that was being made.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    try:
        # Whatever is wrong with the file, its readers raise many kinds of errors.
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, saved, values = (state[name] for name in ("step", "same", "parameters"))
        shapes = [value.shape for value in values]
        moments = _moments(state["optimizer"]["state"])
        of_run = isinstance(step, int) and step >= 0 and bool(saved == settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise NanoglimpseError(
            f"{path} is damaged ({reason}); remove it to begin the run again"
        ) from None
    if shapes != [copy.shape for copy in masters.copies] or moments != masters.moments():
        raise NanoglimpseError(f"{path} belongs to another model; use another folder")
    if not of_run:
        raise NanoglimpseError(
            f"{path} belongs to a run with other options; repeat them, or use another folder"
        )
    with torch.no_grad():
        for copy, value in zip(masters.copies, values, strict=True):
            copy.copy_(value)
    # The options of the groups are those of the recipe, which is that of the state.
    groups = masters.optimiser.state_dict()["param_groups"]
    masters.optimiser.load_state_dict({**state["optimizer"], "param_groups": groups})
    return step


def _moments(state: dict[int, dict[str, Tensor]]) -> list[list[torch.Size]]:
    """The shapes of what AdamW holds of each parameter, by its number."""
    names = ("step", "exp_avg", "exp_avg_sq")
    return [[state[number][name].shape for name in names] for number in sorted(state)]


def _step(row: dict) -> float:
    """The step of a line of the log; after all steps if it has none."""
    step = row.get("step")
    return step if isinstance(step, int) else math.inf


class TrainingLog:
    """Progress for the user, and the same figures as JSON lines; without `log` it does nothing."""

    def __init__(self, path: Path, first: int, recipe: Recipe, log: Callable[[str], None] | None):
        self.journal, self.recipe, self.log = Journal(path), recipe, log
        self.sums: dict[str, float] = {}
        self.count, self.first = 0, first
        self.start = self.since = time.perf_counter()
        if log and path.exists():
            # Steps that a killed run logged after its last saved state are trained again.
            rows = [row for _, row in self.journal.read() if isinstance(row, dict)]
            self.journal.write(row for row in rows if _step(row) <= first)

    def add(self, figures: dict[str, float]) -> None:
        """Adds the figures of a micro-batch to the mean."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.count += 1

    def step(self, done: int, **figures: float) -> None:
        """Reports every `log_every` steps the means of the added figures, and `figures`."""
        if done % self.recipe.log_every and done != self.recipe.steps:
            return
        now = time.perf_counter()
        mean = {name: value / self.count for name, value in self.sums.items()}
        speed = self.sums.get("samples", 0.0) / (now - self.since)
        remaining = (now - self.start) / (done - self.first) * (self.recipe.steps - done)
        shown = "  ".join(f"{n} {value:.3g}" for n, value in mean.items() if n != "samples")
        self._report(
            {"step": done, **mean, **figures, "samples_per_s": speed},
            f"step {done}/{self.recipe.steps}  {shown}  {speed:.3g} samples/s  "
            f"{int(remaining // 60)} min {int(remaining % 60)} s left",
        )
        self.sums, self.count, self.since = {}, 0, now

    def evaluation(self, done: int, figures: dict[str, float]) -> None:
        """Writes figures on held-out data."""
        line = "held out: " + "  ".join(f"{n} {v:.3f}" for n, v in figures.items())
        self._report({"step": done, "heldout": figures}, line)

    def _report(self, entry: dict, line: str) -> None:
        if self.log:
            self.journal.append([entry])
            self.log(line)
