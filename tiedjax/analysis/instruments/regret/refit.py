"""Re-fitting the tables of a model whose body does not move: full batches, no decay, L-BFGS.

With L(E, U) the mean cross-entropy of N fitting tokens in nats, a re-fit minimises

    J(E, U) = L(E, U) + k / (2 N) sum_v [ (E - E_0)_v C_in (E - E_0)_v' + (U - U_0)_v C_out (U - U_0)_v' ]

over one table, over both, or over one array that is both. E_0, U_0 are the tables as they were trained, C_out the
second moments of the normed last states and C_in those of the loss's gradient with respect to a looked-up row, both
over the first batch. Row v's curvature of L is about count_v / N times these (an empirical Fisher information; Martens
and Grosse 2015), so that every row is held where training left it with the weight of k occurrences: a table has more
numbers than a short text can decide.

L-BFGS's initial inverse Hessian is that of (count_v + k) / N C, row by row.

Axes: W windows, S = T + 1 tokens, M batches of B windows, V rows of a table, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, batches
from tiedjax.analysis.basis.minimisation import damped_inverse, minimise
from tiedjax.analysis.basis.tables import ROLES
from tiedjax.config import ModelConfig
from tiedjax.lookup import lookup
from tiedjax.loss import cross_entropy
from tiedjax.model import Transformer
from tiedjax.tying import Tables

TOLERANCE = 1e-4
MOST_ITERATIONS = 200
BALANCED = -0.9

Arrays = tuple[tuple[str, ...], ...]  # of each array that is free, its roles
ONE_ARRAY: Arrays = (ROLES,)
TWO_ARRAYS: Arrays = tuple((role,) for role in ROLES)


@dataclass(frozen=True)
class Fit:
    """Where a re-fit ended: its tables, [V, D], and their loss on the fitting text in nats a token.

    `balance` is the cosine of the two role gradients of J there, of a re-fit of one array for both roles: -1 at the
    minimum, where each step that one role gains by costs the other as much. None of other re-fits.
    """

    tables: Tables
    loss: float
    balance: float | None
    iterations: int
    converged: bool


class Slopes(NamedTuple):
    """L and J in nats a token, and the gradient of J by role, float64 [V, D]."""

    loss: float
    held_loss: float
    by_role: dict[str, np.ndarray]

    @property
    def balance(self) -> float:
        """The cosine of the gradients of the two roles."""
        G_in_VD, G_out_VD = (self.by_role[role] for role in ROLES)
        return float(np.vdot(G_in_VD, G_out_VD) / (np.linalg.norm(G_in_VD) * np.linalg.norm(G_out_VD)))


class HeldLoss:
    """J of a model, on windows int [W, T + 1], its rows held with the weight of `hold` occurrences."""

    def __init__(self, model: FrozenModel, tokens_WS: np.ndarray, hold: float) -> None:
        parts, sizes = zip(*batches(tokens_WS), strict=True)
        self._config, self._body, self._tokens_MBS = model.config, model.body, jnp.asarray(np.stack(parts))
        self._weight_MB = jnp.asarray(np.arange(len(parts[0])) < np.array(sizes)[:, None], jnp.float32)
        self.trained = Tables(model.tables.input, model.tables.output)
        of_device, self._bias_V = Tables(model.E_VD, model.U_VD), model.bias_V
        some_BS = self._tokens_MBS[0, : sizes[0]]
        moments = _second_moments(self._config, self._body, of_device, self._bias_V, some_BS)
        self._curvature_DD = {role: np.asarray(C_DD, np.float64) for role, C_DD in zip(ROLES, moments, strict=True)}
        V, N = len(model.U_VD), tokens_WS[:, 1:].size
        counts = (np.bincount(side_WT.ravel(), minlength=V) for side_WT in (tokens_WS[:, :-1], tokens_WS[:, 1:]))
        self._count_V, self._hold, self._tokens = dict(zip(ROLES, counts, strict=True)), hold, N

    def slopes(self, tables: Tables, roles: Sequence[str] = ROLES) -> Slopes:
        """At these tables, with respect to those of these roles."""
        of_device = Tables(*(jnp.asarray(table_VD, jnp.float32) for table_VD in tables))
        loss, gradients = _loss_and_gradients(
            self._config, tuple(roles), self._body, of_device, self._bias_V, self._tokens_MBS, self._weight_MB
        )
        held_loss, by_role = float(loss), {}
        for role in ROLES:
            moved_VD = np.asarray(getattr(tables, role), np.float64) - getattr(self.trained, role)
            pull_VD = self._hold / self._tokens * moved_VD @ self._curvature_DD[role]
            held_loss += float(np.vdot(moved_VD, pull_VD)) / 2
            if role in roles:
                by_role[role] = np.asarray(gradients[role], np.float64) + pull_VD
        return Slopes(float(loss), held_loss, by_role)

    def metric(self, roles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """J's curvature in an array with these roles, about: a factor for each row [V, 1], and C's inverse [D, D]."""
        # One more, or a row that neither occurs nor is held would have none.
        weight_V = np.mean([self._count_V[role] for role in roles], axis=0) + self._hold + 1
        C_DD = np.sum([self._curvature_DD[role] for role in roles], axis=0)
        return weight_V[:, None] / self._tokens, damped_inverse(C_DD)


def refit(held_loss: HeldLoss, start: Tables, arrays: Arrays, *, most: int = MOST_ITERATIONS) -> Fit:
    """Minimises J from the tables `start` on, where those of the roles in `arrays` are free and all others stay.

    Converged when J fell by less than TOLERANCE of itself over five iterations and, of one array for both roles, their
    gradients have cancelled to a balance of at most BALANCED.
    """
    V, D = start.output.shape
    roles = tuple(role for of_array in arrays for role in of_array)
    balance: float | None = None

    def tables(point: np.ndarray) -> Tables:
        free = zip(arrays, point.reshape(-1, V, D), strict=True)
        return start._replace(**{role: array_VD for of_array, array_VD in free for role in of_array})

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal balance
        slopes = held_loss.slopes(tables(point), roles)
        balance = slopes.balance if arrays == ONE_ARRAY else None
        merged = [sum(slopes.by_role[role] for role in of_array) for of_array in arrays]
        return slopes.held_loss, np.concatenate(merged).ravel()

    metrics = [held_loss.metric(of_array) for of_array in arrays]

    def precondition(slope: np.ndarray) -> np.ndarray:
        parts = zip(slope.reshape(-1, V, D), metrics, strict=True)
        return np.concatenate([part_VD @ inverse_DD / weight_V1 for part_VD, (weight_V1, inverse_DD) in parts]).ravel()

    first = np.concatenate([np.asarray(getattr(start, of_array[0]), np.float64) for of_array in arrays]).ravel()
    settled = lambda: balance is None or balance <= BALANCED
    minimum = minimise(objective, first, precondition, tolerance=TOLERANCE, most=most, settled=settled)
    end = tables(minimum.point)
    slopes = held_loss.slopes(end)
    of_one = slopes.balance if arrays == ONE_ARRAY else None
    return Fit(end, slopes.loss, of_one, minimum.iterations, minimum.converged)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss_and_gradients(
    cfg: ModelConfig,
    roles: tuple[str, ...],
    body: Any,
    tables: Tables,
    bias_V: jax.Array,
    tokens_MBS: jax.Array,
    weight_MB: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L, and its gradient with respect to the tables of these roles; a window of weight 0 does not count."""

    def summed(free: dict[str, jax.Array], tokens_BS: jax.Array, weight_B: jax.Array) -> jax.Array:
        E_VD, U_VD = tables._replace(**free)
        h_BTD: Any = Transformer(cfg).apply(body, lookup(E_VD, tokens_BS[:, :-1], E_VD.dtype))
        targets_BT = tokens_BS[:, 1:]
        weights_BT = jnp.broadcast_to(weight_B[:, None], targets_BT.shape)
        return cross_entropy(h_BTD, U_VD, targets_BT, weights_BT, bias_V=bias_V, soft_cap=cfg.logit_cap)[0]

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(summed)(free, *batch)), None

    free = {role: getattr(tables, role) for role in roles}
    with jax.default_matmul_precision("highest"):
        total, _ = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, free)), (tokens_MBS, weight_MB))
    N = weight_MB.sum() * (tokens_MBS.shape[-1] - 1)
    mean: tuple[jax.Array, dict[str, jax.Array]] = jax.tree.map(lambda sum_: sum_ / N, total)
    return mean


@functools.partial(jax.jit, static_argnums=0)
def _second_moments(
    cfg: ModelConfig, body: Any, tables: Tables, bias_V: jax.Array, tokens_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """C_in and C_out, [D, D]."""

    def loss(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        h_BTD: Any = Transformer(cfg).apply(body, x_BTD)
        targets_BT = tokens_BS[:, 1:]
        weights_BT = jnp.ones(targets_BT.shape)
        about: dict[str, Any] = {"bias_V": bias_V, "soft_cap": cfg.logit_cap}
        return cross_entropy(h_BTD, tables.output, targets_BT, weights_BT, **about)[0], h_BTD

    with jax.default_matmul_precision("highest"):
        x_BTD = lookup(tables.input, tokens_BS[:, :-1], tables.input.dtype)
        both = jax.grad(loss, has_aux=True)(x_BTD)
        at_ND = (y_BTD.reshape(-1, y_BTD.shape[-1]) for y_BTD in both)
        of_input_DD, of_output_DD = (y_ND.T @ y_ND / len(y_ND) for y_ND in at_ND)
    return of_input_DD, of_output_DD
