"""Held-out losses of a study's runs by arm and seed, where it was trained on a machine that keeps its tables.

    short="--data.batch_size 64 --train.steps 600 --optimizer.warmup_steps 60"
    tiedjax study g43 --data.source prepared:text --train-only --out g43 $short   # there; metrics.jsonl comes back
    tiedjax bench g43 --data.source prepared:text --json bench.json $short        # there too
    python benchmarks/study_losses.py g43/runs --bench bench.json --prepared text --machine "one H100 80GB"

Prints every arm's difference to the baseline over the seeds that both have, with its interval, and saves all to
benchmarks/results/STUDY_losses.json. A run that was not finished is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiedjax.analysis.basis.statistics import paired
from tiedjax.config_files import read_yaml

RESULTS = Path(__file__).parent / "results"
MEANS = ("output_grad_share", "role_update_cosine")  # over the steps of a run


def ended(run: Path) -> dict[str, Any] | None:
    """What a finished run's metrics say; None of one that was not finished."""
    path = run / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
    rows = [json.loads(line) for line in whole]
    if not rows or rows[-1]["step"] < read_yaml(run / "config.yaml")["train"]["steps"]:
        return None
    last = {key: rows[-1][key] for key in ("step", "tokens", "loss", "eval_loss")}
    means = {key: sum(row[key] for row in rows) / len(rows) for key in MEANS if all(key in row for row in rows)}
    return last | {"mean": means}


def differences(arms: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """Held-out loss of every other arm less the baseline's, nats a token, over the seeds that both have."""
    by_seed = {arm: {int(seed): run["eval_loss"] for seed, run in runs.items()} for arm, runs in arms.items()}
    return {arm: asdict(paired(losses, by_seed[baseline])) for arm, losses in by_seed.items() if arm != baseline}


def main() -> None:
    """Collects, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder with a folder for each run, named ARM-SEED")
    parser.add_argument("--name", default="g43", help="the study's name")
    parser.add_argument("--bench", type=Path, required=True, help="what `tiedjax bench --json` saved on that machine")
    parser.add_argument("--prepared", type=Path, required=True, metavar="DIR", help="the prepared text that they read")
    parser.add_argument("--baseline", default="tied", metavar="ARM")
    parser.add_argument("--machine", required=True, help="what it ran on, in words")
    args = parser.parse_args()
    arms: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    for folder in sorted(args.runs.iterdir()):
        arm, _, seed = folder.name.rpartition("-")
        if run := ended(folder):
            arms.setdefault(arm, {})[seed] = run
            config = read_yaml(folder / "config.yaml")
    bench = json.loads(args.bench.read_text(encoding="utf-8"))
    kept = ("device", "versions", "flags", "step_seconds", "tokens_per_second", "mfu_causal", "peak_memory_bytes")
    text = json.loads((args.prepared / "meta.json").read_text(encoding="utf-8"))["segments"]["train"]
    found = differences(arms, args.baseline)
    for arm, each in found.items():
        print(f"{arm} less {args.baseline}: {each}")
    saved = {"machine": args.machine, "bench": {key: bench[key] for key in kept}, "baseline": args.baseline}
    saved["text_tokens"] = sum(segment["stop"] - segment["start"] for segment in text)
    saved |= {"config": {key: config[key] for key in ("model", "optimizer", "train")}}
    saved["config"]["data"] = {"batch_size": config["data"]["batch_size"]}
    saved |= {"differences": found, "arms": arms}
    (RESULTS / f"{args.name}_losses.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
