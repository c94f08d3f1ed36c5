"""The runs of a study as tasks for its workers, and how far they are by what lies in their folders."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiedjax import sweep, tying
from tiedjax.config import RunConfig
from tiedjax.config_files import structure, to_tree
from tiedjax.errors import NotFiniteError, UserError
from tiedjax.host import process, storage
from tiedjax.host.workers import Task
from tiedjax.loop import Outcome, train
from tiedjax.run import load_run, owed

DIVERGED = "diverged.json"  # in the folder of a sweep's run: its loss or its update was not finite


def task(function: str, folder: Path, cfg: RunConfig, until: float | None) -> Task:
    """One of the functions below, by name, on a run; those of one kind compile the same."""
    arguments = {"config": to_tree(cfg), "out": str(folder), "until": until}
    kind = f"{tying.without_scales(cfg.tying)} {cfg.model} {cfg.optimizer}"
    return Task(folder.name, f"{__name__}:{function}", arguments, kind)


def train_run(config: Mapping[str, Any], out: str, until: float | None) -> dict[str, Any]:
    """`loop.train` of a resolved config, as a task: the outcome's fields."""
    cfg, folder = structure(RunConfig, config, out), storage.place(out, "--out")
    too_late = lambda: time.monotonic() >= (until or 0) and not is_trained(folder, cfg)
    if until is not None and process.main_says(too_late):
        return dataclasses.asdict(Outcome(0, finished=False, time_is_up=True))
    return dataclasses.asdict(train(cfg, folder, until=until))


def try_run(config: Mapping[str, Any], out: str, until: float | None) -> dict[str, Any]:
    """`train_run` of a sweep, with the `loss` by which it is judged; None where training diverged."""
    out_of_it = dataclasses.asdict(Outcome(0, finished=True)) | {"loss": None}
    if process.main_says(lambda: diverged(storage.place(out, "--out"), config)):
        return out_of_it
    try:
        outcome = train_run(config, out, until)
    except NotFiniteError as error:
        folder = storage.place(out, "--out")
        process.say(f"{folder.name}: {error}; this point is out")
        if process.is_main():
            record = {"error": str(error), "config": _to_its_end(config)}
            storage.write_atomically(folder / DIVERGED, json.dumps(record) + "\n")
        return out_of_it
    if not outcome["finished"]:
        return outcome | {"loss": None}
    return outcome | process.from_main(lambda: {"loss": _judged_by(out)})


def _judged_by(out: str) -> float:
    losses = load_run(out).metrics.get(sweep.LOSS)
    if losses is None:
        raise UserError(f"{out}: a sweep needs two held-out windows at least; raise data.holdout or train.eval_batches")
    return float(losses[-1])


def diverged(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run of this config is on record here as one that diverged."""
    record = folder / DIVERGED
    if not storage.exists(record):
        return False
    found = storage.read_json(record, "remove it, and the run is tried again")
    if not isinstance(found, dict) or "config" not in found:
        raise UserError(f"{record}: holds no config; remove it, and the run is tried again")
    return bool(found["config"] == _to_its_end(config))


def _to_its_end(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without `train.stop_at`, which changes nothing of a run that diverges before."""
    return {**config, "train": {**config["train"], "stop_at": None}}


def is_trained(folder: Path, cfg: RunConfig) -> bool:
    """Whether a run's folder holds the state after its last step, and all that was to be evaluated."""
    return cfg.train.steps in storage.saved_steps(folder / "checkpoints") and owed(folder) is None


def steps_left(folder: Path, cfg: RunConfig) -> int:
    """How many steps a call still trains in a run's folder: none of one that diverged."""
    if diverged(folder, to_tree(cfg)):
        return 0
    return max(0, cfg.train.last - max(storage.saved_steps(folder / "checkpoints"), default=0))
