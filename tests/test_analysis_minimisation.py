"""The minimiser of analysis: known minima, and what a preconditioner saves."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from tiedjax.analysis.basis.minimisation import minimise


def test_the_minimiser_finds_known_minima():
    rosen = lambda x: (scipy.optimize.rosen(x) + 1, scipy.optimize.rosen_der(x))
    found = minimise(rosen, np.zeros(6), lambda slope: 0.01 * slope, tolerance=1e-12)
    assert found.converged
    np.testing.assert_allclose(found.point, 1, atol=1e-4)
    at_rest = minimise(rosen, np.ones(6), lambda slope: slope)
    assert (at_rest.converged, at_rest.value) == (True, 1.0)


def test_a_good_preconditioner_saves_steps():
    scale = np.logspace(0, 5, 40)
    bowl = lambda x: (0.5 * np.sum(scale * (x - 1) ** 2) + 1, scale * (x - 1))
    plain = minimise(bowl, np.zeros(40), lambda slope: slope / scale.max(), tolerance=1e-6)
    exact = minimise(bowl, np.zeros(40), lambda slope: slope / scale, tolerance=1e-6)
    assert exact.value == pytest.approx(1)
    assert exact.evaluations < plain.evaluations / 3
