"""Neighbours: whether tables place the same tokens near each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, published
from tiedjax.analysis.basis.records import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.strata import THIRDS
from tiedjax.analysis.basis.study_runs import StudyRuns, TwinTables
from tiedjax.analysis.instruments.neighbours.knn import K, measure
from tiedjax.analysis.instruments.neighbours.search import Searches
from tiedjax.errors import UserError


def collect(study: StudyRuns) -> dict[str, Any]:
    """The overlap of every pair of twins over the rows both saw, and in the paper's form over all rows."""
    searches = Searches()
    return {"k": K, "pairs": [pair.key | _measured(searches, pair) for pair in study.twins]}


def _measured(searches: Searches, pair: TwinTables) -> dict[str, Any]:
    mine, reference = pair.subject, pair.reference
    try:
        knn = measure(mine.values, reference.values, rows=pair.rows, counts=mine.counts, searches=searches)
    except UserError as error:
        return {"not_measured": str(error)}
    plain = to_plain(knn)
    return {**plain.pop("overlap"), **plain}


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure."""
    n = len(list(_groups(results)))
    if n:
        yield drawing.Plot("knn", [_draw], (5.0, 0.9 + 0.42 * n))


def overlaps(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of tables: overlap, chance, corrected in all and per stratum; the paper's form here and published."""
    rows = []
    for arm, name, pairs in _groups(results):
        mean = lambda of: numbers.number(of.mean)
        row = {
            "arm": arm,
            "name": name,
            "score": mean(interval(p["score"] for p in pairs)),
            "floor": mean(interval(p["floor"] for p in pairs)),
            "corrected": _spread(interval(p["corrected"] for p in pairs)),
            "all_rows": mean(interval(p["paper"]["score"] for p in pairs)),
            "published": numbers.number(_published(results, pairs[0])),
        }
        for third in THIRDS:
            found = [p["strata"][third]["corrected"] for p in pairs if third in p["strata"]]
            row[third] = numbers.number(interval(found).mean, 2)
        rows.append(row)
    return rows


def hubs(results: drawing.Results) -> list[dict[str, str]]:
    """Per table: skewness of how often a row is a neighbour, and the share of rows that are nobody's."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    reference = results["headline"]["reference"]
    for pair in _pairs(results):
        own, other = pair["hubness"]
        found.setdefault((pair["arm"], pair["subject_role"]), {})[pair["seed"]] = own
        found.setdefault((reference, pair["reference_role"]), {})[pair["seed"]] = other
    return [
        {
            "arm": arm,
            "name": drawing.table_name(arm, role),
            "skewness": _spread(interval(h["skewness"] for h in by_seed.values()), 2),
            "orphans": numbers.percent(vars(interval(h["orphans"] for h in by_seed.values()))),
        }
        for (arm, role), by_seed in found.items()
    ]


def not_measured(results: drawing.Results) -> list[str]:
    """Why pairs were not measured, each reason once."""
    return list(dict.fromkeys(p["not_measured"] for p in results["knn"]["pairs"] if "not_measured" in p))


def _pairs(results: drawing.Results) -> list[Mapping[str, Any]]:
    return [p for p in results["knn"]["pairs"] if "not_measured" not in p]


def _groups(results: drawing.Results) -> Iterator[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """(arm, name, pairs of all seeds) of every comparison, with the output table before the input table."""
    yield from grouped(_pairs(results), results["headline"]["reference"])


def grouped(
    pairs: Sequence[Mapping[str, Any]], reference: str
) -> Iterator[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """(arm, name, pairs of all seeds) of every comparison of twins, with the output table before the input table."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for arm, of_arm in drawing.by_arm(pairs):
        for pair in sorted(of_arm, key=lambda p: p["reference_role"], reverse=True):
            found.setdefault((arm, pair["subject_role"], pair["reference_role"]), []).append(pair)
    for (arm, subject, role), of in found.items():
        name = arm if subject == "shared" else f"{arm} {subject}"
        yield arm, f"{name} and its {role}" if arm == reference else f"{name} and {reference} {role}", of


def _published(results: drawing.Results, pair: Mapping[str, Any]) -> float | None:
    """The paper's value of a pair of the same roles: the baseline's shared table, or the reference's own two."""
    head = results["headline"]
    if pair["arm"] == head["reference"]:
        return published.KNN_OWN
    if pair["arm"] == head["arm"] and pair["subject_role"] == "shared":
        return published.KNN_SHARED[pair["reference_role"]]
    return None


def _spread(span: Interval, digits: int = 3) -> str:
    return numbers.spread(vars(span), digits)


def _draw(ax: drawing.Axes, results: drawing.Results) -> None:
    colours = drawing.colours(results)
    groups = list(_groups(results))
    for y, (arm, _, pairs) in enumerate(groups):
        span, colour = interval(p["corrected"] for p in pairs), colours[arm]
        seeds = [p["corrected"] for p in pairs if p["corrected"] is not None]
        if span.low is not None:
            ax.plot([span.low, span.high], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if span.mean is not None:
            face = colour if pairs[0]["reference_role"] == "output" else "none"
            ax.plot(span.mean, y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            ax.annotate(numbers.number(span.mean, 2), (span.mean, y), (0, 7), textcoords="offset points", ha="center")
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES)
    ax.set_yticks(range(len(groups)), [name for _, name, _ in groups])
    ax.set_ylim(len(groups) - 0.5, -0.8)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.03), max(high, 0.3))
    ax.set_xlabel("common neighbours above chance")
