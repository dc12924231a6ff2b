"""The objective of GRPO (arXiv 2402.03300, Sec. 4.1) and log-probabilities on a pruned context.

A reply is scored on what generation has seen: all rows of its prompt run the layers before pruning,
the survivors continue at their positions, and in every layer the rows of the reply attend to the
survivors and to themselves. Which rows survive is a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.rope import Rope, rotate_qk
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import LayerKV
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.decoder import run_layers
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import mrope

Aggregate = Literal["sequence", "token", "constant"]


def group_advantages(rewards: Tensor, *, normalise: bool = False) -> Tensor:
    """How much better each sample is than the others of its prompt, [P, G] -> [P, G].

    Args:
        rewards: of G samples of each prompt.
        normalise: divide by the standard deviation of the group + 1e-4, as GRPO does; it weighs
            prompts that are nearly solved or nearly hopeless more than others.

    Raises:
        UsageError: a group has a single sample.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise UsageError(
            f"rewards must be [prompts, samples] with 2 samples or more, got {list(rewards.shape)}"
        )
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if normalise else advantages


def exact_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) over the vocabulary, [..., vocab] twice -> [...]."""
    policy, other = logits.log_softmax(-1), reference.log_softmax(-1)
    return (policy.exp() * (policy - other)).sum(-1)


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    beta: float = 0.04,
    kl: Literal["k3"] | Tensor = "k3",
    aggregate: Aggregate = "sequence",
) -> Tensor:
    """The clipped objective with a KL term, negated: a scalar to be minimised.

    Args:
        log_probs: [N, T], of the tokens of N replies, with gradient.
        old: [N, T], as they were sampled.
        reference: [N, T], without the adapter.
        advantages: [N], or [N, T].
        mask: bool [N, T], the tokens that count.
        clip: the ratio to the old policy counts within 1 ± `clip`.
        beta: weight of the KL term.
        kl: "k3", the estimator exp(r - p) - (r - p) - 1; or the exact divergence of each token,
            [N, T], as from `exact_divergence`.
        aggregate: "sequence" is the mean over replies of the mean over their tokens, "token" the
            mean over all tokens, and "constant" the sum divided by N · T, in which the length of a
            reply has no part.

    Raises:
        UsageError: the shapes differ, or a choice does not exist.
    """
    shape = log_probs.shape
    others = {"old": old, "reference": reference, "mask": mask}
    others |= {"kl": kl} if isinstance(kl, Tensor) else {}
    for name, tensor in others.items():
        if log_probs.ndim != 2 or tensor.shape != shape:
            raise UsageError(
                f"{name} and log_probs must both be [N, T], got {list(tensor.shape)} and "
                f"{list(shape)}"
            )
    if advantages.shape not in (shape, shape[:1]):
        raise UsageError(f"advantages must be [N] or [N, T], got {list(advantages.shape)}")
    if not isinstance(kl, Tensor) and kl != "k3":
        raise UsageError(f"kl must be 'k3' or a tensor [N, T], got {kl!r}")
    # What lies under the mask may be anything, also infinite, and must leave no NaN in a gradient.
    log_probs, old, reference = (
        torch.where(mask, x, torch.zeros_like(x)) for x in (log_probs, old, reference)
    )
    gain = advantages.view(len(advantages), -1)
    ratio = (log_probs - old.detach()).exp()
    terms = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    if beta:
        terms = terms + beta * (kl if isinstance(kl, Tensor) else _k3(log_probs, reference))
    return _aggregated(torch.where(mask, terms, torch.zeros_like(terms)), mask, aggregate)


def _k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An unbiased, non-negative estimate of KL(policy || reference) of each token."""
    difference = reference.detach() - log_probs
    return difference.exp() - difference - 1


