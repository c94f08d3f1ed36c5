"""Text to token shards: the same shards from the same text, however many cores made them.

Three passes over the documents, each reported: a scan that hashes every document and decides which are held out, the
training of a tokenizer (unless one is given), and the tokenization. A document is held out when the hash of its text is
among the smallest, so equal documents are never divided between the splits, and neither the order of the documents nor
the number of workers matters.
"""

from __future__ import annotations

import array
import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiedjax.config import DataConfig
from tiedjax.data import token_files
from tiedjax.data import tokenizer as tokenizers
from tiedjax.data.folders import appearing, cache_folder, locked
from tiedjax.data.prepared import FORMAT, META, SPLITS, Prepared, Split, load_prepared, save_meta, sha256_of
from tiedjax.data.progress import Progress
from tiedjax.data.shards import ShardWriter
from tiedjax.data.sources import Source, file_identity, open_source
from tiedjax.data.text_files import matching_files
from tiedjax.errors import UserError
from tiedjax.files import local_folder
from tiedjax.host import storage

Report = Callable[[str], None]

_TRAINING_CHARACTERS = 2**27  # a tokenizer is trained on the first training documents, up to this much text


def prepare(data: DataConfig, vocab_size: int, *, report: Report, out: str | Path | None = None) -> Prepared:
    """The prepared form of data.source, made now unless it is there already: in `out`, or else in the cache.

    vocab_size bounds the token ids, and is the size of a tokenizer trained here. `report` gets lines of progress.
    UserError: no such source, unreadable text, a vocabulary that does not fit, too little text, a folder that cannot
    be written, or an `out` that holds something else.
    """
    kind, _, name = data.source.partition(":")
    if kind == "prepared" and name:
        prepared = load_prepared(name)
        _check_same_tokenizer(data, prepared)
        prepared.check_vocabulary(vocab_size)
        prepared.verify()
        return prepared
    cache = cache_folder(data.cache)
    given = None if data.tokenizer == "bpe" else tokenizers.read_tokenizer_json(data.tokenizer)
    write, identity = _recipe(data, vocab_size, given, cache, report)
    recipe = given and tokenizers.tokenizer_hash(given)
    key = sha256_of({"format": FORMAT, "source": identity, "tokenizer": recipe, "holdout": data.holdout})
    folder = local_folder(out, "--out") if out else cache / "prepared" / key[:20]
    if not _is_there(folder, key):
        with locked(folder, report):
            if not _is_there(folder, key):  # another process may have made it while this one waited
                report(f"preparing {data.source} ...")
                with appearing(folder) as scratch:
                    write(scratch, key)
                report(_summary(load_prepared(folder)))
    prepared = load_prepared(folder)
    prepared.check_vocabulary(vocab_size)
    prepared.verify()
    return prepared


def _recipe(
    data: DataConfig, vocab_size: int, given: str | None, cache: Path, report: Report
) -> tuple[Callable[[Path, str], None], dict[str, Any]]:
    """What writes the preparation into a folder, and what decides its outcome besides tokenizer and holdout."""
    kind, _, name = data.source.partition(":")
    workers = data.workers or os.cpu_count() or 1
    if kind == "tokens" and name:
        if data.max_documents is not None:
            raise UserError("data.max_documents: tokens: sources are read whole; name fewer files")
        files = matching_files(name, "data.source")
        identity = {"kind": "tokens", "files": [file_identity(path) for path in files], "vocab_size": vocab_size}
        return lambda folder, key: _write_references(
            folder, key, data, [storage.cached(path) for path in files], vocab_size, given, workers, report
        ), identity
    source = open_source(data, cache, report)
    identity = dict(source.identity)
    if given is None:
        identity["bpe"] = [vocab_size, importlib.metadata.version("tokenizers"), _TRAINING_CHARACTERS]
    else:  # before anything is read
        bound = tokenizers.id_bound(tokenizers.parse_tokenizer(given, data.tokenizer))
        if bound > vocab_size:
            raise UserError(f"model.vocab_size: {vocab_size} is less than the {bound} token ids of {data.tokenizer}")
    return lambda folder, key: _write_shards(folder, key, data, source, vocab_size, given, workers, report), identity


