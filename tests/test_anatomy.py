"""What the output role's gradient is made of, against NumPy in float64; what of a batch is signal and what is noise."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import random_tokens, small_config

from tiedjax import gradients, lm, model, step, tying
from tiedjax.config import DataConfig, RunConfig, TrainConfig
from tiedjax.sharding import make_mesh


def params_of(cfg: RunConfig) -> dict[str, Any]:
    """With tables so large that no distribution is nearly uniform."""
    params = nn.unbox(lm.init_params(cfg, jax.random.key(3)))
    larger = {name: 4 * table for name, table in lm.trained(params)["tables"].items()}
    params = lm.with_trained(params, {"tables": larger, "body": params["body"]})
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
    )


def states_and_residuals(cfg: RunConfig, params: Any, tokens_BS: np.ndarray) -> tuple[np.ndarray, ...]:
    """(states [N, D], (1 + 2 z logsumexp) softmax - onehot [N, V], targets [N], losses [N]), written down by hand."""
    E, U = (np.asarray(table) for table in tying.scheme_of(cfg.tying).tables(params["tables"]))
    h_ND = np.asarray(model.Transformer(cfg.model).apply(params["body"], E[tokens_BS[:, :-1]])).reshape(-1, E.shape[1])
    logits_NV, targets_N = h_ND @ U.T, tokens_BS[:, 1:].reshape(-1)
    log_sum_N = scipy.special.logsumexp(logits_NV, axis=1)
    one_hot_NV = np.eye(len(U))[targets_N]
    p_NV = np.exp(logits_NV - log_sum_N[:, None])
    z = cfg.train.z_loss
    losses_N = log_sum_N - (logits_NV * one_hot_NV).sum(1) + z * log_sum_N**2
    return h_ND, (1 + 2 * z * log_sum_N[:, None]) * p_NV - one_hot_NV, targets_N, losses_N


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["tied", "untied", "low_rank"])
@pytest.mark.parametrize(("parts", "z_loss"), [(1, 0.0), (1, 1e-2), (4, 1e-2)])
def test_the_output_gradient_is_pull_and_push_and_common_mode_and_rest(scheme: str, parts: int, z_loss: float) -> None:
    data, train = DataConfig(batch_size=8, microbatches=parts), TrainConfig(steps=10, z_loss=z_loss)
    cfg = small_config(scheme, data=data, train=train)
    params, tokens_BS = params_of(cfg), random_tokens(cfg)
    metrics = jax.device_get(jax.jit(gradients.anatomy(cfg))(params, tokens_BS, None))
    h_ND, r_NV, targets_N, _ = states_and_residuals(cfg, params, tokens_BS)
    G_VD = r_NV.T @ h_ND / len(h_ND)
    pull_VD = -np.eye(len(G_VD))[targets_N].T @ h_ND / len(h_ND)
    common_VD = np.outer(r_NV.mean(0), h_ND.mean(0))
    rest_VD, square = G_VD - common_VD, np.sum(G_VD**2)
    pull, push = np.linalg.norm(pull_VD), np.linalg.norm(G_VD - pull_VD)
    expected = {
        "output_pull_norm": pull,
        "output_push_norm": push,
        "output_push_share": push / (pull + push),
        "output_common_share": np.sum(common_VD**2) / square,
        "output_rest_share": np.sum(rest_VD**2) / square,
        "output_cross_share": 2 * np.sum(common_VD * rest_VD) / square,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-10, err_msg=name)
    assert abs(expected["output_cross_share"]) > 1e-3
    shares = [metrics[f"output_{part}_share"] for part in ("common", "rest", "cross")]
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_change_of_the_loss_by_an_update_of_the_body_is_its_derivative(parts: int) -> None:
    """By a central difference of the loss written down by hand."""
    cfg = small_config(data=DataConfig(batch_size=8, microbatches=parts), train=TrainConfig(steps=10, z_loss=1e-2))
    params, tokens_BS = params_of(cfg), random_tokens(cfg)
    leaves, tree = jax.tree.flatten(params["body"])
    rng = np.random.default_rng(1)
    update = jax.tree.unflatten(tree, [0.1 * rng.standard_normal(leaf.shape) for leaf in leaves])

    def loss_after(factor: float) -> float:
        body = jax.tree.map(lambda leaf, change: leaf + factor * change, params["body"], update)
        return float(states_and_residuals(cfg, {**params, "body": body}, tokens_BS)[3].mean())

    change = jax.jit(gradients.anatomy(cfg))(params, tokens_BS, update)["body_loss_change"]
    small = 1e-5
    expected = (loss_after(small) - loss_after(-small)) / (2 * small)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(change, expected, rtol=1e-6)


def test_a_step_can_be_observed_in_float32_without_an_update() -> None:
    """The compiled function of a run agrees with float64, and the norms with those that the train step measures."""
    cfg = small_config(data=DataConfig(batch_size=8, microbatches=2))
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    state, tokens_BS = steps.init(jax.random.key(0)), random_tokens(cfg)
    observed = jax.device_get(steps.observe(state.params, tokens_BS, None))
    with_update = jax.device_get(steps.observe(state.params, tokens_BS, state.params["body"]))
    assert with_update.keys() - observed.keys() == {"body_loss_change"}
    h_ND, r_NV, targets_N, _ = states_and_residuals(cfg, state.params, tokens_BS)
    push_VD = (r_NV + np.eye(r_NV.shape[1])[targets_N]).T @ h_ND / len(h_ND)
    np.testing.assert_allclose(observed["output_push_norm"], np.linalg.norm(push_VD), rtol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", ["tied", "untied", "low_rank"])
@pytest.mark.parametrize("parts", [2, 4])
def test_signal_and_noise_are_those_of_the_gradients_of_microbatches(scheme: str, parts: int) -> None:
    """Each microbatch's mean gradient taken alone, under role scales that must not be in it."""
    data, train = DataConfig(batch_size=8, microbatches=parts), TrainConfig(steps=10, z_loss=1e-2)
    cfg = small_config(scheme, data=data, train=train)
    params, tokens_BS = params_of(cfg), random_tokens(cfg)
    scale = tying.Tables(jnp.float32(5), jnp.float32(0.5))
    _, (_, roles, squares) = jax.jit(gradients.loss_and_gradients(cfg))(params, tokens_BS, scale)
    norms = tying.Tables(*map(jnp.linalg.norm, roles))
    metrics = tying.signal_and_noise(norms, squares.roles, parts)
    alone = jax.jit(
        gradients.loss_and_gradients(small_config(scheme, data=DataConfig(batch_size=8 // parts), train=train))
    )
    by_part = [alone(params, tokens_BS[i::parts], scale)[1][1] for i in range(parts)]
    for role in ("input", "output"):
        g_kVD = np.stack([getattr(each, role) for each in by_part])
        total, apart = np.sum(g_kVD.sum(0) ** 2), np.sum(g_kVD**2)
        signal = (total - apart) / (parts * (parts - 1))
        noise = (apart - total / parts) / (parts * (parts - 1))
        np.testing.assert_allclose(metrics[f"{role}_grad_signal"], signal, rtol=1e-10, err_msg=role)
        np.testing.assert_allclose(metrics[f"{role}_grad_noise"], noise, rtol=1e-10, err_msg=role)
        np.testing.assert_allclose(signal + noise, np.linalg.norm(g_kVD.mean(0)) ** 2, rtol=1e-12)


def test_signal_and_noise_are_right_on_average() -> None:
    """Of gradients that are a known vector and known noise, over so many batches that chance is 20 times smaller."""
    rng, k, rows, width, batches = np.random.default_rng(0), 4, 6, 5, 20_000
    truth_VD, deviation = rng.standard_normal((rows, width)), 3.0
    g = truth_VD + deviation * rng.standard_normal((batches, k, rows, width))
    norm = jnp.asarray(np.sqrt(np.sum(g.mean(1) ** 2, axis=(1, 2))))
    square = jnp.asarray(np.sum((g / k) ** 2, axis=(1, 2, 3)))
    metrics = tying.signal_and_noise(tying.Tables(norm, 2 * norm), tying.Tables(square, 4 * square), k)
    mean = {name: float(values.mean()) for name, values in metrics.items()}
    signal, noise = np.sum(truth_VD**2), deviation**2 * rows * width / k
    np.testing.assert_allclose(mean["input_grad_signal"], signal, rtol=0.02)
    np.testing.assert_allclose(mean["input_grad_noise"], noise, rtol=0.01)
    np.testing.assert_allclose(mean["output_grad_signal"], 4 * mean["input_grad_signal"], rtol=1e-5)
    assert metrics["input_grad_signal"].min() < 0


@pytest.mark.parametrize("parts", [1, 2])
def test_signal_and_noise_are_metrics_of_steps_of_several_microbatches(parts: int) -> None:
    cfg = small_config(data=DataConfig(batch_size=8, microbatches=parts))
    steps = step.make_steps(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    state, decile_V = steps.init(jax.random.key(0)), np.zeros(cfg.model.table_rows, np.int32)
    metrics = jax.device_get(steps.train(state, random_tokens(cfg), tying.role_scale(cfg.tying), decile_V)[1])
    for role in ("input", "output"):
        names = [f"{role}_grad_signal", f"{role}_grad_noise"]
        assert [name in metrics for name in names] == [parts > 1] * 2
        if parts > 1:
            np.testing.assert_allclose(sum(metrics[n] for n in names), metrics[f"{role}_grad_norm"] ** 2, rtol=1e-5)
