"""Calibration: whether a model's probabilities are the frequencies that they claim to be, by token frequency.

A group is a set of tokens. On held-out text, with p the model's distribution at a position and w the true next token:

    log2_ratio      log2(mean of p(group) / share of targets in the group): above 0, the group is over-predicted
    group_error     expected calibration error of the forecast p(group) of the event "w is in the group"
    top_error       expected calibration error of max p as forecast of "the likeliest token is right" (Guo et al. 2017)
    overconfidence  mean of max p less how often the likeliest token is right, where that token is in the group

Expected calibration error is the mean over positions of |mean forecast - event rate| within BINS bins of equally many
positions. It is above 0 even for perfect forecasts, for rates of finitely many events scatter, and a score over the
positions whose *target* is in a group picks positions by their outcome. So every score has a floor: the same score with
the targets drawn from the model's own p, as if it were calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.chance import Score, beside, drawn_floor
from tiedjax.analysis.basis.held_out import FrozenModel, chunks, held_out_windows, over_windows
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.basis.strata import BIN_WIDTH, NEVER, log_bins, strata
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError

BINS = 15
HELD_OUT_TOKENS = 16_384
DRAWS = 20


@dataclass(frozen=True)
class Group:
    """A group of tokens. `log_count` is the mean of log10(count as target + 1) over them.

    Over the positions whose target is in the group: the mean probability of the target, the mean entropy of p in bits,
    `top_error`. Over the positions whose likeliest token is: `overconfidence`. None where there is no position.
    """

    name: str
    log_count: float
    tokens: int
    share: float
    mass: float
    log2_ratio: Score
    group_error: Score
    target_positions: int
    target_probability: float | None
    entropy: float | None
    top_error: Score
    predicted_positions: int
    overconfidence: Score


@dataclass(frozen=True)
class Calibration:
    """All positions together, intervals over windows; then by group. Loss and entropy in bits."""

    loss: Interval
    entropy: Interval
    target_probability: Interval
    confidence: Interval
    accuracy: Interval
    top_error: Score
    overconfidence: Score
    positions: int
    windows: int
    groups: list[Group]


@dataclass(frozen=True)
class Forecasts:
    """What is kept of every position's distribution; `mass_NG` is its mass on each of G disjoint groups of tokens."""

    mass_NG: np.ndarray
    confidence_N: np.ndarray
    top_N: np.ndarray
    target_N: np.ndarray
    target_probability_N: np.ndarray
    entropy_N: np.ndarray
    windows: int


def frequency_bins(count_V: np.ndarray) -> dict[str, np.ndarray]:
    """Boolean [V] per bin of log10(count + 1), BIN_WIDTH wide; never-seen tokens have their own."""
    index_V = log_bins(count_V)
    name = lambda i: NEVER if i < 0 else f"{i * BIN_WIDTH:.1f}-{(i + 1) * BIN_WIDTH:.1f}"
    return {name(i): index_V == i for i in np.unique(index_V)}


def forecasts(
    model: FrozenModel, tokens_WS: np.ndarray, partitions: Sequence[Mapping[str, np.ndarray]]
) -> list[Forecasts]:
    """The model's forecasts on windows [W, T + 1] for several partitions of its tokens, in one pass."""
    masks = [mask for groups in partitions for mask in groups.values()]
    group_VG = jnp.asarray(np.stack(masks, axis=1), jnp.float32)
    target_N = np.asarray(tokens_WS)[:, 1:].reshape(-1)
    y_ND = model.normed(model.last_states(tokens_WS))
    parts = [_forecast(model.log_probabilities(y_ND[c]), group_VG, target_N[c]) for c in chunks(len(target_N))]
    mass_NG, *rest = (np.concatenate([np.asarray(a, np.float64) for a in part]) for part in zip(*parts, strict=True))
    confidence_N, top_N, target_probability_N, entropy_N = rest
    edges = np.cumsum([len(groups) for groups in partitions])[:-1]
    return [
        Forecasts(
            mass_NG=mass,
            confidence_N=confidence_N,
            top_N=top_N.astype(np.int64),
            target_N=target_N,
            target_probability_N=target_probability_N,
            entropy_N=entropy_N,
            windows=len(tokens_WS),
        )
        for mass in np.split(mass_NG, edges, axis=1)
    ]


