"""Gradient flow: whose gradient reaches the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, plain_json, published
from tiedjax.analysis.basis.statistics import interval
from tiedjax.analysis.instruments.gradients.gradients import GradientFlow, Window

VERSION = 2


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    yield drawing.Plot("gradient_share", [_draw_share, _draw_role_norms])
    if any(flow.deciles for flows in _by_arm(results).values() for flow in flows):
        yield drawing.Plot("gradient_deciles", [_deciles("input"), _deciles("output")])
    if any(flow.deciles for flow in _of_baseline(results)):
        yield drawing.Plot("gradient_share_deciles", [_share_by_decile], (5.2, 3.4))


def beside_the_paper(results: drawing.Results) -> list[dict[str, str]]:
    """Per window of steps, for the baseline arm: both forms of the share, the norms' ratio, the published share.

    Empty where no run logged the norm that the paper's form needs.
    """
    flows = _of_baseline(results)
    if not any(flow.activation_norm for flow in flows):
        return []
    by_span: dict[tuple[int, int], list[Window]] = {}
    for window in (window for flow in flows for window in flow.windows):
        by_span.setdefault((window.first, window.last), []).append(window)
    return [
        {
            "steps": f"{span[0]:,}–{span[1]:,}",
            "exact": drawing.spread(window.output_share for window in windows),
            "paper_form": drawing.spread(window.paper_output_share for window in windows),
            "ratio": drawing.spread(window.activation_ratio for window in windows),
            "published": numbers.number(published.OUTPUT_SHARE.get(span)),
        }
        for span, windows in by_span.items()
    ]


def makeup(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm, at the first snapshot after step 0 and at the last: what the output role's gradient is made of."""
    lines = []
    for arm, flows in _by_arm(results).items():
        of_seeds = [flow.makeup for flow in flows if flow.makeup and flow.makeup.steps]
        for place in (0, -1) if of_seeds else ():
            parts = ("common", "rest", "cross", "push")
            cells = {part: drawing.spread(getattr(each, part)[place] for each in of_seeds) for part in parts}
            lines.append({"arm": arm, "step": f"{of_seeds[0].steps[place]:,}"} | cells)
    return lines


def noise(results: drawing.Results) -> list[str]:
    """A sentence for each arm whose batches were cut: how much of each role's squared norm the choice of text made."""
    return [
        f"In {arm} the choice of the batch makes {_percent(n.output for n in of_seeds)} of the output role’s squared "
        f"gradient norm and {_percent(n.input for n in of_seeds)} of the input role’s."
        for arm, flows in _by_arm(results).items()
        if (of_seeds := [flow.noise for flow in flows if flow.noise])
    ]


def _percent(shares: Iterable[float | None]) -> str:
    return numbers.percent(vars(interval(shares)))


def _by_arm(results: drawing.Results) -> dict[str, list[GradientFlow]]:
    return drawing.by_run(plain_json.measured(results["gradients"], GradientFlow))


def _of_baseline(results: drawing.Results) -> list[GradientFlow]:
    return _by_arm(results).get(results["headline"]["arm"], [])


def _share_by_decile(ax: drawing.Axes, results: drawing.Results) -> None:
    """The output role's share of the gradient of each decile's rows, at every step with deciles; mean over seeds."""
    runs = [{d.step: d.output_share for d in flow.deciles} for flow in _of_baseline(results) if flow.deciles]
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
    for arm, flows in _by_arm(results).items():
        colour = drawing.colours(results)[arm]
        binned = [drawing.log_binned(np.array(flow.steps), drawing.floats(flow.output_share)) for flow in flows]
        steps = binned[0][0]
        shares = np.array([share for _, share in binned if len(share) == len(steps)])
        ax.plot(steps, shares.mean(axis=0), color=colour, label=arm)
        ax.fill_between(steps, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0.5, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="balance")
    drawing.log_steps(ax)
    ax.set_ylim(0, 1)
    ax.set_ylabel("output share of gradient norm")
    ax.set_title("share")


def _draw_role_norms(ax: drawing.Axes, results: drawing.Results) -> None:
    arm = results["headline"]["arm"]
    labels = {"output_norm": "output role", "input_norm": "input role", "activation_norm": "input, by position"}
    for (field, label), dashes in zip(labels.items(), ["-", drawing.INPUT, (0, (1, 1.5))], strict=True):
        norms = [(flow.steps, norm) for flow in _of_baseline(results) if (norm := getattr(flow, field))]
        binned = [drawing.log_binned(np.array(steps), drawing.floats(norm)) for steps, norm in norms]
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
        runs = [flow.deciles for flow in _of_baseline(results) if flow.deciles]
        if runs:
            steps = sorted(set.intersection(*({deciles.step for deciles in run} for run in runs)))
            indices = np.unique(np.linspace(0, len(steps) - 1, len(drawing.STEPS)).round().astype(int))
            for colour, step in zip(drawing.STEPS, (steps[i] for i in indices), strict=False):
                at_step = [deciles for run in runs for deciles in run if deciles.step == step]
                norms = [drawing.floats(getattr(deciles, f"{role}_norm")) for deciles in at_step]
                label = f"step {step:,}"
                ax.plot(range(1, 11), np.mean(norms, axis=0), color=colour, marker="o", markersize=3.5, label=label)
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.yaxis.set_major_formatter(drawing.plain_ticks)
        ax.yaxis.set_minor_formatter("")
        ax.set_xticks(range(1, 11))
        ax.set_xlabel("frequency decile (10: most frequent)")
        ax.set_ylabel("gradient norm")
        ax.set_title(f"{results['headline']['arm']}: from the {role} role")

    return draw