def _aggregated(terms: Tensor, mask: Tensor, aggregate: Aggregate) -> Tensor:
    """One number from the terms of all tokens, [N, T], which are 0 outside the mask."""
    if aggregate == "sequence":
        return (terms.sum(1) / mask.sum(1).clamp_min(1)).mean()
    if aggregate == "token":
        return terms.sum() / mask.sum().clamp_min(1)
    if aggregate == "constant":
        return terms.sum() / terms.numel()
    raise UsageError(f"aggregate must be sequence, token or constant, got {aggregate!r}")


@dataclass(frozen=True)
class PrunedContext:
    """What replies to one prompt attend to; n rows of the prompt survive.

    Attributes:
        layer: the number of layers before pruning, K.
        hidden: [n, C], the survivors after these layers.
        keys, values: [n, H, D], theirs in each of these layers.
        positions: int64 [3, n], unchanged.
        next_position: of the first token of a reply.
    """

    layer: int
    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    next_position: int


def pruned_context(
    model: Model, prompt: Prompt, kept: Tensor, *, layer: int, visual: Tensor | None = None
) -> PrunedContext:
    """Runs a prompt through the layers before pruning; replies can share the result.

    Args:
        model: dense, with the operations `shared_prefix.OPS` where gradients are needed.
        prompt: before pruning.
        kept: bool [N], the visual tokens that survive.
        layer: the number of layers before pruning.
        visual: [N, C], output of the vision encoder where it has run.

    Raises:
        UsageError: `kept` or `layer` does not fit.
    """
    count = int(prompt.visual.sum())
    if kept.shape != (count,) or kept.dtype != torch.bool:
        raise UsageError(
            f"kept must be bool [{count}], one for each visual token of the prompt, got "
            f"{kept.dtype} {list(kept.shape)}"
        )
    if not 0 <= layer <= model.depth:
        raise UsageError(f"layer must be in 0 to {model.depth}, got {layer}")
    batch = PackedBatch.pack([prompt], model.config, model.device)
    if visual is None:
        with torch.no_grad():
            visual = model.encode(prompt.patches, prompt.grids).visual
    hidden = model.decoder.embed_tokens(batch.token_ids)
    hidden = hidden.index_copy(0, batch.visual_rows, visual.to(hidden.dtype))
    rope, segments = mrope(batch.positions, model.text), Segments(batch.counts, model.device)
    pairs = _Pairs(model.text.num_key_value_heads)
    hidden, _ = run_layers(model.decoder, hidden, rope, pairs, segments, range(layer))
    survivors, rows = batch.keep(kept.to(model.device))
    keys, values = ([x[rows] for x in part] for part in (pairs.keys, pairs.values))
    place = (survivors.positions, int(batch.next_position))
    return PrunedContext(layer, hidden[rows], keys, values, *place)


def reply_logits(
    model: Model, contexts: Sequence[PrunedContext], replies: Sequence[Tensor]
) -> list[Tensor]:
    """Logits before each token of packed replies, [T, vocab] each.

    Args:
        model: as `pruned_context`.
        contexts: the context of each reply, all pruned after the same layer.
        replies: int64 [T], at least one token each.

    Raises:
        UsageError: a reply is empty.
    """
    if not all(len(ids) for ids in replies):
        raise UsageError("a reply needs at least one token")
    device, decoder, depth = model.device, model.decoder, model.depth
    lengths, counts = [len(ids) for ids in replies], [len(c.hidden) for c in contexts]
    totals = [n + t for n, t in zip(counts, lengths, strict=True)]
    starts = [sum(totals[:i]) for i in range(len(totals))]
    # Where survivors and reply rows lie among the rows of both.
    spans = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
    own = [torch.arange(s + n, s + t) for s, n, t in zip(starts, counts, totals, strict=True)]
    order = torch.cat((*spans, *own)).argsort().to(device)
    reply_rows = torch.cat(own).to(device)
    steps = [c.next_position + torch.arange(t) for c, t in zip(contexts, lengths, strict=True)]
    reply_rope = mrope(torch.cat(steps).to(device).expand(3, -1), model.text)
    places = [torch.arange(n, t) for n, t in zip(counts, totals, strict=True)]
    queries = Queries(Segments(lengths, device), torch.cat(places).to(device))
    segments, layer = Segments(totals, device), contexts[0].layer
    hidden = decoder.embed_tokens(torch.cat(list(replies)).to(device))
    below = _Survivors(contexts, order, model.text.num_key_value_heads)
    layers = range(layer)
    hidden, _ = run_layers(decoder, hidden, reply_rope, below, segments, layers, queries=queries)
    hidden = torch.cat([*[c.hidden for c in contexts], hidden])[order]
    followed = torch.cat(steps).to(device).expand(3, -1)
    positions = torch.cat([*[c.positions for c in contexts], followed], dim=1)
    rope = mrope(positions[:, order], model.text)
    above = _Pairs(model.text.num_key_value_heads)
    hidden, _ = run_layers(decoder, hidden, rope, above, segments, range(layer, depth))
    # The row before a token predicts it; before the first one this is the last survivor.
    return list(decoder.logits(hidden[reply_rows - 1]).split(lengths))


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of tokens int64 [T] under logits [T, vocab]: [T], fp32 or fp64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, ids.to(logits.device)[:, None]).squeeze(1)


