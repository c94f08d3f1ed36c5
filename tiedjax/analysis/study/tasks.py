"""What the workers of a study call: a part of the results, and a section's drawings."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiedjax.analysis.basis.blocked import few_threads
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.study.results import collect
from tiedjax.config import StudyConfig
from tiedjax.config_files import structure
from tiedjax.errors import UserError
from tiedjax.files import parse_json
from tiedjax.host import storage
from tiedjax.run import Run, load_run


def analyse_part(study: Mapping[str, Any], folder: str, name: str, runs: Sequence[tuple[str, int]]) -> Any:
    """One of `results.parts_of` these runs."""
    held = _held(json.dumps(study), folder, tuple((arm, seed) for arm, seed in runs))
    model = next(iter(held.runs.values())).config.model
    with few_threads(model.table_rows * model.d_model):
        return collect(name, held)


@functools.lru_cache(maxsize=2)  # of all runs, and of one seed's
def _held(study: str, folder: str, runs: tuple[tuple[str, int], ...]) -> StudyRuns:
    """Runs of a study, whose tables a process reads once for all its parts."""
    return StudyRuns(structure(StudyConfig, json.loads(study), folder), loaded(storage.place(folder, "DIR"), runs))


def loaded(folder: Path, runs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Run]:
    """The runs of these arms and seeds in a study's folder of runs."""
    return {(arm, seed): load_run(folder / f"{arm}-{seed}") for arm, seed in runs}


def draw_section(out: str, name: str) -> dict[str, list[str]]:
    """`page.draw` of one section."""
    from tiedjax.analysis.study.page import draw

    place = storage.place(out, "DIR")
    return draw(read_results(place), name, place)


def read_results(study: str | Path) -> dict[str, Any]:
    """results.json of a study's folder, on a disk or in a store; UserError unless it holds an object."""
    return read_object(storage.place(study, "study") / "results.json", "study")


def read_object(path: Path, command: str) -> dict[str, Any]:
    """The object in a JSON file that a command of tiedjax writes; UserError unless it holds one."""
    found = parse_json(storage.read_text(path, f"`tiedjax {command}` writes it"), str(path))
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold an object, got {type(found).__name__}; `tiedjax {command}` writes it")
    return found
