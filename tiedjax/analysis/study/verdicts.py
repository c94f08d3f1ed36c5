"""From comparisons to verdicts: means over seeds, margins, changes, and which statements hold.

A statement holds where the interval of its margin over seeds lies above 0, at the level that Holm's method gives it
among all statements of the study. One seed has no interval, so it decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tiedjax.analysis.basis.statistics import CONFIDENCE, Interval, holm_levels, interval, paired
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.analysis.instruments.gradients.gradients import EARLY, GradientFlow, Window
from tiedjax.config import StudyConfig
from tiedjax.tying import SHARED

FIT = "orthogonal"  # of the headline and the statements: it compares shapes of tables and cannot shrink anything
MAIN = "beyond_frequency"  # the score above what tokens of like frequency share by chance: of headline and statements
MEASURES = ("score", "floor", "corrected", MAIN, "held_out")  # of every comparison
EDGE = 2.0  # a verdict whose p is within this factor of its level could be another one with other last bits
Records = Sequence[Mapping[str, Any]]
BySeed = dict[int, float | None]


@dataclass(frozen=True)
class Statement:
    """A claim, and a quantity over seeds that is above 0 if it is true."""

    claim: str
    margin: Interval


def by_seed(records: Records, field: str, **where: Any) -> BySeed:
    """Seed: value of `field`, of the records that match `where`."""
    return {r["seed"]: r[field] for r in records if all(r[name] == value for name, value in where.items())}


def arm_summary(
    arm: str,
    final: Records,
    flows: Mapping[int, GradientFlow],
    losses: Mapping[int, float | None],
    baseline_losses: Mapping[int, float | None],
    reference_losses: Mapping[int, float | None],
) -> dict[str, Any]:
    """An arm's alignment (subject role, vs_input or vs_output, fit), gradient shares and held-out losses by seed.

    All as intervals over seeds; losses in nats per token, against the baseline's and the reference's paired by seed.
    """
    alignment: dict[str, Any] = {}
    for record in final:
        if record["arm"] != arm:
            continue
        where = {k: record[k] for k in ("arm", "subject_role", "reference_role", "fit")}
        place = alignment.setdefault(record["subject_role"], {}).setdefault(f"vs_{record['reference_role']}", {})
        place[record["fit"]] = {name: interval(by_seed(final, name, **where).values()) for name in MEASURES} | {
            "by_seed": by_seed(final, MAIN, **where),
            "floor_closed_form": record["floor_closed_form"],
        }
    margins = {
        role: {fit: paired(*_output_and_input(final, MAIN, arm, role, fit)) for fit in targets["vs_output"]}
        for role, targets in alignment.items()
        if {"vs_input", "vs_output"} <= set(targets)
    }
    return {
        "eval_loss": interval(losses.values()),
        "eval_loss_against_baseline": paired(losses, baseline_losses),
        "eval_loss_against_reference": paired(losses, reference_losses),
        "alignment": alignment,
        "margin": margins,
        "early_output_share": interval(flow.early.output_share for flow in flows.values()),
        "overall_output_share": interval(flow.overall.output_share for flow in flows.values()),
        "output_share_windows": _windows(list(flows.values())),
    }


def between_seeds(records: Records) -> dict[str, Any]:
    """Arm, subject role, vs_input or vs_output, fit: scores against reference runs of other seeds, without interval.

    Pairs of seeds share runs, so they are no independent sample.
    """
    cells: dict[str, Any] = {}
    names = ("arm", "subject_role", "reference_role", "fit")
    for key in dict.fromkeys(tuple(r[name] for name in names) for r in records):
        where = dict(zip(names, key, strict=True))
        arm, subject, target, fit = key
        cell: dict[str, Any] = {"by_seed": by_seed(records, MAIN, **where)}
        for name in MEASURES:
            values = [v for v in by_seed(records, name, **where).values() if v is not None]
            mean = sum(values) / len(values) if values else None
            cell[name] = Interval(mean, None, None, len(values), CONFIDENCE)
        cells.setdefault(arm, {}).setdefault(subject, {}).setdefault(f"vs_{target}", {})[fit] = cell
    return cells


def headline(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Any]:
    """The baseline arm in four numbers: nearness to either reference table, the margin, the early gradient share."""
    arm = study.baseline
    output, input_ = _output_and_input(final, MAIN, arm, SHARED, FIT)
    any_output, any_input = _output_and_input(final, "corrected", arm, SHARED, FIT)
    of_reference = by_seed(final, MAIN, arm=study.reference, reference_role="input", fit=FIT)
    return {
        "arm": arm,
        "reference": study.reference,
        "fit": FIT,
        "measure": MAIN,
        "vs_output": interval(output.values()),
        "vs_input": interval(input_.values()),
        "margin": paired(output, input_),
        "frequency_not_controlled": {
            "vs_output": interval(any_output.values()),
            "vs_input": interval(any_input.values()),
            "margin": paired(any_output, any_input),
        },
        "reference_input_vs_output": interval(of_reference.values()),
        "early_output_share": arms[arm]["early_output_share"] if arm in arms else interval([]),
        "early_steps": list(EARLY),
    }


def changes(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Any]:
    """Per intervention arm: how its nearness differs from the baseline arm's, paired by seed, per fit."""
    by_arm: dict[str, Any] = {}
    for arm in _interventions(study, arms):
        fits = next(iter(arms[arm]["alignment"][SHARED].values()))
        by_arm[arm] = {f"vs_{role}": {fit: _change(study, final, arm, role, fit) for fit in fits} for role in ROLES}
    return by_arm


