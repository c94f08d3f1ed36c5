"""The first screen: the verdict, a row for each arm, and one picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.tying import SHARED

KEYS = ()  # of results.json, beside what is always there
_ROW = 0.6  # inches


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure; none where no shared table was compared."""
    if rows := nearness(results):
        yield drawing.Plot("nearness", [_draw], (4.8, 0.85 + _ROW * len(rows)))


def nearness(results: drawing.Results) -> list[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """(arm, label, cell of each role of the reference): every shared table, then the reference's tables of two seeds.

    The last row says what two runs that differ in their seed alone have in common.
    """
    head, fit = results["headline"], results["headline"]["fit"]
    rows = []
    for arm, summary in results["arms"].items():
        if compared := summary["alignment"].get(SHARED):
            rows.append((arm, arm, {role: compared[f"vs_{role}"][fit] for role in ROLES if f"vs_{role}" in compared}))
    repeated = results.get("between_seeds", {}).get(head["reference"], {})
    if rows and all(role in repeated for role in ROLES):
        cells = {role: repeated[role][f"vs_{role}"][fit] for role in ROLES}
        rows.append((head["reference"], f"{head['reference']},\ntwo seeds", cells))
    return rows


def _draw(ax: drawing.Axes, results: drawing.Results) -> None:
    rows, colours, measure = nearness(results), drawing.colours(results), results["headline"]["measure"]
    for y, (arm, _, cells) in enumerate(rows):
        means = [cell[measure]["mean"] for cell in cells.values() if cell[measure]["mean"] is not None]
        ax.plot(means, [y] * len(means), color=colours[arm], linewidth=1, alpha=0.5)
        for role, cell in cells.items():
            _mark(ax, y, cell[measure], colours[arm], filled=role == "output")
    for role in ROLES:
        face = drawing.MUTED if role == "output" else "none"
        label = f"to the {role} table"
        ax.plot([], [], "o", color=drawing.MUTED, markersize=8, markerfacecolor=face, label=label)
    ax.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.0), max(1.08 * high, 0.4))
    ax.set_xlabel(f"nearness to {results['headline']['reference']}’s tables (0: chance, 1: the same)")


def _mark(ax: drawing.Axes, y: int, span: Mapping[str, Any], colour: str, *, filled: bool) -> None:
    if span["mean"] is None:
        return
    if span["low"] is not None:
        ax.plot([span["low"], span["high"]], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
    face = colour if filled else "none"
    ax.plot(span["mean"], y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
    above = 7 if filled else -16  # points: the labels of one row do not meet
    ax.annotate(numbers.number(span["mean"]), (span["mean"], y), (0, above), textcoords="offset points", ha="center")
