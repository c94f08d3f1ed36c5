"""Times the three fits of alignment against NumPy's own route, interleaved, and measures their memory.

    python benchmarks/align.py --machine "2-core x86-64 virtual machine"

Writes benchmarks/results/align.json. NumPy's route: float32 tables centred by their columns; the mean cosine of rows as
they are, after the rotation U V' of the singular value decomposition of X'Y, and after `numpy.linalg.lstsq`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SAVED = Path(__file__).parent / "results" / "align.json"
FITS = ("identity", "orthogonal", "linear")


def tables(rows: int, width: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Two related float32 tables whose singular values fall like rank ** -decay."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    y = x + rng.standard_normal((rows, width), dtype=np.float32)
    x *= (np.arange(1, width + 1) ** -decay).astype(np.float32)
    return x, y


def numpy_route(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The scores by NumPy."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)

    def score(mapped: np.ndarray) -> float:
        lengths = np.linalg.norm(mapped, axis=1) * np.linalg.norm(y, axis=1)
        return float(np.mean(np.sum(mapped * y, axis=1) / lengths))

    u, _, vt = np.linalg.svd(x.T @ y)
    return {
        "identity": score(x),
        "orthogonal": score(x @ (u @ vt)),
        "linear": score(x @ np.linalg.lstsq(x, y, rcond=None)[0]),
    }


def ours(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """The same scores by tiedjax, without floors."""
    from tiedjax.analysis.instruments.alignment.align import align

    return {fit: score.score for fit, score in align(x, y, fits=FITS, draws=0).scores.items()}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(rows: int, width: int, decay: float, repeats: int) -> dict[str, Any]:
    """Seconds of both sides, one after the other `repeats` times, and how far their scores differ."""
    x, y = tables(rows, width, decay)
    ours(x[:width], y[:width])  # imports JAX
    seconds: dict[str, list[float]] = {"numpy": [], "tiedjax": []}
    scores: dict[str, Any] = {}
    for _ in range(repeats):
        for name, route in [("tiedjax", ours), ("numpy", numpy_route)]:
            spent, scores[name] = timed(lambda route=route: route(x, y))
            seconds[name].append(spent)
            print(f"decay {decay}: {name} {spent:.1f} s {scores[name]}", flush=True)
    ratios = [a / b for a, b in zip(seconds["tiedjax"], seconds["numpy"], strict=True)]
    return {
        "rows": rows,
        "width": width,
        "singular_values": f"rank ** -{decay}",
        "seconds": seconds,
        "ratio_median": float(np.median(ratios)),
        "ratio_range": [min(ratios), max(ratios)],
        "scores": scores,
        "largest_difference": max(abs(scores["numpy"][fit] - scores["tiedjax"][fit]) for fit in FITS),
    }


def peak_memory(rows: int, width: int) -> dict[str, Any]:
    """In a process of its own: memory with both tables loaded, and its peak over all four fits with one floor."""
    program = f"""
import json, time
import numpy as np
from tiedjax.analysis.instruments.alignment.align import align
rng = np.random.default_rng(0)
x = rng.standard_normal(({rows}, {width}), dtype=np.float32)
y = x + rng.standard_normal(({rows}, {width}), dtype=np.float32)
status = lambda: open("/proc/self/status").read()  # ru_maxrss would begin with the parent's
peak = lambda: 1024 * int(status().split("VmHWM:")[1].split()[0])
before, began = peak(), time.perf_counter()
align(x, y, draws=1, held_out=True)
print(json.dumps(dict(before=before, peak=peak(), seconds=time.perf_counter() - began)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    usage = json.loads(done.stdout)
    return {
        "rows": rows,
        "width": width,
        "inputs_bytes": 2 * rows * width * 4,
        "with_inputs_bytes": usage["before"],
        "peak_bytes": usage["peak"],
        "above_inputs_bytes": usage["peak"] - usage["before"],
        "seconds_with_floor_and_held_out": usage["seconds"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--rows", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="0 measures memory alone and keeps the saved times")
    parser.add_argument("--wide", type=int, default=2560, help="width of the table of 152,000 rows, for its memory")
    args = parser.parse_args()
    kept = json.loads(SAVED.read_text(encoding="utf-8"))["time"] if not args.repeats else []
    results = {
        "machine": args.machine,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "jax": version("jax"),
        "time": [compare(args.rows, args.width, decay, args.repeats) for decay in (0.0, 1.0)] if args.repeats else kept,
        "memory": [peak_memory(args.rows, args.width), peak_memory(152_000, args.wide)],
    }
    SAVED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
