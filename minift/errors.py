"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a file, a column, a flag, a model folder. The message is one line that says
    what was expected, what was found, where, and what to do. The command line prints it
    without a traceback and exits with status 2."""

    def __init__(self, message: str):
        # Names and labels from outside may hold line ends; the message is one line all the same.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
