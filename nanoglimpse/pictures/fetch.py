"""The bytes behind what is not a file: URLs, data URIs, standard input, pipes.

A URL is fetched only where it is given as text in a call or on the command line, and not at all if
HF_HUB_OFFLINE is set, which `--offline` does. Bytes, time and redirects are limited.
"""

import base64
import hashlib
import http.client
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from nanoglimpse.version import VERSION

MAX_BYTES, SECONDS, REDIRECTS = 32 << 20, 30.0, 5
CHUNK = 1 << 16


# What `named` takes for more than a path.
NAMED = re.compile(r"-$|data:|file://|https?://", re.IGNORECASE)


def named(text: str) -> tuple[str, Path | bytes]:
    """Name and content of what a text names that `NAMED` matches.

    Raises:
        UsageError: it cannot be fetched as asked.
        NanoglimpseError: it cannot be fetched.
    """
    if text == "-":
        return "standard input", _stdin()
    kind = text[:4].lower()
    if kind == "data":
        return shown(text), _data_uri(text)
    return shown(text), _file(text) if kind == "file" else fetch(text)


def offline() -> bool:
    """Whether nothing may be fetched."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def shown(url: str) -> str:
    """A URL or a path as messages and results show it: no password, and of data only a digest."""
    if url[:5].lower() == "data:":
        digest = hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:12]
        return f"data URI of {len(url)} letters, SHA-256 {digest}"
    return one_line(re.sub(r"(?<=://)[^/?#]*@", "", url), 200) if NAMED.match(url) else url


def content(file: Any, name: str) -> bytes:
    """The content of an open file, which is left as it was if it can be rewound.

    Raises:
        UsageError: it gives text.
        NanoglimpseError: it is larger than `MAX_BYTES`, or cannot be read.
    """
    try:
        again = file.seekable()
        place = file.tell() if again else 0
        if again:
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
        while isinstance(data, bytes) and len(data) <= MAX_BYTES:
            if not (more := file.read(MAX_BYTES + 1 - len(data))):
                break
            data += more
        if again:
            file.seek(place)
    except (OSError, ValueError, AttributeError) as error:
        raise NanoglimpseError(f"{name} cannot be read: {one_line(error)}") from None
    if not isinstance(data, bytes):
        raise UsageError(f"{name} gives text; open it in binary mode")
    if len(data) > MAX_BYTES:
        raise NanoglimpseError(f"{name} exceeds {MAX_BYTES >> 20} MiB; give the path of a file")
    return data


def _stdin() -> bytes:
    stream = sys.stdin
    if stream is None or stream.isatty():
        raise UsageError("a picture '-' is read from standard input, but nothing is piped into it")
    return content(_Forward(stream.buffer), "standard input")


class _Forward:
    """A stream that is read to its end and never rewound, even if it could be."""

    def __init__(self, stream: Any):
        self.read = stream.read

    def seekable(self) -> bool:
        """No."""
        return False


def _file(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{shown(url)}: a file URL must name a file of this computer")
    path = unquote(parts.path)
    return Path(path[1:] if re.match(r"/[A-Za-z]:", path) else path)


def _data_uri(text: str) -> bytes:
    head, comma, body = text[5:].partition(",")
    if not comma or len(body) > 2 * MAX_BYTES:
        raise UsageError(
            f"a data URI must be data:image/png;base64,… and hold at most {MAX_BYTES >> 20} MiB, "
            f"got {one_line(text, 60)}"
        )
    try:
        data = unquote_to_bytes(body)
        if "base64" in head.lower().split(";"):
            data = base64.b64decode(data.replace(b"-", b"+").replace(b"_", b"/") + b"==")
    except ValueError as error:
        raise NanoglimpseError(f"a data URI is damaged: {error}: {one_line(text, 60)}") from None
    return data


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS


def fetch(url: str) -> bytes:
    """What an http or https URL gives.

    It is fetched in a thread, since looking up a host and reading headers know no time limit.

    Raises:
        UsageError: offline is asked for.
        NanoglimpseError: an error of the server or of the network, or a limit is exceeded.
    """
    if offline():
        raise UsageError(f"{shown(url)} is not fetched: --offline or HF_HUB_OFFLINE forbids it")
    results: list[bytes | Exception] = []
    end = time.monotonic() + SECONDS

    def work() -> None:
        try:
            results.append(_download(url, end))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    result = results[0] if results else TimeoutError(f"no answer within {SECONDS:g} s")
    if isinstance(result, bytes):
        return result
    reason, code = one_line(getattr(result, "reason", "") or result, 200), ""
    if isinstance(result, urllib.error.HTTPError):
        code = f"{result.code} "
        result.close()
    raise NanoglimpseError(f"{shown(url)} cannot be fetched: {code}{reason}") from None


def _download(url: str, end: float) -> bytes:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirects,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": f"nanoglimpse/{VERSION}"})
    data = bytearray()
    with opener.open(request, timeout=max(end - time.monotonic(), 0.01)) as response:
        while piece := response.read1(CHUNK):
            data += piece
            if len(data) > MAX_BYTES:
                raise http.client.HTTPException(f"more than {MAX_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise TimeoutError(f"not complete within {SECONDS:g} s")
        if response.length:
            raise http.client.HTTPException(f"{response.length} bytes are missing")
    return bytes(data)
