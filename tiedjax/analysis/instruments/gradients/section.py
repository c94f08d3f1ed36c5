"""Gradient flow: whose gradient reaches the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, published
from tiedjax.analysis.basis.statistics import interval


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    yield drawing.Plot("gradient_share", [_draw_share, _draw_role_norms])
    if any(g["deciles"] for g in results["gradients"]):
        yield drawing.Plot("gradient_deciles", [_deciles("input"), _deciles("output")])
    if any(g["deciles"] for g in _of_baseline(results)):
        yield drawing.Plot("gradient_share_deciles", [_share_by_decile], (5.2, 3.4))


def beside_the_paper(results: drawing.Results) -> list[dict[str, str]]:
    """Per window of steps, for the baseline arm: both forms of the share, the norms' ratio, the published share.

    Empty where no run logged the norm that the paper's form needs.
    """
    found = [g for g in results["gradients"] if g["arm"] == results["headline"]["arm"]]
    if not any(g["activation_norm"] for g in found):
        return []
    windows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for window in (w for g in found for w in g["windows"]):
        windows.setdefault((window["first"], window["last"]), []).append(window)
    mean = lambda of, name: numbers.spread(vars(interval(w[name] for w in of)))
    return [
        {
            "steps": f"{span[0]:,}–{span[1]:,}",
            "exact": mean(of, "output_share"),
            "paper_form": mean(of, "paper_output_share"),
            "ratio": mean(of, "activation_ratio"),
            "published": numbers.number(published.OUTPUT_SHARE.get(span)),
        }
        for span, of in windows.items()
    ]


def _of_baseline(results: drawing.Results) -> list[dict[str, Any]]:
    return [g for g in results["gradients"] if g["arm"] == results["headline"]["arm"]]


def _share_by_decile(ax: drawing.Axes, results: drawing.Results) -> None:
    """The output role's share of the gradient of each decile's rows, at every step with deciles; mean over seeds."""
    runs = [{d["step"]: d["output_share"] for d in g["deciles"]} for g in _of_baseline(results) if g["deciles"]]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    shares = [[drawing.floats(run[step]) for step in steps] for run in runs]  # [seeds, steps, deciles]
    across, up = np.arange(len(steps) + 1), np.arange(1, 12)
    colours = ax.pcolormesh(
        across, up - 0.5, np.mean(shares, axis=0).T, cmap="RdBu_r", vmin=0, vmax=1, edgecolors="face"
    )
    ax.set_xticks(across[:-1] + 0.5, [f"{step:,}" for step in steps], rotation=60)
    ax.set_yticks(range(1, 11))
    ax.grid(visible=False)
    ax.set_xlabel("step")
    ax.set_ylabel("frequency decile (10: most frequent)")
    ax.set_title(f"output share, {results['headline']['arm']}")
    bar = ax.figure.colorbar(colours, ax=ax, label="output share (0.5: balance)")
    bar.solids.set_rasterized(False)  # shapes, as the rest of the page's figures: no image inside the SVG


def _draw_share(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, found in drawing.by_arm(results["gradients"]):
        colour = drawing.colours(results)[arm]
        binned = [drawing.log_binned(np.array(g["steps"]), drawing.floats(g["output_share"])) for g in found]
        steps = binned[0][0]
        same = np.array([b[1] for b in binned if len(b[1]) == len(steps)])
        ax.plot(steps, same.mean(axis=0), color=colour, label=arm)
        ax.fill_between(steps, same.min(axis=0), same.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0.5, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="balance")
    drawing.log_steps(ax)
    ax.set_ylim(0, 1)
    ax.set_ylabel("output share of gradient norm")
    ax.set_title("share")


def _draw_role_norms(ax: drawing.Axes, results: drawing.Results) -> None:
    arm = results["headline"]["arm"]
    found = [g for g in results["gradients"] if g["arm"] == arm]
    labels = {"output_norm": "output role", "input_norm": "input role", "activation_norm": "input, by position"}
    for (field, label), dashes in zip(labels.items(), ["-", drawing.INPUT, (0, (1, 1.5))], strict=True):
        binned = [drawing.log_binned(np.array(g["steps"]), drawing.floats(g[field])) for g in found if g[field]]
        if binned:
            steps = binned[0][0]
            mean = np.mean([b[1] for b in binned if len(b[1]) == len(steps)], axis=0)
            ax.plot(steps, mean, color=drawing.colours(results)[arm], linestyle=dashes, label=label)
    drawing.log_steps(ax)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("gradient norm")
    ax.set_title(f"the norms, {arm}")


def _deciles(role: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        arm = results["headline"]["arm"]
        found = [g["deciles"] for g in results["gradients"] if g["arm"] == arm and g["deciles"]]
        if found:
            common = sorted(set.intersection(*({d["step"] for d in run} for run in found)))
            picked = [
                common[i] for i in np.unique(np.linspace(0, len(common) - 1, len(drawing.STEPS)).round().astype(int))
            ]
            for colour, step in zip(drawing.STEPS, picked, strict=False):
                norms = [drawing.floats(d[f"{role}_norm"]) for run in found for d in run if d["step"] == step]
                label = f"step {step:,}"
                ax.plot(range(1, 11), np.mean(norms, axis=0), color=colour, marker="o", markersize=3.5, label=label)
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.yaxis.set_major_formatter(drawing.plain_ticks)
        ax.yaxis.set_minor_formatter("")
        ax.set_xticks(range(1, 11))
        ax.set_xlabel("frequency decile (10: most frequent)")
        ax.set_ylabel("gradient norm")
        ax.set_title(f"{arm}: from the {role} role")

    return draw
