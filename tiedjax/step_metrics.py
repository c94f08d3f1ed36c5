"""A step's metrics as one array: each array that a program returns, or that is fetched, costs much the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["shapes"])
@dataclass(frozen=True, eq=False)
class StepMetrics(Mapping[str, jax.Array]):
    """Named arrays of any shapes, of one dtype.

    Attributes:
      numbers: all of them one after the other, [N].
      shapes: the name and the shape of each.
    """

    numbers: jax.Array
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array]) -> StepMetrics:
        """The metrics that these are, by name in alphabetical order."""
        shapes = tuple((name, arrays[name].shape) for name in sorted(arrays))
        return cls(jnp.concatenate([arrays[name].ravel() for name, _ in shapes]), shapes)

    def __getitem__(self, name: str) -> jax.Array:
        start = 0
        for each, shape in self.shapes:
            stop = start + math.prod(shape)
            if each == name:
                return self.numbers[start:stop].reshape(shape)
            start = stop
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(name == each for each, _ in self.shapes)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def fetched(self) -> dict[str, Any]:
        """Scalars and lists by name; waits for the step."""
        here = StepMetrics(jax.device_get(self.numbers), self.shapes)
        return {name: array.tolist() for name, array in here.items()}
