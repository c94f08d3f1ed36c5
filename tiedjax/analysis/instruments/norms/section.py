"""Norm and frequency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.instruments.norms.norms import Bin, Curve, Norms, measure
from tiedjax.errors import UserError
from tiedjax.tying import SHARED

QUANTITIES = ("norm", "distance_to_mean", "cosine_to_mean")
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """Rows against frequency in every last table, over the tokens its run saw."""
    tables = []
    for table in study.tables:
        description = table.key | {"sha256": content_hash(table.values), "counts": "as target"}
        try:
            tables.append(description | to_plain(measure(table.values[table.seen], table.counts[1][table.seen])))
        except UserError as error:
            tables.append(description | {"not_measured": str(error)})
    return tables


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    yield drawing.Plot("norms", [_curves("norm", "row norm", shared) for shared in (False, True)])
    label = "distance to the mean row"
    yield drawing.Plot("distance_to_mean", [_curves("distance_to_mean", label, shared) for shared in (False, True)])


def centrality(results: drawing.Results) -> str:
    """Whether frequent tokens lie nearer to the mean row than rare ones, in one sentence."""
    sides: dict[str, list[str]] = {}
    for table, norms in _by_table(results).items():
        span = interval(_spearman(norms, "distance_to_mean"))
        sides.setdefault(_place_in_words(span), []).append(
            f"{drawing.table_name(*table)} ({numbers.spread(vars(span))})"
        )
    places = [f"{side} in {', '.join(tables)}" for side, tables in sides.items()]
    if not places:
        return ""
    return (
        f"Compared with rare tokens, frequent ones lie {'; '.join(places)} "
        "(in brackets: the rank correlation of that distance with the count)."
    )


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and role: rank correlations with count and the probe, over seeds."""
    lines = []
    for (arm, role), norms in _by_table(results).items():
        line = {"arm": arm, "name": drawing.table_name(arm, role)}
        line |= {quantity: drawing.spread(_spearman(norms, quantity)) for quantity in QUANTITIES}
        line["score"] = drawing.spread(n.log_frequency.score for n in norms)
        line["floor"] = drawing.spread(n.log_frequency.floor for n in norms)
        lines.append(line)
    return lines


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["norms"])


def _curve(norms: Norms, quantity: str) -> Curve:
    curve: Curve = getattr(norms, quantity)
    return curve


def _spearman(norms: Sequence[Norms], quantity: str) -> list[float | None]:
    return [_curve(n, quantity).spearman.score for n in norms]


def _place_in_words(span: Interval) -> str:
    """Where frequent tokens lie, as far as the seeds say."""
    if span.mean is None:
        return "at a distance that could not be measured"
    side = f"{'nearer to' if span.mean < 0 else 'farther from'} the mean row"
    if span.low is None:
        return f"{side}, by one seed,"
    return side if span.excludes_zero else "neither measurably nearer to the mean row nor farther from it"


def _by_table(results: drawing.Results) -> dict[tuple[str, str], list[Norms]]:
    return drawing.by_table(plain_json.measured(results["norms"], Norms))


def _curves(quantity: str, label: str, shared: bool) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        top = 0.0
        for (arm, role), norms in _by_table(results).items():
            log_counts, curves = _mean_bins([_curve(n, quantity) for n in norms])
            top = max([top, *curves["quantile_75"]])
            if (role == SHARED) != shared:
                continue
            colour = drawing.colours(results)[arm]
            line = drawing.INPUT if role == "input" else "-"
            style: dict[str, Any] = {"linestyle": line, "label": drawing.table_name(arm, role)}
            ax.plot(log_counts, curves["median"], color=colour, marker="o", markersize=3.5, **style)
            ax.fill_between(
                log_counts, curves["quantile_25"], curves["quantile_75"], color=colour, alpha=0.14, linewidth=0
            )
        ax.set_ylim(0, 1.05 * (top or 1.0))
        ax.set_xlabel("log10(count as target + 1)")
        ax.set_ylabel(label)
        ax.set_title("shared tables" if shared else "separate tables")

    return draw


def _mean_bins(curves: Sequence[Curve]) -> tuple[list[float], dict[str, list[float]]]:
    """The middle of every bin of seen tokens, and its quantiles averaged over runs."""
    bins: dict[float, list[Bin]] = {}
    for entry in (entry for curve in curves for entry in curve.bins):
        if entry.high:  # the bin of never-seen tokens has no width
            bins.setdefault((entry.low + entry.high) / 2, []).append(entry)
    middles = sorted(bins)
    names = ("median", "quantile_25", "quantile_75")
    return middles, {name: [float(np.mean([getattr(e, name) for e in bins[x]])) for x in middles] for name in names}
