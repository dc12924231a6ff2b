"""What counts as right, and how a pruned model does on questions with evidence."""

import re
from collections.abc import Sequence

from ..engine import Engine
from .examples import Example, token_mask


def contains(reply: str, short: str) -> bool:
    """Whether a reply states the short answer: as whole words, in any case.

    The one measure of accuracy on the world; "It is 17." and "It is 7.50." do not contain 7.
    """
    pattern = rf"(?<![\w.]){re.escape(short)}(?!\w|\.\d)"
    return re.search(pattern, reply, re.IGNORECASE) is not None


def evaluate(engine: Engine, examples: Sequence[Example], **options) -> dict[str, float]:
    """Retention, recall of the evidence's visual tokens, and accuracy, each a mean over questions.

    Args:
        engine: answers greedily, with the pruning rule of its weights.
        examples: pictures with questions; the recall is over those that have evidence.
        options: of `Engine.ask`, such as method and max_ratio.
    """
    kept, recall, right = [], [], []
    for example in examples:
        for asked in example.asked:
            answer = engine.ask(example.image, asked.question, max_new_tokens=64, **options)
            kept.append(float(answer.kept.float().mean()))
            right.append(float(contains(answer.text, asked.short)))
            if asked.boxes:
                mask = token_mask(asked.boxes, answer.grids[0], engine.config)
                recall.append(float(answer.kept.cpu()[mask].float().mean()))
    figures = {"retention": kept, "recall": recall, "accuracy": right}
    return {name: sum(values) / max(len(values), 1) for name, values in figures.items()}
