"""Fitting tuned-lens translators (Belrose et al. 2023, arXiv 2303.08112) to convergence.

The translator of a hidden state x is y = norm(x + x W + b), started at W = 0, b = 0, where it is the logit lens. Its
loss is the mean of KL(final || softmax(y U^T + c)), c the model's output bias or 0. With the final distribution p,

    KL = sum_v p_v (log p_v - c_v) - y . m + logsumexp(U y + c),    m = sum_v p_v U_v,

so a position's teacher is one [D] vector and one number, and [C, V] logits are needed for a chunk of positions only.
L-BFGS (Liu and Nocedal 1989) minimises it, its initial inverse Hessian the Kronecker product of two inverses (Martens
and Grosse 2015): of the second moments of (x, 1), and of the final distribution's mean covariance of the rows of U.

Axes: N positions laid flat, C a chunk of them, M chunks, B rows of a block, E = D + 1 of the rows of [W; b].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.blocked import MULTIPLIED, row_blocks
from tiedjax.analysis.basis.held_out import CHUNK, FrozenModel, chunks, final_norm
from tiedjax.analysis.basis.minimisation import MOST_ITERATIONS, SPAN, TOLERANCE, Minimum, damped_inverse, minimise
from tiedjax.config import ModelConfig
from tiedjax.errors import UserError

CRITERION = f"the loss fell by less than {TOLERANCE:.1%} over {SPAN} iterations of L-BFGS (at most {MOST_ITERATIONS})"


class Teacher(NamedTuple):
    """The final distribution as the loss needs it: m [N, D], sum p (log p - c) [N], and the mean covariance of U
    [D, D]."""

    m_ND: jax.Array
    constant_N: jax.Array
    covariance_DD: np.ndarray


def teacher(model: FrozenModel, last_ND: np.ndarray) -> Teacher:
    """What the model's own predictions teach, from the last hidden states of the training positions.

    UserError for a model whose logits have a cap: the loss above is that of logits without one.
    """
    if model.config.logit_cap is not None:
        raise UserError(
            f"lens: a translator is fitted to logits without a cap, and model.logit_cap is {model.config.logit_cap}"
        )
    y_ND = model.normed(last_ND)
    total_V = np.zeros(len(model.U_VD))
    parts = []
    for chunk in chunks(len(y_ND)):
        m_CD, constant_C, sum_V = _teach(y_ND[chunk], model.U_VD, model.bias_V)
        parts.append((m_CD, constant_C))
        total_V += np.asarray(sum_V, np.float64)
    m_ND, constant_N = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    p_V, U_VD = total_V / len(y_ND), np.asarray(model.tables.output)
    covariance_DD = np.zeros((U_VD.shape[1],) * 2)
    for block in row_blocks(len(U_VD), U_VD.shape[1], itemsize=8, block_bytes=MULTIPLIED):
        u_BD = np.asarray(U_VD[block], np.float64)
        covariance_DD += (u_BD * p_V[block, None]).T @ u_BD
    m64_ND = np.asarray(m_ND, np.float64)
    return Teacher(m_ND, constant_N, covariance_DD - m64_ND.T @ m64_ND / len(m64_ND))


def fit(
    model: FrozenModel,
    x_ND: np.ndarray,
    lesson: Teacher,
    progress: Callable[[int, float], None] = lambda evaluations, value: None,
) -> Minimum:
    """The translator of the states x_ND: `point` is float64 [D + 1, D], W above b.

    `progress` is told of every evaluation of the loss: how many there were, and this one's value in nats.
    """
    N, D = x_ND.shape
    device_ND = jnp.asarray(x_ND)
    evaluations = itertools.count(1)

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        theta_ED = jnp.asarray(point.reshape(D + 1, D), jnp.float32)
        value, slope_ED = _loss_and_slope(
            model.config, model.norm, theta_ED, device_ND, *lesson[:2], model.U_VD, model.bias_V
        )
        progress(next(evaluations), float(value))
        return float(value), np.asarray(slope_ED, np.float64).ravel()

    moments_EE = np.zeros((D + 1, D + 1))
    for block in row_blocks(N, D + 1, itemsize=8, block_bytes=MULTIPLIED):
        x1_BE = np.concatenate([np.asarray(x_ND[block], np.float64), np.ones((len(x_ND[block]), 1))], axis=1)
        moments_EE += x1_BE.T @ x1_BE / N
    left_inverse, right_inverse = damped_inverse(moments_EE), damped_inverse(lesson.covariance_DD)
    minimum = minimise(
        objective,
        np.zeros((D + 1) * D),
        lambda slope_ED: (left_inverse @ slope_ED.reshape(D + 1, D) @ right_inverse).ravel(),
    )
    return Minimum(
        minimum.point.reshape(D + 1, D), minimum.value, minimum.iterations, minimum.evaluations, minimum.converged
    )


@functools.partial(jax.jit, static_argnums=0)
def translated(cfg: ModelConfig, norm: Any, theta_ED: jax.Array, x_ND: jax.Array) -> jax.Array:
    """norm(x + x W + b), theta = [W; b]: the states as the output table reads them; exactly norm(x) at theta = 0."""
    moved_ND = x_ND + jnp.matmul(x_ND, theta_ED[:-1], precision="highest") + theta_ED[-1:]
    return final_norm(cfg, norm, moved_ND)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_slope(
    cfg: ModelConfig,
    norm: Any,
    theta_ED: jax.Array,
    x_ND: jax.Array,
    m_ND: jax.Array,
    constant_N: jax.Array,
    U_VD: jax.Array,
    bias_V: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    N, D = x_ND.shape
    y_ND, pull_back = jax.vjp(lambda theta_ED: translated(cfg, norm, theta_ED, x_ND), theta_ED)
    C = min(CHUNK, N)

    def cut(a_ND: jax.Array) -> jax.Array:
        return jnp.pad(a_ND, ((0, -N % C), (0, 0))).reshape(-1, C, D)

    def chunk_loss_and_slope(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y_CD, m_CD = chunk
        logits_CV = jnp.matmul(y_CD, U_VD.T, precision="highest") + bias_V[None]
        top_C1 = logits_CV.max(axis=-1, keepdims=True)
        e_CV = jnp.exp(logits_CV - top_C1)
        sum_C1 = e_CV.sum(axis=-1, keepdims=True)
        loss_C = (jnp.log(sum_C1) + top_C1)[:, 0] - jnp.sum(y_CD * m_CD, axis=-1)
        return loss_C, jnp.matmul(e_CV, U_VD, precision="highest") / sum_C1 - m_CD

    loss_MC, slope_MCD = jax.lax.map(chunk_loss_and_slope, (cut(y_ND), cut(m_ND)))
    loss = jnp.mean(loss_MC.reshape(-1)[:N] + constant_N)
    return loss, pull_back(slope_MCD.reshape(-1, D)[:N] / N)[0]


@jax.jit
def _teach(y_CD: jax.Array, U_VD: jax.Array, bias_V: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    log_p_CV = jax.nn.log_softmax(jnp.matmul(y_CD, U_VD.T, precision="highest") + bias_V[None])
    p_CV = jnp.exp(log_p_CV)
    constant_C = jnp.sum(p_CV * (log_p_CV - bias_V[None]), axis=-1)
    return jnp.matmul(p_CV, U_VD, precision="highest"), constant_C, p_CV.sum(axis=0)
