"""tiedjax as `pip install` leaves it: without the source tree around it."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
from programs import REPOSITORY, finish, start

from tiedjax import cli


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what pyproject.toml puts into the wheel."""
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folder = tmp_path_factory.mktemp("site")
    for source, target in {**{name: name for name in wheel["packages"]}, **wheel["force-include"]}.items():
        shutil.copytree(REPOSITORY / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


PROGRAM = """
import sys, tiedjax
from tiedjax.cli import main
print(tiedjax.__file__)
for command in sys.argv[1:]:
    print(main(command.split()))
"""


def test_an_installed_tiedjax_finds_its_configs_by_name_from_any_folder(site: Path, tmp_path: Path) -> None:
    commands = ["train tiny --train.steps 0", "study quick --workers 0", "train tinny"]
    out, err = finish(start(["-c", PROGRAM, *commands], cwd=tmp_path, PYTHONPATH=str(site)))
    assert out.splitlines() == [str(site / "tiedjax" / "__init__.py"), "2", "2", "2"]
    assert err.splitlines() == [
        "tiedjax: overrides: train.steps: must be >= 1, got 0",
        "tiedjax: --workers: must be at least 1, got 0",
        "tiedjax: tinny: no such file, and no run config of that name; there are g43, olmo_1b, olmo_300m, olmo_60m, "
        "olmo_7b, prose, quick, tiny; did you mean 'tiny'?",
    ]


@pytest.mark.parametrize(
    ("words", "says"),  # each is refused for what is looked at once the config has been read
    [
        ("bench olmo_60m --json no/x.json", "--json: must be a file in a folder that exists, got no/x.json"),
        (
            "compile olmo_60m --topology v5e:2x2 --json no/x.json",
            "--json: must be a file in a folder that exists, got no/x.json",
        ),
        ("study quick --workers 0", "--workers: must be at least 1, got 0"),
        ("study --workers 0", "--workers: must be at least 1, got 0"),
        ("train tiny --train.steps 0", "overrides: train.steps: must be >= 1, got 0"),
    ],
)
def test_every_command_that_takes_a_config_finds_it_by_name(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    assert capsys.readouterr().err == f"tiedjax: {says}\n"
