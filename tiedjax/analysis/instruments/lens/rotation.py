"""The input's logit lens beside its null: the same states read by the output table with its columns rotated.

A rotation leaves the rows' norms and all angles between them as they are, and takes away only that the two tables lie
in one space. What is left is what any table of this shape makes of the looked-up vectors.

Axes: W windows, S = T + 1 tokens, N positions laid flat, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.held_out import FrozenModel, bits_by_predictor, held_out_windows, over_windows
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.instruments.lens.lens import HELD_OUT_TOKENS
from tiedjax.data.prepared import Prepared

DRAWS = 5


@dataclass(frozen=True)
class InputLens:
    """What the looked-up vectors predict through the logit lens, in bits a token, beside rotated output tables.

    Floors are means over rotations, intervals over windows. `less_rotated` is the cross-entropy less its floor, paired
    by window: below 0 where the tables' common space helps the prediction. `final` is the model's own cross-entropy.
    """

    kl: Score
    cross_entropy: Score
    less_rotated: Interval
    final: Interval
    held_out_tokens: int
    held_out_windows: int


def measure(
    model: FrozenModel, run: Any, prepared: Prepared, *, held_out_tokens: int = HELD_OUT_TOKENS, draws: int = DRAWS
) -> InputLens:
    """The input's lens on about `held_out_tokens` of a run's text; rotations from `numpy.random.default_rng(0)`."""
    return input_lens(model, held_out_windows(prepared, run.seq_len, held_out_tokens), draws=draws)


def input_lens(model: FrozenModel, tokens_WS: np.ndarray, *, draws: int = DRAWS) -> InputLens:
    """The same on windows int [W, T + 1]."""
    x_ND, last_ND = model.states(tokens_WS, slice(None, None, model.config.layers))
    rng = np.random.default_rng(0)
    rotations = [rotation(rng, x_ND.shape[1]) for _ in range(draws)]

    def predict(chunk: slice, turned_DD: np.ndarray | None) -> jax.Array:
        y_CD = model.normed(x_ND[chunk])
        if turned_DD is None:
            return model.log_probabilities(y_CD)
        return model.log_probabilities(jnp.matmul(y_CD, jnp.asarray(turned_DD, jnp.float32), precision="highest"))

    turns: dict[int, np.ndarray | None] = {0: None, **dict(enumerate(rotations, start=1))}
    predictors = {i: (lambda chunk, of=turned_DD: predict(chunk, of)) for i, turned_DD in turns.items()}
    bits_2N = bits_by_predictor(model, last_ND, tokens_WS, predictors)
    by_window = {i: of_2N.reshape(2, len(tokens_WS), -1).mean(axis=2) for i, of_2N in bits_2N.items()}
    chance_K2W = np.stack([by_window[i] for i in range(1, draws + 1)])

    def score(side: int) -> Score:
        span = over_windows(by_window[0][side], len(tokens_WS))
        floor = drawn_floor(list(chance_K2W[:, side].mean(axis=1)))
        rows = tokens_WS[:, 1:].size
        return beside(span.mean, floor, similarity=False, rows=rows, interval=(span.low, span.high))

    return InputLens(
        kl=score(0),
        cross_entropy=score(1),
        less_rotated=over_windows(by_window[0][1] - chance_K2W[:, 1].mean(axis=0), len(tokens_WS)),
        final=over_windows(model.bits_of(last_ND, tokens_WS[:, 1:].reshape(-1)), len(tokens_WS)),
        held_out_tokens=tokens_WS[:, 1:].size,
        held_out_windows=len(tokens_WS),
    )


def rotation(rng: np.random.Generator, width: int) -> np.ndarray:
    """A uniformly random orthogonal matrix, float64 [D, D] (Mezzadri 2007, Notices of the AMS 54)."""
    q_DD, r_DD = np.linalg.qr(rng.normal(size=(width, width)))
    return np.asarray(q_DD * np.sign(np.diagonal(r_DD)))
