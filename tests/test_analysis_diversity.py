"""Diversity: n-grams and shares counted by hand, predictions in float64, and what command and section say."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from runs import SHRUNK, STEPS
from test_analysis_command import analyze
from test_analysis_contribution import Disturbed, untrained, windows
from test_model import recompute
from test_study_results import fake_study
from tokenizers import Tokenizer

from tiedjax import cli
from tiedjax.analysis.basis import held_out
from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.statistics import bootstrap_mean
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.diversity import section
from tiedjax.analysis.instruments.diversity.diversity import described, distinct_share, measure, variety, write
from tiedjax.errors import UserError
from tiedjax.run import Run, load_run
from tiedjax.sample import sample_text

V, D, T = SHRUNK["model.vocab_size"], SHRUNK["model.d_model"], SHRUNK["model.seq_len"]

# ---- how varied a text is


def test_ngrams_are_counted_within_texts_and_pooled_over_them() -> None:
    """By hand; across the edge of the texts there would be another pair, 5 1, and two more triples."""
    found = variety([[1, 2, 1, 2, 5], [1, 2, 3, 3, 3]])
    assert found.distinct_1 == 4 / 10  # 1 2 3 5
    assert found.distinct_2 == 5 / 8  # 12 21 25 23 33
    assert found.distinct_3 == 6 / 6  # 121 212 125 123 233 333
    shares = [0.3, 0.3, 0.3, 0.1]  # of 1, 2, 3 and 5
    assert found.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert distinct_share(np.array([[1, 1, 1, 1]]), 3) == 1 / 2


def test_pairs_keep_their_order_and_triples_their_middle() -> None:
    assert distinct_share(np.array([[1, 2], [2, 1]]), 2) == 1.0
    assert distinct_share(np.array([[1, 2, 3], [1, 4, 3]]), 3) == 1.0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_texts_shorter_than_an_ngram_have_none(length: int) -> None:
    found = variety(np.arange(2 * length).reshape(2, length))
    shares = [found.distinct_1, found.distinct_2, found.distinct_3]
    assert shares == [1.0] * length + [None] * (3 - length)
    assert found.entropy == pytest.approx(math.log2(2 * length))


def test_a_text_of_one_token_varies_in_nothing() -> None:
    found = variety(np.full((4, 9), 7))
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (1 / 36, 1 / 32, 1 / 28)
    assert found.entropy == 0


def test_varieties_are_those_of_a_count_in_python() -> None:
    tokens_BT = np.random.default_rng(0).integers(0, 9, (6, 20))
    found = variety(tokens_BT)
    for n, share in enumerate((found.distinct_1, found.distinct_2, found.distinct_3), 1):
        ngrams = [tuple(text[i : i + n]) for text in tokens_BT.tolist() for i in range(20 - n + 1)]
        assert share == len(set(ngrams)) / len(ngrams) < 1
    shares = [count / 120 for count in Counter(tokens_BT.ravel().tolist()).values()]
    assert found.entropy == pytest.approx(-sum(share * math.log2(share) for share in shares))


# ---- what a model predicts


@pytest.mark.parametrize("name", ["olmo", "llama"])
def test_predictions_are_those_of_a_forward_pass_in_float64(name: str) -> None:
    """With a bias; intervals are over texts. The first token of each is read and not counted."""
    model, tokens_WS = untrained(name), windows()
    bias_V = np.random.default_rng(3).normal(size=32)
    model.bias_V = jnp.asarray(bias_V, jnp.float32)
    E_VD, U_VD = (np.asarray(table, np.float64) for table in (model.tables.input, model.tables.output))
    body = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.body)
    states = recompute(model.config, body, E_VD[tokens_WS[:, :-1]])
    log_p_WTV = scipy.special.log_softmax(states[-1] @ U_VD.T + bias_V, axis=-1)
    entropy_WT = scipy.special.entr(np.exp(log_p_WTV)).sum(axis=-1) / np.log(2)
    cost_WT = -np.take_along_axis(log_p_WTV, tokens_WS[:, 1:, None], axis=-1)[..., 0] / np.log(2)
    found = described(model, tokens_WS)
    for span, wanted_WT in [(found.prediction_entropy, entropy_WT), (found.cross_entropy, cost_WT)]:
        wanted = bootstrap_mean(wanted_WT.mean(axis=1))
        assert (span.mean, span.low, span.high) == pytest.approx((wanted.mean, wanted.low, wanted.high), abs=2e-5)
        assert span.n == len(tokens_WS)
    assert abs(entropy_WT.mean() - cost_WT.mean()) > 0.1
    counted = variety(tokens_WS[:, 1:])
    assert {name: getattr(found, name) for name in vars(counted)} == vars(counted)
    assert vars(variety(tokens_WS)) != vars(counted)


def test_texts_are_read_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_WS = untrained("olmo"), windows()
    whole = described(model, tokens_WS)
    monkeypatch.setattr(held_out, "_FORWARD", 3 * 8)
    monkeypatch.setattr(held_out, "CHUNK", 7)
    parts = described(model, tokens_WS)
    assert parts.prediction_entropy.mean == pytest.approx(whole.prediction_entropy.mean, abs=1e-5)
    assert parts.cross_entropy.mean == pytest.approx(whole.cross_entropy.mean, abs=1e-5)


def test_what_a_model_writes_costs_it_what_it_expects() -> None:
    """So the texts are drawn from the predictions that are described, at temperature 1."""
    model = untrained("llama")
    model.U_VD = model.U_VD / 4
    found = described(model, write(model, 5, 400, 8))
    assert found.prediction_entropy.mean < 4.5  # of 5 at most
    assert found.cross_entropy.mean == pytest.approx(found.prediction_entropy.mean, abs=0.08)


def test_a_model_that_always_predicts_one_token_writes_nothing_else() -> None:
    model = untrained("olmo")
    model.bias_V = jnp.zeros(32).at[7].set(1000)
    written_BS = write(model, 3, 6, 8)
    assert written_BS[:, 0].tolist() == [3] * 6
    assert (written_BS[:, 1:] == 7).all()
    found = described(model, written_BS)
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (1 / 48, 1 / 42, 1 / 36)
    assert (found.entropy, found.prediction_entropy.mean, found.cross_entropy.mean) == (0, 0, 0)


# ---- of a run


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return load_run(finished)


def test_texts_are_those_that_sample_writes(run: Run) -> None:
    """The start token is that of a document, id 0, and the random numbers are the same."""
    for tokens in (5, T):
        ((start, *ids),) = write(FrozenModel(run), 0, 1, tokens).tolist()
        assert start == 0
        tokenizer = Tokenizer.from_file(str(run.tokenizer_path))
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample_text(run, tokens=tokens)


def test_as_much_held_out_text_stands_beside_what_is_written(run: Run) -> None:
    model, prepared = FrozenModel(run), data_of(run)
    found = measure(model, run, prepared, texts=9, tokens=5)
    assert (found.texts, found.tokens, found.step, found.rows, found.width) == (9, 5, STEPS, V, D)
    held_out_BS = held_out_windows(prepared, 5, 45)
    assert held_out_BS.shape == (9, 6)
    assert found.held_out == described(model, held_out_BS)
    assert found.written == described(model, write(model, 0, 9, 5))
    assert found.written.distinct_1 != found.held_out.distinct_1
    assert found == measure(FrozenModel(run), run, prepared, texts=9, tokens=5)
    assert measure(model, run, prepared).tokens == T, "where the model reads fewer than 64"
    available = len(prepared.windows("eval", T))
    assert measure(model, run, prepared, texts=available + 1).texts == available


def test_without_a_tokenizer_texts_begin_with_the_most_frequent_token(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "ids", ignore=shutil.ignore_patterns("tokenizer.json"))
    ids = load_run(tmp_path / "ids")
    start = int(ids.token_counts[0].argmax())
    assert start
    model, prepared = FrozenModel(ids), data_of(run)
    found = measure(model, ids, prepared, texts=9, tokens=5)
    assert found.written == described(model, write(model, start, 9, 5))
    assert found.written != measure(model, run, prepared, texts=9, tokens=5).written


def test_numbers_out_of_range_and_a_model_that_is_not_finite_are_refused(run: Run) -> None:
    model, prepared = FrozenModel(run), data_of(run)
    for options, line in [
        ({"texts": 0}, "texts: must be at least 1, got 0"),
        ({"tokens": 0}, f"tokens: must be 1 to {T}, the positions of a window, got 0"),
        ({"tokens": T + 1}, f"tokens: must be 1 to {T}, the positions of a window, got {T + 1}"),
    ]:
        with pytest.raises(UserError) as error:
            measure(model, run, prepared, **options)
        assert str(error.value) == line
    model.body = jax.tree.map(lambda leaf: leaf * np.nan, model.body)
    with pytest.raises(UserError, match=rf"^diversity: the model's predictions at step {STEPS} are not finite$"):
        measure(model, run, prepared)


# ---- command and section


def test_the_command_prints_and_writes_what_is_measured(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--texts", "9", "--tokens", "5"]
    analyze("diversity", str(run.path), *options, "--json", str(tmp_path / "o.json"))
    printed, out = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())
    wanted = to_plain(measure(FrozenModel(run), run, data_of(run), texts=9, tokens=5))
    assert (out["instrument"], out["form"]) == ("diversity", "corrected")
    assert [i["role"] for i in out["inputs"]] == ["shared"]
    assert {name: out[name] for name in wanted} == wanted

    def cells(text: dict[str, Any]) -> str:
        shares = " ".join(f"{text[name]:.4f}" for name in ("distinct_1", "distinct_2", "distinct_3", "entropy"))
        spans = [text["prediction_entropy"], text["cross_entropy"]]
        return f"{shares} " + " ".join(f"{s['mean']:.4f} {(s['high'] - s['low']) / 2:.4f}" for s in spans)

    assert " ".join(printed.split()) == " ".join(
        f"""{run.path} at step {STEPS}: 9 texts of 5 tokens, written at temperature 1, beside as much held-out text
        text distinct-1 distinct-2 distinct-3 entropy predicted +- cross-entropy +-
        written {cells(out["written"])}
        held out {cells(out["held_out"])}
        distinct-n: different n-grams over all n-grams, within texts; entropy: bits a token, of the shares of the
        tokens, which grows with their number; predicted: mean entropy of the model's predictions along the text;
        cross-entropy: what the tokens cost the model; both in bits a token, +- half a 95 % interval over
        texts""".split()
    )
    analyze("diversity", str(run.path), "--texts", "1", "--tokens", "2")
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[0] == "written"
    assert [place for place, cell in enumerate(row) if cell == "-"] == [3, 6, 8], "neither triples nor intervals"


def test_bad_input_is_one_clear_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = tmp_path / "without"
    shutil.copytree(run.path, without, ignore=shutil.ignore_patterns("checkpoints"))
    for words, line in [
        ([run.path, "--texts", "0"], "--texts: must be at least 1, got 0"),
        ([run.path, "--tokens", "-1"], "--tokens: must be at least 1, got -1"),
        ([run.path, "--tokens", T + 1], f"tokens: must be 1 to {T}, the positions of a window, got {T + 1}"),
        ([without], f"{without}: holds no checkpoint"),
    ]:
        assert cli.main(["analyze", "diversity", *map(str, words)]) == 2
        assert capsys.readouterr() == ("", f"tiedjax: {line}\n")


@pytest.fixture(scope="module")
def results(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A study of two runs and two that are disturbed."""
    study, _ = fake_study(seeds=(0, 1))
    folder = tmp_path_factory.mktemp("disturbed")
    for name in ("0", "1", "2"):
        (folder / name).symlink_to(run.path)
    runs = {("untied", 0): run, ("untied", 1): Disturbed(folder / "0")}
    runs |= {("tied", 0): Disturbed(folder / "1"), ("tied", 1): Disturbed(folder / "2")}
    found = {"diversity": section.collect(StudyRuns(study, runs))}
    return found | {"headline": {"arm": "tied", "reference": "untied"}, "arms": {"untied": {}, "tied": {}}}


