"""What families are described by: their config as ours, and which tensor holds which parameters.

Axes: D width, F a matrix's outputs, N heads laid flat.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tiedjax.config import ModelConfig
from tiedjax.errors import UserError
from tiedjax.rope import magnitude, turns

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
      starts: what the names of tensors may begin with in place of the first of these.
      besides: what the names of tensors that are of no text begin with: they are not read, and such a model is not
        written.
    """

    architecture: str
    config: Callable[[Settings], dict[str, Any]]
    held: Callable[[ModelConfig], Iterator[Held]]
    fits: Mapping[str, tuple[Any, ...]]
    written: Callable[[ModelConfig], dict[str, Any]]
    starts: tuple[str, ...] = ("",)
    besides: tuple[str, ...] = ()

    def names(self, tensor: str) -> list[str]:
        """What a tensor may be called, its own name first."""
        first = self.starts[0]
        return [start + tensor.removeprefix(first) for start in self.starts] if tensor.startswith(first) else [tensor]


# What a model is unless its family says otherwise; `norm`, `mlp` and `position` every family names.
PLAIN: dict[str, tuple[Any, ...]] = {
    "norm_bias": (False,),
    "norm_place": ("pre",),
    "parallel": (False,),
    "qk_norm": ("none",),
    "clip_qkv": (None,),
    "attention_scale": (None,),
    "attention_cap": (None,),
    "logit_cap": (None,),
    "biases": ("",),
    "rotary_fraction": (1.0,),
    "rope_scaling": ("none",),
    "window": (None,),
    "window_theta": (None,),
    "input_multiplier": ("one",),
    "output_multiplier": ("one",),
    "norm_after_lookup": (False,),
    "output_bias": ("none",),
}
# What a model of Llama's kind may be besides, unless its family says otherwise.
LIKE_LLAMA: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm",),
    "mlp": ("swiglu",),
    "position": ("rope",),
    "rope_scaling": (),
    "biases": ("", "qkv,out"),
}


LIKE_GPT: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm",),
    "norm_bias": (True,),
    "mlp": ("gelu", "gelu_exact"),
    "position": ("learned",),
    "kv_heads": (None,),
    "head_width": (None,),
}
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
MOST_LAYERS = 10_000


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is one that old models hold and nobody needs."""
    return any(name == buffer or name.endswith(f".{buffer}") for buffer in _BUFFERS)


class Settings:
    """A config.json to be read key by key; UserError, which names the key, for what is missing or of another kind."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._config, self.where = config, where

    def or_else(self, defaults: Mapping[str, Any]) -> Settings:
        """The same with what stands for keys that are missing."""
        return Settings({**defaults, **self._config}, self.where)

    def part(self, key: str) -> Settings:
        """What is below a key, with nothing in it where the key is missing or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return Settings(value, f"{self.where}: {key}")

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be missing or null."""
        value = self._config.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A whole number above 0, up to `most`."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.refuse(key, "a whole number above 0")
        if value > most:
            self.refuse(key, f"at most {most}")
        return int(value)

    def layers(self, key: str) -> int:
        """How many layers there are."""
        return self.whole(key, most=MOST_LAYERS)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            self.refuse(key, "a number above 0")
        return float(value)

    def optional(self, key: str, usual: float | None = None) -> float | None:
        """A number above 0, or null; `usual` where the key is missing."""
        if self.get(key) is None:
            return None if key in self._config else usual
        return self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return bool(value)

    def one_of(self, key: str, allowed: Mapping[str, str], default: str | None = None) -> str:
        """What one of these names means to us."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, " or ".join(allowed))
        return allowed[str(value)]

    def must(self, key: str, *values: Any) -> None:
        """Refuses any other value than these, of which the first is what a missing key means."""
        if self.get(key, values[0]) not in values:
            self.refuse(key, " or ".join(map(str, values)))

    def refuse(self, key: str, wanted: str) -> None:
        """UserError."""
        raise UserError(f"{self.where}: {key}: must be {wanted}, got {self._config.get(key)!r}")


# ---- Rotary positions ----

_ROPES = ("default", "linear", "llama3", "yarn")
_FULL, _WINDOW = "full_attention", "sliding_attention"
_FRACTION = "partial_rotary_factor"


def rope(settings: Settings, theta_key: str = "rope_theta") -> dict[str, Any]:
    """Our options for rotary positions of whole heads, of all layers alike, from the keys of transformers 4 or 5."""
    told = _told(settings)
    for part in (told, settings):
        part.must(_FRACTION, 1.0)
    theta = told.number("rope_theta", settings.number(theta_key, 10_000.0))
    return {"position": "rope", "rope_theta": theta, **_scaled(told, settings)}


def rope_of_part(settings: Settings, theta_key: str, fraction_key: str, fraction: float) -> dict[str, Any]:
    """The same of a family that rotates a part of each head: `fraction` without the key."""
    told = _told(settings)
    share = told.number(_FRACTION, settings.number(fraction_key, fraction))
    theta = told.number("rope_theta", settings.number(theta_key, 10_000.0))
    return {"position": "rope", "rope_theta": theta, "rotary_fraction": share, **_scaled(told, settings)}


def _told(settings: Settings) -> Settings:
    """What is said of all layers' positions: by transformers 4 if they are scaled, or by 5."""
    new = settings.part("rope_parameters")
    if new.get(_FULL) or new.get(_WINDOW):
        settings.refuse("rope_parameters", "those of all layers alike")
    return settings.part("rope_scaling") if settings.get("rope_scaling") else new


