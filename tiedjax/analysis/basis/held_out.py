"""A trained model run over windows of text: its hidden states, and what any of them predicts once it is unembedded.

Everything is computed in float32 at full precision, whatever the run was trained in, so that a run measures the same on
every machine. Axes: W windows, S = T + 1 tokens, N positions laid flat, C a chunk of them, L + 1 hidden states.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tiedjax import tying
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tables import Table
from tiedjax.config import ModelConfig
from tiedjax.data.batches import Batches, eval_batches
from tiedjax.data.prepared import Prepared
from tiedjax.errors import UserError
from tiedjax.lm import OUTPUT_BIAS
from tiedjax.lookup import lookup
from tiedjax.model import Entry, Norm, Transformer, capped, multiplied
from tiedjax.run import RunTables

CHUNK = 512  # positions whose logits [C, V] are held at once
_FORWARD = 4096  # positions that go through the body at once, rounded to whole windows

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Reading:
    """KL(final || predictor) and the predictor's cross-entropy with the next token: bits, intervals over windows."""

    kl: Interval
    cross_entropy: Interval


class FrozenModel:
    """A run's parameters at its last full checkpoint (or that of `step`), or those of a `ModelOnText`, to be read.

    Without an output bias it has 0 for it. `step` is None of a model, which has no steps. UserError when the run holds
    no such checkpoint.
    """

    def __init__(self, run: Any, step: int | None = None) -> None:
        params = run.params(step)
        self.step: int | None = next(iter(run.checkpoint_steps[-1:]), None) if step is None else step
        tables = run.scheme(self.step).tables(params["tables"])
        self._hold(RunTables(tables.input, tables.output, tables.input is tables.output))
        self.config: ModelConfig = dataclasses.replace(
            run.config.model, dtype="float32", remat="none", attention="auto"
        )
        self.body = jax.device_put(params["body"])
        self.bias_V = jnp.asarray(params.get(OUTPUT_BIAS, np.zeros(len(self.U_VD), np.float32)))
        self.norm: dict[str, Any] = self.body["params"].get("final_norm", {})

    def _hold(self, tables: RunTables) -> None:
        self.tables = tables
        self.U_VD = jax.device_put(np.asarray(tables.output, np.float32))
        self.E_VD = self.U_VD if tables.tied else jax.device_put(np.asarray(tables.input, np.float32))

    def with_tables(self, tables: tying.Tables) -> FrozenModel:
        """The same body between other tables, [V, D] each."""
        other = copy.copy(self)
        other._hold(RunTables(tables.input, tables.output, tables.input is tables.output))
        return other

    def describe(self, name: str) -> list[dict[str, Any]]:
        """Its distinct tables as every result states its inputs."""
        return [Table(name, values, role).describe() for role, values in tying.distinct(self.tables).items()]

    def last_states(self, tokens_WS: np.ndarray) -> np.ndarray:
        """The last state at every input position, float32 [N, D]: all that the final prediction needs."""
        x_1ND = self.states(tokens_WS, slice(-1, None))
        return np.asarray(x_1ND[0])

    def states(self, tokens_WS: np.ndarray, selection: slice = slice(None)) -> np.ndarray:
        """The states of the residual stream (or `selection` of them) at every input position: float32 [L + 1, N, D].

        N = W T.
        """
        return np.concatenate(list(self.parts_of_states(tokens_WS, selection)), axis=1)

    def parts_of_states(self, tokens_WS: np.ndarray, selection: slice = slice(None)) -> Iterator[np.ndarray]:
        """The same, a few whole windows at a time."""
        for tokens_BS, windows in batches(tokens_WS):
            x_LND = np.asarray(_states(self.config, self.body, self.E_VD, tokens_BS[:, :-1]))
            yield x_LND[selection, : windows * (tokens_BS.shape[1] - 1)]

    def bits(self, tokens_WS: np.ndarray) -> np.ndarray:
        """What every target of windows [W, T + 1] costs the model: bits, float64 [W, T]."""
        targets_WT = np.asarray(tokens_WS)[:, 1:]
        target_N, parts = targets_WT.reshape(-1), []
        for x_1ND in self.parts_of_states(tokens_WS, slice(-1, None)):
            of_part_N, target_N = np.split(target_N, [x_1ND.shape[1]])
            parts.append(self.bits_of(x_1ND[0], of_part_N))
        return np.concatenate(parts).reshape(targets_WT.shape)

    def bits_of(self, last_ND: np.ndarray, target_N: np.ndarray) -> np.ndarray:
        """What targets cost where the last states are known, which the output table alone reads: bits, float64 [N]."""
        of = (self.config, self.norm)
        parts = [_model_bits(*of, last_ND[c], self.U_VD, self.bias_V, target_N[c]) for c in chunks(len(target_N))]
        return np.concatenate([np.asarray(bits_C, np.float64) for bits_C in parts])

    def embedded(self, tokens_BT: Any) -> jax.Array:
        """What enters the first layer for these tokens: float32 [B, T, D]."""
        x_BTD = lookup(self.E_VD, jnp.asarray(tokens_BT), self.E_VD.dtype)
        entered: Any = Entry(self.config, x_BTD.dtype).apply({"params": self.body["params"].get("entry", {})}, x_BTD)
        return jnp.asarray(entered)

    def normed(self, x_ND: Any) -> jax.Array:
        """The final norm of hidden states: what the output table is multiplied with."""
        y_ND: jax.Array = final_norm(self.config, self.norm, jnp.asarray(x_ND))
        return y_ND

    def log_probabilities(self, y_CD: Any) -> jax.Array:
        """log softmax(y U^T + bias) in nats, [C, V], of normed states; y U^T under the model's cap."""
        log_p_CV: jax.Array = log_probabilities(self.config, jnp.asarray(y_CD), self.U_VD, self.bias_V)
        return log_p_CV


