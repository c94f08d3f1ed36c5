"""Evolution: how far the tables moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tiedjax.analysis.sections import drawing


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures."""
    panels = [_evolution("to_start", "step 0"), _evolution("to_previous", "the previous snapshot")]
    yield drawing.Plot("evolution", panels)


def _evolution(field: str, to: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        for arm, of_arm in drawing.by_arm(results["evolution"]):
            for role in dict.fromkeys(e["role"] for e in of_arm):
                found = [e for e in of_arm if e["role"] == role]
                dashes = (0, (5, 2)) if role == "input" else "-"
                label = arm if role == "shared" else f"{arm} {role}"
                colour = drawing.colours(results)[arm]
                steps, mean = drawing.mean_curve(found, field)
                ax.plot(steps, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=label)
        low = min([np.nanmin(drawing.floats(e[field])) for e in results["evolution"]], default=0.0)
        if field == "to_start" and low < 0.3:  # else it lies far below what is drawn
            floor = drawing.mean_curve(results["evolution"], "floor")
            ax.plot(*floor, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2, label="chance")
        drawing.step_axis(ax, max((e["steps"][-1] for e in results["evolution"]), default=1))
        ax.set_ylim(low - 0.05 * (1 - low), 1 + 0.05 * (1 - low) + 1e-6)
        ax.set_ylabel("mean cosine of rows")
        ax.set_title(f"to {to}")

    return draw
