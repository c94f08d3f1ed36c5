"""`tiedjax check`: a whole run is said to be whole, each kind of damage is found and named, and nothing is changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from programs import finish
from runs import STEPS, arguments, saved_state, start_commands
from stores import Store, upload
from test_checkpoint import damages

from tiedjax import check as checks
from tiedjax import cli
from tiedjax.check import Checked, Damage, Kind, check
from tiedjax.checkpoint import Checkpoints, leaf_names
from tiedjax.config_files import load_run_config
from tiedjax.data.prepare import prepare
from tiedjax.errors import UserError
from tiedjax.host import platform_flags

WHOLE = """\
states: 1 of 1 is whole
snapshots: 6 of 6 are whole
lines of metrics.jsonl: 8 of 8 are whole
other files: 4 of 4 are whole
files of its data: 4 of 4 are whole
RUN: is whole
"""
NEWEST = f"the newest state that is whole is that of step {STEPS}"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process removes what is looked at here."""
    monkeypatch.setattr(checks, "REMOVED_WITHIN", 0.0)


@pytest.fixture(scope="module")
def prepared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the data of the runs here alone: in that of all tests there may be the same from another source."""
    folder, cfg = tmp_path_factory.mktemp("prepared"), load_run_config(finished / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIEDJAX_CACHE", str(folder))
        prepare(cfg.data, cfg.model.vocab_size, report=lambda line: None)
    return folder


@pytest.fixture(autouse=True)
def _only_this_data(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIEDJAX_CACHE", str(prepared))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def on_disk(folder: Path) -> dict[str, tuple[int, str]]:
    """Every entry below a folder: the time of its last change, and what it holds."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def said(run: Path, capfd: pytest.CaptureFixture[str], status: int) -> str:
    """What the command prints of a run, which it leaves as it is."""
    before = on_disk(run)
    capfd.readouterr()
    assert cli.main(["check", str(run)]) == status
    out, err = capfd.readouterr()
    assert not err
    assert on_disk(run) == before
    return out.replace(str(run), "RUN")


