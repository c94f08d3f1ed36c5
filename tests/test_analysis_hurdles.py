"""Hurdles: the windows of the run's own evaluation, bytes, what is counted, and what command and section say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import SHRUNK, STEPS, arguments, rows
from test_analysis_command import analyze
from test_study_results import fake_study
from tokenizers import Tokenizer

from tiedjax import cli
from tiedjax.analysis.basis.held_out import FrozenModel, evaluated_windows, training_windows
from tiedjax.analysis.basis.ngrams import PREDICTORS, NGrams
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.hurdles import hurdles as hurdles_module
from tiedjax.analysis.instruments.hurdles import section
from tiedjax.analysis.instruments.hurdles.hurdles import Hurdle, Hurdles, measure, name_of_text, text_of
from tiedjax.errors import UserError
from tiedjax.run import Run, load_run

V, T, BATCH = (SHRUNK[f"{key}"] for key in ("model.vocab_size", "model.seq_len", "data.batch_size"))


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    """Evaluated on three batches."""
    return load_run(finished)


@pytest.fixture(scope="module")
def wholly_evaluated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Evaluated on all held-out windows, which fill no whole number of its batches."""
    out = tmp_path_factory.mktemp("hurdles") / "run"
    assert cli.main(arguments(out, text, {"train.eval_batches": "null", "data.batch_size": 7})) == 0
    return load_run(out)


def last_eval_loss(run: Run) -> float:
    return next(float(row["eval_loss"]) for row in reversed(rows(run.path)) if row.get("eval_loss") is not None)


# ---- the windows, and the model's loss on them


def test_the_models_loss_is_the_one_that_the_run_recorded(run: Run, wholly_evaluated: Run) -> None:
    found = {}
    for name, trained in {"some": run, "all": wholly_evaluated}.items():
        prepared = data_of(trained)
        found[name] = measure(FrozenModel(trained), trained, prepared)
        assert found[name].losses["model"].nats == pytest.approx(last_eval_loss(trained), rel=2e-6)
        assert found[name].losses["model"].bits.mean == pytest.approx(last_eval_loss(trained) / math.log(2), rel=2e-6)
    available = len(data_of(run).windows("eval", T))
    assert available % 7
    assert (found["some"].held_out_windows, found["all"].held_out_windows) == (3 * BATCH, available)
    assert found["some"].held_out_tokens == 3 * BATCH * T
    whole = measure(FrozenModel(run), run, data_of(run), text=text_of(wholly_evaluated, data_of(run), STEPS, V))
    assert abs(whole.losses["model"].nats - last_eval_loss(run)) > 1e-3, "other windows have another loss"


def test_windows_are_read_in_parts_that_change_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_WS = FrozenModel(run), evaluated_windows(run, data_of(run))
    whole_WT, text = model.bits(tokens_WS), text_of(run, data_of(run), STEPS, V)
    monkeypatch.setattr("tiedjax.analysis.basis.held_out._FORWARD", 5 * T)
    monkeypatch.setattr("tiedjax.analysis.basis.held_out.CHUNK", 3 * T)
    monkeypatch.setattr(hurdles_module, "_BLOCK", 5 * T)
    assert len(tokens_WS) % 5
    np.testing.assert_allclose(model.bits(tokens_WS), whole_WT, atol=2e-5)
    for name, bits_W in text_of(run, data_of(run), STEPS, V).bits_W.items():
        np.testing.assert_array_equal(bits_W, text.bits_W[name])


