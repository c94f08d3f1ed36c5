"""The shape of the package: which way its imports point, and where each heavy dependency lives."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import REPOSITORY

from tiedjax import analysis
from tiedjax.tying import SCHEMES

PACKAGE = REPOSITORY / "tiedjax"
INSTRUMENTS = tuple(f".{path.parent.name}" for path in PACKAGE.glob("analysis/instruments/*/command.py"))
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# config <- config_files <- whatever reads or writes YAML;
# config, rng <- sharding <- tying, model, lookup, loss, optimizer <- lm, step <- loop <- study <- cli: for each part
# what it may import besides `LEAVES`.
LEAVES = {"errors", "files", "npy", "rng", "text"}
ANYWHERE = {"host.storage"}  # which imports leaves alone
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "npy": set(),
    "text": set(),
    "rng": set(),
    "config": set(),
    "config_errors": set(),
    "config_files": {"config", "config_errors"},
    "tying": {"config", "tying"},
    "sharding": {"config"},
    "attention": {"sharding"},
    "lookup": {"sharding"},
    "exp_product": {"sharding"},
    "loss": {"sharding", "lookup", "exp_product"},
    "rope": {"config"},
    "model": {"config", "sharding", "attention", "rope"},
    "muon": {"config", "flops", "sharding", "table_rules"},
    "table_rules": {"tying"},
    "optimizer": {"config", "muon", "sharding", "table_rules", "tying"},
    "host": {"host"},
    "flops": {"config", "tying"},
    "checkpoint": {"saves"},
    "lm": {"config", "tying", "model", "loss", "lookup", "sharding"},
    "gradients": {"config", "tying", "model", "lookup", "sharding", "lm"},
    "step_metrics": set(),
    "step": {"config", "tying", "optimizer", "table_rules", "sharding", "lm", "gradients", "step_metrics"},
    "run": {"config", "config_files", "tying", "model", "checkpoint", "lm"},
    "data": {"config", "data"},
    "interop": {"config", "data", "interop", "lm", "model", "rope", "run"},
    "sample": {"config", "tying", "model", "lookup", "lm", "run", "data"},
    "sinks": set(),
    "trackers": set(),
    "metrics": {"run", "sinks"},
    "counting": {"config", "data", "host"},
    "evaluation": {"config", "data", "host", "sharding", "step"},
    "left_out": set(),
    "recording": {"config", "host", "left_out", "metrics", "sinks", "step_metrics"},
    "beginning": {"config", "tying", "checkpoint", "data", "host", "interop", "lm", "run", "step"},
    "continuing": {"config", "config_files", "counting", "data", "host", "run", "tying"},
    "saving": {"beginning", "checkpoint", "continuing", "host", "saves", "step"},
    "loop": {
        "run",
        "beginning",
        "continuing",
        "counting",
        "evaluation",
        "left_out",
        "recording",
        "config",
        "config_files",
        "tying",
        "sharding",
        "host",
        "checkpoint",
        "data",
        "lm",
        "metrics",
        "saves",
        "saving",
        "step",
        "step_metrics",
    },
    "analysis": {
        "config",
        "flops",
        "config_files",
        "tying",
        "model",
        "loss",
        "lookup",
        "checkpoint",
        "lm",
        "run",
        "data",
        "sample",
        "interop",
        "analysis",
    },
    "saves": {"config"},
    "check": {
        "beginning",
        "checkpoint",
        "config",
        "config_files",
        "continuing",
        "counting",
        "data",
        "run",
        "sharding",
        "step",
        "tying",
    },
    "plan": {"config", "config_files", "tying", "flops"},
    "sweep": {"plan"},
    "estimate": {"config", "tying", "flops", "muon", "saves"},
    "work": {"config", "config_files", "host", "loop", "run", "sweep", "tying"},
    "study": {"config", "config_files", "data", "host", "loop", "plan", "sweep", "estimate", "work", "analysis"},
    "decide": {
        "config",
        "config_files",
        "tying",
        "sharding",
        "host",
        "loop",
        "plan",
        "step",
        "study",
        "estimate",
        "work",
        "analysis",
    },
    "cost": {
        "config",
        "config_files",
        "tying",
        "model",
        "muon",
        "optimizer",
        "sharding",
        "host",
        "metrics",
        "flops",
        "step",
        "step_metrics",
        "cost",
    },
    "cli": {
        "config",
        "config_files",
        "config_errors",
        "data",
        "analysis",
        "host",
        "run",
        "sample",
        "check",
        "loop",
        "plan",
        "study",
        "decide",
        "cost",
        "interop",
    },
    "__main__": {"cli", "host"},
    "__init__": {"interop", "run"},
}

# A heavy dependency: the files that may import it, and whether it must wait until it is used.
HOMES: dict[str, set[str]] = {
    "orbax": {"checkpoint.py"},
    "grain": {"data/batches.py"},
    "tensorflow_datasets": {"data/sources.py", "data/embedded_corpus/embedded_corpus_dataset_builder.py"},
    "matplotlib": {"analysis/study/figures.py"},
    "jinja2": {"analysis/study/html.py"},
    "tensorboardX": {"metrics.py"},
    "wandb": {"trackers.py"},
    "trackio": {"trackers.py"},
    "mlflow": {"trackers.py"},
    "safetensors": {"interop/tensors.py"},
    "gguf": {"interop/gguf.py"},
    "torch": {"interop/tensors.py"},  # where a model's weights are in its format
    "tokenizers": {"data/tokenizer.py"},
    "fsspec": {"host/storage.py"},
    "etils": {"host/storage.py"},
    "openTSNE": {"analysis/instruments/picture/projection.py"},
    "pydantic": {"config_files.py"},
    "ruamel": {"config_files.py"},
    "optax": {"gradients.py", "muon.py", "optimizer.py", "step.py", "table_rules.py"},
}
# What the command line reaches before it knows its command: it may load none of the heavy ones.
LIGHT = {"__init__", "__main__", "cli", "config", "config_errors", "config_files", "errors", "files", "text"}
LIGHT |= {"host/__init__", "host/ending", "host/platform_flags", "host/signals", "host/storage", "host/watch"}
NEVER = {"tensorflow", "absl", "clu"}


class Import(NamedTuple):
    """One import: the module's dotted name (of this package: without `tiedjax.`), and when it happens."""

    name: str
    line: int
    own: bool
    at_start: bool


