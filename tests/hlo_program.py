"""Run by test_compile.py on 8 fake devices: programs whose collectives are known, as `hlo.collectives` counts them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tiedjax.cost import hlo

MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
ROUNDS = 5


def counted(f: Callable[..., Any], cut: jax.P, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """What `hlo` finds in f, run by every device on its part of float32 arrays of these shapes."""
    run = jax.shard_map(f, mesh=MESH, in_specs=(jax.P("x"),) * len(shapes), out_specs=cut, check_vma=False)
    compiled = jax.jit(run).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return dataclasses.asdict(hlo.collectives(compiled.as_text()))


def in_scan(x_N: jax.Array) -> jax.Array:
    """A psum in a scan in a scan."""

    def inner(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.psum(jnp.sin(carry), "x"), None

    def outer(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, carry, None, ROUNDS)[0], None

    return jax.lax.scan(outer, x_N, None, 3)[0]


def until_small(x_N: jax.Array) -> jax.Array:
    """A psum in a loop that nobody can know the length of."""
    return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jax.lax.psum(y, "x") / 100, x_N)


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "none": counted(lambda x: x + 1, jax.P("x"), (8, 16)),
                "psum": counted(lambda x: jax.lax.psum(x, "x"), jax.P(), (8, 16)),
                "all_gather": counted(lambda x: jax.lax.all_gather(x, "x", tiled=True), jax.P(), (8, 16)),
                "psum_scatter": counted(lambda x: jax.lax.psum_scatter(x, "x", tiled=True), jax.P("x"), (64, 16)),
                "all_to_all": counted(lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), jax.P("x"), (64, 16)),
                "ppermute": counted(lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), jax.P("x"), (8, 16)),
                "scan": counted(in_scan, jax.P(), (8, 16)),
                "while": counted(until_small, jax.P(), (8, 16)),
            }
        )
    )
