"""Command line: `nanoglimpse world --count 24 --out folder`.

Writes pictures, their questions in two layouts, and a contact sheet.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, adder
from nanoglimpse.cli.kinds import COUNT, NAME, SEED, Kind
from nanoglimpse.errors import UsageError
from nanoglimpse.files import write_whole
from nanoglimpse.world.canvas import bounding_box
from nanoglimpse.world.render import render
from nanoglimpse.world.sheet import Card, contact_sheet, png
from nanoglimpse.world.types import DOMAINS, QUESTION_KINDS, REQUEST, SPLITS, Picture, Question

MIN_SIDE, MAX_SIDE, SHEET_LIMIT = 168, 4096, 48


def _canvas(text: str) -> tuple[int, int]:
    """Width and height from "448" or "448x336"."""
    sides = [int(side) for side in text.split("x") if side.isdecimal() and len(side) < 10]
    if len(sides) != text.count("x") + 1 or len(sides) > 2:
        raise ValueError
    if min(sides) < MIN_SIDE or max(sides) > MAX_SIDE:
        raise ValueError
    return sides[0], sides[-1]


CANVAS = Kind(f"as 448 or 448x336, with sides from {MIN_SIDE} to {MAX_SIDE} pixels", _canvas)


def parser() -> Parser:
    """The parser of the command line."""
    p = Parser(
        prog="nanoglimpse world",
        description="Draw pictures with questions, answers and the boxes that hold the evidence: "
        "PNG files, questions.jsonl, viscot.json (the Visual-CoT layout) and sheet.png.",
        quiet=True,
    )
    add = adder(p)
    add("--out", NAME, "folder to write to", required=True, metavar="FOLDER")
    add("--count", 24, "number of pictures", kind=COUNT)
    seed = adder(p.add_mutually_exclusive_group())
    seed("--seed", SEED, "seed of the pictures", "the split's first")
    seed("--split", "heldout", "split", choices=SPLITS)
    add("--domain", str, "draw this domain only", "all", DOMAINS)
    add("--canvas", CANVAS, "size in pixels, as 448 or 448x336", "various")
    add("--kinds", str, "kinds of questions", "all", sum(QUESTION_KINDS.values(), ()), nargs="+")
    add("--questions", COUNT, "limit per picture", "no limit", metavar="N")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (`console.run`)."""
    return console.run(run, parser(), arguments)


def run(args: argparse.Namespace) -> int:
    """Draws the pictures and writes all files.

    Raises:
        NanoglimpseError: an option makes no sense, or a file cannot be written.
    """
    out, seed = Path(args.out), args.seed
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, but {out} is a file")
    pictures: list[Picture] = []
    plain, viscot = [], []
    show = Progress(f"{args.out}: pictures", args.quiet)
    for index in range(args.count):
        picture = render(
            SPLITS[args.split].start if seed is None else seed,
            index,
            domain=args.domain,
            canvas=args.canvas,
        )
        if args.kinds:
            own = tuple(q for q in picture.questions if q.kind in args.kinds)
            picture = replace(picture, questions=own)
        name, questions = file_name(picture), picture.questions[: args.questions]
        write_whole(out / name, png(picture.image))
        plain += [plain_record(picture, question) for question in questions]
        viscot += [viscot_record(picture, question) for question in questions if question.boxes]
        pictures = [*pictures, picture][:SHEET_LIMIT]
        show(index + 1, args.count)
    lines = "".join(json.dumps(record) + "\n" for record in plain)
    write_whole(out / "questions.jsonl", lines.encode())
    numbered = [{"question_id": number, **record} for number, record in enumerate(viscot)]
    write_whole(out / "viscot.json", json.dumps(numbered, indent=1).encode())
    write_whole(out / "sheet.png", png(contact_sheet([_card(p, args.questions) for p in pictures])))
    return 0


def _card(picture: Picture, limit: int | None) -> Card:
    """A picture with its first questions and answers for the contact sheet."""
    return picture.image, [(f"{q.text}  {q.answer}", q.boxes) for q in picture.questions[:limit]]


def file_name(picture: Picture) -> str:
    """The file name of a picture."""
    return f"{picture.domain}_{picture.index:06d}.png"


def plain_record(picture: Picture, question: Question) -> dict:
    """A line of questions.jsonl."""
    return {
        "image": file_name(picture),
        "question": question.text,
        "answer": question.answer,
        "short": question.short,
        "boxes": question.boxes,
        "domain": picture.domain,
        "kind": question.kind,
        "seed": picture.seed,
        "index": picture.index,
    }


def viscot_record(picture: Picture, question: Question) -> dict:
    """An entry of viscot.json without its number; one box surrounds all of the evidence."""
    box, name = bounding_box(question.boxes), file_name(picture)
    pixels = [round(share * picture.image.size[axis % 2]) for axis, share in enumerate(box)]
    turns = (
        ("human", f"<image>\n{question.text}{REQUEST}"),
        ("gpt", "[" + ", ".join(f"{share:.3f}" for share in box) + "]"),
        ("human", "<image>"),
        ("gpt", question.answer),
    )
    return {
        "dataset": f"world_{picture.domain}",
        "split": "test",
        "image": [name, f"{name}###[{','.join(map(str, pixels))}]"],
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
    }


if __name__ == "__main__":
    raise SystemExit(main())
