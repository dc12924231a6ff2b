"""A language model as judge, through any endpoint that speaks OpenAI's chat protocol.

As in the paper (App. B.2) the judge gets question, reference and answer, and returns a score from 0
to 1. A verdict that does not hold exactly one score counts as 0. The paper sampled verdicts at a
temperature of 0.7 with top-p 0.8; the default temperature here is 0, so that a verdict can be
repeated.
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

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.world import BRIEF_SUFFIX

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
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model that grades.

    Attributes:
        url: the address without /chat/completions.
        model: the name of the model at the endpoint.
        temperature: 0, or 0.7 as in the paper.
        retries: tries after the first one; the wait before them doubles each time.
        wait: seconds before the first retry.
        timeout: seconds before a request counts as failed.
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
            raise UsageError(
                f"--judge-url must be an address like http://localhost:8000/v1, got {self.url}"
            )

    @property
    def name(self) -> str:
        """The name in verdicts."""
        return f"{self.model} at {self.temperature:g}"

    def verdict(self, row: dict) -> dict:
        """Grades a result and returns the record of the verdict.

        Raises:
            NanoglimpseError: the endpoint refuses the request, or every try fails.
        """
        reply = self._request(row)
        score = read_score(reply)
        return {
            "verdict": self.name,
            "arm": row["arm"],
            "question": row["question"],
            "score": score or 0.0,
            "understood": score is not None,
            "said": reply,
        }

    def _request(self, row: dict) -> str:
        for attempt in range(self.retries + 1):
            try:
                return self._post(row)
            except HTTPError as error:
                error.close()
                reason = f"{error.code} {error.reason}"
                if error.code not in RETRIED:
                    message = f"the judge at {self.url} refuses the request: {reason}"
                    raise NanoglimpseError(message) from None
            except (URLError, HTTPException, OSError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                reason = f"the response is not a chat completion ({type(error).__name__})"
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise NanoglimpseError(
            f"the judge at {self.url} gave no verdict in {self.retries + 1} tries: {reason}; "
            "repeat the command to continue"
        )

    def _post(self, row: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(self._body(row)).encode()
        request = Request(f"{self.url.rstrip('/')}/chat/completions", data, headers)
        with urlopen(request, timeout=self.timeout) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("content is not text")
        return content

    def _body(self, row: dict) -> dict:
        question = row["asked"].removesuffix(BRIEF_SUFFIX)
        task = TASK.format(asked=question, wanted=row["wanted"], reply=row["reply"])
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": RULES}, {"role": "user", "content": task}],
            "temperature": self.temperature,
            "max_tokens": MAX_TOKENS,
            "seed": SEED,
        }
        return body | ({"top_p": TOP_P} if self.temperature else {})


def read_score(reply: str) -> float | None:
    """The score in a judge's reply, clamped to [0, 1]; None unless there is exactly one."""
    found = SCORE.findall(reply.lower())
    return min(max(float(found[0]), 0.0), 1.0) if len(found) == 1 else None


def grade(
    results: ResultsFile, judge: Judge, workers: int, progress: Callable[[int, int], None]
) -> None:
    """Grades the results that have no verdict yet; every verdict is written as it arrives.

    Args:
        results: the file of results.
        judge: the judge.
        workers: requests at a time.
        progress: called with the numbers of graded and of all results.

    Raises:
        UsageError: the file has verdicts of another judge.
        NanoglimpseError: as in `Judge.verdict`; earlier verdicts are kept.
    """
    for verdict in results.verdicts.values():
        if verdict["verdict"] != judge.name:
            raise UsageError(
                f"{results.path} was graded by {verdict['verdict']}, not {judge.name}; grade a "
                "copy of it without verdicts"
            )
    ungraded = [
        row for row in results.rows if (row["arm"], row["question"]) not in results.verdicts
    ]
    done = len(results.rows) - len(ungraded)
    with ThreadPoolExecutor(workers) as pool:
        for verdict in _verdicts(pool, workers, judge, ungraded):
            results.add([verdict])
            done += 1
            progress(done, len(results.rows))


def _verdicts(
    pool: ThreadPoolExecutor, workers: int, judge: Judge, rows: list[dict]
) -> Iterator[dict]:
    """Verdicts in the order of the rows; nothing is submitted after a failure."""
    remaining = iter(rows)
    pending = deque(pool.submit(judge.verdict, row) for row in islice(remaining, workers))
    while pending:
        verdict = pending.popleft().result()
        pending.extend(pool.submit(judge.verdict, row) for row in islice(remaining, 1))
        yield verdict
