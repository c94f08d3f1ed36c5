"""Qwen 3: Llama with norms of each head's queries and keys, and heads whose width is a number of its own."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Settings,
    body_of_llama,
    late_windows,
    like_llama,
    refuse_scaled_windows,
    rope,
)
from tiedjax.interop.families.qwen2 import written_of_qwen


def _config(settings: Settings) -> dict[str, Any]:
    own = like_llama(settings, head=128) | rope(settings) | late_windows(settings) | {"qk_norm": "head"}
    refuse_scaled_windows(own, settings.where)
    return own


FAMILY = Family(
    "Qwen3ForCausalLM",
    _config,
    body_of_llama,
    {**LIKE_LLAMA, "qk_norm": ("head",), "window": ()},
    written_of_qwen,
)
