"""Gemma 2: Gemma with norms on both sides, caps, an attention scale of its own, and windows in every other layer."""

from __future__ import annotations

import math
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.errors import UserError
from tiedjax.interop.families.common import (
    Family,
    Settings,
    refuse_scaled_windows,
    rope,
    windows,
    without,
    written_sizes,
    written_windows,
)
from tiedjax.interop.families.gemma import FITS, body_of_gemma, like_gemma

_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu": "geglu_exact"}
FITS_2: dict[str, tuple[Any, ...]] = {
    **FITS,
    "norm_place": ("both",),
    "mlp": ("geglu", "geglu_exact"),
    "attention_scale": (),
    "logit_cap": (),
    "window": (),
}


def like_gemma_2(settings: Settings, usual: tuple[str, ...], cap: float | None) -> dict[str, Any]:
    """The options that Gemma 2 and 3 share, but for their positions.

    `usual` are the kinds of layers without a key for them, and `cap` is the logits' without one.
    """
    own = like_gemma(settings, settings.one_of("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"))
    scalar, width = settings.number("query_pre_attn_scalar", 256), own["head_width"] or own["d_model"] // own["heads"]
    return {
        **own,
        **windows(settings, usual),
        "norm_place": "both",
        "attention_scale": None if scalar == width else scalar**-0.5,
        "logit_cap": settings.optional("final_logit_softcapping", cap),
    }


def written_gemma(cfg: ModelConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 say alike. UserError for a scale that they have no number for."""
    scalar = (cfg.attention_scale or cfg.key_width**-0.5) ** -2
    if not math.isclose(scalar, round(scalar), rel_tol=1e-6):
        raise UserError(f"model.attention_scale: Gemma has 1 / sqrt of a whole number, got {cfg.attention_scale}")
    return {
        **without(written_sizes(cfg), "hidden_act"),
        **written_windows(cfg),
        "hidden_activation": {"geglu": "gelu_pytorch_tanh", "geglu_exact": "gelu"}[cfg.mlp],
        "query_pre_attn_scalar": round(scalar),
        "final_logit_softcapping": cfg.logit_cap,
    }


def _config(settings: Settings) -> dict[str, Any]:
    own = like_gemma_2(settings, ("sliding_attention", "full_attention"), 30.0) | rope(settings)
    refuse_scaled_windows(own, settings.where)
    return own | {"attention_cap": settings.optional("attn_logit_softcapping", 50.0)}


FAMILY = Family(
    "Gemma2ForCausalLM",
    _config,
    body_of_gemma,
    {**FITS_2, "attention_cap": (), "rope_scaling": ("none",)},
    lambda cfg: written_gemma(cfg) | {"attn_logit_softcapping": cfg.attention_cap},
)
