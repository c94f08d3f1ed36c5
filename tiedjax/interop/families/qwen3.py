"""Qwen 3: Llama with norms of each head's queries and keys, and heads whose width is a number of its own."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    ATTENTION,
    Family,
    Settings,
    biases,
    body_of_llama,
    no_windows,
    rope,
    sizes,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("hidden_act", "silu")
    settings.must("use_sliding_window", False)
    no_windows(settings)
    attention = settings.flag("attention_bias", False)
    own = sizes(settings)
    width = settings.whole("head_dim", 128)
    return {
        **own,
        **rope(settings),
        "head_width": None if width * own["heads"] == own["d_model"] else width,
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "qk_norm": "head",
        "mlp": "swiglu",
        "biases": biases(qkv=attention, out=attention),
    }


FAMILY = Family(
    "Qwen3ForCausalLM",
    _config,
    body_of_llama,
    {"norm": ("rmsnorm",), "mlp": ("swiglu",), "position": ("rope",), "qk_norm": ("head",), "biases": ATTENTION},
    written_sizes,
)
