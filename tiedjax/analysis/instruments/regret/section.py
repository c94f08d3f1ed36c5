"""Role regret: what the tie costs each role, beside what the same re-fits save untied twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.held_out import record_of
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval, paired
from tiedjax.analysis.basis.strata import THIRDS
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.regret.regret import REGRETS, RunRegret, Saving, measure

SAVINGS = ("own", *REGRETS)


def collect(study: StudyRuns, seed: int) -> list[dict[str, Any]]:
    """Every run of one seed."""
    return [
        {"arm": arm, "seed": s} | record_of(study, run, measure) for (arm, s), run in study.runs.items() if s == seed
    ]


def together(reference: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collect` gave for every seed, and each arm's regrets less those of the reference, paired by seed."""
    return {"runs": list(runs), "twins": list(_twins(reference, runs))}


def _twins(reference: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference, of runs whose re-fits have converged: a difference in differences."""
    by_arm: dict[str, dict[int, RunRegret]] = {}
    for run in plain_json.measured(runs, RunRegret):
        if run.value.converged:
            by_arm.setdefault(run.arm, {})[run.seed] = run.value
    for arm, subject in by_arm.items():
        if arm != reference and subject.keys() & by_arm.get(reference, {}).keys():
            record: dict[str, Any] = {"arm": arm}
            for name in REGRETS:
                subject_saved, reference_saved = (
                    {seed: _saved(run, name) for seed, run in side.items()} for side in (subject, by_arm[reference])
                )
                record[name] = to_plain(paired(subject_saved, reference_saved))
            yield record


def _saving(run: RunRegret, name: str) -> Saving:
    return run.own if name == "own" else run.regrets[name]


def _saved(run: RunRegret, name: str) -> float | None:
    """Nats a held-out token."""
    return _saving(run, name).held_out.mean


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure; none where no run's re-fits have converged."""
    if _by_arm(results):
        yield drawing.Plot("regret", [_draw_roles, _draw_strata])


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["regret"]["runs"])


def not_converged(results: drawing.Results) -> list[str]:
    """A sentence for each arm with runs whose re-fits have not converged."""
    sentences = []
    for arm, runs in drawing.by_run(plain_json.measured(results["regret"]["runs"], RunRegret)).items():
        if unfinished := sum(not run.converged for run in runs):
            sentences.append(
                f"The re-fits of {unfinished} of {len(runs)} {arm} runs have not converged: these have neither balance "
                "nor tension, and do not count here."
            )
    return sentences


def answers(results: drawing.Results) -> list[str]:
    """What the tie costs the baseline arm: the tension, each role's part, the twins, the balance."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    runs = [run for run in _by_arm(results).get(arm, ()) if run.shared]
    if not runs:
        return []
    both, output, input_, own = (
        interval(_saved(run, name) for run in runs) for name in ("both", "output", "input", "own")
    )
    of_arm = [Interval(**twin["both"]) for twin in results["regret"]["twins"] if twin["arm"] == arm]
    trained, balance = (drawing.spread(getattr(run, name) for run in runs) for name in ("trained_balance", "balance"))
    return [
        f"Re-fitting the shared table of {arm} saves {_size(own)} nats a held-out token: what training left undone.",
        _tension(both),
        *(_against_twin(difference, reference) for difference in of_arm),
        f"An output table alone saves {_size(output)} nats, an input table alone {_size(input_)}.",
        f"The cosine of the two roles’ gradients is {trained} as trained and {balance} after the first re-fit; at −1 "
        "each step that helps one role harms the other as much.",
    ]


def _tension(both: Interval) -> str:
    size, apart = _size(both), "a table for each role"
    if both.half_width is not None and not both.excludes_zero:
        return f"Whether {apart} then saves anything is undecided: {size} nats a held-out token."
    if (both.mean or 0) < 0:
        return f"With {apart} a held-out token then costs {_size(both, absolute=True)} nats more, not less."
    return f"With {apart} a held-out token then costs {size} nats less: the tension between the roles."


def _against_twin(difference: Interval, reference: str) -> str:
    size, same = _size(difference, absolute=True), f"the same re-fit saves the {reference} twin"
    if difference.half_width is not None and not difference.excludes_zero:
        return f"Whether that is more than {same} is undecided: the difference is {_size(difference)} nats."
    side = "more" if (difference.mean or 0) > 0 else "less"
    return f"That is {size} nats {side} than {same}."


def _size(span: Interval, *, absolute: bool = False) -> str:
    """A mean with its interval; of one seed, with words that say so."""
    words = numbers.spread(vars(span))
    words = words.removeprefix("−") if absolute else words
    return words if span.half_width is not None else f"{words} (one seed)"


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm, over seeds: what each re-fit saves on held-out text, two of them on the fitting text; the balance."""
    lines = []
    for arm, runs in _by_arm(results).items():
        saved = {name: drawing.spread(_saved(run, name) for run in runs) for name in SAVINGS}
        fitting = {
            f"{name}_fitting": drawing.mean(_saving(run, name).fitting for run in runs) for name in ("own", "both")
        }
        balance = drawing.spread(run.balance for run in runs)
        lines.append({"arm": arm, "runs": str(len(runs)), "balance": balance} | saved | fitting)
    return lines


