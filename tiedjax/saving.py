"""Saving what a run must not lose: room is looked for before, and a save that fails is made again."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tiedjax.beginning import BODY_UPDATE
from tiedjax.checkpoint import ROUNDED_TO, Checkpoints
from tiedjax.continuing import SAVED_STATE, record
from tiedjax.errors import TrainingError, UserError
from tiedjax.host import ending, process, storage
from tiedjax.saves import Saves
from tiedjax.step import TrainState
from tiedjax.text import binary

PAUSES = (1.0, 5.0, 25.0)  # seconds before a save that failed is made again


def refuse_what_cannot_fit(out: Path, saves: Saves, done: int, last: int) -> None:
    """UserError if the disk has no room for what the updates after `done` up to `last` will write; a store has."""
    if storage.is_remote(out) or not process.is_main():
        return
    there = sum(path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file())  # makes room
    needed, free = saves.most_bytes(done, last), shutil.disk_usage(out).free + there
    if needed > free:
        raise UserError(
            f"{out}: there is room for {binary(free)}, and up to {binary(needed)} will be written; free some, choose "
            "another --out, or see train.keep_checkpoints and train.snapshot_gib"
        )


@dataclass
class RunSaver:
    """Saves the states and the snapshots of the run in `out`, with `about` beside each.

    `recorded` says whether its folder tells that a state was committed.
    """

    out: Path
    checkpoints: Checkpoints
    snapshots: Checkpoints
    about: dict[str, Any]
    recorded: bool

    def save_snapshot(self, step: int, state: TrainState, *, rounded: bool = False, wait: bool = False) -> None:
        """What is for analysis alone: the tables, `rounded` to bfloat16 if asked, and their account if there is one."""
        tables, about = state.params["tables"], self.about
        if rounded:
            tables, about = _rounded(tables), {**about, ROUNDED_TO: "bfloat16"}
        account = {"account": state.account} if state.account else {}
        save(self.snapshots, step, {"tables": tables, **account}, about, wait=wait)

    def save_state(self, step: int, state: TrainState, body_update: Any, *, wait: bool = False) -> None:
        """All that the next step needs, once the snapshots before it are complete."""
        settle(self.snapshots)  # or a crash could leave a state after which an older snapshot is never made again
        whole = state._asdict() | ({BODY_UPDATE: body_update} if body_update else {})
        save(self.checkpoints, step, whole, self.about, wait=wait or not self.recorded)
        if not self.recorded:  # the first one, which was waited for: what is recorded must be there
            record(SAVED_STATE, self.out, step)
            self.recorded = True


@jax.jit
def _rounded(tables: Any) -> Any:
    rounded = lambda array: array.astype(jnp.bfloat16) if jnp.issubdtype(array.dtype, jnp.floating) else array
    return jax.tree.map(rounded, tables)


def save(checkpoints: Checkpoints, step: int, tree: Any, about: dict[str, Any], *, wait: bool = False) -> None:
    """`Checkpoints.save`, once the save before it is complete or has failed, which is said.

    With `wait` it is complete when this returns, and made again where it fails. TrainingError when it has failed for
    the last time; in a cluster that is the first, as the others are in the middle of the same save.
    """
    settle(checkpoints)
    pauses, failed = iter(PAUSES if jax.process_count() == 1 else ()), ""
    while True:
        try:
            if failed:
                storage.clear_unfinished(checkpoints.directory)
            _refuse_without_room(checkpoints.directory, tree)
            checkpoints.save(step, tree, about)
            if wait:
                checkpoints.wait()
        except Exception as error:  # of the file system, as Orbax, TensorStore or Python tell it
            failed, pause = _failed(checkpoints, step, error), next(pauses, None)
            if pause is None:
                kept = checkpoints.steps()
                newest = f"the newest there is that of step {kept[-1]}" if kept else "there is none yet"
                raise TrainingError(f"{failed}; {newest}") from error
            process.say(f"{failed}; it is tried again in {pause:g} s")
            time.sleep(pause)
            wait = True
        else:
            return


def settle(checkpoints: Checkpoints) -> None:
    """Waits for what is being saved; says what went wrong with it, and in a cluster raises it."""
    try:
        checkpoints.wait()
    except Exception as error:  # as above
        if jax.process_count() > 1:
            raise
        with contextlib.suppress(OSError):  # what cannot be removed now is before the next save that fails
            storage.clear_unfinished(checkpoints.directory)
        process.say(f"{_failed(checkpoints, checkpoints.begun, error)}; the run goes on without it")


def _failed(checkpoints: Checkpoints, step: int | None, error: Exception) -> str:
    """What is to be said of a save that failed; its threads, which may wait for minutes, are left to themselves."""
    ending.abandon_threads()
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{checkpoints.directory}: step {step} cannot be saved: {reason}"


def _refuse_without_room(folder: Path, tree: Any) -> None:
    if storage.is_remote(folder):
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it takes {binary(needed)}, and there is room for {binary(free)}")
