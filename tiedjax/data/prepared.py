"""What preparation leaves behind: token memmaps per split, their tokenizer and counts, and windows cut from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tiedjax.errors import UserError
from tiedjax.files import local_path
from tiedjax.host import storage
from tiedjax.host.storage import write_atomically

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
META = "meta.json"
FORMAT = 1
_KEYS = ("source", "key", "fingerprint", "vocab_size", "end_id", "tokenizer_hash", "documents", "segments")
_AGAIN = "remove the folder and prepare the data again"
SAMPLED = "samples:"  # begins a hash that is not of all tokens, and so the fingerprint of what holds such files
_CHUNK = 2**22  # tokens counted at a time


@dataclass(frozen=True)
class Segment:
    """A run of tokens in a file; `file` is relative to the prepared folder where the tokens were written there."""

    file: str
    file_bytes: int  # its size when it was prepared
    dtype: str
    offset: int  # bytes before the file's first token
    start: int  # first and
    stop: int  # last + 1 token of this run
    sha256: str  # of all tokens in the file, or SAMPLED and that of blocks of them

    def tokens(self, directory: Path) -> npt.NDArray[Any]:
        """The tokens [stop - start], mapped read-only."""
        dtype = np.dtype(self.dtype)
        offset = self.offset + self.start * dtype.itemsize
        mapped = np.memmap(directory / self.file, dtype, "r", offset=offset, shape=(self.stop - self.start,))
        return mapped.view(np.ndarray)  # slices of the subclass cost several times more

    def check(self, tokens: npt.NDArray[Any], vocab_size: int) -> None:
        """UserError where one of these tokens of the file is not an id of 0 .. vocab_size - 1."""
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise UserError(
                f"{self.file}: token id {wrong} does not fit model.vocab_size {vocab_size} "
                f"(read as {np.dtype(self.dtype).name}; ids are 0 .. {vocab_size - 1})"
            )


class Windows:
    """Every window of T + 1 tokens of one split, by number.

    Neighbours share one token, the last target of one being the first input of the next, so that every token is
    predicted once. No window spans two segments; fewer than T tokens at the end of each are left out. `check` is given
    the number of an array and what is read of it, and raises where that cannot be.
    """

    def __init__(
        self,
        arrays: list[npt.NDArray[Any]],
        seq_len: int,
        check: Callable[[int, npt.NDArray[Any]], None] | None = None,
    ) -> None:
        self.seq_len = seq_len
        self._arrays, self._check = arrays, check
        self._ends = np.cumsum([max(len(array) - 1, 0) // seq_len for array in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Windows `indices` [N] as int32 [N, T + 1]; IndexError outside 0 .. len - 1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"windows are 0 .. {len(self) - 1}, asked for {wanted.min()} .. {wanted.max()}")
        rows = np.empty((len(wanted), self.seq_len + 1), np.int32)
        segments = np.searchsorted(self._ends, wanted, side="right")
        for row, index, segment in zip(rows, wanted.tolist(), segments.tolist(), strict=True):
            first = int(self._ends[segment - 1]) if segment else 0
            start = (index - first) * self.seq_len
            row[:] = self._arrays[segment][start : start + self.seq_len + 1]
        if self._check:
            for segment in np.unique(segments).tolist():
                self._check(segment, rows[segments == segment])
        return rows

    def counts(self, rows: int) -> npt.NDArray[np.int64]:
        """How often each id 0 .. rows - 1 is an input and a target over all windows: int64 [2, rows].

        Every token is checked, those too that are in no window.
        """
        counts = np.zeros((2, rows), np.int64)
        for number, (array, covered) in enumerate(zip(self._arrays, self._covered(), strict=True)):
            for start in range(0, len(array), _CHUNK):
                tokens = array[start : start + _CHUNK]
                if self._check:
                    self._check(number, tokens)
                inputs = tokens[: max(covered - start, 0)]
                counts += np.bincount(inputs.astype(np.int64, copy=False), minlength=rows)
            if covered:  # the targets are the inputs but for the first, and one more
                counts[1, array[0]] -= 1
                counts[1, array[covered]] += 1
        return counts

    def outside(self, token: int) -> int:
        """How often a token occurs at the ends of segments, where it is no window's input."""
        ends = (array[covered:] for array, covered in zip(self._arrays, self._covered(), strict=True))
        return sum(int(np.count_nonzero(tokens == token)) for tokens in ends)

    def _covered(self) -> list[int]:
        """The number of inputs in each segment."""
        return [max(len(array) - 1, 0) // self.seq_len * self.seq_len for array in self._arrays]


@dataclass(frozen=True)
class Prepared:
    """Token shards of a training and a held-out split; the files are mapped when they are first read."""

    directory: Path
    source: str
    key: str  # sha256 of what the preparation was asked for
    fingerprint: str  # sha256 of the tokens, their split and their tokenizer, the same on every machine; see SAMPLED
    vocab_size: int  # every id is below this
    end_id: int | None  # the id after each document; None: not known
    tokenizer_path: Path | None
    tokenizer_hash: str | None
    documents: dict[Split, int | None]  # None: not known
    segments: dict[Split, tuple[Segment, ...]]

    def num_tokens(self, split: Split) -> int:
        """Tokens in a split."""
        return sum(segment.stop - segment.start for segment in self.segments[split])

    @functools.cached_property
    def _arrays(self) -> dict[Split, list[npt.NDArray[Any]]]:
        return {split: [segment.tokens(self.directory) for segment in self.segments[split]] for split in SPLITS}

    def arrays(self, split: Split) -> list[npt.NDArray[Any]]:
        """The token shards of a split, each a read-only memmap [N]."""
        return self._arrays[split]

    def windows(self, split: Split, seq_len: int) -> Windows:
        """The windows of seq_len + 1 tokens of a split; UserError where there is not one."""
        windows = self._all_windows(split, seq_len)
        if not len(windows):
            more = "; raise data.holdout or give more text" if split == "eval" else "; give more text"
            raise UserError(
                f"data.source: {self.source}: too little text: the {self.num_tokens(split):,} {split} tokens hold no "
                f"window of model.seq_len + 1 = {seq_len + 1}{more}"
            )
        return windows

    def _all_windows(self, split: Split, seq_len: int) -> Windows:
        """The windows of a split, maybe none; what preparation has not checked of its files is when it is read."""
        if not self.fingerprint.startswith(SAMPLED):
            return Windows(self.arrays(split), seq_len)
        segments = self.segments[split]
        check = lambda number, tokens: segments[number].check(tokens, self.vocab_size)
        return Windows(self.arrays(split), seq_len, check)

    def token_counts(self, seq_len: int, vocab_rows: int) -> npt.NDArray[np.int64]:
        """How often each id is an input (row 0) and a target (row 1) over all training windows: int64 [2, vocab_rows].

        Kept beside the shards after the first time, where that folder can be written, with the number of documents
        where that was not known. UserError where what was kept is damaged, or a token is out of range.
        """
        self.check_vocabulary(vocab_rows)
        path = self.counts_path(seq_len)
        if path.exists():
            counts = _read_counts(path, self.vocab_size)
        else:
            counts = self.windows("train", seq_len).counts(self.vocab_size)
            kept = os.access(self.directory, os.W_OK)
            if self.fingerprint.startswith(SAMPLED):
                held_out = self._all_windows("eval", seq_len).counts(self.vocab_size)  # checks what is held out too
                if kept and self.end_id is not None:
                    inputs: dict[Split, int] = {"train": counts[0, self.end_id], "eval": held_out[0, self.end_id]}
                    outside = {split: self._all_windows(split, seq_len).outside(self.end_id) for split in SPLITS}
                    _record_documents(self.directory, {split: int(inputs[split]) + outside[split] for split in SPLITS})
            if kept:
                save_array(path, counts)
        return np.pad(counts, ((0, 0), (0, vocab_rows - self.vocab_size)))

    def counts_path(self, seq_len: int) -> Path:
        """Where `token_counts` keeps the counts of windows of this length."""
        return self.directory / f"counts-{seq_len}.npy"

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where an id does not fit into vocab_size."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size} is less than the {self.vocab_size} token ids of {self.source} "
                f"({self.directory})"
            )


