"""A study: twin runs over several seeds, then their results and report."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import platform
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from tiedjax import tying
from tiedjax.config import RunConfig, StudyConfig
from tiedjax.config_files import merge, parse_overrides, read_yaml, structure, to_tree, to_yaml
from tiedjax.data.prepare import prepare
from tiedjax.errors import UserError
from tiedjax.files import sole_writer, write_atomically
from tiedjax.host import platform_flags, process
from tiedjax.host.workers import Crew, Task, call
from tiedjax.loop import Outcome, train
from tiedjax.run import Run, load_run
from tiedjax.text import duration

if TYPE_CHECKING:
    from tiedjax.analysis.basis.study_runs import StudyRuns

REPORTED_PACKAGES = ("tiedjax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclass(frozen=True)
class Plan:
    """A study with the resolved config of each of its runs, by (arm, seed), in the order of training."""

    name: str
    study: StudyConfig
    runs: dict[tuple[str, int], RunConfig]

    @property
    def threads(self) -> int:
        """CPU threads of every run."""
        return next(iter(self.runs.values())).train.threads


def load_study(path: str | Path, overrides: Mapping[str, str] | None = None) -> Plan:
    """Resolves a study file; `overrides` ({"train.steps": "50"}) apply to every run, after its arm."""
    path = Path(path)
    study = structure(StudyConfig, read_yaml(path), str(path))
    if not study.base:
        raise UserError(f"{path}: base: missing; it names the run config that all arms share")
    base_path = path.parent / study.base
    base = read_yaml(base_path)
    structure(RunConfig, base, str(base_path))
    last = parse_overrides(overrides or {})
    for where, changes in [("--train.seed", last), (f"{path}: overrides", study.overrides), *study.arms.items()]:
        if "seed" in (changes.get("train") or {}):
            raise UserError(f"{where}: train.seed is set from the study's seeds; change those in the study file")
    runs = {}
    for seed in study.seeds:
        for arm, changes in study.arms.items():
            tree = merge(merge(merge(base, study.overrides), changes), last)
            runs[arm, seed] = structure(RunConfig, merge(tree, {"train": {"seed": seed}}), f"{path}: arm {arm!r}")
            try:
                tying.refuse_options_of_roles(runs[arm, seed])
            except UserError as error:
                raise UserError(f"{path}: arm {arm!r}: {error}") from None
    for arm, shared in [(study.reference, False), (study.baseline, True)]:
        options = runs[arm, study.seeds[0]].tying
        if tying.scheme_of(options).shares_one_table != shared:
            wanted = "one table in both roles" if shared else "a table for each role"
            raise UserError(f"{path}: arm {arm!r} needs a scheme with {wanted}, its tying.scheme is {options.scheme!r}")
    if len(threads := sorted({cfg.train.threads for cfg in runs.values()})) > 1:
        raise UserError(f"{path}: train.threads: must be one number for all arms, got {threads}")
    return Plan(path.stem, study, runs)


def workers_for(plan: Plan, asked: int | None = None) -> int:
    """How many runs of a study train side by side on this machine; needs no JAX.

    On a CPU as many as were `asked` for, by default as many as have `train.threads` cores each; 1 on accelerators,
    which a run has to itself. Results do not depend on it.
    """
    if platform_flags.has_accelerator():
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(asked or max(1, cores // plan.threads), len(plan.runs))


def run_study(plan: Plan, out: Path, workers: int = 1) -> Outcome:
    """Trains what is not yet trained, then writes results.json, report.html and figures/ in `out`.

    With more than one of `workers`, that many processes of this machine train a run each, and analyse side by side.
    Returns the outcome of the run that was stopped, or else of the last one.
    """
    began = time.monotonic()
    process.refuse_unshared(out)
    if process.is_main():
        with sole_writer(out):
            write_atomically(out / "study.yaml", to_yaml(plan.study))
    with Crew(workers, plan.threads, partial(print, flush=True)) if workers > 1 else nullcontext() as crew:
        outcome, parts = _train_and_collect(plan, out, crew)
        if not outcome.finished or outcome.signal or not process.is_main():
            return outcome
        if not crew or not crew.signal:
            _analyse(plan, out, parts, time.monotonic() - began)
            print(draw_report(out, crew))
        heard = crew.signal if crew else None
    return dataclasses.replace(outcome, signal=heard)


def _train_and_collect(plan: Plan, out: Path, crew: Crew | None) -> tuple[Outcome, dict[str, Any]]:
    """Every run, then every part of the results that takes long, by name.

    A crew begins a part as soon as the runs that it is about have ended, so that no worker waits for the last run.
    """
    runs, parts = _training(plan, out), _parts(plan, out)
    at_once, began, begun = crew.size if crew else 1, time.monotonic(), 0

    def begins(place: int, task: Task) -> None:
        nonlocal begun
        begun += 1
        done = max(0, begun - at_once)
        left = (time.monotonic() - began) / max(done, 1) * (len(runs) - done)
        if place < len(runs) and process.is_main():
            print(f"run {begun} of {len(runs)}: {task.name}" + (f"; about {duration(left)} left" if done else ""))
        elif begun == len(runs) + 1:
            print("analysing ...", flush=True)

    def stops(task: Task, result: Any) -> bool:
        return task in runs and bool(not result["finished"] or result["signal"])

    tasks, results = [*runs, *parts.values()], dict[int, Any]()
    if crew:
        for data, vocab_size in dict.fromkeys((cfg.data, cfg.model.vocab_size) for cfg in plan.runs.values()):
            prepare(data, vocab_size, report=partial(print, flush=True))  # once, by one process
        results = crew.run(tasks, begins, stops)
    for place, task in enumerate([] if crew else tasks):
        if place >= len(runs) and not process.is_main():
            break
        begins(place, task)
        results[place] = call(task)
        if stops(task, results[place]):
            break
    trained = [results[place] for place in range(len(runs)) if place in results]
    nothing: dict[str, Any] = {"step": 0, "finished": False}
    ended = next((r for r in trained if not r["finished"] or r["signal"]), trained[-1] if trained else nothing)
    heard = crew.signal if crew else ended.get("signal")
    outcome = Outcome(ended["step"], ended["finished"], signal.Signals(heard) if heard else None)
    return outcome, {name: results[place] for place, name in enumerate(parts, len(runs)) if place in results}


def _training(plan: Plan, out: Path) -> list[Task]:
    """`train_run` of every run; those of one scheme compile the same."""
    return [
        Task(
            name=f"{arm}-{seed}",
            function=f"{__name__}:train_run",
            arguments={"config": to_tree(cfg), "out": str(out / "runs" / f"{arm}-{seed}")},
            kind=cfg.tying.scheme,
        )
        for (arm, seed), cfg in plan.runs.items()
    ]


def train_run(config: Mapping[str, Any], out: str) -> dict[str, Any]:
    """`loop.train` of a resolved config, as a task: the outcome's fields."""
    outcome = train(structure(RunConfig, config, out), Path(out))
    return {"step": outcome.step, "finished": outcome.finished, "signal": outcome.signal}


