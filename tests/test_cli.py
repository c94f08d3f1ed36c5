"""The command line as a person meets it: in a process of its own, wrong more often than right."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import REPOSITORY, environment, finish, start, tiedjax
from runs import arguments

from tiedjax import cli
from tiedjax.config import RunConfig, leaf_fields

COMMANDS = ("study", "train", "bench", "compile", "data", "analyze", "diagnose", "sample", "report")
HEAVY = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "orbax", "grain", "tensorflow", "tensorflow_datasets")
HEAVY += ("matplotlib", "jinja2", "pydantic", "ruamel", "safetensors", "tokenizers", "tensorboardX")


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def one_line(stderr: str) -> str:
    """What a refused command says, which is one line and no traceback."""
    assert stderr.startswith("tiedjax: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    return stderr


# ---- Refusals: each in a real process, all of them at once ----

# `#` is a count that depends on how the text is cut into tokens.
CASES = {
    "unknown key": ({"train.stesp": 3}, "unknown option '--train.stesp'; did you mean '--train.steps'?"),
    "unknown value": (
        {"tying.scheme": "tyed"},
        "overrides: tying.scheme: must be 'tied', 'untied', 'untied_equal', 'partial_dims', 'partial_tokens', "
        "'low_rank', 'transform', 'interpolated' or 'pseudo_inverse', got 'tyed'; did you mean 'tied'?",
    ),
    "wrong type": ({"train.steps": "many"}, "overrides: train.steps: must be a valid integer, got 'many'"),
    "out of range": ({"optimizer.b1": 1.5}, "overrides: optimizer.b1: must be < 1, got 1.5"),
    "indivisible mesh": (
        {"mesh.tensor": 2},
        "mesh: data -1 x fsdp 1 x tensor 2 does not fit 1 devices; the product must be their number",
    ),
    "indivisible batch": (
        {"mesh.data": 3},
        "overrides: mesh: data x fsdp = 3 does not divide the 8 sequences of a microbatch (data.batch_size 8 / "
        "data.microbatches 1)",
    ),
    "missing corpus": (
        {"data.source": "text:no/such/*.txt"},
        "data.source: missing corpus: no file matches 'no/such/*.txt'; give a path or a glob of files",
    ),
    "unknown source": (
        {"data.source": "embeded"},
        "data.source: 'embeded' is none of embedded, tfds:NAME[/CONFIG], text:GLOB, tokens:GLOB, prepared:DIR; did you "
        "mean 'embedded'?",
    ),
    "too few tokens": (
        {"model.seq_len": 100_000},
        "data.source: text:TEXT: too little text: the # train tokens hold no window of model.seq_len + 1 = 100001; "
        "give more text",
    ),
    "batch above the data": (
        {"data.batch_size": 100_000},
        "data.batch_size: 100000 is more than the # training windows of 17 tokens in text:TEXT; lower it or give more "
        "text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    case: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, says = CASES[case]
    assert cli.main(arguments(tmp_path / "run", text, changes)) == 2
    expected = re.escape(f"tiedjax: {says.replace('TEXT', str(text))}\n").replace(r"\#", r"[\d,]+")
    assert re.fullmatch(expected, err := capfd.readouterr().err), err
    assert not [name for name in contents(tmp_path) if name not in ("run", "run/.lock")]


def test_refusals_in_a_process_of_their_own(text: Path, tmp_path: Path) -> None:
    """Exit status 2 and one line on standard error, also counting what libraries say while they are imported."""
    plain_file = tmp_path / "file"
    plain_file.write_text("not a folder")
    ids = tmp_path / "ids.npy"
    ids.write_bytes(b"\x10\x27" * 4000)  # raw uint16: 10000
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1, 2\n")
    repeated = tmp_path / "repeated.yaml"
    repeated.write_text("train:\n  steps: 3\n  steps: 4\n")
    run = tmp_path / "run"
    cases: dict[
        str, tuple[list[str], list[str]]
    ] = {  # two at a time: no two neighbours that get as far as to hold `run`
        "vocabulary": (
            arguments(run, text, {"data.source": f"tokens:{ids}"}),
            ["10000", "model.vocab_size", "320"],
        ),
        "unwritable": (arguments(plain_file / "run", text), [str(plain_file / "run"), "cannot be written"]),
        "tokenizer": (
            arguments(run, text, {"data.tokenizer": tmp_path / "none.json"}),
            ["none.json"],
        ),
        "yaml": (["train", str(broken), "--out", str(run)], ["broken.yaml", "line 2"]),
        "repeated key": (["train", str(repeated), "--out", str(run)], ["repeated.yaml", "steps"]),
        "no file": (["train", str(tmp_path / "none.yaml"), "--out", str(run)], ["none.yaml: no such file"]),
        "cluster": ([*arguments(run, text), "--processes", "2"], ["--coordinator", "--process-id"]),
        "process id": (
            [*arguments(run, text), "--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"],
            ["--process-id", "0 to 1", "2"],
        ),
        "no command": ([], ["COMMAND"]),
        "wrong command": (["trian", "x.yaml"], ["trian"]),
        "no config": (["train"], ["CONFIG"]),
        "no study": (["report", str(tmp_path / "none")], ["results.json"]),
    }
    before = contents(tmp_path)
    processes = {}
    names = list(cases)
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        processes |= {name: start(["-m", "tiedjax", *cases[name][0]]) for name in pair}
        for name in pair:
            out, err = finish(processes[name], status=2)
            assert "Traceback" not in out + err
            for part in cases[name][1]:
                assert part in one_line(err), name
    assert [name for name in contents(tmp_path) if name not in ("run", "run/.lock")] == before


MISUSES = {
    "": "the following arguments are required: COMMAND; usage: tiedjax COMMAND ... (see tiedjax --help)",
    "trian x": "COMMAND: must be one of study, decide, train, bench, compile, data, analyze, diagnose, sample, "
    "inspect, import, export, check, report; got 'trian'; did you mean 'train'?",
    "frobnicate": "COMMAND: must be one of study, decide, train, bench, compile, data, analyze, diagnose, sample, "
    "inspect, import, export, check, report; got 'frobnicate'",
    "train": "the following arguments are required: CONFIG; usage: tiedjax train CONFIG [options] "
    "(see tiedjax train --help)",
    "train a b": "unexpected argument 'b'; usage: tiedjax train CONFIG [options] (see tiedjax train --help)",
    "train a --train.lr 3": "unknown option '--train.lr'; did you mean '--optimizer.learning_rate'?",
    "train a --train.lr=3": "unknown option '--train.lr'; did you mean '--optimizer.learning_rate'?",
    "train a train.steps=3": "unknown option 'train.steps'; did you mean '--train.steps'?",
    "train a --output_dir x": "unknown option '--output_dir'; did you mean '--out'?",
    "train a --profile_steps 2": "unknown option '--profile_steps'; did you mean '--profile-steps'?",
    "train a --model.dropout 0": "unknown option '--model.dropout'; tiedjax train --help lists all",
    "study --lr 3": "unknown option '--lr'; did you mean '--optimizer.learning_rate'?",
    "train a --processes two": "argument --processes: invalid int value: 'two'; usage: tiedjax train CONFIG [options] "
    "(see tiedjax train --help)",
    "study --process-id x": "argument --process-id: invalid int value: 'x'; usage: tiedjax study [STUDY] [options] "
    "(see tiedjax study --help)",
    "bench a --steps x": "argument --steps: invalid int value: 'x'; usage: tiedjax bench CONFIG [options] (see "
    "tiedjax bench --help)",
    "compile a": "the following arguments are required: --topology; usage: tiedjax compile CONFIG --topology "
    "KIND:SHAPE [options] (see tiedjax compile --help)",
    "data prepare": "the following arguments are required: SOURCE, --out; usage: tiedjax data prepare SOURCE --out DIR "
    "[options] (see tiedjax data prepare --help)",
    "data prepare a --out b --vocab 9": "unknown option '--vocab'; did you mean '--vocab-size'?",
    "analyze": "the following arguments are required: INSTRUMENT; usage: tiedjax analyze INSTRUMENT ... (see tiedjax "
    "analyze --help)",
    "analyze map": "the following arguments are required: A; usage: tiedjax analyze map A [B] [options] (see tiedjax "
    "analyze map --help)",
    "analyze knn a b --train.lr 3": "unknown option '--train.lr'; tiedjax analyze knn --help lists all",
    "sample": "the following arguments are required: RUN; usage: tiedjax sample RUN [options] "
    "(see tiedjax sample --help)",
    "sample a --temprature 1": "unknown option '--temprature'; did you mean '--temperature'?",
    "check": "the following arguments are required: RUN; usage: tiedjax check RUN [options] (see tiedjax check --help)",
    "check a --jsn b": "unknown option '--jsn'; did you mean '--json'?",
    "report": "the following arguments are required: DIR; usage: tiedjax report DIR [options] "
    "(see tiedjax report --help)",
}


@pytest.mark.parametrize("words", MISUSES)
def test_a_command_that_is_used_wrongly_says_how_in_one_line(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    assert capfd.readouterr().err == f"tiedjax: {MISUSES[words]}\n"


ADDRESSES: dict[str, list[str]] = {
    "CONFIG": ["train", "gs://bucket/tiny.yaml"],
    "--out of data": ["data", "prepare", "embedded", "--out", "gs://bucket/data"],
    "--json": ["bench", "TINY", "--json", "gs://bucket/bench.json"],
    "data.tokenizer": ["train", "TINY", "--out", "RUN", "--data.tokenizer", "s3://bucket/tokenizer.json"],
    "data.cache": ["train", "TINY", "--out", "RUN", "--data.cache", "gs://bucket/cache"],
    "--tokens": ["analyze", "align", "TABLE", "TABLE", "--tokens", "gs://bucket/tokenizer.json", "TABLE"],
    "--json of an instrument": ["analyze", "align", "TABLE", "TABLE", "--json", "s3://bucket/align.json"],
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_with_a_scheme_is_refused_wherever_a_path_is_taken(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "table.npy", np.eye(8, 4))
    monkeypatch.chdir(tmp_path)
    places = {"TINY": str(REPOSITORY / "configs" / "tiny.yaml"), "RUN": "run", "TABLE": "table.npy"}
    assert cli.main([places.get(word, word) for word in ADDRESSES[case]]) == 2
    (address,) = (word for word in ADDRESSES[case] if "://" in word)
    scheme = "s3" if "s3:" in address else "gs"
    assert one_line(capfd.readouterr().err) == (
        f"tiedjax: {case.split(' ')[0]}: must be a path on a disk, got the {scheme}:// address {address!r}; mount it "
        "and name the folder\n"
    )
    assert [name for name in contents(tmp_path) if name not in ("run", "run/.lock")] == ["table.npy"]


# ---- Help ----


@pytest.mark.parametrize("command", ["study", "train", "bench", "compile"])
def test_help_lists_every_option_with_its_meaning_and_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: tiedjax {command} ")
    assert out.split("\n\n")[0].count("\n") == 0, "the usage is one line"
    words = out.split()
    shown = " ".join(words)
    for field in leaf_fields(RunConfig):
        default = "null" if field.default is None else str(field.default).lower()
        assert f"--{field.key} " in shown
        assert f"{' '.join(field.meaning.split())} [{default}]" in shown, field.key


LOADED = """
import sys
from tiedjax.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"tiedjax {importlib.metadata.version('tiedjax')}\n")


