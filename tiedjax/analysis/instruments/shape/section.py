"""The shape of the spaces: singular values, ranks and isotropy of every table, and how alike twins' spaces are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.records import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.instruments.shape import similarity, spectrum
from tiedjax.errors import UserError

_SHOWN = 1e-3  # singular values below this share of the largest run out of the figure
DIMENSIONS = 8  # of the leading subspaces that the table of pairs names
_TABLE = ("arm", "role")
_PAIR = ("arm", "subject_role", "reference_role")
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """The shape of every last table over the tokens its run saw, and every pair of twins over those both saw."""
    tables = []
    for table in study.tables:
        about = table.key | {"sha256": content_hash(table.values)}
        try:
            tables.append(about | to_plain(spectrum.measure(table.values[table.seen])))
        except UserError as error:
            tables.append(about | {"not_measured": str(error)})
    pairs = []
    for twins in study.twins:
        try:
            comparison = similarity.measure(twins.reference.values[twins.rows], twins.subject.values[twins.rows])
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
    known = [t for t in results["spectrum"]["tables"] if t.get("raw") and t.get("centred")]

    def cells(of: Sequence[Mapping[str, Any]], field: str, show: Any) -> dict[str, str]:
        values = lambda name, form: [(t[form][name] or {}).get(field) for t in of]
        return {name: show(interval(values(name, form)), digits) for name, (form, digits) in columns.items()}

    spread = lambda span, digits: numbers.spread(vars(span), digits)
    mean = lambda span, digits: numbers.number(span.mean, digits)
    rows = []
    for (arm, role), of in _grouped(known, _TABLE):
        rows.append({"arm": arm, "name": drawing.table_name(arm, role)} | cells(of, "score", spread))
    return [*rows, {"arm": "", "name": "isotropic"} | cells(known, "floor", mean)] if rows else []


def similarities(results: drawing.Results) -> list[dict[str, str]]:
    """Per pair of twins' tables: CKA, rank correlation of pairs, overlap of the leading subspaces, over seeds."""
    reference, rows = results["headline"]["reference"], []
    for (arm, role, target), of in _grouped(_measured(results["spectrum"]["pairs"]), _PAIR):
        other = f"its {target}" if arm == reference else f"{reference} {target}"
        row = {"arm": arm, "name": f"{drawing.table_name(arm, role)} and {other}"}
        leading: list[Mapping[str, Any]] = [
            next((s["cosine"] for s in p["subspaces"] if s["dimensions"] == DIMENSIONS), {}) for p in of
        ]
        for name, found in {"cka": [p["cka"] for p in of], "overlap": leading}.items():
            span = {field: interval(f.get(field) for f in found) for field in ("score", "floor", "corrected")}
            row |= {name: numbers.number(span["score"].mean), f"{name}_floor": numbers.number(span["floor"].mean)}
            row[f"{name}_corrected"] = numbers.spread(vars(span["corrected"]))
        row["pairs"] = numbers.spread(vars(interval((p["pairs"] or {}).get("score") for p in of)))
        rows.append(row)
    return rows


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    found = results["spectrum"]
    return list(dict.fromkeys(r["not_measured"] for r in [*found["tables"], *found["pairs"]] if "not_measured" in r))


def _singular_values(form: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        known = [t for t in results["spectrum"]["tables"] if t.get(form)]
        least = 1.0
        for (arm, role), of in _grouped(known, _TABLE):
            found = _relative([t[form]["singular_values"] for t in of])
            least = min(least, float(found[found > _SHOWN].min()))
            style = drawing.INPUT if role == "input" else "-"
            colour = drawing.colours(results)[arm]
            ax.plot(range(1, len(found) + 1), found, color=colour, linestyle=style, label=drawing.table_name(arm, role))
        if known:
            chance = _relative([t[form]["isotropic_singular_values"] for t in known])
            at = range(1, len(chance) + 1)
            ax.plot(at, chance, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
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
        known = [p for p in _measured(results["spectrum"]["pairs"]) if p["subject_role"] == "shared"]
        pairs = [p for p in known if p["reference_role"] == target]
        sizes = _sizes(pairs)
        mean = lambda of, field: [
            float(np.mean([s["cosine"][field] for p in of for s in p["subspaces"] if s["dimensions"] == r]))
            for r in sizes
        ]
        for arm, of in drawing.by_arm(pairs):
            colour = drawing.colours(results)[arm]
            ax.plot(sizes, mean(of, "score"), color=colour, marker="o", markersize=3.5, label=arm)
        if pairs:
            floor = mean(pairs, "floor")
            ax.plot(sizes, floor, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [f"{r:,}" for r in sizes])
            ax.minorticks_off()
        top = max([s["cosine"]["score"] for p in known for s in p["subspaces"]], default=1.0)
        ax.set_ylim(0, 1.05 * top)
        ax.set_xlabel("leading directions")
        ax.set_ylabel("mean squared cosine")
        ax.set_title(f"overlap with the {results['headline']['reference']} {target} table")

    return draw


def _sizes(pairs: Sequence[Mapping[str, Any]]) -> list[int]:
    """The dimensions that every pair has."""
    return sorted(set.intersection(*({s["dimensions"] for s in p["subspaces"]} for p in pairs))) if pairs else []


def _measured(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in records if "not_measured" not in r]


def _grouped(
    records: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[Mapping[str, Any]]]]:
    key = lambda record: tuple(record[name] for name in names)
    for each in dict.fromkeys(key(r) for r in records):
        yield each, [r for r in records if key(r) == each]
