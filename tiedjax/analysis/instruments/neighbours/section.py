"""Neighbours: whether tables place the same tokens near each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, plain_json, published
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.strata import THIRDS
from tiedjax.analysis.basis.study_runs import StudyRuns, TwinTables
from tiedjax.analysis.instruments.neighbours.overlap import Hubness, K, NeighbourOverlap, measure
from tiedjax.analysis.instruments.neighbours.search import Searches
from tiedjax.errors import UserError
from tiedjax.tying import SHARED

VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """The overlap of every pair of twins over the rows both saw, and in the paper's form over all rows."""
    searches = Searches()
    return {"k": K, "pairs": [pair.key | _record(searches, pair) for pair in study.twins]}


def _record(searches: Searches, pair: TwinTables) -> dict[str, Any]:
    subject, reference = pair.subject, pair.reference
    try:
        knn = measure(subject.values, reference.values, kept_V=pair.kept_V, counts=subject.counts, searches=searches)
    except UserError as error:
        return {"not_measured": str(error)}
    return dict(to_plain(knn))


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure."""
    n = len(_by_pair(results))
    if n:
        yield drawing.Plot("knn", [_draw], (5.0, 0.9 + 0.42 * n))


def overlaps(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of tables: overlap, chance, corrected in all and per stratum; the paper's form here and published."""
    rows, reference = [], results["headline"]["reference"]
    for (arm, role, target), pairs in _by_pair(results).items():
        row = {
            "arm": arm,
            "name": drawing.pair_name(arm, role, target, reference),
            "score": drawing.mean(pair.overlap.score for pair in pairs),
            "floor": drawing.mean(pair.overlap.floor for pair in pairs),
            "corrected": drawing.spread(pair.overlap.corrected for pair in pairs),
            "all_rows": drawing.mean(pair.paper.score for pair in pairs),
            "published": numbers.number(_published(results, arm, role, target)),
        }
        for third in THIRDS:
            row[third] = drawing.mean((pair.strata[third].corrected for pair in pairs if third in pair.strata), 2)
        rows.append(row)
    return rows


def hubs(results: drawing.Results) -> list[dict[str, str]]:
    """Per table: skewness of how often a row is a neighbour, and the share of rows that are nobody's."""
    tables: dict[tuple[str, str], dict[int, Hubness]] = {}
    reference = results["headline"]["reference"]
    for pair in plain_json.measured(results["knn"]["pairs"], NeighbourOverlap):
        subject, target = pair.value.hubness
        tables.setdefault((pair.arm, pair.role), {})[pair.seed] = subject
        tables.setdefault((reference, pair.reference_role), {})[pair.seed] = target
    return [
        {
            "arm": arm,
            "name": drawing.table_name(arm, role),
            "skewness": drawing.spread((h.skewness for h in by_seed.values()), 2),
            "orphans": numbers.percent(vars(interval(h.orphans for h in by_seed.values()))),
        }
        for (arm, role), by_seed in tables.items()
    ]


def not_measured(results: drawing.Results) -> list[str]:
    """Why pairs were not measured, each reason once."""
    return plain_json.not_measured(results["knn"]["pairs"])


def _by_pair(results: drawing.Results) -> dict[tuple[str, str, str], list[NeighbourOverlap]]:
    return drawing.by_pair(plain_json.measured(results["knn"]["pairs"], NeighbourOverlap))


def _published(results: drawing.Results, arm: str, role: str, target: str) -> float | None:
    """The paper's value of a pair of the same roles: the baseline's shared table, or the reference's own two."""
    head = results["headline"]
    if arm == head["reference"]:
        return published.KNN_OWN
    if arm == head["arm"] and role == SHARED:
        return published.KNN_SHARED[target]
    return None


def _draw(ax: drawing.Axes, results: drawing.Results) -> None:
    colours, reference = drawing.colours(results), results["headline"]["reference"]
    by_pair = _by_pair(results)
    for y, ((arm, _, target), pairs) in enumerate(by_pair.items()):
        corrected = [pair.overlap.corrected for pair in pairs]
        span, colour = interval(corrected), colours[arm]
        seeds = [value for value in corrected if value is not None]
        if span.low is not None:
            ax.plot([span.low, span.high], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if span.mean is not None:
            face = colour if target == "output" else "none"
            ax.plot(span.mean, y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            ax.annotate(numbers.number(span.mean, 2), (span.mean, y), (0, 7), textcoords="offset points", ha="center")
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES)
    ax.set_yticks(range(len(by_pair)), [drawing.pair_name(*pair, reference) for pair in by_pair])
    ax.set_ylim(len(by_pair) - 0.5, -0.8)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.03), max(high, 0.3))
    ax.set_xlabel("common neighbours above chance")
