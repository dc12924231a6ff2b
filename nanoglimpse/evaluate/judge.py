"""A language model as judge, through any endpoint that speaks OpenAI's chat protocol.

As in the paper (App. B.2) the judge gets question, reference and answer, and returns a score from 0
to 1. A verdict that does not hold exactly one score counts as 0. The paper sampled verdicts at a
temperature of 0.7 with top-p 0.8; the default temperature here is 0, so that a verdict can be
repeated.

The endpoint is not trusted with more than the request: a redirect, which would take the key to
another host, is not followed, and a reply is bounded in bytes and in the time that all of it takes.
"""

import base64
import json
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import islice
from threading import Timer
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.escape import HIDDEN, masked
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
# A verdict of MAX_TOKENS is a few kilobytes.
MAX_BYTES = 2**20
REASON = 200


@dataclass(frozen=True)
class Judge:
    """An endpoint and the model that grades.

    Attributes:
        url: the address without /chat/completions.
        model: the name of the model at the endpoint.
        temperature: 0, or 0.7 as in the paper.
        retries: tries after the first one; the wait before them doubles each time.
        wait: seconds before the first retry.
        timeout: seconds before a request counts as failed, from its first byte to the last of the
            reply.

    Raises:
        UsageError: the address or the key cannot be used.
    """

    url: str
    model: str
    temperature: float = 0.0
    retries: int = 5
    wait: float = 1.0
    timeout: float = 120.0

    def __post_init__(self):
        shown = masked(self.url)
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = False
        if not known or not re.fullmatch("[!-~]+", self.url) or parts.query or parts.fragment:
            raise UsageError(
                f"--judge-url must be an address like http://localhost:8000/v1, got {shown}"
            )
        if not re.fullmatch("[!-~]*", os.environ.get(KEY, "")):
            raise UsageError(f"the key in ${KEY} holds spaces or other characters that no key has")

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
                reason = self._told(_reason(error))
                if error.code not in RETRIED:
                    raise NanoglimpseError(
                        f"the judge at {masked(self.url)} refuses the request: {reason}"
                    ) from None
            except (URLError, HTTPException, OSError) as error:
                reason = self._told(str(getattr(error, "reason", error)) or type(error).__name__)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                reason = f"the response is not a chat completion ({type(error).__name__})"
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise NanoglimpseError(
            f"the judge at {masked(self.url)} gave no verdict in {self.retries + 1} tries: "
            f"{reason}; repeat the command to continue"
        )

    def _told(self, reason: str) -> str:
        """What the endpoint says, without our key, which it may repeat."""
        secrets = [os.environ.get(KEY), urlsplit(self.url).password]
        for secret in filter(None, secrets):
            reason = reason.replace(secret, HIDDEN).replace(unquote(secret), HIDDEN)
        return masked(reason[:REASON])

    def _post(self, row: dict) -> str:
        parts, headers = urlsplit(self.url), {"Content-Type": "application/json"}
        login, at, place = parts.netloc.rpartition("@")
        if at:
            encoded = base64.b64encode(unquote(login).encode()).decode()
            headers["Authorization"] = f"Basic {encoded}"
        elif key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        address = parts._replace(netloc=place).geturl().rstrip("/")
        data = json.dumps(self._body(row)).encode()
        request = Request(f"{address}/chat/completions", data, headers)
        with _Deadline(self.timeout) as deadline:
            reply = deadline.read(request)
        content = json.loads(reply)["choices"][0]["message"]["content"]
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


def _reason(error: HTTPError) -> str:
    if 300 <= error.code < 400:
        where = error.headers.get("Location", "nowhere")
        return f"{error.code}, a redirect to {where}, which is not followed"
    return f"{error.code} {error.reason}"


class _NoRedirect(HTTPRedirectHandler):
    """Takes a redirect for the error that it is here."""

    def redirect_request(self, *_: Any) -> None:
        """No request follows."""


class _Deadline:
    """Requests that end in time, however slowly the other side sends.

    A timeout of a socket bounds a single read. Here all sockets are shut down when time is up, so
    that whatever waits for them ends.
    """

    def __init__(self, seconds: float):
        self.seconds, self.over = seconds, False
        self.sockets: list[socket.socket] = []
        self.timer = Timer(seconds, self._end)
        self.timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()

    def _end(self) -> None:
        self.over = True
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def read(self, request: Request) -> bytes:
        """The body of the reply.

        Raises:
            OSError, HTTPException: there is none, it is too large, or it took too long.
        """
        opener = build_opener(_NoRedirect(), _Watched(self))
        try:
            with opener.open(request, timeout=self.seconds) as response:
                body = response.read(MAX_BYTES + 1)
        except HTTPError:
            raise
        except (OSError, HTTPException, ValueError):
            if not self.over:
                raise
            body = b""
        if self.over:
            raise TimeoutError(f"no whole reply in {self.seconds:g} s")
        if len(body) > MAX_BYTES:
            raise OSError(f"a reply of more than {MAX_BYTES} bytes")
        return body

    def connection(self, kind: type[HTTPConnection], host: str, **options: Any) -> HTTPConnection:
        """A connection whose socket is watched as soon as there is one."""
        connection = kind(host, **options)
        connect = connection.connect

        def watched() -> None:
            connect()
            self.sockets.append(connection.sock)
            if self.over:
                self._end()

        connection.connect = watched  # type: ignore[method-assign]
        return connection


class _Watched(HTTPHandler, HTTPSHandler):
    """Opens the connections of a deadline."""

    def __init__(self, deadline: _Deadline):
        super().__init__()
        self.deadline = deadline

    def http_open(self, req: Request) -> Any:
        """In plain text."""
        return self.do_open(partial(self.deadline.connection, HTTPConnection), req)

    def https_open(self, req: Request) -> Any:
        """Encrypted."""
        return self.do_open(partial(self.deadline.connection, HTTPSConnection), req)


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
