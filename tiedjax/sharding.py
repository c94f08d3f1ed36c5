"""Where arrays live: the mesh, and one table from logical axes to its axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
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
    "whole_layers": ("fsdp", "tensor"),  # of matrices that no device may have but whole
}


Axes = Sequence[str | None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Layout:
    """Where the parts of a model lie: on `mesh`, or (None) on a single device without a word about it."""

    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None and set(self.mesh.axis_names) != {*MESH_AXES}:
            raise UserError(f"mesh: must have the axes {', '.join(MESH_AXES)}, got {', '.join(self.mesh.axis_names)}")

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu": of the mesh's devices."""
        return str(self.device.platform)

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all of one kind and need not be present."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def cuda(self) -> float | None:
        """The compute capability of the mesh's devices; None where they are no NVIDIA GPUs."""
        capability = re.fullmatch(r"\d+\.\d+", str(getattr(self.device, "compute_capability", "")))
        return float(capability[0]) if capability else None

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """x, laid out by its logical axes."""
        if self.mesh is None:
            return x
        placed: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, partition_spec(axes)))
        return placed

    def uncut(self, x: jax.Array, axis: int) -> jax.Array:
        """x, of which every device has all of this axis, and as much of the others as XLA finds best."""
        if self.mesh is None:
            return x
        entries = [None if i == axis else PartitionSpec.UNCONSTRAINED for i in range(x.ndim)]
        placed: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*entries)))
        return placed

    def size(self, *axes: str) -> int:
        """The number of devices along these mesh axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in axes)

    def names(self, *axes: str) -> tuple[str, ...]:
        """Those of these mesh axes that hold more than one device: what a collective in `per_device` runs over."""
        return tuple(name for name in axes if self.size(name) > 1)

    def per_device(
        self, f: Callable[..., Result], inputs: Sequence[Axes], outputs: Axes | list[Axes]
    ) -> Callable[..., Result]:
        """f over every device's own part of its arguments, which have these logical axes; a list for several results.

        An argument is gathered over the mesh axes that its logical axes leave out; a result must be equal on them.
        """
        if self.mesh is None or self.mesh.size == 1:
            return f
        results = tuple(map(partition_spec, outputs)) if isinstance(outputs, list) else partition_spec(outputs)
        arguments = tuple(map(partition_spec, inputs))
        return jax.shard_map(f, mesh=self.mesh, in_specs=arguments, out_specs=results, check_vma=False)


ONE_DEVICE = Layout()


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, slices: int | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor); a single process may use the first few of its devices, several use all.

    Slices of TPUs, joined by a network that is slower than their own links, lie along `data`: of `slices`, by default
    those that the devices say they belong to.
    """
    devices = list(jax.devices() if devices is None else devices)
    fixed = cfg.fsdp * cfg.tensor
    data = len(devices) // fixed if cfg.data == -1 else cfg.data
    size = data * fixed
    product = f"data {cfg.data} x fsdp {cfg.fsdp} x tensor {cfg.tensor}"
    if not 0 < size <= len(devices) or (cfg.data == -1 and size != len(devices)):
        raise UserError(f"mesh: {product} does not fit {len(devices)} devices; the product must be their number")
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh: {product} uses {size} of {len(devices)} devices; several processes must use all of them"
        )
    shape = (data, cfg.fsdp, cfg.tensor)
    if size < len(devices):  # a part of a slice has no order by links
        return Mesh(np.array(devices[:size]).reshape(shape), MESH_AXES)
    if slices is None:
        slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if data % slices:
        raise UserError(
            f"mesh: {product} makes data {data}, which the {slices} slices do not divide: they are joined along data"
        )
    # The devices of a whole slice are ordered by their links, an axis of the mesh over part of one of the slice's if
    # need be.
    if slices > 1 and devices[0].platform == "tpu":
        within = (data // slices, cfg.fsdp, cfg.tensor)
        ordered = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
        return Mesh(ordered, MESH_AXES)
    return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)


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

    def place(leaf: Any) -> Any:
        boxed = isinstance(leaf, nn.LogicallyPartitioned)
        if boxed and not jax.tree.leaves(leaf.value):  # of a state that an optimizer keeps for other parameters only
            return leaf.value
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
    # One slice, as `Batches` takes it: devices that differ along tensor alone need the same rows, and where a
    # mesh puts devices of another process in between, their rows are read here as well.
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def global_batch(local: np.ndarray, mesh: Mesh, batch_size: int) -> jax.Array:
    """The array [batch_size, ...] over all processes, of which this one holds the rows `local_rows`."""
    first = local_rows(mesh, batch_size).start

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(batch_size)
        return local[start - first : stop - first]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), batch_sharding(mesh), part)
