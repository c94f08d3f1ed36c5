"""Gemma 1: Llama with gates in GELU, norms whose scale is 1 + weight, and looked-up vectors times sqrt(D)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import (
    LIKE_LLAMA,
    Family,
    Held,
    Settings,
    body_of_llama,
    like_llama,
    raised,
    rope,
    written_sizes,
)

_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu": "geglu"}  # all mean the form by tanh
FITS = {**LIKE_LLAMA, "mlp": ("geglu",), "input_multiplier": ("sqrt_d",)}


def like_gemma(settings: Settings, mlp: str) -> dict[str, Any]:
    """The options that all Gemmas share, but for their positions."""
    settings.must("use_bidirectional_attention", False)
    return like_llama(settings, head=256, mlp=mlp) | {"input_multiplier": "sqrt_d"}


def body_of_gemma(cfg: ModelConfig) -> Iterator[Held]:
    """The body's tensors of all Gemmas."""
    return body_of_llama(cfg, raised)


def _config(settings: Settings) -> dict[str, Any]:
    mlp = settings.one_of("hidden_act", _ACTIVATIONS, "gelu_pytorch_tanh")
    return like_gemma(settings, mlp) | rope(settings)


FAMILY = Family(
    "GemmaForCausalLM",
    _config,
    body_of_gemma,
    FITS,
    lambda cfg: written_sizes(cfg) | {"hidden_act": "gelu_pytorch_tanh"},
)
