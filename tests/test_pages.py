"""The pages are true: code runs, commands parse, links lead somewhere, and counts are counted."""

import importlib.util
import re
import shlex
from argparse import ArgumentParser, _SubParsersAction
from pathlib import Path

import pytest

from nanoglimpse.cli import ask
from nanoglimpse.cli.report import report
from nanoglimpse.evaluate import __main__ as evaluate
from nanoglimpse.flops import (
    RowCounts,
    decoder,
    glimpse_logits,
    head,
    predict,
    session_prefix,
    session_question,
    vision,
)
from nanoglimpse.train import __main__ as train
from nanoglimpse.world import __main__ as world
from tests.helpers.prompts import QUESTION, SCENE
from tests.test_architecture import CORE, code_lines

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "nanoglimpse").rglob("*.md")),
    *sorted((ROOT / "weights").rglob("*.md")),
]
README_BYTES = 10_240


def name_of(page):
    return str(page.relative_to(ROOT))


def fenced(page, language):
    """The blocks of a page in one language."""
    text = page.read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def tables(text):
    """The tables of a text, each a list of rows of cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[[c.strip() for c in r.strip("|").split("|")] for r in t.splitlines()] for t in found]


# Python


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "python")], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """A page's blocks in order, in one namespace; one that begins with `# name.py` is a file."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")  # what they write does not stay
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace = {"__name__": "page"}
    for number, block in enumerate(fenced(page, "python")):
        if file := re.match(r"# (\w+\.py)\n", block):
            Path(file[1]).write_text(block, "utf-8")
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


# Commands


def bench_parser():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parser()


PARSERS = {
    "generate": ask.parser(),
    "evaluate": evaluate._parser(),
    "evaluate report": evaluate._report_parser(),
    "evaluate judge": evaluate._judge_parser(),
    "train": train._parser(),
    "world": world.parser(),
    "bench.py": bench_parser(),
}
# Commands of others, which are not checked.
FOREIGN = ("pip", "git", "ruff", "pre-commit", "ffmpeg", "python -m pytest", "python -m tests.")
FOREIGN_OPTIONS = {"--cases", "--check", "--dist", "--no-deps", "--nproc-per-node"}


def commands(block):
    """The words of every command of a block of shell."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            yield words[:end]
            words = words[end + 1 :]


def ours(words):
    """Name and arguments of a command of ours; None for those of others."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if " ".join(words).startswith(FOREIGN):
        return None
    if words[:2] == ["python", "-m"] and words[2].startswith("nanoglimpse."):
        words = ["nanoglimpse", words[2].removeprefix("nanoglimpse."), *words[3:]]
    elif words[:2] == ["python", "bench.py"]:
        return "bench.py", words[2:]
    assert words[0] == "nanoglimpse", f"unknown command: {shlex.join(words)}"
    name, rest = words[1], words[2:]
    if rest and f"{name} {rest[0]}" in PARSERS:
        return f"{name} {rest[0]}", rest[1:]
    return name, rest


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p, "bash")], ids=name_of)
def test_commands_parse(page, capsys):
    for block in fenced(page, "bash"):
        for words in commands(block):
            if found := ours(words):
                name, arguments = found
                assert name in PARSERS, f"unknown command: {shlex.join(words)}"
                try:
                    PARSERS[name].parse_args(arguments)
                except SystemExit:
                    pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


def options(parser: ArgumentParser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, _SubParsersAction):
            for one in action.choices.values():
                yield from options(one)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_options_exist(page):
    """Those that the text names, outside of blocks. The changelog names options that are gone."""
    known = FOREIGN_OPTIONS.union(*(options(parser) for parser in PARSERS.values()))
    code = " ".join(re.findall(r"`([^`]+)`", prose(page)))
    assert not set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code)) - known


# Links


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match(r"https://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_files_exist(page):
    """Those that the text names as code: of the page's folder, the package, or the checkout."""
    roots = (page.parent, ROOT / "nanoglimpse", ROOT)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|png))`", prose(page)):
        assert any((root / name).exists() for root in roots), name


def test_every_picture_is_shown():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert [p.name for p in (ROOT / ".assets").iterdir() if f".assets/{p.name})" not in text] == []


# The README


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= README_BYTES


def test_the_readme_begins_with_two_commands():
    """As .ci/run finds the second: it starts with `pip`, in the block after the marker."""
    install, tests = fenced(README, "bash")[:2]
    assert install.startswith("pip install . && python -m nanoglimpse.generate")
    after = README.read_text("utf-8").partition("\n<!-- tests -->\n")[2]
    assert after.startswith(f"```bash\n{tests}```\n")
    assert [line[:4] for line in tests.splitlines()] == ["pip "]


def marked(name):
    """The lines of the README's block after a marker."""
    after = README.read_text("utf-8").partition(f"\n<!-- {name} -->\n```\n")[2]
    return after.partition("```")[0].splitlines()


