"""Compares the verdicts of two finished studies of one plan: the quick study with one and with two threads a run.

tiedjax study --out one && tiedjax study --out two --train.threads 2
python benchmarks/verdicts.py one two --machine "2-core x86-64 virtual machine"

A verdict is the same in both, or one of them says that it is near the edge; exit status 1 where neither is so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SAVED = Path(__file__).parent / "results" / "verdicts.json"
KEPT = ("verdict", "near_edge", "margin", "interval", "p", "level")


def compared(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Per statement both verdicts, and whether they agree: the same word, or near the edge."""
    first, second = (study["statements"] for study in studies)
    statements = {}
    for name in dict.fromkeys([*first, *second]):
        both = [side.get(name) for side in (first, second)]
        words = [statement and statement["verdict"] for statement in both]
        edge = any(statement and statement["near_edge"] for statement in both)
        sides = [{key: statement[key] for key in KEPT} if statement else None for statement in both]
        statements[name] = {"same": words[0] == words[1], "agree": words[0] == words[1] or edge, "sides": sides}
    return statements


def main() -> int:
    """Prints a line for each statement and saves all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs=2, type=Path, metavar="STUDY", help="a finished study's directory")
    parser.add_argument("--machine", required=True, help="what they ran on, in words")
    args = parser.parse_args()
    studies = [json.loads((path / "results.json").read_text(encoding="utf-8")) for path in args.studies]
    statements = compared(studies)
    for name, record in statements.items():
        words = [f"{side['verdict']}{' (near the edge)' if side['near_edge'] else ''}" for side in record["sides"]]
        print(f"{name:36} {words[0]:28} {words[1]:28} {'' if record['agree'] else 'DIFFERENT'}")
    threads = [study["study"]["config"]["train"]["threads"] for study in studies]
    about = {"machine": args.machine, "threads": threads, "packages": studies[0]["environment"]["packages"]}
    SAVED.write_text(json.dumps(about | {"statements": statements}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(record["agree"] for record in statements.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
