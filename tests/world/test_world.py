"""The synthetic world: pictures are reproducible and answers are right."""

import hashlib
import json
import os
import re
import statistics
import string
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image, ImageChops

from nanoglimpse.cli import console
from nanoglimpse.errors import UsageError
from nanoglimpse.world import DOMAINS, QUESTION_KINDS, SPLITS, render, scene
from nanoglimpse.world.__main__ import main
from nanoglimpse.world.canvas import RGB
from nanoglimpse.world.types import COLOURS, KINDS, LEFT_OUT_PAIRS, SHAPES, split_of
from nanoglimpse.world.words import NAMES, TRANSFER_NAMES

STARTS = {name: seeds.start for name, seeds in SPLITS.items()}


@pytest.fixture(scope="module")
def pictures():
    """Pictures of every domain and split, at random and at extreme sizes."""
    own = [
        render(seed, index, domain=domain)
        for seed in STARTS.values()
        for domain in DOMAINS
        for index in range(18)
    ]
    odd = [
        render(5, index, domain=domain, canvas=canvas)
        for domain in DOMAINS
        for canvas in ((112, 112), (112, 560), (560, 168))
        for index in range(8)
    ]
    return own + odd


def in_domain(pictures, domain):
    return [picture for picture in pictures if picture.domain == domain]


def questions_of(pictures, domain, *kinds):
    """Pairs of picture and question of the given kinds, each of which must occur."""
    found = [(p, q) for p in in_domain(pictures, domain) for q in p.questions if q.kind in kinds]
    assert {q.kind for _, q in found} == set(kinds)
    return found


def mentioned(question):
    """Colour (or "") and shape (or "object") of the things that a question names, in order."""
    pattern = rf"(?:({'|'.join(COLOURS)}) )?\b({'|'.join(SHAPES)}|object)\b"
    return re.findall(pattern, question.text)


def called(picture, colour, shape):
    """The only thing that matches these words."""
    wanted = {"colour": colour} if colour else {}
    return the(picture, **wanted | ({} if shape == "object" else {"kind": shape}))


def the(picture, **wanted):
    """The only thing with these attributes."""
    (thing,) = (
        thing
        for thing in picture.things
        if all(getattr(thing, key) == value for key, value in wanted.items())
    )
    return thing


def centre(thing, axis, picture):
    return (thing.box[axis] + thing.box[axis + 2]) / 2 * picture.image.size[axis]


DIGEST = """
import hashlib
from nanoglimpse.world import render
for seed, index in ((0, 1), (1_000_000, 2), (2_000_000, 3)):
    for domain in ("scene", "document", "chart"):
        p = render(seed, index, domain=domain)
        drawn = p.image.tobytes() + repr((p.things, p.questions)).encode()
        print(hashlib.sha256(drawn).hexdigest())
"""


@pytest.mark.slow
def test_another_process_makes_the_same_pictures_and_questions():
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 9


def test_a_picture_does_not_depend_on_what_was_drawn_before():
    def digest():
        picture = render(7, 3, domain="scene", canvas=(224, 224))
        return hashlib.sha256(picture.image.tobytes()).digest(), picture.questions

    first = digest()
    render(8, 3)
    assert digest() == first


@pytest.mark.slow
def test_boxes_are_inside_and_not_empty(pictures):
    for picture in pictures:
        assert picture.things
        evidence = [box for question in picture.questions for box in question.boxes]
        own = [box for thing in picture.things for box in (thing.box, *thing.text_boxes)]
        for x0, y0, x1, y1 in evidence + own:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


@pytest.mark.slow
def test_things_are_as_documented(pictures):
    assert set(KINDS) == {thing.kind for picture in pictures for thing in picture.things}
    for picture in pictures:
        for thing in picture.things:
            assert thing.colour in (*COLOURS, "")
            assert all(within(text, thing.box) for text in thing.text_boxes)
        values = [thing.value for thing in picture.things if thing.kind != "total"]
        pairs = [(thing.colour, thing.kind, thing.name) for thing in picture.things]
        assert len(set(values)) == len(values)
        assert len(set(pairs)) == len(pairs)


def within(inner, outer):
    return all(a >= b for a, b in zip(inner[:2], outer[:2], strict=True)) and all(
        a <= b for a, b in zip(inner[2:], outer[2:], strict=True)
    )


def test_boxes_hold_the_objects_that_were_drawn(monkeypatch):
    """The same scene without an object differs exactly in the box of that object."""
    draw = scene._object
    whole = render(11, 4, domain="scene", canvas=(336, 336), num_things=(6, 6))
    for left_out, thing in enumerate(whole.things):
        turn = iter(range(99))

        def skip(rng, image, *rest, turn=turn, left_out=left_out):
            target = image.copy() if next(turn) == left_out else image
            return draw(rng, target, *rest)

        monkeypatch.setattr(scene, "_object", skip)
        less = render(11, 4, domain="scene", canvas=(336, 336), num_things=(6, 6))
        changed = _changed(whole.image, less.image)
        expected = [round(share * 336) for share in thing.box]
        assert changed == pytest.approx(expected, abs=4)


