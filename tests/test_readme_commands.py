"""Every command line of README that one machine can run, in processes of its own, as it is written there.

Placeholders stand for small things and training is short; the two set-up commands are run by `.ci/run` and by hand.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from programs import REPOSITORY, shell

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHORT = "--train.steps 6 --train.eval_batches 1"
STUDY = "tiedjax study STUDY.yaml --out study"
PAIR = "study/runs/one-3 study/runs/two-3#output"
MADE = {
    "tiedjax diagnose MODEL [--text GLOB] [--out DIR]": ["diagnosed/diagnosis.html", "diagnosed/figures/position.png"],
    "tiedjax study [STUDY] [--out DIR]": [
        "study/report.html",
        "study/results.json",
        "study/runs/one-5/metrics.jsonl",
    ],
    "tiedjax train CONFIG [--out DIR]": ["run/config.yaml", "run/metrics.jsonl", "run/checkpoints/6"],
    "tiedjax bench CONFIG [--steps N] [--json FILE]": ["bench.json"],
    "tiedjax data prepare SOURCE --out DIR": ["prepared/tokenizer.json"],
    "tiedjax analyze INSTRUMENT ...": ["norms.json"],
    "tiedjax check RUN [--json FILE]": ["check.json"],
    "tiedjax train CONFIG --profile-steps A:B": ["traced/profile/plugins"],
    "tiedjax train tiny --out runs/mine": ["runs/mine/checkpoints/6"],
    "launch/local.sh 2 configs/tiny.yaml --out runs/two": ["runs/two/checkpoints/6"],
}

IN_A_STORE = "configs/olmo_1b.yaml --out gs://BUCKET/olmo_1b"
# README's command: the same with its placeholders filled in, and with what keeps it short.
RUN_HERE = {
    "tiedjax study [STUDY] [--out DIR]": STUDY,
    "tiedjax train CONFIG [--out DIR]": f"tiedjax train CONFIG.yaml --out run {SHORT}",
    "tiedjax bench CONFIG [--steps N] [--json FILE]": "tiedjax bench CONFIG.yaml --steps 3 --json bench.json",
    "tiedjax data prepare SOURCE --out DIR": (
        "tiedjax data prepare 'text:*.jsonl' --out prepared --vocab-size 300 --holdout 0.1"
    ),
    "tiedjax analyze INSTRUMENT ...": "tiedjax analyze norms study/runs/one-3 --json norms.json",
    "tiedjax analyze all RUN [--against RUN]": "tiedjax analyze all study/runs/one-3 --against study/runs/two-3",
    "tiedjax diagnose MODEL [--text GLOB] [--out DIR]": "tiedjax diagnose study/runs/one-3 --no-regret --out diagnosed",
    "tiedjax sample RUN [--prompt TEXT]": "tiedjax sample study/runs/one-3@8 --prompt lies --tokens 9",
    "tiedjax check RUN [--json FILE]": "tiedjax check study/runs/one-3 --json check.json",
    "tiedjax report DIR": "tiedjax report study",
    "tiedjax train --help": "tiedjax train --help",
    "tiedjax train tiny --out runs/mine": (
        f"tiedjax train tiny --out runs/mine {SHORT} --data.source 'text:*.jsonl' --data.holdout 0.1 "
        "--model.vocab_size 320"
    ),
    "tiedjax train CONFIG --profile-steps A:B": (f"tiedjax train CONFIG.yaml --profile-steps 2:3 --out traced {SHORT}"),
    "--train.steps 200 --tying.scheme untied --mesh.fsdp 8": (
        f"tiedjax train CONFIG.yaml --out options {SHORT} --tying.scheme untied --mesh.fsdp 8"
    ),
    "tiedjax analyze align A B": f"tiedjax analyze align {PAIR}",
    "tiedjax analyze knn A B": f"tiedjax analyze knn {PAIR}",
    "tiedjax analyze spectral A B": f"tiedjax analyze spectral {PAIR} --k 8 --eigenpairs 16",
    "tiedjax analyze spectrum A [B]": f"tiedjax analyze spectrum {PAIR}",
    "tiedjax analyze norms TABLE": "tiedjax analyze norms study/runs/one-3@4",
    "tiedjax analyze map A [B]": f"tiedjax analyze map {PAIR}",
    "tiedjax analyze evolution RUN": "tiedjax analyze evolution study/runs/one-3",
    "tiedjax analyze gradients RUN": "tiedjax analyze gradients study/runs/one-3",
    "tiedjax analyze account RUN": "tiedjax analyze account study/runs/one-3",
    "tiedjax analyze hurdles RUN": "tiedjax analyze hurdles study/runs/one-3",
    "tiedjax analyze lens RUN": "tiedjax analyze lens study/runs/one-3",
    "tiedjax analyze blocks RUN": "tiedjax analyze blocks study/runs/one-3",
    "tiedjax analyze calibration RUN": "tiedjax analyze calibration study/runs/one-3",
    "tiedjax analyze diversity RUN": "tiedjax analyze diversity study/runs/one-3",
    "tiedjax analyze rounding RUN": "tiedjax analyze rounding study/runs/one-3",
    "tiedjax analyze regret RUN": "tiedjax analyze regret study/runs/one-3 --fitting-tokens 128 --held-out-tokens 128",
    "tiedjax analyze cooccurrence RUN": "tiedjax analyze cooccurrence study/runs/one-3",
    "launch/local.sh 2 configs/tiny.yaml --out runs/two": (
        f"launch/local.sh 2 configs/tiny.yaml --out runs/two {SHORT} --data.source 'text:*.jsonl' "
        "--data.holdout 0.1 --model.vocab_size 320"
    ),
    "sbatch launch/slurm.sbatch configs/olmo_1b.yaml --out /shared/olmo_1b": (
        "bash launch/slurm.sbatch --dry-run configs/olmo_1b.yaml --out /shared/olmo_1b"
    ),
    f"launch/tpu_vm.sh run NAME ZONE {IN_A_STORE}": f"launch/tpu_vm.sh run --dry-run pod us-east5-a {IN_A_STORE}",
    f"launch/tpu_vm.sh keep --spot NAME ZONE TYPE {IN_A_STORE}": (
        f"launch/tpu_vm.sh keep --dry-run --spot pod us-east5-a v5p-128 {IN_A_STORE}"
    ),
    f"launch/gke.sh --image IMAGE --tpu TYPE:TOPOLOGY NAME {IN_A_STORE}": (
        f"launch/gke.sh --dry-run --image tiedjax --tpu tpu-v5p-slice:4x4x4 olmo {IN_A_STORE}"
    ),
}
# The set-up commands, and what needs more than the test command installs.
ELSEWHERE = {
    'python3 -m venv --clear .venv && .venv/bin/pip install -e ".[tensorboard]" && .venv/bin/tiedjax study',
    'python3 -m venv --clear .venv && .venv/bin/pip install -e ".[test]" && '
    ".venv/bin/python -m pytest -n 2 --dist worksteal",
    '.venv/bin/pip install -e ".[notebooks]" && .venv/bin/jupyter lab notebooks',
    "tiedjax decide [CONFIG] [--out DIR]",  # dozens of runs: tests/test_decide.py
    # SkyPilot and podman: tests/test_launchers.py, with a stand-in for the first
    "sky jobs launch launch/sky.yaml --env TIEDJAX='train configs/olmo_1b.yaml --out /runs/olmo_1b'",
    "podman build --file launch/Containerfile --build-arg EXTRA=tpu,gcs --tag IMAGE .",
    "tiedjax inspect DIR",  # tests/test_interop_tables.py
    "tiedjax import FILE.gguf --out DIR",  # tests/test_interop_gguf.py
    "tiedjax export RUN[@STEP] --out DIR",  # tests/test_interop_export.py
    "tiedjax compile CONFIG --topology v5p:4x4x4",  # libtpu: tests/test_compile.py, where it is installed
}


def commands() -> list[str]:
    """Every command line of README: of its blocks, its tables, its sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    listed = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    spans = re.findall(r"`((?:tiedjax|pytest|--[a-z]+\.[a-z_]+ \S+ --) ?[^`]*)`", prose)
    instruments = README.split("## Instruments")[1].split("\n## ")[0]
    listed += [f"tiedjax analyze {row}" for row in re.findall(r"^\| `([^`]+)` \|", instruments, flags=re.M)]
    return [*listed, *(span for span in spans if " " in span)]


