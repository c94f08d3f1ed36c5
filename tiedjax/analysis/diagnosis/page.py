"""diagnosis.html: one offline page, from a diagnosis alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tiedjax.analysis.basis import drawing
from tiedjax.analysis.diagnosis import words
from tiedjax.analysis.diagnosis.measure import Diagnosis
from tiedjax.analysis.study import figures, html
from tiedjax.host.storage import write_atomically

PAGE = "diagnosis.html"
LEAST_REACH = 0.25  # of the axis of positions: about where our own untied tables lie, so that a small one looks small


def write(d: Diagnosis, out: Path) -> Path:
    """Writes diagnosis.html and its figure under `out`; returns the page's path. UserError where it cannot."""
    drawings = figures.draw(plots(d), d, out)
    page = html.rendered("diagnosis/page.html.j2", drawings, d=d, w=words, parts=words.parts(d), headings=html.headings)
    write_atomically(out / PAGE, page)
    return out / PAGE


def plots(d: Diagnosis) -> Iterator[drawing.Plot]:
    """The position of each table; none where it was not measured."""
    if "not_measured" not in d["cooccurrence"]:
        yield drawing.Plot("position", [_draw], (5.0, 0.9 + 0.42 * len(_rows(d))))


def _rows(d: Diagnosis) -> list[tuple[str, dict[str, float], str]]:
    """Label, interval and colour of each table, and of the references."""
    rows = [
        (f"this {role} table", of_role["partial"]["position"], drawing.LIGHT[0])
        for role, of_role in d["cooccurrence"]["roles"].items()
    ]
    known = d["references"]["position"] if d["references"] else {}
    return rows + [(f"our untied {role} tables", known[role], drawing.MUTED) for role in known]


def _draw(ax: drawing.Axes, d: drawing.Results) -> None:
    for y, (_, span, colour) in enumerate(_rows(d)):
        if span["low"] is not None:
            ax.plot([span["low"], span["high"]], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        if span["mean"] is not None:
            ax.plot(span["mean"], y, "o", color=colour, markersize=8)
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES)
    ax.set_yticks(range(len(_rows(d))), [label for label, _, _ in _rows(d)])
    ax.set_ylim(len(_rows(d)) - 0.5, -0.6)
    ax.grid(axis="y", visible=False)
    reach = max(abs(span[end] or 0) for _, span, _ in _rows(d) for end in ("mean", "low", "high"))
    ax.set_xlim(-1.15 * max(reach, LEAST_REACH), 1.15 * max(reach, LEAST_REACH))
    ax.set_xlabel("what follows  ←  position  →  what precedes")
