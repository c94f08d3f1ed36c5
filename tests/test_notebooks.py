"""Every notebook, run for real in a kernel of its own, on a small study that the command line made."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from programs import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))
SECONDS = 120  # of one cell


def read(path: Path) -> Any:
    return jupytext.read(path, fmt="py:percent")


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["account", "gradient_flow", "lens", "read_a_run", "twins"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_without_a_warning_and_draws_every_figure(
    path: Path, study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses the one that draws into the notebook
    monkeypatch.setenv("TIEDJAX_STUDY", str(study_folder / "study"))
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):  # not the person's own kernels and start-up
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = read(path)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.validate(notebook)
    figures = 0
    for cell in code(notebook):
        said = [output for output in cell.outputs if output.get("name") == "stderr"]
        assert not said, f"{cell.source}\n{said}"
        drawn = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        assert drawn == cell.source.count("plt.show()"), cell.source
        figures += drawn
    assert figures >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_its_question_and_has_one_cell_of_parameters(path: Path) -> None:
    notebook = read(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    for part in ("# ", "**", "?**", "Needs ", "Takes " if path.stem != "lens" else "a minute"):
        assert part in first.source, part
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code(notebook)[:1]
    assert 'STUDY = os.environ.get("TIEDJAX_STUDY", "../studies/quick")' in tagged[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_uses_the_public_functions_alone(path: Path) -> None:
    """Nothing private, nothing of the training loop, and no heavy library but NumPy and matplotlib."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [alias.name for alias in node.names]:
                full = f"{module}.{name}" if module else name
                assert not any(part.startswith("_") for part in full.split(".")), full
                top, *rest = full.split(".")
                assert top in {"os", "json", "itertools", "pathlib", "numpy", "matplotlib", "tiedjax"}, full
                assert top != "tiedjax" or not rest or rest[0] == "analysis" or full == "tiedjax.tying.distinct", full
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
