"""Rounding: what a table of 8 or of 4 bits a number costs each role, in nats a held-out token.

Each row is rounded to the nearest of 2^bits - 1 evenly spaced values, symmetric about 0, with one scale a row:
s = max|row| / (2^(bits - 1) - 1), row -> s round(row / s). It is done to the table that is looked up, to the one that
predicts, and to both; the body and the other use stay as they were trained. The null adds noise instead of the
rounding error: to each row a Gaussian one, scaled to the norm of that row's error.

Axes: V rows, D width, W windows, S = T + 1 tokens, N positions laid flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows, over_windows
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.data.prepared import Prepared
from tiedjax.tying import Tables

BITS = (8, 4)
BOTH = "both"
USES = (*ROLES, BOTH)
HELD_OUT_TOKENS = 4096
DRAWS = 3


@dataclass(frozen=True)
class Cost:
    """What a table of so many bits in a use costs, in nats a held-out token, beside what noise of its norm costs.

    `cost` has the mean over the noises as its floor and an interval over windows; `less_noise` is the difference of the
    two, paired by window. `error` is the norm of the rounding error over that of the table, of both uses together.
    """

    bits: int
    use: str
    error: float
    cost: Score
    less_noise: Interval


@dataclass(frozen=True)
class Rounding:
    """The costs of a run's model at its last full checkpoint; `loss` is that of the trained model, nats a token."""

    step: int | None
    rows: int
    width: int
    shared: bool
    loss: Interval
    costs: list[Cost]
    draws: int
    held_out_tokens: int
    held_out_windows: int


def rounded(table_VD: np.ndarray, bits: int) -> np.ndarray:
    """The table with its rows rounded to `bits` of at least 2, float32 [V, D]; a row of zeros stays one.

    >>> rounded(np.array([[7.0, 3.4, -0.6]]), 4).tolist()
    [[7.0, 3.0, -1.0]]
    """
    x_VD = np.asarray(table_VD, np.float64)
    scale_V1 = np.abs(x_VD).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    steps_VD = np.divide(x_VD, scale_V1, out=np.zeros_like(x_VD), where=scale_V1 > 0)
    return np.asarray(np.rint(steps_VD) * scale_V1, np.float32)


def noise_like(error_VD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian rows, each with the norm of that row of the error, float64 [V, D]."""
    noise_VD = rng.normal(size=error_VD.shape)
    norm_V1, wanted_V1 = (np.linalg.norm(x_VD, axis=1, keepdims=True) for x_VD in (noise_VD, error_VD))
    return np.asarray(noise_VD / norm_V1 * wanted_V1)


def measure(
    model: FrozenModel,
    run: Any,
    prepared: Prepared,
    *,
    held_out_tokens: int = HELD_OUT_TOKENS,
    draws: int = DRAWS,
    report: Callable[[str], None] = lambda line: None,
) -> Rounding:
    """The costs of rounding a run's model, on about `held_out_tokens` that it was not shown.

    `draws` noises make each floor, from `numpy.random.default_rng(0)`: those of a use alone and of both are the same.
    `report` is told of each number of bits.
    """
    rows, width = model.U_VD.shape
    held_out_WS = held_out_windows(prepared, run.seq_len, held_out_tokens)
    trained_W = model.bits(held_out_WS).mean(axis=1) * math.log(2)
    costs: list[Cost] = []
    for bits in BITS:
        costs += _costs(model, held_out_WS, trained_W, bits, draws)
        report(f"{bits} bits: {costs[-1].cost.score:.4f} nats a held-out token, both uses rounded")
    return Rounding(
        step=model.step,
        rows=rows,
        width=width,
        shared=model.tables.tied,
        loss=over_windows(trained_W, len(trained_W)),
        costs=costs,
        draws=draws,
        held_out_tokens=held_out_WS[:, 1:].size,
        held_out_windows=len(held_out_WS),
    )


def _costs(model: FrozenModel, held_out_WS: np.ndarray, trained_W: np.ndarray, bits: int, draws: int) -> Iterator[Cost]:
    """Of every use."""
    trained = Tables(*(np.asarray(table_VD, np.float64) for table_VD in (model.tables.input, model.tables.output)))
    error = Tables(*(rounded(table_VD, bits) - table_VD for table_VD in trained))
    rng = np.random.default_rng(0)
    noises = [_noise(error, model.tables.tied, rng) for _ in range(draws)]

    def cost_W(use: str, added: Tables) -> np.ndarray:
        changed = (
            np.asarray(table_VD + added_VD, np.float32) if use in (role, BOTH) else table_VD
            for role, table_VD, added_VD in zip(ROLES, trained, added, strict=True)
        )
        between = model.with_tables(Tables(*changed))
        return np.asarray(between.bits(held_out_WS).mean(axis=1) * math.log(2) - trained_W)

    for use in USES:
        rounding_W = cost_W(use, error)
        noise_KW = np.stack([cost_W(use, noise) for noise in noises])
        span = bootstrap_mean(rounding_W)
        roles = ROLES if use == BOTH else (use,)
        error_norm, table_norm = (
            math.hypot(*(float(np.linalg.norm(getattr(side, role))) for role in roles)) for side in (error, trained)
        )
        yield Cost(
            bits=bits,
            use=use,
            error=error_norm / table_norm,
            cost=beside(
                span.mean,
                drawn_floor(list(noise_KW.mean(axis=1))),
                similarity=False,
                rows=len(trained.input),
                interval=(span.low, span.high),
            ),
            less_noise=bootstrap_mean(rounding_W - noise_KW.mean(axis=0)),
        )


def _noise(error: Tables, shared: bool, rng: np.random.Generator) -> Tables:
    """One noise for each use; one for both of a table that they share."""
    of_input_VD = noise_like(error.input, rng)
    return Tables(of_input_VD, of_input_VD if shared else noise_like(error.output, rng))
