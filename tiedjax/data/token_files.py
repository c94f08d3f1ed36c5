"""Token files that others have published: read where they are, never copied; of those in a store a copy is kept here.

`.npy` files with NumPy's header say what they hold. Everything else, also what OLMo publishes under the name .npy, is
taken as raw little-endian ids: uint16 or uint32 where the ending is .u16/.uint16 or .u32/.uint32, else uint16 when
model.vocab_size is at most 65,536 and uint32 otherwise.

Up to `READ_WHOLE` tokens every one of them is hashed and checked here. Of more, blocks of each file are: what must see
every token happens when they are counted, beside training.

The last `holdout` share of each file is held out. Where the tokenizer, and so the end marker, is known the cut lies
behind one, so that no document is in both splits; a file that holds a single document is then all for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiedjax.data.prepared import SAMPLED, Segment, Split
from tiedjax.data.progress import Progress
from tiedjax.errors import UserError
from tiedjax.npy import read_npy

_ENDINGS = {".u16": "<u2", ".uint16": "<u2", ".u32": "<u4", ".uint32": "<u4"}
_MAGIC = b"\x93NUMPY"
READ_WHOLE = 2**26  # tokens of all files together: a third of a second
_CHUNK = 2**22  # tokens looked at at a time
_BLOCKS, _BLOCK = 64, 2**12  # of each file otherwise: how many, of how many tokens
_PEEK = 2**16  # tokens that the guess of a raw file's type is checked on


@dataclass(frozen=True)
class TokenFiles:
    """What a scan of token files found: the runs of each split, and how many documents they hold (None: not known)."""

    segments: dict[Split, list[Segment]]
    documents: dict[Split, int | None]


def scan(
    files: list[Path],
    vocab_size: int,
    end_id: int | None,
    holdout: float,
    workers: int,
    report: Callable[[str], None],
) -> TokenFiles:
    """Checks the ids of every file against vocab_size, hashes them, and cuts each file into its two splits."""
    segments: dict[Split, list[Segment]] = {"train": [], "eval": []}
    ends: dict[Split, int] = {"train": 0, "eval": 0}
    with ThreadPoolExecutor(workers) as pool:  # hashing and comparing release the GIL
        described = list(pool.map(lambda path: _describe(path, vocab_size), files))
        total = sum(whole.stop for whole in described)
        whole_files = total <= READ_WHOLE
        counts_documents = whole_files and end_id is not None
        progress = Progress(f"read {len(files):,} token files", report)
        for whole in pool.map(lambda whole: (_checked if whole_files else _sampled)(whole, vocab_size), described):
            tokens = whole.tokens(Path())
            cut = _cut(tokens, holdout, end_id)
            parts: list[tuple[Split, int, int]] = [("train", 0, cut), ("eval", cut, whole.stop)]
            for split, start, stop in parts:
                if start < stop:
                    segments[split].append(replace(whole, start=start, stop=stop))
                    ends[split] += _count(tokens[start:stop], end_id) if counts_documents else 0
            progress.add(0, whole.stop if whole_files else min(whole.stop, _BLOCKS * _BLOCK))
    progress.done()
    if not whole_files:
        report(f"{total:,} tokens in all; those that were not read yet are checked when tokens are counted")
    return TokenFiles(segments, {split: ends[split] if counts_documents else None for split in segments})


def _describe(path: Path, vocab_size: int) -> Segment:
    """All tokens of one file, not yet hashed."""
    try:
        with open(path, "rb") as file:
            has_header = file.read(len(_MAGIC)) == _MAGIC
        size = path.stat().st_size
        if has_header:
            array: Any = read_npy(path, mmap=True)  # a memmap, which has an offset
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(f"{path}: holds {array.dtype} {list(array.shape)}; tokens are one row of integers")
            dtype, offset, count = array.dtype, array.offset, len(array)
        else:
            dtype = np.dtype(_ENDINGS.get(path.suffix.lower(), "<u2" if vocab_size <= 2**16 else "<u4"))
            offset, (count, rest) = 0, divmod(size, dtype.itemsize)
            if rest:
                raise UserError(f"{path}: {size:,} bytes are no whole number of raw {dtype.name} tokens")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as tokens: {error}") from None
    if not count:
        raise UserError(f"{path}: holds no tokens")
    whole = Segment(str(path), size, dtype.str, offset, 0, count, "")
    start = whole.tokens(Path())[: min(count, _PEEK)]
    if not has_header and dtype.itemsize == 2 and count >= 16 and not start[1::2].any():
        raise UserError(f"{path}: every second uint16 is 0, so these are uint32 tokens; name the file .u32 or .uint32")
    return whole


def hash_now(whole: Segment, vocab_size: int) -> str:
    """The sha256 of a whole file, of the kind that `whole` has, as its tokens are now; UserError for an id above."""
    return (_sampled if whole.sha256.startswith(SAMPLED) else _checked)(whole, vocab_size).sha256


def _checked(whole: Segment, vocab_size: int) -> Segment:
    tokens = whole.tokens(Path())
    digest = hashlib.sha256()
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]
        whole.check(part, vocab_size)
        digest.update(np.ascontiguousarray(part).data)
    return replace(whole, sha256=digest.hexdigest())


def _sampled(whole: Segment, vocab_size: int) -> Segment:
    """The same of evenly spaced blocks, with the number of tokens in the hash."""
    tokens = whole.tokens(Path())
    digest = hashlib.sha256(str(len(tokens)).encode())
    for number in range(_BLOCKS):
        start = max(len(tokens) - _BLOCK, 0) * number // (_BLOCKS - 1)
        part = tokens[start : start + _BLOCK]
        whole.check(part, vocab_size)
        digest.update(np.ascontiguousarray(part).data)
    return replace(whole, sha256=SAMPLED + digest.hexdigest())


def _cut(tokens: npt.NDArray[Any], holdout: float, end_id: int | None) -> int:
    """Where the held-out part of a file starts."""
    cut = min(max(round(len(tokens) * (1 - holdout)), 1), len(tokens))
    if end_id is None:
        return cut
    for start in range(cut - 1, len(tokens) - 1, _CHUNK):  # the next document after the cut, or the one around it
        ends = np.flatnonzero(tokens[start : min(start + _CHUNK, len(tokens) - 1)] == end_id)
        if len(ends):
            return start + int(ends[0]) + 1
    for stop in range(cut, 0, -_CHUNK):
        start = max(stop - _CHUNK, 0)
        ends = np.flatnonzero(tokens[start:stop] == end_id)
        if len(ends) and start + ends[-1] + 1 < len(tokens):
            return start + int(ends[-1]) + 1
    return len(tokens)


def _count(tokens: npt.NDArray[Any], end_id: int | None) -> int:
    parts = range(0, len(tokens), _CHUNK)
    return sum(int(np.count_nonzero(tokens[start : start + _CHUNK] == end_id)) for start in parts)
