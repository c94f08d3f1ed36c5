"""Reading files that may be anything, and writing them so that nothing is half-written and nobody else writes there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiedjax.errors import LockedError, UserError

MOST_TEXT = 2**30  # bytes of a file that is read whole as text
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def local_path(text: str | Path, option: str) -> Path:
    """The path that `option` was given. UserError for what no file can be called, and for gs://BUCKET/DIR and the like.

    Python would take an address for a relative path and write to a new folder named `gs:`.
    """
    refuse_impossible(str(text), option)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(text)):  # one slash is what a Path leaves of two
        raise UserError(
            f"{option}: must be a path on a disk, got the {scheme[1]}:// address {str(text)!r}; mount it and name the "
            "folder"
        )
    return Path(text)


def local_folder(text: str | Path, option: str) -> Path:
    """`local_path` with ~ and links followed as far as they lead."""
    return Path(os.path.realpath(os.path.expanduser(local_path(text, option))))


def refuse_impossible(text: str, option: str) -> None:
    """UserError for a path that the system refuses before it looks for it."""
    shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
    try:
        encoded = text.encode()  # Python reads others, TensorStore does not write them
    except UnicodeEncodeError:
        raise UserError(f"{option}: must be a path, got {shown}, which is not text") from None
    if b"\0" in encoded:
        raise UserError(f"{option}: must be a path, got {shown}, which holds a NUL character")
    if len(encoded) > _LONGEST_PATH or any(len(name) > _LONGEST_NAME for name in encoded.split(b"/")):
        raise UserError(
            f"{option}: must be a path of names of at most {_LONGEST_NAME} bytes, {_LONGEST_PATH:,} in all, got {shown}"
        )


def refuse_irregular(path: Path) -> None:
    """UserError unless the path names a regular file: to open a pipe waits without end, and a device may have no end.

    A file that is not there raises FileNotFoundError or NotADirectoryError, what else keeps it from being looked at an
    OSError.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file")


def read_text(path: Path, hint: str = "", most: int = MOST_TEXT) -> str:
    """The text of a UTF-8 file of at most `most` bytes. UserError otherwise; `hint` says what would be right."""

    def content() -> bytes:
        refuse_irregular(path)
        with path.open("rb") as file:
            return file.read(most + 1)

    return text_of(path, content, hint, most)


def text_of(path: Path, read: Callable[[], bytes], hint: str, most: int) -> str:
    """As UTF-8 what `read` returns of this file, if that has at most `most` bytes. UserError as of `read_text`."""
    then = f"; {hint}" if hint else ""
    try:
        content = read()
        if len(content) <= most:
            return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 at byte {error.start}{then}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{then}") from None
    raise UserError(f"{path}: cannot be read: has more than {most:,} bytes{then}")


def parse_json(text: str, where: str, hint: str = "", before: int = 0) -> Any:
    """What JSON text holds. UserError for other text, for numbers too long to be any, and for what is nested too deep.

    NaN and infinities, which JSON does not have, are refused too. `before` lines of the file precede the text.
    """
    then = f"; {hint}" if hint else ""
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: line {before + error.lineno} is not JSON: {error.msg}{then}") from None
    except ValueError as error:  # of Python's limit of digits, and _no_number
        reason = str(error).partition(";")[0]
        raise UserError(f"{where}: is not JSON that can be read: {reason}{then}") from None
    except RecursionError:
        raise UserError(f"{where}: is not JSON that can be read: it is nested too deeply{then}") from None


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def place_and_step(text: str) -> tuple[str, int | None]:
    """RUN@STEP in two; a path that exists as it stands is not cut, and has no step."""
    if not os.path.exists(text) and (match := re.fullmatch(r"(.+)@(\d{1,18})", text)):
        return match[1], int(match[2])
    return text, None


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replaces the file by one with this content (text as UTF-8), whole or not at all; or raises UserError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def sole_writer(directory: Path, holder: str) -> Iterator[None]:
    """Creates the folder and holds it as `holder`: two jobs that write one run would mix their weights.

    Raises UserError if it cannot be written, LockedError, which names the other, if another live process holds it; the
    hold ends with the process, however it ends.
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
            raise LockedError(
                f"{directory}: {other} is writing this run; wait for it or choose another --out"
            ) from None
        except OSError as error:  # of a network disk that has no locks
            raise UserError(f"{directory}: cannot be locked: {error.strerror}; choose another --out") from None
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            handle.truncate(0)
            handle.write(holder + "\n")
            handle.flush()
        yield
