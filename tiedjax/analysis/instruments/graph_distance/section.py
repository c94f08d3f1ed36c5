"""Spectral distance: how far apart the tables' neighbour graphs lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.records import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.study_runs import StudyRuns, TwinTables
from tiedjax.analysis.instruments.graph_distance.spectral import EIGENPAIRS, K, measure
from tiedjax.analysis.instruments.neighbours.search import Searches
from tiedjax.analysis.instruments.neighbours.section import grouped
from tiedjax.errors import UserError

VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """The distance of every pair of twins over the rows both saw."""
    searches = Searches()
    pairs = [pair.key | _measured(searches, pair) for pair in study.twins]
    return {"k": K, "eigenpairs": EIGENPAIRS, "pairs": pairs}


def _measured(searches: Searches, pair: TwinTables) -> dict[str, Any]:
    try:
        spectral = measure(pair.subject.values, pair.reference.values, rows=pair.rows, searches=searches)
    except UserError as error:
        return {"not_measured": str(error)}
    return dict(to_plain(spectral))


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def distances(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of tables: the distance, what it is by chance, and their ratio."""
    measured = [p for p in results["spectral"]["pairs"] if "not_measured" not in p]
    return [
        {
            "arm": arm,
            "name": name,
            "distance": numbers.number(interval(p["distance"]["score"] for p in pairs).mean),
            "floor": numbers.number(interval(p["distance"]["floor"] for p in pairs).mean),
            "relative": numbers.spread(vars(interval(p["relative"] for p in pairs))),
        }
        for arm, name, pairs in grouped(measured, results["headline"]["reference"])
    ]


def not_measured(results: Mapping[str, Any]) -> list[str]:
    """Why pairs were not measured, each reason once."""
    return list(dict.fromkeys(p["not_measured"] for p in results["spectral"]["pairs"] if "not_measured" in p))
