"""Alignment: where the tables lie, at the end and while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.statistics import interval
from tiedjax.tying import SHARED

KEYS = ("comparisons", "alignment_over_steps", "between_seeds")  # of results.json


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    size = (5.0, 0.9 + 0.42 * max(1, len(list(_nearness(results)))))
    yield drawing.Plot("alignment", [_draw_alignment], size)
    yield drawing.Plot("alignment_over_steps", [_over_steps("output"), _over_steps("input")])
    if arms := _with_histograms(results):
        yield drawing.Plot("alignment_rows", [_histograms(arm) for arm in arms])


def alignment_groups(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and table that it is compared with: the score, floor and corrected score of every fit."""
    groups = []
    reference = results["headline"]["reference"]
    for arm, summary in results["arms"].items():
        for role, compared in summary["alignment"].items():
            for target, fits in sorted(compared.items(), reverse=True):
                name = arm if role == SHARED else f"{arm} {role} table"
                other = f"its {target[3:]} table" if arm == reference else f"the {reference} {target[3:]} table"
                groups.append(_group(results, arm, f"{name} and {other}", fits))
    for arm, subjects in results["between_seeds"].items():
        for role, compared in subjects.items():
            for target, fits in sorted(compared.items(), reverse=True):
                name = arm if role == SHARED else f"{arm} {role} table"
                groups.append(
                    _group(results, arm, f"{name} and the {reference} {target[3:]} table of another seed", fits)
                )
    return groups


def _group(results: drawing.Results, arm: str, title: str, fits: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "fit": fit,
            "score": numbers.number(cell["score"]["mean"]),
            "floor": numbers.number(cell["floor"]["mean"]),
            "corrected": numbers.spread(cell["corrected"]),
            "controlled": numbers.spread(cell[results["headline"]["measure"]]),
            "held_out": numbers.number(cell["held_out"]["mean"]),
            "main": fit == results["headline"]["fit"],
        }
        for fit, cell in fits.items()
    ]
    return {"arm": arm, "title": title, "rows": rows}


def strata_names(results: drawing.Results) -> list[str]:
    """The strata that some comparison has, in order."""
    return list(dict.fromkeys(name for record in _final(results) for name in record["strata"]))


