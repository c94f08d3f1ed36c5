"""OLMo 2: attention and MLP norm what they add; norms of all heads' queries, and of all keys, together."""

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
    vector,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("hidden_act", "silu")
    attention = settings.flag("attention_bias", False)
    return {
        **sizes(settings),
        **rope(settings),
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-5),
        "norm_place": "post",
        "qk_norm": "whole",
        "mlp": "swiglu",
        "biases": biases(qkv=attention, out=attention),
    }


def _held(cfg: ModelConfig) -> Iterator[Held]:
    for i in range(cfg.layers):
        yield from layer_of_llama(cfg, i)
        yield vector(f"model.layers.{i}.post_attention_layernorm.weight", f"layer_{i}/attention_norm/scale")
        yield vector(f"model.layers.{i}.post_feedforward_layernorm.weight", f"layer_{i}/mlp_norm/scale")
    yield vector("model.norm.weight", "final_norm/scale")


FAMILY = Family(
    "Olmo2ForCausalLM",
    _config,
    _held,
    {
        "norm": ("rmsnorm",),
        "norm_place": ("post",),
        "qk_norm": ("whole",),
        "mlp": ("swiglu",),
        "position": ("rope",),
        "biases": ATTENTION,
        "head_width": (None,),
    },
    lambda cfg: {key: value for key, value in written_sizes(cfg).items() if key != "head_dim"},
)
