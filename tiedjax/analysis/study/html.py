"""Pages from templates: one HTML file each that opens offline, with its figures in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from tiedjax.analysis.basis import drawing, numbers

Drawings = Mapping[str, Sequence[str]]  # plot: its panels as SVG elements
PACKAGE = "tiedjax.analysis"  # under which every template lies


def rendered(template: str, drawings: Drawings, **names: Any) -> str:
    """The page of a template, which has these names beside `n` (how numbers are written), `svgs` and the palettes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(
        n=numbers,
        # Matplotlib escapes every text that it draws, so what came from the results is text here too.
        svgs={name: list(map(Markup, panels)) for name, panels in drawings.items()},
        light=drawing.LIGHT,
        dark=drawing.DARK,
        **names,
    )
    return re.sub(r"<table.*?</table>", _labelled, page, flags=re.S)


def headings(body: str) -> list[tuple[str, Markup]]:
    """(id, text) of every second heading in a part of the page, the name of a command left out."""
    return [(id_, Markup(text)) for id_, text in re.findall(r'<h2 id="([^"]+)">(.*?)(?: <code>.*?</code>)?</h2>', body)]


def _labelled(table: re.Match[str]) -> str:
    """A table whose cells name their column in `data-label`, for screens on which the columns do not fit."""
    head, rows = table[0].split("</thead>")
    labels = [re.sub("<[^>]*>", " ", text) for text in re.findall(r"<th[^>]*>(.*?)</th>", head)]

    def row(cells: re.Match[str]) -> str:
        left = iter(labels)
        return re.sub("<td", lambda _: f'<td data-label="{next(left)}"', cells[0])

    return f"{head}</thead>{re.sub('<tr.*?</tr>', row, rows, flags=re.S)}"
