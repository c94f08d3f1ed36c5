"""Calibration: predicted probability against what happens, by token frequency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.held_out import record_of
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.basis.strata import THIRDS
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.twins import twins
from tiedjax.analysis.instruments.calibration.calibration import Group, RunCalibration, measure

SCORES = ("log2_ratio", "group_error", "target_probability", "top_error", "overconfidence")
_MEANS = {"share": 3, "target_probability": 4, "entropy": 2}  # digits
_LEAST_POSITIONS = 30  # of a frequency bin that is drawn
VERSION = 2  # of its part of results.json


def collect(study: StudyRuns) -> dict[str, Any]:
    """Every run by stratum and by bin of frequency, and the differences between twins, paired by seed."""
    runs = [{"arm": arm, "seed": seed} | record_of(study, run, measure) for (arm, seed), run in study.runs.items()]
    return {"runs": runs, "twins": list(_twins(study.study.reference, runs))}


def _twins(reference: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference: each score of each stratum, and those of all positions."""
    for pair in twins(reference, runs, RunCalibration):
        for stratum in THIRDS:
            record: dict[str, Any] = {"arm": pair.arm, "stratum": stratum}
            for name in SCORES:
                record[name] = to_plain(pair.difference(partial(_stratum_score, stratum=stratum, name=name)))
            yield record


def _stratum_score(run: RunCalibration, stratum: str, name: str) -> float | None:
    """One score of a stratum: the excess over the floor of an error, else the score itself."""
    group = next((g for g in run.by_stratum.groups if g.name == stratum), None)
    if group is None or name == "target_probability":
        return None if group is None else group.target_probability
    score: Score = getattr(group, name)
    return score.excess if name.endswith("error") else score.score


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures; none where nothing was measured."""
    if _by_arm(results):
        ratio = _curves(
            "log2_ratio", "target_positions", "log2(predicted / observed share)", "over- and under-prediction"
        )
        title = "likeliest token: probability less accuracy"
        yield drawing.Plot(
            "calibration", [ratio, _curves("overconfidence", "predicted_positions", "difference", title)]
        )


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["calibration"]["runs"])


def answers(results: drawing.Results) -> list[str]:
    """Whether the baseline arm is more over-confident on frequent tokens and under-predicts rare ones, by its twins."""
    head = results["headline"]
    twins = {t["stratum"]: t for t in results["calibration"]["twins"] if t["arm"] == head["arm"]}
    if not twins:
        return []
    changed = lambda span, up, down: _changed(span, head, up, down)
    frequent, rare = twins["frequent"]["overconfidence"], twins["rare"]["log2_ratio"]
    return [
        f"Where it bets on a frequent token, {changed(frequent, 'is more confident', 'is less confident')}"
        f" relative to how often it is right ({numbers.spread(frequent)}).",
        f"Rare tokens as a whole: {changed(rare, 'gives them more probability', 'gives them less probability')}"
        f" relative to how often they come (log2 ratio {numbers.spread(rare, 2)}).",
    ]


def _changed(span: Mapping[str, Any], head: Mapping[str, Any], up: str, down: str) -> str:
    than = f"than its {head['reference']} twin"
    if span["mean"] is None:
        return f"there is nothing to compare between the {head['arm']} model and its {head['reference']} twin"
    if span["low"] is None:
        return f"the {head['arm']} model {up if span['mean'] > 0 else down} {than}, by one seed,"
    if span["low"] > 0:
        return f"the {head['arm']} model {up} {than}"
    if span["high"] < 0:
        return f"the {head['arm']} model {down} {than}"
    return f"the {head['arm']} model’s difference to its {head['reference']} twin is undecided"


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per stratum and arm, over seeds: scores beside what a calibrated model gets."""
    lines = []
    by_arm = _by_arm(results)
    for stratum in THIRDS:
        for arm, runs in by_arm.items():
            groups = [g for run in runs for g in run.by_stratum.groups if g.name == stratum]
            if groups:
                lines.append({"arm": arm, "stratum": stratum, "first": arm == next(iter(by_arm))} | _row(groups))
    return lines


def _row(groups: Sequence[Group]) -> dict[str, str]:
    row = {name: drawing.mean((getattr(g, name) for g in groups), digits) for name, digits in _MEANS.items()}
    for name in ("log2_ratio", "overconfidence"):
        row[name] = drawing.spread(score.score for score in _scores(groups, name))
    for name in ("group_error", "top_error"):
        row[name] = drawing.mean(score.score for score in _scores(groups, name))
        row[f"{name}_floor"] = drawing.mean(score.floor for score in _scores(groups, name))
    return row


def differences(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and stratum: arm minus reference."""
    return [
        {"arm": t["arm"], "stratum": t["stratum"]}
        | {name: numbers.spread(t[name], 4 if name == "target_probability" else 3) for name in SCORES}
        for t in results["calibration"]["twins"]
    ]


def overall(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm, all positions: loss, entropy, calibration error of the likeliest token beside its floor."""
    lines = []
    for arm, runs in _by_arm(results).items():
        by_seed = [run.by_stratum for run in runs]
        line = {
            name: drawing.spread(getattr(run, name).mean for run in by_seed) for name in ("loss", "entropy", "accuracy")
        }
        line["top_error"] = drawing.spread((run.top_error.score for run in by_seed), 4)
        line["floor"] = drawing.mean((run.top_error.floor for run in by_seed), 4)
        lines.append({"arm": arm} | line)
    return lines


def _scores(groups: Sequence[Group], name: str) -> list[Score]:
    return [getattr(group, name) for group in groups]


def _by_arm(results: drawing.Results) -> dict[str, list[RunCalibration]]:
    return drawing.by_run(plain_json.measured(results["calibration"]["runs"], RunCalibration))


def _curves(score: str, positions: str, label: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    """A score by frequency bin, over the bins that hold enough positions in every run; grey: a calibrated model's."""

    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        noise: dict[float, list[float]] = {}
        for arm, runs in _by_arm(results).items():
            log_counts, means, halves = [], [], []
            for bins in _by_bin(runs):
                if min(getattr(b, positions) for b in bins) < _LEAST_POSITIONS or len(bins) < len(runs):
                    continue
                log_counts.append(float(np.mean([b.log_count for b in bins])))
                scores = _scores(bins, score)
                span = interval(s.score for s in scores)
                means.append(span.mean)
                halves.append(span.half_width or 0.0)
                noise.setdefault(log_counts[-1], []).append(interval(s.floor_deviation for s in scores).mean or 0.0)
            colour = drawing.colours(results)[arm]
            ax.errorbar(log_counts, means, halves, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=arm)
        ends = sorted(noise)
        band = np.array([2 * max(noise[x]) for x in ends])
        ax.fill_between(ends, -band, band, color=drawing.MUTED, alpha=0.2, linewidth=0)
        ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="calibrated")
        if ends:
            ax.set_xticks(np.arange(np.floor(2 * ends[0]), np.ceil(2 * ends[-1]) + 1) / 2)
        ax.set_xlabel("log10(count as target + 1)")
        ax.set_ylabel(label)
        ax.set_title(title)

    return draw


def _by_bin(runs: Sequence[RunCalibration]) -> Iterator[list[Group]]:
    bins = [b for run in runs for b in run.by_bin.groups]
    for name in dict.fromkeys(b.name for b in bins):
        yield [b for b in bins if b.name == name]
