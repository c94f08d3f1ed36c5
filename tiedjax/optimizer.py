"""What updates the body and the tables, with warmup and cosine decay, and says which role wrote what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tiedjax import tying
from tiedjax.config import ROLES, OptimizerConfig, role_of
from tiedjax.muon import scale_by_muon
from tiedjax.sharding import ONE_DEVICE, Layout
from tiedjax.table_rules import TableRule, TableState, adam_direction, moment, selected, united, with_decay
from tiedjax.tying import SHARED, Tables


def learning_rate(cfg: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Updates done -> rate of the next: linear up to the peak at update `warmup_steps`, then cosine to the last update.

    Update 1 already moves the parameters, and update `steps` uses `final_fraction` of the peak, which is that of `cfg`
    unless given.
    """
    peak = cfg.learning_rate if peak is None else peak
    by_number = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=cfg.warmup_steps,
        decay_steps=max(steps, cfg.warmup_steps + 1),  # optax wants a decay, even when warmup takes all steps or more
        end_value=cfg.final_fraction * peak,
    )
    return lambda done: by_number(done + 1)


def part_of(path: Sequence[Any]) -> str:
    """Which rule updates the parameter at this path of {"tables", "body"}.

    What one role alone writes of the tables has that role's name, and the rest "tables"; of the body, matrices are
    "matrices" and norm scales "scales".
    """
    names = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    if names[0] == "tables":
        return role_of(names[1]) or "tables"
    return "matrices" if "kernel" in names else "scales"


class Rule(NamedTuple):
    """How the parameters of one part are updated."""

    kind: str
    learning_rate: float
    b2: float
    weight_decay: float


def rules(cfg: OptimizerConfig) -> dict[str, Rule]:
    """The rule of every part that `part_of` names."""

    def or_default(value: float | None, default: float) -> float:
        return default if value is None else value

    def of_table(name: str) -> Rule:
        own = cfg.tables.of(name)
        return Rule(
            own.kind,
            or_default(own.learning_rate, cfg.learning_rate),
            or_default(own.b2, cfg.b2),
            or_default(own.weight_decay, cfg.weight_decay),
        )

    body = cfg.body
    rate, decay = or_default(body.learning_rate, cfg.learning_rate), or_default(body.weight_decay, cfg.weight_decay)
    return {
        "matrices": Rule(body.kind, rate, cfg.b2, decay),
        "scales": Rule("adamw", cfg.learning_rate, cfg.b2, 0.0),
        **{name: of_table(name) for name in ("tables", *ROLES)},
        "rowless": Rule("adamw", cfg.learning_rate, cfg.b2, cfg.weight_decay),
    }


