"""OLMo 2: attention and MLP norm what they add; norms of all heads' queries, and of all keys, together."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Settings,
    body_of_llama,
    like_llama,
    rope,
    without,
    written_sizes,
)


def _config(settings: Settings) -> dict[str, Any]:
    return like_llama(settings, eps=1e-5) | rope(settings) | {"norm_place": "post", "qk_norm": "whole"}


FAMILY = Family(
    "Olmo2ForCausalLM",
    _config,
    body_of_llama,
    {**LIKE_LLAMA, "norm_place": ("post",), "qk_norm": ("whole",), "head_width": (None,)},
    lambda cfg: without(written_sizes(cfg), "head_dim"),
)
