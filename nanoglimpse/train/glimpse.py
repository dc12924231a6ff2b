"""Trains GlimpsePrune for any checkpoint: glimpse token and predictor, with a frozen base model.

This follows Sec. 4 of the paper (Fig. 4a) and the official code, which adds three things: the
embeddings of the glimpse pass a projection, a norm and a dropout; all layers run over all visual
tokens; and the answer attends to the glimpse row, which predicts its first token. The loss is
dice + 0.1 · BCE of the importance against the visual tokens under the evidence, plus the cross
entropy of the answer (Sec. 4, Eq. of L).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglimpse.config import GlimpseConfig, TextConfig
from nanoglimpse.data.sources import ExampleSource
from nanoglimpse.engine import Engine
from nanoglimpse.evaluate.run import score_examples
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.model.decoder import Probe, run_block, run_layers
from nanoglimpse.model.glimpse import Glimpse, Predictor
from nanoglimpse.model.layers import Module
from nanoglimpse.model.rope import mrope
from nanoglimpse.train.collate import TrainBatch, collate
from nanoglimpse.train.pretrain import answer_loss, checkpoint_tensors
from nanoglimpse.train.shared_prefix import KeptKeys, recomputed, visual_logits
from nanoglimpse.weights.glimpse import save_glimpse


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses; by default those of the paper (Sec. 4)."""

    dice: float = 1.0
    bce: float = 0.1
    lm: float = 1.0


