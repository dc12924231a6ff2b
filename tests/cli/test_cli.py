"""The command line as a user meets it: real processes where it matters, one line for each error."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch
from PIL import Image

from nanoglimpse import files
from nanoglimpse.cli import ask as generate
from nanoglimpse.cli import options, overlay
from nanoglimpse.methods import METHODS
from nanoglimpse.pictures import fonts
from nanoglimpse.pictures.picture import load_picture
from nanoglimpse.weights.hub import EMBEDDED
from tests.helpers.prompts import ANSWER, QUESTION, SCENE

MODULE = [sys.executable, "-m", "nanoglimpse.generate"]


def call(*arguments, capsys):
    """Exit code, stdout and stderr of the command line in this process."""
    try:
        code = generate.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def process(*arguments, cwd, **options):
    return subprocess.run(
        [*MODULE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, **options
    )


@pytest.mark.slow
def test_without_arguments_it_answers_a_built_in_question(nano, tmp_path):
    """From any folder: the answer alone on stdout, the rest on stderr."""
    done = process(cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == ANSWER + "\n"
    words = (
        "picture",
        "question",
        "model",
        "visual",
        "budgets",
        "KV cache",
        "first token",
        "decode",
    )
    assert [w for w in words if w not in done.stderr] == []
    kept = int(nano.ask(SCENE, QUESTION).kept.sum())
    assert f"256 tokens, {kept} kept ({kept / 256:.1%}), method glimpse" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_question_and_picture(capsys):
    code, out, err = call(QUESTION, "--image", SCENE, "--method", "dense", capsys=capsys)
    assert (code, out) == (0, ANSWER + "\n")
    assert "256 tokens, 256 kept (100.0%), method dense" in err


@pytest.mark.slow
def test_text_alone(capsys):
    code, out, err = call("What is red?", "--max-new-tokens", 3, capsys=capsys)
    assert (code, len(out) > 1) == (0, True)
    assert "0 tokens, 0 kept, method" in err


@pytest.mark.slow
def test_quiet_says_nothing_else(capsys):
    assert call("--quiet", capsys=capsys) == (0, ANSWER + "\n", "")


@pytest.mark.slow
def test_json_is_one_object(nano, capsys):
    code, out, _ = call(QUESTION, "--image", SCENE, "--json", capsys=capsys)
    assert code == 0
    assert out.count("\n") == 1
    data = json.loads(out)
    assert data["answer"] == ANSWER
    assert data["finish_reason"] == "eos"
    answer = nano.ask(SCENE, QUESTION)
    kept = answer.kept
    assert (data["visual_tokens"], data["kept_tokens"]) == (256, len(data["kept"]))
    assert data["kept"] == kept.nonzero().flatten().tolist()
    assert data["grids"] == [[1, 32, 32]]
    assert set(data["budgets"]) == {"input_ratio", "prefill_ratio", "decode_kv_ratio"}
    assert data["budgets"]["decode_kv_ratio"] == int(kept.sum()) / 256
    assert data["kv_rows"][1] < data["kv_rows"][0]
    assert data["versions"]["torch"] == torch.__version__
    assert data["tokens"] == answer.token_ids
    assert "vision" in data["timings"]


@pytest.mark.slow
def test_weights_of_few_bits(capsys):
    code, out, err = call(QUESTION, "--image", SCENE, "--quantize", "int8", capsys=capsys)
    assert (code, out) == (0, f"{ANSWER}\n")
    assert "MB of weights, int8 in the decoder, float32 on cpu" in err


@pytest.mark.slow
def test_options_reach_the_engine(capsys):
    arguments = ("--image", SCENE, "--json", "--max-ratio", 0.05, "--max-new-tokens", 5)
    _, out, _ = call(QUESTION, *arguments, "--min-tokens", 1, capsys=capsys)
    data = json.loads(out)
    assert data["kept_tokens"] == int(0.05 * 256)
    assert (len(data["tokens"]), data["finish_reason"]) == (5, "length")
    _, out, _ = call(QUESTION, *arguments, "--max-pixels", 50176, capsys=capsys)
    assert json.loads(out)["visual_tokens"] == 64
    _, out, _ = call(QUESTION, *arguments, "--threshold", 1, "--min-tokens", 30, capsys=capsys)
    assert json.loads(out)["kept_tokens"] == 30


def spread(colour) -> int:
    """How far from grey."""
    return max(colour) - min(colour)


@pytest.mark.slow
def test_the_overlay_shows_kept_cells_and_importance(nano, tmp_path, capsys):
    path = tmp_path / "o.png"
    code, _, err = call("--overlay", path, capsys=capsys)
    assert code == 0
    assert str(path) in err
    assert [p.name for p in tmp_path.iterdir()] == ["o.png"]
    with Image.open(path) as image:
        image.load()
    assert image.width > 2 * overlay.PANEL
    # In the picture's own colours where kept, grey where dropped.
    kept = nano.ask(SCENE, QUESTION).kept.view(16, 16)
    with Image.open(SCENE) as scene:
        small = scene.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    left, top = overlay.MARGIN, overlay.MARGIN + overlay.LINE + 4
    panel = image.crop((left, top, left + overlay.PANEL, top + overlay.PANEL))
    panel = panel.resize((16, 16), Image.Resampling.BOX)
    shown = {True: [], False: []}
    for y, x in product(range(16), repeat=2):
        if spread(small.getpixel((x, y))) > 100:
            shown[bool(kept[y, x])].append(spread(panel.getpixel((x, y))))
    assert min(shown[True]) > 60
    assert max(shown[False]) < 8


@pytest.mark.slow
def test_an_overlay_of_several_pictures_has_a_panel_for_each(tmp_path, capsys):
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    call(QUESTION, "--image", SCENE, "--overlay", one, capsys=capsys)
    call(QUESTION, "--image", SCENE, "--image", SCENE, "--overlay", two, capsys=capsys)
    with Image.open(one) as a, Image.open(two) as b:
        assert b.height > 1.8 * a.height
        assert a.width == b.width


@pytest.mark.slow
def test_an_overlay_of_a_dense_or_text_answer(tmp_path, capsys):
    for arguments in ((QUESTION, "--image", SCENE, "--method", "dense"), ("What?",)):
        path = tmp_path / "o.png"
        assert call(*arguments, "--overlay", path, capsys=capsys)[0] == 0
        assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_keeps_what_was_said(tmp_path, number):
    """While answering: the text so far, the statistics, no traceback, the shell's exit code."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, time\nfrom nanoglimpse.model.decoder import Decoder\n"
        "from nanoglimpse.cli import ask as generate\n"
        # A shell's background jobs, and what they start, ignore it otherwise.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "step = Decoder.step\n"
        "def late(self, *a):\n    time.sleep(0.2)\n    return step(self, *a)\n"
        "Decoder.step = late\n"
        "raise SystemExit(generate.main([]))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-u", str(slow)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    said = run.stdout.read(8)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    text = (said + out).decode()
    assert ANSWER.startswith(text.strip())
    assert 8 <= len(text.strip()) < len(ANSWER)
    assert b"ended by stopped" in err
    assert b"interrupted" in err
    assert b"Traceback" not in err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = " ".join([*MODULE, "2>err", "|", "head", "-c", "3"])
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "The"
    time.sleep(0.5)
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "BrokenPipe" not in (tmp_path / "err").read_text()


