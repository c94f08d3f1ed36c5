"""What the sections of the report share: what a figure is, colours, axes, and means over runs.

Panels draw on the axes that they are given; only `report.py` knows what draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.plain_json import Measurement
from tiedjax.analysis.basis.statistics import interval
from tiedjax.tying import SHARED

T = TypeVar("T")

# Okabe and Ito's palette, distinguishable to colour-blind readers; the page swaps in lighter ones on a dark ground.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
DARK = ("#62b5f0", "#ff9450", "#3fcaa2", "#eaa7c9", "#e5b94e", "#9ad5fa")
STEPS = ("#8450b0", "#c2407e", "#e0663c", "#d99a1c", "#8f9a3a")  # in order, legible on either ground
INK, MUTED, GRID = "#1b1e23", "#6a707a", "#d9dce1"
DASHES = (0, (4, 3))  # of chance levels
INPUT = (0, (5, 2))  # of input tables
PANEL = (4.5, 3.3)  # inches; one panel fits a phone

Results = Mapping[str, Any]
Axes = Any  # matplotlib.axes.Axes


@dataclass(frozen=True)
class Plot:
    """One figure: panels side by side in its files, one under the other on a phone."""

    name: str
    panels: Sequence[Callable[[Axes, Results], None]]
    size: tuple[float, float] = PANEL


def colours(results: Results) -> dict[str, str]:
    """The same colour for an arm everywhere: the baseline first, then the reference, then the others in order."""
    first = [results["headline"]["arm"], results["headline"]["reference"]]
    order = dict.fromkeys([*(a for a in first if a in results["arms"]), *results["arms"]])
    return {arm: LIGHT[i % len(LIGHT)] for i, arm in enumerate(order)}


def table_name(arm: str, role: str) -> str:
    """What an arm's table is called: the shared one has the arm's name."""
    return arm if role == SHARED else f"{arm} {role}"


def by_arm(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for arm in dict.fromkeys(r["arm"] for r in records):
        yield arm, [r for r in records if r["arm"] == arm]


def by_run(measurements: Sequence[Measurement[T]]) -> dict[str, list[T]]:
    """Arm: what was measured of its runs, one for each seed."""
    runs: dict[str, list[T]] = {}
    for measurement in measurements:
        runs.setdefault(measurement.arm, []).append(measurement.value)
    return runs


def by_table(measurements: Sequence[Measurement[T]]) -> dict[tuple[str, str], list[T]]:
    """(arm, role): what was measured of that table, over seeds; arms and roles in the order of the measurements."""
    tables: dict[tuple[str, str], list[T]] = {}
    for arm in dict.fromkeys(measurement.arm for measurement in measurements):
        for measurement in measurements:
            if measurement.arm == arm:
                tables.setdefault((arm, measurement.role), []).append(measurement.value)
    return tables


def by_pair(measurements: Sequence[Measurement[T]]) -> dict[tuple[str, str, str], list[T]]:
    """(arm, role, role of the reference's table): the same of pairs, the output table before the input table."""
    pairs: dict[tuple[str, str, str], list[T]] = {}
    for arm in dict.fromkeys(measurement.arm for measurement in measurements):
        arm_measurements = [measurement for measurement in measurements if measurement.arm == arm]
        for measurement in sorted(arm_measurements, key=lambda m: m.reference_role, reverse=True):
            pairs.setdefault((arm, measurement.role, measurement.reference_role), []).append(measurement.value)
    return pairs


def pair_name(arm: str, role: str, reference_role: str, reference: str) -> str:
    """What a pair of tables is called."""
    other = f"its {reference_role}" if arm == reference else f"{reference} {reference_role}"
    return f"{table_name(arm, role)} and {other}"


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """The mean over seeds ± half its interval, in words."""
    return numbers.spread(vars(interval(values)), digits)


def mean(values: Iterable[float | None], digits: int = 3) -> str:
    """The mean over seeds, in words."""
    return numbers.number(interval(values).mean, digits)


def mean_curve(curves: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], np.ndarray]:
    """Steps that all curves have, and the mean of `field` there."""
    steps = sorted(set.intersection(*(set(c["steps"]) for c in curves)))
    values = [[c[field][c["steps"].index(step)] for step in steps] for c in curves]
    return steps, np.mean([floats(v) for v in values], axis=0)


def floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)


def log_binned(steps: np.ndarray, values: np.ndarray, per_decade: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins even in log(step), so that the noise of single steps does not hide the course."""
    bin_of_step = np.floor(np.log10(np.maximum(steps, 1)) * per_decade).astype(int)
    bins = [np.isfinite(values) & (bin_of_step == i) for i in np.unique(bin_of_step)]
    bins = [b for b in bins if b.any()]
    return np.array([steps[b].mean() for b in bins]), np.array([values[b].mean() for b in bins])


def log_steps(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(plain_ticks)
    ax.set_xlabel("step")


def plain_ticks(value: float, _: float) -> str:
    return f"{value:,g}"


def step_axis(ax: Axes, last: int) -> None:
    """Steps from 0 on, logarithmic above 1."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    decades = [10**i for i in range(int(np.log10(max(last, 1))) + 1)]
    ticks = [0, *(d for d in decades if d < 0.6 * last), last]
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.15, last * 1.15)
    ax.set_xlabel("step")
