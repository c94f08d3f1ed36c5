"""The only file that imports Orbax: full states to resume from, and snapshots of the tables to look at later.

Orbax keeps no checksum of values and restores flipped bits silently, so every save carries a fingerprint of each leaf
and of what is said about it, and every restore compares them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tiedjax.errors import UserError
from tiedjax.host import storage
from tiedjax.saves import Kept

DIGEST = "digest"  # of all else that is said of a save
_NO_DAMAGE = re.compile("Permission denied|PERMISSION_DENIED|Too many open files|Cannot allocate memory")
# So many small programs are under way at once. Beyond 32, XLA:CPU has a device wait until one of its own has ended,
# which may wait for another device's collective: in a cluster whose processes have several devices each, for ever.
_AT_ONCE = 16
ROUNDED_TO = "rounded_to"  # what is said of a snapshot whose arrays were saved in another dtype than they have


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize])
    bits = bits.astype(jnp.uint32)
    position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    # Sums modulo 2^32 do not depend on their order, hence neither on the number of devices; the second one sees swaps.
    # The dtype is named: under jax_enable_x64 a sum of uint32 is a uint64, which does not wrap.
    total = partial(jnp.sum, dtype=jnp.uint32)
    return jnp.stack([total(bits), total(bits * (2 * position + 1))])


def fingerprints(tree: Any) -> dict[str, list[int]]:
    """Two uint32 sums over the bit pattern of every leaf, by its path; the same on any mesh."""
    leaves = jax.tree.leaves(tree)
    parts = (leaves[i : i + _AT_ONCE] for i in range(0, len(leaves), _AT_ONCE))
    sums = [pair for part in parts for pair in jax.device_get([_fingerprint(leaf) for leaf in part])]
    return {name: [int(x) for x in pair] for name, pair in zip(leaf_names(tree), sums, strict=True)}


def leaf_names(tree: Any) -> list[str]:
    """The path of every leaf, as fingerprints are named."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


@dataclass(frozen=True)
class _Preserved:
    """That as Orbax asks for it."""

    keep: Kept
    directory: Path

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.keep.of([each.step for each in checkpoints])
        there = storage.names(self.directory)
        return [each.step in kept or f"{each.step}.pinned" in there for each in checkpoints]


class DamagedError(UserError):
    """What was saved cannot be read, or is not what was saved."""


