"""Every backend of attention that a CPU can run, against NumPy in float64; and which one is chosen where."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_config
from jax.test_util import check_grads

from tiedjax import sharding, step, tying
from tiedjax.attention import BACKENDS, PLAIN, Scores, attention_to_cache, causal_attention, chosen
from tiedjax.errors import UserError
from tiedjax.lm import init_params


def example(T: int, H: int, G: int, K: int, dtype: Any = np.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, T, heads, K)), dtype) for heads in (H, G, G)]


def oracle(q_BTHK: np.ndarray, k_BTGK: np.ndarray, v_BTGK: np.ndarray, scores: Scores = PLAIN) -> np.ndarray:
    """One query at a time."""
    B, T, H, K = q_BTHK.shape
    y_BTHK = np.zeros_like(q_BTHK)
    for b, t, h in np.ndindex(B, T, H):
        g = h // (H // k_BTGK.shape[2])
        seen = slice(max(0, t + 1 - (scores.window or T)), t + 1)
        score = k_BTGK[b, seen, g] @ q_BTHK[b, t, h] * (scores.scale or 1 / np.sqrt(K))
        if scores.cap:
            score = scores.cap * np.tanh(score / scores.cap)
        weight = np.exp(score - score.max())
        y_BTHK[b, t, h] = weight @ v_BTGK[b, seen, g] / weight.sum()
    return y_BTHK


@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    ("backend", "T", "K"), [("xla", 9, 6), ("xla", 1, 4), ("splash", 128, 16), ("splash", 256, 128)]
)
def test_every_backend_is_the_definition(backend: str, T: int, K: int, H: int, G: int) -> None:
    arrays = example(T, H, G, K)
    wanted = oracle(*(np.asarray(x, np.float64) for x in arrays))
    np.testing.assert_allclose(causal_attention(*arrays, backend=backend), wanted, rtol=1e-4, atol=1e-5)


SCORES = {
    "scale": Scores(scale=0.9),
    "cap": Scores(cap=0.7),
    "window": Scores(window=3),
    "itself alone": Scores(window=1),
    "wide window": Scores(window=128),
    "all": Scores(0.8, 0.6, 5),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(("backend", "T"), [("xla", 9), ("splash", 128)])
def test_scores_are_scaled_capped_and_seen_as_told(backend: str, T: int, scores: Scores) -> None:
    arrays = example(T, 4, 2, 16)
    wanted = oracle(*(np.asarray(x, np.float64) for x in arrays), scores)
    found = causal_attention(*arrays, backend=backend, scores=scores)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    if scores.window != 128:
        assert np.abs(wanted - oracle(*map(np.asarray, arrays))).max() > 0.1


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_a_cache_is_attended_to_as_the_positions_themselves(scores: Scores) -> None:
    """Three queries at positions 4 to 6 of a cache with room for twelve."""
    q_BTHK, k_BTGK, v_BTGK = example(7, 4, 2, 16)
    wanted = oracle(*(np.asarray(x, np.float64) for x in (q_BTHK, k_BTGK, v_BTGK)), scores)[:, 4:]
    room = [(0, 0), (0, 5), (0, 0), (0, 0)]
    k_BSGK, v_BSGK = (jnp.pad(x, room, constant_values=9.0) for x in (k_BTGK, v_BTGK))
    found = attention_to_cache(q_BTHK[:, 4:], k_BSGK, v_BSGK, jnp.asarray(4), scores)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scores", [PLAIN, SCORES["all"]], ids=["plain", "all"])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2)])
def test_the_gradient_written_by_hand_is_the_derivative(H: int, G: int, scores: Scores) -> None:
    arrays = example(7, H, G, 4, np.float64)
    attend = lambda *x: causal_attention(*x, scores=scores)
    check_grads(attend, arrays, order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("scores", [PLAIN, SCORES["all"]], ids=["plain", "all"])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (4, 2)])
def test_splash_attention_has_the_same_gradient(H: int, G: int, scores: Scores) -> None:
    arrays = example(128, H, G, 16)
    total = lambda backend: lambda *x: jnp.sum(jnp.sin(causal_attention(*x, backend=backend, scores=scores)))
    for found, wanted in zip(*(jax.grad(total(b), argnums=(0, 1, 2))(*arrays) for b in ("splash", "xla")), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def q(T: int = 256, K: int = 64, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, T, 4, K), jnp.dtype(dtype))


def test_auto_takes_each_platforms_kernel_where_it_fits() -> None:
    assert chosen("auto", "cpu", None, q()) == "xla"
    assert chosen("auto", "gpu", 9.0, q()) == "cudnn"
    assert chosen("auto", "tpu", None, q()) == "splash"
    assert chosen("auto", "gpu", 9.0, q(dtype="float32")) == "xla"
    assert chosen("auto", "gpu", 9.0, q(K=20)) == chosen("auto", "gpu", 9.0, q(K=264)) == "xla"
    assert (chosen("auto", "gpu", 9.0, q(K=136)), chosen("auto", "gpu", 8.0, q(K=136))) == ("cudnn", "xla")
    assert chosen("auto", "gpu", 7.5, q()) == chosen("auto", "gpu", None, q()) == "xla"  # None: another maker's
    assert chosen("auto", "tpu", None, q(T=200)) == "xla"
    assert chosen("auto", "gpu", 9.0, q(), Scores(0.5, None, 3)) == "cudnn"
    assert chosen("auto", "gpu", 9.0, q(), Scores(cap=50.0)) == "xla"
    assert chosen("auto", "tpu", None, q(), SCORES["all"]) == "splash"


def test_a_cap_on_scores_is_refused_by_cudnn() -> None:
    with pytest.raises(UserError) as error:
        chosen("cudnn", "gpu", 9.0, q(), Scores(cap=50.0))
    assert str(error.value) == "model.attention: cudnn takes no model.attention_cap; use auto or xla"


def test_cudnn_is_told_the_scale_and_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which it is asked how many positions lie before a query's own."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: told.update(options) or q)
    arrays = example(256, 4, 4, 64, jnp.bfloat16)
    BACKENDS["cudnn"](*arrays, Scores(0.3, None, 5), sharding.ONE_DEVICE)
    assert (told["scale"], told["local_window_size"], told["is_causal"]) == (0.3, (4, 0), True)


@pytest.mark.parametrize(
    ("backend", "platform", "cuda", "of", "reason"),
    [
        (
            "cudnn",
            "cpu",
            None,
            q(),
            "cudnn needs an NVIDIA GPU of compute capability 8.0 or above, not cpu; use auto or",
        ),
        ("cudnn", "gpu", 7.0, q(), "8.0 or above, not 7.0"),
        ("cudnn", "gpu", 9.0, q(dtype="float32"), "needs model.dtype bfloat16, not float32"),
        ("cudnn", "gpu", 9.0, q(K=12), "needs a head width that is a multiple of 8 up to 256, not 12"),
        ("cudnn", "gpu", 8.6, q(K=136), "needs a head width that is a multiple of 8 up to 128, not 136"),
        ("splash", "gpu", 9.0, q(), "needs a TPU"),
        ("splash", "tpu", None, q(T=200), "needs model.seq_len to be a multiple of 128, not 200"),
    ],
)
def test_a_backend_that_does_not_fit_is_refused(
    backend: str, platform: str, cuda: float | None, of: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        chosen(backend, platform, cuda, of)


def step_of(**model: Any) -> tuple[Any, Any]:
    cfg = small_config(layers=2, heads=2, kv_heads=1, seq_len=128, **model)
    return cfg, step.make_steps(cfg, sharding.make_mesh(cfg.mesh, jax.devices()[:1]))


def test_a_model_starts_and_trains_with_splash_attention() -> None:
    losses = {}
    for backend in ("splash", "xla"):
        cfg, steps = step_of(attention=backend)
        state = steps.init(jax.random.key(0))
        given = (random_tokens(cfg, 0), tying.role_scale(cfg.tying), jnp.zeros(cfg.model.table_rows, jnp.int32))
        for _ in range(2):
            state, metrics = steps.train(state, *given)
        losses[backend] = float(metrics["loss"])
    assert losses["splash"] == pytest.approx(losses["xla"], rel=1e-5)


def test_the_parameters_of_a_run_with_cudnn_can_be_named_on_any_machine() -> None:
    shapes = jax.eval_shape(lambda key: init_params(small_config(attention="cudnn"), key), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(
        jax.eval_shape(lambda key: init_params(small_config(), key), jax.random.key(0))
    )


def test_the_result_of_attention_is_kept_or_computed_again_as_the_policy_says() -> None:
    """By the products of weights and values in the program: one a layer where the result is kept, else two."""

    def products(remat: str) -> int:
        cfg, steps = step_of(attention="xla", remat=remat, d_model=24)
        shapes = (
            steps.abstract,
            jax.ShapeDtypeStruct((cfg.data.batch_size, 129), jnp.int32),
            tying.role_scale(cfg.tying),
            jnp.zeros(cfg.model.table_rows, jnp.int32),
        )
        text = steps.train.lower(*shapes).compile().as_text()
        result = f"f32[{cfg.data.batch_size},{2 * 128},{cfg.model.key_width}]"
        return sum(" dot(" in line and result in line.split(" dot(")[0] for line in text.splitlines())

    counts = {remat: products(remat) for remat in ("none", "attention", "dots", "full")}
    assert counts["attention"] == counts["dots"] == counts["none"]
    assert counts["full"] == counts["none"] + 2