def scale_by_adam(b1: float, b2: float, eps: float, dtype: str | None) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, bit for bit, but with both moments kept in `dtype` between updates (None: as it does).

    It computes in the dtype of the gradient. The update is that of the moments as they are kept: from unrounded ones
    XLA would compute it with copies of the old moments, as large as what bfloat16 saves.
    Where an update is not `made`, the state stays.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, made: Any = True, **_: Any) -> Any:
        mu = jax.tree.map(lambda g, m: moment(g, m, b1, 1), grads, state.mu)
        nu = jax.tree.map(lambda g, v: moment(g, v, b2, 2), grads, state.nu)
        count, mu, nu = selected(made, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu), state)
        updates = jax.tree.map(lambda g, m, v: adam_direction(m, v, b1, b2, eps, count, g.dtype), grads, mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_rates(rates: Mapping[str, optax.Schedule]) -> optax.GradientTransformationExtraArgs:
    """Minus the rate of a parameter's part times its direction: `optax.scale_by_learning_rate` with several rates.

    Where an update is not `made`, the state stays.
    """

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None, *, made: Any = True, **_: Any
    ) -> Any:
        steps = _by_part({part: -1 * rate(state.count) for part, rate in rates.items()}, updates)
        updates = jax.tree.map(lambda u, step: jnp.array(step, u.dtype) * u, updates, steps)
        return updates, selected(made, optax.ScaleByScheduleState(optax.safe_increment(state.count)), state)

    return optax.GradientTransformationExtraArgs(lambda _: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


class OptimizerState(NamedTuple):
    """The body's state, and that of each table by its name."""

    body: Any
    tables: dict[str, TableState]


class _Rates(NamedTuple):
    """The learning rates of one update of a table: its own, and those of the parts that the roles have in it."""

    table: jax.Array
    roles: Tables


@dataclass(frozen=True)
class Optimizer:
    """What updates {"tables", "body"}, by the rules of `rules`.

    Attributes:
      cfg: its options.
      steps: the length of the schedule, in updates.
      body: of {"body": ...}, without clipping.
      tables: by name.
      parts: by the name of each of them, that of its rule in `rules`.
    """

    cfg: OptimizerConfig
    steps: int
    body: optax.GradientTransformationExtraArgs
    tables: Mapping[str, TableRule]
    parts: Mapping[str, str]

    def init(self, params: Mapping[str, Any], rows: tying.Rows | None = None) -> OptimizerState:
        """The state before the first update of `params`, which may be boxed; `rows` are those that are followed."""
        tables = {name: rule.init(params["tables"][name], rows) for name, rule in self.tables.items()}
        return OptimizerState(self.body.init({"body": params["body"]}), tables)

    def update(
        self,
        grads: Mapping[str, Any],
        role_grads: Tables,
        state: OptimizerState,
        params: Mapping[str, Any],
        *,
        grad_norm: jax.Array,
        rows: tying.Rows | None = None,
        regulariser: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[dict[str, Any], OptimizerState, dict[str, tying.Parts]]:
        """What to add to `params`, the next state, and what of the tables' update each role wrote.

        `grads` is the gradient of the parameters with the role scales in it, `role_grads` each role's part of that of
        the tables, {name: gradient} each, and `regulariser` that of each regulariser, if there are any. Clipping
        compares `grad_norm` with its limit. Where that is not finite the state stays, and so
        must `params`, whatever is to be added.
        """
        clipped = partial(_clipped, limit=self.cfg.clip_norm, norm=grad_norm)
        made = jnp.isfinite(grad_norm)
        body, body_state = self.body.update(
            {"body": clipped(grads["body"])}, state.body, {"body": params["body"]}, made=made
        )
        tables, states, parts = {}, {}, {}
        for name, rule in self.tables.items():
            by_role = Tables(*(clipped(own[name]) for own in role_grads)) if rule.needs_roles else Tables(None, None)
            others = None if regulariser is None else clipped({kind: of[name] for kind, of in regulariser.items()})
            gradient = clipped(grads["tables"][name])
            direction, states[name] = rule.update(gradient, by_role, state.tables[name], rows, others, made=made)
            rates = self._rates(name, state.tables[name].updates)
            tables[name] = self._table_update(name, direction, states[name], params["tables"][name], rates)
            if rule.follows:
                parts[name] = self._parts(name, states[name], rows, rates)
        return {"tables": tables, **body}, OptimizerState(body_state, states), parts

    def last_parts(self, state: OptimizerState, rows: tying.Rows | None) -> dict[str, tying.Parts]:
        """What each role wrote into each table in the update that led to `state`: nothing without an account.

        With the decay they sum to that update, and with what centring took from the table that it began with.
        """
        return {
            name: self._parts(name, table, rows, self._rates(name, jnp.maximum(table.updates - 1, 0)))
            for name, table in state.tables.items()
            if self.tables[name].follows
        }

    def divided(self, states: Mapping[str, TableState], before: Optimizer) -> dict[str, TableState]:
        """The tables' states from which on the one that `before` had shared is two: by `TableRule.divided`."""
        shared = before.tables[SHARED]
        return {
            role: with_decay(state, shared.b2, self.tables[role].b2)
            for role, state in shared.divided(states[SHARED])._asdict().items()
        }

    def united(
        self, states: Mapping[str, TableState], arrays: Mapping[str, Any], before: Optimizer
    ) -> dict[str, TableState]:
        """Those from which on the two tables that the roles had in `before` are `arrays`, one of them shared.

        By `united`. The others have had as many updates as that, all without a gradient: they share its schedule.
        """
        done, shared = states["input"].updates, self.tables[SHARED]
        new = {name: rule.init(arrays[name], None)._replace(updates=done) for name, rule in self.tables.items()}
        own = {role: with_decay(state, before.tables[role].b2, shared.b2) for role, state in states.items()}
        return new | {SHARED: united(shared, Tables(**own), None)}

    def _rates(self, name: str, done: jax.Array) -> _Rates:
        rate = self._rate(self.parts[name], done)
        own = self.tables[name].role_rates
        return _Rates(rate, Tables(*(self._rate(role, done) if own else rate for role in ROLES)))

    def _rate(self, part: str, done: jax.Array) -> jax.Array:
        return jnp.asarray(learning_rate(self.cfg, self.steps, rules(self.cfg)[part].learning_rate)(done))

    def _parts(self, name: str, state: TableState, rows: tying.Rows | None, rates: _Rates) -> tying.Parts:
        found = self.tables[name].parts(state, rows)
        wide = jax.tree.leaves(found.directions)[0].dtype
        scales = Tables(*(-rate.astype(wide) for rate in rates.roles))
        check = None if found.check is None else scales.output * found.check
        others = jax.tree.map(lambda part: -rates.table * part, found.regulariser)
        directions = found.directions
        if self.cfg.tables.centered:
            means = jax.tree.map(lambda part: jnp.mean(part, axis=0, keepdims=True), directions)
            directions = jax.tree.map(jnp.subtract, directions, means)
            check = None if check is None else check - scales.output * means.output
            others = jax.tree.map(lambda part: part - jnp.mean(part, axis=0, keepdims=True), others)
        return tying.Parts(directions, check, rates.table.astype(wide) * self._weight_decay(name), others, scales)

    def _table_update(
        self, name: str, direction: jax.Array, state: TableState, table: jax.Array, rates: _Rates
    ) -> jax.Array:
        rule, decay = self.tables[name], self._weight_decay(name)
        if rule.role_rates:
            parts = rule.parts(state, None)
            written = [-rate * part for rate, part in zip(rates.roles, parts.directions, strict=True)]
            written += [-rates.table * part for part in (parts.regulariser or {}).values()]
            update = sum(written[1:], written[0]) - rates.table.astype(table.dtype) * decay * table
        else:
            update = -rates.table * (direction + decay * table if decay else direction)
        if self.cfg.tables.centered:
            update -= jnp.mean(table + update, axis=0, keepdims=True)
        return jnp.asarray(update)

    def _weight_decay(self, name: str) -> float:
        return rules(self.cfg)[self.parts[name]].weight_decay


def _clipped(tree: Any, *, limit: float | None, norm: jax.Array) -> Any:
    """The gradient times limit / norm where the norm is above the limit."""
    if not limit:
        return tree
    factor = jnp.minimum(1.0, limit / norm)
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), tree)


