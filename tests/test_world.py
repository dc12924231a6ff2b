"""The synthetic world: the same everywhere, and every answer right."""

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

from nanoglimpse.errors import UsageError
from nanoglimpse.world import (
    COLOURS,
    DOMAINS,
    KINDS,
    LEFT_OUT_PAIRS,
    NAMES,
    QUESTION_KINDS,
    SHAPES,
    SPLITS,
    TRANSFER_NAMES,
    render,
    scene,
    split_of,
)
from nanoglimpse.world.__main__ import main
from nanoglimpse.world.canvas import RGB

STARTS = {name: seeds.start for name, seeds in SPLITS.items()}


@pytest.fixture(scope="module")
def pictures():
    """Some of every domain and split, at their own sizes and at odd ones."""
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


def of(pictures, domain):
    return [picture for picture in pictures if picture.domain == domain]


def asked(pictures, *kinds):
    """Pictures and their questions of the kinds; there must be some of each."""
    found = [(p, q) for p in pictures for q in p.questions if q.kind in kinds]
    assert {q.kind for _, q in found} == set(kinds)
    return found


def mentioned(question):
    """Colour ("" if unsaid) and shape (or "object") of things in the order that they are named."""
    pattern = rf"(?:({'|'.join(COLOURS)}) )?\b({'|'.join(SHAPES)}|object)\b"
    return re.findall(pattern, question.text)


def called(picture, colour, shape):
    """The one item that these words name."""
    wanted = {"colour": colour} if colour else {}
    return the(picture, **wanted | ({} if shape == "object" else {"kind": shape}))


def the(picture, **wanted):
    """The one item that is like that."""
    (item,) = (
        item
        for item in picture.items
        if all(getattr(item, key) == value for key, value in wanted.items())
    )
    return item


def centre(item, axis, picture):
    return (item.box[axis] + item.box[axis + 2]) / 2 * picture.image.size[axis]


DIGEST = """
import hashlib
from nanoglimpse.world import render
for seed, index in ((0, 1), (1_000_000, 2), (2_000_000, 3)):
    for domain in ("scene", "document", "chart"):
        p = render(seed, index, domain=domain)
        print(hashlib.sha256(p.image.tobytes() + repr((p.items, p.questions)).encode()).hexdigest())
"""


def test_another_process_draws_and_asks_the_same():
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


def test_boxes_are_inside_and_not_empty(pictures):
    for picture in pictures:
        assert picture.items
        evidence = [box for question in picture.questions for box in question.boxes]
        own = [box for item in picture.items for box in (item.box, *item.text_boxes)]
        for x0, y0, x1, y1 in evidence + own:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


def test_items_are_as_documented(pictures):
    assert set(KINDS) == {item.kind for picture in pictures for item in picture.items}
    for picture in pictures:
        for item in picture.items:
            assert item.colour in (*COLOURS, "")
            assert all(within(text, item.box) for text in item.text_boxes)
        values = [item.value for item in picture.items if item.kind != "total"]
        pairs = [(item.colour, item.kind, item.name) for item in picture.items]
        assert len(set(values)) == len(values)
        assert len(set(pairs)) == len(pairs)


def within(inner, outer):
    return all(a >= b for a, b in zip(inner[:2], outer[:2], strict=True)) and all(
        a <= b for a, b in zip(inner[2:], outer[2:], strict=True)
    )


def test_boxes_hold_the_objects_that_were_drawn(monkeypatch):
    """Differences from the same scene without that object lie in its box, up to its edges."""
    draw = scene._object
    whole = render(11, 4, domain="scene", canvas=(336, 336), things=(6, 6))
    for left_out, item in enumerate(whole.items):
        turn = iter(range(99))

        def skip(rng, image, *rest, turn=turn, left_out=left_out):
            target = image.copy() if next(turn) == left_out else image
            return draw(rng, target, *rest)

        monkeypatch.setattr(scene, "_object", skip)
        less = render(11, 4, domain="scene", canvas=(336, 336), things=(6, 6))
        changed = _changed(whole.image, less.image)
        expected = [round(share * 336) for share in item.box]
        assert changed == pytest.approx(expected, abs=4)


