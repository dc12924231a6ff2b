"""Captured decode steps: recorded once for a batch size and a capacity, launched as one graph.

The speed of eager decoding is limited by kernel launches if the batch is small. A captured step
cannot send anything to the host, so that it counts on the device, in its own buffers, to which the
cache of a prefill is copied. The same step also runs without capture, on any device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.device import DeviceKVCache
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import frequencies

# Capacities are rounded up to a multiple of this, so that a few graphs fit all lengths.
CAPACITY = 1024
# Maximum number of idle graphs, each with its cache.
IDLE = 2

Step = Callable[[], None]
Capture = Callable[[Step, torch.device], Step]


class DecodeGraph:
    """A decode step with its own buffers.

    Args:
        model: the model.
        batch: number of sequences.
        capacity: cache rows of each sequence.
        capture: records the step.

    Attributes:
        token_ids, position: int64 [B], input of the next step.
        logits: [B, vocab], output of the last step; the next step overwrites it.
    """

    def __init__(self, model: Model, batch: int, capacity: int, capture: Capture):
        weight = model.decoder.embed_tokens.weight
        self.decoder, self.batch, self.capacity = model.decoder, batch, capacity
        self.token_ids, self.position = weight.new_zeros(2, batch, dtype=torch.int64)
        self.logits = weight.new_zeros(batch, model.text.vocab_size)
        room, layers = [capacity] * batch, range(model.depth)
        cache = KVCache(model.text, layers, room, self.position, weight.detach(), model.ops)
        self.cache = DeviceKVCache(cache)
        self.frequencies = frequencies(model.text, weight.device)
        self._run = capture(self.step, weight.device)

    def step(self) -> None:
        """Decodes one token per sequence; positions of an answer are equal on all three axes."""
        rope = Rope.of(self.position[:, None] * self.frequencies)
        self.logits = self.decoder.step(self.token_ids, rope, self.cache)
        self.position += 1

    def begin(self, cache: KVCache) -> None:
        """Copies the cache of a prefill, to continue it."""
        self.cache.load(cache)
        self.position.copy_(cache.next_position)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits [B, vocab] after one more token per sequence, int64 [B]."""
        self.token_ids.copy_(token_ids)
        self._run()
        return self.logits


class DecodeGraphPool:
    """Graphs of one model; only one caller uses a graph at a time."""

    def __init__(self, model: Model, capture: Capture | None = None):
        self.model, self.capture = model, capture or capture_cuda
        self.idle: list[DecodeGraph] = []

    @contextmanager
    def acquire(self, cache: KVCache, steps: int) -> Iterator[DecodeGraph]:
        """A graph that continues the cache of a prefill for `steps` steps."""
        batch, needed = len(cache.lengths), max(cache.lengths) + steps
        fitting = [g for g in self.idle if g.batch == batch and g.capacity >= needed]
        graph = min(fitting, key=lambda g: g.capacity, default=None)
        if graph is None:
            capacity = -(-needed // CAPACITY) * CAPACITY
            graph = DecodeGraph(self.model, batch, capacity, self.capture)
        else:
            self.idle.remove(graph)
        graph.begin(cache)
        try:
            yield graph
        finally:
            self.idle = [*self.idle, graph][-IDLE:]


def capture_cuda(step: Step, device: torch.device) -> Step:
    """Records the kernels that `step` launches; the result launches them again as one graph."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()  # compiles kernels and allocates memory, which is not allowed in a capture
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Without a stream of its own torch captures on the one that it made first, on any device.
        with torch.cuda.graph(graph, stream=aside):
            step()
    return graph.replay
