"""Whether what a run has saved can be trusted: everything is read, and nothing is written.

What another process writes meanwhile is no damage: a save that is not complete has no name yet, one that is removed
while it is read is left out, and so is the last line of the metrics where it is not complete.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from tiedjax import sharding, tying
from tiedjax.beginning import BODY_UPDATE
from tiedjax.checkpoint import ROUNDED_TO, Checkpoints, leaf_names
from tiedjax.config import MeshConfig, RunConfig
from tiedjax.config_files import flatten, load_run_config, structure, to_tree
from tiedjax.continuing import MAY_CHANGE, SAVED_STATE
from tiedjax.counting import TOKEN_COUNTS
from tiedjax.data.counts import COUNTED_AT_ONCE
from tiedjax.data.tokenizer import parse_tokenizer, tokenizer_hash
from tiedjax.data.verification import find_prepared, searched, verify
from tiedjax.errors import StoreError, UserError
from tiedjax.host import storage
from tiedjax.run import CHANGED, OWED, change_of, without_sharding
from tiedjax.step import make_steps

METRICS = "metrics.jsonl"
REMOVED_WITHIN = 0.5  # seconds in which a folder that another process removes loses a file

Name = Literal["states", "snapshots", "lines of metrics.jsonl", "other files", "files of its data"]


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was saved."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Kind:
    """How many things of one kind there are, those counted that are missing, and how many of them are whole."""

    name: Name
    whole: int
    of: int

    def __str__(self) -> str:
        if not self.of:
            return f"{self.name}: {'not found' if self.name == 'files of its data' else 'there are none'}"
        return f"{self.name}: {self.whole} of {self.of} {'is' if self.of == 1 else 'are'} whole"


@dataclass(frozen=True)
class Checked:
    """What `check` found in a run directory.

    Attributes:
      run: the directory.
      newest_state: the step of the newest state that is whole; None without one.
      kinds: a count for each kind of thing.
      damage: what is wrong, in the order of the kinds.
      notes: what a reader should know and is no damage.
    """

    run: str
    newest_state: int | None
    kinds: tuple[Kind, ...]
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage

    def lines(self) -> list[str]:
        """All of it as a person reads it; the last line sums it up."""
        newest = "no state is whole"
        if self.newest_state is not None:
            newest = f"the newest state that is whole is that of step {self.newest_state}"
        many = f"{len(self.damage)} {'thing is' if len(self.damage) == 1 else 'things are'} damaged; {newest}"
        last = f"{self.run}: {'is whole' if self.whole else many}"
        return [*map(str, self.kinds), *self.notes, *map(str, self.damage), last]

    def tree(self) -> dict[str, Any]:
        """The same as plain JSON."""
        kinds = {kind.name: {"whole": kind.whole, "of": kind.of} for kind in self.kinds}
        damage = [asdict(damage) for damage in self.damage]
        return {
            "run": self.run,
            "whole": self.whole,
            "newest_state": self.newest_state,
            "kinds": kinds,
            "damage": damage,
            "notes": list(self.notes),
        }


def check(path: str | Path) -> Checked:
    """Reads everything that a run has saved, one state at a time in memory, and says what is damaged.

    UserError where there is no run; StoreError or OSError where an object store does not hand out what lies there.
    """
    run = _run_folder(path)
    notes: list[str] = []
    states, snapshots = _Saves(run / "checkpoints"), _Saves(run / "snapshots")
    for saves in (states, snapshots):
        aside = [name for name in storage.names(saves.folder) if name.startswith("damaged-")]
        notes += [f"{saves.folder / name}: was set aside, and nothing reads it" for name in aside]
    about = states.newest() or snapshots.newest()
    if about is None:
        notes.append(f"{run}: no save can be read, with which the other files could be compared")
    files = _Files(run, about, notes)
    for saves in (states, snapshots):
        saves.verify(files.shapes)
    lines, of_metrics = _metrics(run / METRICS, states, snapshots, files.config, notes)
    shards = _shards(files.config, about, notes)
    damaged_shards = [Damage(str(place), what) for place, what in shards.items() if what]
    kinds = (
        Kind("states", len(states.steps) - len(states.damage), len(states.steps)),
        Kind("snapshots", len(snapshots.steps) - len(snapshots.damage), len(snapshots.steps)),
        lines,
        Kind("other files", len(files.found) - len({each.path for each in files.damage}), len(files.found)),
        Kind("files of its data", len(shards) - len(damaged_shards), len(shards)),
    )
    damage = (*states.damage.values(), *snapshots.damage.values(), *of_metrics, *files.damage, *damaged_shards)
    whole = [step for step in states.steps if step not in states.damage]
    return Checked(str(run), max(whole, default=None), kinds, damage, tuple(notes))


def _run_folder(path: str | Path) -> Path:
    """The folder, if it holds a run; UserError otherwise, which names a run if there is one below it."""
    folder = storage.place(path, "RUN")
    remote = storage.is_remote(folder)
    if storage.exists(folder / "config.yaml"):
        return folder
    storage.refuse_unknown_bucket(folder)
    for pattern in ("runs/*/config.yaml", "*/config.yaml", "*/runs/*/config.yaml"):
        if below := storage.matching(folder / pattern) if remote else sorted(folder.glob(pattern)):
            run = below[0].parent
            raise UserError(f"{folder}: is no run directory, but holds some; name one of them, such as {run}")
    raise UserError(f"{folder}: is no run directory: it holds no config.yaml")


# ---- States and snapshots ----


class _Saves:
    """The saves in one folder, and what is wrong with each, by step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.damage: dict[int, Damage] = {}
        self.about: dict[int, dict[str, Any]] = {}
        self.steps = storage.saved_steps(folder)
        self._reader: Checkpoints | None = None
        for step in list(self.steps):
            try:
                self._reader = self._reader or Checkpoints(folder, create=False)
                self.about[step] = self._reader.about(step)
            except StoreError:
                raise
            except UserError as error:
                self._note(step, str(error))

    def newest(self) -> dict[str, Any] | None:
        """What is said of the newest save of which that can be read."""
        return self.about[max(self.about)] if self.about else None

    def there(self) -> list[int]:
        """The steps whose saves are there now."""
        now = storage.saved_steps(self.folder)
        return [step for step in self.steps if step in now]

    def verify(self, shapes: _Shapes | None) -> None:
        """Reads every save of which it can be said what it should hold."""
        for step, about in self.about.items():
            try:
                self._verify(step, about, shapes)
            except StoreError:
                raise
            except UserError as error:
                self._note(step, str(error))

    def _verify(self, step: int, about: dict[str, Any], shapes: _Shapes | None) -> None:
        if shapes is None or self._reader is None:
            raise UserError("cannot be compared with its config, which cannot be read")
        wanted = shapes.of(self.folder.name, step, about)
        if more := sorted(about["fingerprints"].keys() - set(leaf_names(wanted))):
            raise UserError(f"holds {more[0]!r}, which a run of its config does not save")
        tree = self._reader.restore(step, wanted)
        if int(tree.get("step", step)) != step:
            raise UserError(f"is the state of step {int(tree['step'])}")

    def _note(self, step: int, what: str) -> None:
        """Notes that a save is damaged, unless it is gone by now."""
        folder = self.folder / str(step)
        if _removed(folder):
            self.steps.remove(step)
        else:
            reason = " ".join(what.removeprefix(f"{storage.absolute(folder)}: ").removeprefix(f"{folder}: ").split())
            self.damage[step] = Damage(str(folder), reason)


