"""`tiedjax`, and `python -m tiedjax`: signals are heard before all else is imported."""

from __future__ import annotations

import sys
from typing import NoReturn

from tiedjax.host import ending, signals


def command() -> NoReturn:
    """The process of a command line, and its end."""
    try:
        with signals.hearing():
            from tiedjax.cli import main

            status = main()
    except signals.Stopped as stopped:  # before `main` was there
        print(f"tiedjax: {stopped}", file=sys.stderr)
        status = stopped.status
    ending.leave(status)


if __name__ == "__main__":
    command()
