"""Writes the quick study's block of README.md from a finished study: no number in it is typed by hand.

python benchmarks/readme.py studies/quick --machine "2-core x86-64 virtual machine"   # after `tiedjax study`
python benchmarks/readme.py                                                           # again, from what was saved
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SAVED = ROOT / "benchmarks" / "results" / "quick_study.json"
PICTURE = ROOT / "docs" / "quick_study.png"
BEGIN, END = "<!-- quick study: begin -->\n", "<!-- quick study: end -->\n"


def save(study: Path, machine: str) -> None:
    """Keeps of a study what README shows, and the picture."""
    results = json.loads((study / "results.json").read_text(encoding="utf-8"))
    kept = {name: results[name] for name in ("answer", "findings", "statements", "headline", "runs", "environment")}
    kept["environment"]["machine"] = machine
    SAVED.parent.mkdir(parents=True, exist_ok=True)
    SAVED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(study / "figures" / "alignment.png", PICTURE)


def block(results: dict[str, Any]) -> str:
    """The Markdown between the two markers."""
    environment = results["environment"]
    packages = environment["packages"]
    seconds = sum(run["training_seconds"] for run in results["runs"])
    made = (
        f"{len(results['runs'])} runs trained in {seconds / 60:.1f} minutes on a "
        f"{environment['machine']} ({environment['date']}, Python {environment['python']}, jax {packages['jax']}, "
        f"flax {packages['flax']})"
    )
    lines = [
        f"![How near the tied table is to its untied twin's tables]({PICTURE.relative_to(ROOT)})\n",
        f"> {results['answer']}\n>",
        *(f"> {finding}\n>" for finding in results["findings"]),
        f"> The quick study: {made}.\n",
    ]
    return "\n".join(lines)


def readme_with_block() -> str:
    """README.md as the saved results want it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + block(json.loads(SAVED.read_text(encoding="utf-8"))) + END + after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help="a finished quick study")
    parser.add_argument("--machine", help="what it ran on, in words")
    args = parser.parse_args()
    if args.study:
        if not args.machine:
            parser.error("--machine: say in words what the study ran on")
        save(args.study, args.machine)
    (ROOT / "README.md").write_text(readme_with_block(), encoding="utf-8")
