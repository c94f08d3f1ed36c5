"""Runs that take a second, through the real command line, and what they leave on disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from programs import REPOSITORY, start

STEPS = 8
SHRUNK: dict[str, Any] = {
    "data.holdout": 0.1,
    "data.batch_size": 8,
    "data.workers": 1,
    "model.layers": 1,
    "model.d_model": 16,
    "model.heads": 2,
    "model.d_ff": 32,
    "model.seq_len": 16,
    "model.vocab_size": 320,
    "optimizer.warmup_steps": 2,
    "train.steps": STEPS,
    "train.eval_batches": 3,
    "train.checkpoint_every": "null",
    "train.snapshot_every": 6,
}


def write_text(path: Path, seed: int = 0) -> Path:
    """Eighty documents of made-up words whose frequencies fall as 1 / rank."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 8))) for _ in range(200)]
    chance = 1 / np.arange(1, 201)
    texts = [" ".join(rng.choice(words, 100, p=chance / chance.sum())) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def arguments(out: Path | str, text: Path, changes: Mapping[str, Any] | None = None) -> list[str]:
    """The command line, after `tiedjax`, of a shrunk configs/tiny.yaml in the run directory `out`."""
    overrides = {"data.source": f"text:{text}", **SHRUNK, **(changes or {})}
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    return ["train", str(REPOSITORY / "configs" / "tiny.yaml"), "--out", str(out), *options]


def write_config(path: Path, text: Path, changes: Mapping[str, Any] | None = None) -> None:
    """The config file of a shrunk run."""
    sections: dict[str, list[str]] = {}
    for key, value in {"data.source": f"text:{text}", **SHRUNK, **(changes or {})}.items():
        section, _, field = key.partition(".")
        sections.setdefault(section, []).append(f"{field}: {value}")
    path.write_text("".join(f"{section}: {{{', '.join(fields)}}}\n" for section, fields in sections.items()))


def start_commands(commands: Sequence[list[str]], *, devices: int = 1, before: str = "") -> subprocess.Popen[str]:
    """Starts one process that runs command lines one after the other, after the Python statements `before`."""
    program = f"import json, sys\nfrom tiedjax.cli import main\n{before}\n"
    program += "for command in json.loads(sys.argv[1]):\n    status = main(command)\n    if status: sys.exit(status)\n"
    return start(["-c", program, json.dumps(commands)], devices=devices)


def saved_state(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a full checkpoint as Orbax reads it, by its path."""
    path = run.absolute() / "checkpoints" / str(step) / "tree"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = reader.restore(path, restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which must be strict JSON, without the one key that depends on the clock."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"metrics.jsonl holds a bare {constant}")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in found]


def assert_same_run(one: Path, other: Path, step: int = STEPS) -> None:
    """Both runs hold the same bits: every leaf of parameters and optimizer state, and every line of the metrics."""
    a, b = saved_state(one, step), saved_state(other, step)
    assert a.keys() == b.keys()
    assert {name.split("/")[0] for name in a} >= {"step", "params", "opt_state"}
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name
    assert rows(one) == rows(other)