def _changed(one, other):
    return ImageChops.difference(one, other).convert("L").point(lambda v: 255 * (v > 24)).getbbox()


def test_objects_have_their_colour_and_keep_apart(pictures):
    for picture in in_domain(pictures, "scene"):
        for thing in picture.things:
            part = cut(picture, thing.box)
            likeness = alike(part, thing.colour)
            assert likeness.histogram()[255] > 0.2 * part.width * part.height
            assert all(
                apart(thing.box, other.box) for other in picture.things if other is not thing
            )


def alike(image, colour):
    """255 where a pixel has about the colour, else 0."""
    solid = Image.new("RGB", image.size, RGB[colour])
    red, green, blue = ImageChops.difference(image, solid).split()
    furthest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return furthest.point(lambda distance: 255 * (distance < 12))


def cut(picture, box):
    sides = picture.image.size * 2
    return picture.image.crop([round(a * b) for a, b in zip(box, sides, strict=True)])


def apart(a, b):
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_rows_and_bars_keep_apart_and_in_order(pictures):
    for picture in in_domain(pictures, "document"):
        for upper, lower in zip(picture.things, picture.things[1:], strict=False):
            assert upper.text_boxes[0][3] <= lower.text_boxes[0][1] + 0.004
    for picture in in_domain(pictures, "chart"):
        for first, second in zip(picture.things, picture.things[1:], strict=False):
            assert first.box[2] <= second.box[0] + 0.004


def test_text_boxes_have_contrast(pictures):
    for picture in pictures:
        for thing in picture.things:
            assert len(thing.text_boxes) == (1 if picture.domain == "scene" else 2)
            for box in thing.text_boxes:
                dark, light = cut(picture, box).convert("L").getextrema()
                assert light - dark > 70


def test_answers_contain_the_short_answer(pictures):
    for picture in pictures:
        kinds = Counter(question.kind for question in picture.questions)
        assert set(kinds) <= set(QUESTION_KINDS[picture.domain])
        assert max(kinds.values()) <= 3
        for question in picture.questions:
            assert re.search(rf"(?<!\w){re.escape(question.short)}(?!\w)", question.answer, re.I)
            assert bool(question.boxes) == (question.short != "no")
        texts = [(question.kind, question.text) for question in picture.questions]
        assert len(set(texts)) == len(texts)


def test_object_questions_are_right(pictures):
    ways = Counter()
    for picture, question in questions_of(pictures, "scene", "number", "color", "shape"):
        if question.kind == "number":
            (words,) = mentioned(question)
            thing = called(picture, *words)
            ways["number", bool(words[0]), words[1] == "object"] += 1
            assert " ".join(words).strip() in question.answer
            assert question.short == thing.value
            assert thing.value.isdigit() or "number" not in question.text + question.answer
            assert not thing.value.isdigit() or "code" not in question.text + question.answer
        else:
            texts = re.findall(r"\b[A-Z]?\d+\b", question.text)
            words = None if texts else mentioned(question)[0]
            thing = called(picture, *words) if words else the(picture, value=texts[0])
            ways[question.kind, bool(texts)] += 1
            assert (" ".join(words).strip() if words else texts[0]) in question.answer
            assert question.short == (thing.colour if question.kind == "color" else thing.kind)
        assert question.boxes == (thing.box,)
    by_name = {("number", True, False), ("number", True, True), ("number", False, False)}
    assert set(ways) == by_name | {(k, by_text) for k in ("color", "shape") for by_text in (0, 1)}
    assert min(ways.values()) > 0.04 * ways.total()


def test_existence_is_right_and_balanced(pictures):
    answers = Counter()
    for picture, question in questions_of(pictures, "scene", "exists"):
        ((colour, shape),) = mentioned(question)
        there = [i.box for i in picture.things if (i.colour, i.kind) == (colour, shape)]
        assert question.short == ("yes" if there else "no")
        assert question.boxes == tuple(there)
        answers[question.short] += 1
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_comparisons_are_right_and_clear(pictures):
    first = Counter()
    for picture, question in questions_of(pictures, "scene", "left", "above"):
        axis = ("left", "above").index(question.kind)
        words = {" ".join(pair).strip(): called(picture, *pair) for pair in mentioned(question)}
        named = list(words.values())
        before, after = sorted(named, key=lambda thing: centre(thing, axis, picture))
        assert words[question.short] is before
        assert set(question.boxes) == {before.box, after.box}
        assert centre(after, axis, picture) - centre(before, axis, picture) >= 42
        first[named[0] is before] += 1
    assert 0.4 < first[True] / first.total() < 0.6


