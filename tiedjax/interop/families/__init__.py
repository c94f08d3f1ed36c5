"""Families of models whose bodies can be read and written: one file each, by `model_type`."""

from tiedjax.interop.families import gpt2, gpt_neox, llama, olmo, olmo2, qwen2, qwen3
from tiedjax.interop.families.common import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "olmo": olmo.FAMILY,
    "olmo2": olmo2.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "gpt2": gpt2.FAMILY,
}

__all__ = ["FAMILIES", "Family"]
