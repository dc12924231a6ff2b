"""A Qwen2.5-VL from scratch on the synthetic world.

Four things make it learn in hours of a CPU: the vision encoder first learns to say what lies under
each visual token, on pictures of one attention window; the row that gives the value is told where
to look; several questions share a picture; and the pictures grow with the model.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import Config, parse_config, read_config
from ..decoder import Decoder
from ..errors import NanoglimpseError
from ..files import write_whole
from ..processor import SYSTEM, Processor, preprocess_image
from ..rope import mrope
from ..vision import VisionEncoder
from ..weights import load_model
from ..world import BRIEF_SUFFIX, SPLITS, Picture, Question, render
from . import dense
from .branches import OPS, Keys, run_layer, visual_logits
from .curriculum import Stage
from .examples import IGNORED, Asked, Batch, Example, collate
from .export import save_base
from .tokens import CONTROL, make_tokenizer, tokenizer_config

TOKENIZER = "tokenizer.json"
SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 1003520,
}
# How often a kind is asked: what takes longest to learn, most often. Which of two is further left
# or higher up a model of nano's size did not learn beside the others, and so it is not asked.
ASKED_OFTEN = {
    "left": 0.0,
    "above": 0.0,
    "number": 2.0,
    "count": 3.0,
    "value": 3.0,
    "item": 5.0,
    "bar": 3.0,
    "largest": 3.0,
    "smallest": 3.0,
    "total": 9.0,
}
BRIEF_SHARE = 0.3
# How often a question that does not ask for a word is answered with one, between stars. Where all
# begin "The number on the red circle …", a row looks at the place that the text before it names,
# and none needs to take it from the question, as the glimpse has to.
PLAIN_SHARE = 0.25
# Questions begin up to so many positions further from the picture than they have to, half of the
# time: in a picture larger than those of the curriculum the text is as far from most cells, and
# one that has never looked so far drops digits of long numbers.
GAP_SHARE, GAP = 0.5, 20


@dataclass(frozen=True)
class BaseBatch:
    """A micro-batch; `aid` weighs its auxiliary losses, `rows` is None without questions."""

    patches: Tensor
    grids: tuple
    targets: tuple[Tensor, ...]
    aid: float
    rows: Batch | None


def write_folder(folder: Path, shape: dict, seed: int, pictures: int = 600) -> None:
    """Everything of a checkpoint but its weights: configuration, tokenizer, preprocessing.

    Raises:
        NanoglimpseError: the shape, a config.json, makes no sense.
    """
    drawn = (render(seed, index, canvas=(448, 448)) for index in range(pictures))
    layout = ("system\n" + SYSTEM, "user\n", "assistant\n")
    said = (text for picture in drawn for text in phrases(picture))
    tokenizer = make_tokenizer(chain(layout, said))
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
    write_whole(folder / TOKENIZER, tokenizer.to_str(pretty=False).encode())
    contents = (config, generation, PIXELS, tokenizer_config())
    for name, content in zip(SETTINGS, contents, strict=True):
        write_whole(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def phrases(picture: Picture) -> list[str]:
    """What is said about a picture, with a number in place of each of its names."""
    names = {item.name for item in picture.items if item.kind != "total"}
    return [
        re.sub(r"\w+", lambda word: "7" if word[0] in names else word[0], text)
        for question in picture.questions
        for text in (
            question.text,
            question.text + BRIEF_SUFFIX,
            question.answer,
            question.short,
        )
    ]


def retokenized(old: Tensor, before: Tokenizer, now: Tokenizer) -> Tensor:
    """Rows of an embedding or head for another tokenizer, [vocab, C] -> [vocab, C].

    A token that there was keeps its row; another begins as the mean of those that spelled it.
    """
    rows = []
    for token, _ in sorted(now.get_vocab().items(), key=lambda entry: entry[1]):
        known = before.token_to_id(token)
        text = now.decode([now.token_to_id(token)])
        ids = before.encode(text).ids if known is None else [known]
        rows.append(old[ids].mean(0))
    return torch.stack(rows)


def copy_folder(source: Path, folder: Path) -> None:
    """The files of `write_folder` from those of another run.

    Raises:
        NanoglimpseError: one is not there, or cannot be written.
    """
    for name in (TOKENIZER, *SETTINGS):
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise NanoglimpseError(f"{source} is not a checkpoint: {error}") from None
        write_whole(folder / name, content)


def initialise(module: nn.Module, depth: int, generator: torch.Generator) -> None:
    """Normal weights by fan-in; what adds to the residual stream is scaled down by the depth."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("proj.weight", "o.weight", "down.weight")):
            std *= (2 * depth) ** -0.5
        parameter.data.normal_(0, std, generator=generator)