def _changed(one, other):
    return ImageChops.difference(one, other).convert("L").point(lambda v: 255 * (v > 24)).getbbox()


def test_objects_have_their_colour_and_keep_apart(pictures):
    for picture in of(pictures, "scene"):
        for item in picture.items:
            part = cut(picture, item.box)
            likeness = alike(part, item.colour)
            assert likeness.histogram()[255] > 0.2 * part.width * part.height
            assert all(apart(item.box, other.box) for other in picture.items if other is not item)


def alike(image, colour):
    """255 where a pixel has the colour, else 0."""
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
    for picture in of(pictures, "document"):
        for upper, lower in zip(picture.items, picture.items[1:], strict=False):
            assert upper.text_boxes[0][3] <= lower.text_boxes[0][1] + 0.004
    for picture in of(pictures, "chart"):
        for first, second in zip(picture.items, picture.items[1:], strict=False):
            assert first.box[2] <= second.box[0] + 0.004


def test_text_stands_out_where_it_is_said_to_be(pictures):
    for picture in pictures:
        for item in picture.items:
            assert len(item.text_boxes) == (1 if picture.domain == "scene" else 2)
            for box in item.text_boxes:
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
    for picture, question in asked(of(pictures, "scene"), "number", "color", "shape"):
        if question.kind == "number":
            (words,) = mentioned(question)
            item = called(picture, *words)
            ways["number", bool(words[0]), words[1] == "object"] += 1
            assert " ".join(words).strip() in question.answer
            assert question.short == item.value
            assert item.value.isdigit() or "number" not in question.text + question.answer
            assert not item.value.isdigit() or "code" not in question.text + question.answer
        else:
            texts = re.findall(r"\b[A-Z]?\d+\b", question.text)
            words = None if texts else mentioned(question)[0]
            item = called(picture, *words) if words else the(picture, value=texts[0])
            ways[question.kind, bool(texts)] += 1
            assert (" ".join(words).strip() if words else texts[0]) in question.answer
            assert question.short == (item.colour if question.kind == "color" else item.kind)
        assert question.boxes == (item.box,)
    by_name = {("number", True, False), ("number", True, True), ("number", False, False)}
    assert set(ways) == by_name | {(k, by_text) for k in ("color", "shape") for by_text in (0, 1)}
    assert min(ways.values()) > 0.04 * ways.total()


def test_existence_is_right_and_balanced(pictures):
    answers = Counter()
    for picture, question in asked(of(pictures, "scene"), "exists"):
        ((colour, shape),) = mentioned(question)
        there = [i.box for i in picture.items if (i.colour, i.kind) == (colour, shape)]
        assert question.short == ("yes" if there else "no")
        assert question.boxes == tuple(there)
        answers[question.short] += 1
    assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_comparisons_are_right_and_clear(pictures):
    first = Counter()
    for picture, question in asked(of(pictures, "scene"), "left", "above"):
        axis = ("left", "above").index(question.kind)
        words = {" ".join(pair).strip(): called(picture, *pair) for pair in mentioned(question)}
        named = list(words.values())
        before, after = sorted(named, key=lambda item: centre(item, axis, picture))
        assert words[question.short] is before
        assert set(question.boxes) == {before.box, after.box}
        assert centre(after, axis, picture) - centre(before, axis, picture) >= 42
        first[named[0] is before] += 1
    assert 0.4 < first[True] / first.total() < 0.6


def test_counts_are_right(pictures):
    for picture, question in asked(of(pictures, "scene"), "count"):
        word = next(w for w in (*COLOURS, *SHAPES) if re.search(rf"\b{w}", question.text))
        found = [i.box for i in picture.items if word in (i.colour, i.kind)]
        assert question.short == str(len(found))
        assert 1 <= len(found) <= 5
        assert set(question.boxes) == set(found)


