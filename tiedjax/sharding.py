"""Where arrays live: the mesh, and one table from logical axes to its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tiedjax.config import MeshConfig
from tiedjax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
}


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor); a single process may use the first few of its devices, several use all."""
    devices = list(jax.devices() if devices is None else devices)
    fixed = cfg.fsdp * cfg.tensor
    data = len(devices) // fixed if cfg.data == -1 else cfg.data
    size = data * fixed
    asked = f"data {cfg.data} x fsdp {cfg.fsdp} x tensor {cfg.tensor}"
    if not 0 < size <= len(devices) or (cfg.data == -1 and size != len(devices)):
        raise UserError(f"mesh: {asked} does not fit {len(devices)} devices; the product must be their number")
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh: {asked} uses {size} of {len(devices)} devices; several processes must use all of them")
    # make_mesh orders the devices of a whole slice by their links; a part of one has no such order.
    if size == len(devices):
        auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        return jax.make_mesh((data, cfg.fsdp, cfg.tensor), MESH_AXES, axis_types=auto, devices=devices)
    return Mesh(np.array(devices[:size]).reshape(data, cfg.fsdp, cfg.tensor), MESH_AXES)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; raises if two of them claim one mesh axis."""
    entries = [() if axis is None else RULES[axis] for axis in axes]
    used = [name for entry in entries for name in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} claim a mesh axis twice: {used}")
    return PartitionSpec(*(None if not e else e[0] if len(e) == 1 else e for e in entries))


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree whose arrays are boxed with logical axes; the unboxed are replicated.

    Raises ValueError for a dimension that its mesh axes do not divide.
    """

    def place(leaf: Any) -> NamedSharding:
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        spec = partition_spec(leaf.names) if boxed else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        sharding.shard_shape((leaf.value if boxed else leaf).shape)
        return sharding

    return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, partition_spec(["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that this process's devices need."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = [index[0].indices(batch_size) for index in held if index is not None]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def global_batch(local: np.ndarray, mesh: Mesh, batch_size: int) -> jax.Array:
    """The array [batch_size, ...] over all processes, of which this one holds the rows `local_rows`."""
    first = local_rows(mesh, batch_size).start

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(batch_size)
        return local[start - first : stop - first]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), batch_sharding(mesh), part)