@functools.cache
def imports(path: Path) -> list[Import]:
    """Every import of a file, whether at its start, in a function, or for the type checker only."""
    tree = ast.parse(path.read_text())
    at_start = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            whole = module == "tiedjax" or module.endswith(
                (".data", ".analysis", ".host", ".cost", ".basis", ".instruments", *INSTRUMENTS)
            )
            names = [f"{module}.{alias.name}" if whole else module for alias in node.names]
        else:
            continue
        for name in names:
            own = name.split(".")[0] == "tiedjax"
            short = name.removeprefix("tiedjax").removeprefix(".") if own else name
            found.append(Import(short, node.lineno, own, id(node) in at_start))
    return found


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its top-level module or folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path}:{each.line}: {part(path)} imports {top}"
        for path in FILES
        for each in imports(path)
        if each.own
        and (top := each.name.split(".")[0]) not in {"", *ALLOWED[part(path)], *LEAVES}
        and each.name not in ANYWHERE
    ]
    assert not wrong, "\n".join(wrong)


def test_the_arrows_have_no_circle_and_every_part_is_on_the_map() -> None:
    assert {part(path) for path in FILES} == set(ALLOWED)
    left = {name: targets - {name} for name, targets in ALLOWED.items()}
    while left:
        free = {name for name, targets in left.items() if not targets & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


def test_the_core_never_imports_analysis_nor_the_model_tying() -> None:
    """Two arrows that the map above must never be edited to allow."""
    core = set(ALLOWED) - {"analysis", "study", "decide", "cli"}
    assert all("analysis" not in ALLOWED[name] for name in core)
    assert "tying" not in ALLOWED["model"] | ALLOWED["loss"] | ALLOWED["sharding"]
    assert not ALLOWED["analysis"] & {"step", "loop", "study", "cli", "metrics", "host", "cost"}


# basis <- instruments/* <- study, command: besides basis and itself an instrument may import the one that stands here.
BESIDE = {"account": "alignment", "evolution": "alignment", "graph_distance": "neighbours"}


def test_the_rooms_of_analysis_import_one_way() -> None:
    for path in PACKAGE.glob("analysis/**/*.py"):
        room, *inner = path.relative_to(PACKAGE / "analysis").parts
        reached = {
            tuple(each.name.split(".")[1:]) for each in imports(path) if each.own and each.name.startswith("analysis.")
        }
        if room == "basis":
            assert {names[0] for names in reached} <= {"basis"}, path
        elif room == "instruments" and len(inner) == 2:
            assert {names[0] for names in reached} <= {"basis", "instruments"}, path
            others = {names[1] for names in reached if names[0] == "instruments"} - {inner[0]}
            assert others <= {BESIDE.get(inner[0])}, path
        elif room == "study":
            assert {names[0] for names in reached} <= {"basis", "instruments", "study"}, path
        elif room == "diagnosis":
            assert {names[0] for names in reached} <= {"basis", "instruments", "study", "diagnosis"}, path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_import_the_public_surface_alone(path: Path) -> None:
    modules = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
    assert {name for name in modules if str(name).startswith("tiedjax")} <= {"tiedjax.analysis"}


def test_every_public_name_of_analysis_is_there_under_one_home() -> None:
    assert sorted(analysis.__all__) == sorted(analysis._HOMES)
    assert {name for name in analysis.__all__ if getattr(analysis, name) is not None} <= set(dir(analysis))
    with pytest.raises(AttributeError, match=r"module 'tiedjax\.analysis' has no attribute 'nothing'"):
        analysis.nothing  # noqa: B018


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_dependency_lives_behind_one_file(library: str) -> None:
    homes = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for each in imports(path)
        if not each.own and each.name.split(".")[0] == library
    }
    assert homes == HOMES[library]