def _parts(plan: Plan, out: Path) -> dict[str, Task]:
    """`analyse_part` of every part of the results that takes long, by name; that of one seed needs its runs only."""
    from tiedjax.analysis.study.results import parts_of, seed_of

    tasks = {}
    for name in parts_of(plan.study):
        seeds = plan.study.seeds if (seed := seed_of(name)) is None else (seed,)
        study = to_tree(dataclasses.replace(plan.study, seeds=seeds))
        tasks[name] = Task(
            name=f"{out}: {name}",
            function=f"{__name__}:analyse_part",
            arguments={"study": study, "folder": str(out / "runs"), "name": name},
            kind="analysis",
            after=tuple(place for place, (_, of) in enumerate(plan.runs) if of in seeds),
        )
    return tasks


def analyse_part(study: Mapping[str, Any], folder: str, name: str) -> Any:
    """One of `results.parts_of` the runs in a folder, as a task."""
    from tiedjax.analysis.basis.blocked import few_threads
    from tiedjax.analysis.study.results import collect

    held = _held(json.dumps(study), folder)
    model = next(iter(held.runs.values())).config.model
    with few_threads(model.table_rows * model.d_model):
        return collect(name, held)


@functools.lru_cache(maxsize=2)  # of all runs, and of one seed's
def _held(study: str, folder: str) -> StudyRuns:
    """The runs of a study, whose tables a process reads once for all its parts."""
    from tiedjax.analysis.basis.study_runs import StudyRuns

    config = structure(StudyConfig, json.loads(study), folder)
    return StudyRuns(config, _runs(config, Path(folder)))


def _runs(study: StudyConfig, folder: Path) -> dict[tuple[str, int], Run]:
    return {(arm, seed): load_run(folder / f"{arm}-{seed}") for seed in study.seeds for arm in study.arms}


def draw_report(out: Path, crew: Crew | None = None) -> str:
    """Redraws the report from results.json; returns the answer, in this version's words, and where the report is."""
    from tiedjax.analysis.study import sentences
    from tiedjax.analysis.study.page import refuse_other_results, write_report
    from tiedjax.analysis.study.sections import SECTIONS

    results = _read_results(out)
    refuse_other_results(results)
    drawings = None
    if crew:
        place = {"out": str(out)}
        drawn = crew.run(
            [Task(f"{out}: {name}", f"{__name__}:draw_section", place | {"name": name}) for name in SECTIONS]
        )
        drawings = {name: panels for section in sorted(drawn) for name, panels in drawn[section].items()}
    if not crew or not crew.signal:
        write_report(results, out, drawings)
    return "\n".join([*sentences.answer(results), f"report: {out / 'report.html'}"])


def draw_section(out: str, name: str) -> dict[str, list[str]]:
    """`page.draw` of one section, as a task."""
    from tiedjax.analysis.study.page import draw

    return draw(_read_results(Path(out)), name, Path(out))


def _read_results(out: Path) -> dict[str, Any]:
    path = out / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; `tiedjax study` writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(results, dict):
        raise UserError(f"{path}: must hold an object, got {type(results).__name__}; `tiedjax study` writes it")
    return results


def _analyse(plan: Plan, out: Path, parts: Mapping[str, Any], seconds: float) -> None:
    from tiedjax.analysis.study.results import summarize

    environment = environment_now() | {"study_seconds": seconds}
    results = summarize(plan.study, _runs(plan.study, out / "runs"), environment=environment, parts=parts)
    write_atomically(out / "results.json", json.dumps(results | {"name": plan.name}, indent=1, allow_nan=False))


def environment_now() -> dict[str, Any]:
    """Versions, devices and date of this process."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in REPORTED_PACKAGES},
    }
