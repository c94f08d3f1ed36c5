"""OLMo 3: OLMo 2 with a window in three of four layers, which are not scaled where the others are."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Settings,
    body_of_llama,
    like_llama,
    rope_by_layer,
    windows,
    without,
    written_rope_by_layer,
    written_sizes,
    written_windows,
)

_USUAL = (*["sliding_attention"] * 3, "full_attention")


def _config(settings: Settings) -> dict[str, Any]:
    of_windows = windows(settings, _USUAL)
    return {
        **like_llama(settings, eps=1e-5),
        **of_windows,
        **rope_by_layer(settings, of_windows, 500_000.0, 500_000.0, "rope_theta"),
        "norm_place": "post",
        "qk_norm": "whole",
    }


FAMILY = Family(
    "Olmo3ForCausalLM",
    _config,
    body_of_llama,
    {
        **LIKE_LLAMA,
        "norm_place": ("post",),
        "qk_norm": ("whole",),
        "window": (),
        "window_theta": (),
        "head_width": (None,),
    },
    lambda cfg: {
        **without(written_sizes(cfg), "head_dim", "rope_theta", "rope_scaling"),
        **written_rope_by_layer(cfg),
        **written_windows(cfg),
    },
)
