"""Random keys by name: a name gives the same key wherever and in whatever order it is asked for."""

from __future__ import annotations

import hashlib

import jax


def key_for(root: jax.Array, name: str) -> jax.Array:
    """The key that belongs to `name` under `root`; independent of every other name's."""
    digest = hashlib.sha256(name.encode()).digest()
    for start in (0, 4):
        root = jax.random.fold_in(root, int.from_bytes(digest[start : start + 4], "little"))
    return root
