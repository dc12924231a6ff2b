"""The command line: options, progress, errors, and the commands that answer questions."""
