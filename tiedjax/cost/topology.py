"""Accelerators that are not there, by name: slices of TPUs, and hosts of GPUs."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass

import jax

from tiedjax.errors import UserError

_EXAMPLES = "such as v5p:4x4x4, 2*v5p:4x4x4, h100:8 or h100:2x8"


@dataclass(frozen=True)
class Topology(abc.ABC):
    """Equal slices of accelerators, joined by a data-centre network where there is more than one.

    Attributes:
      name: [SLICES*]KIND:SHAPE, as a user gives it.
      slices: how many.
      kind: the generation.
      shape: of one slice.
    """

    name: str
    slices: int
    kind: str
    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def chips(self) -> int:
        """Number of chips in all, each one device."""

    @property
    @abc.abstractmethod
    def noun(self) -> str:
        """What one of its devices is called."""

    @property
    @abc.abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of a device's memory."""

    @property
    @abc.abstractmethod
    def usable_bytes(self) -> int:
        """Bytes of it that a program may use."""

    @abc.abstractmethod
    def devices(self) -> list[jax.Device]:
        """Devices to compile for, slice after slice; nothing runs on them. Raises UserError without their compiler."""


def parse(name: str) -> Topology:
    """The accelerators of this name; raises UserError for a kind or a shape that there is not."""
    from tiedjax.cost.gpus import CARDS, Hosts
    from tiedjax.cost.tpus import KINDS, Slices

    match = re.fullmatch(r"(?:(\d+)\*)?([^:*]*):(\d+(?:x\d+)*)", name)
    if not match or match[1] == "0":
        raise UserError(f"--topology: must be KIND:SHAPE or SLICES*KIND:SHAPE {_EXAMPLES}, got {name!r}")
    slices, kind, shape = int(match[1] or 1), match[2], tuple(int(side) for side in match[3].split("x"))
    if kind in CARDS:
        return Hosts.of(name, slices, kind, shape)
    if kind in KINDS:
        return Slices.of(name, slices, kind, shape)
    raise UserError(f"--topology: the kind must be one of {', '.join([*KINDS, *CARDS])}, got {kind!r}")


def sides(shape: tuple[int, ...]) -> str:
    """A shape as a user writes it."""
    return "x".join(map(str, shape))
