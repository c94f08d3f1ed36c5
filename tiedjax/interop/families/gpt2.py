"""GPT-2: learned positions, biases everywhere, matrices that lie as ours do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import (
    LIKE_GPT,
    Family,
    Held,
    Settings,
    entry_and_norms_of_gpt,
    like_gpt,
    vector,
    written_like_gpt,
)

_QKV = ("query", "key", "value")


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("scale_attn_weights", True)
    settings.must("scale_attn_by_inverse_layer_idx", False)
    settings.must("add_cross_attention", False)
    width = settings.whole("n_embd")
    return like_gpt(settings) | {
        "layers": settings.whole("n_layer"),
        "d_model": width,
        "heads": settings.whole("n_head"),
        "d_ff": settings.whole("n_inner", 4 * width),
        "seq_len": settings.whole("n_positions", 1024),
        "vocab_size": settings.whole("vocab_size"),
        "biases": "qkv,out,mlp",
    }


def _held(cfg: ModelConfig) -> Iterator[Held]:
    def fused(tensor: str, parameters: tuple[str, ...]) -> Held:
        return Held(tensor, parameters, lambda x: tuple(np.split(x, 3, axis=-1)), lambda x: np.concatenate(x, axis=-1))

    yield from entry_and_norms_of_gpt(cfg)
    for i in range(cfg.layers):
        there, here = f"transformer.h.{i}", f"layer_{i}"
        yield fused(f"{there}.attn.c_attn.weight", tuple(f"{here}/attention/{name}/kernel" for name in _QKV))
        yield fused(f"{there}.attn.c_attn.bias", tuple(f"{here}/attention/{name}_bias/bias" for name in _QKV))
        for theirs, ours in (("attn.c_proj", "attention/out"), ("mlp.c_fc", "mlp/up"), ("mlp.c_proj", "mlp/down")):
            yield vector(f"{there}.{theirs}.weight", f"{here}/{ours}/kernel")
            yield vector(f"{there}.{theirs}.bias", f"{here}/{ours}_bias/bias")


def _written(cfg: ModelConfig) -> dict[str, Any]:
    return written_like_gpt(cfg) | {
        "n_embd": cfg.d_model,
        "n_layer": cfg.layers,
        "n_head": cfg.heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.seq_len,
    }


FAMILY = Family(
    "GPT2LMHeadModel",
    _config,
    _held,
    {**LIKE_GPT, "biases": ("qkv,out,mlp",)},
    _written,
    ("transformer.", ""),
)
