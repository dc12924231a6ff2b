"""The embedded checkpoint does what its model card says, on slices of the held-out split."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from nanoglimpse import load
from nanoglimpse.evaluate.questions import EvalQuestion, world_questions
from nanoglimpse.evaluate.run import QuestionBatch, answer_batch, batches
from nanoglimpse.evaluate.scores import contains
from nanoglimpse.evaluate.variants import Variant
from nanoglimpse.weights.glimpse import read_tensors
from nanoglimpse.weights.hub import EMBEDDED
from nanoglimpse.world import QUESTION_KINDS, SPLITS, render
from tests.helpers import reference
from tests.model.test_parity import close, hf_inputs

FOLDER = EMBEDDED["nano"]
HELDOUT = SPLITS["heldout"].start
# What it has learned: not what is further left or higher up.
KINDS = {
    "scene": ("number", "color", "shape", "exists", "count"),
    "document": QUESTION_KINDS["document"],
    "chart": QUESTION_KINDS["chart"],
}


def asked(count: int, brief: bool) -> list[EvalQuestion]:
    """The first held-out questions of every domain."""
    domains = KINDS.items()
    return [
        question
        for name, kinds in domains
        for question in world_questions(HELDOUT, name, count, brief, kinds)
    ]


@pytest.fixture(scope="module")
def hf_nano():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("brief", [False, True], ids=["free", "brief"])
@pytest.mark.slow
def test_transformers_says_the_same(nano, hf_nano, brief):
    """Greedy tokens of 60 held-out questions, beyond the answers' ends; logits of every fifth."""
    for question in asked(10, brief):
        prompt = nano.prompt(question.picture, question.qa.question)
        inputs = hf_inputs(prompt, nano.config)
        prefill = nano.prefill(prompt, "dense", max_new_tokens=24)
        if question.number % 5 == 0:
            with torch.no_grad():
                close(prefill.logits, hf_nano(**inputs).logits[0, -1])
        theirs = hf_nano.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
        ours = list(nano.decode(prefill, 24, ignore_eos=True))
        assert ours == theirs[0, len(prompt) :].tolist(), question.name


@pytest.mark.slow
def test_pruned_as_a_second_implementation_prunes(hf_nano):
    """Kept tokens and the whole pruned answer."""
    engine = load("nano", dtype="float32", device="cpu", backend="torch")
    glimpse = FOLDER / "glimpse"
    config, (_, tensors) = json.loads((glimpse / "config.json").read_text()), read_tensors(glimpse)
    for question in asked(4, False):
        prompt = engine.prompt(question.picture, question.qa.question)
        ours = engine.prefill(prompt, max_new_tokens=16)
        inputs = (prompt.token_ids, prompt.patches, prompt.grids)
        theirs = reference.run(hf_nano, tensors, config, *inputs, new_tokens=16)
        assert torch.equal(ours.kept, theirs.kept)
        assert list(engine.decode(ours, 16, ignore_eos=True)) == theirs.tokens


def stated(method: str, domain: str) -> float:
    """What the model card says of the slice, in percent."""
    card = (FOLDER / "README.md").read_text()
    (row,) = re.findall(rf"^\| {method}, first 100 \| (.*) \|$", card, re.MULTILINE)
    return float(row.split(" | ")[list(KINDS).index(domain)])


@pytest.mark.parametrize("domain", KINDS)
@pytest.mark.parametrize("method", ["dense", "glimpse"])
@pytest.mark.slow
def test_the_card_is_right(nano, method, domain):
    """Accuracy on the first 100 held-out questions, to one question."""
    questions = world_questions(HELDOUT, domain, 100, False, KINDS[domain])
    rows = [
        row
        for some in batches(questions, 8)
        for row in answer_batch(QuestionBatch(nano, some), Variant(method))
    ]
    assert abs(sum(row["contains"] for row in rows) - stated(method, domain)) <= 1


@pytest.mark.slow
def test_the_answer_is_in_the_boxes_and_nowhere_else(nano):
    """With all else grey the number is still read; with the boxes grey it is not."""
    right = {"whole": 0, "inside": 0, "outside": 0}
    asked = 0
    for index in range(40):
        picture = render(HELDOUT, index, domain="scene", canvas=(336, 336))
        for question in [q for q in picture.questions if q.kind == "number"][:1]:
            box = tuple(round(side * 336) for side in question.boxes[0])
            grey = Image.new("RGB", picture.image.size, (128, 128, 128))
            inside, outside = grey.copy(), picture.image.copy()
            inside.paste(picture.image.crop(box), box[:2])
            outside.paste(grey.crop(box), box[:2])
            views = {"whole": picture.image, "inside": inside, "outside": outside}
            for name, view in views.items():
                right[name] += contains(nano.ask(view, question.text).text, question.short)
            asked += 1
    assert right["inside"] >= 0.9 * right["whole"] > 0.6 * asked
    assert right["outside"] <= 0.05 * asked
