"""The gradient of a batch's mean loss: split by role, and what the output role's is made of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tiedjax import model, tying
from tiedjax.config import RunConfig
from tiedjax.lm import OUTPUT_BIAS, Squares, SummedLoss, loss_and_states, summed_loss, trained, with_trained
from tiedjax.lookup import sums_by_token
from tiedjax.sharding import ONE_DEVICE, Layout
from tiedjax.tying import RareGate, Tables

DECILES = 10


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
    gradient = jax.value_and_grad(total, argnums=(0, 1, 4, 7), has_aux=True)

    cut = functools.partial(_cut, parts=parts)

    @jax.custom_vjp
    def summed(
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None = None,
        bias_V: jax.Array | None = None,
        rare_R: jax.Array | None = None,
        push_RD: jax.Array | None = None,
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
        rare_R: jax.Array | None,
        push_RD: jax.Array | None,
    ) -> Any:
        about_output = bias_V, rare_R, push_RD

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            (loss_sum, weight), grads = gradient(tables, body, *part, tap, *about_output)
            return jax.tree.map(jnp.add, carry, ((loss_sum, weight), grads)), None

        # The sums start with the dtypes that `total` gives, which are wider than those of its activations.
        one = slice(tokens_BS.shape[0] // parts)
        shapes = jax.eval_shape(gradient, tables, body, tokens_BS[one], weights_B[one], tap, *about_output)
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[0])
        start = (sums, jax.tree.map(jnp.zeros_like, (tables, body, tap, push_RD)))
        return jax.lax.scan(add, start, (cut(tokens_BS), cut(weights_B)))[0]

    def backward(grads: Any, cotangents: Any) -> Any:
        tables, body, squares, push_RD = grads
        # All that is left is to scale: the gradients are linear in the loss's cotangent, the tap's sums of squares go
        # by its square, and the weights' sum depends on no parameter.
        linear = tables, body, push_RD
        tables, body, push_RD = jax.tree.map(lambda g: cotangents[0].astype(g.dtype) * g, linear)
        squares = jax.tree.map(lambda s: jnp.square(cotangents[0]) * s, squares)
        return tables, body, None, None, squares, None, None, push_RD

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


def precision(cfg: RunConfig, layout: Layout) -> contextlib.AbstractContextManager[Any]:
    """float32 means float32: accelerators would round the operands of its products."""
    if model.compute_dtype(cfg.model, layout) == jnp.float32:
        highest: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision("highest")
        return highest
    return contextlib.nullcontext()


def loss_and_gradients(cfg: RunConfig, layout: Layout = ONE_DEVICE) -> Callable[..., Any]:
    """The function (params, tokens_BS, role_scale) -> (mean loss, (gradient of params, role gradients, squares)).

    The mean is over all tokens of all microbatches, in nats, with z-loss. The gradient of what is trained of params
    has the role scales in it, the role gradients, `Tables` of [V, D], do not. `squares` are sums of squares: of
    the mean loss's gradient with respect to the looked-up vectors of the whole batch, [B, T, D], and, of several
    microbatches, of each one's part of the role gradients. A fourth argument is the `tying.RareGate`, through which the
    output role's gradient goes before it is scaled; with it a fourth gradient is that, as the gate leaves it, [V, D].
    """
    scheme, parts = tying.scheme_of(cfg.tying), cfg.data.microbatches
    summed = accumulated(summed_loss(cfg, layout, cfg.train.z_loss), parts)

    def mean_loss(
        numbers: dict[str, Any],
        taps: Tables,
        squares: Squares,
        gated_VD: jax.Array | None,
        params: dict[str, Any],
        tokens_BS: jax.Array,
        role_scale: Tables,
        gate: RareGate | None,
    ) -> jax.Array:
        tables = scheme.tables(with_trained(params, numbers)["tables"])
        rare: tuple[jax.Array, ...] = ()
        if gate is None:
            tables = tying.split_gradient(tables, taps, role_scale)
        else:  # what goes backward is observed first, then gated, then scaled
            tables = tying.split_gradient(tables, None, role_scale)
            U_VD, push_RD = tying.gate_push(tables.output, gated_VD, gate)
            tables = tying.split_gradient(tables._replace(output=U_VD), taps, None)
            rare = gate.rows_R, push_RD
        weights_B, bias_V = jnp.ones(tokens_BS.shape[0]), params.get(OUTPUT_BIAS)
        total, weight = summed(tables, numbers["body"], tokens_BS, weights_B, squares, bias_V, *rare)
        return total / weight

    def compute(params: dict[str, Any], tokens_BS: jax.Array, role_scale: Tables, gate: RareGate | None = None) -> Any:
        taps = tying.zero_taps(scheme.tables(params["tables"]))
        squares = Squares(jnp.zeros(()), Tables(jnp.zeros(()), jnp.zeros(())) if parts > 1 else None)
        gated_VD = None if gate is None else taps.output
        gradient = jax.value_and_grad(mean_loss, argnums=(0, 1, 2) if gate is None else (0, 1, 2, 3))
        with precision(cfg, layout):
            return gradient(trained(params), taps, squares, gated_VD, params, tokens_BS, role_scale, gate)

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
        with precision(cfg, layout):
            summed, _ = jax.lax.scan(add, start, batches)
        mean = {name: x / summed["weight"] for name, x in summed.items()}
        return {
            **tying.pull_and_push(mean["G_VD"], mean["pull_VD"]),
            **tying.common_mode(mean["G_VD"], mean["r_V"], mean["h_D"]),
            **({} if body_update is None else {"body_loss_change": mean["change"]}),
        }

    return compute