def test_a_part_of_the_windows_is_measured_alone(run: Run) -> None:
    model, prepared = FrozenModel(run), data_of(run)
    whole, odd = measure(model, run, prepared), measure(model, run, prepared, windows=slice(1, None, 2))
    even = measure(model, run, prepared, windows=slice(0, None, 2))
    tokens_WS = evaluated_windows(run, prepared)
    assert odd.losses["model"].bits.mean == pytest.approx(model.bits(tokens_WS[1::2]).mean(), abs=1e-6)
    for name, loss in whole.losses.items():
        parts = [part.losses[name].bits.mean for part in (even, odd)]
        assert loss.bits.mean == pytest.approx(np.mean(parts), abs=1e-6)
        if name != "uniform":
            assert abs(parts[0] - parts[1]) > 1e-3
    assert odd.held_out_bytes + even.held_out_bytes == whole.held_out_bytes
    bits_of_odd = odd.losses["model"].bits.mean * odd.held_out_tokens
    assert odd.losses["model"].bits_per_byte == pytest.approx(bits_of_odd / odd.held_out_bytes)
    assert (odd.beta, odd.gamma, odd.training_tokens) == (whole.beta, whole.gamma, whole.training_tokens)
    with pytest.raises(UserError, match=r"^hurdles: slice\(99, None, None\) selects none of the 24 held-out windows$"):
        measure(model, run, prepared, windows=slice(99, None))


def test_intervals_are_over_the_documents_that_windows_begin_in(wholly_evaluated: Run) -> None:
    """By the documents of the held-out part, found by going through its tokens one after another."""
    prepared = data_of(wholly_evaluated)
    tokens_WS = prepared.windows("eval", T)
    text = np.concatenate([tokens_WS.read([number])[0][:-1] for number in range(len(tokens_WS))])
    before = np.concatenate([[0], np.cumsum(text == prepared.end_id)])[: len(text) : T]
    numbers_W = [*range(0, len(before), 2), *range(1, len(before), 2)]
    found = text_of(wholly_evaluated, prepared, STEPS, V)
    np.testing.assert_array_equal(found.document_W, before[numbers_W])
    measured = measure(FrozenModel(wholly_evaluated), wholly_evaluated, prepared)
    assert 1 < measured.held_out_documents == len(set(before)) < len(before)
    assert measured.losses["bigram"].bits == bootstrap_mean(found.bits_W["bigram"], groups=found.document_W)
    assert measured.losses["bigram"].bits.n == measured.held_out_documents


# ---- what is counted


def test_the_predictors_count_what_the_run_was_shown(run: Run) -> None:
    prepared = data_of(run)
    found, tokens_WS = measure(FrozenModel(run), run, prepared), evaluated_windows(run, prepared)
    assert list(found.losses) == ["model", *PREDICTORS]
    ngrams = NGrams(training_windows(run, prepared, 10**9), tokens_WS, V)
    model_W = FrozenModel(run).bits(tokens_WS).mean(axis=1)
    for name, bits_WT in ngrams.bits(tokens_WS).items():
        loss = found.losses[name]
        assert loss.bits.mean == pytest.approx(bits_WT.mean(), abs=1e-12)
        assert loss.nats == pytest.approx(bits_WT.mean() * math.log(2), abs=1e-12)
        assert loss.model_less.mean == pytest.approx((model_W - bits_WT.mean(axis=1)).mean(), abs=1e-6)
    assert (found.beta, found.gamma) == (ngrams.beta, ngrams.gamma)
    assert found.training_tokens == STEPS * BATCH * T
    assert text_of(run, prepared, 3, V).training_tokens == 3 * BATCH * T, "up to the step of the checkpoint"
    assert found.losses["model"].model_less is None


def test_only_runs_that_were_shown_and_asked_the_same_share_a_name(run: Run, wholly_evaluated: Run) -> None:
    prepared = data_of(run)
    name = name_of_text(run, prepared, STEPS, V)
    assert name == name_of_text(load_run(run.path), data_of(run), STEPS, V)
    others = [(wholly_evaluated, prepared, STEPS, V), (run, prepared, 3, V), (run, prepared, STEPS, V + 1)]
    assert len({name, *(name_of_text(*other) for other in others)}) == 4


# ---- bytes


