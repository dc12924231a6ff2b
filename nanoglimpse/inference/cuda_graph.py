"""Captured decode steps: recorded once for a batch size and a capacity, launched as one graph.

The speed of eager decoding is limited by kernel launches if the batch is small. A captured step
cannot send anything to the host, so that it counts on the device, in its own buffers, to which the
cache of a prefill is copied. The same step also runs without capture, on any device.
"""

from collections.abc import Callable, Collection, Iterator
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
        cache: the memory that it decodes in.
        batch: the largest number of sequences, B.
        capture: records the step.

    Attributes:
        token_ids, position: int64 [B], input of the next step.
        logits: [B, vocab], output of the last step; the next step overwrites it.
    """

    def __init__(self, model: Model, cache: KVCache, batch: int, capture: Capture):
        weight = model.decoder.embed_tokens.weight
        self.decoder, self.batch, self.capacity = model.decoder, batch, min(cache.capacity)
        self.token_ids, self.position = weight.new_zeros(2, batch, dtype=torch.int64)
        self.logits = weight.new_zeros(batch, model.text.vocab_size)
        self.cache = DeviceKVCache(cache, batch)
        self.frequencies = frequencies(model.text, weight.device)
        self._run = capture(self.step, weight.device)

    def step(self) -> None:
        """Decodes one token per sequence; positions of an answer are equal on all three axes."""
        rope = Rope.of(self.position[:, None] * self.frequencies)
        self.logits = self.decoder.step(self.token_ids, rope, self.cache)
        self.position += 1

    def begin(self, cache: KVCache) -> None:
        """Continues a cache; it is copied, unless it is the memory that this decodes in."""
        self.cache.load(cache)
        self.position[: len(cache.lengths)].copy_(cache.next_position)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits [B, vocab] after one more token of each sequence in use, int64 [B]."""
        self.token_ids[: len(token_ids)].copy_(token_ids)
        self._run()
        return self.logits[: len(token_ids)]


class DecodeGraphPool:
    """Graphs of one model; only one caller uses a graph at a time."""

    def __init__(self, model: Model, capture: Capture | None = None):
        self.model, self.capture = model, capture or capture_cuda
        self.idle: list[DecodeGraph] = []
        self.limit = IDLE

    def record(self, batch: int, rows: int) -> DecodeGraph:
        """A graph for `batch` sequences of up to `rows` rows, with a cache of its own."""
        like, text = self.model.decoder.embed_tokens.weight.detach(), self.model.text
        capacity = [-(-rows // CAPACITY) * CAPACITY] * batch
        position = like.new_zeros(batch, dtype=torch.int64)
        cache = KVCache(text, range(self.model.depth), capacity, position, like, self.model.ops)
        return DecodeGraph(self.model, cache, batch, self.capture)

    @torch.inference_mode()
    def prepare(self, batches: Collection[int], rows: int) -> None:
        """Captures what answers with so many rows, and so many of them at once, will replay."""
        self.idle = [self.record(batch, rows) for batch in batches]
        self.limit = max(IDLE, len(batches))

    @contextmanager
    def acquire(self, cache: KVCache, steps: int) -> Iterator[DecodeGraph]:
        """A graph that continues the cache of a prefill for `steps` steps."""
        batch, needed = len(cache.lengths), max(cache.lengths) + steps
        fitting = [g for g in self.idle if g.batch == batch and g.capacity >= needed]
        graph = min(fitting, key=lambda g: g.capacity, default=None)
        if graph is None:
            graph = self.record(batch, needed)
        else:
            self.idle.remove(graph)
        graph.begin(cache)
        try:
            yield graph
        finally:
            self.idle = [*self.idle, graph][-self.limit :]


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
