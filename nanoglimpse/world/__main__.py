"""Command line: `python -m nanoglimpse.world --count 24 --out folder`.

Writes the pictures, their questions in two layouts, and a contact sheet to look at.
"""

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..errors import NanoglimpseError, UsageError
from ..files import write_whole
from ..generate import Parser
from .model import DOMAINS, QUESTION_KINDS, SPLITS, Box, Picture, Question
from .picture import render

LEAST_SIDE = 168
SHEET_LIMIT, SHEET_COLUMNS, SHEET_QUESTIONS = 48, 4, 4
THUMB, MARGIN, LINE, WRAP = 340, 12, 15, 54
OUTLINES = ((230, 0, 120), (0, 160, 160), (200, 110, 0), (60, 60, 230))
REQUEST = (
    " Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)


def parser() -> Parser:
    """All options, each with its default."""
    p = Parser(
        prog="python -m nanoglimpse.world",
        description="Draw pictures with questions, answers and the boxes that hold the evidence: "
        "PNG files, questions.jsonl, viscot.json (the Visual-CoT layout) and sheet.png.",
    )
    p.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    p.add_argument("--count", type=_positive, default=24, help="of pictures (default: 24)")
    seed = p.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=int, help="of the pictures (default: the split's first)")
    seed.add_argument("--split", choices=SPLITS, default="heldout", help="(default: heldout)")
    p.add_argument("--domain", choices=DOMAINS, help="(default: all)")
    p.add_argument("--canvas", type=_canvas, help="448 or 448x336 (default: various)")
    kinds = [kind for domain in DOMAINS for kind in QUESTION_KINDS[domain]]
    p.add_argument("--kinds", nargs="+", choices=kinds, help="of question (default: all)")
    p.add_argument(
        "--questions", type=_positive, metavar="N", help="per picture at most (default: all)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _canvas(text: str) -> tuple[int, int]:
    """Width and height from "448" or "448x336"."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not like 448 or 448x336")
    width, height = int(sides[0]), int(sides[-1])
    if min(width, height) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"{text}: a side has {LEAST_SIDE} pixels at least")
    return width, height


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; its exit code: 2 for misuse, 1 for failure, 130 if stopped."""
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except NanoglimpseError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"nanoglimpse: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def run(args: argparse.Namespace) -> int:
    """Draws and writes everything. Raises what `main` turns into lines."""
    out, seed = Path(args.out), args.seed
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out takes a folder")
    pictures, plain, viscot = [], [], []
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
        name, asked = file_name(picture), picture.questions[: args.questions]
        write_whole(out / name, _png(picture.image))
        plain += [plain_record(picture, question) for question in asked]
        viscot += [viscot_record(picture, question) for question in asked if question.boxes]
        pictures = [*pictures, picture][:SHEET_LIMIT]
        _progress(args, index + 1)
    lines = "".join(json.dumps(record) + "\n" for record in plain)
    write_whole(out / "questions.jsonl", lines.encode())
    numbered = [{"question_id": number, **record} for number, record in enumerate(viscot)]
    write_whole(out / "viscot.json", json.dumps(numbered, indent=1).encode())
    write_whole(out / "sheet.png", _png(contact_sheet(pictures, args.questions)))
    return 0


def _progress(args: argparse.Namespace, done: int) -> None:
    if not args.quiet:
        end = "\n" if done == args.count else ""
        print(f"\r{args.out}: {done} of {args.count} pictures", end=end, file=sys.stderr)


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def file_name(picture: Picture) -> str:
    """What a picture's file is called."""
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
    """An entry of viscot.json, less its number: one box around all of the evidence."""
    box, name = _union(question.boxes), file_name(picture)
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
        "conversations": [{"from": who, "value": said} for who, said in turns],
    }


def _union(boxes: Sequence[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def contact_sheet(pictures: Sequence[Picture], limit: int | None = None) -> Image.Image:
    """Small pictures with their first questions beneath, evidence outlined in the same colour."""
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
    asked = picture.questions[: min(limit or SHEET_QUESTIONS, SHEET_QUESTIONS)]
    scale = THUMB / max(picture.image.size)
    size = tuple(round(side * scale) for side in picture.image.size)
    thumb = picture.image.resize(size, Image.Resampling.LANCZOS)
    lines = [
        (line, colour)
        for question, colour in zip(asked, OUTLINES, strict=False)
        for line in textwrap.wrap(f"{question.text}  {question.answer}", WRAP)
    ]
    card = Image.new("RGB", (THUMB, thumb.height + 4 + LINE * len(lines)), "white")
    card.paste(thumb)
    draw = ImageDraw.Draw(card)
    for question, colour in zip(asked, OUTLINES, strict=False):
        for box in question.boxes:
            draw.rectangle([at * size[axis % 2] for axis, at in enumerate(box)], None, colour, 2)
    for number, (line, colour) in enumerate(lines):
        font = ImageFont.load_default(12)
        draw.text((0, thumb.height + 4 + number * LINE), line, colour, font)
    return card


if __name__ == "__main__":
    raise SystemExit(main())
