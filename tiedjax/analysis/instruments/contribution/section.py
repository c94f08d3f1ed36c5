"""Contribution: what each block adds to the residual stream, and what text costs without it, tied against untied."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json
from tiedjax.analysis.basis.held_out import record_of
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.twins import twins
from tiedjax.analysis.instruments.contribution.contribution import PARTS, RunContribution, early_blocks, measure

QUANTITIES = ("added", "skip_cost")


def collect(study: StudyRuns) -> dict[str, Any]:
    """Every block of every run, and the differences between twins, paired by seed."""
    runs = [{"arm": arm, "seed": seed} | record_of(study, run, measure) for (arm, seed), run in study.runs.items()]
    return {"runs": runs, "twins": list(_twins(study.study.reference, runs))}


def _twins(reference_arm: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference: each quantity of every block that both have, and of its parts."""
    for pair in twins(reference_arm, runs, RunContribution):
        blocks = min(len(run.blocks) for side in (pair.subject, pair.reference) for run in side.values())
        for block in range(1, blocks + 1):
            record: dict[str, Any] = {"arm": pair.arm, "block": block, "early": block in early_blocks(blocks)}
            for part, quantity in itertools.product(PARTS, QUANTITIES):
                mean = partial(_mean, block=block, part=part, quantity=quantity)
                record.setdefault(part, {})[quantity] = to_plain(pair.difference(mean))
            yield record


def _mean(run: RunContribution, block: int, part: str, quantity: str) -> float | None:
    span: Interval = getattr(getattr(run.blocks[block - 1], part), quantity)
    return span.mean


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure; none where nothing was measured."""
    if _by_arm(results):
        added = _curves("added", "norm added / norm read", "what each block adds")
        cost = _curves("skip_cost", "bits a held-out token", "what skipping it costs")
        yield drawing.Plot("blocks", [added, cost])


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return plain_json.not_measured(results["blocks"]["runs"])


def answers(results: drawing.Results) -> list[str]:
    """Two sentences for each early block: does the baseline arm's contribute less than its twin's?"""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    lines = []
    for twin in results["blocks"]["twins"]:
        if twin["arm"] == arm and twin["early"]:
            block, whole = twin["block"], twin["whole"]
            costs = f"skipping block {block} costs {arm}", f"than {reference}", "bits a held-out token"
            adds = f"block {block} of {arm} adds", f"than {reference}’s", "times the norm of what it reads"
            lines += [numbers.compared(whole["skip_cost"], *costs), numbers.compared(whole["added"], *adds)]
    return lines


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and block, over seeds: what the block and its parts add, and what skipping them costs."""
    lines = []
    for arm, runs in _by_arm(results).items():
        for block in range(1, len(runs[0].blocks) + 1):
            line: dict[str, Any] = {"arm": arm, "block": block, "first": block == 1}
            for part in PARTS:
                line[part] = {
                    quantity: drawing.spread(_mean(run, block, part, quantity) for run in runs)
                    for quantity in QUANTITIES
                }
            lines.append(line)
    return lines


def differences(results: drawing.Results) -> list[dict[str, Any]]:
    """Per arm and block: arm minus reference."""
    lines: list[dict[str, Any]] = []
    for twin in results["blocks"]["twins"]:
        line = {"arm": twin["arm"], "block": twin["block"], "first": twin["block"] == 1}
        spans = {part: {quantity: numbers.spread(twin[part][quantity]) for quantity in QUANTITIES} for part in PARTS}
        lines.append(line | spans)
    return lines


def losses(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm: what a held-out token costs with every block."""
    return [
        {"arm": arm, "bits": drawing.spread(run.loss.mean for run in runs)} for arm, runs in _by_arm(results).items()
    ]


def _by_arm(results: drawing.Results) -> dict[str, list[RunContribution]]:
    return drawing.by_run(plain_json.measured(results["blocks"]["runs"], RunContribution))


def _curves(quantity: str, label: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    """One quantity of whole blocks, arms as lines, with intervals over seeds."""

    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        by_arm = _by_arm(results)
        for i, (arm, runs) in enumerate(by_arm.items()):
            blocks = range(1, len(runs[0].blocks) + 1)
            spans = [interval(_mean(run, block, "whole", quantity) for run in runs) for block in blocks]
            places = np.array(blocks) + 0.06 * (i - (len(by_arm) - 1) / 2)
            means, halves = drawing.floats([s.mean for s in spans]), [s.half_width or 0.0 for s in spans]
            colour = drawing.colours(results)[arm]
            ax.errorbar(places, means, halves, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=arm)
        last = max(len(run.blocks) for runs in by_arm.values() for run in runs)
        ax.set_xticks(range(1, last + 1, max(1, last // 8)))
        # The first block adds and costs several times what the others do; an exact 0 and a gain are to be seen as well.
        ax.set_yscale("symlog", linthresh=0.1, linscale=0.3)
        ax.yaxis.set_major_formatter(drawing.plain_ticks)
        ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        ax.set_xlabel("block")
        ax.set_ylabel(label)
        ax.set_title(title)

    return draw
