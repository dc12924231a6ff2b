"""Comparing methods: what is asked, what an answer is worth and costs, tables and a page of it.

`python -m nanoglimpse.evaluate` asks, `… report` reads what stands in the files, `… judge` lets a
language model grade them.
"""
