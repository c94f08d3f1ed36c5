"""Whether prepared tokens are still those that were prepared; nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tiedjax.config import DataConfig
from tiedjax.data.folders import cache_folder
from tiedjax.data.prepared import (
    META,
    SPLITS,
    Segment,
    check_size,
    check_tokenizer,
    fetched,
    fingerprint_of,
    read_meta,
)
from tiedjax.data.token_files import hash_now
from tiedjax.errors import UserError
from tiedjax.host import storage


def searched(data: DataConfig) -> Path:
    """The folder that holds the preparation of these options, or where preparations are cached."""
    kind, _, name = data.source.partition(":")
    if kind != "prepared":
        return cache_folder(data.cache) / "prepared"
    return storage.place(name, "data.source") if storage.is_remote(name) else Path(name).expanduser().absolute()


def find_prepared(data: DataConfig, fingerprint: str) -> list[Path]:
    """The folders there whose meta.json has this fingerprint, of one in a store a copy here.

    There are several where the same tokens were prepared from several sources.
    """
    folder, found = searched(data), []
    if storage.is_remote(folder):
        if not storage.exists(folder / META):
            return []
        folder = fetched(folder)
    for directory in (folder, *sorted(folder.glob("[0-9a-f]*"))):
        try:
            meta = json.loads((directory / META).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(meta, dict) and meta.get("fingerprint") == fingerprint:
            found.append(directory)
    return found


def verify(directory: Path) -> dict[Path, str | None]:
    """What is wrong with each file of tokens, and with meta.json and tokenizer.json beside them; None: nothing."""
    path = directory / META
    try:
        meta, _, segments = read_meta(directory)
    except UserError as error:
        return {path: _reason(error, path)}
    again = fingerprint_of(segments, meta["end_id"], meta["tokenizer_hash"])
    found: dict[Path, str | None] = {
        path: None if again == meta["fingerprint"] else "does not describe the tokens of its fingerprint"
    }
    if meta["tokenizer_hash"]:
        tokenizer = directory / "tokenizer.json"
        try:
            check_tokenizer(directory, meta)
        except (UserError, OSError, ValueError) as error:
            found[tokenizer] = _reason(error, tokenizer)
        else:
            found[tokenizer] = None
    wholes: dict[Path, Segment] = {}
    for segment in (segment for split in SPLITS for segment in segments[split]):
        place = directory / segment.file
        stop = max(segment.stop, wholes[place].stop if place in wholes else 0)
        wholes[place] = replace(segment, file=str(place), start=0, stop=stop)
    for place, whole in wholes.items():
        try:
            check_size(place, whole.file_bytes)
            same = hash_now(whole, meta["vocab_size"]) == whole.sha256
        except (UserError, OSError, ValueError, TypeError) as error:  # of meta.json's own values too
            found[place] = _reason(error, place)
        else:
            found[place] = None if same else "does not hold the tokens that were prepared"
    return found


def _reason(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
