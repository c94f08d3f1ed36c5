"""The body against a float64 re-computation in NumPy, and the laws it must obey."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import slow_but, small_config

from tiedjax.config import ModelConfig
from tiedjax.model import CACHE, Transformer, empty_cache, init_body, wide_gradient_product
from tiedjax.sharding import Layout

OPTIONS: dict[str, dict[str, Any]] = {
    "olmo": {},
    "llama": {"norm": "rmsnorm", "heads": 4, "kv_heads": 2, "rope_theta": 500.0},
    "layernorm-gelu-nope": {"norm": "layernorm", "mlp": "gelu", "position": "none"},
    "qk-norm": {"norm": "rmsnorm", "qk_norm": "head", "kv_heads": 1},
    "olmo2": {"norm": "rmsnorm", "norm_place": "post", "qk_norm": "whole", "heads": 4, "kv_heads": 2},
    "pythia": {
        "norm": "layernorm",
        "norm_bias": True,
        "parallel": True,
        "biases": "qkv,out,mlp",
        "mlp": "gelu_exact",
        "rotary_fraction": 0.5,
    },
    "gpt2": {"norm": "layernorm", "norm_bias": True, "position": "learned", "biases": "qkv,out,mlp", "mlp": "gelu"},
    "qwen3": {"norm": "rmsnorm", "qk_norm": "head", "head_width": 12, "biases": "qkv"},
    "clipped": {"clip_qkv": 1.5, "biases": "mlp", "heads": 4, "kv_heads": 1},
    "linear": {"rope_theta": 20.0, "rope_scaling": "linear", "rope_factor": 3.0},
    "llama3": {
        "rope_theta": 20.0,
        "rope_scaling": "llama3",
        "rope_factor": 5.0,
        "rope_positions": 16,
        "rope_turns": (0.4, 2.0),
    },
    "yarn": {
        "rope_theta": 20.0,
        "rope_scaling": "yarn",
        "rope_factor": 2.5,
        "rope_positions": 16,
        "rope_turns": (0.4, 2.0),
    },
    "olmo3": {
        "norm": "rmsnorm",
        "norm_place": "post",
        "qk_norm": "whole",
        "window": 4,
        "window_layers": "window, full",
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_positions": 100,
        "rope_magnitude": 1.3,
    },
    "gemma2": {
        "norm": "rmsnorm",
        "norm_place": "both",
        "mlp": "geglu",
        "heads": 4,
        "kv_heads": 2,
        "attention_scale": 0.4,
        "attention_cap": 0.8,
        "window": 3,
        "window_layers": "window, full",
    },
    "gemma3": {
        "norm": "rmsnorm",
        "norm_place": "both",
        "mlp": "geglu_exact",
        "biases": "mlp",
        "qk_norm": "head",
        "window": 2,
        "window_layers": "full, window",
        "window_theta": 30.0,
        "rope_scaling": "linear",
        "rope_factor": 2.0,
    },
    "gpt-neo": {
        "norm": "layernorm",
        "norm_bias": True,
        "position": "learned",
        "biases": "out,mlp",
        "mlp": "gelu",
        "attention_scale": 1.0,
        "window": 3,
        "window_layers": "full, window",
    },
}


def alike(options: dict[str, Any]) -> dict[str, Any]:
    """The same with the window in every layer, so that these can be scanned."""
    if "window" not in options:
        return options
    return {key: value for key, value in options.items() if key != "window_layers" and not key.startswith("rope_")}


def model_config(name: str, **changes: Any) -> ModelConfig:
    options = alike(OPTIONS[name]) if changes.get("scan_layers") else OPTIONS[name]
    return small_config(**{**options, **changes}).model


def body_and_input(cfg: ModelConfig, dtype: Any = np.float32) -> tuple[Any, np.ndarray]:
    """Parameters with random norm scales and biases, so that one left out or used twice shows."""
    rng = np.random.default_rng(0)
    body = nn.unbox(init_body(cfg, jax.random.key(0)))
    noise = {
        "scale": lambda leaf: leaf * rng.uniform(0.5, 2, leaf.shape),
        "bias": lambda leaf: rng.normal(0, 0.3, leaf.shape),
    }
    noisy = lambda path, leaf: noise.get(path[-1].key, lambda leaf: leaf)(leaf)
    body = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), jax.tree_util.tree_map_with_path(noisy, body))
    return body, rng.standard_normal((2, cfg.seq_len, cfg.d_model)).astype(dtype)


def recompute(
    cfg: ModelConfig, body: Any, x: np.ndarray, left_out: Container[tuple[int, str]] = ()
) -> list[np.ndarray]:
    """Every state of the residual stream, then the normed last one: NumPy, one head and one position at a time.

    `left_out` names parts that add nothing: the layer's number, from 0, and `attention` or `mlp`.
    """
    p = jax.tree.map(np.asarray, body)["params"]

    def norm(x: np.ndarray, kind: str, scale: dict[str, Any] | None) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True) if "layernorm" in kind else x
        scale = scale or {"scale": 1.0}
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale["scale"] + scale.get("bias", 0.0)

    def linear(x: np.ndarray, p: dict[str, Any], name: str) -> np.ndarray:
        bias = p[f"{name}_bias"]["bias"] if f"{name}_bias" in p else 0.0
        return np.asarray(x @ p[name]["kernel"] + bias)

    def frequency(i: int, K: int, windowed: bool) -> float:  # of the pair i of K / 2
        if windowed:
            return float((cfg.window_theta or cfg.rope_theta) ** (-2 * i / K))
        usual = cfg.rope_theta ** (-2 * i / K)
        slow = usual / (cfg.rope_factor or 1)
        if (
            cfg.rope_scaling == "yarn"
        ):  # arXiv 2309.00071, equations 17 to 23, its ends rounded as its authors' code does
            few, many = cfg.rope_turns or (1, 32)
            pair = lambda turns: K * np.log(cfg.rope_positions / (turns * 2 * np.pi)) / (2 * np.log(cfg.rope_theta))
            first, last = max(np.floor(pair(many)), 0), min(np.ceil(pair(few)), K - 1)
            share = min(max((i - first) / (last - first), 0), 1)
            return float(slow * share + usual * (1 - share))
        if cfg.rope_scaling == "llama3":
            few, many = cfg.rope_turns or (1, 4)
            turns = cfg.rope_positions * usual / (2 * np.pi)
            if turns < few:
                return float(slow)
            return float(usual if turns > many else slow + (usual - slow) * (turns - few) / (many - few))
        return float(slow)

    def rotated(x: np.ndarray, windowed: bool) -> np.ndarray:  # [T, K] as complex numbers, one frequency for each pair
        if cfg.position != "rope":
            return x
        T, K = len(x), int(cfg.rotary_fraction * cfg.key_width)
        x, as_they_are = x[:, :K], x[:, K:]
        frequencies = np.array([frequency(i, K, windowed) for i in range(K // 2)])
        z = (x[:, : K // 2] + 1j * x[:, K // 2 :]) * np.exp(1j * np.arange(T)[:, None] * frequencies)
        if cfg.rope_scaling == "yarn" and not windowed:
            z *= cfg.rope_magnitude or 0.1 * np.log(cfg.rope_factor) + 1
        return np.concatenate([z.real, z.imag, as_they_are], axis=1)

    def attention(x: np.ndarray, p: dict[str, Any], i: int) -> np.ndarray:  # [T, D]
        T, K = len(x), cfg.key_width
        kinds = [kind.strip() for kind in cfg.window_layers.split(",")]
        windowed = cfg.window is not None and kinds[i % len(kinds)] == "window"
        mixed = np.zeros((T, cfg.heads * K))
        whole = {name: linear(x, p, name) for name in ("query", "key", "value")}
        if cfg.clip_qkv:
            whole = {name: np.minimum(np.maximum(part, -cfg.clip_qkv), cfg.clip_qkv) for name, part in whole.items()}
        if cfg.qk_norm == "whole":
            whole |= {name: norm(whole[name], "rmsnorm", p[f"{name}_norm"]) for name in ("query", "key")}
        for h in range(cfg.heads):
            g = h // (cfg.heads // cfg.groups)
            q = whole["query"][:, h * K : (h + 1) * K]
            k, v = (whole[name][:, g * K : (g + 1) * K] for name in ("key", "value"))
            if cfg.qk_norm == "head":
                q, k = norm(q, "rmsnorm", p["query_norm"]), norm(k, "rmsnorm", p["key_norm"])
            q, k = rotated(q, windowed), rotated(k, windowed)
            for t in range(T):
                seen = slice(max(0, t + 1 - cfg.window) if windowed else 0, t + 1)
                score = q[t] @ k[seen].T * (cfg.attention_scale or 1 / np.sqrt(K))
                w = np.exp(cfg.attention_cap * np.tanh(score / cfg.attention_cap) if cfg.attention_cap else score)
                mixed[t, h * K : (h + 1) * K] = w / w.sum() @ v[seen]
        return linear(mixed, p, "out")

    def mlp(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
        forms = {
            "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
            "gelu_exact": lambda x: x * scipy.stats.norm.cdf(x),
            "swiglu": lambda x: x / (1 + np.exp(-x)),
        }
        up, form = linear(x, p, "up"), forms[cfg.mlp.replace("geglu", "gelu")]
        return linear(up * form(linear(x, p, "gate")) if "gate" in p else form(up), p, "down")

    def added(x: np.ndarray, i: int, name: str) -> np.ndarray:
        layer = p[f"layer_{i}"]

        def part(x: np.ndarray) -> np.ndarray:
            return mlp(x, layer["mlp"]) if name == "mlp" else np.stack([attention(a, layer["attention"], i) for a in x])

        normed = lambda x, place: norm(x, cfg.norm, layer.get(f"{name}_{place}"))
        if cfg.norm_place == "both":
            return normed(part(normed(x, "norm")), "post_norm")
        return normed(part(x), "norm") if cfg.norm_place == "post" else part(normed(x, "norm"))

    if cfg.position == "learned":
        x = x + p["entry"]["positions"][: x.shape[1]]
    states = [x]
    for i in range(cfg.layers):
        entered = x
        if (i, "attention") not in left_out:
            x = x + added(x, i, "attention")
        if (i, "mlp") not in left_out:
            x = x + added(entered if cfg.parallel else x, i, "mlp")
        states.append(x)
    return [*states, norm(x, cfg.norm, p.get("final_norm"))]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_hidden_state_agrees_with_numpy(name: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the form that a GPU is given, which computes gate and up in one product."""
    monkeypatch.setattr(Layout, "platform", platform)
    cfg = model_config(name)
    body, x_BTD = body_and_input(cfg, np.float64)
    h_BTD, states_LBTD = Transformer(cfg).apply(body, x_BTD, hidden_states=True)
    for got, expected in zip([*states_LBTD, h_BTD], recompute(cfg, body, x_BTD), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


PIECES = {"one by one": [1] * 8, "uneven": [3, 1, 4], "at once": [8], "some": [5]}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "scan", "pieces"),
    slow_but(
        itertools.product(OPTIONS, [False, True], PIECES),
        *((name, False, "uneven") for name in OPTIONS),
        *(("llama", True, pieces) for pieces in PIECES),
    ),
)
def test_a_cache_continues_as_if_all_were_read_at_once(name: str, scan: bool, pieces: str) -> None:
    """Whatever the pieces, one with room to spare; every hidden state again against NumPy."""
    cfg = model_config(name, layers=3, scan_layers=scan)
    unrolled, x_BTD = body_and_input(dataclasses.replace(cfg, scan_layers=False), np.float64)
    body = stack_layers(unrolled) if scan else unrolled
    whole_LBTD = np.stack(recompute(cfg, unrolled, x_BTD))
    cache, start = empty_cache(cfg, len(x_BTD), cfg.seq_len), 0
    for T in PIECES[pieces]:
        piece_BTD = x_BTD[:, start : start + T]
        (h_BTD, states_LBTD), changed = Transformer(cfg).apply(
            {**body, CACHE: cache}, piece_BTD, hidden_states=True, mutable=CACHE
        )
        assert jax.tree.map(jnp.shape, changed[CACHE]) == jax.tree.map(jnp.shape, cache)
        cache, expected_LBTD = changed[CACHE], whole_LBTD[:, :, start : start + T]
        np.testing.assert_allclose(states_LBTD, expected_LBTD[:-1], rtol=0, atol=1e-10)
        np.testing.assert_allclose(h_BTD, expected_LBTD[-1], rtol=0, atol=1e-10)
        start += T


