"""The training loop: numbered data, a schedule, several processes, resuming to the same result.

Every micro-batch has a number and is made from it alone, so that neither an interruption nor the
number of processes changes what is learned: step i takes the micro-batches i·w·a … (i+1)·w·a - 1 of
w processes with a each, and their mean gradient.
"""

import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NanoglimpseError
from ..files import write_whole

STATE, LOG = "state.pt", "log.jsonl"
SCHEDULES = ("cosine", "trapezoid")


@dataclass(frozen=True)
class Recipe:
    """How to optimise; the defaults are those of the paper's stage A (methods: AdamW, cosine)."""

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
        """Learning rate of a step, counted from 0: warm-up, then cosine, or constant and linear."""
        done = (step + 0.5) / self.steps
        if done < self.warmup:
            return self.lr * done / self.warmup
        if self.schedule == "cosine":
            return (
                self.lr * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
            )
        return self.lr * min(1.0, (1 - done) / self.decay)


class Task(Protocol):
    """What is trained."""

    module: nn.Module
    """Its parameters that require gradients are trained."""

    rates: dict[str, float]
    """Of children of `module` that learn at a share of the learning rate."""

    def batch(self, micro: int) -> Any:
        """The micro-batch of this number, on the CPU."""

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a micro-batch, and figures to show."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data."""

    def save(self, folder: Path) -> None:
        """Writes what has been learned as a checkpoint."""


def processes() -> int:
    """How many train together; torchrun says so."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Workers:
    """This process among those that train together; alone without torchrun."""

    def __init__(self):
        self.count = processes()
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    def sum(self, tensors: list[Tensor]) -> None:
        """Adds the tensors of all processes, in place."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.count == 1:
            return flag
        value = torch.tensor([float(flag)])
        value = value.cuda() if torch.cuda.is_available() else value
        dist.all_reduce(value)
        return bool(value.item())

    def close(self) -> None:
        """Ends the group."""
        if self.count > 1:
            # gloo's threads drop the tensors of the last sum a little after it is there; one that
            # does so while Python ends aborts the process.
            dist.barrier()
            dist.destroy_process_group()


class Masters:
    """fp32 copies of the trained parameters, which the optimiser sees.

    Attributes:
        own: the parameters.
        full: the copies.
        parts: the child of the module that each belongs to.
    """

    def __init__(self, module: nn.Module):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parts = [name.partition(".")[0] for name, _ in named]
        self.own = [p for _, p in named]
        self.full = [p.detach().float().clone().requires_grad_() for p in self.own]
        for master in self.full:
            master.grad = torch.zeros_like(master)

    def gather(self) -> None:
        """Adds the gradients of the parameters, and clears them."""
        for own, master in zip(self.own, self.full, strict=True):
            if own.grad is not None:
                master.grad += own.grad
                own.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the parameters."""
        torch._foreach_copy_(self.own, self.full)


def optimiser(masters: Masters, recipe: Recipe, rates: dict[str, float]) -> torch.optim.AdamW:
    """AdamW; only matrices decay. A group's `share` is its share of the learning rate."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for part, master in zip(masters.parts, masters.full, strict=True):
        groups.setdefault((rates.get(part, 1.0), master.ndim > 1), []).append(master)
    return torch.optim.AdamW(
        [
            {"params": params, "share": share, "weight_decay": recipe.weight_decay * decays}
            for (share, decays), params in groups.items()
        ],
        lr=recipe.lr,
        betas=recipe.betas,
    )


class Stop:
    """Ctrl-C asks to stop after the step; a second one stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Stop":
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more stops at once", file=sys.stderr)


def train(
    task: Task,
    recipe: Recipe,
    folder: Path,
    *,
    same: dict,
    said: Callable[[str], None],
) -> bool:
    """Trains up to `recipe.steps`, from where the state in `folder` ends.

    Args:
        same: what, beside the weights' shapes, must be equal for a run to go on.
        said: takes lines for the user.

    Returns:
        whether all steps are done; False after Ctrl-C, with the state saved.

    Raises:
        NanoglimpseError: the state in `folder` belongs to another run, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NanoglimpseError(f"{folder} cannot be written to: {error}") from None
    workers, masters = Workers(), Masters(task.module)
    optim = optimiser(masters, recipe, task.rates)
    first = 0
    if (folder / STATE).exists():
        first = _restore(folder / STATE, same, masters, optim)
    masters.publish()
    leads = workers.rank == 0
    log = Log(folder / LOG, first, recipe, said if leads else None)
    batches, done = _batches(task, _numbers(first, recipe, workers), recipe.workers), first
    with Stop() as stop:
        while done < recipe.steps:
            _step(task, batches, masters, optim, workers, recipe.rate(done), recipe, log)
            done += 1
            stopping = workers.any(stop.asked) or done == recipe.steps
            if leads and (done % recipe.evaluate_every == 0 or done == recipe.steps):
                log.evaluation(done, task.evaluate())
            if leads and (done % recipe.save_every == 0 or stopping):
                _save(folder / STATE, done, same, masters, optim)
                task.save(folder)
            if stopping:
                break
    workers.close()
    return done >= recipe.steps


