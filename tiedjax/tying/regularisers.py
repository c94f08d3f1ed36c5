"""Regularisers: what may be added to the training loss for the tables themselves, of neither role; off by default.

Each is a number of one table E_VD. Of a scheme whose roles have two arrays both count, and the two numbers are added.
Rows that no token has, above the vocabulary, are left out.

Axes: V rows of a table, of which the first n are tokens', D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tiedjax.config import RunConfig
from tiedjax.tying.schemes import Scheme
from tiedjax.tying.tables import Tables, distinct


def cosine(E_VD: jax.Array, n: int) -> jax.Array:
    """The mean cosine of two different ones of the first n rows (arXiv 1907.12009); 0 with a row of zeros.

    With unit rows u_v it is (|sum_v u_v|^2 - sum_v |u_v|^2) / (n (n - 1)), and no pair is ever formed. The paper
    divides by n^2.
    """
    E_VD = _tokens(E_VD, n)
    square_V1 = jnp.sum(jnp.square(E_VD), axis=1, keepdims=True)
    some_V1 = square_V1 > 0  # asked twice: else the gradient of a row of zeros would be 0 times infinity
    u_VD = E_VD * jnp.where(some_V1, jax.lax.rsqrt(jnp.where(some_V1, square_V1, 1)), 0)
    pairs = jnp.sum(jnp.square(jnp.sum(u_VD, axis=0))) - jnp.sum(jnp.square(u_VD))
    return pairs / (n * (n - 1))


def orthogonality(E_VD: jax.Array, n: int) -> jax.Array:
    """||E'E / n - c I||^2 over all entries, c = trace(E'E / n) / D: 0 where columns are orthogonal and equally long.

    This c is the one that makes it least. So its gradient, 4/n E (E'E / n - c I), is the same whether c counts as a
    constant or not.
    """
    E_VD = _tokens(E_VD, n)
    G_DD = jnp.matmul(E_VD.T, E_VD, precision="highest") / n
    return jnp.sum(jnp.square(G_DD - jnp.trace(G_DD) / len(G_DD) * jnp.eye(len(G_DD), dtype=G_DD.dtype)))


def mean(E_VD: jax.Array, n: int) -> jax.Array:
    """|mean row|^2 of the first n rows."""
    return jnp.sum(jnp.square(jnp.sum(_tokens(E_VD, n), axis=0) / n))


def anchor(E_VD: jax.Array, A_VD: jax.Array, n: int) -> jax.Array:
    """The mean over the first n rows of |e_v - a_v|^2, A the table that the run is to stay near."""
    return jnp.sum(jnp.square(_tokens(E_VD - A_VD, n))) / n


def penalty(cfg: RunConfig, kind: str, tables: Tables, anchors: Mapping[str, jax.Array] | None) -> jax.Array:
    """What the regulariser `kind` adds: its weight times its sum over the distinct tables, in nats.

    `anchors` are the tables to stay near, by the names of `distinct`; None without that regulariser.
    """
    weight, n, total = cfg.regularisers.weights[kind], cfg.model.vocab_size, jnp.zeros(())
    for name, E_VD in distinct(tables).items():
        if kind == "anchor":
            assert anchors is not None
            total += weight * anchor(E_VD, anchors[name], n)
        else:
            total += weight * _ALONE[kind](E_VD, n)
    return total


def anchored(scheme: Scheme, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Copies of the distinct tables [V, D] that a scheme gives of its arrays."""
    return {name: jnp.copy(E_VD) for name, E_VD in distinct(scheme.tables(arrays)).items()}


_ALONE = {"cosine": cosine, "orthogonality": orthogonality, "mean": mean}


def _tokens(E_VD: jax.Array, n: int) -> jax.Array:
    """With zeros in the rows from n on: a slice would be cut unevenly over a mesh."""
    return E_VD if len(E_VD) == n else jnp.where(jnp.arange(len(E_VD))[:, None] < n, E_VD, 0)