@pytest.mark.usefixtures("float64")
def test_a_gpu_is_given_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = model_config("olmo")
    assert cfg.mlp == "swiglu"
    body, x_BTD = body_and_input(cfg, np.float64)
    total = lambda body, x: jnp.sum(jnp.sin(Transformer(cfg).apply(body, x)))
    expected = jax.grad(total, argnums=(0, 1))(body, x_BTD)
    monkeypatch.setattr(Layout, "platform", "gpu")
    program = str(jax.make_jaxpr(jax.grad(total))(body, x_BTD))
    assert "swiglu" in program
    for got, wanted in zip(
        *map(jax.tree.leaves, (jax.grad(total, argnums=(0, 1))(body, x_BTD), expected)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_in_float32_are_the_same_gradients(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "platform", platform)
    cfg = model_config("olmo")
    body, x_BTD = body_and_input(cfg, np.float64)

    def gradients(cfg: ModelConfig) -> Any:
        return jax.grad(lambda body, x: jnp.sum(jnp.sin(Transformer(cfg).apply(body, x))), argnums=(0, 1))(body, x_BTD)

    wide = gradients(dataclasses.replace(cfg, body_gradient="float32"))
    for got, wanted in zip(*map(jax.tree.leaves, (wide, gradients(cfg))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


def test_a_matrix_gets_a_float32_gradient_from_bfloat16_operands() -> None:
    """Exact products of 8 bits each, added in float32: autodiff would round the sum to 8 bits."""
    rng = np.random.default_rng(0)
    x_ND = jnp.asarray(rng.standard_normal((300, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    y, pull = jax.vjp(lambda x, k: wide_gradient_product(x, k, "nd,df->nf"), x_ND, kernel)
    dy = jnp.asarray(rng.standard_normal(y.shape), jnp.bfloat16)
    dx_ND, dkernel = pull(dy)
    exact = np.tensordot(np.asarray(x_ND, np.float64), np.asarray(dy, np.float64), axes=(0, 0))
    assert (dkernel.dtype, dx_ND.dtype, y.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(dkernel, exact, rtol=1e-5, atol=1e-4)
    rounded = np.asarray(dkernel.astype(jnp.bfloat16), np.float64)
    assert np.abs(rounded - exact).max() > 100 * np.abs(dkernel - exact).max()


@pytest.mark.parametrize("name", OPTIONS)
def test_no_position_sees_a_later_one(name: str) -> None:
    """The gradient of the state at position t with respect to inputs after t is exactly 0, and at t it is not."""
    cfg = model_config(name)
    body, x_BTD = body_and_input(cfg)
    t = 3
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(Transformer(cfg).apply(body, x)[:, t])))(x_BTD)
    assert not np.any(gradient[:, t + 1 :])
    assert np.all(np.linalg.norm(gradient[:, : t + 1], axis=-1) > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "remat", "scan"),
    slow_but(
        itertools.product(OPTIONS, ["full", "dots", "attention"], [False, True]),
        *((name, "full", True) for name in OPTIONS),
        *(("llama", remat, False) for remat in ("full", "dots", "attention")),
    ),
)
def test_scan_and_remat_change_nothing(name: str, remat: str, scan: bool) -> None:
    changed = model_config(name, layers=3, remat=remat, scan_layers=scan)
    plain = dataclasses.replace(changed, scan_layers=False, remat="none")
    start, other = (nn.unbox(init_body(cfg, jax.random.key(0))) for cfg in (plain, changed))
    x_BTD = body_and_input(plain, np.float64)[1]
    stacked = lambda tree: stack_layers(tree) if changed.scan_layers else tree
    jax.tree.map(np.testing.assert_array_equal, stacked(start), other)

    def value_and_gradient(cfg: ModelConfig, body: Any) -> Any:
        f = lambda body, x: jnp.sum(jnp.sin(Transformer(cfg).apply(body, x)))
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(body, x_BTD)

    value, (d_body, d_x) = value_and_gradient(plain, start)
    other_value, (d_other, d_other_x) = value_and_gradient(changed, other)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))
    close(value, other_value)
    close(d_x, d_other_x)
    jax.tree.map(close, stacked(d_body), d_other)


def stack_layers(body: Any) -> Any:
    params = dict(body["params"])
    layers = [params.pop(name) for name in sorted(n for n in params if n.startswith("layer_"))]
    return {"params": {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


def test_grouped_queries_equal_repeated_keys() -> None:
    grouped = model_config("llama")
    full = dataclasses.replace(grouped, kv_heads=4)
    body, x_BTD = body_and_input(grouped)
    K = grouped.key_width

    def repeat(path: Any, leaf: jax.Array) -> jax.Array:
        if {"key", "value"} & {entry.key for entry in path}:
            heads = leaf.reshape(leaf.shape[0], 2, 1, K)
            return jnp.broadcast_to(heads, (leaf.shape[0], 2, 2, K)).reshape(leaf.shape[0], 4 * K)
        return leaf

    wide = jax.tree_util.tree_map_with_path(repeat, body)
    np.testing.assert_allclose(
        Transformer(grouped).apply(body, x_BTD), Transformer(full).apply(wide, x_BTD), rtol=1e-5, atol=1e-5
    )
