"""decision.html: one offline page that says whether to tie, when, and at what cost, from results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiedjax.analysis.decision import rows, verdicts
from tiedjax.analysis.study import figures, frontier, html, sentences
from tiedjax.analysis.study.page import refuse_other_results
from tiedjax.analysis.study.sections import sections_of
from tiedjax.analysis.study.tasks import read_object, read_results
from tiedjax.errors import UserError
from tiedjax.host.storage import write_atomically

RECORD, PAGE = "decision.json", "decision.html"
SCHEMA = 1


def read(out: Path) -> dict[str, Any]:
    """What decision.json of a folder holds, with `results` of the rungs that are done.

    UserError where it holds no decision, and where the own width is not trained yet.
    """
    path = out / RECORD
    decision = read_object(path, "decide")
    if decision.get("kind") != "decision" or decision.get("schema") != SCHEMA:
        raise UserError(f"{path}: holds no decision as this version writes it; `tiedjax decide` writes it")
    if decision["own"] not in decision["rungs"]:
        raise UserError(f"{out}: width {decision['own']} is not trained yet; `tiedjax decide` continues it")
    results = {str(width): read_results(out / f"width-{width}") for width in decision["rungs"]}
    for each in results.values():
        refuse_other_results(each)
    return decision | {"results": results}


def write(decision: verdicts.Decision, out: Path) -> None:
    """Writes decision.html and its figures under `out`."""
    own = verdicts.own(decision)
    # What trains for a few steps more or less than untied is no place of its own.
    apart = {arm: summary for arm, summary in own["arms"].items() if arm != verdicts.arms_of(decision).in_time}
    shown = {**own, "arms": apart}
    drawings = figures.draw(frontier.plots(shown), shown, out)
    page = html.rendered(
        "decision/page.html.j2",
        drawings,
        d=decision,
        r=own,
        v=verdicts,
        rows=rows,
        on_frontier=frontier.on_it(shown),
        w=sentences,
        sections=sections_of(own),
        headings=html.headings,
    )
    write_atomically(out / PAGE, page)
