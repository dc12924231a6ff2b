"""What others wrote cannot act where it is shown."""

import csv
import io
import sys

import pytest

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, fail, run, say
from nanoglimpse.errors import UsageError
from nanoglimpse.escape import csv_cell, html, markdown, masked, terminal

HOSTILE = "\x1b]0;title\x07\x1b[31mred\r\x9b2J\u202egnp.exe\u2028\udcff\x00\ufffe"


def test_controls_are_visible_on_a_terminal():
    shown = terminal(HOSTILE)
    assert shown.isprintable()
    assert shown.startswith(r"\x1b]0;title\x07\x1b[31mred\r\x9b2J\u202egnp.exe\u2028\udcff\x00")
    assert terminal("a\tb\nc é 漢 🙂 \\x1b") == "a\tb\nc é 漢 🙂 \\x1b"
    assert terminal(shown) == shown


def test_html_holds_no_markup_and_can_be_encoded():
    shown = html(f"<b title='x'>&\"{HOSTILE}")
    assert not set("<>\"'") & set(shown)
    assert shown.startswith("&lt;b title=&#x27;x&#x27;&gt;&amp;&quot;")
    assert "\x1b" not in shown
    shown.encode()
    assert html(3) == "3"


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_cell_is_no_formula(first):
    cell = csv_cell(f"{first}cmd|' /C calc'!A0,\"\udcff")
    assert cell.startswith(f"'{first}cmd")
    out = io.StringIO()
    csv.writer(out).writerow([cell, csv_cell(-1.5), csv_cell(None), csv_cell("glimpse 0.1")])
    out.getvalue().encode()
    assert next(csv.reader(io.StringIO(out.getvalue(), newline=""))) == [
        cell,
        "-1.5",
        "",
        "glimpse 0.1",
    ]


def test_markdown_ends_no_cell_and_begins_no_html():
    assert markdown("a|b\\|c\n\n<script>") == r"a\|b\\\|c \<script>"
    assert markdown(HOSTILE).isprintable()
    assert markdown("glimpse 0.111 brief") == "glimpse 0.111 brief"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host/v1", "http://***@host/v1"),
        ("at https://a:p@ss@host:1/x?y=z, b", "at https://***@host:1/x?y=z, b"),
        ("https://h/?api_key=abc&v=1&access_token=t#f", "https://h/?api_key=***&v=1&access_token=***#f"),
        ("mail me@host, http://host/a@b", "mail me@host, http://host/a@b"),
    ],
)  # fmt: skip
def test_logins_and_keys_of_addresses_are_hidden(text, shown):
    assert masked(text) == shown


def test_every_command_prints_through_the_guard(capsys):
    def command(args):
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        raise UsageError(f"http://me:secret@host {HOSTILE} {'A' * 200_000}")

    before = sys.stdout, sys.stderr
    assert run(command, Parser(), []) == 2
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == terminal(HOSTILE) + "\n"
    assert all(line.isprintable() for line in err.splitlines())
    assert "secret" not in err
    assert len(err) < 1000
    assert "A … A" in err


def test_errors_progress_and_misuse_are_escaped(capsys, monkeypatch):
    fail(HOSTILE)
    say(HOSTILE)
    monkeypatch.setattr(console, "EVERY", 0.0)
    Progress(HOSTILE)(1, 2, HOSTILE)
    with pytest.raises(SystemExit):
        run(print, Parser(), [f"--{HOSTILE}"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_a_line_that_is_rewritten_keeps_its_own_controls_only(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    run(lambda args: Progress(HOSTILE)(1, 2) or 0, Parser(), [])
    line = screen.getvalue()
    assert line.startswith("\r")
    assert line.endswith("\033[K")
    assert line[1:-3].isprintable()
