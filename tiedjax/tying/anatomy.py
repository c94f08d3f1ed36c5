"""What the gradient of the output role is made of, and how much of either role's is noise.

With z-loss too the mean loss has the gradient G = mean of r_t h_t' with respect to the output table: h_t is the state
at a place, r_t = (1 + 2 z_loss * logsumexp) softmax - onehot(target), and means are weighted as the loss is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tiedjax.tying.tables import Tables


def pull_and_push(G_VD: jax.Array, pull_VD: jax.Array) -> dict[str, jax.Array]:
    """The L2 norms of the two parts that G is the sum of, and push / (pull + push) of these norms.

    The pull, the mean of -onehot(target) h', moves each target's row towards the states that it was to follow; the push
    is all else. Its norm comes from |G - pull|^2 = |G|^2 - 2 <G, pull> + |pull|^2: it is never held.
    """
    pull = jnp.sum(jnp.square(pull_VD))
    push = jnp.sum(jnp.square(G_VD)) - 2 * jnp.sum(G_VD * pull_VD) + pull
    pull_norm, push_norm = jnp.sqrt(pull), jnp.sqrt(jnp.maximum(push, 0))
    return {
        "output_pull_norm": pull_norm,
        "output_push_norm": push_norm,
        "output_push_share": push_norm / (pull_norm + push_norm),
    }


def common_mode(G_VD: jax.Array, r_V: jax.Array, h_D: jax.Array) -> dict[str, jax.Array]:
    """Shares of |G|^2, which sum to 1: of the common mode r h', of the rest, and of twice their inner product.

    `r_V` is the mean of r_t, which is the gradient with respect to a bias of the logits, and `h_D` the mean state. The
    rest is the covariance of r_t and h_t. The two are not orthogonal: the third share may be negative, and then the
    first two sum to more than 1.
    """
    whole = jnp.sum(jnp.square(G_VD))
    common = jnp.sum(jnp.square(r_V)) * jnp.sum(jnp.square(h_D))
    along = jnp.einsum("v,vd,d->", r_V, G_VD, h_D, precision="highest")  # <G, common>
    return {
        "output_common_share": common / whole,
        "output_rest_share": (whole - 2 * along + common) / whole,
        "output_cross_share": 2 * (along - common) / whole,
    }


def signal_and_noise(norms: Tables, squares: Tables, parts: int) -> dict[str, jax.Array]:
    """The squared norm of each role's gradient G, the mean of k = `parts` microbatches' g_i, as signal plus noise.

    `norms` are |G|, `squares` the sums of |g_i / k|^2. The signal, (|sum g_i|^2 - sum |g_i|^2) / (k (k - 1)), estimates
    the squared norm of the gradient of all text without bias, and may be negative; the noise,
    (sum |g_i|^2 - |sum g_i|^2 / k) / (k (k - 1)), that of what G has by the choice of its batch. k is 2 or more.
    """
    whole = jax.tree.map(jnp.square, norms)
    noise = jax.tree.map(lambda G, g: (parts * g - G) / (parts - 1), whole, squares)
    return {
        "input_grad_signal": whole.input - noise.input,
        "input_grad_noise": noise.input,
        "output_grad_signal": whole.output - noise.output,
        "output_grad_noise": noise.output,
    }