def _write_shards(
    folder: Path,
    key: str,
    data: DataConfig,
    source: Source,
    vocab_size: int,
    given: str | None,
    workers: int,
    report: Report,
) -> None:
    hashes = _scan(source.documents(), report)
    bound_out = _held_out_bound(hashes, data.holdout, data.source)
    if given is None:
        report(f"train a tokenizer of {vocab_size:,} entries")
        again = _same_again(source.documents(), hashes, data.source)
        training = itertools.compress(again, hashes > bound_out)
        tokenizer = tokenizers.train_bpe(_up_to(training, _TRAINING_CHARACTERS), vocab_size)
    else:
        tokenizer = tokenizers.parse_tokenizer(given, data.tokenizer)
    end = tokenizers.end_id(tokenizer, data.tokenizer)
    bound = tokenizers.id_bound(tokenizer)
    dtype = np.dtype("<u2" if bound <= 2**16 else "<u4")
    documents: dict[Split, int | None] = {
        "train": int((hashes > bound_out).sum()),
        "eval": int((hashes <= bound_out).sum()),
    }
    progress = Progress("tokenize", report, len(hashes))
    with ShardWriter(folder, "train", dtype) as train, ShardWriter(folder, "eval", dtype) as held_out:
        texts = _same_again(source.documents(), hashes, data.source)
        encoded = tokenizers.encode_documents(texts, tokenizer, end, dtype, workers)
        for digest, ids in zip(hashes, encoded, strict=True):
            (held_out if digest <= bound_out else train).add(ids)
            progress.add(1, len(ids))
    progress.done()
    save_meta(
        folder,
        source=data.source,
        key=key,
        vocab_size=bound,
        end_id=end,
        tokenizer=tokenizer.to_str() if given is None else given,
        documents=documents,
        segments={"train": train.segments, "eval": held_out.segments},
    )


def _write_references(
    folder: Path,
    key: str,
    data: DataConfig,
    files: list[Path],
    vocab_size: int,
    given: str | None,
    workers: int,
    report: Report,
) -> None:
    end = (
        None if given is None else tokenizers.end_id(tokenizers.parse_tokenizer(given, data.tokenizer), data.tokenizer)
    )
    scan = token_files.scan(files, vocab_size, end, data.holdout, workers, report)
    for split, segments in scan.segments.items():
        if not segments:
            raise UserError(f"data.source: {data.source}: too little text: no document is left for the {split} split")
    save_meta(
        folder,
        source=data.source,
        key=key,
        vocab_size=vocab_size,
        end_id=end,
        tokenizer=given,
        documents=scan.documents,
        segments=scan.segments,
    )


def _scan(documents: Iterable[str], report: Report) -> npt.NDArray[np.uint64]:
    progress = Progress("scan", report)
    hashes = array.array("Q")
    for text in documents:
        hashes.append(_hash(text))
        progress.add(1)
    progress.done()
    return np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _same_again(documents: Iterable[str], hashes: npt.NDArray[np.uint64], source: str) -> Iterator[str]:
    """The documents once more; UserError where they are not those that were scan."""
    for text, expected in itertools.zip_longest(documents, hashes):
        if text is None or expected is None or _hash(text) != expected:
            raise UserError(f"data.source: {source} changed while it was read; run it again")
        yield text


def _held_out_bound(hashes: npt.NDArray[np.uint64], share: float, source: str) -> int:
    """The largest hash that is held out: `share` of the distinct documents, at least one, and at least one is left."""
    distinct = np.unique(hashes)
    if len(distinct) < 2:
        raise UserError(
            f"data.source: {source}: too little text: {len(distinct)} distinct document(s), and one has to be held "
            f"out; give several files, .jsonl lines, or parts separated by {tokenizers.END_MARKER}"
        )
    return int(distinct[min(max(round(share * len(distinct)), 1), len(distinct) - 1) - 1])


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    left = characters
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _is_there(folder: Path, key: str) -> bool:
    """Whether the preparation is in `folder`; UserError where something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / META).exists():
        raise UserError(f"{folder}: exists and holds no prepared data; name an empty or a new folder")
    if load_prepared(folder).key != key:
        raise UserError(f"{folder}: holds data prepared with other options; remove it or name another folder")
    return True


def _check_same_tokenizer(data: DataConfig, prepared: Prepared) -> None:
    if data.tokenizer == "bpe":
        return
    if tokenizers.tokenizer_hash(tokenizers.read_tokenizer_json(data.tokenizer)) != prepared.tokenizer_hash:
        raise UserError(
            f"data.tokenizer: {data.tokenizer} is not the tokenizer that {prepared.directory} was made with"
        )


def _summary(prepared: Prepared) -> str:
    parts = []
    for split in SPLITS:
        documents = prepared.documents[split]
        counted = "" if documents is None else f" in {documents:,} documents"
        parts.append(f"{prepared.num_tokens(split):,} {split} tokens{counted}")
    return f"data: {', '.join(parts)}; {prepared.directory}"