def _removed(folder: Path) -> bool:
    """Whether another process has removed this folder; waits while it does. In a store that begins with its mark."""
    if storage.is_remote(folder):
        return int(folder.name) not in storage.saved_steps(folder.parent)
    left = math.inf
    while folder.exists() and (now := sum(1 + len(files) for _, _, files in os.walk(folder))) < left:
        left = now
        time.sleep(REMOVED_WITHIN)
    return not folder.exists()


class _Shapes:
    """What the saves of a run should hold, on one device: shapes do not depend on the mesh.

    States are read into JAX's arrays, as training reads them, and snapshots into NumPy's, as analysis does: Orbax has
    files that it reads for the one and not for the other.
    """

    def __init__(self, run: Path, cfg: RunConfig):
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices("cpu")[:1])
        self._stages = [make_steps(cfg, mesh, begins).abstract for begins in (0, 1)[: 1 + tying.changes(cfg)]]
        try:
            self._changed, self._known = change_of(run, cfg), True
        except UserError:  # of a damaged record
            self._changed, self._known = None, False

    def of(self, kind: str, step: int, about: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a state or a snapshot, of the stage that it belongs to or, if that is not known, that fits."""
        stages = [self._wanted(kind, abstract, about) for abstract in self._stages]
        if self._known:
            return stages[self._changed is not None and step > self._changed]
        fitting = [wanted for wanted in stages if set(leaf_names(wanted)) == about["fingerprints"].keys()]
        return (fitting or stages)[0]

    def _wanted(self, kind: str, abstract: Any, about: Mapping[str, Any]) -> dict[str, Any]:
        if kind == "snapshots":
            tables = without_sharding(abstract.params["tables"], about.get(ROUNDED_TO))
            return {"tables": tables} | ({"account": without_sharding(abstract.account)} if abstract.account else {})
        wanted: dict[str, Any] = abstract._asdict()
        if any(name.startswith(f"{BODY_UPDATE}/") for name in about["fingerprints"]):
            wanted[BODY_UPDATE] = wanted["params"]["body"]
        return wanted


# ---- metrics.jsonl ----


@dataclass
class _Lines:
    """What the lines of a metrics.jsonl say: the steps that have one, and what is wrong with which line."""

    steps: list[int] = field(default_factory=list)
    wrong: dict[int, str] = field(default_factory=dict)
    unread: list[int] = field(default_factory=list)  # the step before each line that says none


def _metrics(
    path: Path, states: _Saves, snapshots: _Saves, cfg: RunConfig | None, notes: list[str]
) -> tuple[Kind, list[Damage]]:
    """Whether every line is strict JSON, and every step has one that must have."""
    try:
        content = _read(path)
    except UserError as error:
        return Kind("lines of metrics.jsonl", 0, 1), [Damage(str(path), str(error))]
    *complete, rest = (content or b"").split(b"\n")
    if rest:
        notes.append(f"{path}: its last line is not complete: it is being written, or was when a process was killed")
    lines = _Lines()
    for number, line in enumerate(complete, 1):
        _read_line(lines, number, line)
    last = max([*states.there(), *lines.steps], default=0)
    needed = {step for step in snapshots.there() if step > 0} | set(_logged(states, snapshots, cfg, last))
    lacking = sorted(needed - set(lines.steps))
    for before in lines.unread:  # a line that cannot be read is that of the first step after the line before it
        covered = next((step for step in lacking if step > before), None)
        lacking = [step for step in lacking if step != covered]
    damage = [Damage(str(path), f"line {number} {what}") for number, what in lines.wrong.items()]
    if content is None and needed:
        return Kind("lines of metrics.jsonl", 0, len(needed)), [Damage(str(path), "is not there")]
    for first, final in _stretches(lacking, sorted(needed)):
        steps = f"step {first}" if first == final else f"steps {first} to {final}"
        damage.append(Damage(str(path), f"has no line of {steps}"))
    total = len(complete) + len(lacking)
    return Kind("lines of metrics.jsonl", len(complete) - len(lines.wrong), total), damage


def _read_line(lines: _Lines, number: int, line: bytes) -> None:
    """Adds one line to them."""
    before, bare = (lines.steps or [0])[-1], list[str]()
    try:
        row = json.loads(line.decode(), parse_constant=bare.append)
    except UnicodeDecodeError:
        row, what = None, "is not UTF-8"
    except json.JSONDecodeError as error:
        row, what = None, f"is not JSON: {error.msg}"
    except (ValueError, RecursionError):  # of a number of thousands of digits, of thousands of brackets
        row, what = None, "is not JSON that can be read"
    else:
        what = "is no object with a step"
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(row, dict) or type(step) is not int or step < 1:
        lines.wrong[number] = what
        lines.unread.append(before)
        return
    if lines.steps and step <= before:
        lines.wrong[number] = f"is of step {step}, and the line before it of step {before}"
    elif bare:
        lines.wrong[number] = f"holds a bare {bare[0]}"
    elif fault := next(_faults(row), None):
        lines.wrong[number] = fault
    lines.steps.append(step)


def _faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a line's values: null is a number that was not finite, which no loss may be before a skip."""
    for name, value in row.items():
        if name == "loss" and value is None and "skipped" not in row:
            yield f"holds {name!r} that is null"
        for number in value if isinstance(value, list) else [value]:
            if number is not None and type(number) not in (int, float):
                yield f"holds {name!r} that is no number"
            elif isinstance(number, float) and not math.isfinite(number):
                yield f"holds {name!r} that is not finite"


def _logged(states: _Saves, snapshots: _Saves, cfg: RunConfig | None, last: int) -> range:
    """The steps up to `last` that were logged whatever train.log_every was at the time."""
    said = [about["config"]["train"] for saves in (states, snapshots) for about in saves.about.values()]
    every = [train["log_every"] for train in said] + ([cfg.train.log_every] if cfg else [])
    return range(math.lcm(*every), last + 1, math.lcm(*every)) if every else range(0)


def _stretches(some: list[int], of: list[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each stretch of these that is without a gap in those."""
    place = {step: index for index, step in enumerate(of)}
    first = previous = None
    for step in some:
        if first is None or previous is None or place[step] != place[previous] + 1:
            if first is not None and previous is not None:
                yield first, previous
            first = step
        previous = step
    if first is not None and previous is not None:
        yield first, previous


# ---- Other files ----


class _Files:
    """The single files of a run: those that are there or should be, what is wrong with them, and its config.

    Where config.yaml is damaged the config is that of the newest save that can be read; None without one.
    """

    def __init__(self, run: Path, about: dict[str, Any] | None, notes: list[str]):
        self._run, self._about, self._notes = run, about, notes
        self.damage: list[Damage] = []
        self.found = ["config.yaml"]
        self.config, self.shapes = self._config()
        self._token_counts()
        self._tokenizer()
        recorded = self._record(SAVED_STATE)
        # Those of now: the record may be of a state that was saved after the others were looked for.
        if recorded is not None and not any(step >= recorded for step in storage.saved_steps(run / "checkpoints")):
            self._wrong(SAVED_STATE, f"a state was saved at step {recorded}, and checkpoints/ has none from there on")
        self._record(OWED)
        self._record(CHANGED)

    def _wrong(self, name: str, what: str) -> None:
        path = self._run / name
        reason = " ".join(what.removeprefix(f"{path}: ").removeprefix(f"{path}:").split())
        self.damage.append(Damage(str(path), reason))

    def _config(self) -> tuple[RunConfig | None, _Shapes | None]:
        """The config, and what saves of it hold."""
        saved: dict[str, Any] | None = None if self._about is None else self._about["config"]
        try:
            cfg = load_run_config(self._run / "config.yaml")
            shapes = _Shapes(self._run, cfg)
        except StoreError:
            raise
        except (UserError, ValueError, RecursionError) as error:
            self._wrong("config.yaml", str(error))
        else:
            was, now = dict(flatten(saved or {})), dict(flatten(to_tree(cfg)))
            changed = [key for key in sorted((was.keys() & now.keys()) - MAY_CHANGE) if was[key] != now[key]]
            if not changed:
                return cfg, shapes
            key = changed[0]
            self._wrong("config.yaml", f"{key} is {now[key]!r}, and was {was[key]!r} when the newest state was saved")
        try:
            cfg = structure(RunConfig, saved or {}, "about")
            return (cfg, _Shapes(self._run, cfg)) if saved else (None, None)
        except UserError:  # of another version
            return None, None

    def _token_counts(self) -> None:
        path, windows = self._run / TOKEN_COUNTS, None
        if self._about is not None:
            windows = self._about["data"]["windows"] * self._about["data"]["seq_len"]
        if not storage.exists(path):
            if windows is not None and windows > COUNTED_AT_ONCE:
                self._notes.append(f"{path}: is not there yet; the command that trains the run writes it")
            elif windows is not None:
                self.found.append(TOKEN_COUNTS)
                self._wrong(TOKEN_COUNTS, "is not there; the command that trained the run writes it")
            return
        self.found.append(TOKEN_COUNTS)
        try:
            counts = np.load(io.BytesIO(_read(path) or b""), allow_pickle=False)
        except OSError:  # of a store
            raise
        except Exception as error:  # of a header that is evaluated, of memory that it asks for
            self._wrong(TOKEN_COUNTS, f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}")
            return
        rows = "V" if self.config is None else self.config.model.table_rows
        shape: tuple[int, ...] = getattr(counts, "shape", ())
        if len(shape) != 2 or counts.dtype != np.int64 or shape != (2, shape[1] if rows == "V" else rows):
            self._wrong(TOKEN_COUNTS, f"holds no int64 [2, {rows}]")
        elif (counts < 0).any() or (windows is not None and (counts.sum(1) != windows).any()):
            self._wrong(TOKEN_COUNTS, "its counts are not those of the windows that the run was trained on")

    def _tokenizer(self) -> None:
        name = "tokenizer.json"
        try:
            content = _read(self._run / name)
            if content is None and (self._about is None or self._about["tokenizer"] is None):
                return
            self.found.append(name)
            if content is None:
                raise UserError("is not there")
            text = content.decode()
        except (UserError, UnicodeDecodeError) as error:
            self._wrong(name, str(error) if isinstance(error, UserError) else "is not UTF-8")
            return
        if self._about is None:
            try:
                parse_tokenizer(text, str(self._run / name))
            except UserError as error:
                self._wrong(name, str(error))
        elif tokenizer_hash(text) != self._about["tokenizer"]:
            self._wrong(name, "is not the tokenizer that the run was trained with")

    def _record(self, name: str) -> int | None:
        """The step that a record of one step holds; None without it, or if it is damaged."""
        try:
            content = _read(self._run / name)
        except UserError as error:
            self.found.append(name)
            self._wrong(name, str(error))
            return None
        if content is None:
            return None
        self.found.append(name)
        try:
            tree = json.loads(content.decode())
            step = tree["step"] if isinstance(tree, dict) and tree.keys() == {"step"} else None
        except (ValueError, RecursionError):
            step = None
        last = math.inf if self.config is None else self.config.train.steps
        if type(step) is not int or not 0 < step <= last:
            self._wrong(name, 'must hold {"step": N}, the number of an update of the run')
            return None
        return step


def _read(path: Path) -> bytes | None:
    """What a file holds; None where there is none. UserError, without its path, where it cannot be read.

    OSError where that is a store's: it is no damage.
    """
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if storage.is_remote(path):
            raise
        raise UserError(f"cannot be read: {error.strerror}") from None


# ---- Token shards ----


def _shards(cfg: RunConfig | None, about: dict[str, Any] | None, notes: list[str]) -> dict[Path, str | None]:
    """What is wrong with each file of the data that the run was trained on; {} where that is not found."""
    if cfg is None or about is None:
        return {}
    directories = find_prepared(cfg.data, about["data"]["data"])
    if not directories:
        notes.append(f"{searched(cfg.data)}: does not hold the data that the run was trained on; it was not looked at")
        return {}
    return {path: damage for directory in directories for path, damage in verify(directory).items()}
