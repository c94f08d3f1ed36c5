"""A run that begins with another's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import slow_but
from runs import arguments, rows
from test_interop_bodies import FAMILIES, write

import tiedjax
from tiedjax import beginning, cli
from tiedjax.config_files import load_run_config
from tiedjax.data.prepare import prepare
from tiedjax.interop import tensors

SHAPES = {f"--model.{name}" for name in ("layers", "d_model", "heads", "d_ff", "seq_len", "vocab_size")}
STILL = {"optimizer.learning_rate": 1e-30, "train.steps": 1}  # so small that no parameter changes


def begun(kind: str, text: Path, tmp_path: Path, out: str, seq_len: int = 16, **changes: Any) -> tuple[Any, Path]:
    """The model, and a run of one update that begins with it by the config that `inspect` writes."""
    family, config = FAMILIES[kind]
    folder, written = tmp_path / "model", tmp_path / "written.yaml"
    if not folder.exists():
        write(family, {**config, "vocab_size": 320}, folder)
    assert cli.main(["inspect", str(folder), "--config", str(written)]) == 0
    words = arguments(tmp_path / out, text, {**STILL, **changes})
    pairs = [(name, value) for name, value in zip(words[2::2], words[3::2], strict=True) if name not in SHAPES]
    command = ["train", str(written), *[word for pair in pairs for word in pair], "--model.seq_len", str(seq_len)]
    assert cli.main(command) == 0
    return tiedjax.load_model(folder), tmp_path / out


@pytest.mark.parametrize(
    ("kind", "seq_len", "scan"),
    slow_but(
        [
            *((kind, 16, scan) for kind in ("llama, tied", "olmo2", "pythia") for scan in (False, True)),
            *(("gpt2", 64, scan) for scan in (False, True)),
            *((kind, 16, False) for kind in ("gemma2", "gemma3")),
        ],
        *(("llama, tied", 16, True), ("gemma2", 16, False)),
    ),
)
def test_its_first_loss_is_that_of_the_model(kind: str, seq_len: int, scan: bool, text: Path, tmp_path: Path) -> None:
    model, out = begun(kind, text, tmp_path, "run", seq_len, **{"model.scan_layers": scan})
    run = tiedjax.load_run(out)
    tables = run.tables(0)
    np.testing.assert_array_equal(tables.input, model.tables.input)
    np.testing.assert_array_equal(tables.output, model.tables.output)
    assert tables.tied == model.tables.tied
    if not scan:
        jax.tree.map(np.testing.assert_array_equal, run.params()["body"]["params"], model.body["params"])
    cfg = load_run_config(out / "config.yaml")
    windows = prepare(cfg.data, 320, report=lambda line: None).windows("eval", seq_len)
    tokens = windows.read(np.arange(24))  # three batches of eight
    logits = np.asarray(model.logits(tokens[:, :-1]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(rows(out)[-1]["eval_loss"], loss, rtol=1e-5)


def test_untied_now_begins_where_tied_is_and_its_roles_part(text: Path, tmp_path: Path) -> None:
    _, tied = begun("llama, tied", text, tmp_path, "tied")
    model, untied = begun("llama, tied", text, tmp_path, "untied", **{"tying.scheme": "untied"})
    first, second = rows(tied)[0], rows(untied)[0]
    assert first["loss"] == second["loss"]
    for name in ("input_grad_norm", "output_grad_norm"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6)
    assert first["input_grad_norm"] != first["output_grad_norm"]
    tables = tiedjax.load_run(untied).tables(0)
    assert not tables.tied
    np.testing.assert_array_equal(tables.input, model.tables.input)
    np.testing.assert_array_equal(tables.output, model.tables.input)


def test_a_model_that_does_not_fit_is_refused_by_its_key(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    family, config = FAMILIES["llama, tied"]
    folder = tmp_path / "model"
    write(family, {**config, "vocab_size": 320}, folder)
    capfd.readouterr()
    assert cli.main(arguments(tmp_path / "run", text, {"train.init": folder})) == 2
    line = f"tiedjax: model.layers: is 1, that of train.init {folder} is 4; give that\n"
    assert capfd.readouterr().err == line
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    capfd.readouterr()
    assert cli.main(arguments(tmp_path / "run", text, {"train.init": folder})) == 2
    line = f"tiedjax: train.init: {path}: hidden_act: must be silu, got 'gelu'\n"
    assert capfd.readouterr().err == line


def test_a_config_for_it_reads_no_numbers_and_names_it_as_it_was_named(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tied model: where there are two tables they are compared, block by block."""
    family, config = FAMILIES["llama, tied"]
    write(family, {**config, "vocab_size": 320}, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    read: list[str] = []
    whole = tensors.read_safetensors

    def watched(path: Path) -> dict[str, tensors.Tensor]:
        def rows(name: str, tensor: tensors.Tensor) -> tensors.Tensor:
            return tensor._replace(rows=lambda a, b: read.append(name) or tensor.rows(a, b))  # type: ignore[func-returns-value]

        return {name: rows(name, tensor) for name, tensor in whole(path).items()}

    monkeypatch.setattr(tensors, "read_safetensors", watched)
    assert cli.main(["inspect", "model", "--config", "written.yaml"]) == 0
    origin = beginning.source("model")
    assert origin.tying.scheme == "tied"
    assert read == []
    assert 'train:\n  init: "model"\n' in (tmp_path / "written.yaml").read_text()
    words = arguments(tmp_path / "run", text, STILL)
    pairs = [(name, value) for name, value in zip(words[2::2], words[3::2], strict=True) if name not in SHAPES]
    assert cli.main(["train", "written.yaml", *[w for pair in pairs for w in pair], "--model.seq_len", "16"]) == 0
    assert len(read) == len(set(read)) > 10  # each tensor once
    np.testing.assert_array_equal(
        tiedjax.load_run(tmp_path / "run").tables(0).input, tiedjax.load_model("model").tables.input
    )
