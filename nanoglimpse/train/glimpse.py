"""GlimpsePrune for any checkpoint: the glimpse token and the predictor, the base model frozen.

Paper Sec. 4 (Fig. 4a), with what the official code does beyond it: the embeddings of the glimpse
pass a projection, a norm and a dropout; all layers run over all visual tokens; and the answer sees
the glimpse row, which predicts its first token. Loss: dice + 0.1 · BCE of the importance against
the visual tokens under the evidence, and the cross entropy of the answer (Sec. 4, Eq. of L).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GlimpseConfig, TextConfig
from ..engine import Engine
from ..evaluate.answers import figures
from ..glimpse import Glimpse, Predictor
from ..kernels.ops import TORCH
from ..layers import Module
from ..rope import mrope
from ..weights.glimpse import save_glimpse
from .base import read_answers
from .branches import Keys, run_layer, visual_logits
from .data import Source
from .examples import Batch, collate
from .export import checkpoint_tensors


@dataclass(frozen=True)
class Losses:
    """Weights of the loss terms (paper Sec. 4: dice to BCE 10 : 1, place to language 1 : 1)."""

    dice: float = 1.0
    bce: float = 0.1
    lm: float = 1.0


class GlimpseToken(Module):
    """The vectors that the glimpse row gets before each layer: RMSNorm(W·E_l + b).

    Args:
        text: of the checkpoint.
        layers: that get one; the others get zeros.
        begin: [C], the embedding of a text token that the first vector equals at the beginning,
            instead of the official random one.
    """

    def __init__(
        self,
        text: TextConfig,
        layers: Sequence[int],
        generator: torch.Generator,
        begin: Tensor | None,
    ):
        super().__init__()
        size = text.hidden_size
        embeddings = 0.02 * torch.randn(len(layers), 1, size, generator=generator)
        bound = (3 / size) ** 0.5  # Xavier
        weight = torch.empty(size, size).uniform_(-bound, bound, generator=generator)
        scale = torch.ones(size)
        if begin is not None:
            weight, scale = torch.eye(size), scale * begin.pow(2).mean().sqrt()
            embeddings[layers.index(0), 0] = begin
        self.embeddings, self.weight = nn.Parameter(embeddings), nn.Parameter(weight)
        self.bias, self.scale = nn.Parameter(torch.zeros(size)), nn.Parameter(scale)
        self.eps, self.depth, self.layers = text.rms_norm_eps, text.num_hidden_layers, layers

    def forward(self) -> Tensor:
        """[L, C]"""
        mapped = F.linear(self.embeddings[:, 0], self.weight, self.bias)
        vectors = F.rms_norm(mapped, self.scale.shape, self.scale, self.eps)
        everywhere = vectors.new_zeros(self.depth, len(self.scale))
        return everywhere.index_copy(0, torch.tensor(self.layers, device=vectors.device), vectors)

    def tensors(self) -> dict[str, Tensor]:
        """By their published names."""
        names = ("learnable_embeddings", "le_proj.weight", "le_proj.bias", "le_norm.weight")
        values = (self.embeddings, self.weight, self.bias, self.scale)
        return {name: t.detach().cpu() for name, t in zip(names, values, strict=True)}


@dataclass(frozen=True)
class GlimpseBatch:
    """A micro-batch and its number, which seeds the dropout."""

    rows: Batch
    micro: int


class GlimpseTask:
    """Glimpse token and predictor for a frozen engine; see `loop.Task`.

    Args:
        begin: id of the token that the glimpse begins as.
        token_rate: its share of the learning rate.

    Attributes:
        token, predictor: what is trained, in fp32.
    """

    def __init__(
        self,
        engine: Engine,
        config: GlimpseConfig,
        losses: Losses,
        source: Source,
        *,
        dropout: float,
        seed: int,
        checkpointing: bool,
        begin: int | None = None,
        token_rate: float = 1.0,
    ):
        self.engine, self.config, self.losses, self.source = engine, config, losses, source
        self.dropout, self.seed, self.checkpointing = dropout, seed, checkpointing
        text = engine.config.text_config
        generator = torch.Generator().manual_seed(seed)
        embedding = engine.decoder.embed_tokens.weight
        start = None if begin is None else embedding[begin].detach().float().cpu()
        self.token = GlimpseToken(text, config.le_layers, generator, start)
        self.predictor = Predictor(engine.config, config, TORCH)
        _initialise(self.predictor, generator)
        self.module = nn.ModuleDict({"token": self.token, "predictor": self.predictor})
        self.module.to(engine.device)
        self.rates = {"token": token_rate}
        if not losses.dice and not losses.bce:
            self.predictor.requires_grad_(False)

    def batch(self, micro: int) -> GlimpseBatch:
        """Pictures and their questions."""
        examples = self.source.examples(micro)
        return GlimpseBatch(collate(examples, self.engine.processor, probes=True), micro)

    def loss(self, batch: GlimpseBatch) -> tuple[Tensor, dict[str, float]]:
        """Dice, BCE and cross entropy, weighted."""
        rows = batch.rows.to(self.engine.device, self.engine.dtype)
        with torch.no_grad():
            tapped = self.config.selected_visual_layers
            visual, taps = self.engine.vision(rows.patches, rows.grids, tapped)
        torch.manual_seed(self.seed * 1_000_003 + batch.micro)
        vectors = F.dropout(self.token(), self.dropout).to(visual.dtype)
        glimpse_logits, hidden = self._layers(rows, visual, vectors)
        figures, total = {"samples": len(rows.probe_rows)}, 0.0
        if self.losses.dice or self.losses.bce:
            importance = self._importance(rows, glimpse_logits, taps)
            dice, bce, found = location_loss(importance, rows.evidence, rows.located)
            total = total + self.losses.dice * dice + self.losses.bce * bce
            figures |= {"dice": float(dice.detach()), "bce": float(bce.detach()), **found}
        if self.losses.lm:
            said, exact = read_answers(self.engine.decoder, hidden, rows)
            total = total + self.losses.lm * said
            figures |= {"lm": float(said.detach()), "exact": float(exact.float().mean())}
        return total, figures

    def _layers(self, rows: Batch, visual: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Raw glimpse logits [B · n, N / B, HQ], and the last hidden state where it is needed."""
        decoder, text = self.engine.decoder, self.engine.config.text_config
        with torch.no_grad():
            hidden = decoder.embed_tokens(rows.token_ids).index_copy(0, rows.visual_rows, visual)
            hidden[rows.probe_rows] = 0
        rope, probes = mrope(rows.positions, text), rows.probe_rows
        read = self.config.selected_layers[0]
        keys = Keys(read)
        for layer in range(text.num_hidden_layers if self.losses.lm else read + 1):
            hidden = hidden.index_add(0, probes, vectors[layer].expand(len(probes), -1))
            if layer == read:
                q = decoder.layers[layer].query(hidden[probes], rope[probes])
            hidden = run_layer(decoder, layer, hidden, rope, rows.layout, self.checkpointing, keys)
        # Visual tokens do not depend on the glimpse: no gradient passes through their keys.
        k = keys.k[rows.visual_rows].detach()
        return visual_logits(q, k, rows.layout.pictures), hidden

    def _importance(self, rows: Batch, glimpse_logits: Tensor, taps: Tensor) -> Tensor:
        """[B · n, N / B]: every question has its own copy of its picture's features."""
        questions, pictures = rows.layout.branches, rows.layout.pictures
        each = taps.unflatten(1, (pictures, -1)).repeat_interleave(questions, dim=1).flatten(1, 2)
        grids = [grid for grid in rows.grids for _ in range(questions)]
        count, tokens = glimpse_logits.shape[:2]
        logits = glimpse_logits.flatten(0, 1).float()
        return self.predictor(logits, each.float(), grids, [tokens] * count).view(count, tokens)

    def glimpse(self) -> Glimpse:
        """What has been trained so far, as the engine uses it."""
        glimpse = Glimpse(self.engine.config, self.config, self.engine.ops)
        glimpse.predictor.load_state_dict(self.predictor.state_dict())
        glimpse.vectors = nn.Parameter(self.token().detach())
        return glimpse.requires_grad_(False).to(self.engine.device, self.engine.dtype)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Retention, box recall and accuracy of pruned answers on held-out examples."""
        glimpse = self.glimpse()
        engine = Engine(
            self.engine.name,
            self.engine.config,
            self.engine.vision,
            self.engine.decoder,
            glimpse,
            self.engine.processor,
            self.engine.eos_token_id,
            self.engine.ops,
        )
        return figures(engine, self.source.heldout())

    def save(self, folder: Path) -> None:
        """The weights in both layouts, in a folder `glimpse`.

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
    """Xavier weights and no bias; without blocks, the mean over heads."""
    for parameter in predictor.parameters():
        if parameter.ndim == 1:
            continue
        bound = (6 / max(sum(parameter.shape), 1)) ** 0.5
        parameter.data.uniform_(-bound, bound, generator=generator)
    for name, parameter in predictor.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    if not len(predictor.layers):
        predictor.attn_in_proj.weight.data.fill_(1 / predictor.attn_in_proj.weight.shape[1])
        predictor.attn_out_proj.weight.data.fill_(1 / predictor.attn_out_proj.weight.shape[1])


def location_loss(
    importance: Tensor, evidence: Tensor, located: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Dice and BCE, each the mean over questions that have evidence (official train_qwen_gp.py).

    Args:
        importance: [Q, N], logits.
        evidence: bool [Q, N].
        located: bool [Q]; questions without evidence, "is there … ?" answered no, do not count.

    Returns:
        both losses, and the recall and the retention of a threshold of one half.
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
    """Content of the config.json beside published glimpse weights."""
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
