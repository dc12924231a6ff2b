"""Trains a Qwen2.5-VL from scratch on the synthetic world.

Four things let it learn within hours on a CPU: the vision encoder first learns to predict the
content of each visual token's cell, on pictures of one attention window; the attention of the row
that predicts the value is supervised by the evidence; several questions share a picture; and the
pictures grow during the run.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanoglimpse.config import Config, as_safetensors, parse_config, read_config
from nanoglimpse.data.qa import QA, Example, draw_questions
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.files import write_whole
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.inputs.processor import SYSTEM, Processor
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.decoder import Decoder, run_layers
from nanoglimpse.model.rope import Grid, mrope
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.train.cell_loss import CellHead, cell_targets
from nanoglimpse.train.collate import IGNORED, TrainBatch, collate
from nanoglimpse.train.curriculum import Stage
from nanoglimpse.train.shared_prefix import OPS, KeptKeys, visual_logits
from nanoglimpse.train.tokens import CONTROL, make_tokenizer
from nanoglimpse.weights.hub import EMBEDDED
from nanoglimpse.weights.load import build, open_checkpoint
from nanoglimpse.weights.mapping import parts
from nanoglimpse.world import BRIEF_SUFFIX, SPLITS, Picture, render

# A new model takes its shape from nano, unless another is given: there rope_theta is 1000, since at
# head size 32 and the released 10⁶ the lowest frequencies would hardly rotate. It always takes the
# preprocessing of pictures and the chat template. tokenizer_config.json names the general class
# PreTrainedTokenizerFast, since transformers' Qwen2Tokenizer would rebuild it with merges.
NANO, COPIED = EMBEDDED["nano"], ("preprocessor_config.json", "tokenizer_config.json")
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", *COPIED)
BRIEF_SHARE = 0.3
# The share of free-form questions that are answered with a single word between stars. If every
# answer began like "The number on the red circle …", each row could find its evidence by the words
# before it, and none would have to find it by the question, as the glimpse has to.
WORD_SHARE = 0.25
# A share of the batches moves its questions up to GAP positions away from the picture. In pictures
# larger than those of the curriculum most cells are that far from the text, and a model that has
# never attended over such a distance drops digits of long numbers.
GAP_SHARE, GAP = 0.5, 20


@dataclass(frozen=True)
class BaseBatch:
    """A micro-batch; `rows` is None if it has no questions."""

    patches: Tensor
    grids: tuple[Grid, ...]
    targets: tuple[Tensor, ...]
    aux_weight: float
    rows: TrainBatch | None


def write_folder(folder: Path, shape: dict, seed: int, pictures: int = 600) -> None:
    """Writes `SETTINGS`, a checkpoint without weights: configuration, tokenizer, preprocessing.

    Args:
        folder: the folder to write to.
        shape: the content of config.json without the tokenizer's numbers.
        seed: seed of the pictures whose phrases become the vocabulary.
        pictures: the number of these pictures.

    Raises:
        NanoglimpseError: the shape makes no sense.
    """
    drawn = (render(seed, index, canvas=(448, 448)) for index in range(pictures))
    layout = ("system\n" + SYSTEM, "user\n", "assistant\n")
    texts = (text for picture in drawn for text in phrases(picture))
    tokenizer = make_tokenizer(chain(layout, texts))
    ids = {token: tokenizer.token_to_id(token) for token in CONTROL}
    config = {
        **shape,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }
    parse_config(config, "the shape")
    generation = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    contents = {name: _content(NANO, name) for name in COPIED}
    contents["tokenizer.json"] = tokenizer.to_str(pretty=False).encode()
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        contents[name] = (json.dumps(content, indent=2) + "\n").encode()
    _write_files(folder, contents)


def phrases(picture: Picture) -> list[str]:
    """The questions and answers about a picture, with every name replaced by a number."""
    names = {thing.name for thing in picture.things if thing.kind != "total"}
    return [
        re.sub(r"\w+", lambda word: "7" if word[0] in names else word[0], text)
        for question in picture.questions
        for text in (question.text, question.text + BRIEF_SUFFIX, question.answer, question.short)
    ]


def retokenized(old: Tensor, before: Tokenizer, now: Tokenizer) -> Tensor:
    """Converts the rows of an embedding or head to another tokenizer, [vocab, C] -> [vocab, C].

    A token that both tokenizers have keeps its row; a new one starts as the mean of the rows that
    spelled it.
    """
    rows = []
    for token, number in sorted(now.get_vocab().items(), key=itemgetter(1)):
        known = before.token_to_id(token)
        ids = before.encode(now.decode([number])).ids if known is None else [known]
        rows.append(old[ids].mean(0))
    return torch.stack(rows)


def copy_files(source: Path, folder: Path) -> None:
    """Copies the files of a checkpoint that `write_folder` writes.

    Raises:
        NanoglimpseError: a file does not exist or cannot be written.
    """
    _write_files(folder, {name: _content(source, name) for name in SETTINGS})


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise NanoglimpseError(f"{folder} is not a checkpoint: {error}") from None


def _write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes config.json last, which then says that the others are there."""
    for name in sorted(contents, key="config.json".__eq__):
        write_whole(folder / name, contents[name])


