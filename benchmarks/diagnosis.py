"""What `tiedjax diagnose` measures of every run of a study, over seeds; and the references that it comes with.

    tiedjax study quick --out studies/quick --train-only
    python benchmarks/diagnosis.py studies/quick --machine "2-core x86-64 virtual machine"

Trains nothing. Regret is re-fitted on fewer tokens than by default, so that a run takes less than two minutes; the
control among the references is that of `regret_study.json`, which has the default number. Saves benchmarks/results/
diagnosis.json, and tiedjax/analysis/diagnosis/references.json of the arm whose runs have two tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import flax
import jax

from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval, paired
from tiedjax.analysis.diagnosis.measure import diagnose
from tiedjax.config_files import read_yaml

RESULTS = Path(__file__).parent / "results"
PARTS = ("cooccurrence", "norms", "lens", "rounding", "regret")
REFERENCES = Path(__file__).parent.parent / "tiedjax" / "analysis" / "diagnosis" / "references.json"


def numbers_of(d: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a diagnosis that are compared over seeds, by name."""
    found: dict[str, float | None] = {}
    for role, of in d["cooccurrence"]["roles"].items():
        partial = of["partial"]
        found |= {
            f"{role} position": partial["position"]["mean"],
            f"{role} precedes": partial["as_target"]["score"],
            f"{role} follows": partial["as_context"]["score"],
        }
    for role, of in d["norms"]["roles"].items():
        found[f"{role} frequency R2"] = of["log_frequency"]["score"]
    found["lens less rotated, bits"] = d["lens"]["less_rotated"]["mean"]
    for cost in d["rounding"]["costs"]:
        name = f"{cost['bits']} bits {cost['use']}"
        found |= {name: cost["cost"]["score"], f"{name}, noise": cost["cost"]["floor"]}
    if d["regret"].get("regrets"):
        found |= {f"regret {name}": of["held_out"]["mean"] for name, of in d["regret"]["regrets"].items()}
        found["regret own"] = d["regret"]["own"]["held_out"]["mean"]
        found["balance"] = d["regret"]["balance"]
    return found


def over_seeds(runs: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> dict[str, Any]:
    """Of each arm, each number's mean and interval."""
    return {
        arm: {name: to_plain(interval(of[name] for of in by_seed.values())) for name in next(iter(by_seed.values()))}
        for arm, by_seed in runs.items()
    }


def control(arm: str) -> dict[str, Any]:
    """What re-fitting both tables saves the runs of an arm of the study of regrets, over seeds."""
    study = json.loads((RESULTS / "regret_study.json").read_text(encoding="utf-8"))
    runs = [run for run in study["regret"]["runs"] if run["arm"] == arm]
    saved = to_plain(interval(run["regrets"]["both"]["held_out"]["mean"] for run in runs))
    return dict(saved) | {name: runs[0][name] for name in ("fitting_tokens", "held_out_tokens")}


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a folder whose runs/ has a folder for each run, named ARM-SEED")
    parser.add_argument("--machine", required=True, help="what it ran on, in words")
    parser.add_argument("--fitting-tokens", type=int, default=16_384, metavar="N")
    parser.add_argument("--held-out-tokens", type=int, default=8_192, metavar="N")
    args = parser.parse_args()
    options = {"fitting_tokens": args.fitting_tokens, "held_out_tokens": args.held_out_tokens}
    runs: dict[str, dict[int, dict[str, float | None]]] = {}
    rows: dict[str, int] = {}
    began = time.monotonic()
    for folder in sorted((args.study / "runs").iterdir()):
        arm, _, seed = folder.name.rpartition("-")
        found = diagnose(str(folder), **options)
        for name in PARTS:
            if "not_measured" in found[name]:
                raise SystemExit(f"{folder}: {name}: {found[name]['not_measured']}")
        runs.setdefault(arm, {})[int(seed)] = numbers_of(found)
        rows[arm] = 0 if found["shared"] else found["rows"]
        print(folder.name, json.dumps(runs[arm][int(seed)]), flush=True)
    arms = over_seeds(runs)
    config = read_yaml(args.study / "runs" / f"{arm}-{seed}" / "config.yaml")
    (untied,) = (arm for arm, count in rows.items() if count)
    tension = {
        arm: to_plain(paired(*({s: of["regret both"] for s, of in runs[a].items()} for a in (arm, untied))))
        for arm in runs
        if arm != untied
    }
    about = {
        "machine": args.machine,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
        "config": {key: config[key] for key in ("model", "optimizer")} | {"steps": config["train"]["steps"]},
        "data": config["data"]["source"],
        "seeds": {arm: sorted(by_seed) for arm, by_seed in runs.items()},
    }
    seconds = time.monotonic() - began
    saved = about | {"regret": options, "seconds": seconds, "arms": arms, "tension_less_untied": tension, "runs": runs}
    (RESULTS / "diagnosis.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    reference = {
        "study": args.study.name,
        "arm": untied,
        "seeds": len(runs[untied]),
        **{key: about[key] for key in ("machine", "date", "versions", "config", "data")},
        "position": {role: arms[untied][f"{role} position"] for role in ("input", "output")},
        "frequency": {role: arms[untied][f"{role} frequency R2"] for role in ("input", "output")},
        "regret": control(untied),
    }
    known = json.loads(REFERENCES.read_text(encoding="utf-8")) | {str(rows[untied]): reference}
    REFERENCES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
