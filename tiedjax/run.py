"""Reading a run directory, on any machine, whatever it was trained on."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax import tying
from tiedjax.checkpoint import ROUNDED_TO, Checkpoints
from tiedjax.config import RunConfig
from tiedjax.config_files import load_run_config
from tiedjax.errors import StoreError, UserError
from tiedjax.files import parse_json
from tiedjax.host import storage
from tiedjax.lm import abstract_params
from tiedjax.model import Transformer
from tiedjax.npy import read_npy

CHANGED = "untied.json"  # of a run that unties when it is time: after which step it did
OWED = "evaluation_owed.json"  # of a run that a signal stopped while it evaluated: after which step


class RunTables(NamedTuple):
    """The two tables of a run at one step: NumPy float32 [V, D] each, and whether they are one and the same."""

    input: np.ndarray
    output: np.ndarray
    tied: bool


class RunAccount(NamedTuple):
    """Who wrote a table of both roles, up to one step: NumPy float32 [rows, D] each, which sum to the table's rows.

    Attributes:
      rows: int [rows], ascending: all of the table or those that the run followed.
      log_kept: the logarithm of what decay has left of the initial table.
      initial: that.
      input, output: what the updates of each role wrote and decay has left.
      regularisers: the same of each regulariser, by its name; {} of a run without any.
    """

    rows: np.ndarray
    log_kept: float
    initial: np.ndarray
    input: np.ndarray
    output: np.ndarray
    regularisers: dict[str, np.ndarray]


class Run:
    """A run directory. Nothing is read before it is asked for.

    Raises UserError if `path` holds no run.
    """

    def __init__(self, path: str | Path):
        self.path = storage.place(path, "run")
        self.name = storage.absolute(self.path).name
        self._started: np.ndarray | None = None  # the rows that an account follows, before the first update
        if not storage.exists(self.path / "config.yaml"):
            raise UserError(f"{self.path}: is no run directory: it holds no config.yaml")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (str(self.path),)  # what was read is read again: Orbax's readers cannot be copied

    @cached_property
    def config(self) -> RunConfig:
        """The resolved config."""
        return load_run_config(self.path / "config.yaml")

    @property
    def seq_len(self) -> int:
        """Positions of a window of text, as the model was trained on."""
        return self.config.model.seq_len

    @cached_property
    def changed_after(self) -> int | None:
        """After how many updates the run's scheme changed, or will; None if it has not, and no step is set for it."""
        return change_of(self.path, self.config)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """Columns of metrics.jsonl as float64 arrays (step: int64); NaN where a line has no value.

        Columns of deciles are [steps, 10].
        """
        rows = read_metrics(self.path / "metrics.jsonl")
        if not rows and self.snapshot_steps and (last := self.snapshot_steps[-1]):
            raise UserError(
                f"{self.path / 'metrics.jsonl'}: has no line of steps 1 to {last}; bring it back (tiedjax check "
                f"{self.path} says what else is missing)"
            )
        columns = {}
        for name in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(name) for row in rows]
            width = max((len(v) for v in values if isinstance(v, list)), default=0)
            blank = [None] * width if width else None
            try:
                column = np.array([blank if v is None else v for v in values], dtype=np.float64)
            except (ValueError, TypeError, OverflowError):
                raise UserError(f"{self.path / 'metrics.jsonl'}: {name!r} is not a number in every line") from None
            columns[name] = column.astype(np.int64) if name == "step" else column
        return columns

    @cached_property
    def snapshot_steps(self) -> list[int]:
        """Steps at which the tables were saved, ascending."""
        return self._snapshots.steps() if self._snapshots else []

    @cached_property
    def checkpoint_steps(self) -> list[int]:
        """Steps at which the full state was saved and kept, ascending."""
        return self._checkpoints.steps() if self._checkpoints else []

    @cached_property
    def token_counts(self) -> np.ndarray:
        """int64 [2, V]: how often each token is an input and a target in one pass over the training windows."""
        path = self.path / "token_counts.npy"
        try:
            counts = read_npy(storage.cached(path))
        except StoreError:
            raise
        except UserError as error:
            hint = "remove it, and the command that trained the run writes it again" if storage.exists(path) else ""
            raise UserError(f"{error}; {hint or 'the command that trained the run writes it'}") from None
        if counts.dtype.kind not in "iu" or counts.ndim != 2 or len(counts) != 2 or (counts.size and counts.min() < 0):
            raise UserError(
                f"{path}: is damaged: it holds no counts [2, V]; "
                "remove it, and the command that trained the run writes it again"
            )
        return counts

    @cached_property
    def tokenizer_path(self) -> Path | None:
        """The run's tokenizer.json, or a copy on this machine's disk; None if it was trained on ready token ids."""
        path = self.path / "tokenizer.json"
        return storage.cached(path) if storage.exists(path) else None

    def tables(self, step: int | None = None) -> RunTables:
        """The tables after `step` updates, float32 however they were saved; by default the last snapshot."""
        step, _ = self._choose(step, self._snapshots, "snapshot")
        arrays, _ = self._restored(step)
        tables = self.scheme(step).tables(arrays)
        one = tables.input is tables.output
        E_VD = np.asarray(tables.input)
        return RunTables(E_VD, E_VD if one else np.asarray(tables.output), one)

    def arrays(self, step: int | None = None) -> dict[str, np.ndarray]:
        """What the tables after `step` updates come from, by name, float32; by default the last snapshot."""
        return self._restored(step)[0]

    def scheme(self, step: int) -> tying.Scheme:
        """How the tables after `step` updates come from arrays: `run.scheme(step).tables(run.params(step)["tables"])`.

        It is another one before and after a step at which the run untied, or tied.
        """
        return tying.scheme_of(self.config_at(step).tying)

    def account(self, step: int | None = None) -> RunAccount:
        """Who wrote the array that both roles write, up to `step`; by default the last snapshot.

        UserError where the run kept no account of one.
        """
        step, _ = self._choose(step, self._snapshots, "snapshot")
        cfg = self.config_at(step)
        form, names, scheme = tying.follow(cfg), tying.scheme_of(cfg.tying).followed, cfg.tying.scheme
        if form == "off" or len(names) != 1:
            reason = "tying.account was off" if names else f"under {scheme} each role has its own table"
            if tying.scheme_of(cfg.tying).account == "none":
                reason = f"the tables of {scheme} are no sums of what the roles wrote"
            elif cfg is not self.config:
                reason += f", as it is after step {self.changed_after}"
            raise UserError(f"{self.path}: has no account of one table: {reason}")
        sample = jax.ShapeDtypeStruct((min(tying.SAMPLE_ROWS, cfg.model.table_rows),), np.int32)

        def opened(tables: Any, sample_S: jax.Array) -> Any:
            rows = tying.rows_of(form, cfg.model.table_rows, sample_S)
            return tying.opened(tables, names, form, rows, cfg.regularisers.weights)

        abstract = jax.eval_shape(opened, abstract_params(cfg)["tables"], sample)
        arrays, beside = self._restored(step, account=without_sharding(abstract))
        saved: tying.Account = beside["account"]
        written, log_kept = saved.written[names[0]], float(saved.log_kept[names[0]][0])
        rows = np.arange(cfg.model.table_rows) if saved.rows.sample is None else saved.rows.sample
        if self._started is None:  # a run follows the same rows from its first step to its last
            self._started = self._restored(0)[0][names[0]]
            if cfg.optimizer.tables.centered:
                self._started = self._started - self._started.mean(axis=0)
            self._started = self._started[rows]
        initial = np.asarray(np.exp(log_kept) * self._started, np.float32)
        others = {} if saved.regulariser is None else saved.regulariser[names[0]]
        if form == "checked":
            output = written.output
        else:
            output = arrays[names[0]][rows] - initial - written.input - sum(others.values())
        return RunAccount(rows, log_kept, initial, written.input, output, others)

    def params(self, step: int | None = None) -> dict[str, Any]:
        """{"tables", "body"} as NumPy after `step` updates; by default the last full checkpoint.

        With model.output_bias also "output_bias", float32 [V], which is added to the logits and was never trained.
        """
        step, checkpoints = self._choose(step, self._checkpoints, "checkpoint")
        abstract = {"params": without_sharding(abstract_params(self.config_at(step)))}
        return dict(checkpoints.restore(step, abstract)["params"])

    def model(self) -> Transformer:
        """The body: `run.model().apply(run.params()["body"], x_BTD) -> h_BTD`.

        The logits are h_BTD times the output table, z, or with `model.logit_cap` cap tanh(z / cap), and
        `run.params()["output_bias"]` if the run has one.
        """
        return Transformer(dataclasses.replace(self.config.model, attention="auto"))  # what suits this machine

    def config_at(self, step: int) -> RunConfig:
        """The config in force when the state after `step` updates was saved."""
        return tying.stage(self.config, self.changed_after is not None and step > self.changed_after)

    @cached_property
    def _snapshots(self) -> Checkpoints | None:
        return _existing(self.path / "snapshots", copies=True)

    @cached_property
    def _checkpoints(self) -> Checkpoints | None:
        return _existing(self.path / "checkpoints")

    def _restored(self, step: int | None, **beside: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The scheme's arrays in a snapshot, float32, and, by name, what of these shapes was saved beside them."""
        step, snapshots = self._choose(step, self._snapshots, "snapshot")
        dtype = jnp.dtype(snapshots.about(step).get(ROUNDED_TO, "float32"))
        arrays = abstract_params(self.config_at(step))["tables"]
        abstract = {"tables": without_sharding(arrays, dtype), **beside}
        saved = snapshots.restore(step, abstract)
        return jax.tree.map(_wide, saved.pop("tables")), saved

    def _choose(self, step: int | None, saves: Checkpoints | None, kind: str) -> tuple[int, Checkpoints]:
        steps = saves.steps() if saves else []
        if saves is None or not steps:
            raise UserError(f"{self.path}: holds no {kind}")
        if step is not None and (isinstance(step, bool) or not isinstance(step, (int, np.integer))):
            raise UserError(f"step: must be a whole number, got {step!r}")
        if step is not None and step not in steps:
            raise UserError(f"{self.path}: no {kind} of step {step}; there are {', '.join(map(str, steps))}")
        return (steps[-1] if step is None else step), saves


def change_of(path: Path, cfg: RunConfig) -> int | None:
    """After how many updates the scheme of the run in this folder changes; None if that is not known, or never."""
    record = path / CHANGED
    if cfg.tying.untie_when is None or not storage.exists(record):
        return tying.changes_after(cfg)
    try:
        step = storage.read_step(record)
    except UserError:
        step = 0
    if not 0 < step <= cfg.train.steps:
        raise UserError(f'{record}: must hold {{"step": N}}, the update after which the run untied')
    return step


def load_run(path: str | Path) -> Run:
    """Opens a run directory for reading."""
    return Run(path)


def read_metrics(path: Path, named: Path | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out.

    Raises UserError for a file that is missing or damaged elsewhere, which is called `named` where it is a copy.
    """
    where = str(named or path)
    lines = storage.read_text(path).splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        row = parse_json(line, where, before=number - 1)
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} must hold an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _existing(directory: Path, copies: bool = False) -> Checkpoints | None:
    return Checkpoints(directory, create=False, copies=copies) if storage.exists(directory) else None


def without_sharding(tree: Any, dtype: Any = None) -> Any:
    """The same shapes, to be restored as NumPy; numbers with the leaves' dtypes or all with `dtype`."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        kept = dtype if dtype and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept)

    return jax.tree.map(shape, tree)


def _wide(leaf: Any) -> np.ndarray:
    """Numbers as float32, integers as they are."""
    array = np.asarray(leaf)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def owed(path: Path) -> int | None:
    """After which step the run here still has to evaluate, if a signal has kept it from that."""
    record = path / OWED
    return storage.read_step(record) if storage.exists(record) else None
