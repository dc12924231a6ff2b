"""A synthetic world for grounded question answering: pictures, questions and their evidence.

The world has scenes of coloured shapes, receipts and forms, and bar charts. Pillow alone draws
them, and equal seeds and indices give equal pictures on every machine. Seeds below one million are
for training and the next million is held out; the third million, the transfer split, has larger
pictures, and colour and shape pairs and words that training never shows.
"""

from nanoglimpse.world.render import render
from nanoglimpse.world.types import (
    BRIEF_SUFFIX,
    COLOURS,
    DOMAINS,
    KINDS,
    LEFT_OUT_PAIRS,
    QUESTION_KINDS,
    SHAPES,
    SPLITS,
    Box,
    Picture,
    Question,
    Thing,
    split_of,
)
from nanoglimpse.world.words import NAMES, TRANSFER_NAMES

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
    "Picture",
    "Question",
    "Thing",
    "render",
    "split_of",
]