def test_the_section_holds_what_the_command_measures_and_pairs_it_by_seed(run: Run, results: dict[str, Any]) -> None:
    json.dumps(results["diversity"], allow_nan=False)
    runs = {(r["arm"], r["seed"]): r for r in results["diversity"]["runs"]}
    wanted = to_plain(measure(FrozenModel(run), run, data_of(run)))
    assert runs["untied", 0] == {"arm": "untied", "seed": 0, **wanted}
    (twin,) = results["diversity"]["twins"]
    assert twin["arm"] == "tied"
    for text, names in section.QUANTITIES.items():
        for name in names:
            numbers = {key: record[text][name] for key, record in runs.items()}
            means = {key: value["mean"] if isinstance(value, dict) else value for key, value in numbers.items()}
            by_seed = [means["tied", seed] - means["untied", seed] for seed in (0, 1)]
            assert by_seed[0] != by_seed[1]
            assert twin[text][name]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-9)
            assert twin[text][name]["n"] == 2
    assert list(section.plots(results)) == []


def test_one_seed_a_text_too_short_and_a_difference_that_is_undecided(results: dict[str, Any]) -> None:
    """The rest of the words stand in tests/small_study.txt."""
    results = json.loads(json.dumps(results))
    held = results["diversity"]
    held["runs"] = [record | {"seed": 0} for record in held["runs"][-1:]]
    record = held["runs"][0]
    record["written"]["distinct_2"], record["held_out"]["distinct_2"] = 0.25, 0.625
    span = {"low": -0.5, "high": 0.25, "n": 2, "confidence": 0.95}
    held["twins"][0]["written"]["distinct_2"] = {"mean": -0.125, **span}
    held["twins"][0]["held_out"]["prediction_entropy"] = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 2}
    assert section.answers(results) == [
        "Whether what tied writes is more or less varied than what untied writes is undecided: the difference is "
        "−0.125\u00a0±\u00a00.375 in distinct-2.",
        "What tied writes is less varied than as much held-out text, by 0.375 in distinct-2 (one seed).",
        "On held-out text tied spreads its predictions more than untied, by 0.500\u00a0±\u00a00.250 bits of entropy a "
        "token.",
    ]
    record["written"]["distinct_2"] = None
    assert section.answers(results)[1] == (
        "Whether what tied writes is more or less varied than as much held-out text could not be measured."
    )
    assert section.rows(results)[0]["written"]["distinct_2"] == "–"


def test_runs_whose_text_is_gone_are_not_measured() -> None:
    study, runs = fake_study(seeds=(0,))
    found: dict[str, Any] = {"diversity": section.collect(StudyRuns(study, runs))}
    found |= {"headline": {"arm": "tied", "reference": "untied"}}
    assert all("nowhere" in r["not_measured"] for r in found["diversity"]["runs"])
    for empty in (section.plots, section.answers, section.rows, section.differences, section.about):
        assert list(empty(found)) == []
    assert len(section.not_measured(found)) == 1
