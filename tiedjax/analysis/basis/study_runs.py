"""The runs of a study as the sections ask for them: every last table, and every pair that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tiedjax.analysis.basis.run_data import data_of_several
from tiedjax.analysis.basis.tables import seen_rows
from tiedjax.config import StudyConfig
from tiedjax.data.prepared import Prepared

Runs = Mapping[tuple[str, int], Any]


@dataclass(frozen=True)
class LastTable:
    """The table of one run at its last snapshot; `role` is input, output or shared. `counts` is int64 [2, V]."""

    arm: str
    seed: int
    role: str
    values: np.ndarray
    counts: np.ndarray
    run: Any

    @property
    def key(self) -> dict[str, Any]:
        """What names it in a record."""
        return {"arm": self.arm, "seed": self.seed, "role": self.role}

    @property
    def seen(self) -> np.ndarray:
        """Boolean [V]: tokens that training showed."""
        return seen_rows(self.counts)


@dataclass(frozen=True)
class TwinTables:
    """A table of the reference arm and a table of its twin: the same seed. `kept_V`: seen by both, boolean [V]."""

    reference: LastTable
    subject: LastTable

    @property
    def key(self) -> dict[str, Any]:
        """What names the pair in a record."""
        subject = {"arm": self.subject.arm, "seed": self.subject.seed, "subject_role": self.subject.role}
        return subject | {"reference_role": self.reference.role}

    @property
    def kept_V(self) -> np.ndarray:
        """Boolean [V]: tokens that both runs saw in training."""
        both: np.ndarray = self.reference.seen & self.subject.seen
        return both


class StudyRuns:
    """A study's runs by (arm, seed). `text` gives a run's data, or raises UserError; None: `data_of_several`."""

    def __init__(self, study: StudyConfig, runs: Runs, text: Callable[[Any], Prepared] | None = None):
        self.study, self.runs, self.text = study, runs, text or data_of_several()

    @cached_property
    def last(self) -> dict[tuple[str, int], list[LastTable]]:
        """The distinct tables of every run at its last snapshot, input before output."""
        from tiedjax.tying import distinct  # here: it brings JAX, which drawing does not need

        return {
            (arm, seed): [
                LastTable(arm, seed, role, values, run.token_counts, run)
                for role, values in distinct(run.tables()).items()
            ]
            for (arm, seed), run in self.runs.items()
        }

    @property
    def tables(self) -> Iterator[LastTable]:
        """Every distinct last table."""
        for tables in self.last.values():
            yield from tables

    @property
    def twins(self) -> Iterator[TwinTables]:
        """Every run's last tables beside those of the reference run of the same seed; the reference's own two."""
        for (arm, seed), tables in self.last.items():
            reference = self.last.get((self.study.reference, seed))
            if reference is None:
                continue
            if arm == self.study.reference:
                yield TwinTables(*reference)
            else:
                yield from (TwinTables(target, subject) for subject in tables for target in reference)