def test_every_command_is_run_here_or_elsewhere() -> None:
    assert set(commands()) == RUN_HERE.keys() | ELSEWHERE


@pytest.fixture(scope="module")
def place(study_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with launchers, configs, text, a small CONFIG.yaml and STUDY.yaml, and that study's directory."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(study_folder, folder, dirs_exist_ok=True)
    for name, target in {"launch": REPOSITORY / "launch", "configs": REPOSITORY / "configs", text.name: text}.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_of_readme_does_what_it_says(command: str, place: Path) -> None:
    if RUN_HERE[command] != STUDY:  # which has made the study
        assert shell(RUN_HERE[command], place)
    for name in MADE.get(command, []):
        assert (place / name).exists()


def test_the_python_of_readme_runs(place: Path, tmp_path: Path) -> None:
    """On a study directory of the name that the snippet reads."""
    (block,) = re.findall(r"```python\n(import tiedjax\n.*?)```", README, flags=re.S)
    (tmp_path / "studies" / "quick" / "runs").mkdir(parents=True)
    (tmp_path / "studies" / "quick" / "runs" / "tied-0").symlink_to(place / "study" / "runs" / "one-3")
    tokens = "import numpy\ntokens_BT = numpy.array([[1, 2, 3]])\n"
    program = f"{tokens}{block.replace('step=50', 'step=4')}print(h_BTD.shape)\n"
    (tmp_path / "snippet.py").write_text(program)
    assert shell("python snippet.py", tmp_path) == "(1, 3, 16)\n"
