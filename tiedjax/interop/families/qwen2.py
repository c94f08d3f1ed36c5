"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Settings,
    body_of_llama,
    like_llama,
    no_windows,
    rope,
    without,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("use_sliding_window", False)
    no_windows(settings)
    return like_llama(settings) | rope(settings) | {"biases": "qkv"}


FAMILY = Family(
    "Qwen2ForCausalLM",
    _config,
    body_of_llama,
    {**LIKE_LLAMA, "biases": ("qkv",), "head_width": (None,)},
    lambda cfg: without(written_sizes(cfg), "attention_bias", "head_dim"),
)
