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
    last_ND = model.last_states(held_out_WS)
    trained_W = _nats(model, last_ND, held_out_WS)
    costs: list[Cost] = []
    for bits in BITS:
        costs += _costs(model, held_out_WS, last_ND, trained_W, bits, draws)
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


def _costs(
    model: FrozenModel, held_out_WS: np.ndarray, last_ND: np.ndarray, trained_W: np.ndarray, bits: int, draws: int
) -> Iterator[Cost]:
    """Of every use; `last_ND` are the last states as trained.

    The body reads the input's table alone: each change of that takes one pass, and one of the output's table none.
    """
    trained = model.tables
    error = _of_each(lambda table_VD: np.subtract(rounded(table_VD, bits), table_VD, dtype=np.float64), trained)

    def costs_W(added: Tables) -> dict[str, np.ndarray]:
        changed = _of_each(lambda table_VD, of_VD: np.asarray(table_VD + of_VD, np.float32), trained, added)
        of_input = model.with_tables(Tables(changed.input, trained.output))
        moved_ND = of_input.last_states(held_out_WS)
        costs = {"input": _nats(of_input, moved_ND, held_out_WS)}
        of_output = model.with_tables(Tables(trained.input, changed.output))
        costs["output"] = _nats(of_output, last_ND, held_out_WS)
        costs[BOTH] = _nats(model.with_tables(changed), moved_ND, held_out_WS)
        return {use: nats_W - trained_W for use, nats_W in costs.items()}

    rounding_W = costs_W(error)
    rng = np.random.default_rng(0)
    of_noises = [costs_W(_of_each(lambda error_VD: noise_like(error_VD, rng), error)) for _ in range(draws)]
    norm = _of_each(lambda table_VD: np.linalg.norm(np.asarray(table_VD, np.float64)), trained)
    error_norm = _of_each(np.linalg.norm, error)
    for use in USES:
        noise_KW = np.stack([of_noise[use] for of_noise in of_noises])
        span = bootstrap_mean(rounding_W[use])
        roles = ROLES if use == BOTH else (use,)
        of_error, of_table = (
            math.hypot(*(float(getattr(side, role)) for role in roles)) for side in (error_norm, norm)
        )
        yield Cost(
            bits=bits,
            use=use,
            error=of_error / of_table,
            cost=beside(
                span.mean,
                drawn_floor(list(noise_KW.mean(axis=1))),
                similarity=False,
                rows=len(trained.input),
                interval=(span.low, span.high),
            ),
            less_noise=bootstrap_mean(rounding_W[use] - noise_KW.mean(axis=0)),
        )


def _nats(model: FrozenModel, last_ND: np.ndarray, tokens_WS: np.ndarray) -> np.ndarray:
    """The loss of every window, nats a token, where its last states are known: float64 [W]."""
    bits_N = model.bits_of(last_ND, tokens_WS[:, 1:].reshape(-1))
    return np.asarray(bits_N.reshape(len(tokens_WS), -1).mean(axis=1) * math.log(2))


def _of_each(make: Callable[..., Any], *sides: Any) -> Tables:
    """What `make` gives of each role's table, or once of one that both share."""
    of_input = make(*(side.input for side in sides))
    shared = all(side.input is side.output for side in sides)
    return Tables(of_input, of_input if shared else make(*(side.output for side in sides)))
