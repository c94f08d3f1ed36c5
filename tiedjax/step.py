"""The train step and the eval step: pure functions of arrays, compiled once, without I/O."""

from __future__ import annotations

import contextlib
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

from tiedjax import model, sharding, tying
from tiedjax.config import DataConfig, RunConfig, TrainConfig
from tiedjax.errors import UserError
from tiedjax.lm import OUTPUT_BIAS, Squares, SummedLoss, init_params, loss_and_states, summed_loss, trained
from tiedjax.lookup import sums_by_token
from tiedjax.optimizer import OptimizerState, learning_rate, make_optimizer
from tiedjax.sharding import ONE_DEVICE, Layout
from tiedjax.tying import Tables

DECILES = 10
HOLD_GAIN = 0.05  # of the controller of the output role's share, in each update: momentum follows within some ten
MOST_HELD = 1000.0  # its factor, and one over the smallest


class TrainState(NamedTuple):
    """What a step reads and writes: updates done, parameters as of `init_params`, optimizer state, the account.

    `account` is None where no table has one; `held` is the logarithm of the factor on the input role's gradient that
    holds `tying.output_update_share`, None without it.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: OptimizerState
    account: tying.Account | None = None
    held: jax.Array | None = None


@dataclass(frozen=True)
class Steps:
    """The compiled functions of one config on one mesh, and the shardings of what they take.

    Attributes:
      init: (key, sample_S) -> TrainState, made in place on the mesh; `sample_S` are the rows of an account of a sample
        of rows, int32 [`sampled`], None for every other.
      train: (state, tokens_BS, role_scale, decile_V) -> (state, metrics); donates the state.
      evaluate: (params, tokens_BS, weights_B) -> (summed loss, summed weight), without z-loss.
      observe: (params, tokens_BS, body_update) -> metrics, as `anatomy` says.
      abstract: TrainState of ShapeDtypeStructs with their shardings.
      sampled: how many rows the account has, if it has not all.
      batch: the sharding of tokens and weights.
      replicated: the sharding of role_scale, decile_V and metrics.
    """

    init: Callable[..., TrainState]
    train: jax.stages.Wrapped
    evaluate: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    observe: Callable[[Any, jax.Array, Any], dict[str, jax.Array]]
    abstract: TrainState
    sampled: int | None
    batch: NamedSharding
    replicated: NamedSharding


def _cut(x_B: jax.Array, parts: int) -> jax.Array:
    """A batch in `parts` microbatches, along a new first axis."""
    # Row r goes to microbatch r % parts: every device keeps its own rows and none are exchanged.
    return x_B.reshape(x_B.shape[0] // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def accumulated(total: SummedLoss, parts: int) -> SummedLoss:
    """The same loss and gradient, `parts` microbatches one after the other in the memory of one.

    The gradients are summed in the forward rule, with respect to the tables and the body: whatever lies between the
    tables and their parameters (scheme, split) is differentiated once a step, not once a microbatch. What the tap
    observes is summed likewise.
    """
    if parts == 1:
        return total
    # Of the loss, not of the mean: the weight that divides it is known only after the last microbatch.
    gradient = jax.value_and_grad(total, argnums=(0, 1, 4), has_aux=True)

    cut = functools.partial(_cut, parts=parts)

    @jax.custom_vjp
    def summed(
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None = None,
        bias_V: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        one = lambda part: total(tables, body, part[0], part[1], bias_V=bias_V)
        losses, weights = jax.lax.map(one, (cut(tokens_BS), cut(weights_B)))
        return jnp.sum(losses), jnp.sum(weights)

    def forward(
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None,
        bias_V: jax.Array | None,
    ) -> Any:
        def add(carry: Any, part: Any) -> tuple[Any, None]:
            (loss_sum, weight), grads = gradient(tables, body, *part, tap, bias_V)
            return jax.tree.map(jnp.add, carry, ((loss_sum, weight), grads)), None

        # The sums start with the dtypes that `total` gives, which are wider than those of its activations.
        one = slice(tokens_BS.shape[0] // parts)
        shapes = jax.eval_shape(gradient, tables, body, tokens_BS[one], weights_B[one], tap, bias_V)
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[0])
        start = (sums, jax.tree.map(jnp.zeros_like, (tables, body, tap)))
        return jax.lax.scan(add, start, (cut(tokens_BS), cut(weights_B)))[0]

    def backward(grads: Any, cotangents: Any) -> Any:
        *grads, squares = grads
        # All that is left is to scale: the gradients are linear in the loss's cotangent, the tap's sums of squares go
        # by its square, and the weights' sum depends on no parameter.
        tables, body = jax.tree.map(lambda g: cotangents[0].astype(g.dtype) * g, grads)
        return tables, body, None, None, jax.tree.map(lambda s: jnp.square(cotangents[0]) * s, squares), None

    summed.defvjp(forward, backward)
    return summed


def role_metrics(role_grads: Tables, decile_V: jax.Array) -> dict[str, jax.Array]:
    """Norms, share and cosine of the two [V, D] role gradients, and their norms by frequency decile of the rows.

    `decile_V` holds 0 (rarest) to 9, or -1 for rows that count in no decile. The share is output / (input + output).
    """
    square_V = jax.tree.map(lambda g_VD: jnp.sum(jnp.square(g_VD), axis=-1), role_grads)
    norm = jax.tree.map(lambda s_V: jnp.sqrt(jnp.sum(s_V)), square_V)
    # Not a scatter: thousands of additions to ten places are the slowest there is on a GPU.
    member_10V = decile_V[None] == jnp.arange(DECILES)[:, None]
    by_decile = jax.tree.map(lambda s_V: jnp.sqrt(jnp.sum(jnp.where(member_10V, s_V[None], 0), axis=-1)), square_V)
    return {
        "input_grad_norm": norm.input,
        "output_grad_norm": norm.output,
        "output_grad_share": norm.output / (norm.input + norm.output),
        "role_grad_cosine": jnp.sum(role_grads.input * role_grads.output) / (norm.input * norm.output),
        "input_grad_norm_deciles": by_decile.input,
        "output_grad_norm_deciles": by_decile.output,
    }


def _precision(cfg: RunConfig, layout: Layout) -> contextlib.AbstractContextManager[Any]:
    """float32 means float32: accelerators would round the operands of its products."""
    if model.compute_dtype(cfg.model, layout) == jnp.float32:
        highest: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision("highest")
        return highest
    return contextlib.nullcontext()


def loss_and_gradients(cfg: RunConfig, layout: Layout = ONE_DEVICE) -> Callable[..., Any]:
    """The function (params, tokens_BS, role_scale) -> (mean loss, (gradient of params, role gradients, squares)).

    The mean is over all tokens of all microbatches, in nats, with z-loss. The gradient of params, the output bias left
    out, has the role scales in it, the role gradients, `Tables` of [V, D], do not. `squares` are sums of squares: of
    the mean loss's gradient with respect to the looked-up vectors of the whole batch, [B, T, D], and, of several
    microbatches, of each one's part of the role gradients.
    """
    scheme, parts = tying.scheme_of(cfg.tying), cfg.data.microbatches
    summed = accumulated(summed_loss(cfg, layout, cfg.train.z_loss), parts)

    def mean_loss(
        params: dict[str, Any],
        taps: Tables,
        squares: Squares,
        tokens_BS: jax.Array,
        role_scale: Tables,
        bias_V: jax.Array | None,
    ) -> jax.Array:
        tables = tying.split_gradient(scheme.tables(params["tables"]), taps, role_scale)
        total, weight = summed(tables, params["body"], tokens_BS, jnp.ones(tokens_BS.shape[0]), squares, bias_V)
        return total / weight

    def compute(params: dict[str, Any], tokens_BS: jax.Array, role_scale: Tables) -> Any:
        taps = tying.zero_taps(scheme.tables(params["tables"]))
        squares = Squares(jnp.zeros(()), Tables(jnp.zeros(()), jnp.zeros(())) if parts > 1 else None)
        gradient = jax.value_and_grad(mean_loss, argnums=(0, 1, 2))
        with _precision(cfg, layout):
            return gradient(trained(params), taps, squares, tokens_BS, role_scale, params.get(OUTPUT_BIAS))

    return compute


def anatomy(cfg: RunConfig, layout: Layout = ONE_DEVICE) -> Callable[..., dict[str, jax.Array]]:
    """The function (params, tokens_BS, body_update) -> metrics of the mean loss's gradient, with z-loss, at `params`.

    They are what `tying.pull_and_push` and `tying.common_mode` say of the output role's gradient and, unless
    `body_update` is None, `body_loss_change`: the inner product of the body's gradient with that tree, in nats, the
    first-order change of this batch's loss by that update. Microbatches are taken one after the other.
    """
    scheme, parts = tying.scheme_of(cfg.tying), cfg.data.microbatches
    total = loss_and_states(cfg, layout, cfg.train.z_loss)

    def compute(params: dict[str, Any], tokens_BS: jax.Array, body_update: Any) -> dict[str, jax.Array]:
        tables, body = scheme.tables(params["tables"]), params["body"]

        def loss_sum(U_VD: jax.Array, bias_V: jax.Array, body: Any, tokens_BS: jax.Array) -> Any:
            weights_B = jnp.ones(tokens_BS.shape[0])
            loss, *rest = total(Tables(tables.input, U_VD), body, tokens_BS, weights_B, None, bias_V)
            return loss, rest

        def sums(tokens_BS: jax.Array) -> dict[str, jax.Array]:
            gradient = jax.grad(loss_sum, argnums=(0, 1) if body_update is None else (0, 1, 2), has_aux=True)
            (G_VD, r_V, *d_body), (weight, h_BTD) = gradient(tables.output, bias_V, body, tokens_BS)
            options: dict[str, Any] = {"layout": layout, "gradient": cfg.model.table_gradient}
            products = [jax.tree.map(lambda g, update: jnp.sum(g * update), of_body, body_update) for of_body in d_body]
            return {
                "G_VD": G_VD,
                "pull_VD": -sums_by_token(h_BTD, tokens_BS[:, 1:], tables.output, **options),
                "r_V": r_V,
                "h_D": jnp.sum(h_BTD, axis=(0, 1), dtype=r_V.dtype),
                "weight": weight,
                "change": optax.tree.sum(products),
            }

        bias_V = params.get(OUTPUT_BIAS, jnp.zeros(len(tables.output), tables.output.dtype))
        batches = _cut(tokens_BS, parts)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sums, batches[0]))
        add = lambda carry, tokens_BS: (jax.tree.map(jnp.add, carry, sums(tokens_BS)), None)
        with _precision(cfg, layout):
            summed, _ = jax.lax.scan(add, start, batches)
        mean = {name: x / summed["weight"] for name, x in summed.items()}
        return {
            **tying.pull_and_push(mean["G_VD"], mean["pull_VD"]),
            **tying.common_mode(mean["G_VD"], mean["r_V"], mean["h_D"]),
            **({} if body_update is None else {"body_loss_change": mean["change"]}),
        }

    return compute


def decided(cfg: RunConfig, mesh: Mesh) -> RunConfig:
    """The config with `model.scan_layers` decided for the mesh's platform: it shapes the parameters."""
    if cfg.model.scan_layers is not None:
        return cfg
    # A loop compiles in the time of one layer; unrolled layers run faster, on a CPU much, and on a GPU, where a loop
    # copies what the backward pass needs into stacks and out of them, too.
    scan = cfg.model.layers >= (12 if Layout(mesh).platform == "tpu" else 32)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, scan_layers=scan))


