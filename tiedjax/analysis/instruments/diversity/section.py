"""Diversity: how varied what each arm's model writes is, tied against untied, and beside held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.held_out import record_of
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.twins import twins
from tiedjax.analysis.instruments.diversity.diversity import RunDiversity, measure

VARIETY = ("distinct_1", "distinct_2", "distinct_3", "entropy")
# What twins are compared by: held-out text is as varied for both.
QUANTITIES = {
    "written": (*VARIETY, "prediction_entropy"),
    "held_out": ("prediction_entropy", "cross_entropy"),
}


def collect(study: StudyRuns) -> dict[str, Any]:
    """Every run, and the differences between twins, paired by seed."""
    runs = [{"arm": arm, "seed": seed} | record_of(study, run, measure) for (arm, seed), run in study.runs.items()]
    return {"runs": runs, "twins": list(_twins(study.study.reference, runs))}


def _twins(reference_arm: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference."""
    for pair in twins(reference_arm, runs, RunDiversity):
        yield {"arm": pair.arm} | {
            text: {name: to_plain(pair.difference(partial(_mean, text=text, name=name))) for name in names}
            for text, names in QUANTITIES.items()
        }


def _mean(run: RunDiversity, text: str, name: str) -> float | None:
    """One number of what was written or of held-out text; of what has an interval over texts the mean."""
    value: Interval | float | None = getattr(getattr(run, text), name)
    return value.mean if isinstance(value, Interval) else value


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["diversity"]["runs"])


def answers(results: drawing.Results) -> list[str]:
    """What the baseline arm writes, beside what its twins write and beside held-out text; how far it predicts."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    twin = next((twin for twin in results["diversity"]["twins"] if twin["arm"] == arm), None)
    if twin is None:
        return []
    writes, unit = f"what {arm} writes is", "in distinct-2"
    beside = vars(interval(_less_held_out(run) for run in _by_arm(results)[arm]))
    spreads = f"on held-out text {arm} spreads its predictions", f"than {reference}", "bits of entropy a token"
    return [
        numbers.compared(twin["written"]["distinct_2"], writes, f"varied than what {reference} writes", unit),
        numbers.compared(beside, writes, "varied than as much held-out text", unit),
        numbers.compared(twin["held_out"]["prediction_entropy"], *spreads),
    ]


def _less_held_out(run: RunDiversity) -> float | None:
    """distinct_2 of what is written less that of held-out text."""
    written, held_out = run.written.distinct_2, run.held_out.distinct_2
    return None if written is None or held_out is None else written - held_out


def about(results: drawing.Results) -> list[str]:
    """How many texts there are and how long they are; nothing where nothing was measured."""
    runs = [run for runs in _by_arm(results).values() for run in runs]
    if not runs:
        return []
    texts, tokens = numbers.ends([run.texts for run in runs]), numbers.ends([run.tokens for run in runs])
    return [f"Each run writes {texts} texts of {tokens} tokens, beside as many held-out windows of that length."]


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm, over seeds: what it writes, and what it predicts."""
    return [
        {"arm": arm}
        | {
            text: {name: drawing.spread(_mean(run, text, name) for run in runs) for name in names}
            for text, names in QUANTITIES.items()
        }
        for arm, runs in _by_arm(results).items()
    ]


def held_out(results: drawing.Results) -> dict[str, str]:
    """How varied held-out text is: means over runs."""
    runs = [run for runs in _by_arm(results).values() for run in runs]
    return {name: drawing.mean(_mean(run, "held_out", name) for run in runs) for name in VARIETY}


def differences(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm: arm minus reference."""
    return [
        {"arm": twin["arm"]}
        | {text: {name: numbers.spread(twin[text][name]) for name in names} for text, names in QUANTITIES.items()}
        for twin in results["diversity"]["twins"]
    ]


def _by_arm(results: drawing.Results) -> dict[str, list[RunDiversity]]:
    return drawing.by_run(plain_json.measured(results["diversity"]["runs"], RunDiversity))