def _record_documents(directory: Path, documents: dict[Split, int]) -> None:
    """Writes into meta.json how many documents there are, once every token was read."""
    meta = json.loads((directory / META).read_text(encoding="utf-8"))
    write_atomically(directory / META, json.dumps({**meta, "documents": documents}, indent=1) + "\n")


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes a .npy file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())


def save_meta(
    directory: Path,
    *,
    source: str,
    key: str,
    vocab_size: int,
    end_id: int | None,
    tokenizer: str | None,
    documents: dict[Split, int | None],
    segments: dict[Split, list[Segment]],
) -> None:
    """Writes tokenizer.json (`tokenizer` is its text) and meta.json, which makes a folder of shards a prepared one."""
    tokenizer_hash = None if tokenizer is None else hashlib.sha256(tokenizer.encode()).hexdigest()
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    sampled = any(s.sha256.startswith(SAMPLED) for split in SPLITS for s in segments[split])
    runs = {split: [[s.sha256, s.dtype, s.start, s.stop] for s in segments[split]] for split in SPLITS}
    meta = {
        "format": FORMAT,
        "source": source,
        "key": key,
        "fingerprint": (SAMPLED if sampled else "") + sha256_of([FORMAT, runs, end_id, tokenizer_hash]),
        "vocab_size": vocab_size,
        "end_id": end_id,
        "tokenizer_hash": tokenizer_hash,
        "documents": documents,
        "segments": {split: [dataclasses.asdict(segment) for segment in segments[split]] for split in SPLITS},
    }
    (directory / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def load_prepared(directory: str | Path) -> Prepared:
    """The finished preparation in a folder; UserError where there is none, or where its files are damaged."""
    if storage.is_remote(directory):
        directory = _fetched(storage.place(directory, "data.source"))
    directory = local_path(directory, "data.source").expanduser().resolve()
    path = directory / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: holds no prepared data; make some with: tiedjax data prepare") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; {_AGAIN}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{directory}: was prepared by another version of tiedjax; prepare it again")
    if missing := [key for key in _KEYS if key not in meta]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {_AGAIN}")
    try:
        documents = {split: meta["documents"][split] for split in SPLITS}
        segments = {split: tuple(map(_segment, meta["segments"][split])) for split in SPLITS}
    except (KeyError, TypeError):
        raise UserError(f"{path}: does not say which tokens belong to which split; {_AGAIN}") from None
    for segment in (*segments["train"], *segments["eval"]):
        _check_size(directory / segment.file, segment.file_bytes)
    tokenizer = directory / "tokenizer.json" if meta["tokenizer_hash"] else None
    if tokenizer:
        text = tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else ""
        if hashlib.sha256(text.encode()).hexdigest() != meta["tokenizer_hash"]:
            raise UserError(f"{tokenizer}: is not the tokenizer that the tokens beside it were made with")
    return Prepared(
        directory=directory,
        tokenizer_path=tokenizer,
        documents=documents,
        segments=segments,
        **{name: meta[name] for name in ("source", "key", "fingerprint", "vocab_size", "end_id", "tokenizer_hash")},
    )


