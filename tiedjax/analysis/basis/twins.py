"""Twins: runs of one seed, of an arm and of the reference arm, and how they differ over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tiedjax.analysis.basis import plain_json
from tiedjax.analysis.basis.statistics import Interval, paired

T = TypeVar("T")


@dataclass(frozen=True)
class Twins(Generic[T]):
    """What was measured of an arm's runs and the reference arm's, by seed; both have the same seeds, at least one."""

    arm: str
    subject: dict[int, T]
    reference: dict[int, T]

    def difference(self, quantity: Callable[[T], float | None]) -> Interval:
        """The interval over seeds of the subject's quantity less the reference's; a pair without one does not count."""
        subject, reference = (
            {seed: quantity(value) for seed, value in side.items()} for side in (self.subject, self.reference)
        )
        return paired(subject, reference)


def twins(reference_arm: str, runs: Iterable[Mapping[str, Any]], kind: type[T]) -> Iterator[Twins[T]]:
    """Those of every other arm, of a section's records of runs, each with its value as the dataclass `kind`.

    Seeds for which one of the two was not measured are left out, and so are arms that have no other.
    """
    by_arm: dict[str, dict[int, T]] = {}
    for run in plain_json.measured(runs, kind):
        by_arm.setdefault(run.arm, {})[run.seed] = run.value
    reference = by_arm.pop(reference_arm, {})
    for arm, subject in by_arm.items():
        seeds = [seed for seed in subject if seed in reference]
        if seeds:
            yield Twins(arm, {seed: subject[seed] for seed in seeds}, {seed: reference[seed] for seed in seeds})
