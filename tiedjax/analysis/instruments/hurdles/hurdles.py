"""A run's held-out loss beside what predicting without a model costs: uniform, unigram, bigram, trigram.

All are taken on the very windows of the run's own `eval_loss`; the predictors count the text that the run was shown. A
model that is worse than a bigram has not learned yet what follows which token, let alone more. Bits a byte compare runs
of different vocabularies: the bits of all targets over the bytes of text that they stand for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, evaluated_windows
from tiedjax.analysis.basis.ngrams import PREDICTORS, ngrams_shown
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.tokens import token_bytes
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError

MODEL = "model"
_BLOCK = 2**16  # positions whose counts are held at once


@dataclass(frozen=True)
class Text:
    """A run's held-out windows [W, T + 1], and each one's bits a token by predictor, float64 [W].

    `bytes_W` is the text that its targets stand for; `document_W` numbers the document that it begins in. None where
    that is not known.
    """

    tokens_WS: np.ndarray
    bits_W: dict[str, np.ndarray]
    bytes_W: np.ndarray | None
    document_W: np.ndarray | None
    training_tokens: int
    beta: float
    gamma: float


@dataclass(frozen=True)
class Hurdle:
    """A loss in three units, and the model's bits a token less it, None of the model itself.

    Intervals are over documents, since windows of one document are alike; over windows where documents are not known.
    """

    nats: float
    bits: Interval
    bits_per_byte: float | None
    model_less: Interval | None


@dataclass(frozen=True)
class Hurdles:
    """The model's loss at its last full checkpoint, and each predictor's, in the order of `MODEL`, `PREDICTORS`.

    `training_tokens` were counted; `beta` and `gamma` are the strengths of the bigram's and the trigram's prior.
    """

    step: int | None
    rows: int
    width: int
    held_out_windows: int
    held_out_documents: int | None
    held_out_tokens: int
    held_out_bytes: int | None
    training_tokens: int
    beta: float
    gamma: float
    losses: dict[str, Hurdle]


def measure(
    model: FrozenModel, run: Any, prepared: Prepared, *, text: Text | None = None, windows: slice = slice(None)
) -> Hurdles:
    """The hurdles on some of the held-out `windows` of the run's own evaluation, by default all.

    `text` is what `text_of` gives, where a run that was shown the same text has had it counted. UserError where
    `windows` selects none.
    """
    rows, width = model.U_VD.shape
    text = text or text_of(run, prepared, model.step, rows)
    tokens_WS = text.tokens_WS[windows]
    if not len(tokens_WS):
        raise UserError(f"hurdles: {windows} selects none of the {len(text.tokens_WS)} held-out windows")
    document_W = None if text.document_W is None else text.document_W[windows]
    bits_W = {MODEL: model.bits(tokens_WS).mean(axis=1)} | {name: text.bits_W[name][windows] for name in PREDICTORS}
    bytes_of_all = math.nan if text.bytes_W is None else float(text.bytes_W[windows].sum())
    known = math.isfinite(bytes_of_all) and bytes_of_all > 0
    targets = tokens_WS[:, 1:].size
    losses = {
        name: Hurdle(
            nats=float(of_W.mean() * math.log(2)),
            bits=bootstrap_mean(of_W, groups=document_W),
            bits_per_byte=float(of_W.mean() * targets / bytes_of_all) if known else None,
            model_less=None if name == MODEL else bootstrap_mean(bits_W[MODEL] - of_W, groups=document_W),
        )
        for name, of_W in bits_W.items()
    }
    return Hurdles(
        step=model.step,
        rows=rows,
        width=width,
        held_out_windows=len(tokens_WS),
        held_out_documents=None if document_W is None else len(np.unique(document_W)),
        held_out_tokens=targets,
        held_out_bytes=int(bytes_of_all) if known else None,
        training_tokens=text.training_tokens,
        beta=text.beta,
        gamma=text.gamma,
        losses=losses,
    )


def text_of(run: Any, prepared: Prepared, step: int | None, V: int) -> Text:
    """What a run was shown up to a step, counted, and asked about its held-out windows; V rows of its table.

    None, of a model without steps, is all of its text.
    """
    tokens_WS = evaluated_windows(run, prepared)
    ngrams = ngrams_shown(run, prepared, step, tokens_WS, V)
    rows = max(1, _BLOCK // (tokens_WS.shape[1] - 1))
    blocks = [ngrams.bits(tokens_WS[start : start + rows]) for start in range(0, len(tokens_WS), rows)]
    bits_W = {name: np.concatenate([block[name].mean(axis=1) for block in blocks]) for name in PREDICTORS}
    bytes_W, document_W = _bytes(run, tokens_WS[:, 1:]), _documents(tokens_WS, prepared.end_id)
    return Text(tokens_WS, bits_W, bytes_W, document_W, ngrams.training_tokens, ngrams.beta, ngrams.gamma)


def name_of_text(run: Any, prepared: Prepared, step: int | None, V: int) -> Hashable:
    """The same for runs of which `text_of` gives the same."""
    cfg = run.config
    held_out = cfg.data.batch_size, cfg.train.eval_batches
    return prepared.fingerprint, cfg.model.seq_len, cfg.train.seed, held_out, step, V


def _documents(tokens_WS: np.ndarray, end_id: int | None) -> np.ndarray | None:
    """Of each of the windows of `evaluated_windows` how many documents end before it, int [W]; None without ends."""
    if end_id is None:
        return None
    numbers_W = np.concatenate([np.arange(half, len(tokens_WS), 2) for half in (0, 1)])  # where it lies in the text
    ends_W = np.empty(len(tokens_WS), np.int64)
    ends_W[numbers_W] = np.sum(tokens_WS[:, :-1] == end_id, axis=1)  # its last token is the next one's first
    return (np.cumsum(ends_W) - ends_W)[numbers_W]


def _bytes(run: Any, target_WT: np.ndarray) -> np.ndarray | None:
    """Bytes of the text that each window's targets stand for, float64 [W]; NaN where a target stands for none known."""
    bytes_N = None if run.tokenizer_path is None else token_bytes(run.tokenizer_path)
    if bytes_N is None:
        return None
    bytes_N = np.append(bytes_N, math.nan)  # of ids beyond the tokenizer's
    return np.asarray(bytes_N[np.minimum(target_WT, len(bytes_N) - 1)].sum(axis=1))