def differences(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm: arm minus reference."""
    return [
        {"arm": twin["arm"]} | {name: numbers.signed(twin[name]) for name in REGRETS}
        for twin in results["regret"]["twins"]
    ]


def strata_rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per third of the tokens and arm: what each re-fit saves where the target is one of it."""
    by_arm = _by_arm(results)
    return [
        {"stratum": stratum, "arm": arm, "first": arm == next(iter(by_arm))}
        | {name: drawing.spread(_in_stratum(run, name, stratum) for run in runs) for name in SAVINGS}
        for stratum in THIRDS
        for arm, runs in by_arm.items()
    ]


def _in_stratum(run: RunRegret, name: str, stratum: str) -> float | None:
    span = _saving(run, name).strata.get(stratum)
    return None if span is None else span.mean


def about(results: drawing.Results) -> str:
    """On what tables were re-fitted and scored, in a sentence; nothing where no re-fit has converged."""
    runs = [run for runs in _by_arm(results).values() for run in runs]
    if not runs:
        return ""
    most = max(_saving(run, name).iterations for run in runs for name in SAVINGS)
    return (
        f"Re-fitted on {runs[0].fitting_tokens:,} tokens of training text, scored on {runs[0].held_out_tokens:,} "
        f"held-out ones; every row is held where training left it with the weight of {runs[0].hold:,} occurrences; "
        f"{most} iterations of L-BFGS at most."
    )


def _by_arm(results: drawing.Results) -> dict[str, list[RunRegret]]:
    """The runs whose re-fits have converged."""
    runs = plain_json.measured(results["regret"]["runs"], RunRegret)
    return drawing.by_run([run for run in runs if run.value.converged])


def _draw_roles(ax: drawing.Axes, results: drawing.Results) -> None:
    spans = lambda runs: [interval(_saved(run, name) for run in runs) for name in REGRETS]
    _draw(ax, results, spans, ["input alone", "output alone", "both apart"])
    ax.set_ylabel("nats a held-out token")
    ax.set_title("saved after the tables’ own re-fit")


def _draw_strata(ax: drawing.Axes, results: drawing.Results) -> None:
    spans = lambda runs: [interval(_in_stratum(run, "both", stratum) for run in runs) for stratum in THIRDS]
    _draw(ax, results, spans, list(THIRDS))
    ax.set_xlabel("third of the tokens that the target is of")
    ax.set_ylabel("nats a held-out token")
    ax.set_title("both apart, by the target’s frequency")


def _draw(
    ax: drawing.Axes,
    results: drawing.Results,
    spans_of: Callable[[Sequence[RunRegret]], list[Interval]],
    names: Sequence[str],
) -> None:
    """Arms as points with intervals over seeds, side by side at each name."""
    by_arm = _by_arm(results)
    for i, (arm, runs) in enumerate(by_arm.items()):
        spans = spans_of(runs)
        places = np.arange(len(names)) + 0.12 * (i - (len(by_arm) - 1) / 2)
        means, halves = drawing.floats([span.mean for span in spans]), [span.half_width or 0.0 for span in spans]
        ax.errorbar(
            places,
            means,
            halves,
            color=drawing.colours(results)[arm],
            marker="o",
            markersize=4,
            linestyle="none",
            label=arm,
        )
    ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
    ax.set_xticks(range(len(names)), names)
