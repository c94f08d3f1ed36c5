"""A study: the runs of its sweeps, twin runs over several seeds, then their results and report."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from tiedjax import sweep, work
from tiedjax.config import RunConfig
from tiedjax.config_files import to_tree, to_yaml
from tiedjax.data.prepare import prepare
from tiedjax.estimate import Progress, foreseen
from tiedjax.host import platform_flags, process
from tiedjax.host.storage import sole_writer, write_atomically
from tiedjax.host.workers import Crew, Task, call
from tiedjax.loop import Outcome
from tiedjax.plan import Plan
from tiedjax.work import is_trained

ANALYSIS = "tiedjax.analysis.study.tasks"  # whose functions are called as tasks; it loads what training does without
REPORTED_PACKAGES = ("tiedjax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclass(frozen=True)
class Extent:
    """What of a study is asked for.

    Attributes:
      trains: whether what is not yet trained is trained.
      analyses: whether what is trained is analysed and the report drawn.
      instruments: those that are analysed beside what the answer needs; None: all.
      time_limit: seconds after which training stops, between two steps; what is trained by then is still analysed.
      partial: whether a study is analysed of which not all is trained.
    """

    trains: bool = True
    analyses: bool = True
    instruments: tuple[str, ...] | None = None
    time_limit: float | None = None
    partial: bool = True


def workers_for(plan: Plan, asked: int | None = None) -> int:
    """How many runs of a study train side by side on this machine; needs no JAX.

    On a CPU as many as were `asked` for, by default as many as have `train.threads` cores each; 1 on accelerators,
    which a run has to itself. Results do not depend on it.
    """
    if platform_flags.has_accelerator():
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(asked or max(1, cores // plan.threads), max(len(plan.runs), len(plan.trials)))


def run_study(plan: Plan, out: Path, workers: int = 1, extent: Extent = Extent()) -> Outcome:
    """Trains what is not yet trained, then writes results.json, report.html and figures/ in `out`.

    With more than one of `workers`, that many processes of this machine train a run each, and analyse side by side.
    Returns the outcome of a run that was stopped, or else of one that `train.stop_at` has ended, or else of any.
    """
    began = time.monotonic()
    until = None if extent.time_limit is None else began + extent.time_limit
    process.refuse_unshared(out)
    if process.is_main():
        with sole_writer(out):
            write_atomically(out / "study.yaml", to_yaml(plan.study))
    with Crew(workers, plan.threads, partial(print, flush=True)) if workers > 1 else nullcontext() as crew:
        study = _Study(plan, out, crew, extent, until)
        outcome = study.train() if extent.trains else study.settle()
        if outcome.signal or not process.is_main():
            return outcome
        if outcome.time_is_up:
            print(f"time is up: {study.done()}; the same command continues", flush=True)
        elif not outcome.finished:
            print(f"train.stop_at: {study.done()}; a later one, or none, continues", flush=True)
        if extent.analyses and (outcome.finished or extent.partial):
            study.analyse(began)
        return dataclasses.replace(outcome, signal=crew.signal if crew else None)


class _Study:
    """A study under way: its plan, settled once its sweeps have chosen, and the parts of the results so far by name."""

    def __init__(self, plan: Plan, out: Path, crew: Crew | None, extent: Extent, until: float | None):
        self._plan, self._out, self._crew, self._extent, self._until = plan, out, crew, extent, until
        self._choices: dict[str, sweep.Choice] = {}
        self._parts: dict[str, Any] = {}
        self._size = crew.size if crew else 1

    def train(self) -> Outcome:
        """Every run of the sweeps, then every run of the settled plan, and parts of the results beside them.

        A crew begins a part as soon as the runs that it is about have ended, so that no worker waits for the last run.
        """
        if self._crew:
            for data, vocab_size in dict.fromkeys((cfg.data, cfg.model.vocab_size) for cfg in self._plan.runs.values()):
                prepare(data, vocab_size, report=partial(print, flush=True))  # once, by one process
        trials = {self._trial_folder(trial): cfg for trial, cfg in self._plan.trials.items()}
        runs = {self._folder(run): cfg for run, cfg in self._plan.runs.items()}
        left = [(cfg, work.steps_left(folder, cfg)) for folder, cfg in (trials | runs).items()]
        if line := foreseen(left, self._size):
            process.say(line)
        if trials:
            outcome = self._sweep(trials)
            if not outcome.finished or outcome.stopped:
                return outcome
            runs = {self._folder(run): cfg for run, cfg in self._plan.runs.items()}
        whole = all(cfg.train.last == cfg.train.steps or is_trained(folder, cfg) for folder, cfg in runs.items())
        parts = self._part_tasks(self._plan.runs) if self._crew and self._extent.analyses and whole else {}
        results = self._train("run", "train_run", runs, list(parts.values()))
        self._parts = {name: results[place] for place, name in enumerate(parts, len(runs)) if place in results}
        return self._outcome(results, len(runs))

    def settle(self) -> Outcome:
        """Takes what a sweep has chosen before, and trains nothing."""
        if self._plan.trials:
            self._take(sweep.read(self._plan, self._out))
        return Outcome(0, finished=True)

    def done(self) -> str:
        """How many runs are trained, in words."""
        done = sum(is_trained(self._folder(key), cfg) for key, cfg in self._plan.runs.items())
        words = f"{done} of {len(self._plan.runs)} runs are trained"
        if self._plan.trials and not self._choices:
            tried = sum(
                is_trained(folder, cfg) or work.diverged(folder, to_tree(cfg))
                for key, cfg in self._plan.trials.items()
                for folder in [self._trial_folder(key)]
            )
            words = f"{tried} of {len(self._plan.trials)} runs of the sweep are trained"
        return words

    def analyse(self, began: float) -> None:
        """Writes the results and the report of the runs that are trained; says so where there is nothing to compare."""
        trained = [key for key, cfg in self._plan.runs.items() if is_trained(self._folder(key), cfg)]
        if not any(arm == self._plan.study.reference for arm, _ in trained):
            print(f"nothing to report yet: no run of {self._plan.study.reference} is trained")
            return
        missing = {name: task for name, task in self._part_tasks(trained).items() if name not in self._parts}
        if missing:
            print("analysing ...", flush=True)
        results = self._call([dataclasses.replace(task, after=()) for task in missing.values()])
        if self._crew and self._crew.signal:
            return
        self._parts |= {name: results[place] for place, name in enumerate(missing)}
        _write_results(self._plan, self._out, trained, self._parts, sweep.plain(self._choices), began)
        print(draw_report(self._out, self._crew))

    def _folder(self, run: tuple[str, int]) -> Path:
        return self._out / "runs" / f"{run[0]}-{run[1]}"

    def _trial_folder(self, trial: tuple[str, int, int]) -> Path:
        arm, place, seed = trial
        return self._out / "sweep" / f"{arm}-{place}-{seed}"

    def _sweep(self, trials: Mapping[Path, RunConfig]) -> Outcome:
        """Trains at every point of every arm's sweep, and settles the plan by the best."""
        results = self._train("run of the sweep", "try_run", trials)
        outcome = self._outcome(results, len(trials))
        if outcome.finished and not outcome.stopped:
            losses = {trial: results[place]["loss"] for place, trial in enumerate(self._plan.trials)}
            choices = {}
            for arm, each in self._plan.arms.items():
                if each.points:
                    of_arm = {(place, seed): loss for (name, place, seed), loss in losses.items() if name == arm}
                    choices[arm] = sweep.choose(arm, each.points, of_arm)
            self._take(choices)
            if process.is_main():
                sweep.write(self._out, choices)
        return outcome

    def _take(self, choices: Mapping[str, sweep.Choice]) -> None:
        self._choices = dict(choices)
        self._plan = self._plan.settled({arm: choice.best for arm, choice in choices.items()})

    def _part_tasks(self, runs: Iterable[tuple[str, int]]) -> dict[str, Task]:
        """`analyse_part` of every part of the results that takes long, by name; that of one seed needs its runs only.

        `after` are the places of its runs among all.
        """
        from tiedjax.analysis.instruments import SLOW
        from tiedjax.analysis.study.results import parts_of, seed_of

        tasks, runs = {}, list(runs)
        for name in parts_of(self._plan.study, self._extent.instruments):
            slow = self._plan.study.slow_arms if name.partition(" ")[0] in SLOW else ()
            of = [run for run in runs if seed_of(name) in (None, run[1]) and (not slow or run[0] in slow)]
            if of:
                seeds = tuple(dict.fromkeys(seed for _, seed in of))
                arguments = {
                    "study": to_tree(dataclasses.replace(self._plan.study, seeds=seeds)),
                    "folder": str(self._out / "runs"),
                    "name": name,
                    "runs": of,
                }
                after = tuple(place for place, run in enumerate(runs) if run in of)
                tasks[name] = Task(f"{self._out}: {name}", f"{ANALYSIS}:analyse_part", arguments, "analysis", after)
        return tasks

    def _train(
        self, kind: str, function: str, runs: Mapping[Path, RunConfig], parts: Sequence[Task] = ()
    ) -> dict[int, Any]:
        """Place: result of the runs and, beside them, the parts; after a run that was stopped no other begins."""
        tasks = [work.task(function, folder, cfg, self._until) for folder, cfg in runs.items()]
        left = {folder.name: work.steps_left(folder, cfg) for folder, cfg in runs.items()}
        progress, begun = Progress(kind, left, self._size), 0

        def begins(place: int, task: Task) -> None:
            nonlocal begun
            begun += 1
            if place < len(runs):
                process.say(progress.begins(task.name))
            elif begun == len(runs) + 1:
                print("analysing ...", flush=True)

        def stops(task: Task, result: Any) -> bool:
            if task.name not in left:
                return False
            progress.ended(task.name)
            return _outcome(result).stopped

        return self._call([*tasks, *parts], begins, stops)

    def _call(
        self,
        tasks: Sequence[Task],
        begins: Callable[[int, Task], None] = lambda place, task: None,
        stops: Callable[[Task, Any], bool] = lambda task, result: False,
    ) -> dict[int, Any]:
        """`Crew.run`; without a crew one after the other, in this process."""
        if self._crew:
            return self._crew.run(tasks, begins, stops)
        results: dict[int, Any] = {}
        for place, task in enumerate(tasks):
            begins(place, task)
            results[place] = call(task)
            if stops(task, results[place]):
                break
        return results

    def _outcome(self, results: Mapping[int, Mapping[str, Any]], runs: int) -> Outcome:
        """Of a run that was stopped, or else of one that `train.stop_at` has ended, or else of any."""
        trained = [_outcome(results[place]) for place in range(runs) if place in results]
        ended = max(trained, key=lambda outcome: (outcome.stopped, not outcome.finished), default=Outcome(0, False))
        heard = self._crew.signal if self._crew else ended.signal
        return dataclasses.replace(ended, signal=heard)