def test_nothing_heavy_is_imported_before_a_command_is_known() -> None:
    standard = {"importlib", "collections", "typing", "pathlib", "argparse", "dataclasses", "contextlib"}
    instruments = PACKAGE / "analysis/instruments"
    light = {
        *LIGHT,
        "data/command",
        "analysis/command",
        "analysis/__init__",
        "data/__init__",
        "analysis/basis/arguments",
    }
    light |= {str(path.relative_to(PACKAGE)).removesuffix(".py") for path in instruments.glob("*/command.py")}
    heavy = {*HOMES, "jax", "flax", "numpy", "scipy"} - standard
    for path in FILES:
        name = str(path.relative_to(PACKAGE)).removesuffix(".py")
        if name in light:
            early = [each for each in imports(path) if each.at_start]
            assert not {each.name.split(".")[0] for each in early if not each.own} & heavy, path
            own = {each.name for each in early if each.own and each.name}
            reached = {o.replace(".", "/").removeprefix("/") for o in own}
            assert {o for o in reached if (PACKAGE / f"{o}.py").exists()} <= light, path


def test_no_private_module_of_a_library_and_none_that_is_unwanted() -> None:
    for path in FILES:
        for each in imports(path):
            if not each.own:
                pieces = each.name.split(".")
                assert not any(piece.startswith("_") and piece != "__future__" for piece in pieces), (
                    f"{path}:{each.line}"
                )
                assert pieces[0] not in NEVER, f"{path}:{each.line}: {pieces[0]}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr != "_src", f"{path}:{node.lineno}"


def test_only_tying_knows_tied_from_untied() -> None:
    """No other file compares with the name of a scheme, or picks one by its literal name."""
    for path in FILES:
        if part(path) == "tying":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            compared: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
            elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") != "Literal":
                compared = [node.slice]
            elif isinstance(node, ast.MatchValue):
                compared = [node.value]
            names = {n.value for c in compared for n in ast.walk(c) if isinstance(n, ast.Constant)}
            assert not names & set(SCHEMES), f"{path}:{node.lineno}: {names & set(SCHEMES)}"  # type: ignore[attr-defined]
            if isinstance(node, ast.If | ast.IfExp) and part(path) not in {"analysis", "study", "interop"}:
                asked = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
                assert not asked & {"tied", "scheme"}, f"{path}:{node.lineno}: asks about tying"


def test_files_name_no_absolute_path() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/home/", "/Users/", "/tmp/", "/mnt/")), f"{path}:{node.lineno}"
