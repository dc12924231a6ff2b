"""The dense auxiliary loss: every visual token says what lies under it.

Language alone teaches a vision encoder from scratch slowly: after thousands of pictures the digits
are still at chance. So a linear head on the visual tokens predicts, for the upper and the lower
half of each cell, kind, colour, first letters of the name and characters of the value of the thing
there. All cells of a thing carry all of it; but where it has a name, only those of its value do,
and those of the name the name alone: a decoder finds a value by the name, and once is enough.
Reading comes before that: a half also says which characters are printed in it, from left to right.
A character belongs to the cell that its middle is in, so that none is read twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rope import Grid
from ..world import COLOURS, KINDS, Picture
from ..world.canvas import edges

LETTERS, CHARACTERS = "abcdefghijklmnopqrstuvwxyz", "0123456789.ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAME_LENGTH, VALUE_LENGTH = 6, 6
PRINTED_LENGTH = 5  # as many characters as are printed beside each other in a cell
FIELDS = (
    len(KINDS) + 1,
    len(COLOURS) + 1,
    *[len(LETTERS) + 1] * NAME_LENGTH,
    *[len(CHARACTERS) + 1] * VALUE_LENGTH,
    *[len(CHARACTERS) + 1] * PRINTED_LENGTH,
)
HALVES = 2
READ = len(FIELDS) - PRINTED_LENGTH
SHOWN = {"kind": 0, "colour": 1, "name": 2, "value": 2 + NAME_LENGTH, "read": READ}
NOTHING_WEIGHT, THING_WEIGHT, TEXT_WEIGHT = 0.3, 1.0, 5.0
COVERED, PRINTED = 0.2, 0.4
IGNORED = -100


def targets(picture: Picture, grid: Grid, merge: int) -> tuple[Tensor, Tensor]:
    """What to predict.

    Returns:
        int64 [N, 2, fields], 0 for nothing there, IGNORED for what a half need not know; and fp32
        [N, 2], how much each half counts.
    """
    height, width = HALVES * grid[1] // merge, grid[2] // merge
    rows = torch.tensor([[0] * READ, *(_fields(item) for item in picture.items)])
    things = _cover([item.box for item in picture.items], height, width)
    best, thing = things.max(0)
    thing = torch.where(best > COVERED, thing + 1, 0)
    texts = [(box, box is item.text_boxes[-1]) for item in picture.items for box in item.text_boxes]
    most, text = _cover([box for box, _ in texts], height, width).max(0)
    inked, values = most > COVERED, torch.tensor([is_value for _, is_value in texts])
    weights = torch.where(thing > 0, THING_WEIGHT, NOTHING_WEIGHT)
    weights[(thing > 0) & inked] = TEXT_WEIGHT
    wanted = rows[thing]
    named = torch.tensor([False, *(bool(item.name) for item in picture.items)])[thing]
    wanted[..., SHOWN["value"] :][named & ~(inked & values[text])] = IGNORED
    wanted[..., SHOWN["name"] : SHOWN["value"]][named & ~inked] = IGNORED
    wanted = torch.cat((wanted, _printed(picture, height, width)), dim=2)
    return _by_token(wanted, width), _by_token(weights, width)


def _printed(picture: Picture, height: int, width: int) -> Tensor:
    """int64 [height, width, PRINTED_LENGTH], the characters of each half, 0 behind the last."""
    found: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for item in picture.items:
        for (x0, y0, x1, y1), text in zip(item.text_boxes, item.texts, strict=True):
            top, foot = y0 * height, y1 * height
            halves = [
                row
                for row in range(int(top), min(int(foot) + 1, height))
                if min(foot, row + 1) - max(top, row) > PRINTED * min(foot - top, 1)
            ]
            sides = [x0 + share * (x1 - x0) for share in edges(text)]
            for character, left, right in zip(text.upper(), sides, sides[1:], strict=False):
                middle = (left + right) / 2 * width
                for row in halves if character in CHARACTERS else ():
                    cell = found.setdefault((row, min(int(middle), width - 1)), [])
                    cell.append((middle, CHARACTERS.index(character) + 1))
    printed = torch.zeros(height, width, PRINTED_LENGTH, dtype=torch.int64)
    for (row, column), characters in found.items():
        ordered = [number for _, number in sorted(characters)][:PRINTED_LENGTH]
        printed[row, column, : len(ordered)] = torch.tensor(ordered)
    return printed


def _by_token(x: Tensor, width: int) -> Tensor:
    """[2H, W, …] -> [H · W, 2, …]"""
    return x.view(-1, HALVES, width, *x.shape[2:]).transpose(1, 2).flatten(0, 1)


def _cover(boxes, height: int, width: int) -> Tensor:
    """fp32 [boxes, height, width], the share of each cell that each box covers."""
    x0, y0, x1, y1 = torch.tensor(boxes).T[..., None]
    columns, rows = torch.arange(width), torch.arange(height)
    across = (x1 * width).clamp_max(columns + 1) - (x0 * width).clamp_min(columns)
    down = (y1 * height).clamp_max(rows + 1) - (y0 * height).clamp_min(rows)
    return down.clamp_min(0)[:, :, None] * across.clamp_min(0)[:, None, :]


def _fields(item) -> list[int]:
    colour = COLOURS.index(item.colour) + 1 if item.colour else 0
    name = [LETTERS.index(c) + 1 for c in item.name[:NAME_LENGTH].lower()]
    value = [CHARACTERS.index(c) + 1 for c in item.value[:VALUE_LENGTH]]
    name += [0] * (NAME_LENGTH - len(name))
    value += [0] * (VALUE_LENGTH - len(value))
    return [KINDS.index(item.kind) + 1, colour, *name, *value]


class DenseHead(nn.Module):
    """The linear head; only training needs it."""

    def __init__(self, size: int):
        super().__init__()
        self.things = nn.Linear(size, HALVES * sum(FIELDS))

    def forward(
        self, visual: Tensor, wanted: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss, and shares of text halves that are right: the first of each of `SHOWN`.

        Args:
            visual: [N, C].
            wanted, weights: from `targets`.
        """
        logits = self.things(visual).float().view(-1, sum(FIELDS))
        wanted, halves = wanted.view(-1, len(FIELDS)), weights.view(-1)
        loss, right = torch.zeros(()), []
        text = halves == TEXT_WEIGHT
        for field, part in enumerate(logits.split(FIELDS, dim=1)):
            loss = loss + F.cross_entropy(part, wanted[:, field], reduction="none")
            asked = text & (wanted[:, field] != IGNORED)
            right.append((part[asked].argmax(1) == wanted[asked, field]).float())
        figures = {name: float(right[field].mean()) for name, field in SHOWN.items()}
        return loss @ halves / halves.sum(), figures
