"""Llama 1 to 3 without scaled positions, SmolLM2, TinyLlama."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    ATTENTION,
    Family,
    Settings,
    biases,
    body_of_llama,
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
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "biases": biases(qkv=attention, out=attention, mlp=settings.flag("mlp_bias", False)),
    }


FAMILY = Family(
    "LlamaForCausalLM",
    _config,
    body_of_llama,
    {
        "norm": ("rmsnorm",),
        "mlp": ("swiglu",),
        "position": ("rope",),
        "biases": (*ATTENTION, "qkv,out,mlp", "mlp"),
    },
    lambda cfg: written_sizes(cfg) | {"mlp_bias": "mlp" in cfg.bias_names},
)