def test_bits_a_byte_are_over_the_bytes_of_the_decoded_text(run: Run) -> None:
    found = measure(FrozenModel(run), run, data_of(run))
    target_N = evaluated_windows(run, data_of(run))[:, 1:].ravel()
    tokenizer = Tokenizer.from_file(str(run.tokenizer_path))
    wanted = len(tokenizer.decode(target_N.tolist(), skip_special_tokens=True).encode())
    assert (target_N == 0).any(), "marks of a document's end, which count as no byte"
    assert found.held_out_bytes == wanted > found.held_out_tokens
    for loss in found.losses.values():
        assert loss.bits_per_byte == pytest.approx(loss.bits.mean * found.held_out_tokens / wanted, rel=1e-12)


def test_without_a_tokenizer_or_a_text_of_every_token_there_are_no_bytes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prepared = FrozenModel(run), data_of(run)
    for known in (np.full(9, 2.0), np.zeros(V)):  # ids beyond the tokenizer's; a text of no bytes
        monkeypatch.setattr(hurdles_module, "token_bytes", lambda path, known=known: known)
        found = measure(model, run, prepared)
        assert found.held_out_bytes is None
        assert found.losses["model"].bits_per_byte is None
    bare = SimpleNamespace(config=run.config, tokenizer_path=None)
    assert measure(model, bare, prepared).held_out_bytes is None


# ---- command


def fixed(**changes: Any) -> Hurdles:
    span = lambda mean, half: Interval(mean, mean - half, mean + half, 20, 0.95)
    losses = {"model": Hurdle(4.1, span(5.915, 0.051), 1.71, None)}
    for i, name in enumerate(PREDICTORS, start=2):
        losses[name] = Hurdle(4.1 + i, span(5.915 + i, i / 100), 1.71 + i, span(-float(i), i / 50))
    return Hurdles(**{
        "held_out_documents": None,
        "step": 400, "rows": V, "width": 16, "held_out_windows": 1320, "held_out_tokens": 20480, "losses": losses,
        "held_out_bytes": 70123, "training_tokens": 409600, "beta": 32.0, "gamma": 0.5,
    } | changes)  # fmt: skip


def test_what_the_command_prints(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hurdles_module, "measure", lambda model, run, prepared: fixed())
    analyze("hurdles", str(run.path))
    assert capsys.readouterr().out == (
        f"{run.path} at step 400: 20,480 held-out tokens, 70,123 bytes, the 1,320 windows of the run's own evaluation\n"
        "predictor  nats a token  bits a token      +-  bits a byte  model less it, bits      +-\n"
        "model            4.1000        5.9150  0.0510       1.7100                    -       -\n"
        "uniform          6.1000        7.9150  0.0200       3.7100              -2.0000  0.0400\n"
        "unigram          7.1000        8.9150  0.0300       4.7100              -3.0000  0.0600\n"
        "bigram           8.1000        9.9150  0.0400       5.7100              -4.0000  0.0800\n"
        "trigram          9.1000       10.9150  0.0500       6.7100              -5.0000  0.1000\n"
        "+- half a 95 % interval over held-out windows; the others count the first 409,600 training tokens\n"
        "that the run was shown; strength of the bigram's prior 32, of the trigram's 0.5\n"
    )
    monkeypatch.setattr(hurdles_module, "measure", lambda model, run, prepared: fixed(held_out_documents=14))
    analyze("hurdles", str(run.path))
    assert capsys.readouterr().out.splitlines()[7] == (
        "+- half a 95 % interval over the 14 documents that the windows begin in; the others count the first 409,600 "
        "training tokens"
    )
    one = Interval(5.915, None, None, 1, 0.95)
    alone = {"model": Hurdle(4.1, one, None, None), "bigram": Hurdle(4.2, one, None, one)}
    monkeypatch.setattr(hurdles_module, "measure", lambda *_: fixed(losses=alone, held_out_bytes=None))
    analyze("hurdles", str(run.path))
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"{run.path} at step 400: 20,480 held-out tokens, the 1,320 windows of the run's own evaluation",
        "predictor  nats a token  bits a token  +-  bits a byte  model less it, bits  +-",
        "model            4.1000        5.9150   -            -                    -   -",
        "bigram           4.2000        5.9150   -            -               5.9150   -",
    ]


