"""Projection: the tables in the plane, and the nearest rows of a few words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.plain_json import Measurement, to_plain
from tiedjax.analysis.basis.study_runs import LastTable, StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.basis.tokens import most_frequent, token_texts
from tiedjax.analysis.instruments.picture.projection import Nearest, measure
from tiedjax.errors import UserError

POINTS = 500  # of each table that are drawn
CLASSES = ("rarest", "second", "third", "fourth", "most frequent")
WORDS, CANDIDATES = 8, 400
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """Projection and nearest rows of the last tables of reference and baseline, of the first seed that has both."""
    arms = (study.study.reference, study.study.baseline)
    seeds = [seed for seed in study.study.seeds if all((arm, seed) in study.last for arm in arms)]
    if not seeds:
        return []
    tables = [table for arm in dict.fromkeys(arms) for table in study.last[arm, seeds[0]]]
    tokens = _words(tables[0])
    return [table.key | _record(table, tokens) for table in tables]


@dataclass(frozen=True)
class Word:
    """The text of a token, and its cosine where it is another's neighbour."""

    token: str
    cosine: float | None = None


@dataclass(frozen=True)
class Near:
    """A token, and the rows nearest to its own."""

    token: str
    neighbours: list[Word]


@dataclass(frozen=True)
class DrawnTable:
    """What the report needs of one table's picture: some of its points, with their fifth of the tokens by count."""

    method: str
    rows: int
    width: int
    explained: list[float]
    trust: Score | None
    points: list[list[float]]
    classes: list[int]
    nearest: list[Near]


def _record(table: LastTable, tokens: list[int]) -> dict[str, Any]:
    row_N = np.flatnonzero(table.seen)
    try:
        picture = measure(table.values, tokens, kept_V=table.seen)
    except UserError as error:
        return {"not_measured": str(error)}
    order_N = np.argsort(table.counts.sum(axis=0)[row_N], kind="stable")
    spread_P = np.unique(np.linspace(0, len(order_N) - 1, min(POINTS, len(order_N))).round().astype(int))
    points = [[float(f"{x:.4g}") for x in picture.projection.coordinates[order_N[i]]] for i in spread_P]
    drawn_table = DrawnTable(
        method=picture.projection.method,
        rows=picture.projection.rows,
        width=picture.projection.width,
        explained=picture.projection.explained or [],
        trust=picture.projection.trust,
        points=points,
        classes=(spread_P * len(CLASSES) // len(order_N)).tolist(),
        nearest=_named(table, picture.nearest),
    )
    return {"sha256": content_hash(table.values), **to_plain(drawn_table)}


def _named(table: LastTable, near: Sequence[Nearest]) -> list[Near]:
    texts = lambda ids: token_texts(table.run.tokenizer_path, ids)
    return [
        Near(texts([row.token])[0], [Word(*pair) for pair in zip(texts(row.neighbours), row.cosines, strict=True)])
        for row in near
    ]


def _words(table: LastTable) -> list[int]:
    """The most frequent tokens that are words of more than two letters; the most frequent of any kind where few are."""
    ids = most_frequent(table.counts, CANDIDATES)
    texts = [text.strip() for text in token_texts(table.run.tokenizer_path, ids)]
    words = [i for i, text in zip(ids, texts, strict=True) if len(text) > 2 and text.isalpha()]
    return (words if len(words) >= WORDS else ids)[:WORDS]


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    pictures = measured(results)
    if pictures:
        yield drawing.Plot("map", [_scatter(i) for i in range(len(pictures))])


def measured(results: drawing.Results) -> list[Measurement[DrawnTable]]:
    """The tables that have a projection."""
    return plain_json.measured(results["map"], DrawnTable)


def not_measured(results: drawing.Results) -> str:
    """Why no table has a projection."""
    return next(iter(plain_json.not_measured(results["map"])), "no seed has a run of the reference and of the baseline")


def name(picture: Measurement[DrawnTable]) -> str:
    """What a table is called."""
    return drawing.table_name(picture.arm, picture.role)


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per table: how much of its variance the picture shows, and the picture's trustworthiness beside chance."""
    lines = []
    for picture in measured(results):
        trust = picture.value.trust or Score(None, None)
        share = sum(picture.value.explained)
        lines.append(
            {"arm": picture.arm, "table": name(picture), "shown": f"{100 * share:.0f}\u00a0%"}
            | {field: numbers.number(getattr(trust, field), 2) for field in ("score", "floor", "corrected")}
        )
    return lines


def neighbours(results: drawing.Results) -> list[dict[str, Any]]:
    """Per word: its text, and for each table the texts of its nearest rows."""
    return [
        {
            "token": numbers.visible(of_tables[0].token),
            "tables": [[numbers.visible(word.token) for word in near.neighbours] for near in of_tables],
        }
        for of_tables in zip(*(picture.value.nearest for picture in measured(results)), strict=True)
    ]


def _scatter(i: int) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        picture = measured(results)[i]
        drawn_table = picture.value
        points_N2, class_N = np.array(drawn_table.points), np.array(drawn_table.classes)
        for class_number, (label, colour) in enumerate(zip(CLASSES, drawing.STEPS, strict=True)):
            points_M2 = points_N2[class_N == class_number]
            ax.plot(*points_M2.T, "o", color=colour, markersize=2.6, alpha=0.75, markeredgewidth=0)
            ax.plot([], [], "o", color=colour, markersize=6, label=label)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_xlabel(f"first component, {drawn_table.explained[0]:.0%}")
        ax.set_ylabel(f"second component, {drawn_table.explained[1]:.0%}")
        trust = "" if drawn_table.trust is None else f" (trust {numbers.number(drawn_table.trust.score, 2)})"
        ax.set_title(f"{name(picture)}{trust}")

    return draw
