"""README's numbers are those of the saved results, and its commands are those that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from programs import REPOSITORY

from tiedjax import cli
from tiedjax.analysis.instruments import INSTRUMENTS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_number_is_what_the_saved_results_say() -> None:
    spec = importlib.util.spec_from_file_location("readme", REPOSITORY / "benchmarks" / "readme.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, text in module.pages().items():
        assert page.read_text(encoding="utf-8") == text
    assert module.PICTURE.is_file()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b(?:configs|launch|tests|tiedjax)/[\w/.]+\.\w+", README)
    assert len(named) > 10
    assert not [name for name in named if not (REPOSITORY / name).is_file()]


PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")), *(REPOSITORY / n for n in ("README.md", "CONTRIBUTING.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    files = [REPOSITORY / name for name in re.findall(r"(?<![\w/.])(?:configs|launch|tests|tiedjax)/[\w/.-]*\w", text)]
    assert not [path for path in links + files if not path.exists()]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\| `tiedjax (\w+)", README))))
def test_every_command_of_the_table_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_the_table_of_instruments_is_that_of_the_command_line() -> None:
    table = README.split("## Instruments")[1].split("##")[0]
    named = re.findall(r"^\| `(\w+) ", table, flags=re.M)
    assert sorted(named) == sorted(INSTRUMENTS)
