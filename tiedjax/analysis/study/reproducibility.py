"""How much two tables share of what training makes of them every time.

Two runs of one arm with different seeds do not reach the same table, and what a table does not repeat, no other table
can share. Spearman's correction for attenuation (1904, Am. J. Psychol. 15) divides that limit out,

    share(A, B) = mean s(A, B') / sqrt(mean s(A, A') mean s(B, B'))

where every s is between runs of different seeds. It is exact where s is bilinear in what a run is of its arm's mean and
what is its own, as no nearness after a best rotation is. Here s is the inner product of two Gram matrices of rows,
K = XX', in which three things are 0: the diagonal (where a run's own noise does not cancel), and the sums of rows and
of columns in the blocks that the parts of token frequency cut it into (what tokens of like frequency have in common).
With one part it is the unbiased estimator of the Hilbert-Schmidt independence criterion (Song et al. 2012, JMLR 13;
U-centring: Szekely and Rizzo 2014, Ann. Statist. 42). Each run's matrix is brought to norm 1 first, so that s is the
unbiased form of linear centred kernel alignment. Neither rotations, nor scales, nor a row added to all rows of a part
change it.

So a share is the correlation of the two arms' mean Gram matrices, away from the diagonal and with token frequency
controlled. `benchmarks/correction.py` measures bias and coverage.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis.blocked import few_threads, matmul
from tiedjax.analysis.basis.statistics import CONFIDENCE, Interval, interval
from tiedjax.analysis.basis.strata import frequency_parts
from tiedjax.analysis.basis.tables import ROLES, seen_rows

PART_ROWS = 50  # on average; tenths leave so much of frequency in the squares of the Gram matrices that shares move
LEAST_ROWS = 4  # of a part: with fewer, nothing is left of its own block
LEAST_SEEDS = 3  # for an interval, which every share needs to be shown
_ROUNDING = 1e-12

Run = tuple[str, int]  # (arm, seed)
Pairs = Mapping[tuple[int, int], float]  # (seed of the first, seed of the second): s


class Geometry:
    """The Gram matrix of a table's rows, as above, by what its inner products need: centred rows and their lengths.

    `part_V` is int [V], as `frequency_parts` gives it: rows of part 0 and of parts with few rows are left out. Rows lie
    part by part.
    """

    def __init__(self, table_VD: np.ndarray, part_V: np.ndarray):
        kept = np.flatnonzero((part_V > 0) & (np.bincount(part_V)[part_V] >= LEAST_ROWS))
        kept = kept[np.argsort(part_V[kept], kind="stable")]
        _, self.starts, self.sizes = np.unique(part_V[kept], return_index=True, return_counts=True)
        self.rows_ND = table_VD[kept]
        before = np.einsum("nd,nd->", self.rows_ND, self.rows_ND, dtype=np.float64)
        for start, size in zip(self.starts, self.sizes, strict=True):
            part = self.rows_ND[start : start + size]
            part -= part.mean(axis=0, dtype=np.float64)
        self.squares = np.einsum("nd,nd->n", self.rows_ND, self.rows_ND, dtype=np.float64)
        self._constant = self.squares.sum() <= _ROUNDING * before

    @functools.cached_property
    def norm(self) -> float:
        """The matrix's; 0 where the rows of every part are equal."""
        return 0.0 if self._constant else math.sqrt(max(0.0, inner(self, self)))


def inner(x: Geometry, y: Geometry) -> float:
    """The inner product of two such matrices over the same rows, from the [D, D] product X'Y and the rows' lengths.

    |X'Y|^2 is that of the centred matrices; the two other terms clear the diagonal of each part's own block.
    """
    cross_DD = matmul(x.rows_ND.T, y.rows_ND).astype(np.float64)
    total = lambda values: np.add.reduceat(values, x.starts)
    diagonal = x.sizes / (x.sizes - 2) * total(x.squares * y.squares)
    restored = total(x.squares) * total(y.squares) / ((x.sizes - 1) * (x.sizes - 2))
    return float(np.square(cross_DD).sum() - (diagonal - restored).sum())


def similarity(x: Geometry, y: Geometry) -> float:
    """s: the inner product of the matrices at norm 1; 0 where one has nothing but equal rows."""
    norms = x.norm * y.norm
    return inner(x, y) / norms if norms else 0.0


@dataclass(frozen=True)
class ReproducibleShare:
    """Of one table with the reference arm's two: shares, their difference, and what they are divided by.

    Attributes:
      divides_by: mean s between runs of different seeds of the table itself (`subject`) and of the reference's tables.
      reason: why a share is missing; None where none is.
      rows: the tokens that count, in `parts` of like frequency.

    A share has no value unless both s that it divides by are measurably above 0: their intervals lie above it.
    """

    vs_output: Interval
    vs_input: Interval
    margin: Interval
    divides_by: dict[str, Interval]
    reason: str | None
    rows: int
    parts: int


