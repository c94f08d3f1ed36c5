"""AdamW and Muon with warmup and cosine decay, built from optax; the update is given the role gradients apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tiedjax.config import ROLES, OptimizerConfig
from tiedjax.muon import scale_by_muon
from tiedjax.sharding import ONE_DEVICE, Layout


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

    A table that serves one role has that role's name; any other parameter of the tables is "tables"; of the body,
    matrices are "matrices" and norm scales "scales".
    """
    names = jax.tree_util.keystr(tuple(path), simple=True, separator="/").split("/")
    if names[0] == "tables":
        return names[1] if names[1] in ROLES else "tables"
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
    }


def clip_by_loss_gradient(limit: float) -> optax.GradientTransformationExtraArgs:
    """Multiplies the update by limit / grad_norm where `grad_norm` is above the limit.

    Global-norm clipping, but by a norm that role scales do not enter: they must not change the body's update.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, grad_norm: jax.Array, **_: Any) -> Any:
        factor = jnp.minimum(1.0, limit / grad_norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float, dtype: str | None) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, bit for bit, but with both moments kept in `dtype` between updates (None: as it does).

    It computes in the dtype of the gradient. The update is that of the moments as they are kept: from unrounded ones
    XLA would compute it with copies of the old moments, as large as what bfloat16 saves.
    """

    def like(tree: Any, to: Any) -> Any:
        return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, to)

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
        count = optax.safe_increment(state.count)
        mu = like(optax.tree.update_moment(grads, like(state.mu, grads), b1, 1), state.mu)
        nu = like(optax.tree.update_moment(grads, like(state.nu, grads), b2, 2), state.nu)
        mean = optax.tree.bias_correction(like(mu, grads), b1, count)
        square = optax.tree.bias_correction(like(nu, grads), b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_rates(rates: Mapping[str, optax.Schedule]) -> optax.GradientTransformation:
    """Minus the rate of a parameter's part times its direction: `optax.scale_by_learning_rate` with several rates."""

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None) -> Any:
        steps = _by_part({part: -1 * rate(state.count) for part, rate in rates.items()}, updates)
        updates = jax.tree.map(lambda u, step: jnp.array(step, u.dtype) * u, updates, steps)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def make_optimizer(
    cfg: OptimizerConfig, steps: int, layout: Layout = ONE_DEVICE
) -> optax.GradientTransformationExtraArgs:
    """The optimizer over {"tables", "body"}, whose parts are updated by the rules of `rules`.

    `update` takes, beside the gradient of the parameters, `grad_norm`: the norm of the loss's gradient before any role
    scale, and `role_grads`: `Tables` of the raw [V, D] gradient of each role. No rule has a use for the latter; a
    transformation in this chain that treats the roles apart needs no other channel.
    """
    dtype = None if cfg.moments_dtype == "float32" else cfg.moments_dtype
    by_part = rules(cfg)

    def direction(kind: str, b2: float) -> optax.GradientTransformation:
        if kind == "muon":
            return scale_by_muon(layout, dtype)
        if kind == "sgd":
            return optax.ema(cfg.b1, accumulator_dtype=dtype)
        return scale_by_adam(cfg.b1, b2, cfg.eps, dtype)

    decays = sorted({rule.weight_decay for rule in by_part.values()} - {0.0})
    chain = [
        clip_by_loss_gradient(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        _transformations(direction, {part: (rule.kind, rule.b2) for part, rule in by_part.items()}),
        *(
            optax.add_decayed_weights(
                decay, partial(_by_part, {part: rule.weight_decay == decay for part, rule in by_part.items()})
            )
            for decay in decays
        ),
        scale_by_rates({part: learning_rate(cfg, steps, rule.learning_rate) for part, rule in by_part.items()}),
    ]
    return optax.with_extra_args_support(optax.chain(*chain))


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
