"""GRPO on a pruned context: what is scored is what was sampled, and the objective is exact."""

import json

import pytest
import torch

from nanoglimpse import Sampling, UsageError, load
from nanoglimpse.inference.sampling import Sampler
from nanoglimpse.train import policy_loss, reply_log_probs
from nanoglimpse.train.policy import (
    exact_divergence,
    group_advantages,
    pruned_context,
    reply_logits,
    token_log_probs,
)
from nanoglimpse.train.pretrain import write_folder
from nanoglimpse.train.shared_prefix import OPS
from nanoglimpse.world import render
from tests.helpers.tiny import TEXT, TOP, VISION, write_checkpoint

LAYER = 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    write_folder(folder, {**TOP, **TEXT, "vision_config": VISION}, 0, pictures=20)
    tokenizer = (folder / "tokenizer.json").read_text()
    write_checkpoint(folder, json.loads((folder / "config.json").read_text()))
    (folder / "tokenizer.json").write_text(tokenizer)
    return load(folder, device="cpu", dtype="float32", backend=OPS)


def asked(engine, *seeds):
    """Prompts about pictures of the world, with a mask each that keeps a third of the tokens."""
    scenes = [render(0, seed, domain="scene") for seed in seeds]
    prompts = [
        engine.prompt(scene.image, scene.questions[0].text + " please" * number)
        for number, scene in enumerate(scenes)
    ]
    masks = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(number)
        masks.append(torch.rand(int(prompt.visual.sum()), generator=generator) < 1 / (3 + number))
    return prompts, masks