def rope_by_layer(
    settings: Settings, of_windows: Mapping[str, Any], theta: float, window_theta: float, theta_key: str
) -> dict[str, Any]:
    """The same of a family whose layers with a window have a theta of their own and are not scaled.

    `of_windows` is what `windows` gives, `theta` and `window_theta` are those without a key, and `theta_key` is what
    transformers 4 calls the second.
    """
    new = settings.part("rope_parameters")
    if new.get("rope_type") or new.get("rope_theta"):
        settings.refuse("rope_parameters", f"those of {_FULL} and {_WINDOW}")
    full, windowed = new.part(_FULL), new.part(_WINDOW)
    windowed.must("rope_type", "default")
    for part in (full, windowed, settings):
        part.must(_FRACTION, 1.0)
    of_full = full.number("rope_theta", settings.number("rope_theta", theta))
    of_windowed = windowed.number("rope_theta", settings.number(theta_key, window_theta))
    scaling = settings.part("rope_scaling") if settings.get("rope_scaling") else full
    options = {"position": "rope", "rope_theta": of_full}
    if of_windows and of_windowed != of_full:
        options["window_theta"] = of_windowed
    has_full = "full" in of_windows.get("window_layers", "full")
    return options | (_scaled(scaling, settings) if has_full else {})


def _scaled(told: Settings, settings: Settings) -> dict[str, Any]:
    """Our options for a scaled rope. UserError for a kind that ours does not have."""
    kind = told.get("rope_type", told.get("type", "default"))
    if kind not in _ROPES:
        raise UserError(
            f"{told.where}: rope of type {kind!r} is not known; {', '.join(_ROPES[:-1])} and {_ROPES[-1]} are"
        )
    if kind == "default":
        return {}
    found = {"rope_scaling": kind, "rope_factor": told.number("factor")}
    if kind == "linear":
        return found
    positions, key = settings.whole("max_position_embeddings", 2048), "original_max_position_embeddings"
    found["rope_positions"] = settings.whole(key, told.whole(key, positions))
    if kind == "llama3":
        return found | {"rope_turns": (told.number("low_freq_factor"), told.number("high_freq_factor"))}
    told.must("truncate", True)
    turns = told.number("beta_slow", 1.0), told.number("beta_fast", 32.0)
    return found | {"rope_turns": turns, "rope_magnitude": _magnitude(told)}


