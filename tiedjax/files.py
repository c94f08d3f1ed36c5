"""Writing files so that nothing is half-written and nobody else writes the same folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tiedjax.errors import UserError


def local_path(text: str | Path, option: str) -> Path:
    """The path that `option` was given. UserError for an address with a scheme, such as gs://BUCKET/DIR.

    Python would take it for a relative path and write to a new folder named `gs:`.
    """
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(text)):  # one slash is what a Path leaves of two
        raise UserError(
            f"{option}: must be a path on a disk, got the {scheme[1]}:// address {str(text)!r}; mount it and name the "
            "folder"
        )
    return Path(text)


def place_and_step(text: str) -> tuple[str, int | None]:
    """RUN@STEP in two; a path that exists as it stands is not cut, and has no step."""
    if not Path(text).exists() and (match := re.fullmatch(r"(.+)@(\d+)", text)):
        return match[1], int(match[2])
    return text, None


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces the file by one with this content (text as UTF-8), whole or not at all; or raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def sole_writer(directory: Path, holder: str) -> Iterator[None]:
    """Creates the folder and holds it as `holder`: two jobs that write one run would mix their weights.

    Raises UserError if it cannot be written or another live process holds it, which the error names; the hold ends
    with the process, however it ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            other = handle.read().strip() or "another process"
            raise UserError(f"{directory}: {other} is writing this run; wait for it or choose another --out") from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            handle.truncate(0)
            handle.write(holder + "\n")
            handle.flush()
        yield
