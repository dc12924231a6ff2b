"""What fp32 nano answers, and which visual tokens it keeps, as a committed record.

The record is written by `python -m tests.test_digest`. Masks are compared where every token's
probability is more than MARGIN away from the threshold, so that another order of additions on
another machine cannot flip one.
"""

import json
from pathlib import Path

import pytest

import nanoglimpse

EXAMPLES = Path(__file__).parents[1] / "weights" / "nano" / "examples"
RECORD = Path(__file__).with_name("digest.json")
MARGIN, EVERY = 1e-3, 6


def answers():
    """[picture, question, token ids, kept tokens as hex, smallest distance to the threshold]."""
    engine = nanoglimpse.load("nano", device="cpu", dtype="float32")
    threshold = engine.glimpse.config.reduce_threshold
    lines = (EXAMPLES / "questions.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines[::EVERY]):
        answer = engine.ask(str(EXAMPLES / row["image"]), row["question"])
        bits = "".join(map(str, answer.kept.int().tolist()))
        margin = float((answer.importance.sigmoid() - threshold).abs().min())
        kept = f"{len(bits)}:{int(bits, 2):x}"
        yield [row["image"], row["question"], answer.token_ids, kept, round(margin, 6)]


@pytest.mark.slow
def test_nano_answers_and_keeps_as_recorded():
    record = json.loads(RECORD.read_text("utf-8"))
    found = list(answers())
    assert [row[:3] for row in found] == [row[:3] for row in record]
    firm = [number for number, row in enumerate(record) if row[4] > MARGIN]
    assert len(firm) > len(record) / 2
    assert [found[number][3] for number in firm] == [record[number][3] for number in firm]


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(row) for row in answers())
    RECORD.write_text(f"[\n{rows}\n]\n", "utf-8")
