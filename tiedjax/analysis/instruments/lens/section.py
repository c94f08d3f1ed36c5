"""Lenses: what each layer already predicts, tied against untied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json, published
from tiedjax.analysis.basis.held_out import record_of
from tiedjax.analysis.basis.ngrams import PREDICTORS
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.twins import twins
from tiedjax.analysis.instruments.lens import lens
from tiedjax.analysis.instruments.lens.lens import RunLens, State, early_states
from tiedjax.analysis.instruments.lens.training import CRITERION

QUANTITIES = {f"{lens}_{score}": (lens, score) for lens in ("tuned", "logit") for score in ("kl", "cross_entropy")}
VERSION = 3  # of its part of results.json


def collect(study: StudyRuns, seed: int) -> list[dict[str, Any]]:
    """Every run of one seed through the lenses."""
    return [
        {"arm": arm, "seed": s} | record_of(study, run, lens.measure)
        for (arm, s), run in study.runs.items()
        if s == seed
    ]


def together(reference: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collect` gave for every seed, and the differences between twins, paired by seed."""
    return {"criterion": CRITERION, "runs": list(runs), "twins": list(_twins(reference, runs))}


def _twins(reference_arm: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference at every state."""
    for pair in twins(reference_arm, runs, RunLens):
        states = next(iter(pair.subject.values())).states
        for state, named_state in enumerate(states):
            record: dict[str, Any] = {"arm": pair.arm, "state": state, "name": named_state.name}
            record["early"] = state in early_states(len(states) - 1)
            for name, (lens_name, score) in QUANTITIES.items():
                quantity = partial(_state_score, state=state, lens_name=lens_name, score=score)
                record[name] = to_plain(pair.difference(quantity))
            record["beyond_last"] = to_plain(pair.difference(partial(_above_last, state=state)))
            yield record


def _score(state: State, lens_name: str, score: str) -> float | None:
    """A state's KL or cross-entropy through one of the lenses, in bits."""
    span: Interval = getattr(getattr(state, lens_name), score)
    return span.mean


def _state_score(run: RunLens, state: int, lens_name: str, score: str) -> float | None:
    return _score(run.states[state], lens_name, score)


def _above_last(run: RunLens, state: int) -> float | None:
    """How much worse at the next token a state's tuned lens is than the model in the end."""
    state_bits, last_bits = (_state_score(run, at, "tuned", "cross_entropy") for at in (state, -1))
    return None if state_bits is None or last_bits is None else state_bits - last_bits


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures; none where nothing was measured."""
    if _measured_runs(results):
        yield drawing.Plot("lens", [_divergence, _cross_entropy])
        yield drawing.Plot("lens_paper", [_published_curves, _published_form])
    if results["lens"]["twins"]:
        yield drawing.Plot("lens_twins", [_difference("kl", "KL"), _difference("cross_entropy", "cross-entropy")])


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["lens"]["runs"])


def sentences(results: drawing.Results) -> list[str]:
    """For the baseline arm, one sentence per state: does it differ from the reference there?"""
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    lines = []
    for twin in results["lens"]["twins"]:
        if twin["arm"] != arm or not any(twin["tuned_kl"][end] for end in ("mean", "low", "high")):
            continue  # the last state, which is read as it is
        place = "At the input" if twin["state"] == 0 else f"After {twin['name']}"
        parts = [
            f"{title} {_difference_in_words(twin[name], reference)}"
            for name, title in [("tuned_kl", "divergence"), ("tuned_cross_entropy", "cross-entropy")]
        ]
        lines.append(f"{place}, the {arm} lens’s {' and its '.join(parts)}.")
    return lines


def _difference_in_words(span: Mapping[str, Any], reference: str) -> str:
    size = numbers.spread(span)
    if span["low"] is None:
        return f"differs from {reference}’s by {size} bits (one seed)"
    if span["low"] > 0:
        return f"is higher than {reference}’s by {size} bits"
    if span["high"] < 0:
        return f"is lower than {reference}’s by {size.removeprefix('−')} bits"
    return f"differs from {reference}’s by {size} bits, undecided"


def verdict(results: drawing.Results) -> list[str]:
    """Whether tying hurts early layers, in the paper's sense (a higher divergence there) and in the next token's.

    As the study's statements say, which are tested together.
    """
    arm = results["headline"]["arm"]
    early = [t for t in results["lens"]["twins"] if t["arm"] == arm and t["early"]]
    if not early or any(t["tuned_kl"]["low"] is None for t in early):
        return []
    farther, worse = (
        _places_in_words(
            {t["name"]: results["statements"][f"{arm}_lens_{claim}_at_{t['state']}"]["verdict"] for t in early}, *sides
        )
        for claim, *sides in [
            ("farther", "farther from the final prediction", "nearer to it"),
            ("worse", "behind at the next token by more than in the end", "by less"),
        ]
    )
    states = " and ".join(t["name"] for t in early)
    twins = f"{results['headline']['reference']} twins"
    return [f"In the first third ({states}), {arm} lenses are {farther} than those of the {twins}, and {worse}."]


def _places_in_words(verdicts: Mapping[str, str], higher: str, lower: str) -> str:
    """Where among the early states, of which there are these verdicts, the twins differ measurably, and which way."""
    sides = [
        (side, [name for name, verdict in verdicts.items() if verdict == wanted])
        for side, wanted in [(higher, "holds"), (lower, "the opposite")]
    ]
    placed = [f"{side} at {' and '.join(names)}" for side, names in sides if names]
    return " but ".join(placed) or f"nowhere measurably {higher}"


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and state: tuned lens, logit lens and the published reading, over seeds."""
    lines = []
    for arm, runs in _by_arm(results).items():
        for state, named_state in enumerate(runs[0].states):
            line: dict[str, Any] = {"arm": arm, "name": named_state.name, "first": not state}
            for name, quantity in (QUANTITIES | {"published_kl": ("published", "kl")}).items():
                line[name] = drawing.spread(_score(run.states[state], *quantity) for run in runs)
            lines.append(line)
    return lines


def baselines(results: drawing.Results) -> list[dict[str, str]]:
    """What predicting without a model costs, over runs."""
    runs = _measured_runs(results)
    return [{"name": name, "bits": numbers.number(_bits(runs, name))} for name in PREDICTORS] if runs else []


def training(results: drawing.Results) -> str:
    """How the translators were fitted, in one sentence."""
    runs = _measured_runs(results)
    fits = [(state.fit, _score(state, "tuned", "kl")) for run in runs for state in run.states if state.fit]
    if not fits:
        return ""
    converged = sum(fit.converged for fit, _ in fits)
    gap = interval(held_out_kl - fit.training_kl for fit, held_out_kl in fits if held_out_kl is not None).mean
    most = max(fit.iterations for fit, _ in fits)
    return (
        f"Fitted on {runs[0].training_tokens:,} tokens of training text, scored on {runs[0].held_out_tokens:,} "
        f"held-out ones. {converged} of {len(fits)} translators converged ({results['lens']['criterion']}), after at "
        f"most {most} iterations; their divergence is on average {numbers.number(gap)} bits higher on held-out text."
    )


def _bits(runs: Sequence[RunLens], name: str) -> float:
    """What a predictor without a model costs, over runs."""
    beside = [run.baselines for run in runs]
    is_reading = name in ("uniform", "unigram")
    spans = [getattr(b, name).cross_entropy if is_reading else getattr(b, f"{name}_cross_entropy") for b in beside]
    return float(np.mean([span.mean for span in spans]))


def _by_arm(results: drawing.Results) -> dict[str, list[RunLens]]:
    return drawing.by_run(plain_json.measured(results["lens"]["runs"], RunLens))


def _measured_runs(results: drawing.Results) -> list[RunLens]:
    return [run for runs in _by_arm(results).values() for run in runs]


def _curve(runs: Sequence[RunLens], lens_name: str, score: str) -> np.ndarray:
    """Mean over seeds at every state."""
    curves = [drawing.floats([_score(state, lens_name, score) for state in run.states]) for run in runs]
    return np.asarray(np.mean(curves, axis=0))


def _divergence(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, runs in _by_arm(results).items():
        colour = drawing.colours(results)[arm]
        for run in runs:
            ax.plot(_curve([run], "tuned", "kl"), color=colour, linewidth=0.6, alpha=0.4)
        ax.plot(_curve(runs, "tuned", "kl"), color=colour, marker="o", markersize=3.5, label=arm)
    _state_axis(ax, results)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title("tuned lens to final prediction")


def _cross_entropy(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, runs in _by_arm(results).items():
        colour = drawing.colours(results)[arm]
        ax.plot(_curve(runs, "tuned", "cross_entropy"), color=colour, marker="o", markersize=3.5)
        ax.plot(_curve(runs, "logit", "cross_entropy"), color=colour, linestyle=(0, (1, 1.5)), linewidth=1.4)
    all_runs = _measured_runs(results)
    for name in PREDICTORS:
        bits = _bits(all_runs, name)
        ax.axhline(bits, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        side = {"bigram": "bottom", "trigram": "top"}.get(name, "center")  # these two lie near one another
        beyond_edge = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}  # of all curves
        ax.annotate(name, (1, bits), (3, 0), **beyond_edge, va=side, color=drawing.MUTED)
    _state_axis(ax, results)
    low = min(_curve(all_runs, "tuned", "cross_entropy").min(), _bits(all_runs, "trigram"))
    ax.set_ylim(low - 0.7, _bits(all_runs, "uniform") + 0.6)
    ax.set_ylabel("bits per held-out token")
    ax.set_title("next token; dotted: logit lens")


def _difference(score: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        arms = list(drawing.by_arm(results["lens"]["twins"]))
        for i, (arm, differences) in enumerate(arms):
            spans = [t[f"tuned_{score}"] for t in differences]
            places = np.arange(len(differences)) + 0.08 * (i - (len(arms) - 1) / 2)
            mean = drawing.floats([s["mean"] for s in spans])
            half = [0.0 if s["low"] is None else (s["high"] - s["low"]) / 2 for s in spans]
            colour = drawing.colours(results)[arm]
            ax.errorbar(places, mean, half, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=arm)
        ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        _state_axis(ax, results)
        ax.set_ylabel("difference, bits")
        ax.set_title(f"tuned {title} less {results['headline']['reference']}’s")

    return draw


def _published_curves(ax: drawing.Axes, results: drawing.Results) -> None:
    head, colours = results["headline"], drawing.colours(results)
    for name, arm in [("untied", head["reference"]), ("tied", head["arm"])]:
        values = published.LENS[name]
        colour = colours.get(arm, drawing.MUTED)
        ax.plot(values, color=colour, marker="o", markersize=3, label=name if arm not in colours else None)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("state (0: input)")
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title(f"published: {published.LENS_PAIR.split(';')[0].replace(' and ', ', ')}")


def _published_form(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, runs in _by_arm(results).items():
        colour = drawing.colours(results)[arm]
        ax.plot(_curve(runs, "published", "kl"), color=colour, marker="o", markersize=3, label=arm)
        ax.plot(_curve(runs, "tuned", "kl"), color=colour, linestyle=drawing.DASHES, linewidth=1.2)
    _state_axis(ax, results)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title("here, read the same way; dashed: corrected")


def _state_axis(ax: drawing.Axes, results: drawing.Results) -> None:
    last = max(len(run.states) for run in _measured_runs(results)) - 1
    spacing = max(1, last // 8)
    ax.set_xticks(range(0, last + 1, spacing), ["input", *(f"{i}" for i in range(spacing, last + 1, spacing))])
    ax.set_xlabel("after layer")