def _step(
    task: Task,
    batches: Iterator[Any],
    masters: Masters,
    optim: torch.optim.AdamW,
    workers: Workers,
    rate: float,
    recipe: Recipe,
    log: "Log",
) -> None:
    """One optimiser step over the micro-batches of all processes."""
    for _ in range(recipe.accumulate):
        loss, figures = task.loss(next(batches))
        (loss / (recipe.accumulate * workers.count)).backward()
        masters.gather()
        log.add(figures)
    workers.sum([p.grad for p in masters.full])
    norm = nn.utils.clip_grad_norm_(masters.full, recipe.grad_norm)
    for group in optim.param_groups:
        group["lr"] = group["share"] * rate
    optim.step()
    optim.zero_grad(set_to_none=False)
    masters.publish()
    log.step(lr=rate, norm=float(norm))


def _numbers(first: int, recipe: Recipe, workers: Workers) -> list[int]:
    """The micro-batches of this process."""
    own = range(recipe.accumulate * workers.rank, recipe.accumulate * (workers.rank + 1))
    per_step = recipe.accumulate * workers.count
    return [step * per_step + a for step in range(first, recipe.steps) for a in own]


def _batches(task: Task, numbers: list[int], workers: int) -> Iterator[Any]:
    if not workers:
        return map(task.batch, numbers)
    return iter(
        torch.utils.data.DataLoader(
            _Numbered(task.batch), numbers, num_workers=workers, batch_size=None, prefetch_factor=4
        )
    )


class _Numbered(torch.utils.data.Dataset):
    def __init__(self, make: Callable[[int], Any]):
        self.make = make

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def _save(path: Path, step: int, same: dict, masters: Masters, optim: torch.optim.AdamW) -> None:
    content = io.BytesIO()
    state = {
        "step": step,
        "same": same,
        "parameters": [p.detach() for p in masters.full],
        "optimizer": optim.state_dict(),
    }
    torch.save(state, content)
    write_whole(path, content.getvalue())


def _restore(path: Path, same: dict, masters: Masters, optim: torch.optim.AdamW) -> int:
    """Takes over the state in `path`; returns the steps done."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = [p.shape for p in state["parameters"]]
        step, own = state["step"], state["same"]
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise NanoglimpseError(f"{path} cannot be resumed from: {reason}") from None
    if shapes != [p.shape for p in masters.full]:
        raise NanoglimpseError(f"{path} is of another model; take another folder")
    if own != same:
        raise NanoglimpseError(
            f"{path} is of a run with other options; repeat them, or take another folder"
        )
    with torch.no_grad():
        for master, value in zip(masters.full, state["parameters"], strict=True):
            master.copy_(value)
    optim.load_state_dict(state["optimizer"])
    return step


class Log:
    """Progress for the user and a JSONL for plots."""

    def __init__(self, path: Path, first: int, recipe: Recipe, said: Callable[[str], None] | None):
        self.path, self.recipe, self.said = path, recipe, said
        self.sums: dict[str, float] = {}
        self.count, self.first, self.done = 0, first, first
        self.start = self.since = time.perf_counter()
        if (
            said and path.exists()
        ):  # what a killed run logged beyond its last saved state happens again
            lines = path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= first]
            write_whole(path, "".join(line + "\n" for line in kept).encode())

    def add(self, figures: dict[str, float]) -> None:
        """Figures of a micro-batch."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.count += 1

    def step(self, **figures: float) -> None:
        """A finished step; every `log_every` steps the mean of what was added is written."""
        self.done += 1
        done = self.done
        if done % self.recipe.log_every and done != self.recipe.steps:
            return
        now = time.perf_counter()
        mean = {name: value / self.count for name, value in self.sums.items()}
        speed = self.sums.get("samples", 0.0) / (now - self.since)
        left = (now - self.start) / (done - self.first) * (self.recipe.steps - done)
        self._write({"step": done, **mean, **figures, "samples_per_s": speed})
        shown = "  ".join(
            f"{name} {value:.3g}" for name, value in mean.items() if name != "samples"
        )
        self._say(
            f"step {done}/{self.recipe.steps}  {shown}  {speed:.3g} samples/s  "
            f"{int(left // 60)} min {int(left % 60)} s left"
        )
        self.sums, self.count, self.since = {}, 0, now

    def evaluation(self, done: int, figures: dict[str, float]) -> None:
        """Figures on held-out data."""
        self._write({"step": done, "heldout": figures})
        self._say("held out: " + "  ".join(f"{n} {v:.3f}" for n, v in figures.items()))

    def _write(self, entry: dict) -> None:
        if self.said:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _say(self, line: str) -> None:
        if self.said:
            self.said(line)
