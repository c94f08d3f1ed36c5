"""Diversity: how varied what a model writes is, beside as much held-out text, and how far its predictions spread.

Texts are drawn at temperature 1, each after the token with which `tiedjax.sample` begins a text. Of them, and of as
many held-out windows of the same length:

    distinct_n           different n-grams over all n-grams, none over the edge of a text (Li et al. 2016,
                         arXiv 1510.03055)
    entropy              of the shares of the tokens, in bits: the plug-in estimate, which grows with how many they are
    prediction_entropy   mean entropy of the model's predictions along the text: what it expects a token to cost, bits
    cross_entropy        what a token of the text costs it, mean, bits

distinct_n falls and entropy rises with the number of tokens, so that they compare texts of one size only. What a model
draws costs it what it expects, but for chance; where held-out text costs it more than it expects, it is over-confident.

Axes: B texts, T tokens of each, S = T + 1 with the token before them, N = B T, C a chunk of N, V ids.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tiedjax.analysis.basis.held_out import FrozenModel, chunks, held_out_windows, over_windows
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError
from tiedjax.sample import continue_tokens, text_start
from tiedjax.tying import Tables

TEXTS, TOKENS = 64, 64
DRAW_SEED = 0  # that of `sample_text`


@dataclass(frozen=True)
class Variety:
    """How varied texts are; distinct_n is None where no text has n tokens, `entropy` is in bits a token."""

    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    entropy: float


@dataclass(frozen=True)
class Text(Variety):
    """The same, and what a model predicts along the texts: bits a token, intervals over texts."""

    prediction_entropy: Interval
    cross_entropy: Interval


@dataclass(frozen=True)
class RunDiversity:
    """What a run's model writes at its last full checkpoint, and held-out text: `texts` of `tokens` tokens of each."""

    step: int | None
    rows: int
    width: int
    texts: int
    tokens: int
    written: Text
    held_out: Text


def measure(
    model: FrozenModel, run: Any, prepared: Prepared, *, texts: int = TEXTS, tokens: int | None = None
) -> RunDiversity:
    """How varied `texts` texts of `tokens` tokens are that a run's model writes, beside as much held-out text.

    `tokens` are by default TOKENS, fewer where the model reads fewer; where the held-out split has fewer windows than
    `texts`, as many texts are written. UserError for numbers out of range and for a model that is not finite.
    """
    seq_len = run.seq_len
    tokens = min(TOKENS, seq_len) if tokens is None else tokens
    if texts < 1:
        raise UserError(f"texts: must be at least 1, got {texts}")
    if not 1 <= tokens <= seq_len:
        raise UserError(f"tokens: must be 1 to {seq_len}, the positions of a window, got {tokens}")
    held_out_BS = held_out_windows(prepared, tokens, texts * tokens)
    start = text_start(run)[0] if prepared.begin_id is None else prepared.begin_id
    written_BS = write(model, start, len(held_out_BS), tokens)
    rows, width = model.U_VD.shape
    return RunDiversity(
        step=model.step,
        rows=rows,
        width=width,
        texts=len(held_out_BS),
        tokens=tokens,
        written=described(model, written_BS),
        held_out=described(model, held_out_BS),
    )


def write(model: FrozenModel, start: int, texts: int, tokens: int) -> np.ndarray:
    """`texts` texts that the model writes after the token `start`, which comes first: int32 [B, T + 1]."""
    start_B1 = np.full((texts, 1), start, np.int32)
    # A cache for as many positions as there will be tokens: one of a long window is too large for many texts at once.
    # Of learned positions there are as many as the model has.
    cfg = model.config if model.config.position == "learned" else dataclasses.replace(model.config, seq_len=tokens)
    tables, key = Tables(model.E_VD, model.U_VD), jax.random.key(DRAW_SEED)
    drawn_BT = continue_tokens(cfg, tables, model.body, start_B1, tokens, bias_V=model.bias_V, key=key)
    return np.concatenate([start_B1, drawn_BT], axis=1)


def described(model: FrozenModel, tokens_BS: np.ndarray) -> Text:
    """How varied texts [B, T + 1] are, their first tokens apart, and what the model predicts along them.

    UserError where a prediction is not finite.
    """
    target_N = tokens_BS[:, 1:].reshape(-1)
    last_ND = model.last_states(tokens_BS)
    parts = [
        _predicted(model.log_probabilities(model.normed(last_ND[chunk])), target_N[chunk])
        for chunk in chunks(len(target_N))
    ]
    entropy_N, cost_N = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    if not (np.isfinite(entropy_N) & np.isfinite(cost_N)).all():
        raise UserError(f"diversity: the model's predictions at step {model.step} are not finite")
    over_texts = lambda values_N: over_windows(values_N, len(tokens_BS))
    return Text(
        **vars(variety(tokens_BS[:, 1:])),
        prediction_entropy=over_texts(entropy_N),
        cross_entropy=over_texts(cost_N),
    )


def variety(tokens_BT: npt.ArrayLike) -> Variety:
    """How varied texts of token ids [B, T] are, at least one token in all.

    >>> variety([[1, 2, 1, 2], [1, 2, 3, 3]])
    Variety(distinct_1=0.375, distinct_2=0.6666666666666666, distinct_3=1.0, entropy=1.561278...)
    """
    tokens_BT = np.asarray(tokens_BT)
    _, count_V = np.unique(tokens_BT, return_counts=True)
    share_V = count_V / tokens_BT.size
    return Variety(
        distinct_1=distinct_share(tokens_BT, 1),
        distinct_2=distinct_share(tokens_BT, 2),
        distinct_3=distinct_share(tokens_BT, 3),
        entropy=float(share_V @ np.log2(1 / share_V)),
    )


def distinct_share(tokens_BT: np.ndarray, n: int) -> float | None:
    """Different n-grams over all n-grams of texts [B, T], each within a text; None for texts of fewer than n tokens."""
    if tokens_BT.shape[1] < n:
        return None
    ngrams_Nn = np.lib.stride_tricks.sliding_window_view(tokens_BT, n, axis=1).reshape(-1, n)
    return len(np.unique(ngrams_Nn, axis=0)) / len(ngrams_Nn)


@jax.jit
def _predicted(log_p_CV: jax.Array, target_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entropy of each prediction and cost of each target in bits, [C], of log-probabilities in nats."""
    entropy_C = -jnp.sum(jnp.exp(log_p_CV) * log_p_CV, axis=-1)
    cost_C = -jnp.take_along_axis(log_p_CV, target_C[:, None], axis=-1)[:, 0]
    return entropy_C / np.log(2), cost_C / np.log(2)
