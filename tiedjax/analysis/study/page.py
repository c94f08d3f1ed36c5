"""The report: figures and one offline HTML page, drawn from results.json alone; its sections are in `sections`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from tiedjax.analysis.basis import drawing, published
from tiedjax.analysis.study import beside_paper, figures, html, losses, sentences
from tiedjax.analysis.study.sections import AGAIN, SCHEMA, SECTIONS, left_out, sections_of, without_others
from tiedjax.errors import UserError
from tiedjax.host.storage import write_atomically

# What every results.json holds; all else belongs to a section, which is left out where it is missing.
CORE = (
    "answer",
    "findings",
    "statements",
    "headline",
    "arms",
    "changes",
    "reproducible_share",
    "study",
    "runs",
    "environment",
    "examples",
    "notes",
)


def write_report(results: drawing.Results, out: Path, drawings: html.Drawings | None = None) -> None:
    """Writes figures/*.{png,pdf} and report.html under `out` from a results.json dict; the same dict gives the same
    page.

    `drawings` are what `draw` gave for every section, if others have drawn them. UserError when `out` cannot be
    written.
    """
    refuse_other_results(results)
    if drawings is None:
        drawings = {name: panels for section in SECTIONS for name, panels in draw(results, section, out).items()}
    write_atomically(out / "report.html", page_of(results, drawings))


def refuse_other_results(results: drawing.Results) -> None:
    """UserError unless these are the results of a study, as this version writes them."""
    if results.get("kind") != "study":
        raise UserError("report: these are not the results of a study; `tiedjax study` writes them to results.json")
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"report: results.json has schema {results.get('schema')}, this version draws {SCHEMA}; {AGAIN}"
        )
    missing = [key for key in CORE if key not in results]
    if missing:
        raise UserError(f"report: results.json holds no {missing[0]!r}; {AGAIN}")


def draw(results: drawing.Results, section: str, out: Path) -> dict[str, list[str]]:
    """Writes one section's figures/*.{png,pdf} under `out`; returns their panels as SVG, none of a section that the
    results do not hold; UserError as above.
    """
    return figures.draw(SECTIONS[section].plots(results) if section in sections_of(results) else (), results, out)


def _template(section: ModuleType) -> str:
    """Where a section's template lies in the package: beside it, under its name."""
    return section.__name__.removeprefix(f"{html.PACKAGE}.").replace(".", "/") + ".html.j2"


def page_of(results: drawing.Results, drawings: html.Drawings) -> str:
    """The page, from a results.json dict and what `draw` gave for every section."""
    lines, results = left_out(results), without_others(results)
    sections = sections_of(results)
    colours = drawing.colours(results)
    return html.rendered(
        "study/page.html.j2",
        drawings,
        r=results,
        w=sentences,
        losses=losses,
        paper=beside_paper,
        published=published,
        sections=sections,
        templates={name: _template(section) for name, section in sections.items()},
        left_out=lines,
        arm_index={arm: drawing.LIGHT.index(colour) for arm, colour in colours.items()},
        headings=html.headings,
    )
