"""Documents in files: plain text and JSON lines, as they are or under gzip or zstd."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tiedjax.data.tokenizer import END_MARKER
from tiedjax.errors import UserError
from tiedjax.files import local_path
from tiedjax.host import storage

_JSON_LINES = {".jsonl", ".json", ".ndjson"}
LONGEST = 2**18  # characters of a plain-text document; a longer one is cut, so that a single book can be split


def matching_files(pattern: str, key: str) -> list[Path]:
    """The files, or objects of a store, that a glob (`**` allowed) matches, sorted; UserError where there are none."""
    paths: list[Path] = []
    if storage.is_remote(pattern):
        files = storage.matching(storage.place(pattern, key))
    else:
        local_path(pattern, key)
        paths = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = sorted({path.absolute() for path in paths if path.is_file()})
    if not files:
        folder = next((path for path in paths if path.is_dir()), None)
        hint = f"it is a folder; name its files, such as '{folder}/*'" if folder else "give a path or a glob of files"
        raise UserError(f"{key}: missing corpus: no file matches {pattern!r}; {hint}")
    return files


def file_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file, by its ending: JSON lines hold one in `text_field` each, all else is plain text.

    `.gz` and `.zst` may follow either ending. Plain text is cut at END_MARKER and after LONGEST characters.
    Of an object of a store a copy on this machine is read.
    UserError names file and line where the file cannot be read, is not UTF-8, or a line is no such JSON.
    """
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in {".gz", ".zst"}:
        endings.pop()
    if endings and endings[-1] in _JSON_LINES:
        return _json_documents(path, text_field)
    return _plain_documents(_lines(path))


def _json_documents(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            said = error.msg.removesuffix(" at")
            raise UserError(f"{path}: line {number}: not JSON: {said} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
            reason = str(error).partition(";")[0].partition(" while")[0]
            raise UserError(f"{path}: line {number}: not JSON that can be read: {reason}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            has = _held(record, text_field)
            raise UserError(f"{path}: line {number}: no text in field {text_field!r}; {has} (see data.text_field)")
        yield _without_lone_surrogates(record[text_field])


def _held(record: Any, text_field: str) -> str:
    """What a line holds that has no text in the field."""
    if not isinstance(record, dict):
        return "it is not an object"
    if text_field in record:
        return f"what is there is {json.dumps(record[text_field])[:40]}"
    names = ", ".join(list(record)[:8])
    return f"its fields are {names[:200]}{' ...' if len(record) > 8 or len(names) > 200 else ''}"


def _plain_documents(lines: Iterable[str]) -> Iterator[str]:
    pieces: list[str] = []
    size = 0
    for line in lines:
        for index, part in enumerate(line.split(END_MARKER)):
            if index:  # a marker stood before this part, and the line break after a marker belongs to it
                yield "".join(pieces)
                pieces, size = [], 0
                part = part.removeprefix("\r").removeprefix("\n")
            for piece in _short_pieces(part):
                if size + len(piece) > LONGEST:
                    yield "".join(pieces)
                    pieces, size = [], 0
                pieces.append(piece)
                size += len(piece)
    yield "".join(pieces)


def _short_pieces(text: str) -> Iterator[str]:
    """The text in parts of at most LONGEST characters, cut after a space where there is one."""
    start = 0
    while len(text) - start > LONGEST:
        stop = text.rfind(" ", start, start + LONGEST) + 1 or start + LONGEST
        yield text[start:stop]
        start = stop
    yield text[start:]


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
                yield line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read after line {number}: {reason}") from None


def _open(path: Path) -> BinaryIO:
    path = storage.cached(path)
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(path), 2**20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file; raises where the file was cut short, which zstandard's own reader does not."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self._frame = self._decompressor.decompressobj()
        self._inside = False  # whether the frame has begun
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True, as `io.BufferedReader` wants to hear."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills `buffer` as far as one decompressed piece reaches; returns the bytes written, 0 at the end.

        OSError where the file is cut short or is no zstd.
        """
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            chunk = chunk or self._file.read(2**17)
            if self._frame.eof:  # files may hold several frames
                self._frame, self._inside = self._decompressor.decompressobj(), False
            if not chunk:
                if self._inside:
                    raise OSError("the compressed file is cut short")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise OSError(f"not valid zstd: {error}") from None
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Closes the compressed file too."""
        self._file.close()
        super().close()


def _without_lone_surrogates(text: str) -> str:
    """JSON escapes can spell half a character, which UTF-8 cannot: U+FFFD takes its place."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
