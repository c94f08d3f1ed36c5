"""The exact split of the tables' gradient by role, and what scales it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.config import TyingConfig
from tiedjax.tying.tables import Tables


def role_scale(cfg: TyingConfig, update: int = 1, steps: int = 1, decile_V: np.ndarray | None = None) -> Tables:
    """The factors on the two role gradients in an update (the first is 1) of a run of so many, as float32 scalars.

    Where a role has factors by frequency they are [V, 1], by `decile_V`: 0 (rarest) to 9, -1 for a factor of 1.
    """
    last = cfg.grad_scale_until or steps
    done = min(max((update - cfg.grad_scale_from) / max(last - cfg.grad_scale_from, 1), 0.0), 1.0)
    weight = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "window": float(cfg.grad_scale_from <= update <= last),
    }[cfg.grad_scale_schedule]

    def of(factor: float, by_decile: tuple[float, ...] | None) -> np.ndarray:
        full: Any = factor
        if by_decile is not None:
            assert decile_V is not None
            full = factor * np.where(decile_V < 0, 1.0, np.array(by_decile)[decile_V])[:, None]
        return np.asarray(1 + (full - 1) * weight if weight < 1 else full, np.float32)

    return Tables(
        of(cfg.input_grad_scale, cfg.input_grad_scale_deciles),
        of(cfg.output_grad_scale, cfg.output_grad_scale_deciles),
    )


def zero_taps(tables: Tables) -> Tables:
    """Taps for `split_gradient`: zeros like the tables, which no forward pass reads."""
    return Tables(*map(jnp.zeros_like, tables))


@jax.custom_vjp
def split_gradient(tables: Tables, taps: Tables | None, scale: Tables | None) -> Tables:
    """The identity on `tables`, whose backward pass reads and scales the gradient of each role.

    Args:
      tables: `Tables` of [V, D].
      taps: `Tables` of zeros [V, D]; the gradient with respect to them is the raw role gradient, before any scale. None
        observes nothing.
      scale: `Tables` of scalars that multiply what goes on to the parameters. None multiplies nothing.

    Observing and scaling are independent: either may be None.
    """
    return tables


def _split_forward(tables: Tables, taps: Tables | None, scale: Tables | None) -> tuple[Tables, Any]:
    observed = None if taps is None else ()
    return tables, (scale, observed)


def _split_backward(residuals: Any, raw: Tables) -> tuple[Tables, Tables | None, None]:
    scale, observed = residuals
    passed = raw if scale is None else jax.tree.map(lambda s, g: jnp.asarray(s, g.dtype) * g, scale, raw)
    return passed, None if observed is None else raw, None


split_gradient.defvjp(_split_forward, _split_backward)


@jax.custom_vjp
def tap_squares(tables: Tables, taps: Tables) -> Tables:
    """The identity on `tables`. The gradient with respect to `taps`, `Tables` of float32 zeros that no forward pass
    reads, is the sum of squares of each role's gradient."""
    return tables


def _squares_forward(tables: Tables, taps: Tables) -> tuple[Tables, Tables]:
    return tables, taps


def _squares_backward(taps: Tables, raw: Tables) -> tuple[Tables, Tables]:
    return raw, jax.tree.map(lambda tap, g_VD: jnp.sum(jnp.square(g_VD), dtype=tap.dtype), taps, raw)


tap_squares.defvjp(_squares_forward, _squares_backward)
