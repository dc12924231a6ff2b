"""Targets of tests/fuzz.py: replies to the judge, results in a report, lines of a chat, options."""

import argparse
import json
import re
import socket
import threading
from contextlib import suppress
from functools import cache
from itertools import chain

from nanoglimpse import load
from nanoglimpse.cli import ask
from nanoglimpse.cli.chat import Chat
from nanoglimpse.cli.options import pruning_of, sampling_of
from nanoglimpse.evaluate import __main__ as evaluate
from nanoglimpse.evaluate.judge import Judge
from nanoglimpse.pictures.picture import source
from nanoglimpse.train import __main__ as train
from nanoglimpse.world import __main__ as world
from tests.helpers.prompts import QUESTION, SCENE

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
PIECES = ["\x1b[2J", "\0", "\r\n", "\udcff", "\u2028", "\u202e", "|", "=1+1", "<script>", '"', "'"]
PIECES += [
    "{{charts}}",
    "\\",
    "é",
    "🙂",
    "漢字",
    "<|im_end|>",
    "score: 1",
    "NaN",
    "-0",
    "%s",
    "{0}",
]
VALUES = [None, True, False, 0, 1, -1, 2, 0.5, 1e308, -1e-308, 10**30, 10**400, "", "x", [], {}]
VALUES += [[[]], {"a": 1}, float("nan"), float("inf"), "0" * 64, ["\udcff"], 2**31, 2**63]


def text(rng, given=""):
    """A text that is like the given one, or not at all."""
    letters = list(given)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(letters) + 1)
        letters[at : at + rng.randrange(3)] = [rng.choice(PIECES) * rng.choice((1, 1, 2, 400))]
    return "".join(letters)


def changed(rng, value, chance=0.1):
    """A JSON value with other values in some places."""
    if rng.random() < chance:
        return rng.choice([*VALUES, text(rng), text(rng, str(value)), nested(rng)])
    if isinstance(value, dict):
        value = {
            k: changed(rng, one, chance) for k, one in value.items() if rng.random() > chance / 4
        }
        return value | ({text(rng): rng.choice(VALUES)} if rng.random() < chance else {})
    if isinstance(value, list):
        value = [changed(rng, one, chance) for one in value]
        return value * rng.choice((0, 2)) if rng.random() < chance / 2 else value
    return value


