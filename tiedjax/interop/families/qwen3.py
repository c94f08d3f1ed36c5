"""Qwen 3: Llama with norms of each head's queries and keys, and heads whose width is a number of its own."""

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
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    settings.must("use_sliding_window", False)
    no_windows(settings)
    return like_llama(settings, head=128) | rope(settings) | {"qk_norm": "head"}


FAMILY = Family("Qwen3ForCausalLM", _config, body_of_llama, {**LIKE_LLAMA, "qk_norm": ("head",)}, written_sizes)