def test_help_of_every_command_answers_without_loading_what_it_does_not_need() -> None:
    """A count of modules, not of seconds: `tiedjax --help` may cost what Python's own argparse costs."""
    commands = [[], *([name] for name in COMMANDS), ["data", "prepare"]]
    out, err = finish(start(["-c", "import json" + LOADED, json.dumps(commands)]))
    assert err == ""
    loaded = set(json.loads(out.splitlines()[-1]))
    assert loaded & set(HEAVY) == set()
    assert "tiedjax" in loaded
    for name in COMMANDS:
        assert f"tiedjax {name}" in out


def test_the_package_alone_loads_nothing_heavy() -> None:
    found = f"{set(HEAVY)!r} & {{name.split('.')[0] for name in sys.modules}}"
    out, _ = finish(start(["-c", f"import sys, tiedjax; print(sorted({found}))"]))
    assert out == "[]\n"


def test_the_module_and_the_script_are_the_same_program() -> None:
    out, err = tiedjax("--help")
    assert err == ""
    script = Path(sys.executable).parent / "tiedjax"
    assert script.is_file(), "the package is not installed with its script"
    assert finish(start([script, "--help"])) == (out, err)
    for name in COMMANDS:
        assert f"\n    {name} " in out


def test_runs_can_start_from_another_folder(text: Path, tmp_path: Path) -> None:
    """Nothing depends on the folder that the package is developed in, and --out defaults to runs/NAME."""
    shutil.copy(REPOSITORY / "configs" / "tiny.yaml", tmp_path / "mine.yaml")
    argv = arguments(tmp_path / "unused", text, {"train.stop_at": 1})
    at = argv.index("--out")
    out, _ = tiedjax("train", "mine.yaml", *argv[2:at], *argv[at + 2 :], cwd=tmp_path)
    assert "mine  1/8" in out
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "1").is_dir()


