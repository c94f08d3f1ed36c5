"""What draws: a plot to files and to SVG elements that take colours and font from the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tiedjax.analysis.basis import drawing
from tiedjax.errors import UserError
from tiedjax.host.storage import made, write_atomically

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


def draw(plots: Iterable[drawing.Plot], results: drawing.Results, out: Path) -> dict[str, list[str]]:
    """Writes figures/*.{png,pdf} of these plots under `out`; returns their panels as SVG, by the name of the plot.

    UserError when the folder cannot be written.
    """
    try:
        folder = made(out / "figures")
    except OSError as error:
        raise UserError(f"{out / 'figures'}: cannot be written: {error.strerror}") from None
    drawings = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the caller draws in, the report looks the same
        matplotlib.rcParams.update(_STYLE)
        for plot in plots:
            figure = _figure(plot.panels, plot.size, results)
            for suffix, metadata in [("png", {}), ("pdf", {"CreationDate": None})]:
                write_atomically(folder / f"{plot.name}.{suffix}", _rendered(figure, suffix, metadata))
            alone = [figure] if len(plot.panels) == 1 else (_figure([p], plot.size, results) for p in plot.panels)
            drawings[plot.name] = [_inline_svg(panel, f"{plot.name}-{i}") for i, panel in enumerate(alone)]
    return drawings


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
