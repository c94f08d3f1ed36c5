"""Gemma 3: Gemma 2 with norms of queries and keys, without a cap on scores, and windows with a theta of their own."""

from __future__ import annotations

from typing import Any

from tiedjax.config import ModelConfig
from tiedjax.interop.families.common import MOST_LAYERS, Family, Settings, rope_by_layer, without, written_rope_by_layer
from tiedjax.interop.families.gemma import body_of_gemma
from tiedjax.interop.families.gemma2 import FITS_2, like_gemma_2, written_gemma

# What transformers takes for keys that are missing: a config of a model with images has those alone that differ.
_USUAL = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def _config(settings: Settings) -> dict[str, Any]:
    settings = settings.or_else(_USUAL)
    settings.must("attn_logit_softcapping", None)
    usual = (
        *["sliding_attention"] * (settings.whole("sliding_window_pattern", 6, most=MOST_LAYERS) - 1),
        "full_attention",
    )
    own = like_gemma_2(settings, usual, None)
    of_windows = {key: value for key, value in own.items() if key in ("window", "window_layers")}
    positions = rope_by_layer(settings, of_windows, 1_000_000.0, 10_000.0, "rope_local_base_freq")
    return own | positions | {"qk_norm": "head"}


def _written(cfg: ModelConfig) -> dict[str, Any]:
    return without(written_gemma(cfg), "rope_theta", "rope_scaling") | written_rope_by_layer(cfg)


FAMILY = Family(
    "Gemma3ForCausalLM", _config, body_of_gemma, {**FITS_2, "qk_norm": ("head",), "window_theta": ()}, _written
)
WITH_IMAGES = FAMILY._replace(
    architecture="Gemma3ForConditionalGeneration",
    starts=("model.", "language_model.model.", "model.language_model."),
    besides=tuple(f"{start}{part}." for start in ("", "model.") for part in ("vision_tower", "multi_modal_projector")),
)
