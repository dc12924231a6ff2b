"""A synthetic world for grounded question answering: pictures, questions and where to look.

Scenes of coloured shapes, receipts and forms, and bar charts, drawn with Pillow alone and the same
for the same seed and index on every machine. Seeds below one million are for training, the next
million is held out, and the third has larger pictures, pairs and words that training never shows.
"""

from .model import (
    BRIEF_SUFFIX,
    COLOURS,
    DOMAINS,
    KINDS,
    LEFT_OUT_PAIRS,
    QUESTION_KINDS,
    SHAPES,
    SPLITS,
    Box,
    Item,
    Picture,
    Question,
    split_of,
)
from .names import NAMES, TRANSFER_NAMES
from .picture import render

__all__ = [
    "BRIEF_SUFFIX",
    "COLOURS",
    "DOMAINS",
    "KINDS",
    "LEFT_OUT_PAIRS",
    "NAMES",
    "QUESTION_KINDS",
    "SHAPES",
    "SPLITS",
    "TRANSFER_NAMES",
    "Box",
    "Item",
    "Picture",
    "Question",
    "render",
    "split_of",
]
