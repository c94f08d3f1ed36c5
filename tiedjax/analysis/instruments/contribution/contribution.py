"""Contribution: what each block adds to the residual stream, and what held-out text costs without it.

A block is one decoder layer. It reads a state x of the stream and adds a + m to it: its attention reads x and adds a,
its MLP reads x + a and adds m. Of the whole block and of each of its two parts:

    added       |added| / |read|, L2 norms of one position's vectors
    skip_cost   bits that a held-out token costs more where the part adds nothing

What comes after a skipped part reads a stream that training never showed it: `skip_cost` is that of taking the part out
of the finished model, not of training without it.

The blocks are `tiedjax.model`'s own, each run by itself with its parameters; what is skipped is multiplied by 0 on its
way into the stream. Axes: W windows, S = T + 1 tokens, B windows of a batch, L blocks, P parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tiedjax.analysis.basis.held_out import FrozenModel, batches, chunks, first_third, held_out_windows, over_windows
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.config import ModelConfig
from tiedjax.data.prepared import Prepared
from tiedjax.model import Block, Transformer

HELD_OUT_TOKENS = 4096
PARTS = ("whole", "attention", "mlp")


@dataclass(frozen=True)
class Part:
    """What a block, or its attention or MLP alone, contributes: means over positions, intervals over windows.

    A window in which it reads a vector of zeros does not count in `added`.
    """

    added: Interval
    skip_cost: Interval


@dataclass(frozen=True)
class BlockContribution:
    """One block, counted from 1."""

    block: int
    whole: Part
    attention: Part
    mlp: Part


@dataclass(frozen=True)
class Contribution:
    """Every block of one model; `loss` is that of the whole model, bits per held-out token."""

    loss: Interval
    blocks: list[BlockContribution]
    held_out_tokens: int
    held_out_windows: int


@dataclass(frozen=True)
class RunContribution(Contribution):
    """The blocks of a run's model at its last full checkpoint."""

    step: int | None
    rows: int
    width: int


def measure(
    model: FrozenModel, run: Any, prepared: Prepared, *, held_out_tokens: int = HELD_OUT_TOKENS
) -> RunContribution:
    """The contribution of every block of a run's model, on about `held_out_tokens` that the run was not trained on."""
    rows, width = model.U_VD.shape
    tokens_WS = held_out_windows(prepared, run.seq_len, held_out_tokens)
    return RunContribution(**vars(contribution(model, tokens_WS)), step=model.step, rows=rows, width=width)


def contribution(model: FrozenModel, tokens_WS: np.ndarray) -> Contribution:
    """The contribution of every block on windows, int [W, T + 1]."""
    layers = layers_of(model)
    by_batch = []
    for tokens_BS, windows in batches(tokens_WS):
        by_batch.append([values[..., :windows, :] for values in _measured(model, layers, tokens_BS)])
    bits_WT, added_LPWT, cost_LPWT = (np.concatenate(values, axis=-2) for values in zip(*by_batch, strict=True))
    mean = lambda values_WT: over_windows(values_WT, len(tokens_WS))
    part = lambda added_WT, cost_WT: Part(mean(added_WT), mean(cost_WT))
    blocks = [
        BlockContribution(i + 1, *map(part, added_PWT, cost_PWT))
        for i, (added_PWT, cost_PWT) in enumerate(zip(added_LPWT, cost_LPWT, strict=True))
    ]
    return Contribution(mean(bits_WT), blocks, bits_WT.size, len(tokens_WS))


def early_blocks(blocks: int) -> range:
    """The blocks of the first third, counted from 1."""
    return range(1, first_third(blocks) + 1)


def layers_of(model: FrozenModel) -> list[Any]:
    """The parameters of every block, in order, however the run holds them."""
    params, layers = model.body["params"], range(model.config.layers)
    if model.config.scan_layers:
        return [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in layers]
    return [params[f"layer_{i}"] for i in layers]


def _measured(model: FrozenModel, layers: list[Any], tokens_BS: np.ndarray) -> tuple[np.ndarray, ...]:
    """Bits of every next token [B, T]; what each part of each block adds, and what skipping it costs: [L, P, B, T]."""
    windows = model.config.windows
    # Only initialisation and the window ask which layer a block is: those that share a window share a program.
    blocks = [
        functools.partial(_block, model.config, windows.index(window), layer)
        for window, layer in zip(windows, layers, strict=True)
    ]
    states, added = [model.embedded(tokens_BS[:, :-1])], []
    for block in blocks:
        x_BTD, added_PBT = block(states[-1], 1.0, 1.0)
        states.append(x_BTD)
        added.append(added_PBT)
    bits_BT = _bits(model, states.pop(), tokens_BS)
    costs = []
    for i, (block, x_BTD) in enumerate(zip(blocks, states, strict=True)):
        without = x_BTD, block(x_BTD, 0.0, 1.0)[0], block(x_BTD, 1.0, 0.0)[0]
        for y_BTD in without:
            for later in blocks[i + 1 :]:
                y_BTD, _ = later(y_BTD, 1.0, 1.0)
            costs.append(_bits(model, y_BTD, tokens_BS) - bits_BT)
    return bits_BT, np.stack(added), np.reshape(costs, (len(layers), len(PARTS), *bits_BT.shape))


def _bits(model: FrozenModel, x_BTD: jax.Array, tokens_BS: np.ndarray) -> np.ndarray:
    """What each next token costs, read off the last state x: float64 [B, T]."""
    y_ND, target_N = model.normed(x_BTD.reshape(-1, x_BTD.shape[-1])), tokens_BS[:, 1:].reshape(-1)
    parts = [_surprisal(model.log_probabilities(y_ND[chunk]), target_N[chunk]) for chunk in chunks(len(target_N))]
    return np.concatenate(parts).astype(np.float64).reshape(len(tokens_BS), -1)


@jax.jit
def _surprisal(log_p_CV: jax.Array, target_C: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p_CV, target_C[:, None], axis=-1)[:, 0] / np.log(2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(
    cfg: ModelConfig,
    number: int,
    layer: Any,
    x_BTD: jax.Array,
    attention: jax.typing.ArrayLike,
    mlp: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """The state after a block whose parts add `attention` and `mlp` times what they do, and what is added [P, B, T]."""
    # Of the names of what gives a part that is added.
    ends = {"pre": "", "post": "_norm", "both": "_post_norm"}[cfg.norm_place]
    factors, outputs = {f"attention{ends}": attention, f"mlp{ends}": mlp}, {}

    def scaled(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        name = context.module.name
        if name not in factors or context.method_name != "__call__":
            return call(*args, **kwargs)
        outputs[name] = factors[name] * call(*args, **kwargs)
        return outputs[name]

    module = Block(cfg, number, x_BTD.dtype, Transformer(cfg).layout)
    with jax.default_matmul_precision("highest"), nn.intercept_methods(scaled):
        y_BTD, _ = module.apply({"params": layer}, x_BTD)
    ratio = lambda added_BTD, read_BTD: jnp.linalg.norm(added_BTD, axis=-1) / jnp.linalg.norm(read_BTD, axis=-1)
    by_attention_BTD, by_mlp_BTD = (outputs[name] for name in factors)
    by_part = [
        ratio(y_BTD - x_BTD, x_BTD),
        ratio(by_attention_BTD, x_BTD),
        ratio(by_mlp_BTD, x_BTD + by_attention_BTD),
    ]
    return y_BTD, jnp.stack(by_part)
