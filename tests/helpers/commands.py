"""Commands run in this process."""


def exit_code(main, arguments):
    """The exit code of a command, however it ends."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
