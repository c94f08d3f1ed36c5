"""The text that a run was trained on and the text that was held out from it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from tiedjax.config import DataConfig
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError


def prepared_text(data: DataConfig, vocab_size: int) -> Prepared:
    """`prepare`, its progress printed."""
    return prepare(data, vocab_size, report=lambda line: print(line, flush=True))


def data_of(
    run: Any, source: str | None = None, *, text: Callable[[DataConfig, int], Prepared] = prepared_text
) -> Prepared:
    """The run's prepared data, from the cache or prepared again; `source` says where it lies now if it has moved.

    UserError when it cannot be had, or is not the text that the run was trained on.
    """
    data = run.config.data if source is None else dataclasses.replace(run.config.data, source=source)
    prepared = text(data, run.config.model.vocab_size)
    same_text = np.array_equal(
        prepared.token_counts(run.config.model.seq_len, run.config.model.table_rows), run.token_counts
    )
    if same_text and run.tokenizer_path:
        same_text = hashlib.sha256(run.tokenizer_path.read_bytes()).hexdigest() == prepared.tokenizer_hash
    if not same_text:
        raise UserError(
            f"{run.path}: was trained on other text than {data.source!r} holds now; say where it is by --data SOURCE"
        )
    return prepared


def data_of_several() -> Callable[[Any], Prepared]:
    """`data_of` for many runs, which looks for the text of those with the same data once: that takes 0.2 s."""
    return partial(data_of, text=cache(prepared_text))
