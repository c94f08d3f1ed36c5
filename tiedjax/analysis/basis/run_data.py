"""The text that a run was trained on and the text that was held out from it."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError


def data_of(run: Any, source: str | None = None) -> Prepared:
    """The run's prepared data, from the cache or prepared again; `source` says where it lies now if it has moved.

    UserError when it cannot be had, or is not the text that the run was trained on.
    """
    data = run.config.data if source is None else dataclasses.replace(run.config.data, source=source)
    prepared = prepare(data, run.config.model.vocab_size, report=lambda line: print(line, flush=True))
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
