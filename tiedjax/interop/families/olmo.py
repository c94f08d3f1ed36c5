"""OLMo 1: norms without parameters; queries, keys and values may be cut to a range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import (
    ATTENTION,
    Family,
    Held,
    Settings,
    biases,
    layer_of_llama,
    rope,
    sizes,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("hidden_act", "silu")
    attention = settings.flag("attention_bias", False)
    return {
        **sizes(settings),
        **rope(settings),
        "norm": "nonparametric_layernorm",
        "norm_eps": 1e-5,  # fixed in the family's code
        "clip_qkv": settings.get("clip_qkv") and settings.number("clip_qkv"),
        "mlp": "swiglu",
        "biases": biases(qkv=attention, out=attention),
    }


def _held(cfg: ModelConfig) -> Iterator[Held]:
    for i in range(cfg.layers):
        yield from layer_of_llama(cfg, i)


def _written(cfg: ModelConfig) -> dict[str, Any]:
    said = written_sizes(cfg) | {"clip_qkv": cfg.clip_qkv}
    return {key: value for key, value in said.items() if key not in ("head_dim", "rms_norm_eps")}


FAMILY = Family(
    "OlmoForCausalLM",
    _config,
    _held,
    {
        "norm": ("nonparametric_layernorm",),
        "norm_eps": (1e-5,),
        "mlp": ("swiglu",),
        "position": ("rope",),
        "biases": ATTENTION,
        "clip_qkv": (),
        "head_width": (None,),
    },
    _written,
)
