"""`--profile-steps A:B`: a trace of these steps in the run directory, of a run that is the same with and without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from programs import tiedjax
from runs import STEPS, arguments, assert_same_run

from tiedjax import cli
from tiedjax.config_files import load_run_config
from tiedjax.errors import UserError
from tiedjax.host.profiling import StepRange


def traced_steps(trace: Path) -> set[int]:
    """The numbers of the steps that a trace holds."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train" and event.get("args")}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"train.stop_at": 5}, marks=pytest.mark.slow)], ids=["within", "to the end"]
)
def test_a_trace_holds_just_these_steps_and_changes_nothing(
    finished: Path, text: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    out = tmp_path / "run"
    stdout, _ = tiedjax(*arguments(out, text, changes), "--profile-steps", "3:5")
    (trace,) = (out / "profile").glob("plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    assert traced_steps(trace) == {3, 4, 5}
    assert f"trace: {trace.parent}" in stdout
    assert load_run_config(out / "config.yaml").train.steps == STEPS
    assert cli.main(arguments(out, text)) == 0  # not part of what the run is
    assert_same_run(out, finished)


@pytest.mark.parametrize("wrong", ["3", "3:", ":3", "a:b", "0:3", "5:3", "-1:3", "1:2:3", "1.5:2", ""])
def test_what_is_no_range_is_refused(wrong: str) -> None:
    with pytest.raises(UserError) as caught:
        StepRange.parse(wrong)
    says = "--profile-steps: must be A:B with 1 <= A <= B, the first and the last step, got"
    assert str(caught.value) == f"{says} {wrong!r}"


def test_steps_that_will_not_come_are_refused(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def refused(asked: str, directory: Path, changes: dict[str, int] | None = None) -> str:
        capsys.readouterr()
        assert cli.main([*arguments(directory, text, changes), f"--profile-steps={asked}"]) == 2
        return capsys.readouterr().err

    says = "tiedjax: --profile-steps:"
    assert refused("7:9", out) == f"{says} 7:9 cannot be traced; the steps to come are 1:8\n"
    assert refused("4:5", out, {"train.stop_at": 4}) == f"{says} 4:5 cannot be traced; the steps to come are 1:4\n"
    assert not out.exists(), "before anything is made"
    assert refused("5-7", out) == f"{says} must be A:B with 1 <= A <= B, the first and the last step, got '5-7'\n"
    assert cli.main(arguments(out, text, {"train.stop_at": 4})) == 0
    assert refused("4:5", out) == f"{says} 4:5 cannot be traced; the steps to come are 5:8\n"
    assert refused("3:4", finished) == f"{says} 3:4 cannot be traced; all 8 steps are done\n"