def test_what_the_command_writes(run: Run, tmp_path: Path) -> None:
    analyze("hurdles", str(run.path), "--json", str(tmp_path / "o.json"))
    out = json.loads((tmp_path / "o.json").read_text())
    assert (out["instrument"], out["form"], out["step"], out["rows"]) == ("hurdles", "corrected", STEPS, V)
    assert [table["role"] for table in out["inputs"]] == ["shared"]
    assert out["losses"]["model"]["nats"] == pytest.approx(last_eval_loss(run), rel=2e-6)
    assert out["losses"]["uniform"]["bits"]["mean"] == pytest.approx(math.log2(V))
    assert out["held_out_windows"] == 3 * BATCH
    assert out["losses"]["trigram"]["model_less"]["n"] == out["held_out_documents"] == 2


def test_bad_input_is_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run.path, tmp_path / "light", ignore=shutil.ignore_patterns("checkpoints"))
    for words, message in [
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(tmp_path / "light")], "checkpoint"),
        ([str(run.path), "--data", "text:/nowhere/*.jsonl"], "nowhere"),
    ]:
        assert cli.main(["analyze", "hurdles", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said


# ---- section


def test_the_section_counts_a_text_once_and_measures_every_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    text_of_run = hurdles_module.text_of
    monkeypatch.setattr(section, "text_of", lambda *of_run: counted.append(of_run) or text_of_run(*of_run))

    class Disturbed(Run):
        def params(self, step: int | None = None) -> dict[str, Any]:
            params = super().params(step)
            tables = {name: np.float32(1.1) * table for name, table in params["tables"].items()}
            return params | {"tables": tables}

    study, _ = fake_study(seeds=(0, 1))
    other = Disturbed(run.path)
    held = StudyRuns(study, {("untied", 0): other, ("untied", 1): other, ("tied", 0): run, ("tied", 1): run})
    by_seed = [section.collect(held, seed) for seed in (0, 1)]
    assert len(counted) == 2, "once for each seed"
    part = section.together("untied", [record for records in by_seed for record in records])
    json.dumps(part, allow_nan=False)
    assert [(r["arm"], r["seed"]) for r in part["runs"]] == [("untied", 0), ("tied", 0), ("untied", 1), ("tied", 1)]
    losses = {r["arm"]: r["losses"] for r in part["runs"]}
    assert losses["tied"]["model"]["nats"] == pytest.approx(last_eval_loss(run), rel=2e-6)
    assert abs(losses["untied"]["model"]["nats"] - last_eval_loss(run)) > 1e-4
    spans = section.over_seeds(part["runs"], "untied")
    assert list(spans) == ["bits_per_byte", "less_bigram", "less_trigram"]
    for name in ("bigram", "trigram"):
        wanted = losses["untied"]["model"]["bits"]["mean"] - losses["untied"][name]["bits"]["mean"]
        assert spans[f"less_{name}"].mean == pytest.approx(wanted, abs=1e-9)
    assert spans["bits_per_byte"].mean == pytest.approx(losses["untied"]["model"]["bits_per_byte"])
    assert {span.n for span in spans.values()} == {2}


def test_runs_whose_text_is_gone_are_not_measured() -> None:
    study, runs = fake_study(seeds=(0,))
    found = {"hurdles": section.together("untied", section.collect(StudyRuns(study, runs), 0))}
    assert all("nowhere" in record["not_measured"] for record in found["hurdles"]["runs"])
    for empty in (section.plots, section.rows, section.without_a_model):
        assert list(empty(found)) == []
    assert len(section.not_measured(found)) == 1
    assert {span.n for span in section.over_seeds(found["hurdles"]["runs"], "tied").values()} == {0}