def named(picture, question):
    (name,) = (
        word for word in re.findall(r"\b[a-z]+\b", question.text) if word in names_of(picture)
    )
    return the(picture, name=name)


def names_of(picture):
    return {item.name for item in picture.items} - {"total"}


def test_document_questions_are_right(pictures):
    for picture, question in asked(of(pictures, "document"), "value", "item", "total"):
        if question.kind == "value":
            item = named(picture, question)
            assert question.short == item.value
        elif question.kind == "item":
            (value,) = re.findall(r"\d[\d.]*", question.text)
            item = the(picture, value=value, kind="row")
            assert question.short == item.name
        else:
            item = the(picture, kind="total")
            values = [row.value for row in picture.items if row.kind == "row"]
            cents = sum(int(value.replace(".", "")) for value in values)
            assert int(question.short.replace(".", "")) == cents
            assert question.short == item.value
        assert question.boxes == (item.box,)


def test_chart_questions_are_right(pictures):
    for picture, question in asked(of(pictures, "chart"), "bar", "largest", "smallest"):
        order = sorted(picture.items, key=lambda bar: int(bar.value))
        if question.kind == "bar":
            item = named(picture, question)
            assert question.short == item.value
        else:
            item = order[-1] if question.kind == "largest" else order[0]
            assert question.short == item.name
        assert question.boxes == (item.box,)
        values = [int(bar.value) for bar in order]
        if len(values) > 1:
            assert min(values[1] - values[0], values[-1] - values[-2]) >= 8


def test_bars_are_as_high_as_they_say(pictures):
    for picture in of(pictures, "chart"):
        units = []
        for bar in picture.items:
            box = alike(cut(picture, bar.box), bar.colour).getbbox()
            if bar.colour not in ("white", "black"):  # which paper and ink may be, too
                units.append(((box[3] - box[1] + 2) / int(bar.value), 3 / int(bar.value)))
        assert all(abs(a - b) <= c + d for a, c in units for b, d in units)


def test_left_out_pairs_appear_in_transfer_alone(pictures):
    for picture in of(pictures, "scene"):
        drawn = {(item.colour, item.kind) for item in picture.items}
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


def test_most_training_pictures_have_words_of_their_own():
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
        for picture in of(pictures, domain)
        if split_of(picture.seed) != "transfer" and min(picture.image.size) >= 224
        for question in picture.questions
        if question.boxes
    ]
    assert 0.01 < statistics.median(shares) < 0.1


def test_things_and_size_are_as_asked():
    for domain in DOMAINS:
        items = render(3, 1, domain=domain, canvas=(560, 560), things=(4, 4)).items
        assert sum(item.kind != "total" for item in items) == 4
    items = render(3, 2, domain="scene", canvas=(560, 560), things=(5, 5), size=(40, 44)).items
    assert all(39 < (item.box[2] - item.box[0]) * 560 < 45 for item in items)
    assert (
        Counter(q.kind for q in render(3, 3, domain="scene", per_kind=1).questions)["number"] == 1
    )


@pytest.mark.parametrize(
    "options",
    [
        {"domain": "street"},
        {"canvas": (100, 112)},
        {"canvas": (112, 1148)},
        {"things": (3, 2)},
        {"things": (0, 2)},
        {"size": (5, 9)},
        {"per_kind": 0},
        {"index": -1},
        {"seed": -1},
    ],
)
def test_what_cannot_be_drawn_is_refused(options):
    with pytest.raises(UsageError):
        render(**{"seed": 0, "index": 0, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "new"
    assert main(["--count", "6", "--out", str(out), "--seed", "9", "--canvas", "224x280"]) == 0
    return out


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


def test_viscot_has_all_with_evidence(folder):
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


def test_command_limits_questions_and_shows_progress(tmp_path, capsys):
    options = ["--count", "2", "--questions", "2", "--split", "transfer", "--domain", "chart"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.endswith("2 of 2 pictures\n")
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
