"""The form of arXiv 2603.26663 beside the corrected one, for every measurement that has both: the baseline arm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tiedjax.analysis.basis import drawing, numbers
from tiedjax.analysis.basis.statistics import interval
from tiedjax.tying import SHARED

KEYS = ()  # what the sections hold that are there
_Row = tuple[str, str, Iterable[float | None], str, Iterable[float | None]]


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """It has none."""
    yield from ()


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Each measurement: what its two forms are called, and their means with intervals over seeds."""
    measures = {"comparisons": _alignment, "knn": _neighbours, "gradients": _gradients, "lens": _lens}
    lines = []
    for measure in (measure for key, measure in measures.items() if key in results):
        for what, paper_form, paper, corrected_form, corrected in measure(results):
            values = {"paper": interval(paper), "corrected": interval(corrected)}
            if values["paper"].n or values["corrected"].n:
                names = {"what": what, "paper_form": paper_form, "corrected_form": corrected_form}
                lines.append(names | {name: numbers.spread(vars(span)) for name, span in values.items()})
    return lines


def _alignment(results: drawing.Results) -> Iterator[_Row]:
    forms = "all rows, in sample", "seen rows, above chance"
    for what, pairs in _twins(results, [r for r in results["comparisons"] if "paper" in r]):
        for fit in ("orthogonal", "linear"):
            fitted = [pair for pair in pairs if pair["fit"] == fit]
            yield f"{fit} alignment, {what}", forms[0], _each(fitted, "paper"), forms[1], _each(fitted, "corrected")


def _neighbours(results: drawing.Results) -> Iterator[_Row]:
    measured = [pair for pair in results["knn"]["pairs"] if "not_measured" not in pair]
    for what, pairs in _twins(results, measured):
        paper, corrected = [p["paper"]["score"] for p in pairs], [p["overlap"]["corrected"] for p in pairs]
        name = f"{results['knn']['k']} nearest neighbours, {what}"
        yield name, "all rows", paper, "seen rows, above chance", corrected


def _gradients(results: drawing.Results) -> Iterator[_Row]:
    arm = results["headline"]["arm"]
    flows = [g for g in results["gradients"] if g["arm"] == arm]
    picks: dict[str, Callable[[Any], Any]] = {
        "steps 1 to 10": lambda g: next((w for w in g["windows"] if w["first"] == 1), None),
        "all steps": lambda g: g["overall"],
    }
    for when, pick in picks.items():
        windows = [w for w in map(pick, flows) if w]
        forms = "input norm of the activations", "both norms of [V, D]"
        paper, exact = _each(windows, "paper_output_share"), _each(windows, "output_share")
        yield f"output share of the gradient of {arm}, {when}", forms[0], paper, forms[1], exact


def _lens(results: drawing.Results) -> Iterator[_Row]:
    arm = results["headline"]["arm"]
    runs = [r["states"] for r in results["lens"]["runs"] if r["arm"] == arm and "states" in r]
    for state in (1, -1) if runs else ():
        at = lambda lens, state=state: [states[state][lens]["kl"]["mean"] for states in runs]
        name = f"tuned lens of {arm} after {runs[0][state]['name']}, KL in bits"
        yield name, "translator of the state before", at("published"), "its own translator", at("tuned")


def _twins(
    results: drawing.Results, pairs: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(what is compared, its pairs over seeds): the baseline's table with either table of the reference."""
    arm, reference = results["headline"]["arm"], results["headline"]["reference"]
    for role in ("output", "input"):
        of = [p for p in pairs if (p["arm"], p["subject_role"], p["reference_role"]) == (arm, SHARED, role)]
        yield f"{arm} and {reference} {role}", of


def _each(records: Iterable[Mapping[str, Any]], field: str) -> list[float | None]:
    return [record[field] for record in records]
