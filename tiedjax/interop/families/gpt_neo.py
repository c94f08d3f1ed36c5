"""GPT-Neo: GPT-2 without a scale of attention, and with a window in some layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import (
    LIKE_GPT,
    Family,
    Held,
    Settings,
    entry_and_norms_of_gpt,
    like_gpt,
    linear,
    shortest,
    vector,
    written_like_gpt,
)

_KINDS = {"global": "full", "local": "window"}


def _config(settings: Settings) -> dict[str, Any]:
    width, kinds = settings.whole("hidden_size"), _kinds(settings)
    windows = {"window": settings.whole("window_size", 256), "window_layers": shortest(kinds)}
    return {
        **like_gpt(settings),
        "layers": settings.whole("num_layers"),
        "d_model": width,
        "heads": settings.whole("num_heads"),
        "d_ff": settings.whole("intermediate_size", 4 * width),
        "seq_len": settings.whole("max_position_embeddings", 2048),
        "vocab_size": settings.whole("vocab_size"),
        "biases": "out,mlp",
        "attention_scale": 1.0,
        **(windows if "window" in kinds else {}),
    }


def _kinds(settings: Settings) -> list[str]:
    """Each layer's kind in our words, from [[["global", "local"], 6]]: kinds, and how often they come."""
    layers, key = settings.layers("num_layers"), "attention_types"
    kinds: list[str] = []
    try:
        for names, times in settings.get(key, [[["global", "local"], layers // 2]]):
            kinds += [_KINDS[name] for name in names] * min(times, layers + 1)
    except (KeyError, TypeError, ValueError):
        kinds = []
    if len(kinds) != layers:
        settings.refuse(key, f"lists of global or local and how often they come, of {layers} layers in all")
    return kinds


def _held(cfg: ModelConfig) -> Iterator[Held]:
    yield from entry_and_norms_of_gpt(cfg)
    for i in range(cfg.layers):
        there, here = f"transformer.h.{i}", f"layer_{i}"
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            yield linear(f"{there}.attn.attention.{theirs}.weight", f"{here}/attention/{ours}/kernel")
        yield vector(f"{there}.attn.attention.out_proj.bias", f"{here}/attention/out_bias/bias")
        for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
            yield linear(f"{there}.mlp.{theirs}.weight", f"{here}/mlp/{ours}/kernel")
            yield vector(f"{there}.mlp.{theirs}.bias", f"{here}/mlp/{ours}_bias/bias")


def _written(cfg: ModelConfig) -> dict[str, Any]:
    kinds = ["local" if window else "global" for window in cfg.windows]
    return written_like_gpt(cfg) | {
        "hidden_size": cfg.d_model,
        "num_layers": cfg.layers,
        "num_heads": cfg.heads,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.seq_len,
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": cfg.window or 256,
    }


FAMILY = Family(
    "GPTNeoForCausalLM",
    _config,
    _held,
    {**LIKE_GPT, "attention_scale": (1.0,), "biases": ("out,mlp",), "window": ()},
    _written,
    ("transformer.", ""),
)
