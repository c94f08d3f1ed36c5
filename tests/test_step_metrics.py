"""A step's metrics as one array: what goes in comes out, on the devices and on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiedjax.step_metrics import StepMetrics

ARRAYS = {"loss": jnp.float32(2.5), "deciles": jnp.arange(10.0), "matrix": jnp.arange(6.0).reshape(2, 3)}


def test_what_goes_in_comes_out_by_name() -> None:
    metrics = jax.jit(StepMetrics.of)(ARRAYS)
    assert list(metrics) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(metrics[name], array)
        assert metrics[name].shape == array.shape
    assert metrics.fetched() == {name: array.tolist() for name, array in ARRAYS.items()}
    with pytest.raises(KeyError):
        metrics["none"]
    shapes = jax.eval_shape(StepMetrics.of, ARRAYS)
    assert "loss" in shapes
    assert "none" not in shapes


def test_a_program_returns_one_array() -> None:
    assert [leaf.shape for leaf in jax.tree.leaves(jax.jit(StepMetrics.of)(ARRAYS))] == [(17,)]