def make_steps(cfg: RunConfig, mesh: Mesh) -> Steps:
    """Everything that runs on the devices for `cfg` on `mesh`; compiles when first called.

    Runs that differ only in what a step is given (seed, role scales, data source) share what was compiled. Raises
    UserError if the mesh does not divide a microbatch, or for options of a role that has no table of its own.
    """
    tying.refuse_options_of_roles(cfg)
    rows, split = cfg.data.batch_size // cfg.data.microbatches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % split:
        raise UserError(
            f"mesh: data x fsdp = {split} devices do not divide the {rows} sequences of a microbatch "
            f"(data.batch_size {cfg.data.batch_size} / data.microbatches {cfg.data.microbatches})"
        )
    return _make_steps(
        RunConfig(
            model=decided(cfg, mesh).model,
            tying=tying.without_scales(cfg.tying),
            optimizer=cfg.optimizer,
            data=DataConfig(batch_size=cfg.data.batch_size, microbatches=cfg.data.microbatches),
            train=TrainConfig(steps=cfg.train.steps, z_loss=cfg.train.z_loss),
        ),
        mesh,
    )


def _held(log_scale: jax.Array, share: jax.Array, wanted: float) -> jax.Array:
    """The next logarithm of the factor on the input role's gradient after an update with this share of the output's."""

    def odds(x: jax.Array) -> jax.Array:
        return jnp.log(x) - jnp.log1p(-x)

    most = math.log(MOST_HELD)
    next_scale = log_scale + HOLD_GAIN * (odds(jnp.clip(share, 1e-3, 1 - 1e-3)) - odds(jnp.asarray(wanted)))
    return jnp.clip(jnp.where(jnp.isfinite(share), next_scale, log_scale), -most, most)


