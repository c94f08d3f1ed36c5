"""Time and memory of `tiedjax analyze knn`'s search beside the bare matrix product that no exact search can do without.

python benchmarks/knn.py --machine "2-core x86-64 virtual machine"                 # V = 50,304, D = 512
python benchmarks/knn.py --rows 152000 --width 1024 --repeats 0 --machine "..."   # one search, no comparison

Each round times, one after the other on the same table: V x V products of row blocks by NumPy, the same by JAX, and
the search. The ratio of a round is search / the faster product. Prints, and adds the result to
benchmarks/results/knn.json under "VxD".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from tiedjax.analysis.instruments.neighbours.search import neighbours

SAVED = Path(__file__).parent / "results" / "knn.json"
BLOCK = 1024


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def numpy_product(table_VD: np.ndarray) -> None:
    """Every similarity once, in blocks of rows; each block overwrites the last."""
    out = np.empty((BLOCK, len(table_VD)), np.float32)
    for start in range(0, len(table_VD), BLOCK):
        rows = table_VD[start : start + BLOCK]
        np.matmul(rows, table_VD.T, out=out[: len(rows)])


def jax_product(table_VD: jax.Array) -> None:
    """The same on the device that JAX has, at full precision."""
    product = jax.jit(lambda rows, table: jnp.matmul(rows, table.T, precision="highest"))
    for start in range(0, len(table_VD), BLOCK):
        product(table_VD[start : start + BLOCK], table_VD).block_until_ready()


def peak_bytes() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(rows: int, width: int, k: int, repeats: int) -> dict[str, Any]:
    """One search for its memory, then `repeats` rounds."""
    table_VD = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
    neighbours(table_VD[: 4 * BLOCK], k)  # loads what is loaded once
    report = lambda line: print(line, file=sys.stderr, flush=True)
    before, load = resident_bytes(), [os.getloadavg()[0]]
    first = seconds(lambda: neighbours(table_VD, k, report=report))
    result: dict[str, Any] = {
        "rows": rows,
        "width": width,
        "k": k,
        "first_search_seconds": first,
        "peak_bytes_above_inputs": max(0, peak_bytes() - before),
    }
    times: dict[str, list[float]] = {"numpy_product": [], "jax_product": [], "search": []}
    on_device = jnp.asarray(table_VD)
    for _ in range(repeats):
        times["numpy_product"].append(seconds(lambda: numpy_product(table_VD)))
        times["search"].append(seconds(lambda: neighbours(table_VD, k)))
        times["jax_product"].append(seconds(lambda: jax_product(on_device)))
        load.append(os.getloadavg()[0])
    if repeats:
        pairs = zip(times["search"], times["numpy_product"], times["jax_product"], strict=True)
        result["ratios"] = [search / min(bare) for search, *bare in pairs]
        result["ratio"] = spread(result["ratios"])
        result["seconds"] = {name: spread(values) for name, values in times.items()}
    return result | {"load_average": load}


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of products and search (default: 5)")
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    args = parser.parse_args()
    result = measure(args.rows, args.width, args.k, args.repeats)
    result["environment"] = {
        "machine": args.machine,
        "cpus": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": {m.__name__: m.__version__ for m in (np, scipy, jax)},
    }
    print(json.dumps(result, indent=1))
    saved = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {}
    saved[f"{args.rows}x{args.width}"] = result
    SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
