"""The angles of rotary position embedding (arXiv 2104.09864), in NumPy float64.

Axes: S positions, K columns of a head that are rotated, in K / 2 pairs with one frequency each.
"""

from __future__ import annotations

import math

import numpy as np

from tiedjax.config import ModelConfig

_TURNS = {"llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}


def rotation(cfg: ModelConfig, S: int, windowed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [1, S, 1, 1, K / 2] and signed sines [1, S, 1, 2, K / 2] of `model.rotate` at positions 0 to S - 1.

    Of layers with a window or without.
    """
    frequency_K2 = frequencies(cfg, windowed)
    angle_1S11K = (np.arange(S)[:, None] * frequency_K2)[None, :, None, None, :]
    sine_1S11K = np.sin(angle_1S11K)
    cos, sin = np.cos(angle_1S11K), np.concatenate([-sine_1S11K, sine_1S11K], axis=3)
    factor = 1.0 if windowed else magnitude(cfg)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def frequencies(cfg: ModelConfig, windowed: bool) -> np.ndarray:
    """Radians per position, [K / 2]; scaled as `model.rope_scaling` says, but never of layers with a window."""
    K = cfg.rotary_width
    theta = cfg.window_theta if windowed and cfg.window_theta is not None else cfg.rope_theta
    frequency_K2: np.ndarray = theta ** (-np.arange(0, K, 2) / K)
    if windowed or cfg.rope_scaling == "none":
        return frequency_K2
    return frequency_K2 * (1 - _divided(cfg, frequency_K2) * (1 - 1 / (cfg.rope_factor or 1)))


def _divided(cfg: ModelConfig, frequency_K2: np.ndarray) -> np.ndarray:
    """How much of each frequency is divided by the factor: 1 all, 0 nothing, [K / 2]."""
    if cfg.rope_scaling == "linear":
        return np.ones_like(frequency_K2)
    few, many = turns(cfg)
    positions = cfg.rope_positions or 1
    if cfg.rope_scaling == "llama3":  # blended by turns
        turns_K2 = positions * frequency_K2 / (2 * math.pi)
        return 1 - np.clip((turns_K2 - few) / (many - few), 0, 1)
    # YaRN: blended by the number of the pair, between the pairs, rounded outwards, that make as many turns.
    K = cfg.rotary_width
    first, last = (
        K * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta)) for turns in (many, few)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), K - 1)
    return np.clip((np.arange(K // 2) - first) / max(last - first, 1e-3), 0, 1)


def turns(cfg: ModelConfig) -> tuple[float, ...]:
    """`model.rope_turns`, of a rope of kind llama3 or yarn."""
    return cfg.rope_turns or _TURNS[cfg.rope_scaling]


def magnitude(cfg: ModelConfig) -> float:
    """What cosines and sines are multiplied by; only YaRN's are."""
    if cfg.rope_scaling != "yarn":
        return 1.0
    return cfg.rope_magnitude or 1 + 0.1 * math.log(cfg.rope_factor or 1)