def initialise(module: nn.Module, depth: int, generator: torch.Generator) -> None:
    """Normal weights by fan-in; outputs to the residual stream are scaled down by the depth."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("proj.weight", "o.weight", "down.weight")):
            std *= (2 * depth) ** -0.5
        parameter.data.normal_(0, std, generator=generator)


class BaseTask:
    """Trains a base model on the world; see `loop.TrainTask`.

    Args:
        folder: the folder of the run, with the files of `write_folder`.
        stages: the curriculum.
        micros: the number of micro-batches of the run.
        seed: seed of data and weights.
        device, dtype: where and in which precision the model runs.
        init: folder of a checkpoint to start from, instead of random weights.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[Stage],
        micros: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        init: Path | None = None,
    ):
        self.config: Config = read_config(folder / "config.json")
        self.processor = Processor(folder, self.config)
        self.stages, self.seed = stages, seed
        shares = list(accumulate(stage.share for stage in stages))
        self.ends = [micros * share / shares[-1] for share in shares]
        self.device, self.dtype = device, dtype
        self.rates: dict[str, float] = {}
        text, vision = self.config.text_config, self.config.vision_config
        self.head = CellHead(text.hidden_size)
        if init:
            self.vision, self.decoder = self._initial_parts(init)
            # The gradients of a random head would be noise to a trained vision encoder.
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)
        else:
            self.vision, self.decoder = VisionEncoder(vision, OPS), Decoder(self.config, OPS)
            generator = torch.Generator().manual_seed(seed)
            initialise(self.vision, vision.depth, generator)
            initialise(self.decoder, text.num_hidden_layers, generator)
            initialise(self.head, 1, generator)
        self.saved = nn.ModuleDict({"vision": self.vision, "decoder": self.decoder})
        self.module: nn.Module = nn.ModuleDict({**self.saved, "cell_head": self.head})
        self.module.requires_grad_(True).to(device, dtype)

    def _initial_parts(self, init: Path) -> tuple[VisionEncoder, Decoder]:
        """The parts of another checkpoint, converted to the tokenizer of this run."""
        config = read_config(init / "config.json")
        before = Processor(init, config).need_tokenizer()
        now = self.processor.need_tokenizer()
        config, tensors = open_checkpoint(init, config, self.dtype)
        vision, decoder = build(config, OPS, tensors, self.dtype, self.device)
        if before.get_vocab() != now.get_vocab():
            for part in (decoder.embed_tokens, decoder.lm_head):
                if part is not None:
                    part.weight = nn.Parameter(retokenized(part.weight.detach(), before, now))
        return vision, decoder

    def batch(self, micro: int) -> BaseBatch:
        """Pictures of one canvas and their questions."""
        index = next((i for i, end in enumerate(self.ends) if micro < end), len(self.ends) - 1)
        stage = self.stages[index]
        begin = self.ends[index - 1] if index else 0
        done = (micro - begin) / (self.ends[index] - begin)
        rng = random.Random(f"base {self.seed} {micro}")
        draw = rng.choices(stage.draws, [draw.weight for draw in stage.draws])[0]
        canvas = rng.choice(draw.canvases)
        pictures = [
            render(
                self.seed,
                micro * 1000 + i,
                domain=draw.domain,
                canvas=canvas,
                num_things=draw.num_things,
                size=draw.size,
                per_kind=4,
            )
            for i in range(stage.pictures(canvas))
        ]
        first, last = stage.aux_weight
        return self._batch(pictures, stage.questions, first + (last - first) * done, rng)

    def _batch(
        self, pictures: Sequence[Picture], questions: int, aux_weight: float, rng: random.Random
    ) -> BaseBatch:
        rows = None
        if questions:
            # All prompts of a batch have one form, so that there is less padding.
            brief = rng.random() < BRIEF_SHARE
            drawn = [draw_questions(p.questions, questions, rng, brief) for p in pictures]
            if not brief:
                drawn = [
                    tuple(as_word(a) if rng.random() < WORD_SHARE else a for a in qas)
                    for qas in drawn
                ]
            examples = [Example(p.image, a) for p, a in zip(pictures, drawn, strict=True)]
            gap = rng.randint(1, GAP) if rng.random() < GAP_SHARE else 0
            rows = collate(examples, self.processor, probes=False, gap=gap)
            patches, grids = rows.patches, rows.grids
        else:
            made = [preprocess_image(p.image, config=self.processor.pixels) for p in pictures]
            patches, grids = torch.cat([m[0] for m in made]), tuple(m[1] for m in made)
        merge = self.config.vision_config.spatial_merge_size
        by_picture = [cell_targets(p, g, merge) for p, g in zip(pictures, grids, strict=True)]
        targets = tuple(torch.cat(parts) for parts in zip(*by_picture, strict=True))
        return BaseBatch(patches, grids, targets, aux_weight, rows)

    def loss(self, batch: BaseBatch) -> tuple[Tensor, dict[str, float]]:
        """The cross entropy of the answers plus the auxiliary losses."""
        patches = batch.patches.to(self.device, self.dtype)
        visual, _ = self.vision(patches, batch.grids)
        targets = [target.to(self.device) for target in batch.targets]
        cells, shares = self.head(visual, *targets)
        figures = {"samples": len(batch.grids), "dense": float(cells.detach()), **shares}
        if batch.rows is None:
            return batch.aux_weight * cells, figures
        rows = batch.rows.to(self.device, self.dtype)
        answer, exact, attention = self.answer(visual, rows)
        figures |= {"answer": float(answer.detach()), "exact": float(exact.float().mean())}
        figures["look"] = float(attention.detach())
        return answer + batch.aux_weight * (cells + attention), figures

    def answer(self, visual: Tensor, rows: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, bool [B · n] whether all of an answer is right, and attention loss."""
        decoder = self.decoder
        hidden = decoder.embed_tokens(rows.token_ids).index_copy(0, rows.visual_rows, visual)
        rope = mrope(rows.positions, self.config.text_config)
        # The last layer before pruning, whose attention the glimpse uses.
        depth = len(decoder.layers)
        last = two_thirds(depth) - 1
        keys = KeptKeys(last, self.config.text_config.num_key_value_heads)
        layers = range(depth)
        hidden, inputs = run_layers(
            decoder, hidden, rope, keys, rows.layout, layers, capture=(last,)
        )
        q = decoder.layers[last].query(inputs[last][rows.value_rows], rope[rows.value_rows])
        logits = visual_logits(q, keys.k[rows.visual_rows], rows.layout.pictures)
        looked = attention_loss(logits, rows.evidence, rows.located)
        return *answer_loss(decoder, hidden, rows), looked

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The share of held-out answers with every token right, by domain and form of prompt."""
        self.module.eval()
        figures = {}
        for domain in sorted({draw.domain for stage in self.stages for draw in stage.draws}):
            for brief in (False, True):
                exact = [self._exact(domain, brief, side) for side in (280, 336, 448)]
                name = f"{domain}{' brief' if brief else ''}"
                figures[name] = float(torch.cat(exact).float().mean())
        self.module.train()
        return figures

    def _exact(self, domain: str, brief: bool, side: int) -> Tensor:
        """Bool [8 · 6], which answers about held-out square pictures have every token right."""
        seed, rng = SPLITS["heldout"].start, random.Random(side)
        drawn = [render(seed, i, domain=domain, canvas=(side, side)) for i in range(8)]
        examples = [Example(p.image, draw_questions(p.questions, 6, rng, brief)) for p in drawn]
        rows = collate(examples, self.processor, probes=False).to(self.device, self.dtype)
        visual, _ = self.vision(rows.patches, rows.grids)
        return self.answer(visual, rows)[1]

    def save(self, folder: Path) -> None:
        """Writes the vision encoder and the decoder to model.safetensors in bf16.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        tensors = checkpoint_tensors(self.saved, torch.bfloat16)
        name, config = "visual.patch_embed.proj.weight", self.config.vision_config
        side = config.patch_size
        shape = (-1, config.in_channels, config.temporal_patch_size, side, side)
        tensors[name] = tensors[name].view(shape)
        write_whole(folder / "model.safetensors", as_safetensors(tensors, {"format": "pt"}))


def checkpoint_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module by checkpoint name; fused matrices are split again."""
    parameters = dict(module.named_parameters())
    return {
        name: parameters[part.name].detach()[part.start : part.stop].to("cpu", dtype).clone()
        for name, part in parts(module).items()
    }


def attention_loss(logits: Tensor, evidence: Tensor, located: Tensor) -> Tensor:
    """The KL divergence of the attention from a uniform distribution over the evidence.

    The language loss teaches the location of the evidence slowly, if at all. After thousands of
    steps without this loss, the row that predicts a number still attended evenly to all things,
    although the printed text of each could be located. The language loss is also satisfied by the
    first cell of a long number, whereas later rows need all of its cells.

    Args:
        logits: [Q, N, HQ], the attention logits of the visual tokens of each question; the
            attention is their mean over heads.
        evidence: bool [Q, N].
        located: bool [Q], the questions that count.
    """
    logits, evidence = logits[located].float(), evidence[located]
    attention = logits.log_softmax(1).logsumexp(2) - math.log(logits.shape[2])
    count = evidence.sum(1)
    divergence = -(attention * evidence).sum(1) / count - count.log()
    return divergence.sum() / max(len(divergence), 1)


def answer_loss(decoder: Decoder, hidden: Tensor, rows: TrainBatch) -> tuple[Tensor, Tensor]:
    """The weighted cross entropy of the labels, and bool [B · n] whether a branch is all right."""
    branches = rows.layout.pictures * rows.layout.branches
    counted = rows.labels != IGNORED
    logits = decoder.logits(hidden[rows.layout.branch_start :][counted]).float()
    labels, weights = rows.labels[counted], rows.weights[counted]
    loss = F.cross_entropy(logits, labels, reduction="none") @ weights / weights.sum()
    wrong = torch.zeros_like(counted)
    wrong[counted] = logits.argmax(1) != labels
    return loss, ~wrong.view(branches, -1).any(1)


def as_word(qa: QA) -> QA:
    """The same question with its short answer between stars, as "*7*"."""
    return replace(qa, answer=f"*{qa.short}*")
