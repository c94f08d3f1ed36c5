"""Unembedding and cross-entropy: hidden states against the output table."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    h_BTD: jax.Array, U_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(h U^T)[target] + z_loss * logsumexp^2 in nats, and the sum of the weights.

    Operands keep the dtype of h; logits, their softmax and the sums are float32 (float64 if h is). The z-loss is that
    of PaLM (arXiv 2204.02311).
    """
    wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
    h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])
    logits_NV = jnp.matmul(h_ND, U_VD.astype(h_ND.dtype).T, preferred_element_type=wide)
    log_sum_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_N = jnp.take_along_axis(logits_NV, targets_BT.reshape(-1, 1), axis=-1)[:, 0]
    loss_N = log_sum_N - target_N + z_loss * jnp.square(log_sum_N)
    weights_N = weights_BT.reshape(-1).astype(wide)
    return jnp.sum(loss_N * weights_N), jnp.sum(weights_N)
