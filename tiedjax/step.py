"""The train step and the eval step: pure functions of arrays, compiled once, without I/O."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from tiedjax import sharding, tying
from tiedjax.config import DataConfig, RunConfig, TrainConfig
from tiedjax.errors import UserError
from tiedjax.gradients import anatomy, loss_and_gradients, precision, role_metrics
from tiedjax.lm import OUTPUT_BIAS, init_params, summed_loss, trained, with_trained
from tiedjax.optimizer import Optimizer, OptimizerState, learning_rate, make_optimizer
from tiedjax.sharding import Layout
from tiedjax.step_metrics import StepMetrics
from tiedjax.table_rules import TableState, selected
from tiedjax.tying import RareGate, Tables

HOLD_GAIN = 0.05  # of the controller of the output role's share, in each update: momentum follows within some ten
MOST_HELD = 1000.0  # its factor, and one over the smallest


class TrainState(NamedTuple):
    """What a step reads and writes: steps done, parameters as of `init_params`, optimizer state, the account.

    `skipped` is how many of the steps made no update, and -1 minus that once one more would have: then nothing changes.
    `account` is None where no table has one; `held` is the logarithm of the factor on the input role's gradient that
    holds `tying.output_update_share`, None without it; `watched` are the averages that decide on `tying.untie_when`,
    [2], None without it; `anchor` are the tables that the run is to stay near, {name: [V, D]} by `tying.distinct`,
    None without `regularisers.anchor`.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: OptimizerState
    skipped: jax.Array
    account: tying.Account | None = None
    held: jax.Array | None = None
    watched: jax.Array | None = None
    anchor: dict[str, jax.Array] | None = None


@dataclass(frozen=True)
class Steps:
    """The compiled functions of one config on one mesh, and the shardings of what they take.

    Attributes:
      init: (key, sample_S, unshared_S) -> TrainState, made in place on the mesh; `sample_S` are the rows of an account
        of a sample of rows, int32 [`sampled`], None for every other; `unshared_S` is that of `init_params`.
      train: (state, tokens_BS, role_scale, decile_V) -> (state, `StepMetrics`); donates the state. With
        `tying.rare_gate` a fifth argument is `tying.RareGate`, None where no token is rare.
      evaluate: (params, tokens_BS, weights_B) -> (summed loss, summed weight), without z-loss.
      observe: (params, tokens_BS, body_update) -> metrics, as `anatomy` says.
      abstract: TrainState of ShapeDtypeStructs with their shardings.
      sampled: how many rows the account has, if it has not all.
      batch: the sharding of tokens and weights.
      replicated: the sharding of role_scale, decile_V, the gate and metrics.
    """

    init: Callable[..., TrainState]
    train: jax.stages.Wrapped
    evaluate: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    observe: Callable[[Any, jax.Array, Any], dict[str, jax.Array]]
    abstract: TrainState
    sampled: int | None
    batch: NamedSharding
    replicated: NamedSharding


def decided(cfg: RunConfig, mesh: Mesh) -> RunConfig:
    """The config with `model.scan_layers` decided for the mesh's platform: it shapes the parameters."""
    if cfg.model.scan_layers is not None:
        return cfg
    # A loop compiles in the time of one layer; unrolled layers run faster, on a CPU much, and on a GPU, where a loop
    # copies what the backward pass needs into stacks and out of them, too.
    alike = len(set(cfg.model.windows)) == 1  # one compiled layer has one mask
    scan = alike and cfg.model.layers >= (12 if Layout(mesh).platform == "tpu" else 32)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=scan))


def make_steps(cfg: RunConfig, mesh: Mesh, begins: int = 0) -> Steps:
    """Everything that runs on the devices for `cfg` on `mesh`; compiles when first called.

    `begins`, where the scheme of the run has changed, is the update after which it did; 0: before that.
    Runs that differ only in what a step is given (seed, role scales, data source) share what was compiled. Raises
    UserError if the mesh does not divide a microbatch, or for options of the tables that are void or impossible.
    """
    tying.refuse_options_of_roles(cfg)
    tying.refuse_impossible_changes(cfg)
    return _make_steps(_compiled_for(tying.stage(cfg, begins > 0), mesh), mesh, begins)


