"""Time and memory of `tiedjax analyze spectral`, the whole command in a process of its own.

python benchmarks/spectral.py --machine "2-core x86-64 virtual machine"   # V = 50,304, D = 1,024
python benchmarks/spectral.py --kind random --machine "..."              # tables of independent normals
python benchmarks/spectral.py --before ../older --machine "..."          # in turns with another checkout

Each round runs the command on the same two .npy files. Tables that look trained have directions whose strength falls,
tokens in groups, lengths that fall with a token's rank as Zipf's law has it, and a mean; the two share all but the
directions' places and the noise. Prints, and adds the result to benchmarks/results/spectral.json under "kind VxD".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy

ROOT = Path(__file__).parent.parent
SAVED = ROOT / "benchmarks" / "results" / "spectral.json"
DIRECTIONS = 512
GROUPS = 400


def random(rows: int, width: int, seed: int) -> np.ndarray:
    """A table of independent normals."""
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


def trained_like(rows: int, width: int, seed: int) -> np.ndarray:
    """A table that looks trained; those of two seeds look like the tables of twins."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    rank_V = common.permutation(rows) + 1.0
    factors_VR = common.standard_normal((rows, DIRECTIONS), dtype=np.float32)
    centre_GR = 0.8 * common.standard_normal((GROUPS, DIRECTIONS), dtype=np.float32)
    factors_VR += centre_GR[common.integers(GROUPS, size=rows)]
    factors_VR *= np.arange(1, DIRECTIONS + 1, dtype=np.float32) ** -0.5
    table_VD = factors_VR @ own.standard_normal((DIRECTIONS, width), dtype=np.float32)
    deviation = float(table_VD.std())
    table_VD += 0.5 * deviation * own.standard_normal((rows, width), dtype=np.float32)
    table_VD += 0.7 * deviation * own.standard_normal(width, dtype=np.float32)
    return table_VD * np.float32(rank_V**-0.2)[:, None]


def run(checkout: Path, tables: list[Path]) -> dict[str, Any]:
    """One run of the command as that checkout has it: seconds, the processors' seconds, memory, and what it found."""
    out = tables[0].parent / "out.json"
    command = [sys.executable, "-m", "tiedjax", "analyze", "spectral", *map(str, tables), "--json", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=tables[0].parent)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{checkout}: the command ended with status {process.returncode}")
    found = json.loads(out.read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "distance": found["distance"]["score"],
        "floor": found["distance"]["floor"],
        "paper_distance": found["paper"]["score"],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads of times and memory; what was found, which is the same in every run."""
    varying = ("seconds", "cpu_seconds", "peak_bytes")
    return {name: spread([run[name] for run in runs]) for name in varying} | {
        name: value for name, value in runs[0].items() if name not in varying
    }


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--kind", choices=["trained_like", "random"], default="trained_like")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--before", type=Path, help="another checkout of this repository, run in turns")
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    args = parser.parse_args()
    make = {"trained_like": trained_like, "random": random}[args.kind]
    sides = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    load = []
    with tempfile.TemporaryDirectory() as folder:
        tables = [Path(folder) / f"{name}.npy" for name in "ab"]
        for seed, path in enumerate(tables):
            np.save(path, make(args.rows, args.width, seed))
        for _ in range(args.repeats):
            load.append(os.getloadavg()[0])
            for side, checkout in sides.items():
                runs[side].append(run(checkout, tables))
                print(side, json.dumps(runs[side][-1]), file=sys.stderr, flush=True)
    result = {"kind": args.kind, "rows": args.rows, "width": args.width, "repeats": args.repeats}
    result |= {side: summary(of) for side, of in runs.items()}
    result["load_average"] = load
    result["environment"] = {
        "machine": args.machine,
        "cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": {m.__name__: m.__version__ for m in (np, scipy, jax)},
    }
    print(json.dumps(result, indent=1))
    saved = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    saved[f"{args.kind} {args.rows}x{args.width}"] = result
    SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
