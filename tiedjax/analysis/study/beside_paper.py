"""A study's numbers beside those that the paper published, in the paper's own form, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiedjax.analysis.basis import numbers, published
from tiedjax.analysis.instruments.alignment.align import closed_form_floor
from tiedjax.tying import SHARED

Results = Mapping[str, Any]


def alignment(results: Results) -> list[dict[str, Any]]:
    """Per pair of tables: uncorrected scores, the paper's beside the closed-form floor and ours beside its own."""
    head = results["headline"]
    arms = results["arms"]
    measured = {
        ("input", "output"): arms[head["reference"]]["alignment"].get("output", {}).get("vs_input"),
        ("output", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get(SHARED, {}).get("vs_output"),
        ("input", "tied"): arms.get(head["arm"], {}).get("alignment", {}).get(SHARED, {}).get("vs_input"),
    }
    names = {
        ("input", "output"): f"{head['reference']} input → {head['reference']} output",
        ("output", "tied"): f"{head['reference']} output → {head['arm']}",
        ("input", "tied"): f"{head['reference']} input → {head['arm']}",
    }
    groups = []
    for pair, values in published.ALIGNMENT.items():
        by_fit = measured[pair]
        if by_fit is not None:
            rows = [
                {
                    "fit": fit,
                    "paper": numbers.number(value),
                    "paper_floor": numbers.number(closed_form_floor(fit, *published.ALIGNMENT_SHAPE)),
                    "ours": numbers.number(by_fit[fit]["score"]["mean"]),
                    "ours_floor": numbers.number(by_fit[fit]["floor"]["mean"]),
                }
                for fit, value in values.items()
            ]
            groups.append({"pair": names[pair], "rows": rows})
    return groups


def scaling_and_evolution(results: Results) -> list[dict[str, str]]:
    """Input-gradient scaling and evolution: what was measured, the paper's value, ours."""
    head, arms = results["headline"], results["arms"]
    rows = []
    for arm, summary in arms.items():
        scale = summary["differs_from_reference"].get("tying.input_grad_scale", (None, None))[1]
        if scale in published.SCALING and scale != 1 and arm in results["changes"]:
            for role, value in published.SCALING[scale].items():
                unscaled, scaled = (
                    arms[a]["alignment"][SHARED][f"vs_{role}"]["orthogonal"]["score"]["mean"]
                    for a in (head["arm"], arm)
                )
                rows.append(
                    {
                        "what": f"orthogonal score with {head['reference']} {role}, input gradients ×1 → ×{scale:g}",
                        "paper": f"{numbers.number(published.SCALING[1][role])} → {numbers.number(value)}",
                        "ours": f"{numbers.number(unscaled)} → {numbers.number(scaled)}",
                    }
                )
    for role, value in published.EVOLUTION.items():
        ends = [e for e in results.get("evolution", ()) if e["arm"] == head["reference"] and e["role"] == role]
        if ends:
            mean = sum(e["to_start"][-1] for e in ends) / len(ends)
            rows.append(
                {
                    "what": f"cosine of {head['reference']} {role} rows to step 0 (here: rows of seen tokens)",
                    "paper": f"{numbers.number(value)} at step {published.EVOLUTION_STEP:,}",
                    "ours": f"{numbers.number(mean)} at step {ends[0]['steps'][-1]:,}",
                }
            )
    return rows