def strata_rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per pair of tables, the corrected score of each stratum with its interval over seeds."""
    rows = []
    reference = results["headline"]["reference"]
    keys = dict.fromkeys((r["arm"], r["subject_role"], r["reference_role"]) for r in _final(results))
    for arm, subject, target in keys:
        found = [
            r for r in _final(results) if (r["arm"], r["subject_role"], r["reference_role"]) == (arm, subject, target)
        ]
        name = arm if subject == SHARED else f"{arm} {subject}"
        spans = [interval(r["strata"].get(n, {}).get("corrected") for r in found) for n in strata_names(results)]
        spreads = [numbers.spread(vars(span), 2) for span in spans]
        rows.append({"arm": arm, "tables": f"{name} and {reference} {target}", "spreads": spreads})
    return rows


def _final(results: drawing.Results) -> list[Mapping[str, Any]]:
    return [r for r in results["comparisons"] if r["fit"] == "orthogonal" and "strata" in r]


def _with_histograms(results: drawing.Results) -> list[str]:
    """The arms with one table whose comparisons say how the cosines of single rows are distributed."""
    records = [r for r in _final(results) if r["subject_role"] == SHARED and "histogram" in r]
    return list(dict.fromkeys(record["arm"] for record in records))


def _histograms(arm: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    """Cosines of an arm's rows with those of the reference's two tables, all seeds together, as a density."""

    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        records = [r for r in _final(results) if r["arm"] == arm and r["subject_role"] == SHARED]
        colour = drawing.colours(results)[arm]
        for role in ("input", "output"):
            compared = [r for r in records if r["reference_role"] == role]
            counts = np.sum([r["histogram"] for r in compared], axis=0)
            edges = np.linspace(-1, 1, len(counts) + 1)
            density = counts / (counts.sum() * (edges[1] - edges[0]))
            label = f"{role} table"
            if role == "output":
                ax.stairs(density, edges, fill=True, color=colour, alpha=0.35, label=label)
            else:
                ax.stairs(density, edges, color=colour, linewidth=1.4, label=label)
            score, line = interval(r["score"] for r in compared).mean, "-" if role == "output" else drawing.INPUT
            if score is not None:
                ax.axvline(score, color=colour, linewidth=1.4, linestyle=line)
        floor = interval(r["floor"] for r in records).mean
        if floor is not None:
            ax.axvline(floor, color=drawing.MUTED, linewidth=1.2, linestyle=drawing.DASHES, label="chance")
        ax.set_xlim(-0.75, 1)
        ax.set_xlabel("cosine of a row with its twin’s")
        ax.set_ylabel("density of rows")
        ax.set_title(f"rows of {arm}")

    return draw


def _draw_alignment(ax: drawing.Axes, results: drawing.Results) -> None:
    colours = drawing.colours(results)
    rows = list(_nearness(results))
    for y, (arm, role, cell, _) in enumerate(rows):
        span, colour = cell[results["headline"]["measure"]], colours[arm]
        seeds = [v for v in cell["by_seed"].values() if v is not None]
        if span["low"] is not None:
            ax.plot([span["low"], span["high"]], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if span["mean"] is not None:
            face = colour if role == "output" else "none"
            ax.plot(span["mean"], y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            ax.annotate(
                numbers.number(span["mean"], 2), (span["mean"], y), (0, 7), textcoords="offset points", ha="center"
            )
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES)
    ax.set_yticks(range(len(rows)), [label for *_, label in rows])
    ax.set_ylim(len(rows) - 0.5, -0.8)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.05), max(high, 0.5))
    ax.set_xlabel("alignment (0: chance, 1: identical)")


def _nearness(results: drawing.Results) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """(arm, reference role, cell, label) of every comparison under the orthogonal fit, shared tables first."""
    reference = results["headline"]["reference"]
    for arm, summary in results["arms"].items():
        for subject, compared in summary["alignment"].items():
            for target in sorted(compared, reverse=True):  # vs_output before vs_input
                role = target.removeprefix("vs_")
                name = arm if subject == SHARED else f"{arm} {subject}"
                other = role if arm == reference else f"{reference} {role}"
                yield arm, role, compared[target]["orthogonal"], f"{name} to {other}"
    own = results["between_seeds"].get(reference, {})
    for role in sorted(own, reverse=True):
        yield reference, role, own[role][f"vs_{role}"]["orthogonal"], f"{reference} {role}, two seeds"


def _over_steps(role: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        curves = [
            c for c in results["alignment_over_steps"] if c["reference_role"] == role and c["subject_role"] == SHARED
        ]
        everything = [c for c in results["alignment_over_steps"] if c["subject_role"] == SHARED]
        for arm, found in drawing.by_arm(curves):
            colour = drawing.colours(results)[arm]
            steps, mean = drawing.mean_curve(found, "score")
            for curve in found:
                ax.plot(
                    curve["steps"],
                    drawing.floats(curve["score"]),
                    color=drawing.colours(results)[arm],
                    linewidth=0.7,
                    alpha=0.45,
                )
            ax.plot(steps, mean, color=colour, marker="o", markersize=3.5, label=arm)
        if curves:
            ax.plot(
                *drawing.mean_curve(curves, "floor"),
                color=drawing.MUTED,
                linestyle=drawing.DASHES,
                linewidth=1.2,
                label="chance",
            )
        top = max([np.nanmax(drawing.floats(c["score"])) for c in everything], default=1.0)
        ax.set_ylim(0, 1.1 * float(top))
        drawing.step_axis(ax, max((c["steps"][-1] for c in curves), default=1))
        ax.set_ylabel("orthogonal alignment")
        ax.set_title(f"with the {results['headline']['reference']} {role} table")

    return draw
