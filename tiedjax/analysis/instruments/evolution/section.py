"""Evolution: how far the tables moved. `summary` follows the snapshots, each read once for all that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, plain_json
from tiedjax.analysis.basis.strata import STRATA
from tiedjax.analysis.instruments.evolution.evolution import Evolution

_PANELS = 4  # of strata


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    ends = {"to_start": "to step 0", "to_previous": "to the previous snapshot"}
    yield drawing.Plot("evolution", [_evolution(field, to) for field, to in ends.items()])
    rotation_free_panels = [_evolution(field, f"{to}, rotation-free", rotation_free=True) for field, to in ends.items()]
    yield drawing.Plot("evolution_rotation_free", rotation_free_panels)
    yield drawing.Plot("evolution_strata", [_by_stratum(arm, role) for arm, role in _tables_with_panels(results)])


def ends(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and role: where the table ended, over seeds: as it is, rotation-free, and by stratum."""
    rows = []
    for (arm, role), evolutions in _by_table(results).items():
        rotation_free = [evolution.rotation_free for evolution in evolutions if evolution.rotation_free]
        row = {"arm": arm, "name": drawing.table_name(arm, role)}
        row["raw"] = drawing.spread(evolution.to_start[-1] for evolution in evolutions)
        row["turned"] = drawing.spread(movement.to_start[-1] for movement in rotation_free)
        row["chance"] = drawing.mean(movement.floor[-1] for movement in rotation_free)
        for name in strata(results):
            row[name] = drawing.spread(
                evolution.strata[name].to_start[-1] for evolution in evolutions if name in evolution.strata
            )
        rows.append(row)
    return rows


def strata(results: drawing.Results) -> list[str]:
    """The strata that any table has, in their order."""
    names = {
        name for evolutions in _by_table(results).values() for evolution in evolutions for name in evolution.strata
    }
    return [name for name in STRATA if name in names]


def _by_table(results: drawing.Results) -> dict[tuple[str, str], list[Evolution]]:
    return drawing.by_table(plain_json.measured(results["evolution"], Evolution))


def _tables_with_panels(results: drawing.Results) -> list[tuple[str, str]]:
    """Tables whose strata are drawn: the reference's, the baseline's, those of other arms while there is room."""
    arms = dict.fromkeys([results["headline"]["reference"], results["headline"]["arm"], *results["arms"]])
    tables = _by_table(results)
    return [table for arm in arms for table in tables if table[0] == arm][:_PANELS]


def _curves(evolutions: Sequence[Evolution], part: str) -> list[dict[str, Any]]:
    """The curves of a part of each, "", "rotation_free" or a stratum, with the steps that they are at."""
    parts_of = lambda e: {"": e, "rotation_free": e.rotation_free, **e.strata}
    parts = [(e.steps, parts_of(e).get(part)) for e in evolutions]
    return [vars(movement) | {"steps": steps} for steps, movement in parts if movement]


def _evolution(field: str, to: str, rotation_free: bool = False) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        tables = {
            table: _curves(evolutions, "rotation_free" if rotation_free else "")
            for table, evolutions in _by_table(results).items()
        }
        for (arm, role), curves in tables.items():
            dashes = drawing.INPUT if role == "input" else "-"
            label, colour = drawing.table_name(arm, role), drawing.colours(results)[arm]
            steps, mean = drawing.mean_curve(curves, field)
            ax.plot(steps, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
        all_curves = [curve for curves in tables.values() for curve in curves]
        low = _least(all_curves, field)
        if all_curves and field == "to_start" and (rotation_free or low < 0.3):  # else it lies far below what is drawn
            floor = drawing.mean_curve(all_curves, "floor")
            ax.plot(*floor, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
            low = min(low, _least(all_curves, "floor"))
        _axes(ax, results, low)
        ax.set_title(to)

    return draw


def _by_stratum(arm: str, role: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        tables = _by_table(results)
        for name, colour in zip(strata(results), drawing.STEPS, strict=False):
            curves = _curves(tables[arm, role], name)
            if curves:
                steps, mean = drawing.mean_curve(curves, "to_start")
                ax.plot(steps, mean, color=colour, marker="o", markersize=3, label=f"{name} tokens")
        evolutions = [e for table in _tables_with_panels(results) for e in tables[table]]
        _axes(ax, results, _least([c for name in strata(results) for c in _curves(evolutions, name)], "to_start"))
        ax.set_title(f"{arm}, {role} table")

    return draw


def _axes(ax: drawing.Axes, results: drawing.Results, low: float) -> None:
    last = [e.steps[-1] for evolutions in _by_table(results).values() for e in evolutions]
    drawing.step_axis(ax, max(last, default=1))
    ax.set_ylim(low - 0.05 * (1 - low), 1 + 0.05 * (1 - low) + 1e-6)
    ax.set_ylabel("mean cosine of rows")


def _least(curves: Sequence[Mapping[str, Any]], field: str) -> float:
    values = [v for c in curves for v in c[field] if v is not None]
    return float(np.min(values)) if values else 0.0