def test_counts_are_right(pictures):
    for picture, question in questions_of(pictures, "scene", "count"):
        word = next(w for w in (*COLOURS, *SHAPES) if re.search(rf"\b{w}", question.text))
        found = [i.box for i in picture.things if word in (i.colour, i.kind)]
        assert question.short == str(len(found))
        assert 1 <= len(found) <= 5
        assert set(question.boxes) == set(found)


def named(picture, question):
    (name,) = (
        word for word in re.findall(r"\b[a-z]+\b", question.text) if word in names_of(picture)
    )
    return the(picture, name=name)


def names_of(picture):
    return {thing.name for thing in picture.things} - {"total"}


def test_document_questions_are_right(pictures):
    for picture, question in questions_of(pictures, "document", "value", "item", "total"):
        if question.kind == "value":
            thing = named(picture, question)
            assert question.short == thing.value
        elif question.kind == "item":
            (value,) = re.findall(r"\d[\d.]*", question.text)
            thing = the(picture, value=value, kind="row")
            assert question.short == thing.name
        else:
            thing = the(picture, kind="total")
            values = [row.value for row in picture.things if row.kind == "row"]
            cents = sum(int(value.replace(".", "")) for value in values)
            assert int(question.short.replace(".", "")) == cents
            assert question.short == thing.value
        assert question.boxes == (thing.box,)


def test_chart_questions_are_right(pictures):
    for picture, question in questions_of(pictures, "chart", "bar", "largest", "smallest"):
        order = sorted(picture.things, key=lambda bar: int(bar.value))
        if question.kind == "bar":
            thing = named(picture, question)
            assert question.short == thing.value
        else:
            thing = order[-1] if question.kind == "largest" else order[0]
            assert question.short == thing.name
        assert question.boxes == (thing.box,)
        values = [int(bar.value) for bar in order]
        if len(values) > 1:
            assert min(values[1] - values[0], values[-1] - values[-2]) >= 8


def test_heights_of_bars_are_proportional_to_their_values(pictures):
    for picture in in_domain(pictures, "chart"):
        units = []
        for bar in picture.things:
            box = alike(cut(picture, bar.box), bar.colour).getbbox()
            if bar.colour not in ("white", "black"):  # paper and ink may have these colours, too
                units.append(((box[3] - box[1] + 2) / int(bar.value), 3 / int(bar.value)))
        assert all(abs(a - b) <= c + d for a, c in units for b, d in units)


def test_only_the_transfer_split_has_the_left_out_pairs(pictures):
    for picture in in_domain(pictures, "scene"):
        drawn = {(thing.colour, thing.kind) for thing in picture.things}
        spoken = {pair for question in picture.questions for pair in mentioned(question)}
        rare = (drawn | spoken) & set(LEFT_OUT_PAIRS)
        if split_of(picture.seed) == "transfer":
            assert drawn & set(LEFT_OUT_PAIRS)
        else:
            assert not rare


def test_splits_keep_names_and_canvases_apart(pictures):
    assert not set(NAMES) & set(TRANSFER_NAMES)
    assert (len(NAMES), len(TRANSFER_NAMES)) == (60, 16)
    listed = {"heldout": NAMES, "transfer": TRANSFER_NAMES}
    for picture in pictures:
        split = split_of(picture.seed)
        if picture.domain != "scene":
            assert not names_of(picture) & set(TRANSFER_NAMES) or split == "transfer"
            assert split == "train" or names_of(picture) <= set(listed[split])
        assert (max(picture.image.size) >= 700) == (split == "transfer")
        assert all(side % 28 == 0 for side in picture.image.size)


@pytest.mark.slow
def test_most_training_pictures_have_invented_names():
    drawn = [
        names_of(render(seed, index, domain=domain))
        for domain in ("document", "chart")
        for seed, index in ((3, index) for index in range(40))
    ]
    own = [names for names in drawn if not names & set(NAMES)]
    assert all(names <= set(NAMES) for names in drawn if names not in own)
    assert 0.5 < len(own) / len(drawn) < 0.85
    words = [word for names in own for word in names]
    assert len(set(words)) > 0.9 * len(words)
    assert not set(words) & set(TRANSFER_NAMES)
    assert set("".join(words)) == set(string.ascii_lowercase)
    assert {len(word) for word in words} == set(range(3, 8))


