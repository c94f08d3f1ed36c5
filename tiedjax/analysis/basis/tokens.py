"""Tokens: what rows stand for, and which are the most frequent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiedjax.errors import UserError
from tiedjax.files import read_text


def most_frequent(counts: np.ndarray, k: int) -> list[int]:
    """Ids of the k tokens with the highest counts as target ([2, V] counts), most frequent first, seen ones only."""
    order = np.argsort(-counts[1], kind="stable")[:k]
    return [int(i) for i in order if counts[1][i] > 0]


def token_texts(tokenizer_path: Path | None, ids: list[int]) -> list[str]:
    """What each token stands for; its id in brackets where there is no tokenizer."""
    if tokenizer_path is None:
        return [f"[{i}]" for i in ids]
    tokenizer = _tokenizer(tokenizer_path)
    return [tokenizer.decode([i], skip_special_tokens=False) or tokenizer.id_to_token(i) or f"[{i}]" for i in ids]


def _tokenizer(path: Path) -> Any:
    """The tokenizer in a tokenizer.json, which takes the spelling of a special token for it. UserError otherwise."""
    from tiedjax.data.tokenizer import parse_tokenizer

    tokenizer = parse_tokenizer(read_text(path), str(path))
    tokenizer.encode_special_tokens = False
    return tokenizer


def token_strings(tokenizer_path: Path) -> list[str | None]:
    """What each id of a tokenizer.json stands for, so that tokenizers of different families can be compared.

    Byte-level spellings (GPT-2's) are read back into text, bytes that are none by surrogates; elsewhere SentencePiece's
    sign for a space becomes one. Added tokens, and all else (WordPiece's ##, byte tokens as <0x0A>), stand as spelled.
    None for an id that no token has. UserError for a file that is no tokenizer.json.
    """
    from tiedjax.data.tokenizer import id_bound, parse_tokenizer

    text = read_text(tokenizer_path)
    tokenizer, tree = parse_tokenizer(text, str(tokenizer_path)), json.loads(text)
    added_tokens = {token["content"] for token in tree.get("added_tokens") or []}
    to_text = _byte_level_text if _is_byte_level(tree) else lambda spelling: spelling.replace(_SPACE, " ")
    strings: list[str | None] = [None] * id_bound(tokenizer)
    for spelling, i in tokenizer.get_vocab(with_added_tokens=True).items():
        strings[i] = spelling if spelling in added_tokens else to_text(spelling)
    return strings


def token_bytes(tokenizer_path: Path) -> np.ndarray | None:
    """How many bytes of text each id stands for, float64 [ids]: 0 for special tokens, NaN for an id that no token has.

    Bytes are those of UTF-8, a part of a character counting those that it has. None for a tokenizer whose tokens do not
    say how they are joined (WordPiece, WordLevel). UserError for a file that is no tokenizer.json.
    """
    strings = token_strings(tokenizer_path)
    tree = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    if tree["model"].get("type") in ("WordPiece", "WordLevel"):
        return None
    has_bytes = bool(tree["model"].get("byte_fallback"))
    bytes_N = np.full(len(strings), math.nan)
    for i, text in enumerate(strings):
        if text is not None:
            is_byte = has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", text)
            bytes_N[i] = 1 if is_byte else len(text.encode("utf-8", "surrogateescape"))
    for token in tree.get("added_tokens") or []:
        if token.get("special"):
            bytes_N[token["id"]] = 0
    return bytes_N


_SPACE = "\u2581"  # SentencePiece's sign for a space
# GPT-2's: printable bytes stand for themselves, the others, in order, for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_HIDDEN)}


def _byte_level_text(spelling: str) -> str:
    if not _BYTES.keys() >= set(spelling):
        return spelling
    return bytes(_BYTES[character] for character in spelling).decode("utf-8", "surrogateescape")


def _is_byte_level(tree: Mapping[str, Any]) -> bool:
    parts = [tree.get("decoder") or {}, tree.get("pre_tokenizer") or {}]
    parts += [inner for part in parts for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ()))]
    return any(part.get("type") == "ByteLevel" for part in parts)


def token_ids(tokenizer_path: Path | None, texts: list[str]) -> list[int]:
    """The id of each text that is one token, as it stands or after a space; "[12]" is the id 12.

    UserError for a text of several tokens, and for any text without a tokenizer.
    """
    ids = []
    for text in texts:
        if match := re.fullmatch(r"\[(\d+)\]", text):
            ids.append(int(match[1]))
        elif tokenizer_path is None:
            raise UserError(f"{text!r}: there is no tokenizer to look it up in; write the token's id in brackets, [12]")
        else:
            ids.append(_token_id(tokenizer_path, text))
    return ids


def _token_id(tokenizer_path: Path, text: str) -> int:
    tokenizer = _tokenizer(tokenizer_path)
    encodings = [tokenizer.encode(form, add_special_tokens=False) for form in (text, f" {text}")]
    for encoding in encodings:
        if len(encoding.ids) == 1:
            return int(encoding.ids[0])
    raise UserError(f"{text!r}: is not one token but {len(encodings[0].ids)}: {' '.join(encodings[0].tokens)}")
