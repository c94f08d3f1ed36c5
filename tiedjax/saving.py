"""Saving what a run must not lose: room is looked for before, and a save that fails is made again."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from tiedjax.checkpoint import Checkpoints
from tiedjax.errors import TrainingError, UserError
from tiedjax.host import ending, process, storage
from tiedjax.saves import Saves
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