def test_a_whole_run_is_whole_and_nothing_is_changed(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert said(run, capfd, 0) == WHOLE


# ---- One kind of damage at a time ----


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def with_line(number: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes one line of metrics.jsonl."""

    def damaged(run: Path) -> None:
        lines = lines_of(run)
        lines[number - 1] = change(lines[number - 1])
        (run / "metrics.jsonl").write_text("".join(lines))

    return damaged


def with_values(number: int, **values: Any) -> Callable[[Path], None]:
    return with_line(number, lambda line: json.dumps(json.loads(line) | values) + "\n")


def bare(line: str) -> str:
    return line.replace(f'"loss": {json.loads(line)["loss"]!r}', '"loss": NaN')


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replaces one file of the run."""
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data) and None


def removed(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def counts(change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    return lambda run: np.save(run / "token_counts.npy", change(np.load(run / "token_counts.npy")))


def one_more(counts_2V: np.ndarray) -> np.ndarray:
    counts_2V[0, 3] += 1
    return counts_2V


def moved(old: str, new: str) -> Callable[[Path], None]:
    return lambda run: os.rename(run / old, run / new)


def swapped_values(run: Path) -> None:
    """The tables of another step, under this step's fingerprints."""
    shutil.rmtree(run / "snapshots" / "4" / "tree")
    shutil.copytree(run / "snapshots" / "6" / "tree", run / "snapshots" / "4" / "tree")


def other_counts_of_a_record(run: Path) -> None:
    """A digit of `about`, which stays JSON."""
    path = next(run.glob("snapshots/2/about/metadata"))
    text = path.read_text()
    assert '"seq_len": 16' in text
    path.write_text(text.replace('"seq_len": 16', '"seq_len": 17'))


def edited_config(old: str, new: str) -> Callable[[Path], None]:
    def damaged(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))

    return damaged


def without_a_name(run: Path) -> None:
    """Orbax's own list of arrays names one of them otherwise."""
    path = run / "snapshots" / "6" / "tree" / "_METADATA"
    text = path.read_text()
    assert "log_kept" in text
    path.write_text(text.replace("log_kept", "log_kepu"))


def without_their_shapes(run: Path) -> None:
    """What Orbax knows of arrays beside their values, which training reads and analysis does not."""
    (path,) = (run / "checkpoints" / str(STEPS) / "tree" / "array_metadatas").iterdir()
    path.write_bytes(b"")


# What is done to a run: of which kind it is (its line then), what is said after the path, below RUN.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "values of another step": (
        swapped_values,
        "snapshots: 5 of 6 are whole",
        "snapshots/4: is damaged: 'account/written/shared/input' is not what was saved",
    ),
    "about": (
        other_counts_of_a_record,
        "snapshots: 5 of 6 are whole",
        "snapshots/2: is damaged: 'about' is not what was saved",
    ),
    "an array that is not named": (
        without_a_name,
        "snapshots: 5 of 6 are whole",
        "snapshots/6: is damaged: 'account/log_kept/shared' is not there",
    ),
    "shapes of arrays": (
        without_their_shapes,
        "states: 0 of 1 is whole",
        f"checkpoints/{STEPS}: cannot be restored: Expecting value: line 1 column 1 (char 0)",
    ),
    "a state under another step": (
        moved(f"checkpoints/{STEPS}", "checkpoints/9"),
        "states: 0 of 1 is whole",
        f"checkpoints/9: is the state of step {STEPS}",
    ),
    "bare NaN": (
        with_line(3, bare),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 3 holds a bare NaN",
    ),
    "infinite": (
        with_line(4, lambda line: line.replace('"tokens": 512', '"tokens": 1e999')),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 4 holds 'tokens' that is not finite",
    ),
    "null loss": (
        with_values(5, loss=None),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 5 holds 'loss' that is null",
    ),
    "text": (
        with_values(5, loss="6.1"),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 5 holds 'loss' that is no number",
    ),
    "half a line": (
        with_line(5, lambda line: line[:40] + "\n"),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 5 is not JSON: Unterminated string starting at",
    ),
    "not UTF-8": (
        lambda run: (run / "metrics.jsonl").write_bytes(
            "".join(lines_of(run)).encode().replace(b'{"step": 2,', b'{"\xff": 2,')
        ),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 2 is not UTF-8",
    ),
    "no step": (
        with_line(8, lambda line: '{"loss": 3.0}\n'),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: line 8 is no object with a step",
    ),
    "hole": (
        with_line(3, lambda line: ""),
        "lines of metrics.jsonl: 7 of 8 are whole",
        "metrics.jsonl: has no line of step 3",
    ),
    "wide hole": (
        lambda run: (run / "metrics.jsonl").write_text("".join(lines_of(run)[:4])),
        "lines of metrics.jsonl: 4 of 8 are whole",
        "metrics.jsonl: has no line of steps 5 to 8",
    ),
    "duplicate step": (
        with_line(6, lambda line: line + line),
        "lines of metrics.jsonl: 8 of 9 are whole",
        "metrics.jsonl: line 7 is of step 6, and the line before it of step 6",
    ),
    "no metrics": (
        removed("metrics.jsonl"),
        "lines of metrics.jsonl: 0 of 8 are whole",
        "metrics.jsonl: is not there",
    ),
    "no counts": (
        removed("token_counts.npy"),
        "other files: 3 of 4 are whole",
        "token_counts.npy: is not there; the command that trained the run writes it",
    ),
    "other counts": (
        counts(one_more),
        "other files: 3 of 4 are whole",
        "token_counts.npy: its counts are not those of the windows that the run was trained on",
    ),
    "short counts": (
        counts(lambda counts_2V: counts_2V[:, :9]),
        "other files: 3 of 4 are whole",
        "token_counts.npy: holds no int64 [2, 320]",
    ),
    "cut counts": (
        written("token_counts.npy", b"\x93NUMPY"),
        "other files: 3 of 4 are whole",
        "token_counts.npy: cannot be read: EOF: reading magic string, expected 8 bytes got 6",
    ),
    "no tokenizer": (
        removed("tokenizer.json"),
        "other files: 3 of 4 are whole",
        "tokenizer.json: is not there",
    ),
    "another tokenizer": (
        written("tokenizer.json", "{}"),
        "other files: 3 of 4 are whole",
        "tokenizer.json: is not the tokenizer that the run was trained with",
    ),
    "bytes for a tokenizer": (
        written("tokenizer.json", b"\xff\xff"),
        "other files: 3 of 4 are whole",
        "tokenizer.json: is not UTF-8",
    ),
    "no YAML": (
        written("config.yaml", "train: [1, 2\n"),
        "other files: 3 of 4 are whole",
        "config.yaml: line 2 is not YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "another config": (
        edited_config("d_ff: 32", "d_ff: 48"),
        "other files: 3 of 4 are whole",
        "config.yaml: model.d_ff is 48, and was 32 when the newest state was saved",
    ),
    "saved_state.json": (
        written("saved_state.json", '{"step": "8"}'),
        "other files: 3 of 4 are whole",
        'saved_state.json: must hold {"step": N}, the number of an update of the run',
    ),
    "missing state": (
        lambda run: shutil.rmtree(run / "checkpoints" / str(STEPS)),
        "other files: 3 of 4 are whole",
        f"saved_state.json: a state was saved at step {STEPS}, and checkpoints/ has none from there on",
    ),
    "evaluation_owed.json": (
        written("evaluation_owed.json", '{"step": 8'),
        "other files: 4 of 5 are whole",
        'evaluation_owed.json: must hold {"step": N}, the number of an update of the run',
    ),
    "untied.json": (
        written("untied.json", '{"step": 99}'),
        "other files: 4 of 5 are whole",
        'untied.json: must hold {"step": N}, the number of an update of the run',
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_each_kind_of_damage_is_found_and_named(case: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, counted, what = DAMAGED[case]
    damage(run)
    lost = case in ("missing state", "a state under another step", "shapes of arrays")
    kind = counted.partition(":")[0]
    expected = [counted if line.startswith(kind) else line for line in WHOLE.splitlines()[:-1]]
    if case == "missing state":
        expected[0] = "states: there are none"
    if case == "a state under another step":  # metrics end before it
        expected[2] = "lines of metrics.jsonl: 8 of 9 are whole"
        more = ["RUN/metrics.jsonl: has no line of step 9"]
    else:
        more = []
    many = "2 things are" if more else "1 thing is"
    expected += [f"RUN/{what}", *more, f"RUN: {many} damaged; {'no state is whole' if lost else NEWEST}"]
    assert said(run, capfd, 78).splitlines() == expected


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param((), id="whole", marks=pytest.mark.slow),
        pytest.param(("values of another step", "shapes of arrays", "half a line", "no counts"), id="damaged"),
    ],
)
def test_a_run_in_a_store_is_checked_as_on_a_disk(cases: tuple[str, ...], run: Path, out: Path, store: Store) -> None:
    for case in cases:
        DAMAGED[case][0](run)
    (run / "checkpoints" / "damaged-3").mkdir()
    (run / "checkpoints" / "damaged-3" / "about").write_text("{}")
    upload(run, out)
    before = store.objects(f"{out.name}/")
    here, there = check(run), check(out)
    assert len(here.damage) == len(cases)
    assert [line.replace(str(out), "RUN") for line in there.lines()] == [
        line.replace(str(run), "RUN") for line in here.lines()
    ]
    assert store.objects(f"{out.name}/") == before


def test_a_folder_of_runs_in_a_store_names_one(run: Path, out: Path) -> None:
    upload(run, out / "runs" / "tied-0")
    with pytest.raises(UserError) as error:
        check(out)
    runs = f"{out}/runs/tied-0"
    assert str(error.value) == f"{out}: is no run directory, but holds some; name one of them, such as {runs}"


def test_every_damage_of_a_file_of_a_state_is_found_or_changes_nothing(finished: Path, run: Path) -> None:
    """Found by `check`, or training reads every bit of it where it lies on the device."""
    expected = saved_state(finished, STEPS)
    shapes = checks._Shapes(run, load_run_config(run / "config.yaml"))
    found = 0
    for number, damage in enumerate(damages(run / "checkpoints" / str(STEPS), seed=1)):
        if number % 5:
            continue
        saves = checks._Saves(run / "checkpoints")
        saves.verify(shapes)
        assert saves.steps == [STEPS]
        if saves.damage:
            found += 1
            assert "\n" not in str(saves.damage[STEPS])
            continue
        wanted = shapes.of("checkpoints", STEPS, saves.about[STEPS])
        tree = Checkpoints(run / "checkpoints", create=False).restore(STEPS, wanted)
        leaves = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
        assert leaves.keys() == expected.keys(), damage
        assert not [name for name in leaves if np.asarray(leaves[name]).tobytes() != expected[name].tobytes()], damage
    assert found > 20


def test_damage_of_several_kinds_is_counted_and_an_older_state_is_named(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(arguments(run, text, {"train.checkpoint_every": 3, "train.keep_checkpoints": 3})) == 0
    (run / "checkpoints" / str(STEPS) / "about" / "metadata").unlink()
    (run / "tokenizer.json").unlink()
    Path(run / "checkpoints" / "6").rename(run / "checkpoints" / "damaged-6")
    lines = said(run, capfd, 78).splitlines()
    assert lines[0] == "states: 1 of 2 are whole"
    assert lines[5] == "RUN/checkpoints/damaged-6: was set aside, and nothing reads it"
    assert lines[6].startswith(f"RUN/checkpoints/{STEPS}: cannot be restored: ")
    assert lines[7:] == [
        "RUN/tokenizer.json: is not there",
        "RUN: 2 things are damaged; the newest state that is whole is that of step 3",
    ]


# ---- The data ----


@pytest.fixture
def cache(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the run's own data, copied."""
    shutil.copytree(prepared / "prepared", tmp_path / "cache" / "prepared")
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "prepared").glob("[0-9a-f]*")
    return folder


def test_data_that_was_prepared_from_two_sources_is_read_twice(
    run: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run may have been shown either."""
    shutil.copytree(cache, cache.with_name(("1" if cache.name[0] == "0" else "0") + cache.name[1:]))
    flipped(cache / "train-00000.npy")
    assert said(run, capfd, 78).splitlines()[4:] == [
        "files of its data: 7 of 8 are whole",
        f"{cache}/train-00000.npy: does not hold the tokens that were prepared",
        f"RUN: 1 thing is damaged; {NEWEST}",
    ]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def with_meta(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damaged(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))

    return damaged


OF_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (
        lambda folder: flipped(folder / "train-00000.npy"),
        "train-00000.npy: does not hold the tokens that were prepared",
    ),
    "an id above": (
        lambda folder: (folder / "eval-00000.npy").write_bytes(
            (folder / "eval-00000.npy").read_bytes()[:-2] + b"\x00\x02"
        ),
        "eval-00000.npy: token id 512 does not fit model.vocab_size 320 (read as uint16; ids are 0 .. 319)",
    ),
    "no file": (
        lambda folder: (folder / "eval-00000.npy").unlink(),
        "eval-00000.npy: prepared tokens cannot be read: No such file or directory; prepare them again",
    ),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json: is not the tokenizer that the tokens beside it were made with",
    ),
    "another end": (
        with_meta(lambda meta: meta.update(end_id=7)),
        "meta.json: does not describe the tokens of its fingerprint",
    ),
}


@pytest.mark.parametrize("case", OF_DATA)
def test_damage_of_the_data_is_found_and_named(
    case: str, run: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, what = OF_DATA[case]
    damage(cache)
    assert said(run, capfd, 78).splitlines()[4:] == [
        "files of its data: 3 of 4 are whole",
        f"{cache}/{what}",
        f"RUN: 1 thing is damaged; {NEWEST}",
    ]


def test_data_that_is_not_found_is_said_and_no_damage(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIEDJAX_CACHE", str(tmp_path / "none"))
    assert said(run, capfd, 0).splitlines()[4:] == [
        "files of its data: not found",
        f"{tmp_path / 'none' / 'prepared'}: does not hold the data that the run was trained on; it was not looked at",
        "RUN: is whole",
    ]


# ---- What is no damage ----


def test_a_missing_snapshot_and_an_evaluation_that_is_owed_are_no_damage(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "snapshots" / "4")
    (run / "evaluation_owed.json").write_text('{"step": 8}\n')
    out = WHOLE.replace("6 of 6", "5 of 5").replace("other files: 4 of 4", "other files: 5 of 5")
    assert said(run, capfd, 0) == out


def test_what_is_being_written_is_no_damage(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "9.orbax-checkpoint-tmp-1" / "tree").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    note = "RUN/metrics.jsonl: its last line is not complete: it is being written, or was when a process was killed"
    assert said(run, capfd, 0) == WHOLE.replace("RUN: is whole", f"{note}\nRUN: is whole")


def test_a_save_that_is_removed_while_it_is_read_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "snapshots" / "4"
    shutil.rmtree(folder / "about")
    monkeypatch.setattr(checks.time, "sleep", lambda _: shutil.rmtree(folder))
    checked = check(run)
    assert checked.whole
    assert checked.kinds[1] == Kind("snapshots", 5, 5)


def test_metrics_that_are_logged_seldom_have_no_holes(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before a continuation every third step, after it every second."""
    run = tmp_path / "run"
    assert cli.main(arguments(run, text, {"train.log_every": 3, "train.stop_at": 4})) == 0
    assert cli.main(arguments(run, text, {"train.log_every": 2})) == 0
    assert [json.loads(line)["step"] for line in lines_of(run)] == [1, 2, 3, 4, 6, 8]
    assert "lines of metrics.jsonl: 6 of 6 are whole" in said(run, capfd, 0)
    (run / "metrics.jsonl").write_text("".join(line for line in lines_of(run) if '"step": 6,' not in line))
    assert "RUN/metrics.jsonl: has no line of step 6\n" in said(run, capfd, 78)


# ---- Other runs ----

OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "untied": ({"tying.scheme": "untied"}, 1),
    "a scheme that changes, rounded snapshots": (
        {
            "tying.untie_at": 4,
            "train.early_snapshots_dtype": "bfloat16",
            "train.checkpoint_every": 3,
            "train.keep_checkpoints": 3,
        },
        1,
    ),
    "four devices": ({"mesh.fsdp": 2, "mesh.data": 2}, 4),
}


@pytest.mark.parametrize("case", OTHERS)
def test_runs_of_other_schemes_and_meshes_are_whole(
    case: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, devices = OTHERS[case]
    run = tmp_path / "run"
    finish(start_commands([arguments(run, text, changes)], devices=devices))
    states = 3 if "train.checkpoint_every" in changes else 1
    assert said(run, capfd, 0) == WHOLE.replace("states: 1 of 1 is", f"states: {states} of {states} are", states > 1)
    swapped = {"4": "6"} if states == 1 else {"1": "2"}
    for step, other in swapped.items():
        shutil.rmtree(run / "snapshots" / step / "tree")
        shutil.copytree(run / "snapshots" / other / "tree", run / "snapshots" / step / "tree")
        assert f"RUN/snapshots/{step}: is damaged: " in said(run, capfd, 78)


def test_a_run_that_is_being_trained_is_whole_all_the_time(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves come and older ones go while they are read."""
    monkeypatch.setattr(checks, "REMOVED_WITHIN", 0.5)
    run = tmp_path / "run"
    often = {"train.steps": 80, "train.checkpoint_every": 2, "train.keep_checkpoints": 2}
    training, looks = start_commands([arguments(run, text, often)]), 0
    while training.poll() is None:
        if (run / "config.yaml").exists():
            looks += 1
            assert check(run).damage == ()
    finish(training)
    assert looks > 2


# ---- The command ----


def test_the_json_is_what_is_printed(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "tokenizer.json").unlink()
    with_line(3, bare)(run)
    (run / "checkpoints" / "damaged-3").mkdir()
    capfd.readouterr()
    assert cli.main(["check", str(run), "--json", str(tmp_path / "found.json")]) == 78
    tree = json.loads((tmp_path / "found.json").read_text())
    assert tree == {
        "run": str(run),
        "whole": False,
        "newest_state": STEPS,
        "kinds": {
            "states": {"whole": 1, "of": 1},
            "snapshots": {"whole": 6, "of": 6},
            "lines of metrics.jsonl": {"whole": 7, "of": 8},
            "other files": {"whole": 3, "of": 4},
            "files of its data": {"whole": 4, "of": 4},
        },
        "damage": [
            {"path": f"{run}/metrics.jsonl", "what": "line 3 holds a bare NaN"},
            {"path": f"{run}/tokenizer.json", "what": "is not there"},
        ],
        "notes": [f"{run}/checkpoints/damaged-3: was set aside, and nothing reads it"],
    }
    again = Checked(
        tree["run"],
        tree["newest_state"],
        tuple(Kind(name, **counted) for name, counted in tree["kinds"].items()),
        tuple(Damage(**damage) for damage in tree["damage"]),
        tuple(tree["notes"]),
    )
    assert capfd.readouterr().out.splitlines() == again.lines()


@pytest.mark.parametrize("below", ["runs/tied-0", "tied-0", "width-64/runs/tied-0"])
def test_a_folder_of_runs_is_refused_with_one_of_them(
    below: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    (folder / below).mkdir(parents=True)
    (folder / below / "config.yaml").touch()
    assert cli.main(["check", str(folder)]) == 2
    assert capfd.readouterr().err == (
        f"tiedjax: {folder}: is no run directory, but holds some; name one of them, such as {folder / below}\n"
    )


@pytest.mark.parametrize("name", ["", "none"])
def test_a_folder_without_a_run_is_refused(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path / name)]) == 2
    assert capfd.readouterr().err == f"tiedjax: {tmp_path / name}: is no run directory: it holds no config.yaml\n"


def test_it_leaves_accelerators_to_what_trains() -> None:
    environment = {"JAX_PLATFORMS": "cuda,cpu"}
    platform_flags.use_cpu(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}
