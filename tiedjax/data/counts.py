"""How often tokens occur in training windows, without making the first step wait for it.

A source of up to `COUNTED_AT_ONCE` training tokens is counted before the first step. Of a larger one a sample is, which
depends on the source and on T alone, so that all processes have the same, and a run has the same as its continuation;
`count_beside_training` counts the whole, in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys

import numpy as np
import numpy.typing as npt

from tiedjax.data.folders import locked
from tiedjax.data.prepared import Prepared, load_prepared, save_array
from tiedjax.host import storage

COUNTED_AT_ONCE = 2**26  # training tokens: a third of a second
_SAMPLE = 2**24  # tokens
_PARTS = 2**10  # evenly spaced places at which as many windows are read in a row


def counted_at_once(prepared: Prepared) -> bool:
    """Whether the source is small enough for that."""
    return prepared.num_tokens("train") <= COUNTED_AT_ONCE


def sampled_counts(prepared: Prepared, seq_len: int, vocab_rows: int) -> npt.NDArray[np.int64]:
    """As `Prepared.token_counts`, of 2^24 tokens of evenly spaced training windows; of all if they have fewer."""
    prepared.check_vocabulary(vocab_rows)
    windows = prepared.windows("train", seq_len)
    total, wanted = len(windows), max(_SAMPLE // seq_len, 1)
    parts = min(_PARTS, wanted)
    firsts = np.arange(parts) * total // parts
    places = (firsts[:, None] + np.arange(wanted // parts)).ravel() if wanted < total else np.arange(total)
    counts = np.zeros((2, vocab_rows), np.int64)
    for some in np.array_split(places, 16):  # bounds memory
        tokens_NS = windows.read(some)
        for role, tokens_NT in enumerate((tokens_NS[:, :-1], tokens_NS[:, 1:])):
            counts[role] += np.bincount(tokens_NT.ravel(), minlength=vocab_rows)
    return counts


def log_unigram(count_V: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """log((n + 1/2) / (N + V/2)) of the counts n of V tokens, N in all: finite for tokens that never occur too."""
    smoothed_V = count_V + 0.5
    return np.asarray(np.log(smoothed_V / smoothed_V.sum()), np.float32)


def count_beside_training(directory: str, seq_len: int, vocab_rows: int, path: str) -> None:
    """Counts what is prepared in `directory` unless that is kept there, and saves [2, vocab_rows] as `path` (.npy).

    To be called in a process of its own, which leaves the cores to others. Of several that count one source, one works.
    UserError as of `Prepared.token_counts`.
    """
    os.nice(19)
    prepared = load_prepared(directory)
    waits = lambda line: print(line, file=sys.stderr, flush=True)
    writable = os.access(directory, os.W_OK)
    with locked(prepared.counts_path(seq_len), waits) if writable else contextlib.nullcontext():
        counts_2V = prepared.token_counts(seq_len, vocab_rows)
    save_array(storage.place(path, "path"), counts_2V)