def make_optimizer(
    cfg: OptimizerConfig,
    steps: int,
    layout: Layout = ONE_DEVICE,
    *,
    tables: Sequence[str] = (SHARED,),
    follow: tying.Follow = "off",
    followed: Collection[str] | None = None,
    squares: bool = False,
    rowless: Collection[str] = (),
    regularisers: tuple[str, ...] = (),
) -> Optimizer:
    """The optimizer over {"tables", "body"}, whose tables have these names.

    `follow` is the form of the account. Of the tables that both roles write, those have one that are `followed` (None:
    all of them). `squares` keeps a second moment for each role of a shared table. Those that are `rowless`,
    without a row for each token, take AdamW with the options that the body's matrices have by default. `regularisers`
    are the names of those that write the tables too.
    """
    dtype = None if cfg.moments_dtype == "float32" else cfg.moments_dtype
    by_part = rules(cfg)
    parts = {name: "rowless" if name in rowless else role_of(name) or "tables" for name in tables}

    def table_rule(name: str) -> TableRule:
        role, rule = role_of(name), by_part[parts[name]]
        writers = (role,) if role else ROLES
        form = follow if role or followed is None or name in followed else "off"
        rates = {rule.learning_rate}
        if parts[name] == "tables":
            rates |= {by_part[role].learning_rate for role in writers}
        return TableRule(
            rule.kind,
            cfg.b1,
            rule.b2,
            cfg.eps,
            dtype,
            writers,
            form,
            role_rates=len(rates) > 1,
            squares=squares and not role,
            regularisers=regularisers,
        )

    def direction(kind: str) -> optax.GradientTransformationExtraArgs:
        return scale_by_muon(layout, dtype) if kind == "muon" else scale_by_adam(cfg.b1, cfg.b2, cfg.eps, dtype)

    body = {part: by_part[part] for part in ("matrices", "scales")}
    decay = body["matrices"].weight_decay
    kept = partial(_by_part, {part: bool(rule.weight_decay) for part, rule in body.items()})
    chain = [
        _transformations(direction, {part: (rule.kind,) for part, rule in body.items()}),
        optax.add_decayed_weights(decay, kept) if decay else optax.identity(),
        scale_by_rates({part: learning_rate(cfg, steps, rule.learning_rate) for part, rule in body.items()}),
    ]
    return Optimizer(
        cfg,
        steps,
        optax.with_extra_args_support(optax.chain(*chain)),
        {name: table_rule(name) for name in tables},
        parts,
    )


def _transformations(
    make: Callable[..., optax.GradientTransformation], arguments: Mapping[str, tuple[Any, ...]]
) -> optax.GradientTransformationExtraArgs:
    """`make` of every part's arguments, on its parameters; parts with the same arguments have one transformation."""
    labels = {part: ", ".join(map(str, each)) for part, each in arguments.items()}
    transformations = {labels[part]: make(*each) for part, each in arguments.items()}
    if len(transformations) == 1:
        return optax.with_extra_args_support(*transformations.values())
    return optax.partition(transformations, partial(_by_part, labels))


def _by_part(values: Mapping[str, Any], params: Any) -> Any:
    """For every parameter, the value of its part."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[part_of(path)], params)
