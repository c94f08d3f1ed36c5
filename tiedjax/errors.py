"""The exceptions whose message, one line, is all that a person needs to read."""


class UserError(ValueError):
    """Bad input: its message is one line that says what was wrong, where, and what would be right.

    The command line prints the message and exits with status 2; Python callers see a ValueError.
    """


class TrainingError(RuntimeError):
    """The run cannot go on, and its config is at fault: one line that says where and what to try."""
