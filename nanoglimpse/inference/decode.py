"""The token loop: from a prefill's logits and cache to the tokens of its answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanoglimpse.inference.cuda_graph import DecodeGraphPool
from nanoglimpse.inference.outputs import Prefill
from nanoglimpse.inference.sampling import Sampler, Sampling, check_finite
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.layered import LayeredKVCache
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import mrope

# Decode steps queued on a GPU before the host checks for EOS.
LOOKAHEAD = 7


def lookahead(device: torch.device) -> int:
    """Decode steps to queue ahead if tokens are not shown one by one; 0 on a CPU."""
    return LOOKAHEAD if device.type == "cuda" else 0


def decode_many(
    model: Model,
    graphs: DecodeGraphPool | None,
    prefill: Prefill,
    max_new_tokens: int,
    ignore_eos: bool,
    sampling: Sampling | None,
    ahead: int,
) -> Iterator[list[int | None]]:
    """Answers all prompts of a prefill in step; see `Engine.decode_many`."""
    prompts = prefill.batch.token_ids.split(prefill.batch.counts)
    sampler = Sampler(sampling or Sampling(), prompts, model.text.vocab_size, model.device)
    model.check_context(prefill.batch.counts, max_new_tokens)
    cache = prefill.rewind(max_new_tokens)
    running = [True] * len(prompts)

    def shown(queued: list[Tensor]) -> Iterator[list[int | None]]:
        nonlocal running
        for chosen in torch.stack(queued).tolist():
            pairs = list(zip(chosen, running, strict=True))
            check_finite((token for token, runs in pairs if runs), model.dtype)
            yield [token if runs else None for token, runs in pairs]
            ends = () if ignore_eos else model.eos_token_id
            running = [runs and token not in ends for token, runs in pairs]
            if not any(running):
                return

    tokens = sampler(prefill.logits.view(len(prompts), -1))
    # Before the steps begin: a GPU may have to capture them, and compile kernels for it.
    yield from shown([tokens])
    if max_new_tokens == 1 or not any(running):
        return
    queued: list[Tensor] = []
    with decode_steps(model, graphs, cache, max_new_tokens) as step:
        for count in range(2, max_new_tokens + 1):
            tokens = sampler(step(tokens.clamp(min=0)))
            queued.append(tokens)
            if len(queued) > ahead or count == max_new_tokens:
                yield from shown(queued)
                if not any(running):
                    return
                queued.clear()


@contextmanager
def decode_steps(
    model: Model, graphs: DecodeGraphPool | None, cache: KVCache | LayeredKVCache, steps: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from token ids [B] to the logits [B, vocab] after them, for `steps` calls."""
    # A `LayeredKVCache` only serves comparisons, and is not copied to a graph.
    if graphs is not None and isinstance(cache, KVCache):
        with graphs.acquire(cache, steps) as graph:
            yield graph
        return
    rope = decode_rope(model, cache.next_position, steps)
    counted = iter(range(steps))

    def step(token_ids: Tensor) -> Tensor:
        logits = model.decoder.step(token_ids, rope[next(counted)], cache)
        cache.next_position = cache.next_position + 1
        return logits

    yield step


def decode_rope(model: Model, next_position: Tensor, steps: int) -> Rope:
    """Tables [steps, B, 1, D]; the tokens of an answer advance on all three axes together."""
    positions = next_position + torch.arange(steps, device=model.device)[:, None]
    rope = mrope(positions.flatten().expand(3, -1), model.text)
    shape = (steps, len(next_position), 1, -1)
    return Rope(rope.cos.view(shape), rope.sin.view(shape))
