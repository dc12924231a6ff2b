"""Commands as processes: two on one output, signals, full disks, streams that break, threads."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanoglimpse.cli.ask import EXAMPLES
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.train.pretrain import write_folder
from tests.helpers.devices import device
from tests.helpers.prompts import QUESTION, SCENE
from tests.helpers.tiny import TEXT, TOP, VISION

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MODULE = [sys.executable, "-m", "nanoglimpse"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
COUNT = 400


def start(*arguments, **options):
    command = [*MODULE, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # The shell that starts the tests may ignore Ctrl-C, which a child would inherit.
    streams["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, env=ENVIRONMENT, **streams | options)


def ended(process, timeout=120):
    out, error = process.communicate(timeout=timeout)
    assert not error or "Traceback" not in error, error
    return process.returncode, out, error


def batch(folder):
    """A batch that takes long enough to be interrupted."""
    rows = [{"image": str(SCENE), "question": QUESTION, "id": n} for n in range(COUNT)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["generate", "--batch-file", folder / "questions.jsonl", "--max-new-tokens", 2]
    limit = ["--max-batch-tokens", 600, "--device", "cpu", "--quiet"]
    return [*given, *limit, "--output", folder / "out.jsonl"]


def evaluation(folder):
    data = ["--data", EXAMPLES / "questions.jsonl", "--methods", "nothing", "--batch", 1]
    more = ["--max-new-tokens", 2, "--device", "cpu", "--out", folder / "out.jsonl", "--quiet"]
    return ["evaluate", *data, *more]


def training(folder, *more):
    write_folder(folder / "run", {**TOP, **TEXT, "vision_config": VISION}, 0, pictures=20)
    run = ["train", "base", folder / "run", "--steps", 2000]
    often = ["--log-every", 1, "--save-every", 2000, "--evaluate-every", 4000, "--device", "cpu"]
    return [*run, *often, "--domains", "scene", *more]


def wait_for(path, process):
    """Until a file has a line."""
    while not path.exists() or b"\n" not in path.read_bytes():
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.05)


OUTPUT = {"batch": "out.jsonl", "evaluate": "out.jsonl", "train": "run/log.jsonl"}
COMMANDS = {"batch": batch, "evaluate": evaluation, "train": training}
LINES = {"batch": 1, "evaluate": 2, "train": 1}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_loses_nothing_and_a_second_process_is_refused(tmp_path, name, number, code):
    command, path = COMMANDS[name](tmp_path), tmp_path / OUTPUT[name]
    first = start(*command)
    wait_for(path, first)
    second = ended(start(*command))
    assert second[0] == 1
    assert f"is being written by process {first.pid} on " in second[2]
    assert second[2].count("\n") == 1
    assert first.poll() is None
    first.send_signal(number)
    found, out, error = ended(first)
    assert found == code, error
    assert "the same command continues" in out + error
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= LINES[name]
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
    if name == "train":
        step = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
        assert step == rows[-1]["step"] < 2000
        assert (tmp_path / "run" / "model.safetensors").exists()
        again = start(*command)
        assert f"step {step + 1}/2000" in again.stdout.readline()
        again.kill()
        again.communicate()


def test_ctrl_c_reaches_the_subprocesses_that_make_data_as_well(tmp_path):
    process = start(*training(tmp_path, "--workers", 1), start_new_session=True)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, error = ended(process)
    assert code == 130, error
    assert "the same command continues" in out
    assert (tmp_path / "run" / "state.pt").exists()


def test_doubles_are_dropped(tmp_path):
    command = [*evaluation(tmp_path), "--count", 1]
    assert ended(start(*command))[0] == 0
    path = tmp_path / "out.jsonl"
    head, *rows = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(rows) * 2)
    assert len(ResultsFile.read(path).rows) == len(rows) == 3
    folder = tmp_path / "b"
    folder.mkdir()
    rows = [{"image": None, "question": "Hello"}]
    (folder / "questions.jsonl").write_text(json.dumps(rows[0]) + "\n")
    command = ["generate", "--batch-file", folder / "questions.jsonl", "--max-new-tokens", 1]
    command += ["--output", folder / "out.jsonl", "--quiet"]
    assert ended(start(*command))[0] == 0
    once = (folder / "out.jsonl").read_text()
    (folder / "out.jsonl").write_text(once * 3)
    assert ended(start(*command))[0] == 0
    assert (folder / "out.jsonl").read_text() == once


def no_space(limit):
    """Makes every file of a child end at `limit` bytes, as a full disk does."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return limited