@functools.lru_cache(maxsize=8)
def _make_steps(cfg: RunConfig, mesh: Mesh) -> Steps:
    scheme = tying.scheme_of(cfg.tying)
    layout = sharding.Layout(mesh)
    names, form = [parameter.name for parameter in scheme.parameters], tying.follow(cfg)
    optimizer = make_optimizer(cfg.optimizer, cfg.train.steps, layout, tables=names, follow=form)
    schedule = learning_rate(cfg.optimizer, cfg.train.steps)
    gradients = loss_and_gradients(cfg, layout)
    evaluation = summed_loss(cfg, layout, z_loss=0.0)
    followed = [name for name, rule in optimizer.tables.items() if rule.shared and rule.follows]
    sampled = min(tying.SAMPLE_ROWS, cfg.model.table_rows) if form == "rows" and followed else None
    wanted_share = cfg.tying.output_update_share

    def init(root: jax.Array, sample_S: jax.Array | None) -> TrainState:
        params = init_params(cfg, root)
        rows = tying.rows_of(form, cfg.model.table_rows, sample_S) if followed else None
        account = tying.opened(params["tables"], followed, form, rows)
        held = None if wanted_share is None else jnp.zeros(())
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained(params), rows), account, held)

    def unscaled_norm(grads: Any, params: Any, role_grads: Tables) -> jax.Array:
        tables = jax.vjp(scheme.tables, params["tables"])[1](role_grads)[0]
        return jnp.asarray(optax.tree.norm({"tables": tables, "body": grads["body"]}))

    def account_metrics(
        state: TrainState, raw: Tables, parts: dict[str, tying.Parts], new: TrainState
    ) -> dict[str, jax.Array]:
        """What the roles' updates were, and what the last ones did to the loss of this batch."""
        if not parts:
            return {}
        rows = state.account.rows if state.account else None
        before = optimizer.last_parts(state.opt_state, rows)
        change = tying.compromise(raw, before, state.params["tables"], rows)
        found = {name: jnp.where(state.step > 0, value, jnp.nan) for name, value in change.items()}
        for name in followed:
            share = optimizer.tables[name].input_step_share(new.opt_state.tables[name], rows)
            found |= {} if share is None else {"input_step_share": share}
        if new.account:
            found["account_error"] = tying.error(new.account, new.params["tables"])
        return found

    def train(
        state: TrainState, tokens_BS: jax.Array, role_scale: Tables, decile_V: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if state.held is not None:
            role_scale = role_scale._replace(input=jnp.exp(state.held) * role_scale.input)
        value, (grads, role_grads, squares) = gradients(state.params, tokens_BS, role_scale)
        with jax.named_scope("roles"):
            grad_norm = unscaled_norm(grads, state.params, role_grads)
            about_roles = role_metrics(role_grads, decile_V)
            if squares.roles is not None:
                norms = Tables(about_roles["input_grad_norm"], about_roles["output_grad_norm"])
                about_roles |= tying.signal_and_noise(norms, squares.roles, cfg.data.microbatches)
            # What is only observed is behind barriers: fused with the update it would change the update's last bits.
            role_grads = jax.lax.optimization_barrier(role_grads)
            scaled = jax.tree.map(lambda s, g: s.astype(g.dtype) * g, role_scale, role_grads)
            raw_by_role, scaled_by_role = (scheme.by_role(state.params["tables"], g) for g in (role_grads, scaled))
        with jax.named_scope("optimizer"):
            limit, raw = cfg.optimizer.clip_norm, cfg.optimizer.clip_by == "raw"
            clipped_norm = grad_norm if raw else jnp.asarray(optax.tree.norm(grads))
            updates, opt_state, parts = optimizer.update(
                grads,
                scaled_by_role,
                state.opt_state,
                trained(state.params),
                grad_norm=clipped_norm,
                rows=state.account.rows if state.account else None,
            )
            params = {**state.params, **optax.apply_updates(trained(state.params), updates)}
        with jax.named_scope("account"):
            about_updates = tying.update_metrics(parts) if parts else {}
            account = tying.advanced(state.account, parts) if state.account else None
            held = state.held
            if held is not None and wanted_share is not None:
                about_updates["held_input_scale"] = jnp.exp(held)
                held = _held(held, about_updates["output_update_share"], wanted_share)
            new = TrainState(state.step + 1, params, opt_state, account, held)
            about_updates |= account_metrics(state, raw_by_role, parts, new)
        metrics = {
            "loss": value,
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            **({"clip_factor": jnp.minimum(1.0, limit / clipped_norm)} if limit else {}),
            **about_roles,
            "activation_grad_norm": jnp.sqrt(squares.lookup),
            **about_updates,
        }
        return new, metrics

    def evaluate(params: Any, tokens_BS: jax.Array, weights_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        with _precision(cfg, layout):
            tables, bias_V = scheme.tables(params["tables"]), params.get(OUTPUT_BIAS)
            return evaluation(tables, params["body"], tokens_BS, weights_B, None, bias_V)

    # On a CPU the many small draws take twice as long to compile with all that LLVM can do, and run once.
    quick = {"xla_backend_optimization_level": 1} if layout.platform == "cpu" else None
    sample = None if sampled is None else jax.ShapeDtypeStruct((sampled,), jnp.int32)
    boxed = jax.eval_shape(init, jax.random.key(0), sample)
    placed, everywhere = sharding.shardings(boxed, mesh), sharding.replicated(mesh)
    batch = sharding.batch_sharding(mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), nn.unbox(boxed), placed
    )
    return Steps(
        init=jax.jit(
            lambda root, sample_S=None: nn.unbox(init(root, sample_S)), out_shardings=placed, compiler_options=quick
        ),
        train=jax.jit(
            train,
            donate_argnums=0,
            in_shardings=(placed, batch, everywhere, everywhere),
            out_shardings=(placed, everywhere),
        ),
        observe=jax.jit(anatomy(cfg, layout), in_shardings=(placed.params, batch, None), out_shardings=everywhere),
        evaluate=jax.jit(evaluate, in_shardings=(placed.params, batch, batch), out_shardings=everywhere),
        abstract=abstract,
        sampled=sampled,
        batch=batch,
        replicated=everywhere,
    )