class GlimpseToken(Module):
    """The vectors that are added to the glimpse row before each layer: RMSNorm(W·E_l + b).

    Args:
        text: the configuration of the checkpoint.
        layers: the layers with a vector; the vectors of the others are 0.
        generator: initialises the parameters.
        initial: [C], the embedding of a text token with which the first vector starts, instead of
            the official random one.
    """

    def __init__(
        self,
        text: TextConfig,
        layers: Sequence[int],
        generator: torch.Generator,
        initial: Tensor | None,
    ):
        super().__init__()
        size = text.hidden_size
        embeddings = 0.02 * torch.randn(len(layers), 1, size, generator=generator)
        bound = (3 / size) ** 0.5  # Xavier
        weight = torch.empty(size, size).uniform_(-bound, bound, generator=generator)
        scale = torch.ones(size)
        if initial is not None:
            weight, scale = torch.eye(size), scale * initial.pow(2).mean().sqrt()
            embeddings[layers.index(0), 0] = initial
        self.embeddings, self.weight = nn.Parameter(embeddings), nn.Parameter(weight)
        self.bias, self.scale = nn.Parameter(torch.zeros(size)), nn.Parameter(scale)
        self.eps, self.depth, self.layers = text.rms_norm_eps, text.num_hidden_layers, layers

    def forward(self) -> Tensor:
        """Returns the vectors of all layers, [L, C]."""
        mapped = F.linear(self.embeddings[:, 0], self.weight, self.bias)
        vectors = F.rms_norm(mapped, self.scale.shape, self.scale, self.eps)
        zeros = vectors.new_zeros(self.depth, len(self.scale))
        return zeros.index_copy(0, torch.tensor(self.layers, device=vectors.device), vectors)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their published names."""
        names = ("learnable_embeddings", "le_proj.weight", "le_proj.bias", "le_norm.weight")
        values = (self.embeddings, self.weight, self.bias, self.scale)
        return {name: t.detach().cpu() for name, t in zip(names, values, strict=True)}


@dataclass(frozen=True)
class GlimpseBatch:
    """A micro-batch with its number, which seeds the dropout."""

    rows: TrainBatch
    micro: int


class GlimpseTask:
    """Trains glimpse token and predictor of a frozen engine; see `loop.TrainTask`.

    Args:
        engine: the base model.
        config: the configuration of the glimpse weights.
        losses: the weights of the losses.
        source: the training data.
        dropout: dropout of the glimpse vectors.
        seed: seed of parameters and dropout.
        checkpointing: whether to recompute activations in the backward pass.
        initial_token: id of the token with whose embedding the glimpse starts.
        token_rate: learning rate of the glimpse token, as a share of the common rate.

    Attributes:
        token, predictor: the trained modules, in fp32.
    """

    def __init__(
        self,
        engine: Engine,
        config: GlimpseConfig,
        losses: LossWeights,
        source: ExampleSource,
        *,
        dropout: float,
        seed: int,
        checkpointing: bool,
        initial_token: int | None = None,
        token_rate: float = 1.0,
    ):
        self.engine, self.config, self.losses, self.source = engine, config, losses, source
        self.dropout, self.seed, self.checkpointing = dropout, seed, checkpointing
        text = engine.config.text_config
        generator = torch.Generator().manual_seed(seed)
        embedding = engine.decoder.embed_tokens.weight
        initial = None if initial_token is None else embedding[initial_token].detach().float().cpu()
        self.token = GlimpseToken(text, config.le_layers, generator, initial)
        self.predictor = Predictor(engine.config, config, TORCH)
        _initialise(self.predictor, generator)
        self.module: nn.Module = nn.ModuleDict({"token": self.token, "predictor": self.predictor})
        self.module.to(engine.device)
        self.rates = {"token": token_rate}
        if not losses.dice and not losses.bce:
            self.predictor.requires_grad_(False)

    def batch(self, micro: int) -> GlimpseBatch:
        """The micro-batch of this number, from the source."""
        examples = self.source.examples(micro)
        return GlimpseBatch(collate(examples, self.engine.processor, probes=True), micro)

    def loss(self, batch: GlimpseBatch) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of dice, BCE and cross entropy."""
        rows = batch.rows.to(self.engine.device, self.engine.dtype)
        with torch.no_grad():
            tapped = self.config.selected_visual_layers
            visual, taps = self.engine.vision(rows.patches, rows.grids, tapped)
        torch.manual_seed(self.seed * 1_000_003 + batch.micro)
        vectors = F.dropout(self.token(), self.dropout).to(visual.dtype)
        glimpse_logits, hidden = self._layers(rows, visual, vectors)
        figures: dict[str, float] = {"samples": len(rows.probe_rows)}
        total = torch.zeros((), device=self.engine.device)
        if self.losses.dice or self.losses.bce:
            importance = self._importance(rows, glimpse_logits, taps)
            dice, bce, found = location_loss(importance, rows.evidence, rows.located)
            total = total + self.losses.dice * dice + self.losses.bce * bce
            figures |= {"dice": float(dice.detach()), "bce": float(bce.detach()), **found}
        if self.losses.lm:
            lm, exact = answer_loss(self.engine.decoder, hidden, rows)
            total = total + self.losses.lm * lm
            figures |= {"lm": float(lm.detach()), "exact": float(exact.float().mean())}
        return total, figures

    def _layers(self, rows: TrainBatch, visual: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Raw glimpse logits [B · n, N / B, HQ] and the hidden state of the last layer that ran."""
        decoder, text = self.engine.decoder, self.engine.config.text_config
        with torch.no_grad():
            hidden = decoder.embed_tokens(rows.token_ids).index_copy(0, rows.visual_rows, visual)
            hidden[rows.probe_rows] = 0
        rope, probes = mrope(rows.positions, text), rows.probe_rows
        read = self.config.selected_layers[0]
        keys = KeptKeys(read, text.num_key_value_heads)
        depth = text.num_hidden_layers if self.losses.lm else read + 1
        saves = self.checkpointing and torch.is_grad_enabled()
        hidden, inputs = run_layers(
            decoder,
            hidden,
            rope,
            keys,
            rows.layout,
            range(depth),
            probe=Probe(vectors, probes),
            capture=(read,),
            call=recomputed if saves else run_block,
        )
        q = decoder.layers[read].query(inputs[read][probes], rope[probes])
        # Visual tokens do not depend on the glimpse, so that their keys have no gradient.
        k = keys.k[rows.visual_rows].detach()
        return visual_logits(q, k, rows.layout.pictures), hidden

    def _importance(self, rows: TrainBatch, glimpse_logits: Tensor, taps: Tensor) -> Tensor:
        """Importance [B · n, N / B]; the vision features of a picture are repeated per question."""
        questions, pictures = rows.layout.branches, rows.layout.pictures
        each = taps.unflatten(1, (pictures, -1)).repeat_interleave(questions, dim=1).flatten(1, 2)
        grids = [grid for grid in rows.grids for _ in range(questions)]
        count, tokens = glimpse_logits.shape[:2]
        logits = glimpse_logits.flatten(0, 1).float()
        conditions = self.predictor.condition(each.float())
        return self.predictor(logits, conditions, grids, [tokens] * count).view(count, tokens)

    def glimpse(self) -> Glimpse:
        """The current weights as a module of the engine."""
        glimpse = Glimpse(self.engine.config, self.config, self.engine.model.ops)
        glimpse.predictor.load_state_dict(self.predictor.state_dict())
        glimpse.vectors = nn.Parameter(self.token().detach())
        return glimpse.requires_grad_(False).to(self.engine.device, self.engine.dtype)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Retention, box recall and accuracy of pruned answers on held-out examples."""
        model = replace(self.engine.model, glimpse=self.glimpse())
        return score_examples(Engine(model, self.engine.processor), self.source.heldout())

    def save(self, folder: Path) -> None:
        """Writes the weights to a folder `glimpse`, in both layouts.

        Raises:
            NanoglimpseError: a file cannot be written.
        """
        module = nn.ModuleDict({"predictor": self.predictor})
        tensors = checkpoint_tensors(module, torch.float32)
        last = max(len(self.config.selected_visual_layers) - 1, 0)
        old, new = "attn_fuser.attn_out_proj.", f"attn_fuser.attn_out_projs.{last}."
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        base = json.loads((self.engine.processor.folder / "config.json").read_text())
        content = glimpse_json(base, self.config, self.dropout)
        save_glimpse(folder / "glimpse", tensors | self.token.tensors(), content)


def _initialise(predictor: Predictor, generator: torch.Generator) -> None:
    """Xavier weights and zero biases; a predictor without blocks starts as the mean over heads."""
    for name, parameter in predictor.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.ndim > 1:
            bound = (6 / max(sum(parameter.shape), 1)) ** 0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
    if not len(predictor.layers):
        predictor.attn_in_proj.weight.data.fill_(1 / predictor.attn_in_proj.weight.shape[1])
        predictor.attn_out_proj.weight.data.fill_(1 / predictor.attn_out_proj.weight.shape[1])


def location_loss(
    importance: Tensor, evidence: Tensor, located: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Dice and BCE, each a mean over the questions with evidence (official train_qwen_gp.py).

    Args:
        importance: [Q, N], logits.
        evidence: bool [Q, N].
        located: bool [Q]; a question like "is there … ?" has no evidence if the answer is no, and
            then does not count.

    Returns:
        Both losses, and the recall and the retention at a threshold of one half.
    """
    counted = located.float() / located.sum().clamp_min(1)
    p, g = importance.sigmoid(), evidence.float()
    dice = 1 - (2 * (p * g).sum(1) + 1e-6) / (p.sum(1) + g.sum(1) + 1e-6)
    bce = F.binary_cross_entropy_with_logits(importance, g, reduction="none").mean(1)
    kept = importance > 0
    recall = (kept & evidence).sum(1) / evidence.sum(1).clamp_min(1)
    figures = {
        "recall": float(recall.detach() @ counted),
        "kept": float(kept.float().mean(1) @ counted),
    }
    return dice @ counted, bce @ counted, figures


def glimpse_json(base: dict, config: GlimpseConfig, dropout: float) -> dict:
    """The content of config.json for glimpse weights in the published layout."""
    return {
        **base,
        "architectures": ["Qwen2_5_VL_GP_ForConditionalGeneration"],
        "model_type": "qwen2_5_vl_gp",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
        "le_dropout_prob": dropout,
        "le_length": 1,
        "le_norm_type": "rmsnorm",
        "attn_fuse_type": "AttnFuserV1",
        "attn_fuse_hidden_act": "silu",
        "ori_attn_supervision": False,
        "use_ref_masks": False,
        "use_zero_masks": False,
    }
