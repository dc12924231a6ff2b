"""Compares what two commits compute, to the bit: `python tests/compare_commits.py BASE [OTHER]`.

Each commit is checked out into a folder of its own and runs in a process of its own, on this
machine: all example pictures and questions, every method at three caps in both ways of dropping
keys and values, batches, sessions, a video, int8 and int4. Tokens, kept masks, positions and
budgets are compared; a digest stands for a tensor. A difference between machines says nothing, so
both sides are run each time. OTHER is HEAD if it is not given.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CAPS = (0.1, 0.3, 0.6)
# All questions take a minute; every method at every cap is asked some of them.
QUESTIONS_PER_METHOD = 3
SETUPS = ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"})


def digest(tensor):
    """Of a tensor's values and shape."""
    rows = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(rows.shape)} {rows.tolist()}".encode()).hexdigest()[:16]


def outcome(run, *args, **options):
    """What a call returns, or the class of its error; texts of errors may change."""
    try:
        return run(*args, **options)
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__ if "nanoglimpse" in cls.__module__]


def described(answer):
    """An answer, without its times."""
    budgets = answer.stats.budgets
    shares = [budgets.input_ratio, budgets.prefill_ratio, budgets.decode_kv_ratio]
    importance = None if answer.importance is None else digest(answer.importance)
    return [answer.text, answer.token_ids, digest(answer.kept.long()), importance, shares]


def asked_of(engine):
    """`engine.ask`, described."""
    return lambda *args, **options: described(engine.ask(*args, **options))


def record(folder):
    """Yields (case, outcome) for the package on this process's path; examples lie in `folder`."""
    import torch

    import nanoglimpse
    from nanoglimpse.methods import METHODS

    torch.set_num_threads(1)
    lines = (folder / "questions.jsonl").read_text("utf-8").splitlines()
    asked = [(str(folder / row["image"]), row["question"]) for row in map(json.loads, lines)]
    pictures = sorted({picture for picture, _ in asked})
    for setup in SETUPS:
        engine = nanoglimpse.load("nano", device="cpu", **setup)
        label = " ".join(setup.values()) or "float32"
        for picture, question in asked:
            answer = outcome(asked_of(engine), picture, question)
            yield f"{label} {Path(picture).name} {question}", answer
    engine = nanoglimpse.load("nano", device="cpu")

    answered = asked_of(engine)

    def prefilled(picture, question, **options):
        prefill = engine.prefill(engine.prompt(picture, question), **options)
        return [digest(prefill.positions), digest(prefill.kept.long()), digest(prefill.logits)]

    for method in METHODS:
        for drop in ("all", "later"):
            for cap in CAPS if METHODS[method].budget != "fixed" else [None]:
                options = {"method": method, "kv_drop": drop, "max_ratio": cap}
                for picture, question in asked[:: len(asked) // QUESTIONS_PER_METHOD]:
                    case = f"{method} {drop} {cap} {Path(picture).name} {question}"
                    yield case, outcome(answered, picture, question, **options)
                    yield f"prefill {case}", outcome(prefilled, picture, question, **options)
    for method in ("glimpse", "fastv", "pdrop", "visionzip", "dense"):
        cap = {} if method == "dense" else {"max_ratio": 0.3}
        batch = engine.ask_many(asked, method=method, max_batch_tokens=2000, **cap)
        yield f"batch {method}", [described(answer) for answer in batch]
        session = engine.session(pictures[:2], method, **cap)
        yield f"session {method}", [described(session.ask(question)) for _, question in asked[:4]]
        yield f"chat {method}", [described(session.chat(question)) for _, question in asked[:4]]
        with tempfile.TemporaryDirectory() as scratch:
            session.save(Path(scratch) / "session")
            again = engine.load_session(Path(scratch) / "session")
        yield f"saved session {method}", described(again.chat(asked[5][1]))
        session.add(pictures[2])
        yield f"session with one more {method}", described(session.ask(asked[5][1]))
    clip = nanoglimpse.Video([pictures[0], pictures[0], pictures[0], pictures[0]])
    for options in (
        {},
        {"max_ratio": 0.3},
        {"max_frame_ratio": 0.3},
        {"prune_videos": False},
        {"method": "evs", "max_ratio": 0.6},
    ):
        yield f"video {options}", outcome(answered, clip, asked[0][1], **options)


def run(checkout, examples, out):
    """Records a checkout in a process of its own."""
    command = [sys.executable, __file__, "--record", str(examples), str(out)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=checkout, env=environment)


def main(arguments=None):
    """Prints each case that differs; returns 1 if one does."""
    parser = argparse.ArgumentParser(description="Compares what two commits compute, to the bit.")
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument("other", metavar="OTHER", nargs="?", default="HEAD", help="another one")
    args = parser.parse_args(arguments)
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        sides, examples = [], Path(scratch) / "0" / "weights" / "nano" / "examples"
        for number, commit in enumerate((args.base, args.other)):
            checkout = Path(scratch) / str(number)
            subprocess.run(["git", "clone", "-q", "-n", root, checkout], check=True)
            subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=checkout, check=True)
        for number in range(2):
            out = Path(scratch) / f"{number}.json"
            sides.append((run(Path(scratch) / str(number), examples, out), out))
        codes = [process.wait() for process, _ in sides]
        if any(codes):
            return 1
        base, other = (json.loads(out.read_text("utf-8")) for _, out in sides)
    wrong = [case for case in {**base, **other} if base.get(case) != other.get(case)]
    for case in wrong:
        print(f"{case}\n  {args.base}: {base.get(case)}\n  {args.other}: {other.get(case)}")
    errors = sum(all(isinstance(x, str) for x in found) for found in base.values())
    print(f"{len(base)} cases ({errors} of them errors), {len(wrong)} differ")
    return bool(wrong)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        found = dict(record(Path(sys.argv[2])))
        Path(sys.argv[3]).write_text(json.dumps(found), "utf-8")
    else:
        sys.exit(main())