def make_change(cfg: RunConfig, mesh: Mesh, begins: int) -> Callable[[TrainState], TrainState]:
    """The function from the last state before the scheme of `cfg` changes, after the update `begins`, to the next.

    The body's part is handed on as it is. What has no meaning for the other tables, the account and the controller's
    factor, ends.
    """
    after, layout = make_steps(cfg, mesh, begins).abstract, sharding.Layout(mesh)
    before, now = (_optimizer(_compiled_for(tying.stage(cfg, changed), mesh), layout) for changed in (False, True))

    places = jax.tree.map(lambda leaf: leaf.sharding, (after.params["tables"], after.opt_state.tables))

    @functools.partial(jax.jit, out_shardings=places)
    def of_tables(arrays: dict[str, jax.Array], states: dict[str, TableState]) -> Any:
        carried = tying.carried(cfg.tying, arrays)
        if cfg.tying.tie_at is None:
            return carried, now.divided(states, before)
        return carried, now.united(states, carried, before)

    def change(state: TrainState) -> TrainState:
        arrays, states = of_tables(state.params["tables"], state.opt_state.tables)
        opt_state = state.opt_state._replace(tables=states)
        return TrainState(state.step, {**state.params, "tables": arrays}, opt_state, state.skipped)

    return change


def _compiled_for(cfg: RunConfig, mesh: Mesh) -> RunConfig:
    """What of a config decides the programs on a mesh; UserError for a mesh that does not cut it evenly."""
    _refuse_uneven_arrays(cfg, mesh)
    rows, split = cfg.data.batch_size // cfg.data.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"mesh: data x fsdp = {split} devices do not divide the {rows} sequences of a microbatch "
            f"(data.batch_size {cfg.data.batch_size} / data.microbatches {cfg.data.microbatches})"
        )
    return RunConfig(
        model=decided(cfg, mesh).model,
        tying=tying.without_scales(cfg.tying),
        regularisers=dataclasses.replace(cfg.regularisers, anchor_to=None),
        optimizer=cfg.optimizer,
        data=DataConfig(batch_size=cfg.data.batch_size, microbatches=cfg.data.microbatches),
        train=TrainConfig(
            steps=cfg.train.steps,
            z_loss=cfg.train.z_loss,
            skip_nonfinite=cfg.train.skip_nonfinite,
        ),
    )


def _optimizer(cfg: RunConfig, layout: Layout) -> Optimizer:
    scheme = tying.scheme_of(cfg.tying)
    return make_optimizer(
        cfg.optimizer,
        cfg.train.steps,
        layout,
        tables=scheme.trained,
        follow=tying.follow(cfg),
        followed=scheme.followed,
        squares=tying.keeps_squares(cfg),
        rowless=[parameter.name for parameter in scheme.parameters if not parameter.has_rows],
        regularisers=tuple(cfg.regularisers.weights),
    )


def _refuse_uneven_arrays(cfg: RunConfig, mesh: Mesh) -> None:
    """UserError for an array of the scheme that the mesh cannot cut evenly."""
    for parameter in tying.scheme_of(cfg.tying).parameters:
        shape = parameter.shape(cfg.model.table_rows, cfg.model.d_model)
        for size, axis in zip(shape, parameter.axes, strict=True):
            for name in sharding.RULES[axis] if axis else ():
                if size % mesh.shape[name]:
                    counted = "rows" if axis == "vocab" else "columns"
                    raise UserError(
                        f"mesh.{name}: {mesh.shape[name]} does not divide the {size} {counted} of {parameter.name}, an "
                        f"array of the {cfg.tying.scheme} scheme"
                    )