def frequency_groups(counts: Sequence[np.ndarray]) -> np.ndarray:
    """int [V]: parts of about PART_ROWS tokens of like total count from 1 (rarest); 0 for tokens that a run never saw.

    `counts` are int [2, V], of every run.
    """
    seen_V = np.logical_and.reduce([seen_rows(count) for count in counts])
    total_V = np.where(seen_V, sum(count.sum(axis=0) for count in counts), 0)
    return frequency_parts(total_V, max(1, int(seen_V.sum()) // PART_ROWS))


def reproducible_shares(
    tables: Mapping[Run, Mapping[str, np.ndarray]], counts: Mapping[Run, np.ndarray], reference: str
) -> dict[str, dict[str, ReproducibleShare]]:
    """Arm, role: the shares of every table of the arms other than `reference` with the reference's two tables.

    `tables` are [V, D] by role, `counts` int [2, V], both by run. Empty where the reference has one table.
    """
    part_V = frequency_groups(list(counts.values()))
    rows, parts = int((part_V > 0).sum()), int(part_V.max(initial=0))
    with few_threads(max(table.size for roles in tables.values() for table in roles.values())):
        runs: dict[tuple[str, str], dict[int, Geometry]] = {}  # (arm, role): seed: its table's
        for (arm, seed), roles in tables.items():
            for role, table_VD in roles.items():
                runs.setdefault((arm, role), {})[seed] = Geometry(table_VD, part_V)
        targets = {role: runs[reference, role] for role in ROLES if (reference, role) in runs}
        if len(targets) < len(ROLES):
            return {}
        repeated = {role: across_seeds(target, target) for role, target in targets.items()}
        shares: dict[str, dict[str, ReproducibleShare]] = {}
        for (arm, role), subject in runs.items():
            if arm == reference:
                continue
            cross = {target: across_seeds(subject, targets[target]) for target in ROLES}
            seeds = sorted(subject.keys() & targets["output"].keys())
            fields = share_of(cross, {"subject": across_seeds(subject, subject), **repeated}, seeds)
            shares.setdefault(arm, {})[role] = ReproducibleShare(**fields, rows=rows, parts=parts)
    return shares


def across_seeds(first: Mapping[int, Geometry], second: Mapping[int, Geometry]) -> dict[tuple[int, int], float]:
    """(seed of the first, another seed of the second): s."""
    same = first is second  # then s of (i, j) is that of (j, i)
    known: dict[tuple[int, int], float] = {}
    for i, j in itertools.product(first, second):
        if i != j:
            known[i, j] = known[j, i] if same and (j, i) in known else similarity(first[i], second[j])
    return known


def share_of(cross: Mapping[str, Pairs], repeated: Mapping[str, Pairs], seeds: Sequence[int]) -> dict[str, Any]:
    """The fields of a ReproducibleShare that follow from s between runs of these seeds.

    `cross`: s of the subject with the reference's tables, by role. `repeated`: s of each table with itself, by
    `subject` and by role.
    """
    divides_by = {name: jackknife(functools.partial(mean_of, pairs), seeds) for name, pairs in repeated.items()}
    unrepeated = [name for name, mean in divides_by.items() if mean.low is None or mean.low <= 0]
    measured = [role for role in ROLES if not {"subject", role} & set(unrepeated)]
    share = {role: functools.partial(correlation, cross[role], repeated["subject"], repeated[role]) for role in ROLES}

    def margin(kept: Sequence[int]) -> float | None:
        output, input_ = share["output"](kept), share["input"](kept)
        return None if output is None or input_ is None else output - input_

    missing = Interval(None, None, None, len(seeds), CONFIDENCE)
    spans = {role: jackknife(share[role], seeds) if role in measured else missing for role in ROLES}
    return {
        "vs_output": spans["output"],
        "vs_input": spans["input"],
        "margin": jackknife(margin, seeds) if len(measured) == len(ROLES) else missing,
        "divides_by": divides_by,
        "reason": _reason(unrepeated, len(seeds)),
    }


def correlation(cross: Pairs, first: Pairs, second: Pairs, seeds: Sequence[int]) -> float | None:
    """The share over these seeds, as above; None where s of either table with itself is not above 0."""
    between, limit, other_limit = (mean_of(pairs, seeds) for pairs in (cross, first, second))
    if between is None or limit is None or other_limit is None or limit <= 0 or other_limit <= 0:
        return None
    return between / math.sqrt(limit * other_limit)


def jackknife(statistic: Callable[[Sequence[int]], float | None], seeds: Sequence[int]) -> Interval:
    """A statistic of all seeds with the Student-t interval of its jackknife pseudo-values, for three seeds or more.

    Pairs of seeds share runs and are no independent sample; leaving out one seed at a time respects that (Tukey 1958).
    """
    whole = statistic(seeds)
    n = len(seeds)
    if whole is None or n < LEAST_SEEDS:
        return Interval(whole, None, None, n, CONFIDENCE)
    without = [statistic([s for s in seeds if s != left_out]) for left_out in seeds]
    if any(value is None for value in without):
        return Interval(whole, None, None, n, CONFIDENCE)
    spread = interval([n * whole - (n - 1) * value for value in without if value is not None]).half_width
    assert spread is not None
    return Interval(whole, whole - spread, whole + spread, n, CONFIDENCE)


def mean_of(pairs: Pairs, seeds: Sequence[int]) -> float | None:
    """The mean over the pairs of two of these seeds; None without one."""
    known = [pairs[pair] for pair in itertools.permutations(seeds, 2) if pair in pairs]
    return sum(known) / len(known) if known else None


def _reason(unrepeated: Sequence[str], seeds: int) -> str | None:
    if seeds < LEAST_SEEDS:
        return f"{seeds} seeds cannot show what repeats; {LEAST_SEEDS} can"
    return f"not measurably alike between seeds: {', '.join(unrepeated)}" if unrepeated else None
