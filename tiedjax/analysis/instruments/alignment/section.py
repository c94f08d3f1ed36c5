"""Alignment: where the tables lie, at the end and while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.tying import SHARED

KEYS = ("comparisons", "alignment_over_steps", "between_seeds")  # of results.json
_FIT = "orthogonal"  # of the figures and of the strata


@dataclass(frozen=True)
class PairScores:
    """One pair of tables of one seed under one fit. Older results have no `strata`, or no `histogram` of the rows."""

    fit: str
    score: float | None
    floor: float | None
    strata: dict[str, Score] | None = None
    histogram: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Nearness:
    """A pair of tables under one fit, over seeds or pairs of seeds; `by_seed` is `beyond_frequency` of each."""

    score: Interval
    floor: Interval
    corrected: Interval
    beyond_frequency: Interval
    held_out: Interval
    by_seed: dict[str, float | None]


@dataclass(frozen=True)
class ScoreCurve:
    """The score of a pair of tables, and its floor, at every snapshot that both have."""

    steps: list[int]
    score: list[float | None]
    floor: list[float | None]


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    size = (5.0, 0.9 + 0.42 * max(1, len(list(_nearness(results)))))
    yield drawing.Plot("alignment", [_draw_alignment], size)
    yield drawing.Plot("alignment_over_steps", [_over_steps("output"), _over_steps("input")])
    if arms := _arms_with_histograms(results):
        yield drawing.Plot("alignment_rows", [_histograms(arm) for arm in arms])


def alignment_groups(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and table that it is compared with: the score, floor and corrected score of every fit."""
    groups = []
    reference = results["headline"]["reference"]
    for arm, role, target, by_fit in _twins(results):
        other = f"its {target} table" if arm == reference else f"the {reference} {target} table"
        groups.append(_group(results, arm, f"{_table_in_words(arm, role)} and {other}", by_fit))
    for arm, role, target, by_fit in _pairs(results["between_seeds"]):
        title = f"{_table_in_words(arm, role)} and the {reference} {target} table of another seed"
        groups.append(_group(results, arm, title, by_fit))
    return groups


def _table_in_words(arm: str, role: str) -> str:
    return arm if role == SHARED else f"{arm} {role} table"


def _group(results: drawing.Results, arm: str, title: str, by_fit: Mapping[str, Nearness]) -> dict[str, Any]:
    rows = [
        {
            "fit": fit,
            "score": numbers.number(nearness.score.mean),
            "floor": numbers.number(nearness.floor.mean),
            "corrected": numbers.spread(vars(nearness.corrected)),
            "controlled": numbers.spread(vars(_headline_measure(results, nearness))),
            "held_out": numbers.number(nearness.held_out.mean),
            "main": fit == results["headline"]["fit"],
        }
        for fit, nearness in by_fit.items()
    ]
    return {"arm": arm, "title": title, "rows": rows}


def _headline_measure(results: drawing.Results, nearness: Nearness) -> Interval:
    """The score that the headline and the statements are about."""
    measure: Interval = getattr(nearness, results["headline"]["measure"])
    return measure


def _twins(results: drawing.Results) -> Iterator[tuple[str, str, str, dict[str, Nearness]]]:
    """`_pairs` of every arm's tables with those of its reference twins."""
    yield from _pairs({arm: summary["alignment"] for arm, summary in results["arms"].items()})


def _pairs(alignments: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Nearness]]]:
    """(arm, role, role of the reference's table, nearness by fit), the output table before the input table."""
    for arm, by_role in alignments.items():
        for role, by_target in by_role.items():
            for target in sorted(by_target, reverse=True):  # vs_output before vs_input
                by_fit = {fit: plain_json.from_plain(Nearness, plain) for fit, plain in by_target[target].items()}
                yield arm, role, target.removeprefix("vs_"), by_fit


def strata_names(results: drawing.Results) -> list[str]:
    """The strata that some comparison has, in order."""
    return list(dict.fromkeys(name for pair in _with_strata(results) for name in pair.value.strata or ()))


