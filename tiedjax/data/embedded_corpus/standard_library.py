"""The running Python's own documentation and sources as documents; imports nothing but the standard library."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
    "encodings",  # a sixth of all tokens, nearly all of them hexadecimal tables
}
_TOPICS = "pydoc_data/topics.py"  # read as separate topics, not as one module


def version_name() -> str:
    """Names the interpreter whose library this is, such as cpython-3.11.7."""
    return f"{platform.python_implementation().lower()}-{platform.python_version()}"


def identity() -> str:
    """sha256 over the version and every source's name and size: cheap, and different where a library was patched."""
    files = [(name, path.stat().st_size) for name, path in _sources()]
    return hashlib.sha256(repr((version_name(), files)).encode()).hexdigest()


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every topic and module, in a fixed order; a file that is not UTF-8 is skipped with a warning."""
    log = logging.getLogger(__name__)
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # some distributions split it off
        log.warning("this Python has no pydoc_data: the embedded corpus is without its documentation topics")
        topics = {}
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    for name, path in _sources():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            log.warning("skipped in the embedded corpus: %s: %s", path, error)
        else:
            if text:  # many packages begin with an empty __init__.py
                yield name, text


def _sources() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))  # of the base installation, also inside a virtual environment
    sources = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            # _sysconfigdata_* holds the paths and flags of whoever built this Python
            if file.endswith(".py") and not file.startswith("_sysconfigdata") and name != _TOPICS and path.is_file():
                sources.append((name, path))
    return sorted(sources)
