"""OLMo 1: norms without parameters; queries, keys and values may be cut to a range."""

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
    return {
        **like_llama(settings),
        **rope(settings),
        "norm": "nonparametric_layernorm",
        "norm_eps": 1e-5,  # fixed in the family's code
        "clip_qkv": settings.optional("clip_qkv"),
    }


FAMILY = Family(
    "OlmoForCausalLM",
    _config,
    body_of_llama,
    {
        **LIKE_LLAMA,
        "norm": ("nonparametric_layernorm",),
        "norm_eps": (1e-5,),
        "clip_qkv": (),
        "head_width": (None,),
    },
    lambda cfg: without(written_sizes(cfg), "head_dim", "rms_norm_eps") | {"clip_qkv": cfg.clip_qkv},
)
