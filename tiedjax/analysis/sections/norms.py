"""Norm and frequency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.norms import norms_by_count
from tiedjax.analysis.records import to_plain
from tiedjax.analysis.sections import drawing
from tiedjax.analysis.study_runs import StudyRuns
from tiedjax.analysis.tables import content_hash


def collect(study: StudyRuns) -> list[dict[str, Any]]:
    """Norms by frequency of every last table, over the tokens its run saw."""
    records = []
    for table in study.tables:
        found = norms_by_count(table.values[table.seen], table.counts[1][table.seen])
        about = {"sha256": content_hash(table.values), "counts": "as target"}
        records.append(table.key | about | to_plain(found))
    return records


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    yield drawing.Plot("norms", [_norms(shared=False), _norms(shared=True)])


def _norms(shared: bool) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        for arm, of_arm in drawing.by_arm([n for n in results["norms"] if (n["role"] == "shared") == shared]):
            for role in dict.fromkeys(n["role"] for n in of_arm):
                found = [n for n in of_arm if n["role"] == role]
                at, curves = _mean_bins(found)
                colour = drawing.colours(results)[arm]
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
