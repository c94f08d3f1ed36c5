"""How alike two tables would be if training made each of them the same every time.

Two runs of one arm with different seeds do not reach the same table. What either does not repeat, no other table can
share, so that sqrt(nearness(A, A') nearness(B, B')) limits how near A comes to B. Spearman's correction for attenuation
(1904, Am. J. Psychol. 15) divides that limit out:

    nearness(A, B) / sqrt(nearness(A, A') nearness(B, B'))

where A' and B' are repetitions with other seeds and every nearness is between runs that share no seed. It is exact for
correlations of independent noise; for alignments it is a yardstick.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from tiedjax.analysis.statistics import CONFIDENCE, Interval, interval

Pairs = Mapping[tuple[int, int], float | None]  # (seed of the first, seed of the second): nearness


def disattenuated(cross: Pairs, first: Pairs, second: Pairs, seeds: Sequence[int]) -> float | None:
    """The corrected nearness over these seeds; None where a table is not alike to its own repetition at all."""
    between, repeated, target = (_mean(pairs, seeds) for pairs in (cross, first, second))
    if between is None or repeated is None or target is None or repeated <= 0 or target <= 0:
        return None
    return between / math.sqrt(repeated * target)


def jackknife(statistic: Callable[[Sequence[int]], float | None], seeds: Sequence[int]) -> Interval:
    """A statistic of all seeds with the Student-t interval of its jackknife pseudo-values, for three seeds or more.

    Pairs of seeds share runs and are no independent sample; leaving out one seed at a time respects that (Tukey 1958).
    """
    whole = statistic(seeds)
    n = len(seeds)
    if whole is None or n < 3:
        return Interval(whole, None, None, n, CONFIDENCE)
    without = [statistic([s for s in seeds if s != left_out]) for left_out in seeds]
    if any(value is None for value in without):
        return Interval(whole, None, None, n, CONFIDENCE)
    spread = interval([n * whole - (n - 1) * value for value in without if value is not None]).half_width
    assert spread is not None
    return Interval(whole, whole - spread, whole + spread, n, CONFIDENCE)


def _mean(pairs: Pairs, seeds: Sequence[int]) -> float | None:
    known = [v for pair in itertools.permutations(seeds, 2) if (v := pairs.get(pair)) is not None]
    return sum(known) / len(known) if known else None