def _magnitude(told: Settings) -> float | None:
    """What YaRN multiplies cosines and sines by, where that is not its usual number."""
    if told.get("attention_factor") is not None:
        return told.number("attention_factor")
    if not (told.get("mscale") and told.get("mscale_all_dim")):
        return None
    above, below = (told.number(key) for key in ("mscale", "mscale_all_dim"))
    growth = 0.1 * math.log(told.number("factor"))
    return (1 + growth * above) / (1 + growth * below)


def written_rope(cfg: ModelConfig) -> dict[str, Any]:
    """What `_scaled` reads."""
    if cfg.rope_scaling == "none":
        return {"rope_type": "default"}
    said = {"rope_type": cfg.rope_scaling, "factor": cfg.rope_factor}
    if cfg.rope_scaling == "linear":
        return said
    few, many = turns(cfg)
    said["original_max_position_embeddings"] = cfg.rope_positions
    if cfg.rope_scaling == "llama3":
        return said | {"low_freq_factor": few, "high_freq_factor": many}
    return said | {"beta_slow": few, "beta_fast": many, "attention_factor": magnitude(cfg)}


def written_rope_by_layer(cfg: ModelConfig) -> dict[str, Any]:
    """What `rope_by_layer` reads."""
    window_theta = cfg.window_theta or cfg.rope_theta
    return {
        "rope_parameters": {
            _FULL: {**written_rope(cfg), "rope_theta": cfg.rope_theta},
            _WINDOW: {"rope_type": "default", "rope_theta": window_theta},
        }
    }


# ---- Windows ----


def windows(settings: Settings, usual: tuple[str, ...]) -> dict[str, Any]:
    """Our options for layers with a window; `usual` are the layers' kinds, over and over, without a key for them."""
    layers, key = settings.layers("num_hidden_layers"), "layer_types"
    kinds = settings.get(key) or [usual[i % len(usual)] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (_FULL, _WINDOW) for kind in kinds):
        settings.refuse(key, f"{_FULL} or {_WINDOW} for each layer")
    if _WINDOW not in kinds:
        return {}
    return {
        "window": settings.whole("sliding_window", 4096),
        "window_layers": shortest(["window" if kind == _WINDOW else "full" for kind in kinds]),
    }


def shortest(kinds: Sequence[str]) -> str:
    """`model.window_layers` of these layers."""
    n = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return ",".join(kinds[:n])


def written_windows(cfg: ModelConfig) -> dict[str, Any]:
    """What `windows` reads."""
    return {"sliding_window": cfg.window, "layer_types": [_WINDOW if window else _FULL for window in cfg.windows]}


def late_windows(settings: Settings) -> dict[str, Any]:
    """The same of a family whose layers have windows from a number on, where they are switched on."""
    if not settings.flag("use_sliding_window", False) or settings.optional("sliding_window", 4096) is None:
        kinds = settings.get("layer_types", [])
        if not isinstance(kinds, list) or any(kind != _FULL for kind in kinds):
            settings.refuse("layer_types", "full_attention in every layer, where use_sliding_window is false")
        return {}
    layers, first = settings.layers("num_hidden_layers"), settings.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        settings.refuse("max_window_layers", "a whole number of at least 0")
    return windows(settings, tuple(_FULL if i < first else _WINDOW for i in range(layers)))


def written_late_windows(cfg: ModelConfig) -> dict[str, Any]:
    """What `late_windows` reads, nothing without a window."""
    if cfg.window is None:
        return {}
    first = next((i for i, window in enumerate(cfg.windows) if window), cfg.layers)
    return {"use_sliding_window": True, "max_window_layers": first, **written_windows(cfg)}


def refuse_scaled_windows(options: Mapping[str, Any], where: str) -> None:
    """UserError where layers with a window have a scaled rope: ours scales that of the others alone."""
    if "window" in options and "rope_scaling" in options:
        raise UserError(f"{where}: rope of type {options['rope_scaling']!r} is not known in layers with a window")


