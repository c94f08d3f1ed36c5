"""Evolution: how far the tables moved. `summary` follows the snapshots, each read once for all that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.strata import STRATA

_PANELS = 4  # of strata


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    ends = {"to_start": "to step 0", "to_previous": "to the previous snapshot"}
    yield drawing.Plot("evolution", [_evolution(field, to) for field, to in ends.items()])
    turned = [_evolution(field, f"{to}, rotation-free", turned=True) for field, to in ends.items()]
    yield drawing.Plot("evolution_rotation_free", turned)
    yield drawing.Plot("evolution_strata", [_by_stratum(arm, role) for arm, role in _shown(results)])


def ends(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and role: where the table ended, over seeds: as it is, rotation-free, and by stratum."""
    rows = []
    for arm, of_arm in drawing.by_arm(results["evolution"]):
        for role in dict.fromkeys(e["role"] for e in of_arm):
            found = [e for e in of_arm if e["role"] == role]
            last = lambda curves, field: numbers.spread(vars(interval(c[field][-1] for c in curves)))
            turned = [e["rotation_free"] for e in found]
            row = {"arm": arm, "name": drawing.table_name(arm, role), "raw": last(found, "to_start")}
            row["turned"] = last(turned, "to_start")
            row["chance"] = numbers.number(interval(t["floor"][-1] for t in turned).mean)
            for name in strata(results):
                row[name] = last([e["strata"][name] for e in found if name in e["strata"]], "to_start")
            rows.append(row)
    return rows


def strata(results: drawing.Results) -> list[str]:
    """The strata that any table has, in their order."""
    known = {name for e in results["evolution"] for name in e["strata"]}
    return [name for name in STRATA if name in known]


def _shown(results: drawing.Results) -> list[tuple[str, str]]:
    """Tables whose strata are drawn: the reference's, the baseline's, those of other arms while there is room."""
    arms = dict.fromkeys([results["headline"]["reference"], results["headline"]["arm"], *results["arms"]])
    tables = dict.fromkeys((arm, e["role"]) for arm in arms for e in results["evolution"] if e["arm"] == arm)
    return list(tables)[:_PANELS]


def _evolution(field: str, to: str, turned: bool = False) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        curves = [_key(e) | (dict(e["rotation_free"]) if turned else dict(e)) for e in results["evolution"]]
        for arm, of_arm in drawing.by_arm(curves):
            for role in dict.fromkeys(c["role"] for c in of_arm):
                found = [c for c in of_arm if c["role"] == role]
                dashes = drawing.INPUT if role == "input" else "-"
                label = drawing.table_name(arm, role)
                colour = drawing.colours(results)[arm]
                steps, mean = drawing.mean_curve(found, field)
                ax.plot(steps, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
        low = _least(curves, field)
        if curves and field == "to_start" and (turned or low < 0.3):  # else it lies far below what is drawn
            floor = drawing.mean_curve(curves, "floor")
            ax.plot(*floor, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
            low = min(low, _least(curves, "floor"))
        _axes(ax, results, low)
        ax.set_title(to)

    return draw


def _by_stratum(arm: str, role: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        of_tables = [e for e in results["evolution"] if (e["arm"], e["role"]) in _shown(results)]
        for name, colour in zip(strata(results), drawing.STEPS, strict=False):
            found = [
                _key(e) | dict(e["strata"][name])
                for e in of_tables
                if (e["arm"], e["role"]) == (arm, role) and name in e["strata"]
            ]
            if found:
                steps, mean = drawing.mean_curve(found, "to_start")
                ax.plot(steps, mean, color=colour, marker="o", markersize=3, label=f"{name} tokens")
        _axes(ax, results, _least([m for e in of_tables for m in e["strata"].values()], "to_start"))
        ax.set_title(f"{arm}, {role} table")

    return draw


def _axes(ax: drawing.Axes, results: drawing.Results, low: float) -> None:
    drawing.step_axis(ax, max((e["steps"][-1] for e in results["evolution"]), default=1))
    ax.set_ylim(low - 0.05 * (1 - low), 1 + 0.05 * (1 - low) + 1e-6)
    ax.set_ylabel("mean cosine of rows")


def _key(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("arm", "seed", "role", "steps")}


def _least(curves: list[Any], field: str) -> float:
    known = [v for c in curves for v in c[field] if v is not None]
    return float(np.min(known)) if known else 0.0
