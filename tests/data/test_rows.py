"""Files of questions: layouts, answers, boxes, turned and damaged pictures."""

import json

import pytest
import torch
from PIL import Image

from nanoglimpse.config import read_config
from nanoglimpse.data.qa import QA, token_mask
from nanoglimpse.data.sources import FileExamples
from nanoglimpse.data.viscot import read_questions
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.__main__ import main as evaluate
from nanoglimpse.evaluate.questions import FileQuestions
from nanoglimpse.evaluate.scores import anls, best, contains, exact, token_f1
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.train.__main__ import main as train
from nanoglimpse.world.__main__ import main as write_world

ROW = {"image": "a.png", "question": "q?", "answer": "7"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (56, 28), "white").save(tmp_path / "a.png")
    return tmp_path


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(folder, **changes):
    return read_questions(write(folder / "rows.jsonl", ROW | changes), folder)


@pytest.mark.parametrize(
    ("box", "seen"),
    [
        ((-0.5, -0.2, 0.4, 0.5), (0, 0, 0.4, 0.5)),
        ((0.5, 0.5, 1.5, 1.2), (0.5, 0.5, 1, 1)),
        ((-1, -1, 2, 2), (0, 0, 1, 1)),
        ((-0.5, 0.1, -0.1, 0.2), None),
        ((0.1, -0.9, 0.2, -0.1), None),
        ((1.1, 0.1, 1.2, 0.2), None),
        ((0.1, 1, 0.2, 1.2), None),
        ((0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0.3)),
    ],
)
def test_boxes_are_clipped_and_outside_is_no_evidence(folder, box, seen):
    (row,) = one(folder, boxes=[box]).checked()
    opened = row.opened()
    assert opened.boxes == (() if seen is None else (seen,))
    assert opened.outside == (seen is None)


@pytest.mark.parametrize("box", [(-0.5, -0.5, -0.1, -0.1), (0.2, -0.5, 0.4, -0.1)])
def test_cells_outside_are_not_marked(tiny_folder, box):
    config = read_config(tiny_folder / "config.json")
    assert not token_mask([box], (1, 8, 8), config).any()
    grown = [(-0.5, -0.5, 0.1, 0.1)]
    assert token_mask(grown, (1, 8, 8), config).nonzero().flatten().tolist() == [0]