def sampled(engine, monkeypatch, prompts, masks, tokens=9, **options):
    """Replies [B][T] drawn by the engine, and the log-probabilities they were drawn with."""
    drawn, draw = [], Sampler._draw

    def recorded(self, logits):
        chosen = draw(self, logits)
        drawn.append(logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0].clone())
        return chosen

    monkeypatch.setattr(Sampler, "_draw", recorded)
    prefill = engine.prefill_many(prompts, "oracle", evidence=masks)
    assert torch.equal(prefill.kept, torch.cat(masks))
    sampling = Sampling(temperature=1.0, **options)
    steps = list(engine.decode_many(prefill, tokens, True, sampling))
    replies = [torch.tensor(reply) for reply in zip(*steps, strict=True)]
    return replies, torch.stack(drawn, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("from_layer", [0, LAYER])
def test_a_reply_is_scored_with_what_it_was_sampled_with(engine, monkeypatch, from_layer):
    prompts, masks = asked(engine, 1, 2, 3)
    replies, expected = sampled(engine, monkeypatch, prompts, masks, seed=5)
    for prompt, kept, reply, wanted in zip(prompts, masks, replies, expected, strict=True):
        found = reply_log_probs(engine.model, prompt, kept, reply, from_layer=from_layer)
        assert found.dtype == torch.float32
        assert float((found.detach() - wanted).exp().sub(1).abs().max()) <= 2e-5


@pytest.mark.slow
def test_a_ragged_batch_is_each_reply_alone(engine):
    prompts, masks = asked(engine, 1, 2)
    replies = [torch.arange(5, 5 + length) for length in (1, 7, 4)]
    with torch.no_grad():
        first, second = (
            pruned_context(engine.model, prompt, kept, layer=LAYER)
            for prompt, kept in zip(prompts, masks, strict=True)
        )
        contexts = [first, second, first]
        together = reply_logits(engine.model, contexts, replies)
        for context, reply, logits in zip(contexts, replies, together, strict=True):
            (alone,) = reply_logits(engine.model, [context], [reply])
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dropped_tokens_are_read_below_the_layer_of_pruning_only(engine):
    """Their pixels matter; their keys and values, which leave the cache, do not."""
    (prompt,), (kept,) = asked(engine, 4)
    reply = torch.arange(5, 11)
    with torch.no_grad():
        visual = engine.model.encode(prompt.patches, prompt.grids).visual.clone()
        changed = torch.where(kept[:, None], visual, visual.flip(0))
        scores = []
        for layer in (LAYER, 0):
            for rows in (visual, changed):
                context = pruned_context(engine.model, prompt, kept, layer=layer, visual=rows)
                (logits,) = reply_logits(engine.model, [context], [reply])
                scores.append(token_log_probs(logits, reply))
    assert float((scores[0] - scores[1]).abs().max()) > 1e-4
    assert torch.equal(scores[2], scores[3])


@pytest.mark.slow
def test_layers_before_pruning_have_a_gradient_with_layer_0_only(engine):
    (prompt,), (kept,) = asked(engine, 4)
    parameters = [engine.decoder.layers[at].mlp.down.weight for at in (0, LAYER)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for from_layer, where in ((LAYER, "reply"), (0, "prompt")):
            score = reply_log_probs(engine.model, prompt, kept, [5], from_layer=from_layer)
            below, above = torch.autograd.grad(score.sum(), parameters, allow_unused=True)
            assert above.abs().max() > 0
            # A reply of one token is predicted by the prompt's last row alone.
            assert (below is not None and bool(below.any())) == (where == "prompt")
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@pytest.mark.slow
def test_scoring_refuses_what_does_not_fit(engine):
    (prompt,), (kept,) = asked(engine, 1)
    for arguments in ((kept[1:], [5], LAYER), (kept, [], LAYER), (kept, [5], 2)):
        mask, reply, from_layer = arguments
        with pytest.raises(UsageError):
            reply_log_probs(engine.model, prompt, mask, reply, from_layer=from_layer)


def cases(replies=4, tokens=5):
    """Log-probabilities of three policies, advantages and a mask of unequal lengths, in fp64."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, replies, tokens)
    new, old, reference = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) - 1
    advantages = torch.randn(replies, generator=generator, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.tensor([5, 1, 3, 4])[:, None]
    return new.requires_grad_(), old, reference, advantages, mask


def by_loops(new, old, reference, advantages, mask, clip, beta, aggregate):
    """The objective token by token."""
    rows = []
    for i in range(len(new)):
        row = []
        for t in range(new.shape[1]):
            if not mask[i, t]:
                continue
            ratio = (new[i, t] - old[i, t]).exp()
            limited = min(max(ratio, 1 - clip), 1 + clip)
            gain = min(ratio * advantages[i], limited * advantages[i])
            apart = reference[i, t] - new[i, t]
            row.append(-gain + beta * (apart.exp() - apart - 1))
        rows.append(row)
    if aggregate == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    total = sum(sum(row) for row in rows)
    return total / (sum(map(len, rows)) if aggregate == "token" else new.numel())


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize(("clip", "beta"), [(0.2, 0.04), (0.05, 0.0)])
def test_the_loss_and_its_gradient_are_those_of_plain_loops(aggregate, clip, beta):
    new, *rest = cases()
    options = {"clip": clip, "beta": beta, "aggregate": aggregate}
    found, wanted = policy_loss(new, *rest, **options), by_loops(new, *rest, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_what_the_mask_hides_changes_nothing():
    new, old, reference, advantages, mask = cases()
    loss = policy_loss(new, old, reference, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, new)
    assert not gradient[~mask].any()
    filled = [x.detach().masked_fill(~mask, -torch.inf) for x in (new, old, reference)]
    filled[0].requires_grad_()
    again = policy_loss(*filled, advantages, mask)
    assert torch.equal(again, loss)
    assert torch.equal(torch.autograd.grad(again, filled[0])[0], gradient)


def test_the_first_step_has_no_divergence_and_no_loss():
    """The policy is then the reference: the loss is minus the mean advantage, which is zero."""
    new, *_, mask = cases()
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten().double()
    same = new.detach()
    for aggregate in ("sequence", "constant"):
        loss = policy_loss(new, same, same, torch.zeros(4).double(), mask, aggregate=aggregate)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, new)[0].any()
    loss = policy_loss(new, same, same, advantages, mask)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, new)[0][mask].all()


def test_an_exact_divergence_takes_the_place_of_the_estimate():
    new, old, reference, advantages, mask = cases()
    logits, other = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    exact = exact_divergence(logits, other)
    wanted = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (logits, other))
    )
    torch.testing.assert_close(exact, wanted)
    assert not exact_divergence(logits, logits).any()
    plain = policy_loss(new, old, reference, advantages, mask, beta=0)
    loss = policy_loss(new, old, reference, advantages, mask, beta=0.5, kl=exact)
    added = torch.where(mask, exact, 0.0).sum(1) / mask.sum(1)
    torch.testing.assert_close(loss, plain + 0.5 * added.mean())


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    for normalise in (False, True):
        found = group_advantages(rewards, normalise=normalise)
        torch.testing.assert_close(found, group_advantages(rewards + 3, normalise=normalise))
        assert not found[1].any()
        order = torch.tensor([2, 0, 1])
        moved = group_advantages(rewards[:, order], normalise=normalise)
        torch.testing.assert_close(moved, found[:, order])
    torch.testing.assert_close(
        group_advantages(rewards * 5, normalise=True)[0],
        group_advantages(rewards, normalise=True)[0],
        rtol=1e-3,
        atol=0.0,
    )
    alone = group_advantages(rewards[:1], normalise=True)
    torch.testing.assert_close(group_advantages(rewards, normalise=True)[:1], alone)
    with pytest.raises(UsageError, match="2 samples or more"):
        group_advantages(torch.ones(4, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"aggregate": "mean"},
        {"kl": "k1"},
        {"kl": torch.zeros(4, 4)},
        {"old": torch.zeros(4)},
        {"advantages": torch.zeros(5)},
        {"mask": torch.ones(4, 1, dtype=torch.bool)},
    ],
    ids=str,
)
def test_the_loss_refuses_what_does_not_fit(change):
    names = ("log_probs", "old", "reference", "advantages", "mask")
    with pytest.raises(UsageError):
        policy_loss(**dict(zip(names, cases(), strict=True)) | change)
