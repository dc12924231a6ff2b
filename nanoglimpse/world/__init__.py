"""A synthetic world for grounded question answering: pictures, questions and their evidence.

The world has scenes of coloured shapes, receipts and forms, and bar charts. Pillow alone draws
them, and equal seeds and indices give equal pictures on every machine. Seeds below one million are
for training and the next million is held out; the third million, the transfer split, has larger
pictures, and colour and shape pairs and words that training never shows.
"""

from nanoglimpse.world.render import render
from nanoglimpse.world.types import BRIEF_SUFFIX, DOMAINS, QUESTION_KINDS, SPLITS, Box, Picture

__all__ = ["BRIEF_SUFFIX", "DOMAINS", "QUESTION_KINDS", "SPLITS", "Box", "Picture", "render"]