REFUSED = {
    "pixels": ({"boxes": [[10, 20, 100, 200]]}, "200 looks like pixels or thousandths"),
    "thousandths": ({"boxes": [[0, 0, 1000, 500]]}, "1000 looks like pixels or thousandths"),
    "order": ({"boxes": [[0.5, 0.1, 0.2, 0.3]]}, "looks like x, y, width, height"),
    "order of rows": ({"boxes": [[0.1, 0.5, 0.2, 0.3]]}, "ends before it begins"),
    "huge": ({"boxes": [[0, 0, 10**400, 1]]}, "is no position"),
    "text": ({"boxes": [["0", 0, 1, 1]]}, 'expected a number, got "0"'),
    "true": ({"boxes": [[True, 0, 1, 1]]}, "expected a number, got true"),
    "three": ({"boxes": [[0, 0, 1]]}, "must be a list of [x0, y0, x1, y1]"),
    "flat": ({"boxes": [0, 0, 1, 1]}, "must be a list of [x0, y0, x1, y1]"),
    "null": ({"boxes": None}, "must be a list of [x0, y0, x1, y1], got null"),
    "width 0": ({"bboxs": [[0, 0, 1, 1]], "width": 0, "height": 9}, "must be more than 0"),
    "no height": ({"bboxs": [[0, 0, 1, 1]], "width": 9}, "has no key 'height'"),
    "shares": (
        {"bboxs": [[0.1, 0.2, 0.3, 0.4]], "width": 56, "height": 28},
        "these look like shares",
    ),
    "no answer": ({"answer": None}, "answer must be text or a list of texts, got null"),
    "null in answers": ({"answer": ["7", None]}, 'got ["7", null]'),
    "no answers": ({"answer": []}, "answer must be text or a list of texts, got []"),
    "empty answer": ({"answer": " "}, "answer must be text"),
    "an object": ({"answer": {"a": 1}}, "answer must be text"),
    "null short": ({"short": None}, "short must be text"),
    "no question": ({"question": ""}, "question must be text"),
    "question of lists": ({"question": [1]}, "question must be text, got [1]"),
    "no picture": ({"image": None}, "image must be text, got null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_rows_are_refused_by_name(folder, name):
    changes, message = REFUSED[name]
    write(folder / "rows.jsonl", ROW, ROW | changes, ROW, ROW | changes)
    read = read_questions(folder / "rows.jsonl", folder)
    assert len(read.rows) == 2
    with pytest.raises(UsageError) as error:
        read.checked()
    assert message in str(error.value)
    assert f"{folder}/rows.jsonl, line 2," in str(error.value)
    assert str(error.value).endswith("; 1 more rows are wrong")


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STORED, BOX = (120, 40), (12, 4, 48, 12)  # as shares 0.1, 0.1, 0.4, 0.3


def turned_picture(path, orientation):
    """White with a black box; stored as it is, and seen turned."""
    image = Image.new("RGB", STORED, "white")
    image.paste("black", BOX)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return image.transpose(TURNED[orientation]) if orientation in TURNED else image


def black(image):
    """The box of what is black, as shares."""
    dark = image.convert("L").point(lambda value: 255 * (value < 128))
    x0, y0, x1, y1 = dark.getbbox()
    return x0 / image.width, y0 / image.height, x1 / image.width, y1 / image.height


@pytest.mark.parametrize("orientation", [1, *TURNED])
def test_boxes_turn_with_the_picture(tmp_path, orientation):
    seen = turned_picture(tmp_path / "a.png", orientation)
    wide, high = seen.size
    box = black(seen)
    pixels = [box[0] * wide, box[1] * high, box[2] * wide, box[3] * high]
    row = {"bboxs": [pixels], "width": wide, "height": high}
    rows = [row, {"bboxs": [pixels]}, {"boxes": [box]}]
    if seen.size != STORED:
        # Boxes of the picture as it is stored, as programs see it that do not read EXIF.
        rows.append({"bboxs": [BOX], "width": STORED[0], "height": STORED[1]})
        rows.append({"bboxs": [BOX], "width": STORED[0] // 2, "height": STORED[1] // 2})
        rows[-1]["bboxs"] = [[at / 2 for at in BOX]]
        rows.append({"bboxs": [[60, 4, 108, 12]]})
    for number, changes in enumerate(rows):
        (read,) = one(tmp_path, **changes).checked()
        opened = read.opened()
        assert opened.image.size == seen.size
        if number < 5:
            assert opened.boxes[0] == pytest.approx(box), changes
            assert black(opened.image) == pytest.approx(box)
        else:
            assert not opened.outside


def test_a_picture_of_another_shape_is_refused(tmp_path):
    turned_picture(tmp_path / "a.png", 6)
    (row,) = one(tmp_path, bboxs=[[1, 1, 2, 2]], width=100, height=90).checked()
    with pytest.raises(UsageError, match=r"100 × 90 px, but .*a\.png has 40 × 120 px"):
        row.opened()


def test_the_size_of_the_picture_stands_in_for_one_that_is_missing(folder):
    (row,) = one(folder, bboxs=[[14, 7, 28, 14]]).checked()
    assert row.opened().boxes == ((0.25, 0.25, 0.5, 0.5),)


def test_several_answers(folder):
    (row,) = one(folder, answer=["It is 70.", "It is seventy."], short=["70", "seventy"]).checked()
    assert (row.qa.answer, row.qa.short) == ("It is 70.", "70")
    assert row.qa.brief().answers == ("70", "seventy")
    (row,) = one(folder, answer=["70", "seventy", 70]).checked()
    assert (row.qa.answers, row.qa.shorts) == (("70", "seventy"),) * 2
    (row,) = one(folder, answer=["It is 70.", "seventy"], short="70").checked()
    assert row.qa.shorts == ("70", "seventy")
    (row,) = one(folder, answer=7.5).checked()
    assert row.qa.answer == "7.5"


def test_the_best_of_several_answers_counts():
    answers = ("70", "seventy")
    for score in (contains, exact, anls, token_f1):
        assert best(score, "Seventy", answers) == best(score, "70", answers) == 1
        assert best(score, "eleven", answers) == 0
    assert best(anls, "seventi", answers) == anls("seventi", "seventy") > 0


def test_one_reader_for_lines(folder):
    rows = [ROW | {"question": "a\u2028b\u0085c?"}, ROW]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_questions(folder / "rows.jsonl", folder).checked()
    assert [row.qa.question for row in found] == ["a\u2028b\u0085c?", "q?"]
    assert [row.name for row in found] == ["rows 1", "rows 2"]


def test_ids_that_repeat_are_told_apart(folder):
    rows = [ROW | {"dataset": d, "question_id": i} for d, i in (("x", 1), ("y", 1), ("x", 2))]
    found = read_questions(write(folder / "rows.jsonl", *rows, rows[2]), folder).checked()
    names = ["rows 1 of x", "rows 1 of y", "rows 2 of x (3)", "rows 2 of x (4)"]
    assert [row.name for row in found] == names


def test_files_of_one_name_are_told_apart(folder):
    paths = []
    for name in ("x", "y"):
        (folder / name).mkdir()
        paths.append(write(folder / name / "rows.jsonl", ROW))
    source = FileQuestions(paths, folder, None)
    assert len({question.name for question in source.questions(False)}) == 2
    assert len(source.identity) == 2
    with pytest.raises(UsageError, match="is given twice; give every file once"):
        FileQuestions([paths[0], folder / "x" / ".." / "x" / "rows.jsonl"], folder, None)


def damage(folder):
    """Pictures that are good, missing, cut off, no pictures at all, and too thin."""
    noise = torch.randint(0, 256, (28 * 56 * 3,), dtype=torch.uint8)
    Image.frombytes("RGB", (56, 28), bytes(noise.tolist())).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "none.png").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (3000, 2)).save(folder / "thin.png")
    names = ["a.png", "gone.png", "cut.png", "none.png", "empty.png", "thin.png", "a.png"]
    box = [[0.1, 0.1, 0.5, 0.5]]
    rows = [ROW | {"image": name, "boxes": box, "question_id": name} for name in names]
    rows[-1]["question_id"] = "outside"
    rows[-1]["boxes"] = [[1.5, 1.5, 1.8, 1.8]]
    return write(folder / "rows.jsonl", *rows)


def test_training_leaves_damaged_pictures_out(folder):
    source = FileExamples(damage(folder), folder, 0)
    assert [row.name for row in source.rows] == ["rows a.png", "rows outside"]
    assert (source.count, source.located) == (2, 1)
    assert source.missing == [str(folder / "gone.png")]
    assert len(source.damaged) == 4
    for name, line in zip(("cut", "none", "empty", "thin"), source.damaged, strict=True):
        assert f"{folder}/{name}.png" in line
    said = "\n".join(source.lacks())
    assert "1 questions are left out, since their pictures are missing" in said
    assert "4 questions are left out: " in said
    assert "1 questions have boxes outside their picture only, so no evidence: rows outside" in said
    assert [bool(source.examples(n)[0].qas[0].boxes) for n in range(2)].count(True) == 1


@pytest.mark.slow
def test_evaluation_goes_on_after_damaged_pictures(folder, capsys):
    out = folder / "results.jsonl"
    command = ["--data", str(damage(folder)), "--methods", "nothing", "--device", "cpu"]
    command += ["--max-new-tokens", "2", "--out", str(out), "--batch", "3"]
    for _ in range(2):
        assert evaluate(command) == 0
        error = capsys.readouterr().err
        assert "4 questions failed: " in error
        assert f"{folder}/cut.png is damaged" in error
        assert "the boxes of 1 questions are outside the picture: rows outside" in error
        results = ResultsFile.read(out)
        assert [row["question"] for row in results.rows] == ["rows a.png", "rows outside"]
        assert [row["recall"] is None for row in results.rows] == [False, True]
        assert sorted(results.errors) == [f"rows {n}.png" for n in ("cut", "empty", "none", "thin")]
    assert sum('"error"' in line for line in out.read_text().splitlines()) == 4
    assert evaluate(["report", str(out)]) == 0
    assert "results.jsonl: 4 questions failed: " in capsys.readouterr().out
    # A picture that has been repaired is asked about.
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes())
    assert evaluate(command) == 0
    assert "3 questions failed" in capsys.readouterr().err
    assert len(ResultsFile.read(out).rows) == 3


@pytest.mark.slow
def test_checking_a_file(folder, capsys):
    path = damage(folder)
    sheet = folder / "sheet.png"
    assert train(["check", str(path), "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    for line in (
        "rows        7 questions, 0 refused",
        "usable      2 questions about 1 pictures",
        "evidence    1 questions",
        "trained on  2 questions",
        "held out    0 questions",
        "lacks       4 questions are left out: ",
        f"sheet       {sheet}",
    ):
        assert line in out
    with Image.open(sheet) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert (230, 0, 120) in [colour for _, colour in colours]
    assert train(["check", str(path), "--sheet", str(folder / "a.png")]) == 2
    assert "would overwrite" in capsys.readouterr().err
    write(folder / "bad.jsonl", ROW, ROW | {"answer": None}, ROW | {"boxes": [[0, 0, 9, 9]]})
    assert train(["check", str(folder / "bad.jsonl"), "--sheet", str(sheet)]) == 2
    shown = capsys.readouterr()
    assert "rows        1 questions, 2 refused" in shown.out
    assert "line 2, is not a question with evidence: answer must be" in shown.out
    assert "line 3, is not a question with evidence: boxes must be shares" in shown.out
    assert shown.err.count("\n") == 1


@pytest.mark.slow
def test_the_benchmark_can_be_trained_on_and_checked(tmp_path, capsys):
    world = ["--out", str(tmp_path), "--count", "3", "--canvas", "280", "--quiet"]
    assert write_world(world) == 0
    plain = FileExamples(tmp_path / "questions.jsonl", tmp_path, 0)
    benchmark = FileExamples(tmp_path / "viscot.json", tmp_path, 0)
    assert benchmark.located == len(benchmark.rows) == plain.located > 10
    assert benchmark.examples(0)[0].qas[0].boxes
    command = ["check", str(tmp_path / "viscot.json"), "--sheet", str(tmp_path / "s.png")]
    assert train(command) == 0
    assert "held out" in capsys.readouterr().out


@pytest.mark.slow
def test_training_without_evidence_says_what_lacks(folder, tmp_path, capsys):
    path = write(folder / "rows.jsonl", ROW, ROW | {"boxes": []})
    command = ["glimpse", str(tmp_path / "run"), "--model", "nano", "--device", "cpu"]
    assert train([*command, "--data", str(path)]) == 2
    shown = capsys.readouterr()
    assert "1 questions have no boxes and train the language loss alone: rows 1" in shown.out
    assert "rows.jsonl has no evidence: its rows need boxes" in shown.err
    assert not (tmp_path / "run").exists()


def test_a_decoder_that_fails_in_its_own_way_is_one_line(folder, monkeypatch):
    def fail(image):
        raise RuntimeError("decoder")

    (row,) = one(folder).checked()
    monkeypatch.setattr("nanoglimpse.pictures.picture.to_rgb", fail)
    with pytest.raises(NanoglimpseError, match=r"a.png .*decoder"):
        row.opened()


def test_a_brief_prompt_has_the_short_answers():
    qa = QA("q?", "It is 7.", "7", (), ("It is 7.", "It is seven."), ("7", "seven"))
    assert (qa.brief().answer, qa.brief().answers) == ("7", ("7", "seven"))
