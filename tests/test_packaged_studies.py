"""Studies that come with the package: what they hold equal and what they vary, and that they train and report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from programs import REPOSITORY, tiedjax
from runs import write_text

from tiedjax import load_run, loop
from tiedjax.config_files import packaged_configs
from tiedjax.flops import model_flops
from tiedjax.plan import in_tables, load_study, parameters
from tiedjax.saves import Saves
from tiedjax.sharding import make_mesh
from tiedjax.step import make_steps

STUDIES = packaged_configs("study")


def few_steps(name: str, folder: Path, **changes: str) -> Path:
    """The study's folder after a few steps from one seed on made-up text."""
    text = STUDIES[name].read_text().replace("../quick.yaml", str(packaged_configs("run")["quick"]))
    (folder / "STUDY.yaml").write_text(text.replace("seeds: [0, 1, 2, 3, 4]", "seeds: [0]"))
    options = {"data.source": f"text:{write_text(folder / 'TEXT.jsonl')}", "data.holdout": "0.1", "train.steps": "4"}
    options |= {"train.snapshot_every": "4", "optimizer.warmup_steps": "1", "data.batch_size": "4"} | changes
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    command = ("study", "STUDY.yaml", "--out", "out", "--workers", "2", "--instruments", "norms", *arguments)
    tiedjax(*command, cwd=folder)
    return folder / "out"


def test_shapes_differ_in_the_tables_share_at_equal_compute() -> None:
    """Parameters to a tenth, the FLOPs of the whole training to a hundredth of the quick study's."""
    plans = {name: load_study(STUDIES[name]) for name in ("shape-512", "quick", "shape-8192")}
    tied = {name: plan.runs["tied", 0] for name, plan in plans.items()}
    whole = {name: model_flops(cfg) * cfg.train.steps for name, cfg in tied.items()}
    size = {name: parameters(cfg) for name, cfg in tied.items()}
    share = {name: cfg.model.table_rows * cfg.model.d_model / size[name] for name, cfg in tied.items()}
    assert share == pytest.approx({"shape-512": 0.12, "quick": 0.40, "shape-8192": 0.84}, abs=0.01)
    assert whole == pytest.approx(dict.fromkeys(whole, whole["quick"]), rel=0.01)
    assert size == pytest.approx(dict.fromkeys(size, size["quick"]), rel=0.1)
    for plan in plans.values():
        assert len(plan.study.seeds) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shape-512", "shape-8192"])
def test_a_shape_study_trains_and_reports(name: str, tmp_path: Path) -> None:
    out = few_steps(name, tmp_path, **{"model.vocab_size": "320"})
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["untied", "tied"]
    assert all(run["steps"] == 4 for run in results["runs"])
    assert (out / "report.html").exists()


@pytest.mark.slow  # a minute, in which a whole study is trained
def test_initialisation_starts_each_roles_table_as_long_as_its_arm_says(tmp_path: Path) -> None:
    """The drawn deviation is that of a normal cut off at two deviations, brought back to the one that was asked for."""
    out = few_steps("initialisation", tmp_path, **{"model.vocab_size": "320"})
    default = 64**-0.5
    wanted = {
        "untied": (default, default),
        "tied": (default, default),
        "tied-0.02": (0.02, 0.02),
        "tied-1": (1.0, 1.0),
        "untied-input-0.02": (0.02, default),
        "untied-input-1": (1.0, default),
        "untied-output-0.02": (default, 0.02),
        "untied-output-1": (default, 1.0),
    }
    assert list(load_study(STUDIES["initialisation"]).study.arms) == list(wanted)
    for arm, deviations in wanted.items():
        tables = load_run(out / "runs" / f"{arm}-0").tables(0)
        found = [float(np.std(table)) for table in (tables.input, tables.output)]
        assert found == pytest.approx(deviations, rel=0.03), arm
        assert tables.tied == arm.startswith("tied")
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "runs", "settings"),
    [("g43-untie", 12, 4), ("g43-schemes", 12, 4), ("g43-initialisation", 12, 4), ("g43-shape-8192", 6, 2)],
)
def test_a_study_for_one_gpu_has_at_most_twelve_runs_of_one_shape(name: str, runs: int, settings: int) -> None:
    plan = load_study(STUDIES[name], {"data.source": "prepared:text"})
    assert len(plan.runs) == runs
    assert {cfg.model for cfg in plan.runs.values()} == {plan.runs["tied", 0].model}
    assert len({(cfg.tying, cfg.optimizer) for cfg in plan.runs.values()}) == settings


def test_the_shape_for_one_gpu_has_the_parameters_of_the_others_and_a_third_of_their_table() -> None:
    usual, other = (load_study(STUDIES[name], {"data.source": "prepared:text"}) for name in ("g43", "g43-shape-8192"))
    (ours, theirs) = (parameters(plan.runs["tied", 0]) for plan in (other, usual))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert in_tables(other.runs["tied", 0]) / ours == pytest.approx(0.12, abs=0.005)
    assert in_tables(usual.runs["tied", 0]) / theirs == pytest.approx(0.39, abs=0.01)


def blocks(page: str) -> list[str]:
    """The YAML of a page of docs/."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "base", "arms"), [("studies.md", "quick", 5), ("deciding.md", "olmo_1b", 4)])
def test_the_studies_that_the_pages_show_are_studies(page: str, base: str, arms: int, tmp_path: Path) -> None:
    """The pieces of a page make one file; its base is the packaged config."""
    text = "".join(block for block in blocks(page) if "tiedjax" not in block)
    text = re.sub(r"^base: \S+", f"base: {packaged_configs('run')[base]}", text, flags=re.MULTILINE)
    (tmp_path / "study.yaml").write_text(text)
    study = load_study(tmp_path / "study.yaml").study
    assert len(study.arms) == arms
    assert study.equal_parameters["tied-wide"] == "mlp"
    assert study.sweep


def test_the_formats_page_tells_what_the_quick_study_says_before_its_first_step() -> None:
    cfg = load_study(STUDIES["quick"]).runs["tied", 0]
    page = " ".join((REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8").split())
    sizes = loop._sizes(make_steps(cfg, make_mesh(cfg.mesh)))
    assert f"`tied-0: {Saves.of(cfg.train, sizes)}`" in page
