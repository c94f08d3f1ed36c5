"""The shape of the spaces: singular values, ranks and isotropy of every table, and how alike twins' spaces are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, plain_json
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.plain_json import Measurement, to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.instruments.shape import space_similarity, table_shape
from tiedjax.analysis.instruments.shape.space_similarity import SpaceSimilarity
from tiedjax.analysis.instruments.shape.table_shape import Shape, TableShape
from tiedjax.errors import UserError
from tiedjax.tying import SHARED

_SHOWN = 1e-3  # singular values below this share of the largest run out of the figure
DIMENSIONS = 8  # of the leading subspaces that the table of pairs names
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """The shape of every last table over the tokens its run saw, and every pair of twins over those both saw."""
    tables = []
    for table in study.tables:
        description = table.key | {"sha256": content_hash(table.values)}
        try:
            tables.append(description | to_plain(table_shape.measure(table.values[table.seen])))
        except UserError as error:
            tables.append(description | {"not_measured": str(error)})
    pairs = []
    for twins in study.twins:
        try:
            comparison = space_similarity.measure(
                twins.reference.values[twins.kept_V], twins.subject.values[twins.kept_V]
            )
            pairs.append(twins.key | to_plain(comparison))
        except UserError as error:
            pairs.append(twins.key | {"not_measured": str(error)})
    return {"tables": tables, "pairs": pairs}


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    yield drawing.Plot(
        "spectrum", [_singular_values("raw", "tables as they are"), _singular_values("centred", "centred tables")]
    )
    yield drawing.Plot("subspaces", [_subspaces("output"), _subspaces("input")])


def shapes(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and role: the measures over seeds; last, what isotropic tables give."""
    columns = {
        "effective_rank": ("centred", 1),
        "stable_rank": ("centred", 1),
        "first_energy": ("centred", 3),
        "isotropy": ("raw", 3),
        "mean_cosine": ("raw", 3),
    }

    def scores(table_shapes: Sequence[TableShape], name: str, form: str) -> list[Score]:
        measures = [getattr(getattr(of_seed, form), name) for of_seed in table_shapes]
        return [score for score in measures if score is not None]

    def cells(table_shapes: Sequence[TableShape], field: str, show: Callable[..., str]) -> dict[str, str]:
        return {
            name: show((getattr(score, field) for score in scores(table_shapes, name, form)), digits)
            for name, (form, digits) in columns.items()
        }

    tables = _tables(results)
    rows = [
        {"arm": arm, "name": drawing.table_name(arm, role)} | cells(table_shapes, "score", drawing.spread)
        for (arm, role), table_shapes in tables.items()
    ]
    all_tables = [of_seed for table_shapes in tables.values() for of_seed in table_shapes]
    return [*rows, {"arm": "", "name": "isotropic"} | cells(all_tables, "floor", drawing.mean)] if rows else []


def similarities(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of twins' tables: CKA, rank correlation of pairs, overlap of the leading subspaces, over seeds."""
    reference, rows = results["headline"]["reference"], []
    for (arm, role, target), pairs in _pairs(results).items():
        row = {"arm": arm, "name": drawing.pair_name(arm, role, target, reference)}
        leading = [overlap.cosine for p in pairs for overlap in p.subspaces if overlap.dimensions == DIMENSIONS]
        for name, scores in {"cka": [p.cka for p in pairs], "overlap": leading}.items():
            row[name] = drawing.mean(score.score for score in scores)
            row[f"{name}_floor"] = drawing.mean(score.floor for score in scores)
            row[f"{name}_corrected"] = drawing.spread(score.corrected for score in scores)
        row["pairs"] = drawing.spread(p.pairs.score for p in pairs if p.pairs)
        rows.append(row)
    return rows


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured([*results["spectrum"]["tables"], *results["spectrum"]["pairs"]])


def _tables(results: drawing.Results) -> dict[tuple[str, str], list[TableShape]]:
    """The tables that have a shape both as they are and centred."""
    measured = plain_json.measured(results["spectrum"]["tables"], TableShape)
    return drawing.by_table([table for table in measured if table.value.raw and table.value.centred])


def _pairs(results: drawing.Results) -> dict[tuple[str, str, str], list[SpaceSimilarity]]:
    return drawing.by_pair(plain_json.measured(results["spectrum"]["pairs"], SpaceSimilarity))


def _singular_values(form: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        measured = plain_json.measured(results["spectrum"]["tables"], TableShape)
        shapes: dict[tuple[str, str], list[Shape]] = drawing.by_table(
            [
                Measurement(table.arm, table.seed, table.role, "", shape)
                for table in measured
                if (shape := getattr(table.value, form))
            ]
        )
        least = 1.0
        for (arm, role), seed_shapes in shapes.items():
            curve = _relative([shape.singular_values for shape in seed_shapes])
            least = min(least, float(curve[curve > _SHOWN].min()))
            style = drawing.INPUT if role == "input" else "-"
            colour = drawing.colours(results)[arm]
            ax.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=style, label=drawing.table_name(arm, role))
        if shapes:
            chance = _relative(
                [shape.isotropic_singular_values for seed_shapes in shapes.values() for shape in seed_shapes]
            )
            directions = range(1, len(chance) + 1)
            ax.plot(directions, chance, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
        ax.set_yscale("log")
        ticks = [digit / 10**power for power in range(4) for digit in (1, 0.5, 0.2)]
        ax.set_yticks([t for t in ticks if t >= least], [f"{t:g}" for t in ticks if t >= least])
        ax.minorticks_off()
        ax.set_ylim(least / 1.2, 1.2)
        ax.set_xlabel("direction")
        ax.set_ylabel("singular value / largest")
        ax.set_title(title)

    return draw


def _relative(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """The mean of the curves, each over its first value, as far as all go."""
    length = min(len(c) for c in curves)
    return np.mean([np.array(c[:length]) / c[0] for c in curves], axis=0)


def _subspaces(target: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        shared_pairs = {key: pairs for key, pairs in _pairs(results).items() if key[1] == SHARED}
        to_target = {arm: pairs for (arm, _, role), pairs in shared_pairs.items() if role == target}
        all_pairs = [pair for pairs in to_target.values() for pair in pairs]
        sizes = _sizes(all_pairs)
        mean = lambda pairs, field: [
            float(np.mean([getattr(o.cosine, field) for p in pairs for o in p.subspaces if o.dimensions == r]))
            for r in sizes
        ]
        for arm, pairs in to_target.items():
            colour = drawing.colours(results)[arm]
            ax.plot(sizes, mean(pairs, "score"), color=colour, marker="o", markersize=3.5, label=arm)
        if all_pairs:
            floor = mean(all_pairs, "floor")
            ax.plot(sizes, floor, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [f"{r:,}" for r in sizes])
            ax.minorticks_off()
        scores = [overlap.cosine.score for pairs in shared_pairs.values() for p in pairs for overlap in p.subspaces]
        top = max((score for score in scores if score is not None), default=1.0)
        ax.set_ylim(0, 1.05 * top)
        ax.set_xlabel("leading directions")
        ax.set_ylabel("mean squared cosine")
        ax.set_title(f"overlap with the {results['headline']['reference']} {target} table")

    return draw


def _sizes(pairs: Sequence[SpaceSimilarity]) -> list[int]:
    """The dimensions that every pair has."""
    return sorted(set.intersection(*({o.dimensions for o in p.subspaces} for p in pairs))) if pairs else []
