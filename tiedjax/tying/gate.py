"""The rare-token gate: rare tokens' rows are pushed less by tokens that are not rare."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import RunConfig


class RareGate(NamedTuple):
    """The rows of rare tokens in the output table, int32 [R], ascending; and the factor on the push of each, [R]."""

    rows_R: Any
    factor_R: Any


def rare_gate(cfg: RunConfig, counts_V: np.ndarray) -> RareGate | None:
    """The gate of arXiv 2109.03127 by how often, or how likely, each token occurs; None without it, or if none is rare.

    Of a token with the share x of all tokens an update of B T tokens has a = x B T appearances: it is rare if
    a < `tying.rare_gate`, and its factor is a. The paper counts a over the last epoch instead, which is the same in the
    mean, and has a second gate, on the push from targets that are rare themselves, which is not built. Rows that no
    token has are left alone.
    """
    if cfg.tying.rare_gate is None:
        return None
    per_update_V = counts_V / counts_V.sum() * cfg.data.batch_size * cfg.model.seq_len
    rows_R = np.flatnonzero(per_update_V[: cfg.model.vocab_size] < cfg.tying.rare_gate)
    return RareGate(rows_R.astype(np.int32), per_update_V[rows_R].astype(np.float32)) if len(rows_R) else None


def gate_in_words(cfg: RunConfig, gate: RareGate | None) -> str:
    """How many tokens of the run's are rare."""
    rare = f"below tying.rare_gate = {cfg.tying.rare_gate:g} appearances per update"
    if gate is None:
        return f"no token is rare, {rare}: the gate changes nothing"
    return f"{len(gate.rows_R):,} of {cfg.model.vocab_size:,} tokens are rare, {rare}"


@jax.custom_vjp
def gate_push(U_VD: jax.Array, tap_VD: jax.Array, gate: RareGate) -> tuple[jax.Array, jax.Array]:
    """The identity on the output table, and zeros [R, D] for `cross_entropy`, whose gradient is the push of rare rows.

    The backward pass takes 1 - factor of that push from the gradient of these rows. `tap_VD` are zeros that no forward
    pass reads; the gradient with respect to them is what goes on to the table.
    """
    return _gate_forward(U_VD, tap_VD, gate)[0]


def _gate_forward(U_VD: jax.Array, tap_VD: jax.Array, gate: RareGate) -> tuple[tuple[jax.Array, jax.Array], RareGate]:
    return (U_VD, jnp.zeros((len(gate.rows_R), U_VD.shape[1]), U_VD.dtype)), gate


def _gate_backward(gate: RareGate, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, None]:
    G_VD, push_RD = cotangents
    excess_RD = (1 - gate.factor_R.astype(G_VD.dtype))[:, None] * push_RD
    passed_VD = G_VD.at[gate.rows_R].add(-excess_RD, unique_indices=True, indices_are_sorted=True)
    return passed_VD, passed_VD, None


gate_push.defvjp(_gate_forward, _gate_backward)