def reply_log_probs(
    model: Model,
    prompt: Prompt,
    kept: Tensor,
    reply_ids: Tensor | Sequence[int],
    *,
    from_layer: int,
    layer: int | None = None,
) -> Tensor:
    """Log-probabilities [T], fp32, of a reply on the context that generation used.

    Args:
        model: dense, with the operations `shared_prefix.OPS` where gradients are needed.
        prompt: before pruning.
        kept: bool [N], the visual tokens that survived.
        reply_ids: int64 [T], the token that ends the reply included.
        from_layer: the first layer with a gradient; with that of pruning, the prompt runs up to
            there without one, and with 0 all layers have it.
        layer: the number of layers before pruning; None for that of the glimpse weights, or
            ⌈2L/3⌉ if there are none.

    Raises:
        UsageError: `kept`, `reply_ids` or a layer does not fit.
    """
    layer = pruning_layer(model) if layer is None else layer
    if from_layer not in (0, layer):
        raise UsageError(f"from_layer must be 0 or the layer of pruning, {layer}, got {from_layer}")
    ids = torch.as_tensor(reply_ids, dtype=torch.int64)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not from_layer):
        context = pruned_context(model, prompt, kept, layer=layer)
    (logits,) = reply_logits(model, [context], [ids])
    return token_log_probs(logits, ids)


def pruning_layer(model: Model) -> int:
    """The number of layers before pruning: of the glimpse weights, or ⌈2L/3⌉."""
    return two_thirds(model.depth) if model.glimpse is None else model.glimpse.config.layers


class _Pairs:
    """Keeps keys and values of all layers that run."""

    def __init__(self, heads: int):
        self.heads = heads
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def layer(self, layer: int) -> LayerKV:
        """As `kvcache.cache.Reserved.layer`; a block only appends to it."""
        return cast(LayerKV, self)

    def append(self, qkv: Tensor, rope: Rope, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotate_qk(qkv, rope, self.heads, ops.rotate)
        self.keys.append(k)
        self.values.append(v)
        return q, k, v


class _Survivors(NamedTuple):
    """Returns the survivors' keys and values of a layer together with those of the replies."""

    contexts: Sequence[PrunedContext]
    order: Tensor
    heads: int
    at: int = 0

    def layer(self, layer: int) -> LayerKV:
        """As `kvcache.cache.Reserved.layer`; a block only appends to it."""
        return cast(LayerKV, self._replace(at=layer))

    def append(self, qkv: Tensor, rope: Rope, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotate_qk(qkv, rope, self.heads, ops.rotate)
        keys = torch.cat([*[c.keys[self.at] for c in self.contexts], k])[self.order]
        values = torch.cat([*[c.values[self.at] for c in self.contexts], v])[self.order]
        return q, keys, values
