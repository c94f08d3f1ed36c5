"""What all tests share: strict JAX, small configs, and a model that computes in float64."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tiedjax import model
from tiedjax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig, TyingConfig

jax.config.update("jax_numpy_rank_promotion", "raise")


def small_config(scheme: str = "tied", **changes: Any) -> RunConfig:
    """A model that compiles in a second; `changes` are whole sections or fields of the model."""
    fields = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 24, "seq_len": 8, "vocab_size": 32}
    sections: dict[str, Any] = {
        "model": ModelConfig(**fields),
        "tying": TyingConfig(scheme=scheme),  # type: ignore[arg-type]
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "data": DataConfig(batch_size=8),
        "train": TrainConfig(steps=10),
    }
    model_changes = {k: v for k, v in changes.items() if k not in sections}
    sections |= {k: v for k, v in changes.items() if k in sections}
    sections["model"] = dataclasses.replace(sections["model"], **model_changes)
    return RunConfig(**sections)


def random_tokens(cfg: RunConfig, seed: int = 0) -> np.ndarray:
    """int32 [B, T + 1]; the last quarter of the vocabulary never occurs."""
    shape = (cfg.data.batch_size, cfg.model.seq_len + 1)
    return np.random.default_rng(seed).integers(0, cfg.model.vocab_size * 3 // 4, shape).astype(np.int32)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64."""
    monkeypatch.setattr(model, "compute_dtype", lambda cfg: np.dtype("float64"))
    with jax.enable_x64(True):
        yield
