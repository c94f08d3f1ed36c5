"""How a process ends where an orderly exit would wait for others, for threads or for processes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from typing import NoReturn

from tiedjax.errors import Status

_abandoned = threading.Event()  # whether there are threads that nothing waits for


def end(line: str, status: int) -> NoReturn:
    """Says why and ends this process at once. If it has stalled, what every thread is at comes first."""
    try:
        _flush()
        if status == Status.STALLED:
            faulthandler.dump_traceback(file=2)
        os.write(_the_last_word(), f"tiedjax: {line}\n".encode())
    finally:  # whatever has become of the terminal
        os._exit(status)


def abandon_threads() -> None:
    """From here on `leave` waits for no thread.

    Those of a save that failed wait for minutes, for each other; where a signal has stopped a library, one of its own
    may be left, as that with which JAX would warn of a slow start after a minute.
    """
    _abandoned.set()


def leave(status: int) -> NoReturn:
    """Ends the process of a command that has said all it has to say; SystemExit unless threads are abandoned.

    What nobody reads any more is no failure. What cannot be written to a file is: then the status is 1.
    """
    if not _abandoned.is_set():
        sys.exit(_without_output(status))
    try:
        _flush()
    finally:
        os._exit(status)


def _without_output(status: int) -> int:
    """The status with what is still to be printed written; where it cannot be, Python would end with its own, 120."""
    if sys.stdout is None:
        return status
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) or status:
            return status
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"tiedjax: standard output: cannot be written: {reason}", file=sys.stderr)
        return Status.FAILED
    return status


def _flush() -> None:
    flush = threading.Thread(target=_flush_output, daemon=True)
    flush.start()
    flush.join(1)  # whoever holds the stream may be what hangs


def _flush_output() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()


def _the_last_word() -> int:
    """A descriptor of standard error that is this thread's alone: what other threads still say is lost."""
    try:
        alone = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except OSError:
        return 2
    return alone