@jax.jit
def _forecast(log_p_CV: jax.Array, group_VG: jax.Array, target_C: jax.Array) -> tuple[jax.Array, ...]:
    p_CV = jnp.exp(log_p_CV)
    target_probability_C = jnp.take_along_axis(p_CV, target_C[:, None], axis=-1)[:, 0]
    entropy_C = -jnp.sum(p_CV * log_p_CV, axis=-1) / math.log(2)
    mass_CG = jnp.matmul(p_CV, group_VG, precision="highest")
    return mass_CG, p_CV.max(axis=-1), p_CV.argmax(axis=-1), target_probability_C, entropy_C


def calibration_error(forecast_N: np.ndarray, event_N: np.ndarray, bins: int = BINS) -> float | None:
    """Expected calibration error over `bins` bins of equally many positions (to within one); None without positions."""
    order = np.argsort(forecast_N, kind="stable")
    return _binned_error((np.asarray(forecast_N, np.float64) - event_N)[order], bins)


def _binned_error(difference_N: np.ndarray, bins: int = BINS) -> float | None:
    """Of forecast - event, in the order of the forecasts."""
    n = len(difference_N)
    if not n:
        return None
    edges = np.arange(min(bins, n)) * n // min(bins, n)
    return float(np.abs(np.add.reduceat(difference_N, edges)).sum() / n)


@dataclass(frozen=True)
class RunCalibration:
    """A run's model at its last full checkpoint, by stratum and by bin of token frequency."""

    step: int | None
    rows: int
    width: int
    by_stratum: Calibration
    by_bin: Calibration


def measure(
    model: FrozenModel, run: Any, prepared: Prepared, *, held_out_tokens: int = HELD_OUT_TOKENS, draws: int = DRAWS
) -> RunCalibration:
    """The calibration of a run's model on about `held_out_tokens` that the run was not trained on."""
    rows, width = model.U_VD.shape
    tokens_WS = held_out_windows(prepared, run.seq_len, held_out_tokens)
    count_V = run.token_counts[1]  # as target
    partitions = [strata(count_V), frequency_bins(count_V)]
    by_stratum, by_bin = (
        calibrate(forecast, groups, count_V, draws=draws)
        for forecast, groups in zip(forecasts(model, tokens_WS, partitions), partitions, strict=True)
    )
    return RunCalibration(model.step, rows, width, by_stratum, by_bin)


