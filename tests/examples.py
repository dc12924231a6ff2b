"""The pictures and questions that come with the embedded checkpoint."""

import json

from nanoglimpse.generate import EXAMPLES

ROWS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
SCENES = sorted(EXAMPLES.glob("*.png"))
BUILT_IN = json.loads((EXAMPLES / "built_in.json").read_text())
# What the command line asks without arguments, and the right answer.
SCENE, QUESTION = EXAMPLES / BUILT_IN["image"], BUILT_IN["question"]
(ANSWER,) = (
    row["answer"]
    for row in ROWS
    if (row["image"], row["question"]) == (BUILT_IN["image"], BUILT_IN["question"])
)
