"""Questions of different sizes, asked at once, one by one, and of transformers.

Their pictures and texts have different lengths and their answers end at different places. At once
is `Engine.ask_many`, one by one `Engine.ask`; transformers' `generate` takes one batch that is
padded on the left, and goes on until the last answer has ended. All begin with pictures. What is
pruned may answer at another length, hence questions and tokens a second.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanoglimpse.benchmark.cases import CLOSE, methods
from nanoglimpse.benchmark.contenders import QUESTION, Peer, noise
from nanoglimpse.benchmark.measuring import Memory, now, say
from nanoglimpse.benchmark.report import shown, spread, table
from nanoglimpse.engine import Engine
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.world import BRIEF_SUFFIX

# Of the largest picture.
SIDES = (1.0, 0.5, 0.75, 0.25)
QUESTIONS = (
    QUESTION,
    "What shape is the object with 8?" + BRIEF_SUFFIX,
    "How many red objects are there?",
)
# Where there is no tokenizer, in terms of --text.
LENGTHS = (1.0, 0.4, 1.7)

Answers = list[list[int]]


class Ragged:
    """So many questions, with all arms.

    Attributes:
        items: picture and question of each.
        prompts: of the items.
        arms: each answers all questions, from the pictures on, with token ids.
        answers: of each arm, the last ones.
    """

    def __init__(
        self, engine: Engine, peer: Peer | None, args: argparse.Namespace, visual: int, count: int
    ):
        self.engine, self.args = engine, args
        self.items = list(
            zip(pictures(args, visual, count), texts(engine, args, count), strict=True)
        )
        self.prompts = [engine.prompt(*item) for item in self.items]
        self.methods = methods(engine, args)
        self.arms: dict[str, Callable[[], Answers]] = {}
        self.answers: dict[str, Answers] = {}
        for name, method in self.methods.items():
            self.arms[f"{name}, at once"] = partial(self.at_once, method)
            self.arms[f"{name}, one by one"] = partial(self.one_by_one, method)
        self.peer = Padded(peer, self) if peer else None
        if self.peer:
            self.arms[f"transformers {peer.version}, SDPA"] = self.peer.answers
        lengths = [len(prompt) for prompt in self.prompts]
        seen = [int(prompt.visual.sum()) for prompt in self.prompts]
        self.title = (
            f"{count} questions at once, {min(seen)} to {max(seen)} visual tokens, "
            f"{min(lengths)} to {max(lengths)} rows"
        )

    def at_once(self, method: str) -> Answers:
        """All in one packed batch, from which answers leave as they end."""
        room = sum(map(len, self.prompts)) + len(self.prompts) * self.args.new
        options = {"method": method, "max_new_tokens": self.args.new}
        found = self.engine.ask_many(self.items, max_batch_tokens=room, **options)
        for answer in found:
            if isinstance(answer, NanoglimpseError):
                raise answer
        return [answer.token_ids for answer in found]

    def one_by_one(self, method: str) -> Answers:
        """The same questions, each by itself."""
        options = {"method": method, "max_new_tokens": self.args.new}
        return [self.engine.ask(*item, **options).token_ids for item in self.items]

    def faults(self) -> list[str]:
        """What answers something else than it should; in low precision, whose logits do."""
        say(f"{self.title}: checking")
        if self.engine.dtype == torch.float32:
            return self.wrong_tokens()
        limit, found = CLOSE[self.engine.dtype], []
        for name, method in self.methods.items():
            read = partial(self.engine.prefill_many, method=method, max_new_tokens=1)
            logits = torch.cat([read([prompt]).logits for prompt in self.prompts]).float()
            others = {"at once and one by one": read(self.prompts).logits}
            if self.compared and method == "dense":
                others["and transformers"] = self.peer.logits()
            for what, other in others.items():
                error = float(((other.float() - logits).norm(dim=1) / logits.norm(dim=1)).max())
                if not error <= limit:
                    found.append(f"logits, {name} {what} differ by {error:.1e}")
        return found

    def wrong_tokens(self) -> list[str]:
        """Arms that are not answered token for token as one by one, transformers as dense."""
        answers, found = {name: arm() for name, arm in self.arms.items()}, []
        for name in self.methods:
            if answers[f"{name}, at once"] != answers[f"{name}, one by one"]:
                found.append(f"tokens, {name} at once and one by one differ")
        if self.compared and [*answers.values()][-1] != answers["dense, one by one"]:
            found.append("tokens differ from transformers'")
        return found

    @property
    def compared(self) -> bool:
        """Whether transformers has the same weights."""
        return self.peer is not None and not self.engine.model.quantized

    def measure(self) -> None:
        """Rounds that alternate between the arms; the first warms up."""
        self.seconds, self.memory = defaultdict(list), defaultdict(list)
        for number in range(self.args.rounds + 1):
            say(f"{self.title}: round {number} of {self.args.rounds}")
            for name, arm in self.arms.items():
                memory, start = Memory(self.engine.device), now()
                self.answers[name] = arm()
                took = now() - start
                if number:
                    self.seconds[name].append(took)
                    self.memory[name].append(memory.peak())

    def report(self) -> dict:
        """Prints the tables; what goes into the JSON line."""
        lengths = [len(answer) for answer in self.answers["dense, one by one"]]
        print(
            f"\n{self.title}, answers of {min(lengths)} to {max(lengths)} tokens, "
            f"medians of {self.args.rounds} rounds"
        )
        entry = {"title": self.title, "questions": len(self.items)}
        entry["arms"] = {name: self.figures(name) for name in self.arms}
        columns = ("ms", "p20", "p80", "questions/s", "tokens/s")
        rows = [
            [name, *(f"{arm[column]:.1f}" for column in columns), f"{arm['peak_bytes'] / 1e6:.1f}"]
            for name, arm in entry["arms"].items()
        ]
        table(["all questions", *columns, "peak MB"], rows)
        print("\nat once, times as many questions a second")
        entry["ratios"] = {name: self.ratios(name) for name in self.methods}
        over = [*entry["ratios"]["dense"]] + (["dense"] if len(self.methods) > 1 else [])
        rows = [[n, *(shown(r.get(o)) for o in over)] for n, r in entry["ratios"].items()]
        table(["", *(f"over {name}" for name in over)], rows)
        return entry

    def figures(self, name: str) -> dict:
        """Of an arm."""
        seconds, tokens = self.seconds[name], sum(map(len, self.answers[name]))
        middle, (p20, p80) = statistics.median(seconds), spread(seconds)
        return {
            "ms": round(1000 * middle, 4),
            "p20": round(1000 * p20, 4),
            "p80": round(1000 * p80, 4),
            "questions/s": round(len(self.items) / middle, 4),
            "tokens/s": round(tokens / middle, 4),
            "tokens": tokens,
            "peak_bytes": statistics.median(self.memory[name]),
        }

    def ratios(self, name: str) -> dict[str, float]:
        """Medians over rounds of how much faster a method is at once than the others."""
        others = {"one by one": f"{name}, one by one"}
        if self.peer:
            others["transformers"] = [*self.arms][-1]
        if name != "dense":
            others["dense"] = "dense, at once"
        own = self.seconds[f"{name}, at once"]
        return {
            what: statistics.median(b / a for a, b in zip(own, self.seconds[other], strict=True))
            for what, other in others.items()
        }


def pictures(args: argparse.Namespace, visual: int, count: int) -> list[Image.Image]:
    """Of so many visual tokens and fewer, or the picture given and smaller ones."""
    sides = [SIDES[i % len(SIDES)] for i in range(count)]
    if visual:
        return [noise(max(round(visual * side * side), 1)) for side in sides]
    whole = Image.open(args.image).convert("RGB")
    return [whole.resize([max(round(side * x), 1) for x in whole.size]) for side in sides]


def texts(engine: Engine, args: argparse.Namespace, count: int) -> list[str] | list[int]:
    """Questions, or how many tokens they have."""
    if engine.processor.tokenizer:
        return [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    return [max(round(args.text * LENGTHS[i % len(LENGTHS)]), 2) for i in range(count)]


class Padded:
    """transformers on all questions in one batch, padded on the left."""

    def __init__(self, peer: Peer, ragged: Ragged):
        self.model, self.pixels, self.engine = peer.model, peer.pixels, ragged.engine
        self.prompts: list[Prompt] = ragged.prompts
        self.pictures, self.new = [picture for picture, _ in ragged.items], ragged.args.new

    def inputs(self) -> dict[str, Tensor]:
        """Pixels from the pictures; token ids are taken over."""
        longest = max(map(len, self.prompts))

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])

        ids = padded([prompt.token_ids for prompt in self.prompts])
        inputs = {"input_ids": ids, **self.pixels(images=self.pictures, return_tensors="pt")}
        inputs["attention_mask"] = padded([torch.ones_like(p.token_ids) for p in self.prompts])
        inputs["mm_token_type_ids"] = (ids == self.engine.config.image_token_id).int()
        return {name: tensor.to(self.engine.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of the last rows, [B, vocab]."""
        return self.model(**self.inputs(), logits_to_keep=1, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def answers(self) -> Answers:
        """Token ids, the ending one included."""
        inputs, ends = self.inputs(), self.engine.model.eos_token_id
        eos = {"eos_token_id": sorted(ends)} if ends else {}
        out = self.model.generate(**inputs, max_new_tokens=self.new, do_sample=False, **eos)
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        last = [next((i for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
        return [row[: i + 1] for row, i in zip(rows, last, strict=True)]


def gains_at_once(entry: dict) -> str:
    """What was gained by what, in a line."""
    parts = []
    for name, ratios in entry["ratios"].items():
        words = [f"{ratio:.2f} times {what}" for what, ratio in ratios.items()]
        parts.append(f"{name} {', '.join(words)}")
    return f"{entry['title']}: questions a second, " + "; ".join(parts)
