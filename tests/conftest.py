"""What all tests share: strict JAX, small configs, and a model that computes in float64."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["NPROC"] = "2"  # threads of XLA: those that train.threads names by default
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on arrays this small, more wait for each other

import atexit
import dataclasses
import fcntl
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from programs import TESTS, environment, shell
from runs import arguments, write_config, write_text
from stores import Store, served

from tiedjax import cli, model
from tiedjax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TableOptimizerConfig,
    TrainConfig,
    TyingConfig,
)
from tiedjax.host import storage

os.environ.setdefault("XLA_FLAGS", environment()["XLA_FLAGS"])  # a program with devices of its own has set it
jax.config.update("jax_numpy_rank_promotion", "raise")


def share_compiled_programs() -> None:
    """What takes XLA long is compiled once for all processes of a session, which inherit the folder that the first one
    makes, or the one that JAX was told of already.

    Two may write one program at once: who finds half of it says nothing and compiles it anew. JAX does not tell apart
    programs that XLA compiled for other numbers of threads: a test of threads must do without.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="tiedjax_compiled_")
    atexit.register(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
    jax.config.update("jax_compilation_cache_dir", folder.name)  # this process has read its environment already
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


share_compiled_programs()

# The modules of `pytest -m quick`: laws and exact strings, no run, nothing compiled for a mesh.
QUICK = {
    *("test_analysis_align", "test_architecture", "test_config", "test_loss", "test_tying"),
    *("test_sections_in_words", "test_sentences", "test_verdicts"),
}
assert all((TESTS / f"{name}.py").is_file() for name in QUICK)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in QUICK and "on_meshes" not in getattr(item, "fixturenames", ()):
            item.add_marker("quick")


def slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test: these cases are run each time, the others by `-m slow`."""
    parameters, left = [], set(quick)
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        parameters.append(pytest.param(*values, marks=() if case in quick else pytest.mark.slow))
        left.discard(case)
    assert not left
    return parameters


# Plain: of the tables at a constant rate, without decay and clipping.
GRADIENT_DESCENT = OptimizerConfig(
    learning_rate=0.1,
    warmup_steps=0,
    final_fraction=1.0,
    b1=0.0,
    weight_decay=0.0,
    clip_norm=None,
    tables=TableOptimizerConfig(kind="sgd"),
)


def small_config(scheme: str = "tied", **changes: Any) -> RunConfig:
    """A model that compiles in a second; `changes` are whole sections or fields of the model."""
    fields = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 24, "seq_len": 8, "vocab_size": 32}
    sections: dict[str, Any] = {
        "model": ModelConfig(**fields),
        "tying": TyingConfig(scheme=scheme),  # type: ignore[arg-type]
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "data": DataConfig(batch_size=8),
        "train": TrainConfig(steps=10),
    }
    model_changes = {k: v for k, v in changes.items() if k not in sections}
    sections |= {k: v for k, v in changes.items() if k in sections}
    sections["model"] = dataclasses.replace(sections["model"], **model_changes)
    return RunConfig(**sections)


def random_tokens(cfg: RunConfig, seed: int = 0) -> np.ndarray:
    """int32 [B, T + 1]; the last quarter of the vocabulary never occurs."""
    shape = (cfg.data.batch_size, cfg.model.seq_len + 1)
    return np.random.default_rng(seed).integers(0, cfg.model.vocab_size * 3 // 4, shape).astype(np.int32)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Those of one module are forgotten before the next.

    Each takes several maps of memory, of which Linux gives a process 65,530; XLA ends the process that has no more.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64."""
    monkeypatch.setattr(model, "compute_dtype", lambda *_: np.dtype("float64"))
    with jax.enable_x64(True):
        yield


Once = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: a new folder of that name after `make(folder)`, which one process does for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # below it every process of pytest-xdist has a folder of its own

    def folder_of(name: str, make: Callable[[Path], Any]) -> Path:
        folder, made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a process left that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def text(once: Once) -> Iterator[Path]:
    """A small .jsonl of documents; for the whole session prepared data is cached in a folder of its own."""
    folder = once("text", lambda folder: write_text(folder / "text.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIEDJAX_CACHE", str(folder / "cache"))
        yield folder / "text.jsonl"


@pytest.fixture(scope="session")
def finished(text: Path, once: Once) -> Path:
    """The run directory of an uninterrupted run of one device, to be read and copied, never written."""

    def train(folder: Path) -> None:
        assert cli.main(arguments(folder / "run", text)) == 0

    return once("finished", train) / "run"


STUDY = """
base: CONFIG.yaml
arms:
  two: {tying: {scheme: untied}}
  one: {tying: {scheme: tied}}
reference: two
baseline: one
seeds: [3, 5]
"""


@pytest.fixture(scope="session")
def study_folder(text: Path, once: Once) -> Path:
    """A folder with a small CONFIG.yaml, a STUDY.yaml of two arms whose names say nothing and two seeds that are not
    counted from 0, and the directory `study` that README's command made of them; to be read and copied, never written.
    """

    def make(folder: Path) -> None:
        write_config(folder / "CONFIG.yaml", text)
        (folder / "STUDY.yaml").write_text(STUDY)
        shell("tiedjax study STUDY.yaml --out study", folder)

    return once("study", make)


@pytest.fixture(scope="session")
def store() -> Iterator[Store]:
    """A store; one for the session, as clients read its address from the environment once, when they are made."""
    with served() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def out(store: Store, request: pytest.FixtureRequest) -> Path:
    """An empty place in the store of this test's own; no fault of another is left."""
    store.faults.clear()
    return storage.place(f"gs://bucket/{re.sub('[^a-z0-9]+', '-', request.node.name)}", "--out")
