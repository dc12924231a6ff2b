"""Command line: `nanoglimpse world --count 24 --out folder`.

Writes pictures, their questions in two layouts, and a contact sheet.
"""

import argparse
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, adder
from nanoglimpse.cli.kinds import COUNT, NAME, SEED, Kind
from nanoglimpse.errors import UsageError
from nanoglimpse.files import write_whole
from nanoglimpse.world.canvas import bounding_box
from nanoglimpse.world.render import render
from nanoglimpse.world.types import DOMAINS, QUESTION_KINDS, REQUEST, SPLITS, Picture, Question

MIN_SIDE, MAX_SIDE = 168, 4096
SHEET_LIMIT, SHEET_COLUMNS, SHEET_QUESTIONS = 48, 4, 4
THUMB, MARGIN, LINE, WRAP = 340, 12, 15, 54
OUTLINES = ((230, 0, 120), (0, 160, 160), (200, 110, 0), (60, 60, 230))


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
        write_whole(out / name, _png(picture.image))
        plain += [plain_record(picture, question) for question in questions]
        viscot += [viscot_record(picture, question) for question in questions if question.boxes]
        pictures = [*pictures, picture][:SHEET_LIMIT]
        show(index + 1, args.count)
    lines = "".join(json.dumps(record) + "\n" for record in plain)
    write_whole(out / "questions.jsonl", lines.encode())
    numbered = [{"question_id": number, **record} for number, record in enumerate(viscot)]
    write_whole(out / "viscot.json", json.dumps(numbered, indent=1).encode())
    write_whole(out / "sheet.png", _png(contact_sheet(pictures, args.questions)))
    return 0


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


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


def contact_sheet(pictures: Sequence[Picture], limit: int | None = None) -> Image.Image:
    """Small pictures above their first questions; the evidence is outlined in the text's colour."""
    cards = [_card(picture, limit) for picture in pictures]
    columns = min(SHEET_COLUMNS, len(cards))
    rows = [cards[at : at + columns] for at in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (THUMB + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            sheet.paste(card, (MARGIN + column * (THUMB + MARGIN), y))
        y += height
    return sheet


def _card(picture: Picture, limit: int | None) -> Image.Image:
    """One picture of the sheet."""
    questions = picture.questions[: min(limit or SHEET_QUESTIONS, SHEET_QUESTIONS)]
    scale = THUMB / max(picture.image.size)
    size = [round(side * scale) for side in picture.image.size]
    thumb = picture.image.resize(size, Image.Resampling.LANCZOS)
    lines = [
        (line, colour)
        for question, colour in zip(questions, OUTLINES, strict=False)
        for line in textwrap.wrap(f"{question.text}  {question.answer}", WRAP)
    ]
    card = Image.new("RGB", (THUMB, thumb.height + 4 + LINE * len(lines)), "white")
    card.paste(thumb)
    draw = ImageDraw.Draw(card)
    for question, colour in zip(questions, OUTLINES, strict=False):
        for box in question.boxes:
            draw.rectangle([at * size[axis % 2] for axis, at in enumerate(box)], None, colour, 2)
    for number, (line, colour) in enumerate(lines):
        font = ImageFont.load_default(12)
        draw.text((0, thumb.height + 4 + number * LINE), line, colour, font)
    return card


if __name__ == "__main__":
    raise SystemExit(main())
