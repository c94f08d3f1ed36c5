"""Map: the tables in the plane, and the nearest rows of a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.records import to_plain
from tiedjax.analysis.basis.study_runs import LastTable, StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.basis.tokens import most_frequent, token_texts
from tiedjax.analysis.instruments.picture.map import Nearest, measure
from tiedjax.errors import UserError

POINTS = 500  # of each table that are drawn
CLASSES = ("rarest", "second", "third", "fourth", "most frequent")
WORDS, CANDIDATES = 8, 400
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """Map and nearest rows of the reference's last tables and the baseline's, of the first seed that has them."""
    arms = (study.study.reference, study.study.baseline)
    seeds = [seed for seed in study.study.seeds if all((arm, seed) in study.last for arm in arms)]
    if not seeds:
        return []
    tables = [table for arm in dict.fromkeys(arms) for table in study.last[arm, seeds[0]]]
    tokens = _words(tables[0])
    return [table.key | _record(table, tokens) for table in tables]


def _record(table: LastTable, tokens: list[int]) -> dict[str, Any]:
    kept = np.flatnonzero(table.seen)
    try:
        picture = measure(table.values, tokens, rows=table.seen)
    except UserError as error:
        return {"not_measured": str(error)}
    order = np.argsort(table.counts.sum(axis=0)[kept], kind="stable")
    spread = np.unique(np.linspace(0, len(order) - 1, min(POINTS, len(order))).round().astype(int))
    points = [[float(f"{x:.4g}") for x in picture.map.coordinates[order[i]]] for i in spread]
    return {
        "sha256": content_hash(table.values),
        **{name: to_plain(getattr(picture.map, name)) for name in ("method", "rows", "width", "explained", "trust")},
        "points": points,
        "classes": (spread * len(CLASSES) // len(order)).tolist(),
        "nearest": _named(table, picture.nearest),
    }


def _named(table: LastTable, near: Sequence[Nearest]) -> list[dict[str, Any]]:
    texts = lambda ids: token_texts(table.run.tokenizer_path, ids)
    return [
        {
            "token": texts([of.token])[0],
            "neighbours": [
                {"token": text, "cosine": cosine} for text, cosine in zip(texts(of.neighbours), of.cosines, strict=True)
            ],
        }
        for of in near
    ]


def _words(table: LastTable) -> list[int]:
    """The most frequent tokens that are words of more than two letters; the most frequent of any kind where few are."""
    ids = most_frequent(table.counts, CANDIDATES)
    texts = [text.strip() for text in token_texts(table.run.tokenizer_path, ids)]
    found = [i for i, text in zip(ids, texts, strict=True) if len(text) > 2 and text.isalpha()]
    return (found if len(found) >= WORDS else ids)[:WORDS]


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    found = measured(results)
    if found:
        yield drawing.Plot("map", [_scatter(i) for i in range(len(found))])


def measured(results: drawing.Results) -> list[Mapping[str, Any]]:
    """The records of the tables that have a map."""
    return [r for r in results["map"] if "not_measured" not in r]


def not_measured(results: drawing.Results) -> str:
    """Why no table has a map."""
    return next((r["not_measured"] for r in results["map"]), "no seed has a run of the reference and of the baseline")


def name(record: Mapping[str, Any]) -> str:
    """What a table is called."""
    return record["arm"] if record["role"] == "shared" else f"{record['arm']} {record['role']}"


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per table: how much of its variance the picture shows, and the picture's trustworthiness beside chance."""
    lines = []
    for record in measured(results):
        trust = record["trust"] or dict.fromkeys(("score", "floor", "corrected"))
        share = sum(record["explained"])
        lines.append(
            {"arm": record["arm"], "table": name(record), "shown": f"{100 * share:.0f}\u00a0%"}
            | {field: numbers.number(trust[field], 2) for field in ("score", "floor", "corrected")}
        )
    return lines


def neighbours(results: drawing.Results) -> list[dict[str, Any]]:
    """Per word: its text, and for each table the texts of its nearest rows."""
    found = measured(results)
    return [
        {
            "token": numbers.visible(of[0]["token"]),
            "tables": [[numbers.visible(n["token"]) for n in each["neighbours"]] for each in of],
        }
        for of in zip(*(record["nearest"] for record in found), strict=True)
    ]


def _scatter(i: int) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        record = measured(results)[i]
        points_N2, class_N = np.array(record["points"]), np.array(record["classes"])
        for which, (label, colour) in enumerate(zip(CLASSES, drawing.STEPS, strict=True)):
            inside = points_N2[class_N == which]
            ax.plot(*inside.T, "o", color=colour, markersize=2.6, alpha=0.75, markeredgewidth=0)
            ax.plot([], [], "o", color=colour, markersize=6, label=label)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel(f"first component, {record['explained'][0]:.0%}")
        ax.set_ylabel(f"second component, {record['explained'][1]:.0%}")
        trust = "" if record["trust"] is None else f" (trust {numbers.number(record['trust']['score'], 2)})"
        ax.set_title(f"{name(record)}{trust}")

    return draw