def test_an_error_of_the_file_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/elsewhere/c.yaml")

    monkeypatch.setattr(cli, "find_config", refuses)
    assert cli.main(["train", "/elsewhere/c.yaml"]) == 1
    assert capsys.readouterr().err == "tiedjax: /elsewhere/c.yaml: Permission denied\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_or_that_has_no_room_ends_a_command_quietly_or_in_one_line(
    unbuffered: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "table.npy", np.eye(8, 4))
    words = ["-m", "tiedjax", "analyze", "spectrum", str(tmp_path / "table.npy")]
    child = environment(PYTHONUNBUFFERED=unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, open("/dev/full", "w") as full:
        for stream, said in (
            (closed, ""),
            (full, "tiedjax: standard output: cannot be written: No space left on device\n"),
        ):
            command = [sys.executable, *words]
            ended = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, env=child, text=True, timeout=120)
            assert ended.stderr == said
            assert ended.returncode == (1 if said or unbuffered else 0)


def test_a_run_trains_without_a_standard_output(text: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tiedjax", *arguments(tmp_path / "run", text)]
    line = f"{shlex.join(words)} >&-"
    ended = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "run" / "checkpoints" / "8").is_dir()


def test_what_a_terminal_cannot_write_is_replaced(tmp_path: Path) -> None:
    np.save(tmp_path / "tablé.npy", np.eye(8, 4))
    table = str(tmp_path / "tablé.npy")
    out, err = tiedjax("analyze", "spectrum", table, PYTHONIOENCODING="ascii")
    assert "tabl?.npy" in out
    assert err == ""


def test_text_that_is_no_utf_8_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = str(REPOSITORY / "configs" / "tiny.yaml")
    for option, given, what in (
        ("--data.source", "text:d\udcff/*.txt", "must be text in UTF-8, got 'text:d\\udcff/*.txt'"),
        ("--out", "bad\udcff", "must be a path, got 'bad\\udcff', which is not text"),
    ):
        assert cli.main(["train", tiny, "--out", str(tmp_path / "run"), option, given]) == 2
        assert capfd.readouterr().err == f"tiedjax: {option}: {what}\n"
    assert not (tmp_path / "run").exists()
