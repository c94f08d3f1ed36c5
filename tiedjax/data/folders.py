"""Folders that are either finished or not there: written beside their place under a lock, then renamed into it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tiedjax.errors import UserError
from tiedjax.files import local_folder


def cache_folder(configured: str | None) -> Path:
    """The folder of prepared data: the configured one, else $TIEDJAX_CACHE, else ~/.cache/tiedjax."""
    if configured:
        return local_folder(configured, "data.cache")
    return local_folder(os.environ.get("TIEDJAX_CACHE") or "~/.cache/tiedjax", "TIEDJAX_CACHE")


@contextlib.contextmanager
def locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds the right to make `folder`; waits for whoever has it. UserError where its parent cannot be written."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, lambda: report(f"waiting: another process is preparing {folder}"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; name another folder") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends well, and is removed when it does not.

    The caller holds the lock of `folder`, so scratch that is already there was left by a process that was killed.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        for path in scratch.iterdir():
            _sync(path)
        _sync(scratch)
        os.rename(scratch, folder)
        _sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; name another folder") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _acquire(path: Path, on_wait: Callable[[], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The holder before us removed the file when it was done: a lock on a removed file excludes nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
