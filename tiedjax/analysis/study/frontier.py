"""The frontier: held-out loss beside the bias of the lookup table and the parameters, arm by arm.

The bias is how much nearer, with token frequency controlled, the table that looks tokens up lies to the output table
of the reference run of the same seed than to its input table. Arms of the reference's own scheme begin with its
tables, and would be near to them for that alone: their lookup table is compared with reference runs of other seeds,
that of the reference itself with their input tables and with its own output table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.statistics import CONFIDENCE, Interval
from tiedjax.tying import SHARED

KEYS = ()  # of results.json, beside what is always there
CHANGES = "a change of scheme"
MARKERS = {
    "tied": "o",
    "untied": "s",
    "untied_equal": "D",
    "partial_dims": "^",
    "partial_tokens": "v",
    "low_rank": "P",
    "transform": "X",
    "interpolated": "*",
    "pseudo_inverse": "h",
    CHANGES: ">",
}
_NOTHING = Interval(None, None, None, 0, CONFIDENCE)
_SMALLEST, _LARGEST = 50.0, 220.0  # points squared, of the fewest and the most parameters


@dataclass(frozen=True)
class Place:
    """Where an arm lies: its scheme, means over seeds with intervals, and the arms that dominate it.

    One arm dominates another if it has at once a lower loss, a smaller bias and no more parameters, by their means.
    """

    arm: str
    scheme: str
    loss: Interval
    bias: Interval
    parameters: float
    dominated_by: tuple[str, ...] = ()


def places(results: drawing.Results) -> list[Place]:
    """Every arm whose loss, bias and size are known, from the lowest loss on."""
    found = [place for arm in results["arms"] if (place := _place(results, arm))]
    return sorted(
        (
            Place(**vars(place) | {"dominated_by": tuple(o.arm for o in found if _dominates(o, place))})
            for place in found
        ),
        key=lambda place: place.loss.mean or 0.0,
    )


def _place(results: drawing.Results, arm: str) -> Place | None:
    summary = results["arms"][arm]
    loss, bias = Interval(**summary["eval_loss"]), _bias(results, arm)
    sizes = [run["parameters"] for run in results["runs"] if run["arm"] == arm]
    if loss.mean is None or bias.mean is None or not sizes or None in sizes:
        return None
    return Place(arm, _scheme(results, arm), loss, bias, sum(sizes) / len(sizes))


def _scheme(results: drawing.Results, arm: str) -> str:
    options = (results["study"]["arms"].get(arm) or {}).get("tying") or {}
    changes = any(option in options for option in ("untie_at", "untie_when", "tie_at"))
    return CHANGES if changes else options.get("scheme", "tied")


def _bias(results: drawing.Results, arm: str) -> Interval:
    head, margins = results["headline"], results["arms"][arm]["margin"]
    if _scheme(results, arm) != _scheme(results, head["reference"]):
        margin = margins.get(SHARED, margins.get("input"))
        return Interval(**margin[head["fit"]]) if margin else _NOTHING
    repeated = results.get("between_seeds", {}).get(arm, {}).get("input", {})
    near = {name: cell[head["fit"]][head["measure"]]["mean"] for name, cell in repeated.items()}
    if arm == head["reference"]:
        near["vs_output"] = head["reference_input_vs_output"]["mean"]
    if near.get("vs_output") is None or near.get("vs_input") is None:
        return _NOTHING
    return Interval(near["vs_output"] - near["vs_input"], None, None, 0, CONFIDENCE)


def _dominates(first: Place, second: Place) -> bool:
    values = [(first.loss.mean, second.loss.mean), (first.bias.mean, second.bias.mean)]
    lower = all(a is not None and b is not None and a < b for a, b in values)
    return lower and first.parameters <= second.parameters


def rows(results: drawing.Results) -> list[dict[str, Any]]:
    """Every arm: loss, bias, parameters, and by which arms it is dominated."""
    return [
        {
            "arm": place.arm,
            "dominated": bool(place.dominated_by),
            "loss": numbers.spread(vars(place.loss)),
            "bias": numbers.spread(vars(place.bias)),
            "parameters": f"{place.parameters:,.0f}",
            "by": ", ".join(place.dominated_by) or numbers.NONE,
        }
        for place in places(results)
    ]


def on_it(results: drawing.Results) -> str:
    """Which arms no other dominates; empty where nothing is known."""
    names = [place.arm for place in places(results) if not place.dominated_by]
    if not names:
        return ""
    return (
        f"On the frontier: {', '.join(names)}. No other arm has at once a lower loss, a smaller bias and no more "
        "parameters, by means over seeds."
    )


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figure; none with fewer than two arms on it."""
    if len(found := places(results)) > 1:
        yield drawing.Plot("frontier", [draw], (5.6, max(3.6, 0.8 + 0.3 * len(found))))


def draw(ax: drawing.Axes, results: drawing.Results) -> None:
    """Each arm's bias and loss; the marker is its scheme, its size the parameters; dominated arms are grey."""
    found, colours = places(results), drawing.colours(results)
    sizes = np.array([place.parameters for place in found])
    span = np.ptp(sizes)
    areas = _SMALLEST + (_LARGEST - _SMALLEST) * ((sizes - sizes.min()) / span if span else 0.5 * np.ones(len(found)))
    labelled = set()
    for place, area in zip(found, areas, strict=True):
        colour = drawing.MUTED if place.dominated_by else colours[place.arm]
        at = (place.bias.mean, place.loss.mean)
        ax.errorbar(*at, xerr=place.bias.half_width, yerr=place.loss.half_width, color=colour, elinewidth=1, alpha=0.45)
        # The name of a marker stands in the legend once, in grey: its colour is the arm's.
        ax.scatter(*at, s=area, marker=MARKERS[place.scheme], color=colour, zorder=3)
        if place.scheme not in labelled:
            labelled.add(place.scheme)
            ax.scatter([], [], s=60, marker=MARKERS[place.scheme], color=drawing.MUTED, label=place.scheme)
    _name(ax, found, colours)
    ax.axvline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1)
    ax.set_xlabel("bias of the lookup table (above 0: nearer to the output role’s)")
    ax.set_ylabel("held-out loss, nats a token")


def _name(ax: drawing.Axes, found: list[Place], colours: Mapping[str, str]) -> None:
    """Every arm's name at the right, in the order of their losses, with a thin line to its marker."""
    low, high = ax.get_ylim()
    apart = (high - low) / max(len(found) + 1, 8)
    losses = [place.loss.mean or 0.0 for place in found]
    heights = list(losses)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + apart)
    over = heights[-1] - (high - apart / 2)
    if over > 0:  # the stack is pushed down from its upper end, as far as it must be
        heights[-1] -= over
        for i in reversed(range(len(heights) - 1)):
            heights[i] = min(heights[i], heights[i + 1] - apart)
    left, right = ax.get_xlim()
    edge = right + 0.04 * (right - left)
    for place, height in zip(found, heights, strict=True):
        colour = drawing.MUTED if place.dominated_by else colours[place.arm]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
        at = (place.bias.mean, place.loss.mean)
        ax.annotate(place.arm, at, (edge, height), color=colour, va="center", annotation_clip=False, arrowprops=line)
    ax.set_ylim(min(low, heights[0] - apart / 2), high)
    ax.set_xlim(left, right)
