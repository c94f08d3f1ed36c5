"""What families are described by: their config as ours, and which tensor holds which parameters.

Axes: D width, F a matrix's outputs, N heads laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.errors import UserError

Arrays = tuple[np.ndarray, ...]


class Held(NamedTuple):
    """A tensor and the parameters in it, by their paths in the body; `split` and `join` undo each other."""

    tensor: str
    parameters: tuple[str, ...]
    split: Callable[[np.ndarray], Arrays]
    join: Callable[[Arrays], np.ndarray]


class Family(NamedTuple):
    """One family.

    Attributes:
      architecture: the name of its class in transformers.
      config: reads its config.json's part about text.
      held: the body's tensors.
      fits: options that a model must have to be of it: what each may be. Any other option that changes what a model
        computes must be as in `PLAIN`.
      written: what its config.json says of a model of ours.
      prefixes: may be left out of every tensor's name at its start.
    """

    architecture: str
    config: Callable[[Settings], dict[str, Any]]
    held: Callable[[ModelConfig], Iterator[Held]]
    fits: Mapping[str, tuple[Any, ...]]
    written: Callable[[ModelConfig], dict[str, Any]]
    prefixes: tuple[str, ...] = ()


# What a model is unless its family says otherwise; `norm`, `mlp` and `position` every family names.
PLAIN: dict[str, tuple[Any, ...]] = {
    "norm_bias": (False,),
    "norm_place": ("pre",),
    "parallel": (False,),
    "qk_norm": ("none",),
    "clip_qkv": (None,),
    "biases": ("",),
    "rotary_fraction": (1.0,),
    "input_multiplier": ("one",),
    "output_multiplier": ("one",),
    "norm_after_lookup": (False,),
    "output_bias": ("none",),
}
ATTENTION = ("", "qkv,out")  # biases


# Ends of names of tensors that old models hold and nobody needs.
BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


class Settings:
    """A config.json to be read key by key; UserError, which names the key, for what is missing or of another kind."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be missing or null."""
        value = self._config.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.refuse(key, "a whole number above 0")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not value > 0:
            self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return bool(value)

    def one_of(self, key: str, allowed: Mapping[str, str], default: str | None = None) -> str:
        """What one of these names means to us."""
        value = self.get(key, default)
        if value not in allowed:
            self.refuse(key, " or ".join(allowed))
        return allowed[value]

    def must(self, key: str, *values: Any) -> None:
        """Refuses any other value than these, of which the first is what a missing key means."""
        if self.get(key, values[0]) not in values:
            self.refuse(key, " or ".join(map(str, values)))

    def refuse(self, key: str, wanted: str) -> None:
        """UserError."""
        raise UserError(f"{self.where}: {key}: must be {wanted}, got {self._config.get(key)!r}")


def rope(
    settings: Settings, fraction_key: str = "partial_rotary_factor", theta_key: str = "rope_theta"
) -> dict[str, Any]:
    """Our options for rotary positions, from the keys of transformers 4 or 5. UserError for a scaled form."""
    told = settings.get("rope_parameters") or {}
    scaling = settings.get("rope_scaling") or {}
    kind = told.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    kind = "by layer" if any(isinstance(value, dict) for value in told.values()) else kind
    if kind != "default":
        raise UserError(f"{settings.where}: rope of type {kind!r} is not known; only default is")
    theta = told.get("rope_theta", settings.get(theta_key, 10_000.0))
    fraction = told.get("partial_rotary_factor", settings.get(fraction_key, 1.0))
    return {"position": "rope", "rope_theta": float(theta), "rotary_fraction": float(fraction)}


def no_windows(settings: Settings) -> None:
    """UserError where some layers see the last positions alone."""
    if any(kind != "full_attention" for kind in settings.get("layer_types", [])):
        settings.refuse("layer_types", "full_attention in every layer")


def biases(**there: bool) -> str:
    """`model.biases` of the linear maps that have one."""
    return ",".join(name for name, has in there.items() if has)


def sizes(settings: Settings) -> dict[str, Any]:
    """The sizes that most families call alike."""
    heads = settings.whole("num_attention_heads")
    width, kv = settings.whole("hidden_size"), settings.whole("num_key_value_heads", heads)
    head = settings.whole("head_dim", max(1, width // heads))
    return {
        "layers": settings.whole("num_hidden_layers"),
        "d_model": width,
        "heads": heads,
        "kv_heads": None if kv == heads else kv,
        "head_width": None if head * heads == width else head,
        "d_ff": settings.whole("intermediate_size"),
        "seq_len": settings.whole("max_position_embeddings", 2048),
        "vocab_size": settings.whole("vocab_size"),
    }


def written_sizes(cfg: ModelConfig) -> dict[str, Any]:
    """What `sizes` and `rope` read."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.groups,
        "head_dim": cfg.key_width,
        "max_position_embeddings": cfg.seq_len,
        "rope_theta": cfg.rope_theta,
        "hidden_act": "silu",
        "attention_bias": "qkv" in cfg.bias_names,
        "rms_norm_eps": cfg.norm_eps,
    }


# ---- Tensors ----


def vector(tensor: str, parameter: str) -> Held:
    """One parameter as it is."""
    return Held(tensor, (parameter,), lambda x: (x,), lambda parts: parts[0])


def linear(tensor: str, parameter: str) -> Held:
    """A matrix [F, D], of which ours is the transpose."""
    return Held(tensor, (parameter,), lambda x: (x.T,), lambda parts: parts[0].T)


def layer_of_llama(cfg: ModelConfig, i: int) -> Iterator[Held]:
    """The tensors of a layer in the way of Llama: projections, their biases, norms of queries and keys."""
    there, here = f"model.layers.{i}", f"layer_{i}"
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    for ours, theirs in projections.items():
        yield linear(f"{there}.self_attn.{theirs}.weight", f"{here}/attention/{ours}/kernel")
        if ("out" if ours == "out" else "qkv") in cfg.bias_names:
            yield vector(f"{there}.self_attn.{theirs}.bias", f"{here}/attention/{ours}_bias/bias")
    for name in ("gate", "up", "down"):
        yield linear(f"{there}.mlp.{name}_proj.weight", f"{here}/mlp/{name}/kernel")
        if "mlp" in cfg.bias_names:
            yield vector(f"{there}.mlp.{name}_proj.bias", f"{here}/mlp/{name}_bias/bias")
    if cfg.qk_norm != "none":
        for ours, theirs in (("query", "q_norm"), ("key", "k_norm")):
            yield vector(f"{there}.self_attn.{theirs}.weight", f"{here}/attention/{ours}_norm/scale")


def body_of_llama(cfg: ModelConfig) -> Iterator[Held]:
    """All layers in the way of Llama, with RMSNorms before each part and at the end."""
    for i in range(cfg.layers):
        yield from layer_of_llama(cfg, i)
        yield vector(f"model.layers.{i}.input_layernorm.weight", f"layer_{i}/attention_norm/scale")
        yield vector(f"model.layers.{i}.post_attention_layernorm.weight", f"layer_{i}/mlp_norm/scale")
    yield vector("model.norm.weight", "final_norm/scale")
