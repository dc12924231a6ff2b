"""Grounded questions: pictures, questions, answers and evidence, for training and evaluation.

They come from the synthetic world or from files; see `qa` for what a question is, `viscot` for the
layouts of files, and `sources` for the examples that training draws.
"""
