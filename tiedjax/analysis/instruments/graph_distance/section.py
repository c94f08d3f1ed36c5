"""Spectral distance: how far apart the tables' neighbour graphs lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.analysis.basis import drawing, plain_json
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns, TwinTables
from tiedjax.analysis.instruments.graph_distance.graph_distance import EIGENPAIRS, GraphDistance, K, measure
from tiedjax.analysis.instruments.neighbours.search import Searches
from tiedjax.errors import UserError

VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """The distance of every pair of twins over the rows both saw."""
    searches = Searches()
    pairs = [pair.key | _record(searches, pair) for pair in study.twins]
    return {"k": K, "eigenpairs": EIGENPAIRS, "pairs": pairs}


def _record(searches: Searches, pair: TwinTables) -> dict[str, Any]:
    try:
        spectral = measure(pair.subject.values, pair.reference.values, kept_V=pair.kept_V, searches=searches)
    except UserError as error:
        return {"not_measured": str(error)}
    return dict(to_plain(spectral))


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def distances(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of tables: the distance, what it is by chance, and their ratio."""
    reference = results["headline"]["reference"]
    return [
        {
            "arm": arm,
            "name": drawing.pair_name(arm, role, target, reference),
            "distance": drawing.mean(pair.distance.score for pair in pairs),
            "floor": drawing.mean(pair.distance.floor for pair in pairs),
            "relative": drawing.spread(pair.relative for pair in pairs),
        }
        for (arm, role, target), pairs in drawing.by_pair(
            plain_json.measured(results["spectral"]["pairs"], GraphDistance)
        ).items()
    ]


def not_measured(results: drawing.Results) -> list[str]:
    """Why pairs were not measured, each reason once."""
    return plain_json.not_measured(results["spectral"]["pairs"])