def test_every_seed_is_in_one_split():
    for name, seeds in SPLITS.items():
        assert split_of(seeds[0]) == split_of(seeds[-1]) == name
    assert sum(len(seeds) for seeds in SPLITS.values()) == 3_000_000
    for seed in (-1, 3_000_000):
        with pytest.raises(UsageError):
            split_of(seed)


@pytest.mark.parametrize("domain", DOMAINS)
def test_evidence_covers_little_of_the_picture(domain, pictures):
    shares = [
        sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in question.boxes)
        for picture in in_domain(pictures, domain)
        if split_of(picture.seed) != "transfer" and min(picture.image.size) >= 224
        for question in picture.questions
        if question.boxes
    ]
    assert 0.01 < statistics.median(shares) < 0.1


def test_number_and_size_of_things_are_as_specified():
    for domain in DOMAINS:
        things = render(3, 1, domain=domain, canvas=(560, 560), num_things=(4, 4)).things
        assert sum(thing.kind != "total" for thing in things) == 4
    things = render(
        3, 2, domain="scene", canvas=(560, 560), num_things=(5, 5), size=(40, 44)
    ).things
    assert all(39 < (thing.box[2] - thing.box[0]) * 560 < 45 for thing in things)
    assert (
        Counter(q.kind for q in render(3, 3, domain="scene", per_kind=1).questions)["number"] == 1
    )


@pytest.mark.parametrize(
    "options",
    [
        {"domain": "street"},
        {"canvas": (100, 112)},
        {"canvas": (112, 1148)},
        {"num_things": (3, 2)},
        {"num_things": (0, 2)},
        {"size": (5, 9)},
        {"per_kind": 0},
        {"index": -1},
        {"seed": -1},
    ],
)
def test_impossible_pictures_are_refused(options):
    with pytest.raises(UsageError):
        render(**{"seed": 0, "index": 0, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "new"
    assert main(["--count", "6", "--out", str(out), "--seed", "9", "--canvas", "224x280"]) == 0
    return out


@pytest.mark.slow
def test_command_writes_pictures_that_render_again(folder):
    drawn = [render(9, index, canvas=(224, 280)) for index in range(6)]
    names = {f"{picture.domain}_{picture.index:06d}.png" for picture in drawn}
    files = {path.name for path in folder.iterdir()}
    assert files == names | {"questions.jsonl", "viscot.json", "sheet.png"}
    for picture in drawn:
        with Image.open(folder / f"{picture.domain}_{picture.index:06d}.png") as image:
            assert image.convert("RGB").tobytes() == picture.image.tobytes()


def test_command_writes_every_question(folder):
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    expected = [
        (index, q.kind, q.text, q.answer, q.short, [list(box) for box in q.boxes])
        for index in range(6)
        for q in render(9, index, canvas=(224, 280)).questions
    ]
    keys = ("index", "kind", "question", "answer", "short", "boxes")
    assert [tuple(record[key] for key in keys) for record in records] == expected
    assert all((folder / record["image"]).is_file() for record in records)
    assert {record["seed"] for record in records} == {9}


def test_viscot_file_has_every_question_with_evidence(folder):
    records = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    shown = [record for record in records if record["boxes"]]
    entries = json.loads((folder / "viscot.json").read_text())
    assert [entry["question_id"] for entry in entries] == list(range(len(shown)))
    for entry, record in zip(entries, shown, strict=True):
        path, box = entry["image"][1].split("###")
        assert path == entry["image"][0] == record["image"]
        sides = list(zip(*record["boxes"], strict=True))
        union = (min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3]))
        assert json.loads(box) == [round(a * b) for a, b in zip(union, (224, 280) * 2, strict=True)]
        turns = [turn["value"] for turn in entry["conversations"]]
        assert turns[0].startswith(f"<image>\n{record['question']} Please provide the bounding box")
        assert json.loads(turns[1]) == pytest.approx(union, abs=0.001)
        assert turns[2:] == ["<image>", record["answer"]]


@pytest.mark.slow
def test_command_limits_questions_and_shows_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "EVERY", 0.0)
    options = ["--count", "2", "--questions", "2", "--split", "transfer", "--domain", "chart"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.endswith(f"{tmp_path}: pictures 2 of 2\n")
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 4
    assert "2000000" in (tmp_path / "questions.jsonl").read_text()
    options = ["--count", "2", "--kinds", "count", "color", "--domain", "scene"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"count", "color"}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--out", "x", "--count", "0"],
        ["--out", "x", "--canvas", "big"],
        ["--out", "x", "--canvas", "140"],
        ["--out", "x", "--canvas", "450"],
        ["--out", "x", "--seed", "3000000"],
        ["--out", "x", "--seed", "1", "--split", "train"],
        ["--out", __file__],
    ],
)
def test_command_errors_are_one_line(options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("nanoglimpse: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
