"""TPUs that are not there: the shapes of their slices, their memory, and devices to compile for."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from tiedjax.cost.topology import Topology, sides
from tiedjax.errors import UserError

_CUBE = 4  # chips along each side of the cube that larger v5p slices are put together from
_RING = 16  # chips along a side of a v5e or v6e slice whose ends are joined
_LARGEST_V5P = 6144  # chips of a slice (cloud.google.com/tpu/docs/v5p)
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SIDES = range(_CUBE, 25, _CUBE)
_CUBES = tuple(s for s in itertools.product(_SIDES, repeat=3) if list(s) == sorted(s))

# What libtpu takes for a fact about the machine it runs on. It would ask Google Cloud's metadata server for the first
# three; the last lets several processes compile at a time, since none of them takes a chip.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Kind:
    """A generation of TPU: bytes of a chip's memory that a program may use, and the shapes its slices come in."""

    hbm_bytes: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def rank(self) -> int:
        """Number of sides of a slice."""
        return len(self.shapes[0])


# The memory is what XLA says it has when a program needs more (libtpu 0.0.42); a little is its own.
KINDS: Mapping[str, Kind] = {
    "v5e": Kind(int(15.75 * 2**30), _FLAT),
    "v5p": Kind(
        int(95.74 * 2**30),
        ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *(s for s in _CUBES if math.prod(s) <= _LARGEST_V5P)),
    ),
    "v6e": Kind(int(31.25 * 2**30), _FLAT),
}


@dataclass(frozen=True)
class Slices(Topology):
    """Slices of TPUs, each of one of the shapes that its kind comes in."""

    @classmethod
    def of(cls, name: str, slices: int, kind: str, shape: tuple[int, ...]) -> Slices:
        """These slices; raises UserError for a shape that there is not."""
        if len(shape) != KINDS[kind].rank:
            raise UserError(f"--topology: a shape of {kind} has {KINDS[kind].rank} sides, got {sides(shape)!r}")
        if shape not in KINDS[kind].shapes:
            raise UserError(f"--topology: {kind} has no slice {sides(shape)!r}; {_nearest(shape, KINDS[kind])}")
        return cls(name, slices, kind, shape)

    @property
    def chips(self) -> int:
        """Number of chips, each one device."""
        return self.slices * math.prod(self.shape)

    @property
    def noun(self) -> str:
        """chip."""
        return "chip"

    @property
    def memory_bytes(self) -> int:
        """All of it is a program's."""
        return KINDS[self.kind].hbm_bytes

    @property
    def usable_bytes(self) -> int:
        """All of it."""
        return self.memory_bytes

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Along which of three axes the chips form rings: cubes of v5p along all, the others along sides of 16."""
        if len(self.shape) == 3:
            ring = min(self.shape) >= _CUBE
            return ring, ring, ring
        first, second = (side == _RING for side in self.shape)
        return first, second, False

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, slice after slice; nothing runs on them. Raises UserError without libtpu."""
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError('compiling for TPUs needs libtpu, which is not installed: pip install ".[tpu]"')
        # libtpu does not know by itself that the ends of long sides are joined, and compiles all-gathers to all-reduces
        # where they are not. Hosts hold 2 x 2 chips or more, but the one chip of 1x1 is alone.
        more: dict[str, Any] = {"wrap": self.wrap}
        if max(self.shape) == 1:
            more["chips_per_host_bounds"] = (1, 1, 1)
        if self.slices > 1:
            more["num_slices"] = self.slices
        try:
            with libtpu_environment():
                return topologies.get_topology_desc(f"{self.kind}:{sides(self.shape)}", "tpu", **more).devices
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            raise UserError(f"--topology {self.name}: libtpu refuses: {str(error).splitlines()[0]}") from None


def _nearest(shape: tuple[int, ...], kind: Kind) -> str:
    """Sorted sides if those are a slice, else the slices of about that size."""
    upwards = tuple(sorted(shape))
    if upwards in kind.shapes:
        return f"its sides go upwards: {sides(upwards)}"
    difference = lambda other: abs(math.prod(other) - math.prod(shape))
    return f"near it are {', '.join(map(sides, sorted(sorted(kind.shapes, key=difference)[:3])))}"


@contextlib.contextmanager
def libtpu_environment() -> Iterator[None]:
    """The variables that libtpu needs while it is loaded; afterwards the environment is what it was before."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