class Checkpoints:
    """The saves of one kind in one folder: DIR/STEP/, written asynchronously, each visible only when complete.

    All processes of a cluster call every method together. `keep` says which stay when others are saved; None keeps all.
    The folder is made if it is to be written. With `copies`, for small saves that are read often, those in a store are
    read from copies on this machine's disk.
    """

    def __init__(self, directory: Path, *, keep: Kept | None = None, create: bool = True, copies: bool = False):
        self._copied = copies and storage.is_remote(directory)
        self._readers: dict[Path, ocp.CheckpointManager] = {}
        self.directory = storage.absolute(directory)
        self.begun: int | None = None  # the step of the last save that was begun
        storage.refuse_unknown_bucket(self.directory)
        policy = None if keep is None else _Preserved(keep, self.directory)
        # Orbax's threads wait for those of other processes under names that must not be another manager's.
        named = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self.directory.name)
        if create:
            _hush_saves()
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, create=create, multiprocessing_options=named)
        with _damage(self.directory, "cannot be opened"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps whose save is complete, ascending."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any, about: dict[str, Any]) -> None:
        """Starts saving `tree` (arrays) and `about` (JSON); raises here or in `close` if an earlier save failed."""
        self.begun = step
        record = {**about, "fingerprints": fingerprints(tree)}
        record[DIGEST] = _digest(record)
        items = ocp.args.Composite(tree=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(record))
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(f"{self.directory / str(step)}: Orbax declined to save")

    def about(self, step: int) -> dict[str, Any]:
        """What was said when this step was saved; DamagedError if that is not what is read."""
        where = self.directory / str(step)
        with _agreed(where), _damage(where, "cannot be restored"):
            items = self._reader(step).restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
            record = dict(items["about"])
            digest = record.pop(DIGEST)
        if digest != _digest(record):
            raise DamagedError(f"{where}: is damaged: 'about' is not what was saved")
        return record

    def restore(self, step: int, abstract: Any) -> Any:
        """The saved leaves of `abstract` (ShapeDtypeStructs with shardings; without, as NumPy), which may be a part.

        Raises UserError if the shapes or dtypes differ from what was saved, DamagedError if the values differ from
        their fingerprints.
        """
        where = self.directory / str(step)
        saved = self.about(step)["fingerprints"]
        names = leaf_names(abstract)
        if missing := sorted(set(names) - saved.keys()):
            raise UserError(f"{where}: holds no {missing[0]!r}; it was saved from another model or optimizer")
        how = jax.tree.map(_restore_args, abstract)
        request = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
        with _agreed(where), _damage(where, "cannot be restored"):
            tree = self._reader(step).restore(step, args=ocp.args.Composite(tree=request))["tree"]
        for name, leaf, wanted in zip(names, jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
            if isinstance(leaf, jax.ShapeDtypeStruct):  # what Orbax leaves where its metadata do not name it any more
                raise DamagedError(f"{where}: is damaged: {name!r} is not there")
            if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                raise UserError(
                    f"{where}: {name!r} is {leaf.dtype}{list(leaf.shape)}, not {wanted.dtype}{list(wanted.shape)}; "
                    "it was saved from another model"
                )
        for name, pair in fingerprints(tree).items():
            if pair != saved[name]:
                raise DamagedError(f"{where}: is damaged: {name!r} is not what was saved")
        return tree

    def set_aside(self, steps: Iterable[int]) -> None:
        """Renames the saves of these steps to damaged-STEP, which nothing reads."""
        for step in steps:
            if jax.process_index() == 0:
                storage.set_aside(self.directory / str(step))
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    def _reader(self, step: int) -> ocp.CheckpointManager:
        """Reads for this process alone: none waits for another, which may find damage that this one does not."""
        folder = storage.cached_save(self.directory / str(step)).parent if self._copied else self.directory
        if folder not in self._readers:
            this = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"reads_{this}"
            )
            options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
            self._readers[folder] = ocp.CheckpointManager(folder, options=options)
        return self._readers[folder]

    def wait(self) -> None:
        """Returns when every save so far is complete; raises the error of one that failed."""
        self._manager.wait_until_finished()

    def delete_from(self, step: int) -> None:
        """Removes the saves of this and later steps."""
        for later in [s for s in self.steps() if s >= step]:
            if jax.process_index() == 0:
                storage.uncommit(self.directory / str(later))
            self._manager.delete(later)

    def close(self) -> None:
        """Waits for what is being saved and raises its errors."""
        self._manager.wait_until_finished()
        for manager in (self._manager, *self._readers.values()):
            manager.close()


@contextlib.contextmanager
def _damage(where: Path, what: str) -> Iterator[None]:
    """DamagedError for whatever goes wrong in reading: a flipped bit can make Orbax raise anything.

    UserError, which sets nothing aside, where a store does not answer or this process may not read. What memory it
    lacks is raised as it is.
    """
    _hush()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of JSON, of msgpack, of zstd, of the file system, of an array's metadata, ...
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise
        storage.refuse_silent(where)
        lines = str(error).splitlines() or [type(error).__name__]
        kind = UserError if _NO_DAMAGE.search(str(error)) else DamagedError
        raise kind(f"{where}: {what}: {lines[0]}") from error


@contextlib.contextmanager
def _agreed(where: Path) -> Iterator[None]:
    """What one process of a cluster cannot read is damaged to all: they go on together."""
    failed: DamagedError | None = None
    try:
        yield
    except DamagedError as error:
        failed = error
    if jax.process_count() > 1:
        blind = np.flatnonzero(multihost_utils.process_allgather(np.array(failed is not None)))
        if len(blind) and failed is None:
            failed = DamagedError(f"{where}: cannot be restored by process {blind[0]}")
    if failed is not None:
        raise failed


@functools.cache
def _hush_saves() -> None:
    """From here on Orbax does not print that a save has waited for the one before: metrics say how fast a run is.

    Nor that threads have waited in vain for folders that a save could not make: it has failed long before, and said so.
    Nor that what Orbax notes of a save was not there yet when it added to it: nothing here reads those notes.
    """
    waits = "Waiting for previous save|.* Timeout waiting for key "
    early = r"Metadata file does not exist: .*\.orbax-checkpoint-tmp/"
    unsaid = re.compile(f"{waits}|{early}")
    logging.getLogger("absl").addFilter(lambda record: not unsaid.match(record.getMessage()))
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


@functools.cache
def _hush() -> None:
    """From here on nothing is printed of reads and writes that went on when the first had failed: they fail alike.

    TensorStore's threads tell Python's hooks of them. What the program's own tasks raise is printed as ever.
    """

    def told_by_others(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage() or not _is_of_orbax(record)

    logging.getLogger("asyncio").addFilter(told_by_others)
    unraisable_hook, hook = sys.unraisablehook, sys.excepthook

    def unraisable_told(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            unraisable_hook(unraisable)

    def told(kind: type[BaseException], error: BaseException, where: Any) -> None:
        if str(error) != "Event loop is closed":
            hook(kind, error, where)

    sys.unraisablehook, sys.excepthook = unraisable_told, told


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether the task that asyncio logs, or what it raised, is of Orbax or TensorStore."""
    error = record.exc_info and record.exc_info[1]
    frames = traceback.walk_tb(error.__traceback__) if error else ()
    places = [record.getMessage(), *(frame.f_code.co_filename for frame, _ in frames)]
    return any("orbax" in place or "tensorstore" in place for place in places)


def _digest(record: dict[str, Any]) -> str:
    """Of what JSON makes of it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def failed_saves(to: Callable[[BaseException], None]) -> Iterator[None]:
    """Calls `to`, in another thread, with the error of a save at the moment it fails.

    Orbax raises it only behind a barrier at which the other processes of a cluster do not arrive, but it logs it first:
    to this alone, as it is told from here.
    """

    def heard(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        if error and record.threadName == "async_save":
            to(error)
        return not error

    _hush()
    logger = logging.getLogger("absl")
    logger.addFilter(heard)
    try:
        yield
    finally:
        logger.removeFilter(heard)


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # strict: Orbax would otherwise cut or pad an array of another shape. No dtype: it would cast.
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, strict=True)
