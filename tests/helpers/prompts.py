"""The pictures and questions that come with the embedded checkpoint."""

import json

from nanoglimpse.cli.ask import EXAMPLES, built_in

ROWS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]
SCENES = sorted(EXAMPLES.glob("scene_*.png"))
# What the command line asks without arguments, and the right answer.
SCENE, QUESTION = built_in()
(ANSWER,) = (
    row["answer"] for row in ROWS if (row["image"], row["question"]) == (SCENE.name, QUESTION)
)
