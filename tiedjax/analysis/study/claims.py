"""What the literature on tied tables claims, put to a study's results: the baseline arm, over seeds.

Each claim is turned into a quantity that is above 0 if it is true; `verdicts` decides it among all statements of the
study.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tiedjax.analysis.basis.plain_json import measured
from tiedjax.analysis.basis.statistics import Interval, interval
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Cooccurrence
from tiedjax.analysis.instruments.norms.norms import Norms
from tiedjax.analysis.study.verdicts import Statement, affine
from tiedjax.tying import SHARED

Results = Mapping[str, Any]


def claims(results: Results) -> dict[str, Statement]:
    """By name, every claim that the results have something to say about."""
    of_layers = [*_early_layers(results), *_early_blocks(results)]
    made = [*of_layers, *_centrality(results), *_calibration(results), *_cooccurrence(results)]
    return {name: Statement(claim, margin) for name, claim, margin in made}


def of_layers_or_calibration(name: str, arm: str) -> bool:
    """Whether a claim about the baseline arm is one on layers or calibration, which early training makes another."""
    kinds = r"lens_(farther|worse)_at_\d+|overconfident_on_frequent|underpredicts_rare"
    return re.fullmatch(f"{re.escape(arm)}_({kinds})", name) is not None


def _early_layers(results: Results) -> Iterator[tuple[str, str, Interval]]:
    """Early layers hurt: the tuned lens of an early state is farther from the final prediction, or from the text."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    for twin in results.get("lens", {}).get("twins", ()):
        if twin["arm"] == arm and twin["early"]:
            where = f"at the input of {arm}" if twin["state"] == 0 else f"after {twin['name']} of {arm}"
            claim = f"the tuned lens {where} is farther from the final prediction than {reference}'s (bits)"
            yield f"{arm}_lens_farther_at_{twin['state']}", claim, Interval(**twin["tuned_kl"])
            claim = (
                f"the tuned lens {where} is worse at the next token than {reference}'s by more than in the end (bits)"
            )
            yield f"{arm}_lens_worse_at_{twin['state']}", claim, Interval(**twin["beyond_last"])


def _early_blocks(results: Results) -> Iterator[tuple[str, str, Interval]]:
    """Early layers contribute less: skipping an early block costs less, and it adds less to the residual stream."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    for twin in results.get("blocks", {}).get("twins", ()):
        if twin["arm"] == arm and twin["early"]:
            block, whole = twin["block"], twin["whole"]
            claim = f"skipping block {block} costs {arm} less than {reference} (bits)"
            yield f"{arm}_block_{block}_costs_less", claim, affine(Interval(**whole["skip_cost"]), -1.0, 0.0)
            claim = f"block {block} of {arm} adds less than {reference}'s, relative to what it reads"
            yield f"{arm}_block_{block}_adds_less", claim, affine(Interval(**whole["added"]), -1.0, 0.0)


def _centrality(results: Results) -> Iterator[tuple[str, str, Interval]]:
    """Frequent tokens central, rare ones at the rim."""
    arm = results["headline"]["arm"]
    tables = [n for n in measured(results.get("norms", ()), Norms) if (n.arm, n.role) == (arm, SHARED)]
    if tables:
        span = interval(n.value.distance_to_mean.spearman.score for n in tables)
        claim = f"frequent tokens lie nearer to the mean row of {arm} than rare ones (rank correlation)"
        yield f"{arm}_frequent_central", claim, affine(span, -1.0, 0.0)


def _calibration(results: Results) -> Iterator[tuple[str, str, Interval]]:
    """Over-confidence on frequent tokens, under-prediction of rare ones, against the untied twin."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    for twin in results.get("calibration", {}).get("twins", ()):
        if twin["arm"] != arm:
            continue
        if twin["stratum"] == "frequent":
            claim = f"{arm} is more over-confident than {reference} where it bets on a frequent token"
            yield f"{arm}_overconfident_on_frequent", claim, Interval(**twin["overconfidence"])
        if twin["stratum"] == "rare":
            claim = f"{arm} gives rare tokens less of their due than {reference} (log2)"
            yield f"{arm}_underpredicts_rare", claim, affine(Interval(**twin["log2_ratio"]), -1.0, 0.0)


def _cooccurrence(results: Results) -> Iterator[tuple[str, str, Interval]]:
    """Tied cosines follow output co-occurrence."""
    arm = results["headline"]["arm"]
    tables = [r for r in measured(results.get("cooccurrence", ()), Cooccurrence) if (r.arm, r.role) == (arm, SHARED)]
    if tables:
        claim = f"cosines of {arm} follow what comes before a token more than what comes after it (rank correlation)"
        yield f"{arm}_follows_output_cooccurrence", claim, interval(r.value.difference.mean for r in tables)