def _outcome(result: Mapping[str, Any]) -> Outcome:
    """The outcome that a run's task has returned as plain values."""
    heard = result["signal"]
    return Outcome(result["step"], result["finished"], signal.Signals(heard) if heard else None, result["time_is_up"])


def draw_report(out: Path, crew: Crew | None = None) -> str:
    """Redraws the report from results.json; returns the answer, in this version's words, and where the report is."""
    from tiedjax.analysis.study import losses, sentences
    from tiedjax.analysis.study.page import refuse_other_results, write_report
    from tiedjax.analysis.study.sections import SECTIONS
    from tiedjax.analysis.study.tasks import read_results

    results = read_results(out)
    refuse_other_results(results)
    drawings = None
    if crew:
        place = {"out": str(out)}
        drawn = crew.run(
            [Task(f"{out}: {name}", f"{ANALYSIS}:draw_section", place | {"name": name}) for name in SECTIONS]
        )
        drawings = {name: panels for section in sorted(drawn) for name, panels in drawn[section].items()}
    if not crew or not crew.signal:
        write_report(results, out, drawings)
    said = [losses.missing(results), *losses.verdicts(results), *sentences.answer(results)]
    return "\n".join([*filter(None, said), f"report: {out / 'report.html'}"])


def _write_results(
    plan: Plan,
    out: Path,
    trained: Iterable[tuple[str, int]],
    parts: Mapping[str, Any],
    choices: Mapping[str, Any],
    began: float,
) -> None:
    from tiedjax.analysis.study.results import summarize
    from tiedjax.analysis.study.tasks import loaded

    runs = loaded(out / "runs", trained)
    environment = environment_now() | {"study_seconds": time.monotonic() - began}
    results = summarize(plan.study, runs, environment=environment, parts=parts, sweep=choices)
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
