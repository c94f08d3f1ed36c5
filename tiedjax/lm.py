"""The language model as a whole: its parameters, and its loss as a function of the two tables and the body."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from tiedjax import loss, model, tying
from tiedjax.config import RunConfig
from tiedjax.lookup import lookup
from tiedjax.rng import key_for
from tiedjax.sharding import Layout
from tiedjax.tying import Tables


class Squares(NamedTuple):
    """A tap: float32 zeros that no forward pass reads, whose gradients are sums of squares of other gradients.

    Attributes:
      lookup: of the gradient of the looked-up vectors, [B, T, D].
      roles: of each role gradient of each microbatch, `Tables` of [V, D]; None observes none.
    """

    lookup: Any
    roles: Tables | None = None


class SummedLoss(Protocol):
    """A batch's (sum of the weighted losses, sum of the weights); S = T + 1; `bias_V` is added to the logits.

    `rare_R` and `push_RD` are as in `cross_entropy`.
    """

    def __call__(
        self,
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None = None,
        bias_V: jax.Array | None = None,
        rare_R: jax.Array | None = None,
        push_RD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]: ...


OUTPUT_BIAS = "output_bias"


def trained(params: dict[str, Any]) -> dict[str, Any]:
    """What training updates of the parameters, boxed or not: all but the output bias and arrays of integers."""
    numbers = {
        name: array
        for name, array in params["tables"].items()
        if jnp.issubdtype(jax.tree.leaves(array)[0].dtype, jnp.floating)
    }
    return {"tables": numbers, "body": params["body"]}


def with_trained(params: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The parameters with `new` in place of what training updates."""
    return {**params, **new, "tables": {**params["tables"], **new["tables"]}}


def init_params(cfg: RunConfig, root: jax.Array, unshared_S: Any = None) -> dict[str, Any]:
    """{"tables", "body"} boxed with logical axes; the body's key does not depend on the scheme.

    `unshared_S` are the rows that the roles do not share, of a scheme that shares some and not others. With
    model.output_bias also "output_bias", float32 [V] of zeros: a run puts what its text says in their place.
    """
    V, D = cfg.model.table_rows, cfg.model.d_model

    def law(name: str) -> tying.Law:
        return model.truncated_normal(cfg.optimizer.tables.of(name).init_std or D**-0.5)

    params: dict[str, Any] = {
        "tables": tying.init_tables(tying.scheme_of(cfg.tying), tying.Start(root, (V, D), law, unshared_S)),
        "body": model.init_body(cfg.model, key_for(root, "body")),
    }
    if cfg.model.output_bias != "none":
        params[OUTPUT_BIAS] = nn.LogicallyPartitioned(jnp.zeros(V), names=("vocab",))
    return params


def abstract_params(cfg: RunConfig) -> dict[str, Any]:
    """The shapes and dtypes of `init_params`, unboxed; traced once for runs of one model and scheme."""
    return _abstract_params(RunConfig(model=cfg.model, tying=tying.without_scales(cfg.tying)))


@functools.lru_cache(maxsize=8)
def _abstract_params(cfg: RunConfig) -> dict[str, Any]:
    return dict(nn.unbox(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))))


def summed_loss(cfg: RunConfig, layout: Layout, z_loss: float) -> SummedLoss:
    """The loss of the whole model on the tables that a scheme provides."""
    with_states = loss_and_states(cfg, layout, z_loss)

    def total(
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None = None,
        bias_V: jax.Array | None = None,
        rare_R: jax.Array | None = None,
        push_RD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        loss_sum, weight, _ = with_states(tables, body, tokens_BS, weights_B, tap, bias_V, rare_R, push_RD)
        return loss_sum, weight

    return total


def loss_and_states(cfg: RunConfig, layout: Layout, z_loss: float) -> Callable[..., tuple[jax.Array, ...]]:
    """The function of the arguments of `SummedLoss` that gives its two sums, and h_BTD."""
    transformer, dtype = model.Transformer(cfg.model, layout), model.compute_dtype(cfg.model, layout)
    options: dict[str, Any] = {"layout": layout, "gradient": cfg.model.table_gradient}

    def total(
        tables: Tables,
        body: Any,
        tokens_BS: jax.Array,
        weights_B: jax.Array,
        tap: Squares | None = None,
        bias_V: jax.Array | None = None,
        rare_R: jax.Array | None = None,
        push_RD: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        inputs_BT, targets_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
        lookup_tap, role_taps = tap or (None, None)
        if role_taps is not None:
            tables = tying.tap_squares(tables, role_taps)
        h_BTD: Any = transformer.apply(body, lookup(tables.input, inputs_BT, dtype, lookup_tap, **options))
        weights_BT = jnp.broadcast_to(weights_B[:, None], targets_BT.shape)
        about_output: dict[str, Any] = {"bias_V": bias_V, "rare_R": rare_R, "push_RD": push_RD, "z_loss": z_loss}
        about_output["soft_cap"] = cfg.model.logit_cap
        sums = loss.cross_entropy(h_BTD, tables.output, targets_BT, weights_BT, **about_output, **options)
        return *sums, h_BTD

    return total
