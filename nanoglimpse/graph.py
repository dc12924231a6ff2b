"""Decode steps that a GPU replays: captured once for a batch and a capacity, launched as one.

Eager decoding of a small batch waits for its own launches. A captured step cannot ask the host for
anything, so it counts on the device, in buffers of its own; a prefill's cache is copied there. The
same step also runs as it is, on any device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .cache import Cache, Rows
from .config import TextConfig
from .decoder import Decoder
from .rope import Rope, frequencies

# A longer answer or prompt takes the next multiple, so that few graphs serve all.
CAPACITY = 1024
# Graphs that are kept while nobody uses them; each holds a cache.
IDLE = 2

Step = Callable[[], None]


class Counted:
    """A cache whose rows are counted on the device; verbs of `Cache` that a decode step uses.

    Attributes:
        starts, lengths: int32 [B].
    """

    def __init__(self, cache: Cache):
        self.cache, device = cache, cache.k.device
        self.starts = torch.tensor(cache.starts, dtype=torch.int32, device=device)
        self.lengths = torch.zeros_like(self.starts)

    def extend(self, counts: Sequence[int]) -> Tensor:
        """Takes the next row of each sequence into use; int64 [B], which they are."""
        rows = (self.starts + self.lengths).long()
        self.lengths += 1
        return rows

    def target(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
        """One layer as decoding writes it."""
        return self.cache.target(layer, rows)

    def view(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer as decoding reads it."""
        return *self.cache.view(layer)[:2], self.starts, self.lengths


class Graph:
    """A decode step over buffers of its own.

    Attributes:
        batch: sequences.
        capacity: cache rows of each.
        token_ids, position: int64 [B], what the next step is about.
        logits: [B, vocab] of the last step; the next one writes over them.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: TextConfig,
        batch: int,
        capacity: int,
        capture: Callable[[Step, torch.device], Step],
    ):
        weight = decoder.embed_tokens.weight
        self.decoder, self.batch, self.capacity = decoder, batch, capacity
        self.token_ids, self.position = weight.new_zeros(2, batch, dtype=torch.int64)
        ops, layers = decoder.layers[0].ops, len(decoder.layers)
        room = [capacity] * batch
        self.cache = Cache(config, layers, room, self.position, weight.detach(), ops)
        self.counted = Counted(self.cache)
        self.frequencies = frequencies(config, weight.device)
        self._run = capture(self.step, weight.device)

    def step(self) -> None:
        """One token a sequence; all three axes of an answer's position are equal."""
        rope = Rope.of(self.position[:, None] * self.frequencies)
        self.logits = self.decoder.step(self.token_ids, rope, self.counted)
        self.position += 1

    def begin(self, cache: Cache) -> None:
        """Takes over what a prefill has left."""
        spans = zip(self.cache.starts, cache.starts, cache.lengths, strict=True)
        for own, start, length in spans:
            self.cache.k[:, own : own + length] = cache.k[:, start : start + length]
            self.cache.v[:, own : own + length] = cache.v[:, start : start + length]
        self.counted.lengths.copy_(cache.length)
        self.position.copy_(cache.next_position)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """One token a sequence, int64 [B]: logits [B, vocab] of the next."""
        self.token_ids.copy_(token_ids)
        self._run()
        return self.logits


class Graphs:
    """The graphs of an engine. One is nobody else's while it is lent."""

    def __init__(
        self,
        decoder: Decoder,
        config: TextConfig,
        capture: Callable[[Step, torch.device], Step] | None = None,
    ):
        self.decoder, self.config, self.capture = decoder, config, capture or capture_cuda
        self.idle: list[Graph] = []

    @contextmanager
    def lend(self, cache: Cache, steps: int) -> Iterator[Graph]:
        """A graph that goes on from a prefill's cache, for so many steps."""
        batch, needed = len(cache.lengths), max(cache.lengths) + steps
        fitting = [g for g in self.idle if g.batch == batch and g.capacity >= needed]
        graph = min(fitting, key=lambda g: g.capacity, default=None)
        if graph is None:
            capacity = -(-needed // CAPACITY) * CAPACITY
            graph = Graph(self.decoder, self.config, batch, capacity, self.capture)
        else:
            self.idle.remove(graph)
        graph.begin(cache)
        try:
            yield graph
        finally:
            self.idle = [*self.idle, graph][-IDLE:]


def capture_cuda(step: Step, device: torch.device) -> Step:
    """Records what `step` launches on a GPU; the result launches it again, as one."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # compiles kernels and takes scratch memory, which a capture may not
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay
