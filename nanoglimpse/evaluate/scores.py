"""What an answer is worth: four scores of its text, two of the cells that were kept for it."""

import re
import string
from collections import Counter

from torch import Tensor

# Below this similarity ANLS counts an answer as wrong (Biten et al., arXiv 1905.13648).
ANLS_FLOOR = 0.5


def contains(reply: str, short: str) -> bool:
    """Whether a reply states the short answer: as whole words, in any case.

    "It is 17." and "It is 7.50." do not contain 7.
    """
    pattern = rf"(?<![\w.]){re.escape(short)}(?!\w|\.\d)"
    return re.search(pattern, reply, re.IGNORECASE) is not None


def exact(reply: str, wanted: str) -> bool:
    """Whether a reply is the answer, but for case and the space around it."""
    return reply.strip().lower() == wanted.strip().lower()


def anls(reply: str, wanted: str) -> float:
    """Levenshtein similarity in 0…1 without regard to case, 0 below a half."""
    a, b = reply.strip().lower(), wanted.strip().lower()
    similarity = 1 - edits(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= ANLS_FLOOR else 0.0


def edits(a: str, b: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def token_f1(reply: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD counts (arXiv 1606.05250)."""
    said, should = words(reply), words(wanted)
    if not said or not should:
        return float(said == should)
    shared = sum((Counter(said) & Counter(should)).values())
    return 2 * shared / (len(said) + len(should))


def words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def overlap(kept: Tensor, evidence: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Recall and IoU of the kept cells, bool [N], with those under the evidence's boxes.

    None where an answer has no evidence in the picture.
    """
    if not bool(evidence.any()):
        return None, None
    both = int((kept & evidence).sum())
    return both / int(evidence.sum()), both / int((kept | evidence).sum())