def statements(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Statement]:
    """By name, everything the study set out to see."""
    arm, reference = study.baseline, study.reference
    head = headline(study, arms, final)
    share = head["early_output_share"]
    first, last = EARLY
    made = {
        f"{arm}_nearer_output": Statement(
            f"{arm} is nearer to the output table of {reference} than to its input table", head["margin"]
        ),
        f"{arm}_output_dominates_early": Statement(
            f"the output role has the larger share of the norms of {arm}'s table gradient over steps {first} to {last}",
            affine(share, 1.0, -0.5),
        ),
    }
    for other in _interventions(study, arms):
        claim = f"{other} is nearer to the output table of {reference} than to its input table"
        made[f"{other}_nearer_output"] = Statement(claim, paired(*_output_and_input(final, MAIN, other, SHARED, FIT)))
        for verb, role, sign in [("lowers", "output", -1.0), ("raises", "input", 1.0)]:
            change = _change(study, final, other, role, FIT)
            claim = f"{other} {verb} the nearness to the {role} table of {reference}, against {arm}"
            made[f"{other}_{verb}_vs_{role}"] = Statement(claim, affine(change, sign, 0.0))
    for other in arms:
        if other != arm:
            claim = f"{other} has a higher held-out loss than {arm} (nats per token)"
            made[f"{other}_costs_loss"] = Statement(claim, arms[other]["eval_loss_against_baseline"])
        alike = ["has as many parameters"] * (other in study.equal_parameters)
        alike += ["takes as many FLOPs"] * (other in study.equal_flops)
        if alike:
            claim = f"{other} has a higher held-out loss than {reference}, which {' and '.join(alike)} (nats per token)"
            made[f"{other}_against_{reference}"] = Statement(claim, arms[other]["eval_loss_against_reference"])
    return made


def share_statements(study: StudyConfig, shares: Mapping[str, Any]) -> dict[str, Statement]:
    """By name, of every arm with one table: with which of the reference's tables it shares more of what repeats.

    `shares` is `reproducible_share` of results.json.
    """
    return {
        f"{arm}_shares_more_with_output": Statement(
            f"{arm} shares more with the output table of {study.reference} than with its input table, of what training "
            "repeats over seeds",
            Interval(**roles[SHARED]["margin"]),
        )
        for arm, roles in shares.items()
        if SHARED in roles
    }


def decided(made: Mapping[str, Statement]) -> dict[str, dict[str, Any]]:
    """Name: {claim, verdict, margin, interval, p, level, near_edge, n} of every statement that was measured.

    The verdict is holds, the opposite or undecided: whether the interval of the margin lies above 0, below 0 or around
    it. Its confidence is 1 - level, the level at which Holm's method tests this statement among all of them, and None
    stands for what needs more than one seed. A verdict is near the edge where p is within a factor of EDGE of the
    level.
    """
    measured = {name: statement for name, statement in made.items() if statement.margin.mean is not None}
    tested = {name: p for name, statement in measured.items() if (p := statement.margin.p_value) is not None}
    levels = dict(zip(tested, holm_levels(list(tested.values())), strict=True))
    return {name: _decided(statement, tested.get(name), levels.get(name)) for name, statement in measured.items()}


def _decided(statement: Statement, p: float | None, level: float | None) -> dict[str, Any]:
    margin = statement.margin if level is None else statement.margin.at(1 - level)
    verdict = "undecided"
    if p is not None and level is not None and margin.mean is not None and p < level:
        verdict = "holds" if margin.mean > 0 else "the opposite"
    return {
        "claim": statement.claim,
        "verdict": verdict,
        "margin": margin.mean,
        "interval": None if margin.low is None else [margin.low, margin.high],
        "p": p,
        "level": level,
        "near_edge": p is not None and level is not None and level / EDGE < p < level * EDGE,
        "n": margin.n,
    }


def _output_and_input(final: Records, field: str, arm: str, role: str, fit: str) -> tuple[BySeed, BySeed]:
    """A table's scores with the reference's output table, and with its input table."""
    score = partial(by_seed, final, field, arm=arm, subject_role=role, fit=fit)
    return score(reference_role="output"), score(reference_role="input")


def _interventions(study: StudyConfig, arms: Mapping[str, Any]) -> list[str]:
    """Arms with one shared table besides the reference and the baseline; none when the baseline has two tables."""
    shared = [arm for arm, summary in arms.items() if SHARED in summary["alignment"]]
    if study.baseline not in shared:
        return []
    return [arm for arm in shared if arm not in (study.reference, study.baseline)]


def _change(study: StudyConfig, final: Records, arm: str, role: str, fit: str) -> Interval:
    where = {"subject_role": SHARED, "reference_role": role, "fit": fit}
    return paired(by_seed(final, MAIN, arm=arm, **where), by_seed(final, MAIN, arm=study.baseline, **where))


def affine(span: Interval, factor: float, shift: float) -> Interval:
    """The interval of factor * x + shift."""
    if span.mean is None:
        return span
    mean = factor * span.mean + shift
    if span.low is None or span.high is None:
        return Interval(mean, None, None, span.n, span.confidence)
    ends = sorted(factor * end + shift for end in (span.low, span.high))
    return Interval(mean, ends[0], ends[1], span.n, span.confidence)


def _windows(flows: Sequence[GradientFlow]) -> list[dict[str, Any]]:
    """Means over each window of steps, per seed and then over seeds, of the windows that every run has."""
    spans: dict[tuple[int, int], list[Window]] = {}
    for flow in flows:
        for window in flow.windows:
            spans.setdefault((window.first, window.last), []).append(window)
    return [
        {"first": first, "last": last, "output_share": interval(window.output_share for window in windows)}
        for (first, last), windows in spans.items()
        if len(windows) == len(flows)
    ]
