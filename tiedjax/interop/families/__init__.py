"""Families of models whose bodies can be read and written: one file each, by `model_type`."""

from tiedjax.interop.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neo,
    gpt_neox,
    llama,
    olmo,
    olmo2,
    olmo3,
    qwen2,
    qwen3,
)
from tiedjax.interop.families.common import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "olmo": olmo.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gemma3": gemma3.WITH_IMAGES,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neo": gpt_neo.FAMILY,
}

__all__ = ["FAMILIES", "Family"]
