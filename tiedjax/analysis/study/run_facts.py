"""What a study's results say of its runs themselves: lengths, losses, sizes, times, and what sets arms apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiedjax import tying
from tiedjax.analysis.basis.study_runs import Runs
from tiedjax.config import StudyConfig
from tiedjax.config_files import flatten, to_tree
from tiedjax.flops import model_flops

REPORTED_LOSS = "eval_loss_odd"  # of metrics.jsonl, where a sweep has chosen options by the even windows


def held_out_losses(runs: Runs, arm: str, loss: str) -> dict[int, float | None]:
    """Seed: the last of this column of the arm's metrics, nats a token; None where it was not evaluated."""
    return {seed: _last(run.metrics.get(loss)) for (name, seed), run in runs.items() if name == arm}


def run_facts(run: Any, loss: str) -> dict[str, Any]:
    """Its name, length, losses (nats a token), size and time."""
    metrics = run.metrics
    return {
        "name": run.name,
        "steps": int(metrics["step"][-1]),
        "tokens": int(metrics["tokens"][-1]),
        "train_loss": _last(metrics.get("loss")),
        "eval_loss": _last(metrics.get(loss)),
        "parameters": _parameters(run.config),
        "flops_per_token": model_flops(run.config) / (run.config.data.batch_size * run.config.model.seq_len),
        "training_seconds": _training_seconds(metrics),
    }


def _parameters(config: Any) -> int:
    """How many numbers a run trains at its end: the body's and the tables', a shared table once."""
    import jax

    from tiedjax.lm import abstract_params, trained

    last = tying.stage(config, changed=True)
    return sum(leaf.size for leaf in jax.tree.leaves(trained(abstract_params(last))))


def _training_seconds(metrics: Mapping[str, np.ndarray]) -> float | None:
    """The time that the logged lines took, from their tokens and tokens per second; pauses do not count."""
    if "tokens_per_second" not in metrics:
        return None
    seconds = np.diff(metrics["tokens"], prepend=0) / metrics["tokens_per_second"]
    return float(seconds[np.isfinite(seconds)].sum())


def _last(column: np.ndarray | None) -> float | None:
    logged = [] if column is None else np.asarray(column, np.float64)[np.isfinite(column)]
    return float(logged[-1]) if len(logged) else None


def differences(study: StudyConfig, runs: Runs, arm: str, seed: int) -> dict[str, Any]:
    """Dotted key: [the reference's value, the arm's value], from the configs that the runs resolved to."""
    if (arm, seed) not in runs:
        return {}
    options = dict(flatten(to_tree(runs[arm, seed].config)))
    reference = dict(flatten(to_tree(runs[study.reference, seed].config)))
    return {key: [reference[key], value] for key, value in options.items() if reference[key] != value}
