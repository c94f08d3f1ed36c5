"""Qwen 2 and 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.errors import UserError
from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Settings,
    body_of_llama,
    late_windows,
    like_llama,
    refuse_scaled_windows,
    rope,
    without,
    written_late_windows,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    own = like_llama(settings) | rope(settings) | late_windows(settings) | {"biases": "qkv"}
    refuse_scaled_windows(own, settings.where)
    return own


def written_of_qwen(cfg: ModelConfig) -> dict[str, Any]:
    """What both Qwens say alike. UserError for a scaled rope with windows, which they scale too."""
    if cfg.window is not None and cfg.rope_scaling != "none":
        raise UserError(
            f"model.rope_scaling: Qwen scales layers with a window too; it must be none beside model.window, "
            f"got {cfg.rope_scaling!r}"
        )
    return written_sizes(cfg) | written_late_windows(cfg)


FAMILY = Family(
    "Qwen2ForCausalLM",
    _config,
    body_of_llama,
    {**LIKE_LLAMA, "biases": ("qkv",), "head_width": (None,), "window": ()},
    lambda cfg: without(written_of_qwen(cfg), "attention_bias", "head_dim"),
)
