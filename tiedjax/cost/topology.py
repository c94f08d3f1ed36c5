"""TPUs that are not there: their names, their memory, and devices to compile for."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

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
class Topology:
    """A slice of TPUs, named KIND:SHAPE."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """The slice called e.g. v5e:4x4 or v5p:4x4x4; raises UserError for a kind or a shape that there is not."""
        kind_name, _, sides = name.partition(":")
        examples = "such as v5e:4x4, v5p:4x4x4 or v6e:8x8"
        if not re.fullmatch(r"\d+(x\d+)*", sides):
            raise UserError(f"--topology: must be KIND:SHAPE {examples}, got {name!r}")
        if kind_name not in KINDS:
            raise UserError(f"--topology: the kind must be one of {', '.join(KINDS)}, got {kind_name!r}")
        kind, shape = KINDS[kind_name], tuple(int(side) for side in sides.split("x"))
        if len(shape) != kind.rank:
            raise UserError(f"--topology: a shape of {kind_name} has {kind.rank} sides, got {sides!r}")
        if shape not in kind.shapes:
            raise UserError(f"--topology: {kind_name} has no slice {sides!r}; {_nearest(shape, kind)}")
        return cls(name, kind, shape)

    @property
    def chips(self) -> int:
        """Number of chips, each one device."""
        return math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Along which of three axes the chips form rings: cubes of v5p along all, the others along sides of 16."""
        if self.kind.rank == 3:
            ring = min(self.shape) >= _CUBE
            return ring, ring, ring
        first, second = (side == _RING for side in self.shape)
        return first, second, False

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, one a chip; nothing runs on them. Raises UserError without libtpu."""
        from jax.experimental import topologies

        if importlib.util.find_spec("libtpu") is None:
            raise UserError('compiling for TPUs needs libtpu, which is not installed: pip install ".[tpu]"')
        # libtpu does not know by itself that the ends of long sides are joined, and compiles all-gathers to all-reduces
        # where they are not. Hosts hold 2 x 2 chips or more, but the one chip of 1x1 is alone.
        more: dict[str, Any] = {"wrap": self.wrap}
        if max(self.shape) == 1:
            more["chips_per_host_bounds"] = (1, 1, 1)
        try:
            with libtpu_environment():
                return topologies.get_topology_desc(self.name, "tpu", **more).devices
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            raise UserError(f"--topology {self.name}: libtpu refuses: {str(error).splitlines()[0]}") from None


def _nearest(shape: tuple[int, ...], kind: Kind) -> str:
    """Sorted sides if those are a slice, else the slices of about that size."""
    upwards = tuple(sorted(shape))
    if upwards in kind.shapes:
        return f"its sides go upwards: {_sides(upwards)}"
    difference = lambda other: abs(math.prod(other) - math.prod(shape))
    return f"near it are {', '.join(map(_sides, sorted(sorted(kind.shapes, key=difference)[:3])))}"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


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