def _held(log_scale: jax.Array, share: jax.Array, wanted: float) -> jax.Array:
    """The next logarithm of the factor on the input role's gradient after an update with this share of the output's."""

    def odds(x: jax.Array) -> jax.Array:
        return jnp.log(x) - jnp.log1p(-x)

    most = math.log(MOST_HELD)
    next_scale = log_scale + HOLD_GAIN * (odds(jnp.clip(share, 1e-3, 1 - 1e-3)) - odds(jnp.asarray(wanted)))
    return jnp.clip(jnp.where(jnp.isfinite(share), next_scale, log_scale), -most, most)


def _skipped(before: jax.Array, made: jax.Array, most: int) -> jax.Array:
    """`TrainState.skipped` after a step that made its update or did not."""
    return jnp.where(made | (before < 0), before, jnp.where(before < most, before + 1, -1 - before))


def _known_after(x: jax.Array, others: dict[str, jax.Array], step: jax.Array) -> jax.Array:
    """`x`, bit for bit, but to the compiler a function of `others` too, so that these are computed before it is used.

    A barrier would not do: XLA takes barriers out before it decides what to copy.
    """
    return jnp.where(step < 0, sum(others.values(), jnp.zeros(())).astype(x.dtype), x) if others else x


@functools.lru_cache(maxsize=16)
def _make_steps(cfg: RunConfig, mesh: Mesh, begins: int) -> Steps:
    """`begins` is how many updates are behind the first of these steps."""
    scheme = tying.scheme_of(cfg.tying)
    layout = sharding.Layout(mesh)
    form = tying.follow(cfg)
    optimizer = _optimizer(cfg, layout)
    schedule = learning_rate(cfg.optimizer, cfg.train.steps)
    gradients = loss_and_gradients(cfg, layout)
    evaluation = summed_loss(cfg, layout, z_loss=0.0)
    followed = [name for name, rule in optimizer.tables.items() if rule.shared and rule.follows]
    sampled = min(tying.SAMPLE_ROWS, cfg.model.table_rows) if form == "rows" and followed else None
    wanted_share, weights = cfg.tying.output_update_share, cfg.regularisers.weights
    gates = cfg.tying.rare_gate is not None

    def init(root: jax.Array, sample_S: jax.Array | None = None, unshared_S: jax.Array | None = None) -> TrainState:
        params = init_params(cfg, root, unshared_S)
        zero = jnp.zeros((), jnp.int32)
        rows = tying.rows_of(form, cfg.model.table_rows, sample_S) if followed else None
        account = tying.opened(params["tables"], followed, form, rows, weights, cfg.optimizer.tables.centered)
        held = None if wanted_share is None else jnp.zeros(())
        watched = None if cfg.tying.untie_when is None else jnp.zeros(2)
        anchor = None
        if "anchor" in weights:
            boxed = lambda E_VD: nn.LogicallyPartitioned(E_VD, names=("vocab", "embed"))
            anchor = jax.tree.map(boxed, tying.anchored(scheme, nn.unbox(params["tables"])))
        opt_state = optimizer.init(trained(params), rows)
        return TrainState(zero, params, opt_state, zero, account, held, watched, anchor)

    def regularisers(state: TrainState) -> dict[str, tuple[jax.Array, dict[str, jax.Array]]]:
        """What each adds to the loss, and its gradient with respect to what is trained of the tables."""

        def value(arrays: dict[str, jax.Array], kind: str) -> jax.Array:
            return tying.penalty(cfg, kind, scheme.tables({**state.params["tables"], **arrays}), state.anchor)

        return {kind: jax.value_and_grad(value)(trained(state.params)["tables"], kind) for kind in weights}

    def unscaled_norm(grads: Any, params: Any, role_grads: Tables, others: Any) -> jax.Array:
        tables = scheme.transposed(params["tables"], role_grads)
        if others is not None:
            tables = jax.tree.map(jnp.add, tables, others)
        return jnp.asarray(optax.tree.norm({"tables": tables, "body": grads["body"]}))

    def by_role(
        state: TrainState, role_grads: Tables, gated_VD: jax.Array | None, role_scale: Tables
    ) -> tuple[Tables, Tables]:
        """What each role's gradient is to every table, {name: gradient}: before gate and scale, of the rows that are
        followed, and after them, of those that the table's rule asks for."""
        rows = state.account.rows.sample if state.account else None
        gated = role_grads if gated_VD is None else role_grads._replace(output=gated_VD)
        scaled = jax.tree.map(lambda s, g: s.astype(g.dtype) * g, role_scale, gated)
        whole, wanted = (scheme.by_role(state.params["tables"], g) for g in (role_grads, scaled))

        def of_rows(whole: Tables) -> Tables:
            return Tables(
                *({name: tying.taken(G, rows if name in followed else None) for name, G in of.items()} for of in whole)
            )

        raw = of_rows(whole)
        unscaled = raw if gated_VD is None else of_rows(scheme.by_role(state.params["tables"], gated))
        few = [name for name in followed if optimizer.tables[name].takes_rows]
        # Rows are taken first: scaled after that, the others are not computed.
        sample = Tables(
            *(
                {name: tying.taken(s, rows if s.ndim else None) * of[name] for name in few}
                for s, of in zip(role_scale, unscaled, strict=True)
            )
        )
        return raw, Tables(*(of | rows_alone for of, rows_alone in zip(wanted, sample, strict=True)))

    def change_by_the_last(state: TrainState, raw: Tables) -> dict[str, jax.Array]:
        """What the last update of the tables did to the loss of this batch; nothing where its parts are not told."""
        rows = state.account.rows if state.account else None
        parts = optimizer.last_parts(state.opt_state, rows)
        if not parts:
            return {}
        change = tying.compromise(raw, parts, state.params["tables"], rows)
        return {
            name: jnp.where(state.step > jnp.maximum(begins, state.skipped), value, jnp.nan)
            for name, value in change.items()
        }

    def account_metrics(new: TrainState) -> dict[str, jax.Array]:
        """The input role's share of the second moments, and the error of the account, after an update."""
        rows, found = new.account.rows if new.account else None, dict[str, jax.Array]()
        for name in followed:
            share = optimizer.tables[name].input_step_share(new.opt_state.tables[name], rows)
            found |= {} if share is None else {"input_step_share": share}
        if new.account:
            found["account_error"] = tying.error(new.account, new.params["tables"])
        return found

    def train(
        state: TrainState,
        tokens_BS: jax.Array,
        role_scale: Tables,
        decile_V: jax.Array,
        gate: RareGate | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        if state.held is not None:
            role_scale = role_scale._replace(input=jnp.exp(state.held) * role_scale.input)
        value, (grads, role_grads, squares, *gated) = gradients(state.params, tokens_BS, role_scale, gate)
        by_regulariser, others, about_others = None, None, {}
        if weights:
            with jax.named_scope("regularisers"):
                # Behind a barrier: so the account is of the very numbers that are added, and not of some rounded anew.
                found = jax.lax.optimization_barrier(regularisers(state))
                by_regulariser = {kind: gradient for kind, (_, gradient) in found.items()}
                total, others = jax.tree.map(lambda *each: sum(each[1:], each[0]), *found.values())
                grads = {**grads, "tables": jax.tree.map(jnp.add, grads["tables"], others)}
                norm = jnp.asarray(optax.tree.norm(others))
                about_others = {"regulariser": total, "regulariser_grad_norm": norm}
        with jax.named_scope("roles"):
            grad_norm = unscaled_norm(grads, state.params, role_grads, others)
            about_roles = role_metrics(role_grads, decile_V)
            if squares.roles is not None:
                norms = Tables(about_roles["input_grad_norm"], about_roles["output_grad_norm"])
                about_roles |= tying.signal_and_noise(norms, squares.roles, cfg.data.microbatches)
            # What is only observed is behind barriers: fused with the update it would change the update's last bits.
            role_grads, gated_VD = jax.lax.optimization_barrier((role_grads, gated[0] if gated else None))
            raw_by_role, scaled_by_role = by_role(state, role_grads, gated_VD, role_scale)
        with jax.named_scope("account"):
            about_last = change_by_the_last(state, raw_by_role)
        with jax.named_scope("optimizer"):
            limit, raw = cfg.optimizer.clip_norm, cfg.optimizer.clip_by == "raw"
            clipped_norm = grad_norm if raw else jnp.asarray(optax.tree.norm(grads))
            # The last update's parts are told from moments that this one overwrites: if it may begin first, XLA copies
            # them and the tables.
            clipped_norm = _known_after(clipped_norm, about_last, state.step)
            made = jnp.isfinite(value) & jnp.isfinite(clipped_norm) & (state.skipped >= 0)
            skipped = _skipped(state.skipped, made, cfg.train.skip_nonfinite)
            updates, opt_state, parts = optimizer.update(
                grads,
                scaled_by_role,
                state.opt_state,
                trained(state.params),
                grad_norm=jnp.where(made, clipped_norm, jnp.nan),
                rows=state.account.rows if state.account else None,
                regulariser=by_regulariser,
            )
            params = with_trained(state.params, optax.apply_updates(trained(state.params), updates))
            params = selected(made, params, state.params)
        with jax.named_scope("account"):
            about_updates = tying.update_metrics(parts) if parts else {}
            about_updates = {name: jnp.where(made, of_update, jnp.nan) for name, of_update in about_updates.items()}
            account = selected(made, tying.advanced(state.account, parts), state.account) if state.account else None
            held = state.held
            if held is not None and wanted_share is not None:
                about_updates["held_input_scale"] = jnp.exp(held)
                held = _held(held, about_updates["output_update_share"], wanted_share)
            step = state.step + (skipped >= 0)
            new = TrainState(step, params, opt_state, skipped, account, held, state.watched, state.anchor)
            about_updates |= about_last | (account_metrics(new) if parts else {})
            if state.watched is not None:
                watched = tying.watched(cfg.tying, state.watched, about_updates)
                watched = jnp.where(made, watched, state.watched)
                new = new._replace(watched=watched)
                about_updates["untie_watched"] = watched[0] / watched[1]
        metrics = {
            "loss": value,
            **about_others,
            "learning_rate": schedule(state.step - state.skipped),
            "grad_norm": grad_norm,
            **({"clip_factor": jnp.minimum(1.0, limit / clipped_norm)} if limit else {}),
            **about_roles,
            "activation_grad_norm": jnp.sqrt(squares.lookup),
            **about_updates,
            "skipped": skipped,
        }
        return new, StepMetrics.of(metrics)

    def evaluate(params: Any, tokens_BS: jax.Array, weights_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        with precision(cfg, layout):
            tables, bias_V = scheme.tables(params["tables"]), params.get(OUTPUT_BIAS)
            return evaluation(tables, params["body"], tokens_BS, weights_B, None, bias_V)

    sample = None if sampled is None else jax.ShapeDtypeStruct((sampled,), jnp.int32)
    boxed = jax.eval_shape(init, jax.random.key(0), sample)
    placed, everywhere = sharding.shardings(boxed, mesh), sharding.replicated(mesh)
    batch = sharding.batch_sharding(mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), nn.unbox(boxed), placed
    )
    return Steps(
        init=jax.jit(lambda *arguments: nn.unbox(init(*arguments)), out_shardings=placed),
        train=jax.jit(
            train,
            donate_argnums=0,
            in_shardings=(placed, batch, everywhere, everywhere, *([everywhere] if gates else [])),
            out_shardings=(placed, everywhere),
        ),
        observe=jax.jit(anatomy(cfg, layout), in_shardings=(placed.params, batch, None), out_shardings=everywhere),
        evaluate=jax.jit(evaluate, in_shardings=(placed.params, batch, batch), out_shardings=everywhere),
        abstract=abstract,
        sampled=sampled,
        batch=batch,
        replicated=everywhere,
    )
