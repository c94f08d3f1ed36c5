"""What preparation leaves behind: token memmaps per split, their tokenizer and counts, and windows cut from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tiedjax.errors import UserError
from tiedjax.files import local_folder, parse_json, read_text
from tiedjax.host import storage
from tiedjax.host.storage import write_atomically
from tiedjax.npy import read_npy

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
META = "meta.json"
FORMAT = 1
_KEYS = ("source", "key", "fingerprint", "vocab_size", "end_id", "tokenizer_hash", "documents", "segments")
_TYPES: dict[str, tuple[type, ...]] = {"source": (str,), "key": (str,), "fingerprint": (str,), "vocab_size": (int,)}
_TYPES |= {"end_id": (int, type(None)), "tokenizer_hash": (str, type(None))}
_AGAIN = "remove the folder and prepare the data again"
SAMPLED = "samples:"  # begins a hash that is not of all tokens, and so the fingerprint of what holds such files
_CHUNK = 2**22  # tokens counted at a time
VERIFIED_WHOLE = 2**26  # tokens of all files together that are hashed at every start: a third of a second
_BLOCKS, _BLOCK = 64, 2**12  # of each file otherwise: how many are looked at, of how many tokens


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
    the number of an array and what is read of it, and raises where that cannot be. `begin_id` stands in the place of
    each window's first token, which is the input before the first target: what is predicted stays the same.
    """

    def __init__(
        self,
        arrays: list[npt.NDArray[Any]],
        seq_len: int,
        check: Callable[[int, npt.NDArray[Any]], None] | None = None,
        begin_id: int | None = None,
    ) -> None:
        self.seq_len = seq_len
        self._arrays, self._check, self._begin_id = arrays, check, begin_id
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
        if self._begin_id is not None:
            rows[:, 0] = self._begin_id
        return rows

    def counts(self, rows: int) -> npt.NDArray[np.int64]:
        """How often each id 0 .. rows - 1 is an input and a target over all windows: int64 [2, rows].

        They are those of the text, without `begin_id`. Every token is checked, those too that are in no window.
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
    begin_id: int | None = None  # in the place of each window's first token; None: that token itself

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
        """The windows of a split, maybe none; ids are checked whenever they are read: files change and disks fail."""
        segments = [self._placed(segment) for segment in self.segments[split]]
        check = lambda number, tokens: segments[number].check(tokens, self.vocab_size)
        return Windows(self.arrays(split), seq_len, check, self.begin_id)

    def _placed(self, segment: Segment) -> Segment:
        """The segment with the whole path of its file, as an error is to name it."""
        return dataclasses.replace(segment, file=str(self.directory / segment.file))

    def verify(self) -> None:
        """UserError naming the first file whose tokens are not those that were prepared.

        Up to `VERIFIED_WHOLE` tokens all are hashed. Of more, evenly spaced blocks of each file must be ids below
        `vocab_size`, and every other one must be when it is read. Nothing is written.
        """
        segments = [self._placed(segment) for split in SPLITS for segment in self.segments[split]]
        total = sum(segment.stop - segment.start for segment in segments)
        whole = total <= VERIFIED_WHOLE
        for segment in segments:
            tokens = segment.tokens(self.directory)
            for start in range(0, len(tokens), _CHUNK) if whole else _spread(len(tokens)):
                segment.check(tokens[start : start + (_CHUNK if whole else _BLOCK)], self.vocab_size)
        if whole:
            for segment in {segment.file: segment for segment in segments}.values():
                if not segment.sha256.startswith(SAMPLED) and _hash_of(segment) != segment.sha256:
                    raise UserError(f"{segment.file}: its tokens are not those that were prepared; prepare them again")

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


def _spread(tokens: int) -> list[int]:
    """Where the blocks of a large file start that are looked at."""
    return [max(tokens - _BLOCK, 0) * number // (_BLOCKS - 1) for number in range(_BLOCKS)]


def _hash_of(segment: Segment) -> str:
    """sha256 of a file's tokens up to the end of its last segment, which this is."""
    digest, tokens = hashlib.sha256(), dataclasses.replace(segment, start=0).tokens(Path())
    for start in range(0, len(tokens), _CHUNK):
        digest.update(tokens[start : start + _CHUNK].data)
    return digest.hexdigest()


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
    meta = {
        "format": FORMAT,
        "source": source,
        "key": key,
        "fingerprint": fingerprint_of(segments, end_id, tokenizer_hash),
        "vocab_size": vocab_size,
        "end_id": end_id,
        "tokenizer_hash": tokenizer_hash,
        "documents": documents,
        "segments": {split: [dataclasses.asdict(segment) for segment in segments[split]] for split in SPLITS},
    }
    (directory / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def fingerprint_of(segments: Mapping[Split, Sequence[Segment]], end_id: int | None, tokenizer_hash: str | None) -> str:
    """The sha256 of a preparation's tokens, their split and their tokenizer."""
    sampled = any(s.sha256.startswith(SAMPLED) for split in SPLITS for s in segments[split])
    runs = {split: [[s.sha256, s.dtype, s.start, s.stop] for s in segments[split]] for split in SPLITS}
    return (SAMPLED if sampled else "") + sha256_of([FORMAT, runs, end_id, tokenizer_hash])


def load_prepared(directory: str | Path) -> Prepared:
    """The finished preparation in a folder; UserError where there is none, or where its files are damaged."""
    if storage.is_remote(directory):
        directory = fetched(storage.place(directory, "data.source"))
    directory = local_folder(directory, "data.source")
    meta, documents, segments = read_meta(directory)
    for segment in (*segments["train"], *segments["eval"]):
        check_size(directory / segment.file, segment.file_bytes)
    tokenizer = check_tokenizer(directory, meta)
    return Prepared(
        directory=directory,
        tokenizer_path=tokenizer,
        documents=documents,
        segments=segments,
        **{name: meta[name] for name in ("source", "key", "fingerprint", "vocab_size", "end_id", "tokenizer_hash")},
    )


def read_meta(
    directory: Path,
) -> tuple[dict[str, Any], dict[Split, int | None], dict[Split, tuple[Segment, ...]]]:
    """meta.json, and of it the documents and the segments of each split; UserError where it cannot be used."""
    path = directory / META
    if not os.path.exists(path):
        raise UserError(f"{directory}: holds no prepared data; make some with: tiedjax data prepare")
    text = read_text(path, _AGAIN)
    try:
        meta = parse_json(text, str(path))
    except UserError:
        raise UserError(f"{path}: is not JSON; {_AGAIN}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{directory}: was prepared by another version of tiedjax; prepare it again")
    if missing := [key for key in _KEYS if key not in meta]:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {_AGAIN}")
    try:
        documents = {split: meta["documents"][split] for split in SPLITS}
        segments = {split: tuple(map(_segment, meta["segments"][split])) for split in SPLITS}
    except (KeyError, TypeError, ValueError, SyntaxError):  # the last two of a dtype that is none
        raise UserError(f"{path}: does not say which tokens belong to which split; {_AGAIN}") from None
    if wrong := [name for name, kinds in _TYPES.items() if type(meta[name]) not in kinds]:
        raise UserError(f"{path}: {wrong[0]} is {meta[wrong[0]]!r}; {_AGAIN}")
    return meta, documents, segments


def check_tokenizer(directory: Path, meta: dict[str, Any]) -> Path | None:
    """Where the tokenizer is that meta.json speaks of, None if there is none; UserError where it is another."""
    tokenizer = directory / "tokenizer.json" if meta["tokenizer_hash"] else None
    if tokenizer:
        text = read_text(tokenizer) if tokenizer.exists() else ""
        if hashlib.sha256(text.encode()).hexdigest() != meta["tokenizer_hash"]:
            raise UserError(f"{tokenizer}: is not the tokenizer that the tokens beside it were made with")
    return tokenizer


def fetched(place: Path) -> Path:
    """A local copy of a prepared folder in a store, made the first time."""
    if not storage.exists(place / META):
        raise UserError(f"{place}: holds no prepared data; make some with: tiedjax data prepare")

    def listed(content: bytes) -> dict[str, int]:
        try:
            meta = parse_json(content.decode(), f"{place}/{META}")
            shards = {str(s["file"]): int(s["file_bytes"]) for split in SPLITS for s in meta["segments"][split]}
            hashed = meta.get("tokenizer_hash")
            elsewhere = next((name for name in shards if os.path.isabs(name) or ".." in name), None)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{place}/{META}: does not say which tokens belong to which split; {_AGAIN}") from None
        if elsewhere:
            raise UserError(f"{place}: its tokens were not copied: {elsewhere}; put that file into a store and name it")
        if hashed:
            shards["tokenizer.json"] = len(storage.read_bytes(place / "tokenizer.json"))
        return shards

    return storage.cached_folder(place, META, listed)


def _segment(tree: dict[str, Any]) -> Segment:
    """A segment of meta.json; TypeError where a field is missing or of another type."""
    segment = Segment(**tree)
    for field in dataclasses.fields(Segment):
        if type(getattr(segment, field.name)).__name__ != field.type:
            raise TypeError(field.name)
    dtype = np.dtype(segment.dtype)  # TypeError for what is none
    end = segment.offset + segment.stop * dtype.itemsize
    if (
        dtype.kind not in "iu"
        or segment.offset < 0
        or not 0 <= segment.start < segment.stop
        or end > segment.file_bytes
    ):
        raise TypeError("tokens")
    return segment


def _read_counts(path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    try:
        counts = read_npy(path)
    except UserError:
        counts = np.empty(0)
    if counts.dtype != np.int64 or counts.shape != (2, vocab_size):
        raise UserError(f"{path}: is damaged: it holds no int64 [2, {vocab_size}]; remove it and it is made again")
    return counts


def sha256_of(tree: Any) -> str:
    """sha256 of plain JSON, in hex."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def check_size(path: Path, expected: int) -> None:
    """UserError where a file has not the bytes that it had when it was prepared."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: prepared tokens cannot be read: {error.strerror}; prepare them again") from None
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes, {expected:,} when it was prepared; prepare it again")