@pytest.mark.slow
def test_the_readme_quotes_the_first_command(nano):
    answer = nano.ask(SCENE, QUESTION)
    assert marked("output") == report(answer)[:3]
    assert f"prints *{answer.text}*" in words(README)


def test_the_readme_quotes_the_engine():
    story = marked("story")
    engine = (ROOT / "nanoglimpse" / "engine.py").read_text("utf-8").splitlines()
    lines = [line.strip() for line in engine]
    places = [lines.index(line.strip()) for line in story]
    assert len(places) >= 7
    assert places == sorted(places)


def size(path):
    """Code lines of a file, or of a folder without sub-folders that have a line of their own."""
    return sum(map(code_lines, [path] if path.is_file() else sorted(path.rglob("*.py"))))


def is_rounded(stated, counted):
    """Whether a count is stated to the nearest hundred.

    75 in place of 50, so that a count that lies between two hundreds does not need a new number
    with every commit.
    """
    number = int(stated.replace(",", ""))
    return number % 100 == 0 and abs(number - counted) <= 75


@pytest.mark.slow
def test_the_readme_counts_lines():
    after = README.read_text("utf-8").partition("\n<!-- sizes -->\n")[2]
    rows = tables(after)[0][2:]
    for where, _, stated in rows:
        counted = sum(size(ROOT / link.removesuffix("README.md")) for link in links_of(where))
        assert is_rounded(stated, counted), f"{where}: {counted}"
    rooms = {Path(link.removesuffix("README.md")).stem for row in rows for link in links_of(row[0])}
    assert rooms >= {p.parent.name for p in (ROOT / "nanoglimpse").glob("*/*.py")}
    core = [next(p for p in (ROOT / "nanoglimpse" / r, ROOT / r) if p.exists()) for r in CORE[:-1]]
    counted = sum(map(size, [*core, ROOT / "nanoglimpse" / "engine.py"]))
    (stated,) = re.findall(r"engine below is ([\d,]+) lines", README.read_text("utf-8"))
    assert is_rounded(stated, counted), counted


def links_of(cell):
    return re.findall(r"\]\(([^)]+)\)", cell)


def test_the_readme_states_the_results_of_the_card():
    """Free-form columns; a row is found by method and cap."""
    card = table_of(ROOT / "weights" / "nano" / "README.md", ["method", "cap", "scene", "brief"])
    known = {(row[0], row[1]): [row[2], row[5], row[8]] for row in card}
    shown = table_of(README, ["method", "cap", "scenes"])
    assert len(shown) == 6
    for method, cap, *scores in shown:
        assert known[method, cap] == scores
    (kept,) = [[row[4], row[7], row[10]] for row in card if row[:2] == ["glimpse", ""]]
    dense, glimpse = known["dense", ""][0], known["glimpse", ""][0]
    stated = re.findall(r"answers ([\d.]+) %.*?with ([\d.]+) % of.*?and ([\d.]+) %", words(README))
    assert stated == [(glimpse, kept[0], dense)]
    assert "keeps {}, {} and {} %".format(*kept) in words(README)


def table_of(page, header):
    """The rows of the first table of a page whose header begins with these cells."""
    found = tables(page.read_text("utf-8"))
    return next(rows[2:] for rows in found if rows[0][: len(header)] == header)


def words(page):
    """A page as one line."""
    return page.read_text("utf-8").replace("\n", " ")


@pytest.mark.slow
def test_a_further_question_costs_what_the_readme_says(nano):
    """FLOPs up to the first logits, of a session's first question and of the next one."""
    session = nano.session(SCENE)
    prefill = session.prefill(session.tail(QUESTION))
    rows, model, config = RowCounts.of(prefill), nano.model, nano.model.text
    grids = prefill.batch.grids[0]
    further = decoder(config, session_question(session, rows)) + head(config)
    further += predict(model.glimpse_weights.predictor, grids) + glimpse_logits(model, rows.total)
    first = vision(model.config, grids) + decoder(config, session_prefix(session)) + further
    pattern = r"takes ([\d.]+) % of.*?: ([\d.]+) instead of ([\d.]+) GFLOP"
    ((share, less, more),) = re.findall(pattern, words(README))
    assert (less, more) == (f"{further / 1e9:.2f}", f"{first / 1e9:.2f}")
    assert share == f"{100 * further / first:.1f}"
