"""Twins are runs of one seed: who is paired with whom, and the interval of what differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats

from tiedjax.analysis.basis.twins import Twins, twins


@dataclass(frozen=True)
class Measured:
    """Of one run."""

    loss: float | None


def record(arm: str, seed: int, loss: float | None) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "loss": loss}


RUNS = [
    record("tied", 7, 4.0),
    record("untied", 3, 1.0),
    record("tied", 3, 3.5),
    record("wide", 9, 8.0),
    {"arm": "untied", "seed": 5, "not_measured": "no text"},
    record("tied", 5, 100.0),
    record("untied", 7, 1.25),
    record("untied", 8, 2.0),
    record("tied", 8, None),
    record("tied", 4, 50.0),
    record("untied", 6, 3.0),
    record("tied", 6, 4.0),
]


def test_twins_have_the_seeds_that_both_arms_were_measured_from() -> None:
    """An arm without a twin has none, and the reference is not its own."""
    (pair,) = twins("untied", RUNS, Measured)
    assert pair.arm == "tied"
    assert {seed: run.loss for seed, run in pair.subject.items()} == {7: 4.0, 3: 3.5, 8: None, 6: 4.0}
    assert {seed: run.loss for seed, run in pair.reference.items()} == {7: 1.25, 3: 1.0, 8: 2.0, 6: 3.0}
    assert list(twins("none", RUNS, Measured)) == []
    assert [pair.arm for pair in twins("tied", RUNS, Measured)] == ["untied"]


def test_a_difference_is_that_of_each_pair_over_seeds() -> None:
    """Not the difference of the arms' means, which has runs without a twin in it."""
    (pair,) = twins("untied", RUNS, Measured)
    span = pair.difference(lambda run: run.loss)
    differences = np.array([2.75, 2.5, 1.0])
    low, high = scipy.stats.t.interval(0.95, 2, differences.mean(), scipy.stats.sem(differences))
    assert (span.mean, span.low, span.high, span.n) == (
        pytest.approx(differences.mean(), abs=1e-12),
        pytest.approx(low, abs=1e-9),
        pytest.approx(high, abs=1e-9),
        3,
    )
    swapped = Twins("untied", pair.reference, pair.subject).difference(lambda run: run.loss)
    assert swapped.mean == -differences.mean()
