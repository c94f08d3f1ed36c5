"""The loss against SciPy in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.special

from tiedjax.loss import cross_entropy


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_agree_with_scipy(z_loss: float) -> None:
    rng = np.random.default_rng(0)
    h_BTD, U_VD = rng.standard_normal((3, 5, 7)), rng.standard_normal((11, 7))
    targets_BT, weights_BT = rng.integers(0, 11, (3, 5)), rng.random((3, 5))
    total, weight = cross_entropy(h_BTD, U_VD, targets_BT, weights_BT, z_loss=z_loss)
    logits = h_BTD @ U_VD.T
    log_p, log_sum = scipy.special.log_softmax(logits, -1), scipy.special.logsumexp(logits, -1)
    picked = np.take_along_axis(log_p, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, np.sum(weights_BT * (z_loss * log_sum**2 - picked)), rtol=1e-12)
    np.testing.assert_allclose(weight, weights_BT.sum(), rtol=1e-14)

    got = jax.grad(lambda h, U: cross_entropy(h, U, targets_BT, weights_BT, z_loss=z_loss)[0], argnums=(0, 1))(
        h_BTD, U_VD
    )
    residual = np.exp(log_p) * (1 + 2 * z_loss * log_sum[..., None]) - np.eye(11)[targets_BT]
    residual *= weights_BT[..., None]
    np.testing.assert_allclose(got[0], residual @ U_VD, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[1], np.einsum("btv,btd->vd", residual, h_BTD), rtol=1e-10, atol=1e-12)


def test_bfloat16_operands_give_float32_sums() -> None:
    rng = np.random.default_rng(0)
    h_BTD, U_VD = rng.standard_normal((2, 4, 64)).astype("bfloat16"), rng.standard_normal((99, 64)).astype(np.float32)
    targets_BT = rng.integers(0, 99, (2, 4))
    total, _ = cross_entropy(h_BTD, U_VD, targets_BT, np.ones((2, 4)))
    assert total.dtype == np.float32
    logits = np.asarray(h_BTD, np.float64) @ np.asarray(U_VD.astype("bfloat16"), np.float64).T
    expected = -np.take_along_axis(scipy.special.log_softmax(logits, -1), targets_BT[..., None], -1).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
