"""Who wrote what each role reads: the account of a scheme's arrays, carried to its two tables.

Between two snapshots every array changes by what is left of its initial values and by what each role wrote: of the
array that both write the account tells these apart, and one of a single role was changed by that role alone (what
decay took from it included). A table is a function of the arrays. Its derivative at the midpoint of the two
snapshots, applied to each of the three changes, is what each made of the table; summed over the snapshots they are
the whole table, but for a remainder. It is rounding alone for functions that are linear or bilinear in the arrays, as

    E'M' - EM = (E' - E) (M + M') / 2 + (E + E') / 2 (M' - M)

though how the change of a product is shared out depends on how densely snapshots lie. For others (a rotation, a gate)
it falls with the square of their distance.

Axes: V rows, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from tiedjax import tying
from tiedjax.analysis.basis.strata import strata
from tiedjax.config import REGULARISERS, role_of

PARTS = ("initial", "input", "output")


@dataclass(frozen=True)
class Reading:
    """Shares of a table's squared norm: what is left of its initial values, and what each role wrote.

    They sum to 1 less what the remainder has of it; `remainder` is its norm over the table's. `regularisers` is what
    each regulariser wrote into the array that both roles write, by its name.
    """

    initial: float
    input: float
    output: float
    remainder: float
    regularisers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TableReading:
    """One role's table: all rows, then by stratum of token frequency."""

    whole: Reading
    strata: dict[str, Reading]


def parts_of(account: Any) -> dict[str, Any]:
    """The parts that an account has, or what each has in shares or in a span of one, by their names."""
    named = {part: getattr(account, part) for part in PARTS if hasattr(account, part)}
    return named | {name: account.regularisers[name] for name in REGULARISERS if name in account.regularisers}


def grouped(by_part: Mapping[str, Any]) -> dict[str, Any]:
    """Shares by the names of their parts, as the fields that they have: those of regularisers have one together."""
    own = {name: share for name, share in by_part.items() if name not in REGULARISERS}
    return own | {"regularisers": {name: share for name, share in by_part.items() if name in REGULARISERS}}


def readings(run: Any, step: int) -> dict[str, TableReading]:
    """By the role that reads it, who wrote each table up to a snapshot; {} where the account has not all rows.

    UserError where the run has no account.
    """
    last = run.account(step)
    if len(last.rows) < run.config.model.table_rows:
        return {}
    steps = [at for at in run.snapshot_steps if at <= step]
    parts = carried(run, steps)
    final = run.tables(step)
    groups = strata(run.token_counts)
    return {
        role: TableReading(
            _reading(parts, role, getattr(final, role), slice(None)),
            {
                name: _reading(parts, role, getattr(final, role), kept_V)
                for name, kept_V in groups.items()
                if kept_V.any()
            },
        )
        for role in tying.Tables._fields
    }


def carried(run: Any, steps: list[int]) -> dict[str, tying.Tables]:
    """By writer, what it made of both tables up to the last of these snapshots: float64 [V, D] each."""
    scheme = run.scheme(steps[-1])
    (shared,) = scheme.followed
    arrays = {at: run.arrays(at) for at in steps}
    accounts = {at: run.account(at) for at in steps}
    fixed = {name: array for name, array in arrays[steps[0]].items() if name not in scheme.trained}
    tables_of = lambda trained: scheme.tables({**fixed, **trained})
    first = tables_of({name: arrays[steps[0]][name] for name in scheme.trained})
    wide = lambda tables: tying.Tables(*(np.asarray(table, np.float64) for table in tables))
    written = {at: parts_of(account) for at, account in accounts.items()}
    writers = written[steps[-1]]
    nothing = tying.Tables(*(np.zeros_like(table, np.float64) for table in first))
    sums = dict.fromkeys(writers, nothing) | {"initial": wide(first)}
    for start, end in itertools.pairwise(steps):
        before, after = ({name: arrays[at][name] for name in scheme.trained} for at in (start, end))
        midpoint = {name: (before[name] + after[name]) / 2 for name in before}
        for writer in writers:
            of_shared = written[end][writer] - written[start][writer]
            change = {
                name: of_shared if name == shared else (after[name] - before[name]) * (role_of(name) == writer)
                for name in before
            }
            _, made = jax.jvp(tables_of, (midpoint,), (change,))
            sums[writer] = tying.Tables(*(a + b for a, b in zip(sums[writer], wide(made), strict=True)))
    return sums


def _reading(parts: dict[str, tying.Tables], role: str, table_VD: np.ndarray, kept: Any) -> Reading:
    rows_MD = np.asarray(table_VD[kept], np.float64)
    size = np.sum(np.square(rows_MD))
    by_writer = {writer: getattr(tables, role)[kept] for writer, tables in parts.items()}
    shares = {writer: float(np.sum(part_MD * rows_MD) / size) for writer, part_MD in by_writer.items()}
    rest_MD = rows_MD - sum(by_writer.values())
    return Reading(**grouped(shares), remainder=float(np.sqrt(np.sum(np.square(rest_MD)) / size)))