def calibrate(
    forecast: Forecasts, groups: Mapping[str, np.ndarray], count_V: np.ndarray, *, draws: int = DRAWS
) -> Calibration:
    """Scores and floors; `groups` are the disjoint boolean [V] masks that `forecast.mass_NG` was summed over.

    Floors draw targets from `numpy.random.default_rng(0)`. UserError when a token is in no group or in several.
    """
    member_VG = np.stack(list(groups.values()), axis=1)
    if (member_VG.sum(axis=1) != 1).any():
        raise UserError("calibration: every token must be in exactly one group")
    group_V = member_VG.argmax(axis=1)
    measures = _Measure(forecast, group_V[forecast.top_N])
    right_N = forecast.top_N == forecast.target_N
    scores = measures.scores(right_N, group_V[forecast.target_N])
    rng = np.random.default_rng(0)
    by_draw = [measures.scores(*measures.draw(rng)) for _ in range(draws)]

    def score(name: str, g: int = 0) -> Score:
        floor = drawn_floor([draw_scores[name][g] for draw_scores in by_draw])
        return beside(scores[name][g], floor, similarity=False)

    log_V = np.log10(np.asarray(count_V, np.float64) + 1)
    target_group_N = group_V[forecast.target_N]
    group_records = []
    for g, (name, mask_V) in enumerate(groups.items()):
        of_target_N = target_group_N == g
        group_records.append(
            Group(
                name=name,
                log_count=float(log_V[mask_V].mean()) if mask_V.any() else 0.0,
                tokens=int(mask_V.sum()),
                share=float(of_target_N.mean()),
                mass=float(forecast.mass_NG[:, g].mean()),
                log2_ratio=score("log2_ratio", g),
                group_error=score("group_error", g),
                target_positions=int(of_target_N.sum()),
                target_probability=_mean(forecast.target_probability_N[of_target_N]),
                entropy=_mean(forecast.entropy_N[of_target_N]),
                top_error=score("top_error", g),
                predicted_positions=int((measures.top_group_N == g).sum()),
                overconfidence=score("overconfidence", g),
            )
        )
    loss_N = -np.log2(np.maximum(forecast.target_probability_N, np.finfo(np.float64).tiny))
    mean = lambda values_N: over_windows(values_N, forecast.windows)
    return Calibration(
        loss=mean(loss_N),
        entropy=mean(forecast.entropy_N),
        target_probability=mean(forecast.target_probability_N),
        confidence=mean(forecast.confidence_N),
        accuracy=mean(right_N),
        top_error=score("top_error_all"),
        overconfidence=score("overconfidence_all"),
        positions=len(right_N),
        windows=forecast.windows,
        groups=group_records,
    )


class _Measure:
    """Every score as a function of the outcome: whether the likeliest token is right, and the target's group."""

    def __init__(self, forecast: Forecasts, top_group_N: np.ndarray) -> None:
        self._forecast, self.top_group_N = forecast, top_group_N
        self._by_confidence = np.argsort(forecast.confidence_N, kind="stable")
        self._by_mass_NG = np.argsort(forecast.mass_NG, axis=0, kind="stable")
        # What can happen: the target is the likeliest token (last), or another one of a group.
        rest_NG = forecast.mass_NG.copy()
        rest_NG[np.arange(len(rest_NG)), top_group_N] -= forecast.confidence_N
        chance_NG = np.column_stack([np.maximum(rest_NG, 0), forecast.confidence_N])
        self._cumulative = np.cumsum(chance_NG / chance_NG.sum(axis=1, keepdims=True), axis=1)[:, :-1]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An outcome as the model itself expects it."""
        case_N = (self._cumulative < rng.random(len(self._cumulative))[:, None]).sum(axis=1)
        right_N = case_N == self._cumulative.shape[1]
        return right_N, np.where(right_N, self.top_group_N, case_N)

    def scores(self, right_N: np.ndarray, target_group_N: np.ndarray) -> dict[str, list[float | None]]:
        """Each score by group; those of all positions are lists of one."""
        forecast, order = self._forecast, self._by_confidence
        gap_N = forecast.confidence_N - right_N
        by_group: dict[str, list[float | None]] = {
            "top_error_all": [_binned_error(gap_N[order])],
            "overconfidence_all": [_mean(gap_N)],
            **{name: [] for name in ("log2_ratio", "group_error", "top_error", "overconfidence")},
        }
        for g in range(forecast.mass_NG.shape[1]):
            in_group_N, mass_N = target_group_N == g, forecast.mass_NG[:, g]
            share, mass = float(in_group_N.mean()), float(mass_N.mean())
            by_group["log2_ratio"].append(math.log2(mass / share) if mass > 0 and share > 0 else None)
            by_group["group_error"].append(_binned_error((mass_N - in_group_N)[self._by_mass_NG[:, g]]))
            by_group["top_error"].append(_binned_error(gap_N[order[in_group_N[order]]]))
            by_group["overconfidence"].append(_mean(gap_N[self.top_group_N == g]))
        return by_group


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