def strata_rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per pair of tables, the corrected score of each stratum with its interval over seeds."""
    by_pair: dict[tuple[str, str, str], list[dict[str, Score]]] = {}
    for pair in _with_strata(results):
        by_pair.setdefault((pair.arm, pair.role, pair.reference_role), []).append(pair.value.strata or {})
    reference, names = results["headline"]["reference"], strata_names(results)
    rows = []
    for (arm, subject, target), of_seeds in by_pair.items():
        spans = [interval(scores[name].corrected for scores in of_seeds if name in scores) for name in names]
        spreads = [numbers.spread(vars(span), 2) for span in spans]
        tables = f"{drawing.table_name(arm, subject)} and {reference} {target}"
        rows.append({"arm": arm, "tables": tables, "spreads": spreads})
    return rows


def _with_strata(results: drawing.Results) -> list[plain_json.Measurement[PairScores]]:
    """The last tables of twins under the orthogonal fit, where strata of tokens were scored."""
    pairs = plain_json.measured(results["comparisons"], PairScores)
    return [pair for pair in pairs if pair.value.fit == _FIT and pair.value.strata is not None]


def _arms_with_histograms(results: drawing.Results) -> list[str]:
    """The arms with one table whose comparisons say how the cosines of single rows are distributed."""
    pairs = [pair for pair in _with_strata(results) if pair.role == SHARED and pair.value.histogram]
    return list(dict.fromkeys(pair.arm for pair in pairs))


def _histograms(arm: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    """Cosines of an arm's rows with those of the reference's two tables, all seeds together, as a density."""

    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        pairs = [pair for pair in _with_strata(results) if pair.arm == arm and pair.role == SHARED]
        colour = drawing.colours(results)[arm]
        for role in ("input", "output"):
            of_seeds = [pair.value for pair in pairs if pair.reference_role == role]
            counts = np.sum([scores.histogram for scores in of_seeds], axis=0)
            edges = np.linspace(-1, 1, len(counts) + 1)
            density = counts / (counts.sum() * (edges[1] - edges[0]))
            label = f"{role} table"
            if role == "output":
                ax.stairs(density, edges, fill=True, color=colour, alpha=0.35, label=label)
            else:
                ax.stairs(density, edges, color=colour, linewidth=1.4, label=label)
            score, line = interval(scores.score for scores in of_seeds).mean, "-" if role == "output" else drawing.INPUT
            if score is not None:
                ax.axvline(score, color=colour, linewidth=1.4, linestyle=line)
        floor = interval(pair.value.floor for pair in pairs).mean
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
    for y, (arm, role, nearness, _) in enumerate(rows):
        span, colour = _headline_measure(results, nearness), colours[arm]
        seeds = [value for value in nearness.by_seed.values() if value is not None]
        if span.low is not None:
            ax.plot([span.low, span.high], [y, y], color=colour, linewidth=5, alpha=0.3, solid_capstyle="round")
        ax.plot(seeds, [y + 0.27] * len(seeds), "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if span.mean is not None:
            face = colour if role == "output" else "none"
            ax.plot(span.mean, y, "o", color=colour, markersize=8, markerfacecolor=face, markeredgewidth=1.8)
            ax.annotate(numbers.number(span.mean, 2), (span.mean, y), (0, 7), textcoords="offset points", ha="center")
    ax.axvline(0, color=drawing.MUTED, linewidth=1, linestyle=drawing.DASHES)
    ax.set_yticks(range(len(rows)), [label for *_, label in rows])
    ax.set_ylim(len(rows) - 0.5, -0.8)
    ax.grid(axis="y", visible=False)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.05), max(high, 0.5))
    ax.set_xlabel("alignment (0: chance, 1: identical)")


def _nearness(results: drawing.Results) -> Iterator[tuple[str, str, Nearness, str]]:
    """(arm, reference role, nearness, label) of every comparison under the orthogonal fit, shared tables first."""
    reference = results["headline"]["reference"]
    for arm, role, target, by_fit in _twins(results):
        other = target if arm == reference else f"{reference} {target}"
        yield arm, target, by_fit[_FIT], f"{drawing.table_name(arm, role)} to {other}"
    reference_roles = results["between_seeds"].get(reference, {})
    for _, role, _, by_fit in _pairs({reference: dict(sorted(reference_roles.items(), reverse=True))}):
        yield reference, role, by_fit[_FIT], f"{reference} {role}, two seeds"


def _over_steps(role: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        shared = [
            pair for pair in plain_json.measured(results["alignment_over_steps"], ScoreCurve) if pair.role == SHARED
        ]
        curves_by_arm = drawing.by_run([pair for pair in shared if pair.reference_role == role])
        for arm, curves in curves_by_arm.items():
            colour = drawing.colours(results)[arm]
            for curve in curves:
                ax.plot(curve.steps, drawing.floats(curve.score), color=colour, linewidth=0.7, alpha=0.45)
            steps, mean = drawing.mean_curve([vars(curve) for curve in curves], "score")
            ax.plot(steps, mean, color=colour, marker="o", markersize=3.5, label=arm)
        all_curves = [curve for curves in curves_by_arm.values() for curve in curves]
        if all_curves:
            ax.plot(
                *drawing.mean_curve([vars(curve) for curve in all_curves], "floor"),
                color=drawing.MUTED,
                linestyle=drawing.DASHES,
                linewidth=1.2,
                label="chance",
            )
        top = max([np.nanmax(drawing.floats(pair.value.score)) for pair in shared], default=1.0)
        ax.set_ylim(0, 1.1 * float(top))
        drawing.step_axis(ax, max((curve.steps[-1] for curve in all_curves), default=1))
        ax.set_ylabel("orthogonal alignment")
        ax.set_title(f"with the {results['headline']['reference']} {role} table")

    return draw
