"""Terminals: options, progress, errors, and the commands that answer questions."""
