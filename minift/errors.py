"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a file, a column, a flag, a model folder. The message is one line that says
    what was expected, what was found, where, and what to do. The command line prints it
    without a traceback and exits with status 2."""
