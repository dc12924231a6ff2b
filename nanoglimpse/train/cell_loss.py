"""The cell loss: an auxiliary head predicts the content of the cell of every visual token.

The language loss alone teaches a vision encoder slowly: after thousands of pictures, digits are
still read at chance. A linear head on the visual tokens therefore predicts, for the upper and the
lower half of each cell, the thing there: its kind, its colour, the first letters of its name and
the characters of its value.

Every cell of a thing has to predict all of this, unless the thing has a name: then only the cells
of the printed name and value have to predict the name, and only those of the value the value, since
the decoder finds a value by its name and one place is enough.

The head also predicts the characters that are printed in a half, from left to right. A character
belongs to the cell of its middle, so that none is read twice.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglimpse.model.rope import Grid
from nanoglimpse.world.canvas import edges
from nanoglimpse.world.types import COLOURS, KINDS, Box, Picture, Thing

LETTERS, CHARACTERS = "abcdefghijklmnopqrstuvwxyz", "0123456789.ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAME_LENGTH, VALUE_LENGTH = 6, 6
PRINTED_LENGTH = 5  # the most characters that are printed side by side in a cell
FIELDS = (
    len(KINDS) + 1,
    len(COLOURS) + 1,
    *[len(LETTERS) + 1] * NAME_LENGTH,
    *[len(CHARACTERS) + 1] * VALUE_LENGTH,
    *[len(CHARACTERS) + 1] * PRINTED_LENGTH,
)
HALVES = 2
FIRST_PRINTED = len(FIELDS) - PRINTED_LENGTH
REPORTED = {"kind": 0, "colour": 1, "name": 2, "value": 2 + NAME_LENGTH, "read": FIRST_PRINTED}
NOTHING_WEIGHT, THING_WEIGHT, TEXT_WEIGHT = 0.3, 1.0, 5.0
COVERED, PRINTED = 0.2, 0.4
IGNORED = -100


def cell_targets(picture: Picture, grid: Grid, merge: int) -> tuple[Tensor, Tensor]:
    """The targets of the two halves of every cell.

    Returns:
        targets: int64 [N, 2, fields], 0 for an empty field, IGNORED where it need not be predicted.
        weights: fp32 [N, 2].
    """
    height, width = HALVES * grid[1] // merge, grid[2] // merge
    rows = torch.tensor([[0] * FIRST_PRINTED, *(_fields(thing) for thing in picture.things)])
    things = _cover([thing.box for thing in picture.things], height, width)
    best, thing = things.max(0)
    thing = torch.where(best > COVERED, thing + 1, 0)
    texts = [
        (box, box is thing.text_boxes[-1]) for thing in picture.things for box in thing.text_boxes
    ]
    most, text = _cover([box for box, _ in texts], height, width).max(0)
    inked, values = most > COVERED, torch.tensor([is_value for _, is_value in texts])
    weights = torch.where(thing > 0, THING_WEIGHT, NOTHING_WEIGHT)
    weights[(thing > 0) & inked] = TEXT_WEIGHT
    wanted = rows[thing]
    named = torch.tensor([False, *(bool(thing.name) for thing in picture.things)])[thing]
    wanted[..., REPORTED["value"] :][named & ~(inked & values[text])] = IGNORED
    wanted[..., REPORTED["name"] : REPORTED["value"]][named & ~inked] = IGNORED
    wanted = torch.cat((wanted, _printed(picture, height, width)), dim=2)
    return _by_token(wanted, width), _by_token(weights, width)


def _printed(picture: Picture, height: int, width: int) -> Tensor:
    """Int64 [height, width, PRINTED_LENGTH], the characters of each half, padded with 0."""
    found: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for thing in picture.things:
        for (x0, y0, x1, y1), text in zip(thing.text_boxes, thing.texts, strict=True):
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
    """Groups halves by visual token, [2H, W, …] -> [H · W, 2, …]."""
    return x.view(-1, HALVES, width, *x.shape[2:]).transpose(1, 2).flatten(0, 1)


def _cover(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """Fp32 [boxes, height, width], the share of each half that each box covers."""
    x0, y0, x1, y1 = torch.tensor(boxes).T[..., None]
    columns, rows = torch.arange(width), torch.arange(height)
    across = (x1 * width).clamp_max(columns + 1) - (x0 * width).clamp_min(columns)
    down = (y1 * height).clamp_max(rows + 1) - (y0 * height).clamp_min(rows)
    return down.clamp_min(0)[:, :, None] * across.clamp_min(0)[:, None, :]


def _fields(thing: Thing) -> list[int]:
    colour = COLOURS.index(thing.colour) + 1 if thing.colour else 0
    name = [LETTERS.index(c) + 1 for c in thing.name[:NAME_LENGTH].lower()]
    value = [CHARACTERS.index(c) + 1 for c in thing.value[:VALUE_LENGTH]]
    name += [0] * (NAME_LENGTH - len(name))
    value += [0] * (VALUE_LENGTH - len(value))
    return [KINDS.index(thing.kind) + 1, colour, *name, *value]


class CellHead(nn.Module):
    """The linear head that predicts the content of cells; it is not part of the checkpoint."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, HALVES * sum(FIELDS))

    def forward(
        self, visual: Tensor, wanted: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the accuracy of the first field of each entry of `REPORTED` on text.

        Args:
            visual: [N, C], the visual tokens.
            wanted, weights: as returned by `cell_targets`.
        """
        logits = self.linear(visual).float().view(-1, sum(FIELDS))
        wanted, halves = wanted.view(-1, len(FIELDS)), weights.view(-1)
        loss, right = torch.zeros(()), []
        text = halves == TEXT_WEIGHT
        for field, part in enumerate(logits.split(FIELDS, dim=1)):
            loss = loss + F.cross_entropy(part, wanted[:, field], reduction="none")
            counted = text & (wanted[:, field] != IGNORED)
            right.append((part[counted].argmax(1) == wanted[counted, field]).float())
        figures = {name: float(right[field].mean()) for name, field in REPORTED.items()}
        return loss @ halves / halves.sum(), figures
