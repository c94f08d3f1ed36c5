"""The only file that imports Orbax: full states to resume from, and snapshots of the tables to look at later.

Orbax keeps no checksum of values and restores flipped bits silently, so every save carries a fingerprint of each leaf
and every restore compares it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tiedjax.errors import UserError
from tiedjax.host import storage

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
    sums = jax.device_get([_fingerprint(leaf) for leaf in jax.tree.leaves(tree)])
    return {name: [int(x) for x in pair] for name, pair in zip(_names(tree), sums, strict=True)}


def _names(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


class Checkpoints:
    """The saves of one kind in one folder: DIR/STEP/, written asynchronously, each visible only when complete.

    All processes of a cluster call every method together. `keep` limits how many are kept, newest first; None keeps
    all. The folder is made if it is to be written. With `copies`, for small saves that are read often, those in a store
    are read from copies on this machine's disk.
    """

    def __init__(self, directory: Path, *, keep: int | None = None, create: bool = True, copies: bool = False):
        self._copies: dict[int, ocp.CheckpointManager] | None = {} if copies and storage.is_remote(directory) else None
        self.directory = storage.absolute(directory)
        storage.refuse_unknown_bucket(self.directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps whose save is complete, ascending."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: Any, about: dict[str, Any]) -> None:
        """Starts saving `tree` (arrays) and `about` (JSON); raises here or in `close` if an earlier save failed."""
        record = {**about, "fingerprints": fingerprints(tree)}
        items = ocp.args.Composite(tree=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(record))
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(f"{self.directory / str(step)}: Orbax declined to save")

    def about(self, step: int) -> dict[str, Any]:
        """What was said when this step was saved."""
        items = self._reader(step).restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))
        return dict(items["about"])

    def restore(self, step: int, abstract: Any) -> Any:
        """The saved leaves of `abstract` (ShapeDtypeStructs with shardings; without, as NumPy), which may be a part.

        Raises UserError if the shapes or dtypes differ from what was saved, or the values from their fingerprints.
        """
        where = self.directory / str(step)
        saved = self.about(step)["fingerprints"]
        names = _names(abstract)
        if missing := sorted(set(names) - saved.keys()):
            raise UserError(f"{where}: holds no {missing[0]!r}; it was saved from another model or optimizer")
        how = jax.tree.map(_restore_args, abstract)
        request = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
        try:
            tree = self._reader(step).restore(step, args=ocp.args.Composite(tree=request))["tree"]
        except (ValueError, OSError) as error:
            raise UserError(f"{where}: cannot be restored: {str(error).splitlines()[0]}") from error
        for name, leaf, wanted in zip(names, jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
            if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                raise UserError(
                    f"{where}: {name!r} is {leaf.dtype}{list(leaf.shape)}, not {wanted.dtype}{list(wanted.shape)}; "
                    "it was saved from another model"
                )
        for name, pair in fingerprints(tree).items():
            if pair != saved[name]:
                raise UserError(
                    f"{where}: is damaged: {name!r} is not what was saved; remove this folder to use an older one"
                )
        return tree

    def _reader(self, step: int) -> ocp.CheckpointManager:
        if self._copies is None:
            return self._manager
        if step not in self._copies:
            folder = storage.cached_save(self.directory / str(step)).parent
            options = ocp.CheckpointManagerOptions(create=False)
            self._copies[step] = ocp.CheckpointManager(folder, options=options)
        return self._copies[step]

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
        self._manager.close()


class _Listener(logging.Handler):
    def __init__(self, to: Callable[[BaseException], None]):
        super().__init__(logging.ERROR)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] and record.threadName == "async_save":
            self._to(record.exc_info[1])


@contextlib.contextmanager
def failed_saves(to: Callable[[BaseException], None]) -> Iterator[None]:
    """Calls `to`, in another thread, with the error of a save at the moment it fails.

    Orbax raises it only behind a barrier at which the other processes of a cluster do not arrive, but it logs it first.
    """
    logger, listener = logging.getLogger("absl"), _Listener(to)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    # strict: Orbax would otherwise cut or pad an array of another shape. No dtype: it would cast.
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, strict=True)