def biases(**there: bool) -> str:
    """`model.biases` of the linear maps that have one."""
    return ",".join(name for name, has in there.items() if has)


def like_llama(
    settings: Settings, *, eps: float = 1e-6, head: int | None = None, mlp: str | None = None
) -> dict[str, Any]:
    """The options of a model of Llama's kind, but for its positions.

    `eps` and the width of a `head` are those without a key; a family with another MLP says which.
    """
    attention = settings.flag("attention_bias", False)
    return {
        **sizes(settings, head),
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", eps),
        "mlp": mlp or settings.one_of("hidden_act", {"silu": "swiglu"}, "silu"),
        "biases": biases(qkv=attention, out=attention),
    }


def like_gpt(settings: Settings) -> dict[str, Any]:
    """The options of a model of GPT-2's kind, but for its sizes and biases."""
    activations = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
    return {
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": settings.number("layer_norm_epsilon", 1e-5),
        "mlp": settings.one_of("activation_function", activations, "gelu_new"),
    }


def written_like_gpt(cfg: ModelConfig) -> dict[str, Any]:
    """What `like_gpt` reads."""
    activation = {"gelu": "gelu_new", "gelu_exact": "gelu"}[cfg.mlp]
    return {"vocab_size": cfg.vocab_size, "activation_function": activation, "layer_norm_epsilon": cfg.norm_eps}


def sizes(settings: Settings, head: int | None = None) -> dict[str, Any]:
    """The sizes that most families call alike; a head without a width of its own has `head`, or D / H."""
    heads = settings.whole("num_attention_heads")
    width, kv = settings.whole("hidden_size"), settings.whole("num_key_value_heads", heads)
    head = settings.whole("head_dim", head or max(1, width // heads))
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


def without(said: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The same but for keys that a family does not have."""
    return {key: value for key, value in said.items() if key not in keys}


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
        "rope_scaling": None if cfg.rope_scaling == "none" else written_rope(cfg),
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


def raised(tensor: str, parameter: str) -> Held:
    """A norm's scale, of which the tensor lacks 1."""
    return Held(tensor, (parameter,), lambda x: (x + 1,), lambda parts: parts[0] - 1)


def entry_and_norms_of_gpt(cfg: ModelConfig) -> Iterator[Held]:
    """Positions and norms in the way of GPT-2."""
    yield vector("transformer.wpe.weight", "entry/positions")
    norms = {"transformer.ln_f": "final_norm"}
    for i in range(cfg.layers):
        norms |= {
            f"transformer.h.{i}.ln_1": f"layer_{i}/attention_norm",
            f"transformer.h.{i}.ln_2": f"layer_{i}/mlp_norm",
        }
    for theirs, ours in norms.items():
        yield vector(f"{theirs}.weight", f"{ours}/scale")
        yield vector(f"{theirs}.bias", f"{ours}/bias")


Scale = Callable[[str, str], Held]  # how a norm's scale is held


def layer_of_llama(cfg: ModelConfig, i: int, scale: Scale = vector) -> Iterator[Held]:
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
            yield scale(f"{there}.self_attn.{theirs}.weight", f"{here}/attention/{ours}_norm/scale")


# By where a layer norms: our norms and what they are called.
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def body_of_llama(cfg: ModelConfig, scale: Scale = vector) -> Iterator[Held]:
    """All layers in the way of Llama, with the norms that have a scale."""
    for i in range(cfg.layers):
        yield from layer_of_llama(cfg, i, scale)
        if cfg.norm != "nonparametric_layernorm":
            for ours, theirs in _NORMS[cfg.norm_place].items():
                yield scale(f"model.layers.{i}.{theirs}.weight", f"layer_{i}/{ours}/scale")
    if cfg.norm != "nonparametric_layernorm":
        yield scale("model.norm.weight", "final_norm/scale")