@pytest.fixture
def bare(tmp_path):
    """The embedded checkpoint without glimpse weights."""
    folder = tmp_path / "bare"
    shutil.copytree(EMBEDDED["nano"], folder, ignore=lambda *_: ["glimpse", "examples"])
    return folder


def image(tmp_path, name, size=(60, 60), data=None):
    path = tmp_path / name
    if data is None:
        Image.new("RGB", size, "red").save(path)
    else:
        path.write_bytes(data)
    return path


def truncated(tmp_path):
    return image(tmp_path, "cut.png", data=SCENE.read_bytes()[:20000])


# name: (arguments from a scratch folder, exit code, words of the one line)
ERRORS = {
    "missing picture": (lambda t: ("x", "--image", t / "no.png"), 2, "there is no picture"),
    "no picture": (lambda t: ("x", "--image", image(t, "a.txt", data=b"hi")), 2, "not a picture"),
    "truncated picture": (lambda t: ("x", "--image", truncated(t)), 1, "damaged"),
    "too thin": (lambda t: ("x", "--image", image(t, "t.png", (2, 900))), 2, "too thin"),
    "no question": (lambda t: ("--image", SCENE), 2, "a question is needed"),
    "empty question": (lambda t: ("", "--image", SCENE), 2, "a question is needed"),
    "unknown option": (lambda t: ("--imagine", "x"), 2, "unrecognized arguments: --imagine"),
    "option without value": (lambda t: ("x", "--image"), 2, "expected at least one argument"),
    "no number": (lambda t: ("x", "--max-ratio", "lots"), 2, "must be in [0, 1], got 'lots'"),
    "unknown method": (lambda t: ("x", "--method", "magic"), 2, "unknown method 'magic'"),
    "cap": (
        lambda t: ("x", "--image", SCENE, "--max-ratio", 3),
        2,
        "--max-ratio: must be in [0, 1], got '3'",
    ),
    "temperature": (
        lambda t: ("x", "--temperature", -1),
        2,
        "--temperature: must be a number of at least 0, got '-1'",
    ),
    "no such model": (lambda t: ("x", "--model", t / "none"), 2, "neither a folder nor a Hub id"),
    "empty model": (lambda t: ("x", "--model", t), 1, "config.json is missing"),
    "hub": (
        lambda t: ("x", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"),
        1,
        "hf download Qwen/Qwen2.5",
    ),
    "no such glimpse": (
        lambda t: ("x", "--glimpse", t / "none"),
        2,
        "neither a folder nor a Hub id",
    ),
    "no glimpse config": (lambda t: ("x", "--glimpse", t), 1, "config.json is missing"),
    "no adapter": (lambda t: ("x", "--adapter", t), 1, "adapter_config.json is missing"),
    "too long": (
        lambda t: ("word " * 5000, "--max-new-tokens", 10),
        2,
        "exceed the context of 4096",
    ),
    "no room": (
        lambda t: ("x", "--max-new-tokens", 0),
        2,
        "must be a whole number of at least 1, got '0'",
    ),
    "device": (lambda t: ("x", "--device", "cuda:1"), 2, "no CUDA here"),
    "dtype": (lambda t: ("x", "--dtype", "fp8"), 2, "invalid choice: 'fp8'"),
    "quantize": (lambda t: ("x", "--quantize", "int3"), 2, "invalid choice: 'int3'"),
    "backend": (lambda t: ("x", "--backend", "cuda"), 2, "invalid choice: 'cuda'"),
    "overlay folder": (lambda t: ("--overlay", t / "no" / "o.png"), 2, "there is no folder"),
    "overlay is a folder": (lambda t: ("--overlay", t), 2, "is a folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, expected, words = ERRORS[case]
    before = set(tmp_path.rglob("*"))
    code, out, err = call("--quiet", *arguments(tmp_path), capsys=capsys)
    assert code == expected, err
    assert out == ""
    assert err.startswith("nanoglimpse: error: ")
    assert err.count("\n") == 1
    assert words in err
    made = set(tmp_path.rglob("*")) - before
    assert not [p for p in made if p.suffix == ".png" and p.name.startswith((".", "o"))]


@pytest.mark.slow
def test_glimpse_is_asked_for_without_weights(bare, capsys):
    code, _, err = call("x", "--quiet", "--model", bare, "--method", "glimpse", capsys=capsys)
    assert code == 2
    assert "needs glimpse weights" in err
    assert err.count("\n") == 1


def test_a_model_without_tokenizer_says_so(tiny_folder, capsys):
    code, _, err = call("x", "--quiet", "--model", tiny_folder, capsys=capsys)
    assert code == 2
    assert "no tokenizer.json" in err


def test_a_corrupt_tokenizer_says_so(bare, capsys):
    (bare / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    code, _, err = call("x", "--quiet", "--model", bare, capsys=capsys)
    assert code == 1
    assert "tokenizer.json is not a valid tokenizer" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore lines"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 GB"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_no_memory_is_one_line(error, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(options, "load", fail)
    code, _, err = call("x", "--quiet", capsys=capsys)
    assert code == 1
    assert "not enough memory" in err
    assert "--max-pixels" in err
    assert err.count("\n") == 1


def test_unforeseen_errors_are_one_line_and_debug_shows_more(capsys, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(options, "load", fail)
    code, _, err = call("x", "--quiet", capsys=capsys)
    assert (code, err) == (
        1,
        "nanoglimpse: error: ZeroDivisionError: first (--debug shows where)\n",
    )
    code, _, err = call("x", "--quiet", "--debug", capsys=capsys)
    assert "Traceback" in err


def test_a_read_only_folder_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(options, "load", None)
    code, _, err = call("--overlay", tmp_path / "o.png", "--quiet", capsys=capsys)
    assert code == 2
    assert "read-only" in err


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_overlay(tmp_path, capsys, monkeypatch):
    def fail(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", fail)
    code, out, err = call("--overlay", tmp_path / "o.png", "--quiet", capsys=capsys)
    assert code == 1
    assert out == ANSWER + "\n"
    assert "No space left" in err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option(capsys):
    code, out, _ = call("--help", capsys=capsys)
    assert code == 0
    for action in generate.parser()._actions:
        assert action.help
        assert all(option in out for option in action.option_strings)


def test_methods_are_listed(capsys):
    assert generate.main(["--list-methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "visionzip", "pdrop"])
def test_other_methods_answer(capsys, tmp_path, method):
    picture = tmp_path / "out.png"
    code, out, err = call(
        QUESTION,
        "--image",
        SCENE,
        "--method",
        method,
        "--max-ratio",
        "0.2",
        "--overlay",
        picture,
        capsys=capsys,
    )
    assert code == 0
    assert out.startswith("The number")
    assert f"method {method}" in err
    assert picture.exists()


@pytest.mark.slow
def test_nano_says_what_it_knows(capsys):
    assert "nano knows" in call(QUESTION, "--image", SCENE, capsys=capsys)[2]
    assert "nano knows" not in call(capsys=capsys)[2]
    assert call("--image", SCENE, QUESTION, "--quiet", capsys=capsys) == (0, ANSWER + "\n", "")


@pytest.mark.slow
def test_text_without_a_font_is_left_out_of_the_overlay(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanoglimpse.pictures.fonts._installed", lambda: ())
    fonts._file_for.cache_clear()
    sizes = []
    for question, said in (("What is red?", False), ("\u6570\u5b57?", True)):
        path = tmp_path / "o.png"
        arguments = (question, "--image", SCENE, "--overlay", path, "--max-new-tokens", 2)
        code, _, err = call(*arguments, capsys=capsys)
        assert code == 0
        assert ("without the question: no font has all of the letters" in err) == said
        sizes.append(load_picture(path).height)
    assert sizes[0] > sizes[1]
    fonts._file_for.cache_clear()
    code, _, err = call("x", "--font", SCENE, "--quiet", capsys=capsys)
    assert (code, "is not a font" in err, err.count("\n")) == (2, True, 1)