@pytest.mark.parametrize(
    ("name", "limit"), [("batch", 3000), ("evaluate", 3000), ("train", 30_000), ("train", 300)]
)
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, name, limit):
    command = COMMANDS[name](tmp_path)
    if name == "train":
        command[command.index(2000)] = 1
    process = start(*command, preexec_fn=no_space(limit))
    code, _, error = ended(process)
    assert code == 1
    lines = [line for line in error.splitlines() if "error" in line]
    assert len(lines) == 1, error
    assert "cannot be written: File too large" in lines[0]
    left = [file for file in tmp_path.rglob(".*") if file.suffix in (".partial", ".lock")]
    assert left == []
    path = tmp_path / OUTPUT[name]
    if path.exists():
        assert path.read_bytes().endswith(b"\n")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) >= 1


STREAMS = {
    "answer": ["generate", "--quiet"],
    "json": ["generate", "--json"],
    "batch": ["generate", "--batch-file", "q.jsonl", "--max-new-tokens", "1"],
    "list": ["--help"],
    "report": ["evaluate", "report", "results.jsonl"],
    "check": ["train", "check", "rows.jsonl"],
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "q.jsonl").write_text('{"image": null, "question": "Hello"}\n')
    row = {"image": str(SCENE), "question": "q?", "answer": "7", "boxes": [[0, 0, 1, 1]]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = [*evaluation(folder), "--count", 1, "--out", folder / "results.jsonl"]
    assert ended(start(*command))[0] == 0
    return folder


@pytest.mark.parametrize("name", STREAMS)
def test_a_full_disk_behind_stdout_is_one_line(streams, name):
    with open("/dev/full", "w") as full:
        code, _, error = ended(start(*STREAMS[name], stdout=full, cwd=streams))
    assert code == 1
    lines = [line for line in error.splitlines() if "error" in line]
    assert lines == ["nanoglimpse: error: the output cannot be written: No space left on device"], (
        error
    )


@pytest.mark.parametrize("name", STREAMS)
def test_a_full_disk_behind_stderr_changes_nothing(streams, name):
    with open("/dev/full", "w") as full:
        code, out, _ = ended(start(*STREAMS[name], stderr=full, cwd=streams))
    assert code == 0
    assert out


def test_results_can_go_into_a_pipe_or_nowhere(streams, tmp_path):
    command = [*STREAMS["batch"], "--quiet", "--output"]
    code, out, error = ended(start(*command, "/dev/stdout", cwd=streams))
    assert code == 0, error
    assert json.loads(out)["question"] == "Hello"
    null, full = (device(name, tmp_path) for name in ("null", "full"))
    assert ended(start(*command, null, cwd=streams))[0] == 0
    assert null.is_char_device()
    code, _, error = ended(start(*command, full, cwd=streams))
    assert code == 1
    assert "full cannot be written: No space left on device" in error


def test_an_input_is_not_overwritten(tmp_path):
    (tmp_path / "a.png").write_bytes(SCENE.read_bytes())
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "q?"}\n')
    for command in (
        ["generate", "q?", "--image", "a.png", "--overlay", "b.png"],
        ["generate", "--batch-file", "q.jsonl", "--output", "q.jsonl"],
        ["generate", "--batch-file", "q.jsonl", "--output", "b.png"],
        ["evaluate", "--data", "q.jsonl", "--out", "q.jsonl"],
        ["evaluate", "report", "q.jsonl", "--html", "q.jsonl"],
    ):
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        code, _, error = ended(start(*command, cwd=tmp_path))
        assert code == 2, command
        assert "which the command reads; name another file" in error
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_threads_of_a_session_lose_no_turn(nano):
    session = nano.session(str(SCENE))
    questions = [f"Which number does the diamond show, {n}?" for n in range(6)]
    begin = threading.Barrier(len(questions))

    def ask(question):
        begin.wait()
        session.chat(question, max_new_tokens=3)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = session.turns
    assert sorted(question for question, _ in turns) == sorted(questions)
    # Each answer is the one to the turns before it.
    again = nano.session(str(SCENE))
    for question, answer in turns:
        assert again.chat(question, max_new_tokens=3).text == answer
