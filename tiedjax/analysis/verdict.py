"""From comparisons to verdicts: means over seeds, margins, changes, and which statements hold.

A statement holds when its margin is above 0 by more than half the width of its interval over seeds. One seed has no
interval, so nothing can be said to hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiedjax.analysis.gradients import EARLY, GradientFlow, Window
from tiedjax.analysis.statistics import CONFIDENCE, Interval, interval, paired
from tiedjax.config import StudyConfig

FIT = "orthogonal"  # of the headline and the statements: it compares shapes of tables and cannot shrink anything
MEASURES = ("score", "floor", "corrected", "held_out")  # of every comparison
Records = Sequence[Mapping[str, Any]]


def by_seed(records: Records, field: str, **where: Any) -> dict[int, float | None]:
    """Seed: value of `field`, of the records that match `where`."""
    return {r["seed"]: r[field] for r in records if all(r[name] == value for name, value in where.items())}


def arm_summary(arm: str, final: Records, flows: Mapping[int, GradientFlow]) -> dict[str, Any]:
    """An arm's alignment (subject role, vs_input or vs_output, fit) and gradient shares, as intervals over seeds."""
    alignment: dict[str, Any] = {}
    for record in final:
        if record["arm"] != arm:
            continue
        where = {k: record[k] for k in ("arm", "subject_role", "reference_role", "fit")}
        place = alignment.setdefault(record["subject_role"], {}).setdefault(f"vs_{record['reference_role']}", {})
        place[record["fit"]] = {name: interval(by_seed(final, name, **where).values()) for name in MEASURES} | {
            "by_seed": by_seed(final, "corrected", **where),
            "floor_closed_form": record["floor_closed_form"],
        }
    margins = {
        role: {fit: paired(*_both(final, "corrected", arm, role, fit)) for fit in found["vs_output"]}
        for role, found in alignment.items()
        if {"vs_input", "vs_output"} <= set(found)
    }
    return {
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
    found: dict[str, Any] = {}
    names = ("arm", "subject_role", "reference_role", "fit")
    for key in dict.fromkeys(tuple(r[name] for name in names) for r in records):
        where = dict(zip(names, key, strict=True))
        arm, subject, target, fit = key
        cell: dict[str, Any] = {"by_seed": by_seed(records, "corrected", **where)}
        for name in MEASURES:
            known = [v for v in by_seed(records, name, **where).values() if v is not None]
            mean = sum(known) / len(known) if known else None
            cell[name] = Interval(mean, None, None, len(known), CONFIDENCE)
        found.setdefault(arm, {}).setdefault(subject, {}).setdefault(f"vs_{target}", {})[fit] = cell
    return found


def headline(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Any]:
    """The baseline arm in four numbers: nearness to either reference table, the margin, the early gradient share."""
    arm = study.baseline
    output, input_ = _both(final, "corrected", arm, "shared", FIT)
    own = by_seed(final, "corrected", arm=study.reference, reference_role="input", fit=FIT)
    beyond = dict(zip(("output", "input"), _both(final, "beyond_frequency", arm, "shared", FIT), strict=True))
    return {
        "arm": arm,
        "reference": study.reference,
        "fit": FIT,
        "measure": "corrected",
        "vs_output": interval(output.values()),
        "vs_input": interval(input_.values()),
        "margin": paired(output, input_),
        "beyond_frequency": {
            "vs_output": interval(beyond["output"].values()),
            "vs_input": interval(beyond["input"].values()),
            "margin": paired(beyond["output"], beyond["input"]),
        },
        "reference_input_vs_output": interval(own.values()),
        "early_output_share": arms[arm]["early_output_share"] if arm in arms else interval([]),
        "early_steps": list(EARLY),
    }


def changes(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Any]:
    """Per intervention arm: how the corrected scores differ from the baseline arm's, paired by seed, per fit."""
    found: dict[str, Any] = {}
    for arm in _interventions(study, arms):
        fits = arms[arm]["alignment"]["shared"]["vs_output"]
        found[arm] = {
            f"vs_{role}": {fit: _change(study, final, arm, role, fit) for fit in fits} for role in ("input", "output")
        }
    return found


def statements(study: StudyConfig, arms: Mapping[str, Any], final: Records) -> dict[str, Any]:
    """Name: {claim, holds, margin, interval, n, note} of everything the study set out to see."""
    arm, reference = study.baseline, study.reference
    head = headline(study, arms, final)
    share = head["early_output_share"]
    first, last = EARLY
    found = {
        f"{arm}_nearer_output": statement(
            f"{arm} is nearer to the output table of {reference} than to its input table",
            head["margin"],
        ),
        f"{arm}_output_dominates_early": statement(
            f"the output role has the larger share of the norms of {arm}'s table gradient over steps {first} to {last}",
            affine(share, 1.0, -0.5),
        ),
    }
    for other in _interventions(study, arms):
        for verb, role, sign in [("lowers", "output", -1.0), ("raises", "input", 1.0)]:
            change = _change(study, final, other, role, FIT)
            claim = f"{other} {verb} the nearness to the {role} table of {reference}, against {arm}"
            found[f"{other}_{verb}_vs_{role}"] = statement(claim, affine(change, sign, 0.0))
    return found


def _both(final: Records, field: str, arm: str, role: str, fit: str) -> tuple[dict[int, Any], dict[int, Any]]:
    where = {"arm": arm, "subject_role": role, "fit": fit}
    return by_seed(final, field, reference_role="output", **where), by_seed(
        final, field, reference_role="input", **where
    )


def _interventions(study: StudyConfig, arms: Mapping[str, Any]) -> list[str]:
    """Arms with one shared table besides the reference and the baseline; none when the baseline has two tables."""
    shared = [arm for arm, summary in arms.items() if "shared" in summary["alignment"]]
    if study.baseline not in shared:
        return []
    return [arm for arm in shared if arm not in (study.reference, study.baseline)]


def _change(study: StudyConfig, final: Records, arm: str, role: str, fit: str) -> Interval:
    where = {"subject_role": "shared", "reference_role": role, "fit": fit}
    return paired(
        by_seed(final, "corrected", arm=arm, **where), by_seed(final, "corrected", arm=study.baseline, **where)
    )


def affine(span: Interval, factor: float, shift: float) -> Interval:
    """The interval of factor * x + shift."""
    if span.mean is None:
        return span
    mean = factor * span.mean + shift
    if span.low is None or span.high is None:
        return Interval(mean, None, None, span.n, span.confidence)
    ends = sorted(factor * end + shift for end in (span.low, span.high))
    return Interval(mean, ends[0], ends[1], span.n, span.confidence)


def statement(claim: str, margin: Interval) -> dict[str, Any]:
    """Whether a claim holds whose margin is positive if it is true: {claim, holds, margin, interval, n, note}."""
    note = None
    if margin.n == 0:
        note = "not measured"
    elif margin.low is None:
        note = "one seed: no interval, so it cannot be said to hold"
    return {
        "claim": claim,
        "holds": margin.mean is not None and margin.mean > 0 and margin.excludes_zero,
        "margin": margin.mean,
        "interval": None if margin.low is None else [margin.low, margin.high],
        "half_width": margin.half_width,
        "confidence": margin.confidence,
        "n": margin.n,
        "note": note,
    }


def _windows(flows: Sequence[GradientFlow]) -> list[dict[str, Any]]:
    """Means over each window of steps, per seed and then over seeds, of the windows that every run has."""
    spans: dict[tuple[int, int], list[Window]] = {}
    for flow in flows:
        for window in flow.windows:
            spans.setdefault((window.first, window.last), []).append(window)
    return [
        {"first": first, "last": last, "output_share": interval(w.output_share for w in found)}
        for (first, last), found in spans.items()
        if len(found) == len(flows)
    ]
