"""Swaps words at every place that puts numbers into words, and counts the swaps that no test of words notices.

python benchmarks/swap.py                 # a line for each survivor, then the count; exit status 1 unless it is 0
python benchmarks/swap.py sentences claims    # of the modules whose path contains one of these

A swap exchanges one word for its counterpart (output for input, rises for falls, ...) in one string of one function,
in a copy of the package, and runs the tests of words there. Docstrings are left alone; so is what measures and writes
no words, which has tests of its own.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_sentences.py", "tests/test_sections_in_words.py")
MODULES = (
    *(f"study/{name}.py" for name in ("beside_paper", "claims", "overview", "sentences", "two_forms", "verdicts")),
    *(f"instruments/{path.parent.name}/section.py" for path in ROOT.glob("tiedjax/analysis/instruments/*/section.py")),
)
PAIRS = (
    ("output", "input"),
    ("tied", "untied"),
    ("first", "last"),
    ("early", "overall"),
    ("rare", "frequent"),
    ("rarest", "most frequent"),
    ("rises", "falls"),
    ("raises", "lowers"),
    ("higher", "lower"),
    ("nearer", "farther"),
    ("better", "worse"),
    ("more", "less"),
    ("above", "below"),
    ("before", "after"),
    ("precedes", "follows"),
    ("target", "context"),
    ("over", "under"),
    ("predicted", "observed"),
    ("holds", "the opposite"),
    ("Yes", "No"),
)
# Names that an f-string fills in.
NAMES = (("output", "input_"), ("early", "overall"), ("first", "last"), ("nearer", "other"), ("arm", "reference"))
# Functions that measure or gather records: what they compute is tested by its values.
MEASURING = {
    "collect",
    "together",
    "_record",
    "_words",
    "_named",
    "_twins",
    "_stratum_score",
    "arm_summary",
    "_windows",
}


@dataclass(frozen=True)
class Swap:
    """One place of a file, in bytes of its UTF-8 text, and what stands there instead."""

    file: Path
    function: str
    line: int
    start: int
    stop: int
    text: str


def swaps(file: Path) -> Iterator[Swap]:
    """Every swap of a file."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function, node in _nodes(ast.parse(source), ""):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        written = source[start:stop].decode()
        patterns = [(rf"(?<![A-Za-z]){word}(?![A-Za-z])", other) for word, other in _both_ways(PAIRS)]
        if isinstance(node, ast.JoinedStr):
            patterns += [(rf"(?<={{){word}(?=[}}:[.])", other) for word, other in _both_ways(NAMES)]
        for pattern, other in patterns:
            for place in re.finditer(pattern, written):
                begin = start + len(written[: place.start()].encode())
                line = source[:begin].count(b"\n") + 1
                yield Swap(file, function, line, begin, begin + len(place[0].encode()), other)


def _both_ways(pairs: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    for word, other in pairs:
        yield word, other
        yield other, word


def _nodes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """Each string and f-string, with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            if child.name not in MEASURING:
                yield from _nodes(child, child.name)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        elif isinstance(child, ast.AnnAssign):
            yield from _nodes(ast.Expression(child.value), function) if child.value else ()
        elif isinstance(child, ast.arg):
            continue  # its annotation is no text
        elif isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            yield function, child
        else:
            yield from _nodes(child, function)


class Trial:
    """A pytest plugin: instead of running the collected tests once, runs them after each swap, in a child of its own.

    The child has every module loaded already; the changed one is run once more, in its own namespace.
    """

    def __init__(self, copy: Path, modules: list[str], at_once: int):
        self.copy, self.modules, self.at_once = copy, modules, at_once
        self.running: dict[int, Swap | None] = {}
        self.sound = True
        self.total = self.alive = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.start(session, None)
        self.sound = self.ended()[1]
        for module in self.modules if self.sound else ():
            for swap in swaps(self.copy / "tiedjax" / "analysis" / module):
                if len(self.running) == self.at_once:
                    self.count(*self.ended())
                self.start(session, swap)
        while self.running:
            self.count(*self.ended())
        return True

    def start(self, session: pytest.Session, swap: Swap | None) -> None:
        """Begins the tests in a child, after the swap."""
        if child := os.fork():
            self.running[child] = swap
            return
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        failed = True
        try:
            if swap:
                name = ".".join(swap.file.relative_to(self.copy).with_suffix("").parts)
                source = swap.file.read_bytes()
                text = source[: swap.start] + swap.text.encode() + source[swap.stop :]
                exec(compile(text, swap.file, "exec"), importlib.import_module(name).__dict__)
            for item in session.items:
                session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                if session.testsfailed:
                    break
            failed = bool(session.testsfailed)
        finally:
            os._exit(failed)

    def ended(self) -> tuple[Swap | None, bool]:
        """The next swap whose tests have ended, and whether they passed."""
        child, status = os.wait()
        return self.running.pop(child), os.waitstatus_to_exitcode(status) == 0

    def count(self, swap: Swap | None, passed: bool) -> None:
        """Counts a swap, and names it if it survives."""
        assert swap
        self.total += 1
        self.alive += passed
        if passed:
            where = f"{swap.file.relative_to(self.copy)}:{swap.line}: {swap.function}"
            print(f"{where}: {swap.text!r} instead", file=sys.stderr, flush=True)


def main() -> int:
    """Prints survivors and their count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="parts of the paths of the modules to swap in; all without one")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="swaps tested side by side")
    args = parser.parse_args()
    modules = [name for name in MODULES if not args.parts or any(part in name for part in args.parts)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for name in ("tiedjax", "tests", "configs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        os.chdir(copy)
        sys.path[0] = str(copy)
        trial = Trial(copy, modules, args.at_once)
        pytest.main(["-qq", "-s", "-p", "no:cacheprovider", "--durations=0", *TESTS], plugins=[trial])
    if not trial.sound:
        print("the tests of words fail before anything is swapped", file=sys.stderr)
        return 1
    print(f"{trial.total} swaps, {trial.alive} survivors")
    return 1 if trial.alive or not trial.total else 0


if __name__ == "__main__":
    sys.exit(main())
