"""Scores of an answer: four of its text and two of the visual tokens that were kept for it."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

# ANLS counts an answer below this similarity as wrong (Biten et al., arXiv 1905.13648).
ANLS_FLOOR = 0.5
Score = TypeVar("Score", bool, float)


def best(score: Callable[[str, str], Score], reply: str, answers: Iterable[str]) -> Score:
    """The score of a reply against that of several right answers to which it comes closest."""
    return max(score(reply, answer) for answer in answers)


def contains(reply: str, short: str) -> bool:
    """Whether a reply contains the short answer as whole words, in upper or lower case.

    "It is 17." and "It is 7.50." do not contain 7.
    """
    pattern = rf"(?<![\w.]){re.escape(short)}(?!\w|\.\d)"
    return re.search(pattern, reply, re.IGNORECASE) is not None


def exact(reply: str, wanted: str) -> bool:
    """Whether a reply equals the answer, ignoring case and surrounding space."""
    return reply.strip().lower() == wanted.strip().lower()


def anls(reply: str, wanted: str) -> float:
    """Levenshtein similarity in [0, 1] ignoring case; 0 if it is below ANLS_FLOOR."""
    a, b = reply.strip().lower(), wanted.strip().lower()
    similarity = 1 - edits(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= ANLS_FLOOR else 0.0


def edits(a: str, b: str) -> int:
    """The Levenshtein distance of two texts."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def token_f1(reply: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, as in SQuAD (arXiv 1606.05250)."""
    found, expected = words(reply), words(wanted)
    if not found or not expected:
        return float(found == expected)
    shared = sum((Counter(found) & Counter(expected)).values())
    return 2 * shared / (len(found) + len(expected))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def overlap(kept: Tensor, evidence: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Recall and IoU of the kept visual tokens, bool [N], against the evidence, bool [N].

    Both are None if there is no evidence in the picture.
    """
    if not bool(evidence.any()):
        return None, None
    both = int((kept & evidence).sum())
    return both / int(evidence.sum()), both / int((kept | evidence).sum())