class BaseTask:
    """A base model that learns the world; see `loop.Task`.

    Args:
        folder: of the run, with the files of `write_folder`.
        stages: of the run's `micros` micro-batches.
        seed: of data and weights.
        init: folder of the checkpoint to begin with, instead of random weights.
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
        self.device, self.dtype, self.rates = device, dtype, {}
        text, vision = self.config.text_config, self.config.vision_config
        head = dense.DenseHead(text.hidden_size)
        if init:
            parts = self._begun(init)
            # A random head would push a trained vision encoder somewhere at random.
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        else:
            parts = VisionEncoder(vision, OPS), Decoder(self.config, OPS)
            generator = torch.Generator().manual_seed(seed)
            initialise(parts[0], vision.depth, generator)
            initialise(parts[1], text.num_hidden_layers, generator)
            initialise(head, 1, generator)
        self.module = nn.ModuleDict(dict(zip(("vision", "decoder"), parts, strict=True)))
        self.module["dense"] = head
        self.module.requires_grad_(True).to(device, dtype)

    def _begun(self, init: Path) -> tuple[VisionEncoder, Decoder]:
        """The parts of another checkpoint, in the words of this one's tokenizer."""
        config = read_config(init / "config.json")
        before, now = Processor(init, config).tokenizer, self.processor.tokenizer
        quiet = lambda done, total: None  # noqa: E731
        vision, decoder = load_model(init, config, OPS, self.dtype, self.device, None, quiet)
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
        draw = rng.choices(stage.draws, [draw.often for draw in stage.draws])[0]
        canvas = rng.choice(draw.canvases)
        pictures = [
            render(
                self.seed,
                micro * 1000 + i,
                domain=draw.domain,
                canvas=canvas,
                things=draw.things,
                size=draw.size,
                per_kind=4,
            )
            for i in range(stage.pictures(canvas))
        ]
        return self._batch(pictures, stage.questions, _between(stage.aid, done), rng)

    def _batch(
        self, pictures: Sequence[Picture], questions: int, weight: float, rng: random.Random
    ) -> BaseBatch:
        rows = None
        if questions:
            # All of one kind of prompt, which leaves less to pad.
            brief = rng.random() < BRIEF_SHARE
            drawn = [ask(p.questions, questions, rng, brief) for p in pictures]
            if not brief:
                drawn = [
                    tuple(plainly(a) if rng.random() < PLAIN_SHARE else a for a in asked)
                    for asked in drawn
                ]
            examples = [Example(p.image, a) for p, a in zip(pictures, drawn, strict=True)]
            gap = rng.randint(1, GAP) if rng.random() < GAP_SHARE else 0
            rows = collate(examples, self.processor, probes=False, gap=gap)
            patches, grids = rows.patches, rows.grids
        else:
            made = [preprocess_image(p.image, config=self.processor.pixels) for p in pictures]
            patches, grids = torch.cat([m[0] for m in made]), tuple(m[1] for m in made)
        merge = self.config.vision_config.spatial_merge_size
        targets = [dense.targets(p, g, merge) for p, g in zip(pictures, grids, strict=True)]
        targets = tuple(torch.cat(parts) for parts in zip(*targets, strict=True))
        return BaseBatch(patches, grids, targets, weight, rows)

    def loss(self, batch: BaseBatch) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of the answers, and the auxiliary losses."""
        patches = batch.patches.to(self.device, self.dtype)
        visual, _ = self.module["vision"](patches, batch.grids)
        targets = [target.to(self.device) for target in batch.targets]
        seen, shares = self.module["dense"](visual, *targets)
        figures = {"samples": len(batch.grids), "dense": float(seen.detach()), **shares}
        if batch.rows is None:
            return batch.aid * seen, figures
        rows = batch.rows.to(self.device, self.dtype)
        said, exact, looked = self.answer(visual, rows)
        figures |= {"answer": float(said.detach()), "exact": float(exact.float().mean())}
        figures["look"] = float(looked.detach())
        return said + batch.aid * (seen + looked), figures

    def answer(self, visual: Tensor, rows: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, which questions [B · n] are right in every token, and where it looked."""
        decoder = self.module["decoder"]
        hidden = decoder.embed_tokens(rows.token_ids).index_copy(0, rows.visual_rows, visual)
        rope = mrope(rows.positions, self.config.text_config)
        # The last layer before pruning, which a glimpse reads (paper Sec. 4: K is two thirds).
        last = -(-2 * len(decoder.layers) // 3) - 1
        keys = Keys(last)
        for layer in range(len(decoder.layers)):
            if layer == last:
                q = decoder.layers[layer].query(hidden[rows.value_rows], rope[rows.value_rows])
            hidden = run_layer(decoder, layer, hidden, rope, rows.layout, False, keys)
        logits = visual_logits(q, keys.k[rows.visual_rows], rows.layout.pictures)
        looked = look_loss(logits, rows.evidence, rows.located)
        return *read_answers(decoder, hidden, rows), looked

    @torch.no_grad()
    def evaluate(self, pictures: int = 24) -> dict[str, float]:
        """Share of held-out questions whose every token is right, by domain and kind of prompt."""
        self.module.eval()
        figures = {}
        seed = SPLITS["heldout"].start
        for domain in sorted({draw.domain for stage in self.stages for draw in stage.draws}):
            for brief in (False, True):
                right = []
                for side in (280, 336, 448):
                    drawn = [
                        render(seed, i, domain=domain, canvas=(side, side))
                        for i in range(pictures // 3)
                    ]
                    rng = random.Random(side)
                    examples = [Example(p.image, ask(p.questions, 6, rng, brief)) for p in drawn]
                    rows = collate(examples, self.processor, probes=False)
                    rows = rows.to(self.device, self.dtype)
                    visual, _ = self.module["vision"](rows.patches, rows.grids)
                    right.append(self.answer(visual, rows)[1])
                name = f"{domain}{' brief' if brief else ''}"
                figures[name] = float(torch.cat(right).float().mean())
        self.module.train()
        return figures

    def save(self, folder: Path) -> None:
        """The weights, in bf16."""
        save_base(folder, self.module)


def look_loss(logits: Tensor, evidence: Tensor, located: Tensor) -> Tensor:
    """How far attention is from lying evenly on the evidence: their KL divergence.

    Language alone teaches a row slowly, if at all, where to look: after thousands of steps the one
    that gives a number looked evenly at all things, although each was found by the text printed on
    it. And it is content with the first cell of a long number, which a later row may need whole.

    Args:
        logits: of the visual tokens of each question, [Q, N, HQ]; attention is the mean over heads.
        evidence: bool [Q, N].
        located: bool [Q], which questions count.
    """
    logits, evidence = logits[located].float(), evidence[located]
    attention = logits.log_softmax(1).logsumexp(2) - math.log(logits.shape[2])
    count = evidence.sum(1)
    apart = -(attention * evidence).sum(1) / count - count.log()
    return apart.sum() / len(apart) if len(apart) else apart.sum()


def read_answers(decoder: Decoder, hidden: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of the labels by weight, and which branches are right in every token."""
    branches = rows.layout.pictures * rows.layout.branches
    counted = rows.labels != IGNORED
    logits = decoder.logits(hidden[rows.layout.split :][counted]).float()
    labels, weights = rows.labels[counted], rows.weights[counted]
    loss = F.cross_entropy(logits, labels, reduction="none") @ weights / weights.sum()
    wrong = torch.zeros_like(counted)
    wrong[counted] = logits.argmax(1) != labels
    return loss, ~wrong.view(branches, -1).any(1)


def ask(
    questions: Sequence[Question], count: int, rng: random.Random, brief: bool
) -> tuple[Asked, ...]:
    """So many of the questions, drawn by kind, all free-form or all brief."""
    questions = [q for q in questions if ASKED_OFTEN.get(q.kind, 1.0)]
    weights = [ASKED_OFTEN.get(q.kind, 1.0) for q in questions]
    chosen, left = [], list(range(len(questions)))
    while len(chosen) < count:
        left = left or list(range(len(questions)))
        pick = rng.choices(left, [weights[i] for i in left])[0]
        left.remove(pick)
        chosen.append(questions[pick])
    return tuple(asked(q, brief) for q in chosen)


def asked(question: Question, brief: bool) -> Asked:
    """A question of the world as it is put to the model."""
    if brief:
        text, answer = question.text + BRIEF_SUFFIX, question.short
    else:
        text, answer = question.text, question.answer
    return Asked(text, answer, question.short, question.boxes)


def plainly(asked: Asked) -> Asked:
    """The same, answered "*7*"."""
    return replace(asked, answer=f"*{asked.short}*")


def _between(ends: tuple[float, float], done: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * done
