"""The report: figures and one offline HTML page, drawn from results.json alone. The only file that draws."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tiedjax.analysis import published, words
from tiedjax.errors import UserError
from tiedjax.files import write_atomically

# Okabe and Ito's palette, distinguishable to colour-blind readers; the page swaps in lighter ones on a dark ground.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")
_DARK = ("#62b5f0", "#ff9450", "#3fcaa2", "#eaa7c9", "#e5b94e", "#9ad5fa")
_STEPS = ("#8450b0", "#c2407e", "#e0663c", "#d99a1c", "#8f9a3a")  # in order, legible on either ground
_INK, _MUTED, _GRID = "#1b1e23", "#6a707a", "#d9dce1"
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "tiedjax",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.facecolor": "none",
}
_DASHES = (0, (4, 3))  # of chance levels
_PANEL = (4.5, 3.3)  # inches; one panel fits a phone

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """One figure: panels side by side in its files, one under the other on a phone."""

    name: str
    panels: Sequence[Callable[[Axes, Results], None]]
    size: tuple[float, float] = _PANEL


def write_report(results: Results, out: Path) -> None:
    """Writes figures/*.{png,pdf} and report.html under `out` from a results.json dict; the same dict gives the same
    page.

    UserError when `out` cannot be written.
    """
    if results.get("kind") != "study":
        raise UserError("report: these are not the results of a study; `tiedjax study` writes them to results.json")
    folder = Path(out) / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the caller draws in, the report looks the same
        matplotlib.rcParams.update(_STYLE)
        svgs = {}
        for plot in _plots(results):
            figure = _figure(plot.panels, plot.size, results)
            for suffix, metadata in [("png", {}), ("pdf", {"CreationDate": None})]:
                write_atomically(folder / f"{plot.name}.{suffix}", _rendered(figure, suffix, metadata))
            svgs[plot.name] = [
                _inline_svg(_figure([panel], plot.size, results), f"{plot.name}-{i}")
                for i, panel in enumerate(plot.panels)
            ]
    write_atomically(Path(out) / "report.html", _page(results, svgs))


def _page(results: Results, svgs: Mapping[str, list[Markup]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tiedjax.analysis", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colours = _colours(results)
    index = {arm: _LIGHT.index(colour) for arm, colour in colours.items()}
    return environment.get_template("report.html.j2").render(
        r=results, w=words, published=published, svgs=svgs, arm_index=index, light=_LIGHT, dark=_DARK
    )


def _plots(results: Results) -> Iterator[Plot]:
    yield Plot("alignment", [_draw_alignment], (5.0, 0.9 + 0.42 * max(1, len(list(_nearness(results))))))
    yield Plot("alignment_over_steps", [_over_steps("output"), _over_steps("input")])
    yield Plot("gradient_share", [_draw_share, _draw_role_norms])
    yield Plot("evolution", [_evolution("to_start", "step 0"), _evolution("to_previous", "the previous snapshot")])
    yield Plot("norms", [_norms(shared=False), _norms(shared=True)])
    if any(g["deciles"] for g in results["gradients"]):
        yield Plot("gradient_deciles", [_deciles("input"), _deciles("output")])


# ---------------------------------------------------------------- panels


def _draw_alignment(ax: Axes, results: Results) -> None:
    colours = _colours(results)
    rows = list(_nearness(results))
    for y, (arm, role, cell, _) in enumerate(rows):
        span, colour = cell["corrected"], colours[arm]
        seeds = [v for v in cell["by_seed"].values() if v is not None]
        if span["low"] is not None:
            ax.plot([span["low"], span["high"]], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if span["mean"] is not None:
            face = colour if role == "output" else "none"
            ax.plot(span["mean"], y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            ax.annotate(
                words.number(span["mean"], 2), (span["mean"], y), (0, 7), textcoords="offset points", ha="center"
            )
    ax.axvline(0, color=_MUTED, linewidth=1, linestyle=_DASHES)
    ax.set_yticks(range(len(rows)), [label for *_, label in rows])
    ax.set_ylim(len(rows) - 0.5, -0.8)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.05), max(high, 0.5))
    ax.set_xlabel("alignment above chance (0: chance, 1: identical)")


def _nearness(results: Results) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """(arm, reference role, cell, label) of every comparison under the orthogonal fit, shared tables first."""
    reference = results["headline"]["reference"]
    for arm, summary in results["arms"].items():
        for subject, compared in summary["alignment"].items():
            for target in sorted(compared, reverse=True):  # vs_output before vs_input
                role = target.removeprefix("vs_")
                name = arm if subject == "shared" else f"{arm} {subject}"
                other = role if arm == reference else f"{reference} {role}"
                yield arm, role, compared[target]["orthogonal"], f"{name} to {other}"
    own = results["between_seeds"].get(reference, {})
    for role in sorted(own, reverse=True):
        yield reference, role, own[role][f"vs_{role}"]["orthogonal"], f"{reference} {role}, two seeds"


def _over_steps(role: str) -> Callable[[Axes, Results], None]:
    def draw(ax: Axes, results: Results) -> None:
        curves = [
            c for c in results["alignment_over_steps"] if c["reference_role"] == role and c["subject_role"] == "shared"
        ]
        everything = [c for c in results["alignment_over_steps"] if c["subject_role"] == "shared"]
        for arm, found in _by_arm(curves):
            steps, mean = _mean_curve(found, "score")
            for curve in found:
                ax.plot(
                    curve["steps"], _floats(curve["score"]), color=_colours(results)[arm], linewidth=0.7, alpha=0.45
                )
            ax.plot(steps, mean, color=_colours(results)[arm], marker="o", markersize=3.5, label=arm)
        if curves:
            ax.plot(*_mean_curve(curves, "floor"), color=_MUTED, linestyle=_DASHES, linewidth=1.2, label="chance")
        top = max([np.nanmax(_floats(c["score"])) for c in everything], default=1.0)
        ax.set_ylim(0, 1.1 * float(top))
        _step_axis(ax, max((c["steps"][-1] for c in curves), default=1))
        ax.set_ylabel("orthogonal alignment")
        ax.set_title(f"with the {results['headline']['reference']} {role} table")

    return draw


def _draw_share(ax: Axes, results: Results) -> None:
    for arm, found in _by_arm(results["gradients"]):
        colour = _colours(results)[arm]
        binned = [_log_binned(np.array(g["steps"]), _floats(g["output_share"])) for g in found]
        steps = binned[0][0]
        same = np.array([b[1] for b in binned if len(b[1]) == len(steps)])
        ax.plot(steps, same.mean(axis=0), color=colour, label=arm)
        ax.fill_between(steps, same.min(axis=0), same.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0.5, color=_MUTED, linestyle=_DASHES, linewidth=1.2, label="balance")
    _log_steps(ax)
    ax.set_ylim(0, 1)
    ax.set_ylabel("output share of gradient norm")
    ax.set_title("share")


def _draw_role_norms(ax: Axes, results: Results) -> None:
    arm = results["headline"]["arm"]
    found = [g for g in results["gradients"] if g["arm"] == arm]
    for role, dashes in [("output", "-"), ("input", (0, (5, 2)))]:
        binned = [_log_binned(np.array(g["steps"]), _floats(g[f"{role}_norm"])) for g in found]
        if binned:
            steps = binned[0][0]
            mean = np.mean([b[1] for b in binned if len(b[1]) == len(steps)], axis=0)
            ax.plot(steps, mean, color=_colours(results)[arm], linestyle=dashes, label=f"{role} role")
    _log_steps(ax)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("gradient norm")
    ax.set_title(f"the two norms, {arm}")


def _evolution(field: str, to: str) -> Callable[[Axes, Results], None]:
    def draw(ax: Axes, results: Results) -> None:
        for arm, of_arm in _by_arm(results["evolution"]):
            for role in dict.fromkeys(e["role"] for e in of_arm):
                found = [e for e in of_arm if e["role"] == role]
                dashes = (0, (5, 2)) if role == "input" else "-"
                label = arm if role == "shared" else f"{arm} {role}"
                steps, mean = _mean_curve(found, field)
                ax.plot(
                    steps, mean, color=_colours(results)[arm], linestyle=dashes, marker="o", markersize=3, label=label
                )
        low = min([np.nanmin(_floats(e[field])) for e in results["evolution"]], default=0.0)
        if field == "to_start" and low < 0.3:  # else it lies far below what is drawn
            floor = _mean_curve(results["evolution"], "floor")
            ax.plot(*floor, color=_MUTED, linestyle=_DASHES, linewidth=1.2, label="chance")
        _step_axis(ax, max((e["steps"][-1] for e in results["evolution"]), default=1))
        ax.set_ylim(low - 0.05 * (1 - low), 1 + 0.05 * (1 - low) + 1e-6)
        ax.set_ylabel("mean cosine of rows")
        ax.set_title(f"to {to}")

    return draw


def _norms(shared: bool) -> Callable[[Axes, Results], None]:
    def draw(ax: Axes, results: Results) -> None:
        for arm, of_arm in _by_arm([n for n in results["norms"] if (n["role"] == "shared") == shared]):
            for role in dict.fromkeys(n["role"] for n in of_arm):
                found = [n for n in of_arm if n["role"] == role]
                at, curves = _mean_bins(found)
                colour = _colours(results)[arm]
                dashes = (0, (5, 2)) if role == "input" else "-"
                label = arm if shared else f"{arm} {role}"
                ax.plot(at, curves["median"], color=colour, linestyle=dashes, marker="o", markersize=3.5, label=label)
                ax.fill_between(at, curves["quantile_25"], curves["quantile_75"], color=colour, alpha=0.14, linewidth=0)
        top = max([b["quantile_75"] for n in results["norms"] for b in n["bins"]], default=1.0)
        ax.set_ylim(0, 1.05 * top)
        ax.set_xlabel("log10(count as target + 1)")
        ax.set_ylabel("row norm")
        ax.set_title("shared tables" if shared else "separate tables")

    return draw


def _mean_bins(found: Sequence[Mapping[str, Any]]) -> tuple[list[float], dict[str, list[float]]]:
    """The middle of every bin of seen tokens, and its quantiles averaged over runs."""
    bins: dict[float, list[Mapping[str, float]]] = {}
    for record in found:
        for entry in record["bins"]:
            if entry["high"]:  # the bin of never-seen tokens has no width
                bins.setdefault((entry["low"] + entry["high"]) / 2, []).append(entry)
    at = sorted(bins)
    names = ("median", "quantile_25", "quantile_75")
    return at, {name: [float(np.mean([e[name] for e in bins[x]])) for x in at] for name in names}


def _deciles(role: str) -> Callable[[Axes, Results], None]:
    def draw(ax: Axes, results: Results) -> None:
        arm = results["headline"]["arm"]
        found = [g["deciles"] for g in results["gradients"] if g["arm"] == arm and g["deciles"]]
        if found:
            common = sorted(set.intersection(*({d["step"] for d in run} for run in found)))
            picked = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, len(_STEPS)).round().astype(int))]
            for colour, step in zip(_STEPS, picked, strict=False):
                norms = [_floats(d[f"{role}_norm"]) for run in found for d in run if d["step"] == step]
                label = f"step {step:,}"
                ax.plot(range(1, 11), np.mean(norms, axis=0), color=colour, marker="o", markersize=3.5, label=label)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(_plain_ticks)
        ax.yaxis.set_minor_formatter("")
        ax.set_xticks(range(1, 11))
        ax.set_xlabel("frequency decile (10: most frequent)")
        ax.set_ylabel("gradient norm")
        ax.set_title(f"{arm}: from the {role} role")

    return draw


# ---------------------------------------------------------------- helpers


def _colours(results: Results) -> dict[str, str]:
    """The same colour for an arm everywhere: the baseline first, then the reference, then the others in order."""
    first = [results["headline"]["arm"], results["headline"]["reference"]]
    order = dict.fromkeys([*(a for a in first if a in results["arms"]), *results["arms"]])
    return {arm: _LIGHT[i % len(_LIGHT)] for i, arm in enumerate(order)}


def _by_arm(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    for arm in dict.fromkeys(r["arm"] for r in records):
        yield arm, [r for r in records if r["arm"] == arm]


def _mean_curve(curves: Sequence[Mapping[str, Any]], field: str) -> tuple[list[int], np.ndarray]:
    """Steps that all curves have, and the mean of `field` there."""
    steps = sorted(set.intersection(*(set(c["steps"]) for c in curves)))
    values = [[c[field][c["steps"].index(step)] for step in steps] for c in curves]
    return steps, np.mean([_floats(v) for v in values], axis=0)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _log_binned(steps: np.ndarray, values: np.ndarray, per_decade: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins even in log(step), so that the noise of single steps does not hide the course."""
    index = np.floor(np.log10(np.maximum(steps, 1)) * per_decade).astype(int)
    bins = [np.isfinite(values) & (index == i) for i in np.unique(index)]
    bins = [b for b in bins if b.any()]
    return np.array([steps[b].mean() for b in bins]), np.array([values[b].mean() for b in bins])


def _log_steps(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(_plain_ticks)
    ax.set_xlabel("step")


def _plain_ticks(value: float, _: float) -> str:
    return f"{value:,g}"


def _step_axis(ax: Axes, last: int) -> None:
    """Steps from 0 on, logarithmic above 1."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    decades = [10**i for i in range(int(np.log10(max(last, 1))) + 1)]
    ticks = [0, *(d for d in decades if d < 0.6 * last), last]
    ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.15, last * 1.15)
    ax.set_xlabel("step")


def _figure(panels: Sequence[Callable[[Axes, Results], None]], size: tuple[float, float], results: Results) -> Figure:
    figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
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
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not again for every format
    return figure


def _rendered(figure: Figure, suffix: str, metadata: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(
        stream, format=suffix, dpi=200, metadata=dict(metadata), facecolor="white" if suffix == "png" else "none"
    )
    return stream.getvalue()


def _inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element that takes its colours and its font from the page around it."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        text = _rendered(figure, "svg", {"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    # Only what is referred to (markers, clip paths) keeps its id, which the salt makes unique on the page.
    text = re.sub(r' id="(?![pm][0-9a-f]{8,}")[^"]*"', "", text)
    for i, colour in enumerate(_LIGHT):
        text = text.replace(colour, f"var(--arm{i})")
    for colour, variable in [(_INK, "ink"), (_MUTED, "muted"), (_GRID, "line")]:
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    # Matplotlib escapes every text that it draws, so what came from the results is text here too.
    return Markup(text)
