"""A study: twin runs over several seeds, then their results and report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from tiedjax import platform_flags, process, tying
from tiedjax.config import RunConfig, StudyConfig, merge, parse_overrides, read_yaml, structure, to_yaml
from tiedjax.data.prepare import prepare
from tiedjax.errors import UserError
from tiedjax.files import sole_writer, write_atomically
from tiedjax.loop import Outcome, train
from tiedjax.run import load_run
from tiedjax.text import duration
from tiedjax.workers import Task, train_all

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


def quick_study() -> Path:
    """The file of the quick study: of the source tree, or of the installed package."""
    package = Path(__file__).parent
    for folder in (package.parent, package):
        path = folder / "configs" / "studies" / "quick.yaml"
        if path.is_file():
            return path
    raise UserError("configs/studies/quick.yaml: not found beside the package; name a study file")


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
    for arm, shared in [(study.reference, False), (study.baseline, True)]:
        scheme = runs[arm, study.seeds[0]].tying.scheme
        if tying.SCHEMES[scheme].shares_one_table != shared:
            wanted = "one table in both roles" if shared else "a table for each role"
            raise UserError(f"{path}: arm {arm!r} needs a scheme with {wanted}, its tying.scheme is {scheme!r}")
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

    With more than one of `workers`, that many processes of this machine train a run each. Returns the outcome of the
    run that was stopped, or else of the last one.
    """
    began = time.monotonic()
    process.refuse_unshared(out)
    if process.is_main():
        with sole_writer(out):
            write_atomically(out / "study.yaml", to_yaml(plan.study))
    names = [f"{arm}-{seed}" for arm, seed in plan.runs]

    def begins(number: int) -> None:
        done = max(0, number - workers)
        left = (time.monotonic() - began) / max(done, 1) * (len(names) - done)
        if process.is_main():
            soon = f"; about {duration(left)} left" if done else ""
            print(f"run {number} of {len(names)}: {names[number - 1]}{soon}", flush=True)

    tasks = [Task(cfg, out / "runs" / name) for name, cfg in zip(names, plan.runs.values(), strict=True)]
    if workers > 1:
        say = partial(print, flush=True)
        for data, vocab_size in dict.fromkeys((cfg.data, cfg.model.vocab_size) for cfg in plan.runs.values()):
            prepare(data, vocab_size, report=say)  # once, by one process
        outcome = train_all(tasks, workers, plan.threads, begins, say)
        if not outcome.finished or outcome.signal:
            return outcome
    for number, task in enumerate(tasks if workers == 1 else [], 1):
        begins(number)
        outcome = train(task.cfg, task.out)
        if not outcome.finished or outcome.signal:
            return outcome
    if process.is_main():
        print("analysing ...", flush=True)
        _analyse(plan, out, time.monotonic() - began)
        print(draw_report(out))
    return outcome


def draw_report(out: Path) -> str:
    """Redraws the report from results.json; returns the answer and where the report is."""
    from tiedjax.analysis.report import write_report

    path = out / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; `tiedjax study` writes it") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(results, dict):
        raise UserError(f"{path}: must hold an object, got {type(results).__name__}; `tiedjax study` writes it")
    write_report(results, out)
    return "\n".join([results["answer"], *results["findings"], f"report: {out / 'report.html'}"])


def _analyse(plan: Plan, out: Path, seconds: float) -> None:
    from tiedjax.analysis.blocked import few_threads
    from tiedjax.analysis.summary import summarize

    runs = {key: load_run(out / "runs" / f"{key[0]}-{key[1]}") for key in plan.runs}
    environment = environment_now() | {"study_seconds": seconds}
    model = next(iter(plan.runs.values())).model
    with few_threads(model.table_rows * model.d_model):
        results = summarize(plan.study, runs, environment=environment) | {"name": plan.name}
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False))


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
