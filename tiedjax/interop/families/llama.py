"""Llama 1 to 3, SmolLM2, TinyLlama."""

from __future__ import annotations

from typing import Any

from tiedjax.interop.families.common import LIKE_LLAMA, Family, Settings, body_of_llama, like_llama, rope, written_sizes


def _config(settings: Settings) -> dict[str, Any]:
    own = like_llama(settings) | rope(settings)
    names = [name for name in (own["biases"], "mlp" if settings.flag("mlp_bias", False) else "") if name]
    return own | {"biases": ",".join(names)}


FAMILY = Family(
    "LlamaForCausalLM",
    _config,
    body_of_llama,
    {**LIKE_LLAMA, "biases": (*LIKE_LLAMA["biases"], "qkv,out,mlp", "mlp")},
    lambda cfg: written_sizes(cfg) | {"mlp_bias": "mlp" in cfg.bias_names},
)
