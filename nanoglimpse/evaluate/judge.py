"""A language model as judge, through any endpoint that speaks OpenAI's chat protocol.

As in the paper (App. B.2) it sees question, reference and answer, and gives 0 to 1, more the closer
the answer comes; its words count if they hold exactly one score, and 0 is given otherwise. The
paper sampled at a temperature of 0.7 with top-p 0.8; 0 is the default here, so that a verdict can
be repeated.
"""

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from itertools import islice
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..errors import NanoglimpseError, UsageError
from ..world import BRIEF_SUFFIX
from .store import Results

KEY = "OPENAI_API_KEY"
RULES = (
    "You grade answers to questions about pictures. You do not see the picture: go by the "
    "reference. Give 1 to an answer that says what the reference says, 0 to one that does not, and "
    "something between to one that is partly right, the more the closer it comes. Wording, length "
    'and politeness do not count. End with one line of the form "score: x", x a number from 0 to 1.'
)
TASK = "question: {asked}\nreference: {wanted}\nanswer to grade: {reply}"
SCORE = re.compile(r"score\W{0,4}:\W{0,4}?(-?\d+(?:\.\d+)?)")
TOP_P, MAX_TOKENS, SEED = 0.8, 512, 42
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Judge:
    """An endpoint and a model there.

    Attributes:
        url: up to and without /chat/completions.
        model: its name there.
        temperature: 0, or 0.7 as in the paper.
        retries: after the first try, each waiting twice as long as the one before.
        wait: seconds before the first of them.
        timeout: seconds for an answer.
    """

    url: str
    model: str
    temperature: float = 0.0
    retries: int = 5
    wait: float = 1.0
    timeout: float = 120.0

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"--judge-url {self.url} is no address like http://localhost:8000/v1")

    @property
    def name(self) -> str:
        """As it stands in results."""
        return f"{self.model} at {self.temperature:g}"

    def verdict(self, row: dict) -> dict:
        """A record for a result.

        Raises:
            NanoglimpseError: the endpoint refuses, or does not answer in all tries.
        """
        said = self._ask(row)
        score = read_score(said)
        return {
            "verdict": self.name,
            "arm": row["arm"],
            "question": row["question"],
            "score": score or 0.0,
            "understood": score is not None,
            "said": said,
        }

    def _ask(self, row: dict) -> str:
        for attempt in range(self.retries + 1):
            try:
                return self._post(row)
            except HTTPError as error:
                error.close()
                reason = f"{error.code} {error.reason}"
                if error.code not in AGAIN:
                    raise NanoglimpseError(f"the judge at {self.url} refuses: {reason}") from None
            except (URLError, HTTPException, OSError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                reason = f"what it says is no chat completion ({type(error).__name__})"
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise NanoglimpseError(
            f"the judge at {self.url} gave no verdict in {self.retries + 1} tries: {reason}; the "
            "same command goes on later"
        )

    def _post(self, row: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(self._body(row)).encode()
        request = Request(f"{self.url.rstrip('/')}/chat/completions", data, headers)
        with urlopen(request, timeout=self.timeout) as response:
            said = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(said, str):
            raise TypeError("content is no text")
        return said

    def _body(self, row: dict) -> dict:
        question = row["asked"].removesuffix(BRIEF_SUFFIX)
        task = TASK.format(asked=question, wanted=row["wanted"], reply=row["reply"])
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": RULES},
                {"role": "user", "content": task},
            ],
            "temperature": self.temperature,
            "max_tokens": MAX_TOKENS,
            "seed": SEED,
        }
        return body | ({"top_p": TOP_P} if self.temperature else {})


def read_score(said: str) -> float | None:
    """The one score in a judge's words, in 0…1; None if there is none, or several."""
    found = SCORE.findall(said.lower())
    return min(max(float(found[0]), 0.0), 1.0) if len(found) == 1 else None


def grade(
    results: Results, judge: Judge, workers: int, progress: Callable[[int, int], None]
) -> None:
    """Has everything graded that is not; verdicts are kept as they come.

    Raises:
        UsageError: another judge has graded here.
        NanoglimpseError: as `Judge.verdict`; what was graded before is kept.
    """
    for verdict in results.verdicts.values():
        if verdict["verdict"] != judge.name:
            raise UsageError(
                f"{results.path} was graded by {verdict['verdict']}, not {judge.name}; grade a "
                "copy without its verdicts"
            )
    left = [row for row in results.rows if (row["arm"], row["question"]) not in results.verdicts]
    done = len(results.rows) - len(left)
    with ThreadPoolExecutor(workers) as pool:
        for verdict in _as_asked(pool, workers, judge, left):
            results.add([verdict])
            done += 1
            progress(done, len(results.rows))


def _as_asked(
    pool: ThreadPoolExecutor, workers: int, judge: Judge, rows: list[dict]
) -> Iterator[dict]:
    """Verdicts in order, so many asked at a time; after a failure no more are."""
    left = iter(rows)
    asked = deque(pool.submit(judge.verdict, row) for row in islice(left, workers))
    while asked:
        verdict = asked.popleft().result()
        asked.extend(pool.submit(judge.verdict, row) for row in islice(left, 1))
        yield verdict
