"""What a trained model writes: one token after the other, drawn from its prediction, each read once into a cache.

Everything is computed in float32 at full precision, whatever the run was trained in. Axes: B texts, T positions of the
model, P tokens of a prompt, N tokens of a text, V ids.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tiedjax.config import ModelConfig
from tiedjax.data.tokenizer import end_id, load_tokenizer
from tiedjax.errors import UserError
from tiedjax.lm import OUTPUT_BIAS
from tiedjax.lookup import lookup
from tiedjax.model import CACHE, Transformer, capped, empty_cache
from tiedjax.run import Run
from tiedjax.tying import Tables

_HOTTEST = 1000  # where all tokens are as likely for any model


def sample_text(
    run: Run, prompt: str = "", *, tokens: int = 100, temperature: float = 1.0, seed: int = 0, step: int | None = None
) -> str:
    """`prompt` and the text that the run's model writes after it, `tokens` long; of the last checkpoint or of `step`.

    A prompt begins a document: the model first reads the token that separates documents, which is not returned. Bytes
    that are no UTF-8 become U+FFFD. A run without a tokenizer takes no prompt: its model first reads the token that it
    was shown most often, and what it writes is ids in brackets, "[7] [300]". The same seed gives the same text.
    UserError for a run without that checkpoint, and for options out of range.
    """
    _refuse(tokens, temperature)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be 0 to 2^32 - 1, got {seed}")
    if prompt and run.tokenizer_path is None:
        raise UserError(f"prompt: {run.path} has no tokenizer to read it with; leave it out")
    first, tokenizer = text_start(run)
    start = [first]
    if tokenizer:
        start += tokenizer.encode(_unicode(prompt), add_special_tokens=False).ids
    params = jax.device_put(run.params(step))
    tables = run.scheme(run.checkpoint_steps[-1] if step is None else step).tables(params["tables"])
    drawn_1N = continue_tokens(
        run.config.model,
        tables,
        params["body"],
        [start],
        tokens,
        bias_V=params.get(OUTPUT_BIAS),
        temperature=temperature,
        key=jax.random.key(seed),
    )
    ids = [*start[1:], *drawn_1N[0].tolist()]
    return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(f"[{i}]" for i in ids)


def text_start(run: Run) -> tuple[int, Any]:
    """The token that a run's model reads before all others where a text begins, and its tokenizer or None.

    It is the one that separates documents; without a tokenizer, the one that the model was shown most often. UserError
    for a tokenizer without such a token.
    """
    path = run.tokenizer_path
    if path is None:
        return int(run.token_counts[0].argmax()), None
    tokenizer = load_tokenizer(path)
    return end_id(tokenizer, str(path)), tokenizer


def continue_tokens(
    cfg: ModelConfig,
    tables: Tables,
    body: Any,
    prompt_BP: npt.ArrayLike,
    count: int,
    *,
    bias_V: npt.ArrayLike | None = None,
    temperature: float = 1.0,
    key: jax.Array,
) -> npt.NDArray[np.int32]:
    """`count` tokens after each of B prompts of equal length: int32 [B, count], ids below `cfg.vocab_size`.

    They are drawn from softmax(logits / temperature); at temperature 0 each is the likeliest. `tables` are [V, D] each,
    `body` is the Flax variables and `bias_V` is added to the logits, on devices or not: `Run.params` through its
    scheme. As in training the model reads
    at most T = `cfg.seq_len` tokens: a text that has grown longer it begins again from its last max(1, T // 2).
    UserError for no prompt, for ids that the model does not know, and for options out of range.
    """
    _refuse(count, temperature)
    try:
        tokens_BN = np.asarray(prompt_BP)
    except ValueError:  # of NumPy, for rows of several lengths
        raise UserError("prompt: must be ids [B, P], prompts of equal length") from None
    if tokens_BN.size and (tokens_BN.ndim != 2 or tokens_BN.dtype.kind not in "iu"):
        raise UserError(f"prompt: must be ids [B, P], got {tokens_BN.dtype} {list(tokens_BN.shape)}")
    if not tokens_BN.size:
        raise UserError("prompt: must hold at least one token")
    if tokens_BN.min() < 0 or tokens_BN.max() >= cfg.vocab_size:
        wrong = tokens_BN[(tokens_BN < 0) | (tokens_BN >= cfg.vocab_size)][0]
        raise UserError(f"prompt: token id {wrong} does not fit model.vocab_size {cfg.vocab_size}")
    tokens_BN = tokens_BN.astype(np.int32)
    B, P = tokens_BN.shape
    cfg = dataclasses.replace(cfg, dtype="float32", remat="none")
    body, tables = jax.device_put(body), Tables(*map(jnp.asarray, tables))
    bias_V = jnp.zeros(len(tables.output)) if bias_V is None else jnp.asarray(bias_V)
    cache, read, unread = empty_cache(cfg, B, cfg.seq_len), 0, P
    for number in range(count):
        if read + unread > cfg.seq_len:
            cache, read, unread = empty_cache(cfg, B, cfg.seq_len), 0, max(1, cfg.seq_len // 2)
        drawn_B, cache = _next(cfg, tables, bias_V, body, cache, tokens_BN[:, -unread:], temperature, key, number)
        tokens_BN = np.concatenate([tokens_BN, np.asarray(drawn_B)[:, None]], axis=1)
        read, unread = read + unread, 1
    return tokens_BN[:, P:]


def draw(logits_BV: jax.Array, temperature: Any, key: jax.Array) -> jax.Array:
    """One id for each row, int32 [B], from softmax(logits / temperature); the first of the largest at temperature 0."""
    # Less their maximum the logits do not overflow, however small the temperature is.
    falls_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, jnp.finfo("float32").tiny)
    drawn_B = jax.random.categorical(key, falls_BV)
    return jnp.where(temperature > 0, drawn_B, logits_BV.argmax(axis=-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _next(
    cfg: ModelConfig,
    tables: Tables,
    bias_V: jax.Array,
    body: Any,
    cache: Any,
    tokens_BT: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
    number: jax.Array,
) -> tuple[jax.Array, Any]:
    """The token that follows `tokens_BT`, which follow those in the cache, int32 [B]; the cache that holds them too."""
    with jax.default_matmul_precision("highest"):
        x_BTD = lookup(tables.input, tokens_BT, tables.input.dtype)
        h_BTD, state = Transformer(cfg).apply({**body, CACHE: cache}, x_BTD, mutable=CACHE)
        product_BV = jnp.matmul(h_BTD[:, -1], tables.output[: cfg.vocab_size].T)  # rows of padding are no tokens
        logits_BV = capped(cfg, product_BV) + bias_V[None, : cfg.vocab_size]
    return draw(logits_BV, temperature, jax.random.fold_in(key, number)), state[CACHE]


def _refuse(tokens: int, temperature: float) -> None:
    """UserError for a number of tokens or a temperature out of range."""
    if tokens < 1:
        raise UserError(f"tokens: must be at least 1, got {tokens}")
    if not 0 <= temperature <= _HOTTEST:
        raise UserError(f"temperature: must be 0 to {_HOTTEST}, got {temperature}")


def _unicode(prompt: str) -> str:
    """The prompt; UserError where the command line was given bytes that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("prompt: must be UTF-8") from None
    return prompt
