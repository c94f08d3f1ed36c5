"""The fused loss against SciPy in float64, in float32 and bfloat16, in chunks, on meshes; and what it compiles to."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from loss_program import MESHES, B, D, T, V, powers
from programs import TESTS, finish, start

from tiedjax import loss
from tiedjax.loss import cross_entropy
from tiedjax.sharding import Layout


def oracle(
    h_BTD: Any,
    U_VD: Any,
    targets_BT: Any,
    weights_BT: Any,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    bias_V: Any = None,
) -> tuple[Any, ...]:
    """(loss, gradient of h, gradient of U and, if there is one, of the bias) by SciPy in float64, by hand."""
    h, U = np.asarray(h_BTD, np.float64), np.asarray(U_VD, np.float64)
    raw = h @ U.T
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    slope = 1.0 if soft_cap is None else 1 - (logits / soft_cap) ** 2
    logits = logits if bias_V is None else logits + np.asarray(bias_V, np.float64)
    log_p, log_sum = scipy.special.log_softmax(logits, -1), scipy.special.logsumexp(logits, -1)
    weights = np.where(targets_BT >= 0, weights_BT, 0)
    picked = np.take_along_axis(log_p, np.maximum(targets_BT, 0)[..., None], -1)[..., 0]
    residual = np.exp(log_p) * (1 + 2 * z_loss * log_sum[..., None]) - np.eye(len(U))[targets_BT]
    residual *= weights[..., None]
    of_bias = [] if bias_V is None else [residual.sum((0, 1))]
    residual *= slope
    loss = np.sum(weights * (z_loss * log_sum**2 - picked))
    return loss, residual @ U, np.einsum("btv,btd->vd", residual, h), *of_bias


def example(B: int = 3, T: int = 5, V: int = 11, D: int = 7) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    targets_BT = rng.integers(0, V, (B, T))
    targets_BT[0, 1] = -1
    return rng.standard_normal((B, T, D)), rng.standard_normal((V, D)), targets_BT, rng.random((B, T))


def fused(*arrays: Any, bias_V: Any = None, **options: Any) -> tuple[jax.Array, ...]:
    """The loss and its gradients, of the bias too if there is one."""
    h_BTD, U_VD, *about = arrays
    total = lambda h, U, bias: cross_entropy(h, U, *about, bias_V=bias, **options)[0]
    inputs = jax.tree.map(jnp.asarray, (h_BTD, U_VD, bias_V))
    loss, grads = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs)
    return loss, *grads[: 2 if bias_V is None else 3]


def relative(found: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize(("z_loss", "soft_cap"), [(0.0, None), (1e-2, None), (0.1, 1.5)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_loss_and_gradients_agree_with_scipy(
    platform: str, z_loss: float, soft_cap: float | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the form that a GPU is given, which finds maximum and sum in one pass."""
    monkeypatch.setattr(Layout, "platform", platform)
    arrays, options = example(), {"z_loss": z_loss, "soft_cap": soft_cap}
    for found, wanted in zip(fused(*arrays, **options, chunk=chunk), oracle(*arrays, **options), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    total, weight = cross_entropy(*arrays, **options, chunk=chunk)  # the path without gradients
    np.testing.assert_allclose(total, oracle(*arrays, **options)[0], rtol=1e-12)
    np.testing.assert_allclose(weight, arrays[3][arrays[2] >= 0].sum(), rtol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("z_loss", "soft_cap"), [(0.0, None), (0.1, 1.5)])
@pytest.mark.parametrize("kernel", [None, powers])
def test_a_bias_is_added_to_the_logits_and_has_its_gradient(
    kernel: Any, z_loss: float, soft_cap: float | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a kernel, which knows of no bias, would compute the loss without one."""
    monkeypatch.setattr(loss, "kernel_for", lambda *_: kernel)
    arrays = example()
    bias_V = np.log(np.random.default_rng(1).dirichlet(np.ones(len(arrays[1]))))
    options = {"z_loss": z_loss, "soft_cap": soft_cap, "bias_V": bias_V}
    wanted = oracle(*arrays, **options)
    for found, expected in zip(fused(*arrays, **options, chunk=chunk), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    total, _ = cross_entropy(*arrays, **options, chunk=chunk)  # the path without gradients
    np.testing.assert_allclose(total, wanted[0], rtol=1e-12)
    tripled = jax.grad(lambda bias: 3 * cross_entropy(*arrays, **{**options, "bias_V": bias})[0])(bias_V)
    np.testing.assert_allclose(tripled, 3 * wanted[3], rtol=1e-12, atol=1e-12)
    assert abs(float(total) - oracle(*arrays, z_loss, soft_cap)[0]) > 0.01


def test_the_gradient_of_the_bias_is_not_rounded_to_the_dtype_of_the_states() -> None:
    h_BTD, U_VD, *about = example(8, 32, 500, 64)
    bias_V = np.random.default_rng(1).standard_normal(len(U_VD)).astype(np.float32)
    U_VD = U_VD.astype(np.float32) / 8
    *_, dU_VD, d_bias_V = fused(h_BTD.astype("bfloat16"), U_VD, *about, bias_V=bias_V)
    *_, wanted_VD, wanted_V = oracle(h_BTD.astype("bfloat16"), U_VD.astype("bfloat16"), *about, bias_V=bias_V)
    assert (dU_VD.dtype, d_bias_V.dtype) == (np.float32, np.float32)
    assert relative(d_bias_V, wanted_V) < 1e-6
    assert relative(dU_VD, wanted_VD) < 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [1.0, 100.0])  # a largest logit far above the target's: the shift must move
@pytest.mark.parametrize("chunk", [None, 4])
def test_powers_in_place_of_logits_give_the_same(
    scale: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "kernel_for", lambda *_: powers)
    h_BTD, *others = example()
    arrays = (scale * h_BTD, *others)
    for found, wanted in zip(fused(*arrays, z_loss=1e-2, chunk=chunk), oracle(*arrays, z_loss=1e-2), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_maximum_and_sum_in_one_pass_are_those_of_two(scale: float) -> None:
    """For logits far apart too, where a sum must be corrected at every larger maximum, up to the last."""
    logit_CV = scale * np.sort(np.random.default_rng(0).standard_normal((5, 1000)).astype(np.float32), axis=1)
    for each in (logit_CV, logit_CV[:, ::-1].copy(), np.zeros_like(logit_CV)):
        most_C, sum_C = loss._in_one_pass(jnp.asarray(each))
        np.testing.assert_array_equal(most_C, each.max(axis=1))
        np.testing.assert_allclose(sum_C, np.exp(np.float64(each) - each.max(axis=1)[:, None]).sum(axis=1), rtol=1e-5)
    assert np.isnan(np.asarray(loss._in_one_pass(jnp.array([[0.0, np.nan]]))).astype(float)).all()


@pytest.mark.parametrize(
    ("platform", "tokens", "table", "itemsize", "chunk", "expected"),
    [
        ("gpu", 32_768, (50_304, 384), 4, None, 8),  # 8 x 4,096 tokens
        ("gpu", 32_768, (50_304, 384), 2, None, 4),  # what the kernel leaves of their logits
        ("tpu", 32_768, (50_304, 384), 4, None, 16),  # 16 x 2,048; the fewest that fit would be 13 x 2,521
        ("cpu", 2_048, (4_096, 128), 4, None, 16),
        ("gpu", 1_001, (50_304, 384), 4, None, 1),
        ("cpu", 2_048, (4_096, 512), 4, None, 4),  # at least the width: each chunk costs a pass over the gradient
        ("tpu", 4_096, (256_000, 8_192), 4, None, 8),  # but never more than 0.8 GiB of logits
        ("tpu", 8_192, (50_304, 4_096), 4, None, 2),
        ("gpu", 4_096, (256_000, 8_192), 2, None, 2),
        ("cpu", 4, (2**29, 8), 4, None, 4),  # nor less than a token
        ("tpu", 7 * 1_009, (50_304, 384), 4, None, 3),  # nothing divides it
        ("gpu", 32_768, (50_304, 384), 4, 2_521, 13),  # as asked
    ],
)
def test_chunks_fill_the_tiles_of_matrix_units(
    platform: str,
    tokens: int,
    table: tuple[int, int],
    itemsize: int,
    chunk: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Layout, "platform", platform)
    spec = loss._Spec(0.0, None, chunk, Layout(), loss.row_sums("scatter", platform))
    assert spec.chunks(tokens, table, itemsize) == expected


@pytest.mark.usefixtures("float64")
def test_the_gradient_scales_with_what_follows() -> None:
    h_BTD, U_VD, *about = example()
    tripled = jax.grad(lambda h, U: 3 * cross_entropy(h, U, *about)[0], argnums=(0, 1))(h_BTD, U_VD)
    for found, wanted in zip(tripled, oracle(h_BTD, U_VD, *about)[1:], strict=True):
        np.testing.assert_allclose(found, 3 * wanted, rtol=1e-12, atol=1e-12)


def test_float32_and_chunk_sizes() -> None:
    arrays = [x.astype(np.float32) if x.dtype == np.float64 else x for x in example(8, 32, 500, 48)]
    wanted = oracle(*arrays)
    whole = fused(*arrays, chunk=256)
    assert max(map(relative, whole, wanted)) < 1e-5
    for chunk in (7, 64):
        assert max(map(relative, fused(*arrays, chunk=chunk), map(np.asarray, whole))) < 1e-6


@pytest.mark.parametrize("by", ["logits", "powers"])
@pytest.mark.parametrize("chunk", [16, 256])
def test_bfloat16_operands_give_a_float32_table_gradient(chunk: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "kernel_for", lambda *_: powers if by == "powers" else None)
    h_BTD, U_VD, *about = example(8, 32, 500, 64)
    U_VD = U_VD.astype(np.float32) / 8
    total, dh_BTD, dU_VD = fused(h_BTD.astype("bfloat16"), U_VD, *about, chunk=chunk)
    assert (total.dtype, dh_BTD.dtype, dU_VD.dtype) == (np.float32, jnp.bfloat16, np.float32)
    wanted = oracle(h_BTD.astype("bfloat16"), U_VD.astype("bfloat16"), *about)
    assert relative(total, wanted[0]) < 1e-6
    assert relative(dU_VD, wanted[2]) < 1e-3
    assert np.linalg.norm(dU_VD - wanted[2]) < 2e-3 * np.linalg.norm(wanted[2])


def test_a_target_outside_the_table_cannot_pass_unseen() -> None:
    h_BTD, U_VD, targets_BT, weights_BT = (x.astype(np.float32) if x.dtype == float else x for x in example())
    assert np.isfinite(cross_entropy(h_BTD, U_VD, targets_BT, weights_BT)[0])
    targets_BT[2, 2] = len(U_VD)
    assert np.isnan(cross_entropy(h_BTD, U_VD, targets_BT, weights_BT)[0])


def dots(compiled: Any) -> int:
    return sum(" dot(" in line or "__onednn$matmul" in line for line in compiled.as_text().splitlines())


def test_logits_exist_for_a_chunk_at_a_time_and_three_products_are_all() -> None:
    tokens, rows, width, chunk = 2048, 4096, 32, 64
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in [(4, tokens // 4, width), (rows, width)]]
    about = (jnp.zeros((4, tokens // 4), jnp.int32), jnp.ones((4, tokens // 4)))
    total = lambda h, U: cross_entropy(h, U, *about, chunk=chunk)[0]
    evaluated, differentiated = (
        jax.jit(f).lower(*shapes).compile() for f in (total, jax.value_and_grad(total, argnums=(0, 1)))
    )
    assert dots(evaluated) == 1
    assert dots(differentiated) == 3
    whole = 4 * tokens * rows
    assert differentiated.memory_analysis().temp_size_in_bytes < whole / 10


@pytest.fixture(scope="module")
def on_meshes() -> dict[str, Any]:
    out, _ = finish(start([TESTS / "loss_program.py"], devices=8), seconds=280)
    return json.loads(out)


def test_on_every_mesh_it_is_the_definition(on_meshes: dict[str, Any]) -> None:
    assert len(on_meshes["float64"]) == 2 * 2 * len(MESHES)
    assert max(on_meshes["float64"].values()) < 1e-12
    assert max(on_meshes["float32"].values()) < 1e-5
    assert set(on_meshes["powers"]) == {str(shape) for shape in MESHES}
    assert max(on_meshes["powers"].values()) < 1e-12
    assert len(on_meshes["bias"]) == 2 * len(MESHES)
    assert max(on_meshes["bias"].values()) < 1e-12


@pytest.mark.parametrize("shape", MESHES)
def test_the_table_gradient_is_reduced_once_and_never_in_the_loop(on_meshes: dict[str, Any], shape: Any) -> None:
    program = on_meshes["collectives"][str(shape)]
    data, fsdp, tensor = shape
    batch, table = data * fsdp, V * D // tensor
    assert program["loops"]
    inside = [each for name in program["loops"] for each in program["found"].get(name, [])]
    chunk = -(-B * T // batch // -(-(B * T // batch) // 5))
    assert {size for _, size in inside} <= {chunk}
    outside = [
        tuple(each) for name, found in program["found"].items() if name not in program["loops"] for each in found
    ]
    of_the_table = sorted(each for each in outside if each[1] >= table // fsdp and each[1] != B * T * D // batch)
    wanted = [("all-gather", table), ("reduce-scatter", table // fsdp)] if fsdp > 1 else []
    wanted += [("all-reduce", table // fsdp)] if data > 1 else []
    assert of_the_table == sorted(wanted)
