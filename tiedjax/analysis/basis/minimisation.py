"""Minimising a smooth function of many numbers: L-BFGS (Liu and Nocedal 1989) under a preconditioner.

Axes: E of a symmetric matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TOLERANCE = 2e-3
SPAN = 5  # iterations
MOST_ITERATIONS = 500
_LEAST = 1e-3  # nats; a smaller loss counts as this much, for float32 does not resolve thousandths of it
_PAIRS = 10  # steps that L-BFGS remembers
_DAMPING = 1e-3  # of the mean eigenvalue, added to all by `damped_inverse`

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended; `value` in nats."""

    point: np.ndarray
    value: float
    iterations: int
    evaluations: int
    converged: bool


def minimise(
    objective: Objective,
    start: np.ndarray,
    precondition: Callable[[np.ndarray], np.ndarray],
    *,
    tolerance: float = TOLERANCE,
    span: int = SPAN,
    most: int = MOST_ITERATIONS,
    settled: Callable[[], bool] = lambda: True,
) -> Minimum:
    """L-BFGS with an initial inverse Hessian (scaled to the last step), halving until the loss falls enough (Armijo).

    Armijo's rule has no condition on the slope: a step along which curvature is not positive is not remembered, which
    is all that L-BFGS needs to stay downhill. Where no step lowers the value, the memory may be to blame: it is dropped
    once, and the preconditioned slope is tried.

    Converged when the value fell by less than `tolerance` of itself over `span` iterations, or when no step lowers it
    and none promises more than that; but not before `settled`, which is asked about the point evaluated last.
    """
    memory: list[tuple[np.ndarray, np.ndarray]] = []
    point, (value, slope) = start, objective(start)
    values, evaluations, converged = [value], 1, False
    while len(values) <= most:
        direction = -_inverse_hessian(slope, memory, precondition)
        promise, length = float(slope @ direction), 1.0
        while True:
            trial = point + length * direction
            trial_value, trial_slope = objective(trial)
            evaluations += 1
            falls = trial_value <= value + 1e-4 * length * promise
            if falls or length < 1e-4:
                break
            length /= 2
        threshold = tolerance * max(value, _LEAST)
        if not falls:
            converged = -promise / 2 < threshold and settled()
            if converged or not memory:
                break
            memory.clear()  # once more along the preconditioned slope
            continue
        if (trial - point) @ (trial_slope - slope) > 0:
            memory = [*memory[1 - _PAIRS :], (trial - point, trial_slope - slope)]
        point, value, slope = trial, trial_value, trial_slope
        values.append(value)
        if len(values) > span and values[-1 - span] - value < threshold and settled():
            converged = True
            break
    return Minimum(point, value, len(values) - 1, evaluations, converged)


def _inverse_hessian(
    slope: np.ndarray, memory: list[tuple[np.ndarray, np.ndarray]], precondition: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The two-loop recursion."""
    q, weights = slope.copy(), []
    for step, change in reversed(memory):
        weights.append((step @ q) / (step @ change))
        q -= weights[-1] * change
    q = precondition(q)
    if memory:
        step, change = memory[-1]
        q *= (step @ change) / (change @ precondition(change))
    for (step, change), weight in zip(memory, reversed(weights), strict=True):
        q += step * (weight - (change @ q) / (step @ change))
    return q


def damped_inverse(symmetric_EE: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric matrix that may be singular, its diagonal raised by a little of its mean."""
    n = len(symmetric_EE)
    damping = _DAMPING * np.trace(symmetric_EE) / n + np.finfo(np.float64).tiny
    return np.linalg.inv(symmetric_EE + damping * np.eye(n))