def _fetched(place: Path) -> Path:
    """A local copy of a prepared folder in a store, made the first time."""
    if not storage.exists(place / META):
        raise UserError(f"{place}: holds no prepared data; make some with: tiedjax data prepare")

    def listed(content: bytes) -> dict[str, int]:
        try:
            meta = json.loads(content)
            shards = {str(s["file"]): int(s["file_bytes"]) for split in SPLITS for s in meta["segments"][split]}
            tokenizer = {"tokenizer.json": len(storage.read_bytes(place / "tokenizer.json"))}
            elsewhere = next((name for name in shards if os.path.isabs(name) or ".." in name), None)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{place}/{META}: does not say which tokens belong to which split; {_AGAIN}") from None
        if elsewhere:
            raise UserError(f"{place}: its tokens were not copied: {elsewhere}; put that file into a store and name it")
        return shards | (tokenizer if meta.get("tokenizer_hash") else {})

    return storage.cached_folder(place, META, listed)


def _segment(tree: dict[str, Any]) -> Segment:
    """A segment of meta.json; TypeError where a field is missing or of another type."""
    segment = Segment(**tree)
    for field in dataclasses.fields(Segment):
        if type(getattr(segment, field.name)).__name__ != field.type:
            raise TypeError(field.name)
    return segment


def _read_counts(path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    try:
        counts: np.ndarray = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, EOFError):
        counts = np.empty(0)
    if counts.dtype != np.int64 or counts.shape != (2, vocab_size):
        raise UserError(f"{path}: is damaged: it holds no int64 [2, {vocab_size}]; remove it and it is made again")
    return counts


def sha256_of(tree: Any) -> str:
    """sha256 of plain JSON, in hex."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: prepared tokens cannot be read: {error.strerror}; prepare them again") from None
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes, {expected:,} when it was prepared; prepare it again")
