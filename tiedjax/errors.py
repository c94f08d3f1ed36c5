"""The one exception that means: the person who called can mend this."""


class UserError(ValueError):
    """Bad input: its message is one line that says what was wrong, where, and what would be right.

    The command line prints the message and exits with status 2; Python callers see a ValueError.
    """