def record_of(study: StudyRuns, run: Any, measure: Callable[[FrozenModel, Any, Prepared], Any]) -> dict[str, Any]:
    """What `measure` finds of a run's model, the run and its text, as a record of a study; or why there is none."""
    try:
        prepared = study.text(run)
        return dict(to_plain(measure(FrozenModel(run), run, prepared)))
    except UserError as error:
        return {"not_measured": str(error)}


def training_windows(run: Any, prepared: Prepared, tokens: int) -> Iterator[np.ndarray]:
    """The windows that the run was trained on, in its order, each once: int32 [W, T + 1] a batch, `tokens` at most.

    At least one window.
    """
    data, T = run.config.data, run.config.model.seq_len
    batches = Batches(prepared, T, data.batch_size, run.config.train.seed, workers=1)
    epoch = len(prepared.windows("train", T))
    remaining = min(max(1, tokens // T), run.config.train.steps * data.batch_size, epoch)
    for step in itertools.count():
        if remaining <= 0:
            return
        yield batches.at(step)[:remaining]
        remaining -= data.batch_size


def held_out_windows(prepared: Prepared, seq_len: int, tokens: int) -> np.ndarray:
    """About `tokens` held-out tokens in windows evenly spaced over their split, int32 [W, T + 1]."""
    if tokens < 1:
        raise UserError(f"held_out_tokens: must be at least 1, got {tokens}")
    windows = prepared.windows("eval", seq_len)
    count = min(max(1, tokens // seq_len), len(windows))
    return windows.read(np.arange(count) * len(windows) // count)


def evaluated_windows(run: Any, prepared: Prepared) -> np.ndarray:
    """The held-out windows on which the run's own `eval_loss` is taken: int32 [W, T + 1].

    First those with even numbers, then, from the place (W + 1) // 2 on, those with odd ones.
    """
    cfg = run.config
    parts = eval_batches(prepared, cfg.model.seq_len, cfg.data.batch_size, limit=cfg.train.eval_batches)
    return np.concatenate([tokens_BS[weight_B > 0] for _, tokens_BS, weight_B in parts])


def batches(tokens_WS: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Windows [W, T + 1] in batches of one shape that go through the body at once, the last filled up with zeros.

    With each batch, how many of its windows are among those given.
    """
    tokens_WS = np.asarray(tokens_WS)
    rows = max(1, min(len(tokens_WS), _FORWARD // (tokens_WS.shape[1] - 1)))
    for start in range(0, len(tokens_WS), rows):
        part_BS = tokens_WS[start : start + rows]
        yield np.pad(part_BS, ((0, rows - len(part_BS)), (0, 0))), len(part_BS)


def first_third(layers: int) -> int:
    """How many of a model's layers are early ones: a third of them, rounded down."""
    return layers // 3


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK that cover `count` positions."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def readings(
    model: FrozenModel,
    last_ND: np.ndarray,
    tokens_WS: np.ndarray,
    predictors: Mapping[Key, Callable[[slice], jax.Array]],
) -> dict[Key, Reading]:
    """Each predictor beside the model's final prediction, which its last hidden states make, on windows [W, T + 1].

    A predictor gives log-probabilities in nats, [C, V] or [1, V], of a slice of the N = W T positions.
    """
    bits = bits_by_predictor(model, last_ND, tokens_WS, predictors)
    return {key: Reading(*(over_windows(b_N, len(tokens_WS)) for b_N in both)) for key, both in bits.items()}


def bits_by_predictor(
    model: FrozenModel,
    last_ND: np.ndarray,
    tokens_WS: np.ndarray,
    predictors: Mapping[Key, Callable[[slice], jax.Array]],
) -> dict[Key, np.ndarray]:
    """As `readings`, position by position: KL and cross-entropy, float64 [2, N]."""
    target_N = np.asarray(tokens_WS)[:, 1:].reshape(-1)
    parts: dict[Key, list[Any]] = {key: [] for key in predictors}
    for chunk in chunks(len(target_N)):
        final_CV = model.log_probabilities(model.normed(last_ND[chunk]))
        for key, predictor in predictors.items():
            parts[key].append(jnp.stack(compare(final_CV, predictor(chunk), target_N[chunk])))
    return {key: np.concatenate([np.asarray(b, np.float64) for b in part], axis=1) for key, part in parts.items()}


def over_windows(bits_N: np.ndarray, windows: int) -> Interval:
    """The mean with its interval over whole windows, which are equally long, by `bootstrap_mean`."""
    return bootstrap_mean(np.reshape(bits_N, (windows, -1)).mean(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _states(cfg: ModelConfig, body: Any, E_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        embedded_BTD = lookup(E_VD, tokens_BT, E_VD.dtype)
        states: Any = Transformer(cfg).apply(body, embedded_BTD, hidden_states=True)[1]
    return jnp.reshape(states, (states.shape[0], -1, states.shape[-1]))


@functools.partial(jax.jit, static_argnums=0)
def final_norm(cfg: ModelConfig, params: Any, x_ND: jax.Array) -> jax.Array:
    """The model's last normalisation, with its scale where it has one, times `model.output_multiplier`."""
    y_ND: Any = Norm(cfg.norm, cfg.norm_eps, x_ND.dtype, biased=cfg.norm_bias).apply({"params": params}, x_ND)
    return multiplied(cfg, "output", jnp.asarray(y_ND))


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(cfg: ModelConfig, y_CD: jax.Array, U_VD: jax.Array, bias_V: jax.Array) -> jax.Array:
    """log softmax(y U^T + bias) in nats, [C, V]; y U^T under `model.logit_cap`."""
    return jax.nn.log_softmax(logits(cfg, y_CD, U_VD, bias_V))


def logits(cfg: ModelConfig, y_CD: jax.Array, U_VD: jax.Array, bias_V: jax.Array) -> jax.Array:
    """What the softmax takes of normed states, [C, V]."""
    return capped(cfg, jnp.matmul(y_CD, U_VD.T, precision="highest")) + bias_V[None]


@jax.jit
def compare(final_CV: jax.Array, predictor_CV: jax.Array, target_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(final || predictor) and the predictor's cross-entropy with the targets, both in bits per position.

    All are log-probabilities in nats; `predictor_CV` may be [1, V], one distribution for all positions.
    """
    predictor_CV = jnp.broadcast_to(predictor_CV, final_CV.shape)
    kl_C = jnp.sum(jnp.exp(final_CV) * (final_CV - predictor_CV), axis=-1)
    nll_C = -jnp.take_along_axis(predictor_CV, target_C[:, None], axis=-1)[:, 0]
    return kl_C / np.log(2), nll_C / np.log(2)


@functools.partial(jax.jit, static_argnums=0)
def _model_bits(
    cfg: ModelConfig, norm: Any, x_CD: jax.Array, U_VD: jax.Array, bias_V: jax.Array, target_C: jax.Array
) -> jax.Array:
    """What the targets cost the model whose last states are x, [C]."""
    logits_CV = logits(cfg, final_norm(cfg, norm, x_CD), U_VD, bias_V)
    at_target_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
    return jnp.asarray((jax.nn.logsumexp(logits_CV, axis=-1) - at_target_C) / np.log(2))
