"""Byte-level BPE: trained here, or read from an existing tokenizer.json. The only file that knows `tokenizers`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiedjax.data.pieces import pieces
from tiedjax.errors import UserError
from tiedjax.files import local_path, parse_json, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_MARKER = "<|endoftext|>"
_END_MARKERS = (END_MARKER, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_SMALLEST = 257  # 256 bytes and the end marker
_MOST_IDS = 2**24
_CHUNK_CHARACTERS = 2**18  # text that a worker tokenizes at a time
_REMEMBERED_CHARACTERS = 2**21  # of distinct pieces of text; bounds memory


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size entries (fewer where the text has no more pairs); the same every time.

    Every byte is an entry, so any text round-trips; id 0 is END_MARKER. UserError where vocab_size is under 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise UserError(f"model.vocab_size: a byte-level BPE needs at least {_SMALLEST}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_MARKER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return parse_tokenizer(tokenizer.to_str(), "the trained tokenizer")


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json holds, set to encode whole documents and to trust nothing in them."""
    from tokenizers import Tokenizer

    try:
        tree = parse_json(text, where)
    except UserError as error:
        raise UserError(f"{where}: not a tokenizer.json: {str(error).removeprefix(f'{where}: ')}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise UserError(f"{where}: not a tokenizer.json: it has no 'model' (save it with tokenizers or transformers)")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{where}: not a tokenizer.json: {' '.join(str(error).split())}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= _MOST_IDS:
        has = f"an id of {max(vocabulary.values()):,}" if vocabulary else "no tokens"
        raise UserError(f"{where}: not a tokenizer.json that can be used: it has {has}; ids are 0 .. {_MOST_IDS - 1:,}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that spells the end marker must not end its document
    return tokenizer


def read_tokenizer_json(path: str | Path) -> str:
    """The text of a tokenizer.json; UserError where there is none."""
    place = Path(os.path.expanduser(local_path(path, "data.tokenizer")))
    try:
        return read_text(place, "give 'bpe' or the path of a tokenizer.json")
    except UserError as error:
        raise UserError(f"data.tokenizer: {error}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json; UserError where there is none."""
    return parse_tokenizer(read_tokenizer_json(path), str(path))


def end_id(tokenizer: Tokenizer, where: str) -> int:
    """The id that ends a document; UserError where the tokenizer has none that is known."""
    for marker in _END_MARKERS:
        marker_id = tokenizer.token_to_id(marker)
        if marker_id is not None:
            return marker_id
    raise UserError(f"{where}: the tokenizer has no end marker; it needs one of {', '.join(_END_MARKERS)}")


def begin_id(tokenizer: Tokenizer) -> int | None:
    """The id that a tokenizer.json puts before every text for its model; None where it puts none.

    Its post-processor decides: beside it transformers 5 too ignores `add_bos_token` of tokenizer_config.json.
    """
    encoded = tokenizer.encode("a b")
    of_text = 0 in encoded.special_tokens_mask  # or what was added may stand behind a text of no tokens
    return encoded.ids[0] if of_text and encoded.special_tokens_mask[0] else None


def id_bound(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows a table needs (ids may have gaps, so not the number of entries)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_hash(text: str) -> str:
    """sha256 of a tokenizer.json's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, end: int, dtype: np.dtype, workers: int
) -> Iterator[npt.NDArray[Any]]:
    """The ids of every document with `end` after them, in order, tokenized by `workers` threads."""
    encode = (_PieceEncoder if _cuts_like_gpt2(tokenizer) else _Encoder)(tokenizer, end, dtype)
    waiting: deque[Future[list[npt.NDArray[Any]]]] = deque()
    with _one_thread_per_call(), ThreadPoolExecutor(workers) as pool:  # the tokenizer releases the GIL
        for texts in _chunks(documents):
            waiting.append(pool.submit(encode, texts))
            if len(waiting) > 2 * workers:  # bounds memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class _Encoder:
    """Texts to ids, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end: int, dtype: np.dtype):
        self._tokenizer, self._dtype, self._end = tokenizer, dtype, np.array([end], dtype).tobytes()

    def __call__(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """The ids of every text, each followed by the end marker."""
        return [np.frombuffer(ids + self._end, self._dtype) for ids in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]


class _PieceEncoder(_Encoder):
    """The same ids several times faster: every distinct piece of text is tokenized once. Only if `_cuts_like_gpt2`."""

    def __init__(self, tokenizer: Tokenizer, end: int, dtype: np.dtype):
        super().__init__(tokenizer, end, dtype)
        self._ids: dict[str, bytes] = {}  # of every piece that was tokenized
        self._characters = 0

    def _encode(self, texts: list[str]) -> list[bytes]:
        cut = [pieces(text) for text in texts]
        ids = self._ids  # stays whole for this call when another thread begins a new one
        new = list(set(itertools.chain.from_iterable(cut)).difference(ids))
        ids.update(zip(new, super()._encode(new), strict=True))
        self._characters += sum(map(len, new))
        if self._characters > _REMEMBERED_CHARACTERS:
            self._ids, self._characters = {}, 0
        return [b"".join(map(ids.__getitem__, parts)) for parts in cut]


def _cuts_like_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether text is cut by GPT-2's regular expression, as byte-level BPE does, and changed by nothing before that."""
    tree = json.loads(tokenizer.to_str())
    cutter = tree["pre_tokenizer"] or {}
    return (
        tree["normalizer"] is None
        and cutter.get("type") == "ByteLevel"
        and cutter["use_regex"]
        and not cutter["add_prefix_space"]
        and all(token["special"] for token in tree["added_tokens"])  # `parse_tokenizer` has these taken for text
        and not tree["model"].get("dropout")
    )


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in documents:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keeps `tokenizers` from starting threads of its own in each of our workers."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
