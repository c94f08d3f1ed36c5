"""The kernel for Hopper GPUs: where it is used, and what it computes, by Pallas's interpreter, against NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiedjax import exp_product
from tiedjax.exp_product import kernel_for


@pytest.mark.parametrize(
    ("version", "cuda", "dtype", "tokens", "table", "there"),
    [
        ((0, 11, 2), 9.0, "bfloat16", 4096, (50_304, 384), True),
        ((0, 10, 2), 9.0, "bfloat16", 4096, (50_304, 384), False),  # another interface
        ((0, 11, 2), 8.0, "bfloat16", 4096, (50_304, 384), False),  # an A100
        ((0, 11, 2), 10.0, "bfloat16", 4096, (50_304, 384), False),  # Blackwell has other instructions
        ((0, 11, 2), None, "bfloat16", 4096, (50_304, 384), False),  # no GPU
        ((0, 11, 2), 9.0, "float32", 4096, (50_304, 384), False),
        ((0, 11, 2), 9.0, "bfloat16", 4000, (50_304, 384), False),
        ((0, 11, 2), 9.0, "bfloat16", 4096, (50_280, 384), False),
        ((0, 11, 2), 9.0, "bfloat16", 4096, (50_304, 352), False),
    ],
)
def test_it_is_used_where_it_runs(
    version: Any, cuda: Any, dtype: str, tokens: int, table: Any, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "__version_info__", version)
    layout: Any = SimpleNamespace(cuda=cuda, device=SimpleNamespace(core_count=132))
    assert (kernel_for(layout, jnp.dtype(dtype), tokens, table) is not None) == there


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas interprets kernels for GPUs from jax 0.11 on")
@pytest.mark.parametrize("below", [0.0, 100.0])  # of one token's shift: beyond 75 the kernel runs once more
def test_it_is_the_definition(below: float) -> None:
    from jax.experimental.pallas import mosaic_gpu as gpu

    rng = np.random.default_rng(0)
    h_CD, U_VD = (jnp.asarray(rng.standard_normal(shape) / 2, jnp.bfloat16) for shape in ((256, 128), (384, 128)))
    given_C = rng.standard_normal(256).astype(np.float32) + 3
    given_C[7] -= below
    ids_C = rng.integers(0, 400, 256).astype(np.int32)  # some lie outside the table
    power_CV, sum_C, shift_C = exp_product.exp_product(
        h_CD, U_VD, jnp.asarray(given_C), jnp.asarray(ids_C), cores=3, interpret=gpu.InterpretGPUParams()
    )
    logit_CV = np.asarray(h_CD, np.float64) @ np.asarray(U_VD, np.float64).T
    expected_C = given_C.astype(np.float64)
    if below:
        expected_C[7] = logit_CV[7].max()
    np.testing.assert_allclose(shift_C, expected_C, rtol=1e-6)
    expected_CV = np.exp(logit_CV - expected_C[:, None]) * (ids_C[:, None] != np.arange(384))
    np.testing.assert_allclose(np.asarray(power_CV, np.float64), expected_CV, rtol=2**-8)
    np.testing.assert_allclose(sum_C, expected_CV.sum(axis=1), rtol=2e-5)