def nested(rng):
    value = rng.choice(VALUES)
    for _ in range(rng.choice((1, 10, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def damaged(rng, data):
    """Bytes with some that are cut, doubled or replaced."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 3, 50))
        own = data[at : at + length]
        new = rng.choice(
            (b"", own * 2, rng.randbytes(length), b"\0", b"\n", b"\xff\xfe", b"[" * 3000)
        )
        data = data[:at] + new + data[at + length :]
    return data


def reply(rng, folder):
    """A judge whose endpoint sends anything."""
    message = {"role": "assistant", "content": text(rng, "It is right. score: 0.5")}
    body = json.dumps(changed(rng, {"choices": [{"message": message}]}, 0.04)).encode()
    if rng.random() < 0.1:
        body = rng.choice((b"[" * 200_000, b'{"a":' * 50_000, b"9" * 9000, b" " * 2**21, b""))
    body = damaged(rng, body) if rng.random() < 0.2 else body
    status = rng.choice((*[200] * 20, 204, 301, 302, 400, 401, 500, 999, -1))
    heads = [f"Content-Length: {rng.choice((*[len(body)] * 12, 0, 10**12, -1, 'x'))}"]
    others = ["Transfer-Encoding: chunked", "Location: file:///etc/passwd", "Location: http://[::1"]
    others += ["Content-Encoding: gzip", "X: " + "y" * 70_000, "Location: x"]
    heads += rng.sample(others, rng.choice((0, 0, 0, 1, 2)))
    head = "\r\n".join([f"HTTP/1.1 {status} {text(rng, 'OK')}", *heads, "", ""])
    data = head.encode("utf-8", "surrogateescape") + body
    data = damaged(rng, data) if rng.random() < 0.1 else data

    def call():
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=_serve, args=(server, data), daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
            row = {"arm": "a", "question": "q", "asked": "?", "wanted": "7", "reply": "8"}
            verdict = Judge(url, "m", retries=0, timeout=5).verdict(row)
        json.dumps(verdict)
        assert 0 <= verdict["score"] <= 1

    return call


def _serve(server, data):
    with suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(data)


def _row(rng, number):
    method, ratio = rng.choice((("dense", None), ("glimpse", 0.111), ("oracle", None)))
    brief = rng.random() < 0.3
    cap = "" if ratio is None else f" {ratio:g}"
    row = {"question": f"q{number}", "arm": f"{method}{cap}{' brief' if brief else ''}"}
    row |= {"method": method, "ratio": ratio, "brief": brief, "group": rng.choice("ab")}
    row |= {"kind": "k", "asked": "What?", "wanted": "7", "reply": text(rng, "It is 7.")}
    row |= {"contains": True, "exact": False, "anls": 0.5, "f1": 0.25, "visual": 8, "kept": 4}
    row |= {"recall": 0.5, "iou": 0.2, "input": 1.0, "prefill": 0.7, "decode_kv": 0.5, "stop": 4}
    row |= {"kv_rows": 3.5, "kv_bytes": 99, "tokens": 5, "peak_bytes": None}
    row |= {"flops": {"vision": 1e9, "decode": 3e6}, "ms": {"vision": 2.0, "decode": None}}
    if rng.random() < 0.5:
        row |= {"grid": [2, 4], "boxes": [[0.1, 0.2, 0.3, 0.4]], "cells": "96"}
        row |= {"importance": rng.choice((None, "00102030405060ff"))}
    return row


def results(rng, folder):
    """A file of results through every form of the report."""
    chance = rng.choice((0.0, 0.0005, 0.003))
    rows = [_row(rng, rng.randrange(3)) for _ in range(rng.randrange(1, 12))]
    verdict = {"verdict": "j at 0", "arm": "dense", "question": "q0", "score": 1, "said": "1"}
    picture = {"picture": "q0", "uri": PIXEL}
    records = [*rows, picture, {"missing": ["a.png"]}, verdict | {"understood": True}]
    if rng.random() < 0.5:
        names = {row["arm"]: text(rng, row["arm"]) for row in rows}
        records = [one | ({"arm": names[one["arm"]]} if "method" in one else {}) for one in records]
    rng.shuffle(records)
    options = {"model": text(rng, "nano"), "dtype": "float32", "data": {text(rng, "world"): 1}}
    lines = [{"options": changed(rng, options, chance)}, *changed(rng, records, chance)]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path = folder / "results.jsonl"
    path.write_bytes(damaged(rng, data) if rng.random() < 0.2 else data)
    words = [str(path), "--csv", str(folder / "f.csv"), "--html", str(folder / "f.html")]
    words += rng.choice(([], ["--score", "f1"], ["--score", "judge"]))
    args = evaluate._report_parser().parse_args(words)

    def call():
        code = evaluate.report(args)
        page = (folder / "f.html").read_text("utf-8")
        assert page.count("<script") == page.count("</script>") == 1
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
        assert not re.search("(?m)^[=+@\t]", (folder / "f.csv").read_text("utf-8"))
        return code

    return call


@cache
def nano():
    return load("nano", dtype="float32", device="cpu")


def chat(rng, folder):
    """Lines of a chat: commands, names of files that are none, and questions."""
    commands = ["/overlay o.png", "/image nope.png", f"/image {SCENE}", "/save s.chat", "/alone"]
    commands += ["/reset", "/stats", "/help", "/quit", "/exit", "/nonsense", "/", "//", "/overlay"]
    lines = []
    for _ in range(rng.randrange(1, 6)):
        line = rng.choice((QUESTION, *commands))
        lines.append(text(rng, line) if rng.random() < 0.5 else line)

    def call():
        options = {"max_new_tokens": 2}
        session = nano().session([SCENE], max_pixels=12544)
        chat = Chat(session, [source(SCENE)], options, lambda line: None, rng.random() < 0.5)
        return chat.run(lines)

    return call


def _parsers():
    yield from (ask.parser(), evaluate._parser(), evaluate._report_parser(), world.parser())
    for action in train._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def options(rng, folder):
    """A command line with values that make no sense."""
    parser = rng.choice(list(_parsers()))
    flags = [action.option_strings[-1] for action in parser._actions if action.option_strings]
    flags = [flag for flag in flags if flag not in ("--help", "--version")]
    values = [
        "nan",
        "inf",
        "-1",
        "0",
        "1",
        "0.5",
        "1e22",
        "1e400",
        "9" * 5000,
        "",
        "cuda:9",
        "x" * 300,
    ]
    words = [text(rng, "word") for _ in range(rng.randrange(3))]
    for flag in rng.sample(flags, min(rng.randrange(4), len(flags))):
        value = rng.choice([*values, text(rng), text(rng, "0.5")])
        words += rng.choice(([flag, value], [f"{flag}={value}"], [flag]))

    def call():
        args = parser.parse_args(list(chain(words)))
        if hasattr(args, "max_ratio"):
            pruning_of(args), sampling_of(args)

    return call


TARGETS = {"judge": reply, "report": results, "chat": chat, "options": options}
