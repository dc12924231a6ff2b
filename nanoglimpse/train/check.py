"""`nanoglimpse train check FILE`: what of a file of questions can be trained on."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoglimpse.cli.console import Progress
from nanoglimpse.data.sources import FileExamples
from nanoglimpse.data.viscot import Row, read_questions
from nanoglimpse.errors import UsageError
from nanoglimpse.files import check_writable, write_whole
from nanoglimpse.world.sheet import LINES, Card, contact_sheet, png

PICTURES, REFUSED = 24, 20


def check_file(args: argparse.Namespace) -> int:
    """Prints counts and what lacks, and draws the first pictures with their boxes.

    Raises:
        UsageError: the file cannot be read, or has rows that training refuses; they are printed.
    """
    sheet, folder = Path(args.sheet), args.images or args.file.parent
    read = read_questions(args.file, folder)
    inputs = [args.file, *(row.picture for row in read.rows)]
    check_writable(sheet, "sheet", inputs)
    print(f"rows        {len(read.rows)} questions, {len(read.refused)} refused")
    for line in read.refused[:REFUSED]:
        print(f"refused     {line}")
    if read.refused:
        raise UsageError(f"{args.file} has {len(read.refused)} rows that are no questions")
    source = FileExamples(args.file, folder, 0, Progress("pictures"))
    for line in _counts(source):
        print(line)
    write_whole(sheet, png(contact_sheet(list(_cards(source.rows)))))
    print(f"sheet       {sheet}")
    return 0


def _counts(source: FileExamples) -> Iterator[str]:
    rows = source.rows
    yield f"usable      {len(rows)} questions about {len({row.picture for row in rows})} pictures"
    groups = Counter(row.group for row in rows)
    yield "data sets   " + ", ".join(f"{name} {count}" for name, count in groups.items())
    yield f"evidence    {source.located} questions"
    held = rows[source.count :]
    names = f", the last rows: {held[0].name} to {held[-1].name}" if held else ""
    yield f"trained on  {source.count} questions"
    yield f"held out    {len(held)} questions{names}"
    yield from (f"lacks       {line}" for line in source.lacks())


def _cards(rows: Sequence[Row]) -> Iterator[Card]:
    """The first pictures, each with its questions."""
    by_picture: dict[Path, list[Row]] = {}
    for row in rows:
        if row.picture in by_picture or len(by_picture) < PICTURES:
            by_picture.setdefault(row.picture, []).append(row)
    for own in by_picture.values():
        opened = [row.opened() for row in own[:LINES]]
        texts = (f"{row.qa.question}  {row.qa.answer}" for row in own)
        boxes = (one.boxes for one in opened)
        yield opened[0].image, list(zip(texts, boxes, strict=False))
