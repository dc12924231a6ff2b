"""Comparisons of pruning methods: questions, scores and costs of answers, tables and a page.

`python -m nanoglimpse.evaluate` answers questions into a file of results, `… report` summarises
such files, and `… judge` has a language model grade them.
"""
