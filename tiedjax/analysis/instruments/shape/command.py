"""`tiedjax analyze spectrum A [B]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiedjax.analysis.basis import arguments

if TYPE_CHECKING:
    from tiedjax.analysis.basis.chance import Score
    from tiedjax.analysis.basis.tables import Table
    from tiedjax.analysis.instruments.shape.space_similarity import SpaceSimilarity
    from tiedjax.analysis.instruments.shape.table_shape import TableShape

HELP = "the shape of a table: ranks, isotropy; of two: subspaces, CKA, similarity of pairs"
SUBJECT = "tables"
_MEASURES = ("effective_rank", "stable_rank", "first_energy", "isotropy", "mean_cosine")
_LONG = 1e11  # numbers times width from which stages are reported: about 5 s each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A, perhaps B, and the options."""
    arguments.add_subject(parser, SUBJECT)
    arguments.add_count(parser, "--draws", 5, "isotropic tables, and row permutations of B, for the floors")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measures; UserError for bad input."""
    from tiedjax.analysis.basis.plain_json import to_plain
    from tiedjax.analysis.instruments.shape import space_similarity, table_shape

    draws = arguments.at_least(args, "draws")
    inputs = arguments.read_tables(args)
    tables, kept_V = inputs.tables, inputs.kept_V
    values = [t.values if kept_V is None else t.values[kept_V] for t in tables]
    shapes = [
        table_shape.measure(v, draws=draws, report=_reporter(table, v.size * v.shape[1]))
        for table, v in zip(tables, values, strict=True)
    ]
    widths = [shape.width for shape in shapes]
    result = inputs.result(args, shapes[0].rows) | {"tables": to_plain(shapes)}
    head = inputs.heading(" and ".join(t.name for t in tables), result)
    text = [f"{head}{inputs.note}", _shapes(tables, shapes)]
    if len(tables) == 2:
        report = _reporter(tables[0], values[0].size * max(widths))
        comparison = space_similarity.measure(values[0], values[1], draws=draws, report=report)
        result["comparison"] = to_plain(comparison)
        text.append(_comparison(comparison))
    return result, "\n\n".join(text)


def _reporter(table: Table, work: float) -> Callable[[str], None]:
    import sys

    if work < _LONG:
        return lambda line: None
    return lambda line: print(f"spectrum of {table.name}: {line}", file=sys.stderr, flush=True)


def _shapes(tables: tuple[Table, ...], shapes: list[TableShape]) -> str:
    lines = []
    for table, shape in zip(tables, shapes, strict=True):
        for form in ("raw", "centred"):
            measures = getattr(shape, form)
            for name in _MEASURES:
                score = getattr(measures, name, None)
                values = [getattr(score, f, None) for f in ("score", "floor", "floor_deviation")]
                lines.append([table.name, form, name.replace("_", " "), *values])
    body = arguments.text_table(["table", "form", "measure", "score", "isotropic", "+-"], lines)
    return f"{body}\nisotropic: Gaussian tables of the same shape and sum of squares, and how far single ones deviate"


def _comparison(comparison: SpaceSimilarity) -> str:
    cka, pairs = comparison.cka, comparison.pairs
    lines: list[list[Any]] = [["CKA", *_scores(cka), None, None]]
    if pairs:
        lines.append(["Spearman of pairs", *_scores(pairs), pairs.low, pairs.high])
    body = arguments.text_table(
        ["similarity", "score", "floor", "+-", "closed form", "corrected", "low", "high"], lines
    )
    angles = arguments.text_table(
        ["dimensions", "mean cos^2", "floor", "+-", "closed form", "corrected", "least angle", "largest"],
        [
            [o.dimensions, *_scores(o.cosine), o.smallest_angle_degrees, o.largest_angle_degrees]
            for o in comparison.subspaces
        ],
    )
    return (
        f"{body}\nfloor: mean over row permutations of the second table; low, high: bootstrap over the rows of the "
        f"pairs\n\nleading left singular subspaces, principal angles in degrees\n{angles}"
    )


def _scores(score: Score) -> list[Any]:
    return [score.score, score.floor, score.floor_standard_error, score.floor_closed_form, score.corrected]
