"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import Family, Settings, body_of_llama, no_windows, rope, sizes, written_sizes


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("hidden_act", "silu")
    settings.must("use_sliding_window", False)
    no_windows(settings)
    return {
        **sizes(settings),
        **rope(settings),
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "biases": "qkv",
    }


FAMILY = Family(
    "Qwen2ForCausalLM",
    _config,
    body_of_llama,
    {"norm": ("rmsnorm",), "mlp": ("swiglu",), "position": ("rope",), "biases": ("qkv",), "head_width": (None,)},
    lambda cfg: {key: value for key, value in written_sizes(cfg).items() if key not in ("attention_bias", "head_dim")},
)
