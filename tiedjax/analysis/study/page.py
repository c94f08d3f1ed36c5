"""The report: figures and one offline HTML page, drawn from results.json alone; its sections are in `sections`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tiedjax.analysis.basis import drawing, numbers, published
from tiedjax.analysis.study import beside_paper, losses, sentences
from tiedjax.analysis.study.sections import AGAIN, SCHEMA, SECTIONS, left_out, sections_of, without_others
from tiedjax.errors import UserError
from tiedjax.files import write_atomically

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "tiedjax",
    "font.family": "DejaVu Sans",  # which comes with matplotlib; a list of families is searched for every text
    "font.size": 9.5,
    "text.color": drawing.INK,
    "axes.labelcolor": drawing.INK,
    "axes.edgecolor": drawing.MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": drawing.GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # where it is anyway: to find that out takes as long as to draw the axes
    "xtick.color": drawing.MUTED,
    "ytick.color": drawing.MUTED,
    "xtick.labelcolor": drawing.INK,
    "ytick.labelcolor": drawing.INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.facecolor": "none",
}


# What every results.json holds; all else belongs to a section, which is left out where it is missing.
CORE = (
    "answer",
    "findings",
    "statements",
    "headline",
    "arms",
    "changes",
    "reproducible_share",
    "study",
    "runs",
    "environment",
    "examples",
    "notes",
)

Drawings = Mapping[str, Sequence[str]]  # plot: its panels as SVG elements
_PACKAGE = "tiedjax.analysis"  # under which every template lies


def write_report(results: drawing.Results, out: Path, drawings: Drawings | None = None) -> None:
    """Writes figures/*.{png,pdf} and report.html under `out` from a results.json dict; the same dict gives the same
    page.

    `drawings` are what `draw` gave for every section, if others have drawn them. UserError when `out` cannot be
    written.
    """
    refuse_other_results(results)
    if drawings is None:
        drawings = {name: panels for section in SECTIONS for name, panels in draw(results, section, out).items()}
    write_atomically(Path(out) / "report.html", page_of(results, drawings))


def refuse_other_results(results: drawing.Results) -> None:
    """UserError unless these are the results of a study, as this version writes them."""
    if results.get("kind") != "study":
        raise UserError("report: these are not the results of a study; `tiedjax study` writes them to results.json")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"report: results.json has schema {results.get('schema')}, this version draws {SCHEMA}; {AGAIN}"
        )
    missing = [key for key in CORE if key not in results]
    if missing:
        raise UserError(f"report: results.json holds no {missing[0]!r}; {AGAIN}")


def draw(results: drawing.Results, section: str, out: Path) -> dict[str, list[str]]:
    """Writes one section's figures/*.{png,pdf} under `out`; returns their panels as SVG, none of a section that the
    results do not hold; UserError as above.
    """
    folder = Path(out) / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    drawings = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the caller draws in, the report looks the same
        matplotlib.rcParams.update(_STYLE)
        plots = SECTIONS[section].plots(results) if section in sections_of(results) else ()
        for plot in plots:
            figure = _figure(plot.panels, plot.size, results)
            for suffix, metadata in [("png", {}), ("pdf", {"CreationDate": None})]:
                write_atomically(folder / f"{plot.name}.{suffix}", _rendered(figure, suffix, metadata))
            alone = [figure] if len(plot.panels) == 1 else (_figure([p], plot.size, results) for p in plot.panels)
            drawings[plot.name] = [_inline_svg(panel, f"{plot.name}-{i}") for i, panel in enumerate(alone)]
    return drawings


def _template(section: ModuleType) -> str:
    """Where a section's template lies in the package: beside it, under its name."""
    return section.__name__.removeprefix(f"{_PACKAGE}.").replace(".", "/") + ".html.j2"


def page_of(results: drawing.Results, drawings: Drawings) -> str:
    """The page, from a results.json dict and what `draw` gave for every section."""
    lines, results = left_out(results), without_others(results)
    sections = sections_of(results)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(_PACKAGE, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = drawing.colours(results)
    index = {arm: drawing.LIGHT.index(colour) for arm, colour in colours.items()}
    page = environment.get_template("study/page.html.j2").render(
        r=results,
        w=sentences,
        losses=losses,
        paper=beside_paper,
        n=numbers,
        published=published,
        sections=sections,
        templates={name: _template(section) for name, section in sections.items()},
        left_out=lines,
        # Matplotlib escapes every text that it draws, so what came from the results is text here too.
        svgs={name: list(map(Markup, panels)) for name, panels in drawings.items()},
        arm_index=index,
        light=drawing.LIGHT,
        dark=drawing.DARK,
        headings=_headings,
    )
    return re.sub(r"<table.*?</table>", _labelled, page, flags=re.S)


def _headings(body: str) -> list[tuple[str, Markup]]:
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


def _figure(
    panels: Sequence[Callable[[drawing.Axes, drawing.Results], None]],
    size: tuple[float, float],
    results: drawing.Results,
) -> Figure:
    layout = ConstrainedLayoutEngine()
    figure = Figure(figsize=(size[0] * len(panels), size[1]), layout=layout)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, len(panels), i + 1) for i in range(len(panels))]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax, results)
    entries: dict[str, Any] = {}
    for ax in axes:
        entries |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        columns = min(len(entries), 3 * len(panels))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
    layout.execute(figure)
    figure.set_layout_engine(None)  # laid out once; where there is an engine, each format is drawn twice
    return figure


def _rendered(figure: Figure, suffix: str, metadata: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(
        stream, format=suffix, dpi=200, metadata=dict(metadata), facecolor="white" if suffix == "png" else "none"
    )
    return stream.getvalue()


def _inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that takes its colours and its font from the page around it."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        text = _rendered(figure, "svg", {"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    # Only what is referred to (markers, clip paths) keeps its id, which the salt makes unique on the page.
    text = re.sub(r' id="(?![pm][0-9a-f]{8,}")[^"]*"', "", text)
    for i, colour in enumerate(drawing.LIGHT):
        text = text.replace(colour, f"var(--arm{i})")
    for colour, variable in [(drawing.INK, "ink"), (drawing.MUTED, "muted"), (drawing.GRID, "line")]:
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # as matplotlib before 3.11 writes it
    return re.sub(r" font-family: [^;\"]*;", "", text)
