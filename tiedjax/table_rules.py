"""What updates a table, and which part of each update each role wrote.

Where both roles write one table, a rule with one second moment for both is linear in the role gradients given that
moment, so that its update is the sum of a part of each role: the first moment of a role's gradient in place of the
whole one's. Each regulariser has a part in the same way. A rule with moments of each role has its two parts to begin
with. Parts are directions: the learning rate, decay and centring are the optimizer's.

Axes: V rows of the table, D its width, S the rows that are followed (all of them, or a sample), R the check rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tiedjax.tying import Follow, Parts, Rows, Tables, taken

_Tree = TypeVar("_Tree")


class TableState(NamedTuple):
    """The moments of one table; what a rule does not need is None.

    Attributes:
      updates: updates done.
      mu, nu: first and second moment of the gradient, [V, D]; coupled: nu is [D]. None where each role has its own.
      role_mu: `Tables` of the first moment of each role: the input's of the rows that are followed, the output's of
        the check rows, or both of all rows.
      role_nu: `Tables` of the second moment of each role, [V, D].
      input_square: [S], the input role's part of the sum of nu over each row: the average of g_input * g.
      matched: by how much the sum of both parts was multiplied in the last update.
      regulariser_mu: {a regulariser's name: the first moment of its gradient}, of the rows that are followed or of all.
      row_updates: [V], how often each row was in a batch's input; `present`: [V], whether it was in the last one's.
    """

    updates: jax.Array
    mu: Any = None
    nu: Any = None
    role_mu: Tables = Tables(None, None)
    role_nu: Tables = Tables(None, None)
    input_square: Any = None
    matched: Any = None
    regulariser_mu: Any = None
    row_updates: Any = None
    present: Any = None


def selected(condition: jax.Array, new: _Tree, old: _Tree) -> _Tree:
    """Leaf by leaf, what is `new` where the condition, a scalar, holds, and what is `old` elsewhere."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        if new.dtype != jnp.bfloat16:
            return jnp.where(condition, new, old)
        # Of what is bfloat16 itself XLA makes a copy.
        return jnp.where(condition, new.astype(jnp.float32), old.astype(jnp.float32)).astype(new.dtype)

    chosen: _Tree = jax.tree.map(one, new, old)
    return chosen


def moment(gradient: jax.Array, old: jax.Array, decay: float, order: int) -> jax.Array:
    """The exponential average of the gradient to the power of `order`, in the dtype that it is kept in."""
    average: jax.Array = optax.tree.update_moment(gradient, old.astype(gradient.dtype), decay, order)
    return average.astype(old.dtype)


def adam_direction(
    mu: jax.Array, nu: jax.Array, b1: float, b2: float, eps: float, updates: Any, dtype: Any
) -> jax.Array:
    """mean / (sqrt(square) + eps) of bias-corrected moments, computed in `dtype`."""
    mean = optax.tree.bias_correction(mu.astype(dtype), b1, updates)
    square = optax.tree.bias_correction(nu.astype(dtype), b2, updates)
    direction: jax.Array = mean / (jnp.sqrt(square) + eps)
    return direction


@dataclass(frozen=True)
class TableRule:
    """One table's rule.

    Attributes:
      kind: as in `TableOptimizerConfig`.
      dtype: in which moments are kept between updates; None: that of the table.
      writers: the roles that write the table.
      follow: which rows' parts are wanted, where both roles write it.
      role_rates: whether the roles' parts are given learning rates of their own.
      squares: whether the second moment of each role is kept beside the table's, for the time when each has its own.
      regularisers: those that write the table too.
    """

    kind: str
    b1: float
    b2: float
    eps: float
    dtype: str | None
    writers: tuple[str, ...]
    follow: Follow
    role_rates: bool = False
    squares: bool = False
    regularisers: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether both roles write the table."""
        return len(self.writers) > 1

    @property
    def follows(self) -> bool:
        """Whether the roles' parts can be told, and are wanted."""
        return self.follow != "off"

    @property
    def needs_roles(self) -> bool:
        """Whether an update depends on the gradient of each role."""
        return self.apart or (self.shared and (self.follows or self.role_rates or self.squares))

    @property
    def takes_rows(self) -> bool:
        """Whether an update is given the roles' gradients of the followed rows alone."""
        return self.shared and self.follow == "rows" and not (self.apart or self.role_rates or self.squares)

    @property
    def apart(self) -> bool:
        """Whether each role has whole moments of its own."""
        return self.kind.startswith("by_role") and (self.shared or self._lazy)

    @property
    def _lazy(self) -> bool:
        return self.kind == "by_role_lazy" and "input" in self.writers

    @property
    def _whole_input(self) -> bool:
        return self.shared and (self.role_rates or self.squares or self.follow in ("whole", "checked"))

    @property
    def _whole_regulariser(self) -> bool:
        """Whether the first moments of the regularisers' gradients, if they are kept, are of all rows."""
        return self._whole_input or not self.shared

    @property
    def _both(self) -> bool:
        """Whether the first moment is kept as the sum of those of the roles."""
        return self.shared and self.follow == "checked" and not self.apart

    def init(self, table: Any, rows: Rows | None) -> TableState:
        """The state before the first update; `table` may be boxed with its logical axes, which moments then have."""

        def zeros(of: Any = None) -> Any:
            return _zeros(table, self.dtype, of)

        updates = jnp.zeros((), jnp.int32)
        if self.apart:
            moments = Tables(*(zeros() if role in self.writers else None for role in Tables._fields))
            matched = self.kind == "by_role_matched"
            return TableState(
                updates,
                nu=zeros() if matched else None,
                role_mu=moments,
                role_nu=moments,
                matched=jnp.ones(()) if matched else None,
                row_updates=_rows_of(table, jnp.int32) if self._lazy else None,
                present=_rows_of(table, jnp.bool_) if self._lazy else None,
            )
        nu = {"sgd": None, "lion": None, "coupled": zeros("rows")}.get(self.kind, zeros())
        follows = self.shared and self.follow != "off" and rows is not None
        role_input = zeros() if self._whole_input else zeros(rows.sample) if follows and rows else None
        role_output = (zeros() if self._both else zeros(rows.check)) if follows and rows else None
        of_sample = self.kind == "coupled" and rows is not None and rows.sample is not None
        squares = follows and rows is not None and nu is not None and not of_sample
        return TableState(
            updates,
            mu=None if self._both else zeros(),
            nu=nu,
            role_mu=Tables(role_input, role_output),
            role_nu=Tables(zeros(), zeros()) if self.squares else Tables(None, None),
            regulariser_mu=self._regulariser_zeros(zeros, rows),
            input_square=_rows_of(table, None, rows.sample) if squares and rows else None,
        )

    def _regulariser_zeros(self, zeros: Callable[..., Any], rows: Rows | None) -> Any:
        """What their first moments start from: of all rows where the table's whole update is to be taken apart."""
        if not self.regularisers or not (self.follows or self._whole_input):
            return None
        if not self._whole_regulariser and rows is None:
            return None
        kept = None if self._whole_regulariser or rows is None else rows.sample
        return {kind: zeros(kept) for kind in self.regularisers}

    def update(
        self,
        gradient: jax.Array,
        by_role: Tables,
        state: TableState,
        rows: Rows | None,
        regulariser: Mapping[str, jax.Array] | None = None,
        *,
        made: jax.Array,
    ) -> tuple[jax.Array, TableState]:
        """The direction [V, D] of an update by `gradient` [V, D], and the next state.

        The gradients `by_role` and of each `regulariser`, [V, D], sum to it; where `takes_rows` those of the roles are
        of the followed rows. Where an update is not `made`, the state stays.
        """
        updates = optax.safe_increment(state.updates)
        if self.kind == "lion":
            ahead = moment(gradient, state.mu.astype(gradient.dtype), self.b1, 1)
            new = TableState(updates, moment(gradient, state.mu, self.b2, 1))
            return jnp.sign(ahead), selected(made, new, state)
        if self.apart:
            new = self._update_apart(gradient, by_role, state._replace(updates=updates))
        else:
            new = self._update_together(gradient, by_role, state._replace(updates=updates), rows, regulariser)
        # The direction is that of the moments as they are kept: of others XLA would make room for both.
        new = selected(made, new, state)
        return self._direction(new), new

    def parts(self, state: TableState, rows: Rows | None) -> Parts:
        """What the roles have in the update that led to this state, and each regulariser: directions that sum to its
        own, row by row.

        Of a table of both roles these must be followed, or have rates of their own.
        """
        others = state.regulariser_mu
        if not self.shared:
            whole, part = self._direction(state), None
            if others is not None:
                part = {kind: self._of(mu, state.nu, state.updates) for kind, mu in others.items()}
                whole -= _total(part)
            roles = Tables(*(whole if role in self.writers else None for role in Tables._fields))
            return Parts(roles, regulariser=part)
        sample, check, _ = rows or Rows(None, None, None)
        if self.apart:
            by_role = self._apart(state)
            output_RD = by_role.output if self.follow == "checked" else taken(by_role.output, check)
            return Parts(Tables(*(taken(part, sample) for part in by_role)), output_RD)
        nu, mu = state.nu, state.role_mu

        def of_rows(kept: Any) -> Any:
            return taken(nu, kept) if nu is not None and nu.ndim > 1 else nu

        mu_input_S = taken(mu.input, sample) if self._whole_input else mu.input
        from_input, from_others = self._of(mu_input_S, of_rows(sample), state.updates), None
        if others is not None:
            kept = sample if self._whole_input else None
            from_others = {
                kind: self._of(taken(mu, kept), of_rows(sample), state.updates) for kind, mu in others.items()
            }
        if self._both:
            from_output = self._of(mu.output, of_rows(sample), state.updates)
            return Parts(Tables(from_input, from_output), from_output, regulariser=from_others)
        from_output = self._of(taken(state.mu, sample), of_rows(sample), state.updates) - from_input
        if from_others is not None:
            from_output -= _total(from_others)
        output_RD = None if mu.output is None or rows is None else self._of(mu.output, of_rows(check), state.updates)
        return Parts(Tables(from_input, from_output), output_RD, regulariser=from_others)

    def input_step_share(self, state: TableState, rows: Rows | None) -> jax.Array | None:
        """The input role's share of the second moment, which sets the size of steps; None where it has none."""
        if state.input_square is None or rows is None:
            return None
        nu = state.nu.astype(state.input_square.dtype)
        # Of one row for all it is the mean over all, and so are the squares: `init` keeps none of a sample of rows.
        size = len(state.input_square) * jnp.sum(nu) if nu.ndim == 1 else jnp.sum(taken(nu, rows.sample))
        return jnp.sum(state.input_square) / size

    def _direction(self, state: TableState) -> jax.Array:
        if self.apart:
            both = [part for part in self._apart(state) if part is not None]
            total: jax.Array = sum(both[1:], both[0])
            return total
        return self._of(self._sum(state) if self._both else state.mu, state.nu, state.updates)

    def _sum(self, state: TableState) -> jax.Array:
        """The first moment, of those that are kept in its place."""
        mu: jax.Array = state.role_mu.input + state.role_mu.output
        return mu if state.regulariser_mu is None else mu + _total(state.regulariser_mu)

    def _of(self, mu: jax.Array, nu: Any, updates: jax.Array) -> jax.Array:
        """The direction of a first moment; the rows of `nu` are those of `mu`, or it is one row for all, or None."""
        wide = jnp.promote_types(mu.dtype, jnp.float32)
        updates = jnp.maximum(updates, 1)  # before the first update moments are 0, and so must be what they give
        if nu is None:
            mean: jax.Array = optax.tree.bias_correction(mu.astype(wide), self.b1, updates)
            return mean
        nu = nu[None] if nu.ndim < mu.ndim else nu
        return adam_direction(mu, nu, self.b1, self.b2, self.eps, updates, wide)

    def _update_together(
        self, gradient: jax.Array, by_role: Tables, state: TableState, rows: Rows | None, regulariser: Any
    ) -> TableState:
        sample, check, places = rows or Rows(None, None, None)
        others = state.regulariser_mu
        if others is not None:
            others_SD = {kind: taken(g, sample if self.shared else None) for kind, g in regulariser.items()}
            gradients = regulariser if self._whole_regulariser else others_SD
            others = {kind: moment(gradients[kind], mu, self.b1, 1) for kind, mu in others.items()}
        if self.takes_rows:
            sample, check = None, places
        kept = Tables(None if self._whole_input else sample, None if self._both else check)
        role_mu = Tables(
            *(
                None if old is None else moment(taken(g, those), old, self.b1, 1)
                for old, g, those in zip(state.role_mu, by_role, kept, strict=True)
            )
        )
        nu = state.nu
        if self.kind == "coupled":
            nu = moment(jnp.mean(jnp.square(gradient), axis=0), nu, self.b2, 1)
        elif nu is not None:
            nu = moment(gradient, nu, self.b2, 2)
        square = state.input_square
        if square is not None:
            of_input_SD, of_output_SD = (taken(g_VD, sample) for g_VD in by_role)
            whole_SD = of_input_SD + of_output_SD
            product_SD = of_input_SD * (whole_SD if others is None else whole_SD + _total(others_SD))
            square = moment(jnp.sum(product_SD, axis=-1), square, self.b2, 1)
        mu = None if self._both else moment(gradient, state.mu, self.b1, 1)
        role_nu = state.role_nu
        if self.squares:
            role_nu = Tables(*(moment(g, old, self.b2, 2) for g, old in zip(by_role, role_nu, strict=True)))
        return TableState(state.updates, mu, nu, role_mu, role_nu, input_square=square, regulariser_mu=others)

    def divided(self, state: TableState) -> Tables:
        """For each role, the state of a table of its own from here on: the moments of this one, or the role's own.

        Those are its own where the rule keeps both of them for each role.
        """
        if self.apart:
            first, second = state.role_mu, state.role_nu
        elif self.squares:
            mu = state.role_mu if self._both else Tables(state.role_mu.input, state.mu - state.role_mu.input)
            first, second = mu, state.role_nu
        else:
            whole = self._sum(state) if self._both else state.mu
            first, second = Tables(whole, whole), Tables(state.nu, state.nu)
        return Tables(*(TableState(state.updates, mu, nu) for mu, nu in zip(first, second, strict=True)))

    def _update_apart(self, gradient: jax.Array, by_role: Tables, state: TableState) -> TableState:
        role_mu: dict[str, Any] = dict.fromkeys(Tables._fields)
        role_nu: dict[str, Any] = dict.fromkeys(Tables._fields)
        for role in self.writers:
            g, mu, nu = getattr(by_role, role), getattr(state.role_mu, role), getattr(state.role_nu, role)
            role_mu[role], role_nu[role] = moment(g, mu, self.b1, 1), moment(g, nu, self.b2, 2)
            if self._lazy and role == "input":
                present_V = jnp.any(g != 0, axis=-1)
                role_mu[role], role_nu[role] = (
                    jnp.where(present_V[:, None], now, before)
                    for now, before in [(role_mu[role], mu), (role_nu[role], nu)]
                )
                state = state._replace(present=present_V, row_updates=state.row_updates + present_V)
        state = state._replace(role_mu=Tables(**role_mu), role_nu=Tables(**role_nu))
        if self.kind != "by_role_matched":
            return state
        nu = moment(gradient, state.nu, self.b2, 2)
        together = self._of(state.role_mu.input + state.role_mu.output, nu, state.updates)
        size = jnp.linalg.norm(sum(self._apart(state._replace(matched=None))))
        matched = jnp.where(size > 0, jnp.linalg.norm(together) / jnp.where(size > 0, size, 1), 1)
        return state._replace(nu=nu, matched=matched.astype(state.matched.dtype))

    def _apart(self, state: TableState) -> Tables:
        """The direction of each role's own moments; None for a role that does not write the table."""
        parts: dict[str, Any] = dict.fromkeys(Tables._fields)
        for role in self.writers:
            lazy = self._lazy and role == "input"
            updates = state.row_updates[:, None] if lazy else state.updates
            part = self._of(getattr(state.role_mu, role), getattr(state.role_nu, role), updates)
            part = jnp.where(state.present[:, None], part, 0) if lazy else part
            parts[role] = part if state.matched is None else state.matched.astype(part.dtype) * part
        return Tables(**parts)


def _total(by_regulariser: Mapping[str, jax.Array]) -> jax.Array:
    first, *rest = by_regulariser.values()
    return sum(rest, first)


def with_decay(state: TableState, was: float, now: float) -> TableState:
    """The state whose second moment, corrected for its start under the decay `now`, is what it was under `was`.

    The average over t updates of a constant 1 is 1 - b^t: divided by that of another b it would be another size.
    """
    if state.nu is None or was == now:
        return state
    wide = jnp.promote_types(state.nu.dtype, jnp.float32)
    updates = jnp.maximum(state.updates, 1).astype(wide)
    factor = jnp.expm1(updates * math.log(now)) / jnp.expm1(updates * math.log(was))
    return state._replace(nu=(factor * state.nu.astype(wide)).astype(state.nu.dtype))


def united(rule: TableRule, own: Tables, rows: Rows | None) -> TableState:
    """The state, by `rule`, of one table from here on that two tables with these states become.

    Its first moment is the sum of theirs, as that of the sum of two gradients is; of its second moment that is so only
    where the gradients' products average to 0. A mean row's is the sum too.
    """
    state = rule.init(own.input.mu, rows)
    if rule.apart:
        return state._replace(
            updates=own.input.updates,
            role_mu=Tables(own.input.mu, own.output.mu),
            role_nu=Tables(own.input.nu, own.output.nu),
        )
    mu = own.input.mu + own.output.mu
    nu = None if own.input.nu is None else own.input.nu + own.output.nu
    role_input = own.input.mu if state.role_mu.input is not None else None
    return state._replace(updates=own.input.updates, mu=mu, nu=nu, role_mu=Tables(role_input, None))


def _zeros(table: Any, dtype: str | None, rows: Any = None) -> Any:
    """Zeros like the table; of these rows alone; or ("rows") of one row for all, [D]."""
    if isinstance(table, nn.LogicallyPartitioned):
        axes = table.names
        names = axes if rows is None else axes[1:] if isinstance(rows, str) else (None, *axes[1:])
        return nn.LogicallyPartitioned(_zeros(table.value, dtype, rows), names=names)
    if isinstance(rows, str):
        return jnp.zeros(table.shape[1:], dtype or table.dtype)
    shape = table.shape if rows is None else (len(rows), *table.shape[1:])
    return jnp.zeros(shape, dtype or table.dtype)


def _rows_of(table: Any, dtype: Any, rows: Any = None) -> Any:
    """Zeros, one for each row of the table or for each of these, in `dtype` (None: the table's)."""
    if isinstance(table, nn.LogicallyPartitioned):
        names = (table.names[0] if rows is None else None,)
        return nn.LogicallyPartitioned(_rows_of(table.value, dtype, rows), names=names)
    return jnp.zeros(len(table) if rows is None else len(rows), dtype or table.dtype)
