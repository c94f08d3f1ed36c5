"""What the folder of a run tells the next command: whether this one may go on with it, and where it stands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from tiedjax import tying
from tiedjax.config import RunConfig
from tiedjax.config_files import flatten, load_run_config, to_tree, to_yaml
from tiedjax.counting import TOKEN_COUNTS
from tiedjax.data.prepared import Prepared, save_array
from tiedjax.errors import UserError
from tiedjax.host import process, storage
from tiedjax.host.storage import write_atomically
from tiedjax.run import CHANGED, change_of

# What may differ between the command that began a run and the one that continues it: it changes no step that was made.
MAY_CHANGE = {
    *("data.cache", "data.workers", "mesh.data", "mesh.fsdp", "mesh.tensor", "train.threads"),
    *("train.stop_at", "train.log_every", "train.sinks", "train.eval_every", "train.eval_batches"),
    *("train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.keep_every"),
    *("train.snapshot_every", "train.snapshot_gib", "train.early_snapshots_dtype", "train.anatomy"),
    *("train.skip_nonfinite", "train.stall_seconds"),
    *("tying.untie_at", "tying.tie_at"),  # while the change lies ahead
}

SAVED_STATE = "saved_state.json"  # says that a state was committed, and at which step


def as_begun(cfg: RunConfig, out: Path) -> RunConfig:
    """The config with `model.scan_layers`, where it is left open, as the run in `out` has it, whatever its platform."""
    path = out / "config.yaml"
    if cfg.model.scan_layers is not None or not storage.exists(path):
        return cfg
    scan = load_run_config(path).model.scan_layers
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=scan))


def log_every_before(cfg: RunConfig, out: Path) -> int:
    """`train.log_every` of the command before; what metrics.jsonl should hold goes by it."""
    path = out / "config.yaml"
    return (load_run_config(path) if storage.exists(path) else cfg).train.log_every


def refuse_another_run(cfg: RunConfig, out: Path) -> None:
    """UserError where the folder holds a run that trains in another way."""
    path = out / "config.yaml"
    # A run that saved nothing has nothing to lose.
    if not storage.exists(path) or not storage.saved_steps(out / "snapshots"):
        return
    begun = load_run_config(path)
    _refuse_passed_changes(begun, cfg, out)
    old, new = (dict(flatten(to_tree(config))) for config in (begun, cfg))
    for key in sorted(old.keys() - MAY_CHANGE):
        if old[key] != new[key]:
            raise UserError(
                f"{out}: holds a run with {key} = {old[key]!r}, not {new[key]!r}; choose another --out or go back to it"
            )


def _refuse_passed_changes(begun: RunConfig, cfg: RunConfig, out: Path) -> None:
    """A change of scheme may be put off, or decided on, while it lies ahead of the newest state."""
    done = max(storage.saved_steps(out / "checkpoints"), default=0)
    was, now = tying.changes_after(begun), tying.changes_after(cfg)
    if was == now:
        return
    if was is not None and was < done:
        raise UserError(
            f"{out}: holds a run whose scheme changed after step {was}; choose another --out or go back to it"
        )
    if now is not None and now < done:
        name = "untie_at" if cfg.tying.untie_at is not None else "tie_at"
        raise UserError(
            f"tying.{name}: step {now} lies behind step {done}, which the run has reached; give a later one"
        )


def refuse_lost_states(out: Path) -> None:
    """A run whose states are gone must not begin again unasked: it would remove its metrics and snapshots."""
    record = out / SAVED_STATE
    if storage.exists(record) and not storage.saved_steps(out / "checkpoints"):
        step = storage.read_step(record)
        raise UserError(
            f"{out}: a state was saved at step {step}, but checkpoints/ holds none; bring it back, or choose another "
            "--out to begin anew"
        )


def known_change(cfg: RunConfig, out: Path) -> int | None:
    """The step after which the scheme changes, where it is set, or was found before the newest state was saved."""
    changed = change_of(out, cfg)
    done = max(storage.saved_steps(out / "checkpoints"), default=0)
    if cfg.tying.untie_when is None or changed is None or changed <= done:
        return changed
    storage.remove(out / CHANGED)  # found, but lost with the states since
    return None


def record(name: str, out: Path, step: int) -> None:
    """The main process writes this step into the file of this name: SAVED_STATE once the state of the step is
    committed, CHANGED and OWED before it is saved."""
    if process.is_main():
        write_atomically(out / name, json.dumps({"step": step}) + "\n")


def forget(name: str, out: Path) -> None:
    """The main process removes what it had recorded under this name, if it had."""
    if process.is_main():
        storage.remove(out / name)


def describe(cfg: RunConfig, out: Path, prepared: Prepared, counts_2V: np.ndarray | None) -> None:
    """The main process writes what the run is; without `counts_2V` old ones go, until those of its text are counted."""
    if not process.is_main():
        return
    if counts_2V is None:
        storage.remove(out / TOKEN_COUNTS)
    else:
        save_array(out / TOKEN_COUNTS, counts_2V)
    if prepared.tokenizer_path:
        write_atomically(out / "tokenizer.json", prepared.tokenizer_path.read_bytes())
    write_atomically(out / "config.yaml", to_yaml(cfg))
