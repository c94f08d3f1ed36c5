"""Co-occurrence: counts and PPMI against NumPy, planted tables, chance, and what the command and the report say."""

from __future__ import annotations

import itertools
import json
from dataclasses import make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics.pairwise import cosine_similarity
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax import cli, load_run
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.token_pairs import Ranking, agreements
from tiedjax.analysis.instruments.cooccurrence import section
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import bigram_counts, contexts, ppmi
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import measure as cooccurrence
from tiedjax.data.prepared import Windows
from tiedjax.errors import UserError

V = 60


def text(seed: int = 0, n: int = 60_000) -> np.ndarray:
    """A Markov chain whose tokens come in kinds: what precedes a token and what follows it are unrelated kinds."""
    rng = np.random.default_rng(seed)
    before, after = rng.normal(size=(2, V, 3))
    chance = np.exp(after @ before.T).cumsum(axis=1)
    chance /= chance[:, -1:]
    tokens = [0]
    for u in rng.random(n - 1):
        tokens.append(int(np.searchsorted(chance[tokens[-1]], u)))
    return np.array(tokens, np.int32)


@pytest.fixture(scope="module")
def counts():
    return bigram_counts(Windows([text()], 50), V)


@pytest.fixture(scope="module")
def told(counts):
    return contexts(counts, least_count=1)


def dense_ppmi(counts: np.ndarray) -> np.ndarray:
    """In plain NumPy."""
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(counts / expected), 0)


def test_bigrams_are_those_of_the_windows_and_add_up_to_the_token_counts():
    arrays = [text(1, 5_017), text(2, 333), text(3, 20)]
    windows = Windows(arrays, 50)
    expected = np.zeros((V, V), np.int64)
    for array in arrays:
        covered = (len(array) - 1) // 50 * 50
        for previous, token in itertools.pairwise(array[: covered + 1]):
            expected[token, previous] += 1
    found = bigram_counts(windows, V)
    np.testing.assert_array_equal(found.toarray(), expected)
    np.testing.assert_array_equal(np.stack([expected.sum(0), expected.sum(1)]), windows.counts(V))


def test_of_long_text_windows_spread_evenly_are_counted():
    windows = Windows([np.repeat(np.arange(40, dtype=np.int32), 50)], 10)
    found = bigram_counts(windows, 40, most=400)
    assert found.sum() == 400
    seen = np.flatnonzero(found.sum(axis=1))
    assert seen[0] == 0
    assert seen[-1] == 39
    assert np.diff(seen).max() <= 2


def test_ppmi_is_that_of_its_definition(counts):
    np.testing.assert_allclose(ppmi(counts).toarray(), dense_ppmi(counts.toarray()), rtol=1e-12, atol=1e-12)


def test_contexts_are_cosines_of_what_precedes_and_of_what_follows(counts, told):
    weighted = dense_ppmi(counts.toarray())
    np.testing.assert_allclose(told.as_target_NN, cosine_similarity(weighted), atol=1e-12)
    np.testing.assert_allclose(told.as_context_NN, cosine_similarity(weighted.T), atol=1e-12)
    some = contexts(counts, sample=20, least_count=1)
    np.testing.assert_allclose(some.as_target_NN, told.as_target_NN[np.ix_(some.tokens, some.tokens)], atol=1e-12)
    assert (some.eligible, len(some.tokens), some.counted) == (told.eligible, 20, counts.sum())


def planted(counts) -> dict[str, np.ndarray]:
    """Tables made of the text itself: the left and the right singular vectors of its PPMI, times the values.

    Rows of no token follow, the negatives of the others, so that centring leaves the tokens' rows as they are.
    """
    u, s, vt = np.linalg.svd(dense_ppmi(counts.toarray()))
    return {role: np.vstack([x * s, -x * s]) for role, x in [("output", u), ("input", vt.T)]}


def test_a_planted_table_follows_its_own_contexts(counts, told):
    tables = planted(counts)
    shared = lambda role: cooccurrence(tables[role], told, bootstrap=200)
    output, input_ = shared("output"), shared("input")
    assert output.as_target.score == pytest.approx(1, abs=2e-3)  # rounding ranks contexts without overlap
    assert input_.as_context.score == pytest.approx(1, abs=2e-3)
    assert output.as_context.score < 0.5
    assert input_.as_target.score < 0.5
    assert output.difference.low > 0 > input_.difference.high
    assert output.difference.mean == pytest.approx(output.as_target.score - output.as_context.score)


def test_the_score_is_spearman_over_pairs_of_centred_rows(told):
    table = np.random.default_rng(5).normal(size=(V, 7)) + 2
    found = cooccurrence(table, told, bootstrap=0)
    own = 1 - pdist(table - table.mean(0), "cosine")
    for score, other in [(found.as_target, told.as_target_NN), (found.as_context, told.as_context_NN)]:
        expected = stats.spearmanr(own, squareform(other, checks=False)).statistic
        assert score.score == pytest.approx(expected, abs=1e-9)
        assert (score.low, score.high) == (None, None)


def test_random_tables_score_as_chance_does(told):
    rng = np.random.default_rng(6)
    found = [cooccurrence(rng.normal(size=(V, 8)), told, bootstrap=0) for _ in range(40)]
    for kind in ("as_target", "as_context"):
        z = [(getattr(f, kind).score - getattr(f, kind).floor) / getattr(f, kind).floor_deviation for f in found]
        assert abs(np.mean(z)) < 3 / np.sqrt(len(z))
        assert 0.6 < np.std(z) < 1.5
        floors = [(getattr(f, kind).floor) / getattr(f, kind).floor_standard_error for f in found]
        assert abs(np.mean(floors)) < 3 / np.sqrt(len(floors))


def test_intervals_over_tokens_hold_the_score_and_shrink_with_more_tokens(counts, told):
    table = planted(counts)["output"] + np.random.default_rng(7).normal(size=(2 * V, V))
    many, few = cooccurrence(table, told), cooccurrence(table, told.only(np.arange(20)))
    for of in (many, few):
        assert of.as_target.low < of.as_target.score < of.as_target.high
    assert many.as_target.high - many.as_target.low < few.as_target.high - few.as_target.low


def test_the_bootstrap_is_that_of_repeated_tokens():
    """The same samples drawn by hand: a token and its own copy are no pair, ranks are those of all tokens."""
    rng = np.random.default_rng(8)
    a, b = (x + x.T for x in rng.normal(size=(2, 12, 12)))
    b += a
    (found,), _ = agreements(a, [Ranking(b)], draws=2, bootstrap=100)
    same = np.random.default_rng(0)
    for _ in range(2):
        same.permutation(12)
    ranked, by_hand = [Ranking(m).ranks_NN for m in (a, b)], []
    for times in same.multinomial(12, np.full(12, 1 / 12), size=100):
        drawn = np.repeat(np.arange(12), times)
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        x, y = (np.array([m[i, j] for i, j in pairs]) for m in ranked)
        by_hand.append(np.corrcoef(x, y)[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])), abs=1e-9)


def test_what_is_kept_of_one_text_serves_every_table_and_number_of_draws():
    rng = np.random.default_rng(12)
    a, b, c = (x + x.T for x in rng.normal(size=(3, 12, 12)))
    text_ranking = Ranking(c)
    for similarity, draws, bootstrap in itertools.product([a, b], [2, 3], [50, 60]):
        given = agreements(similarity, [text_ranking], draws=draws, bootstrap=bootstrap)
        assert given == agreements(similarity, [Ranking(c)], draws=draws, bootstrap=bootstrap)


def test_equal_similarities_share_their_mean_rank():
    similarity = np.random.default_rng(13).integers(0, 5, size=(9, 9))
    similarity += similarity.T
    upper = np.triu_indices(9, 1)
    expected = stats.rankdata(similarity[upper])
    np.testing.assert_allclose(Ranking(similarity).ranks_NN[upper], expected - expected.mean(), atol=1e-12)


def test_the_order_of_the_tokens_changes_nothing(counts, told):
    order = np.random.default_rng(9).permutation(V)
    table = planted(counts)["output"][:V, :5]
    again = contexts(counts[order][:, order], least_count=1)
    for kind in ("as_target", "as_context"):
        scores = [
            getattr(cooccurrence(t, c, bootstrap=0), kind).score for t, c in [(table, told), (table[order], again)]
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-12)


def test_strata_hold_the_pairs_within_them(counts, told):
    table = planted(counts)["output"][:V]
    found = cooccurrence(table, told, bootstrap=0)
    assert list(found.strata) == ["rare", "middle", "frequent"]
    assert sum(part.rows for part in found.strata.values()) == V
    inside = np.flatnonzero(told.strata["rare"])
    own = 1 - pdist((table - table.mean(0))[inside], "cosine")
    other = squareform(told.as_target_NN[np.ix_(inside, inside)], checks=False)
    assert found.strata["rare"].as_target.score == pytest.approx(stats.spearmanr(own, other).statistic, abs=1e-9)


def test_rows_without_a_direction_are_left_out(told):
    table = np.random.default_rng(10).normal(size=(V, 4))
    table[:7] = table[7:].mean(axis=0)  # zero once centred
    found = cooccurrence(table, told)
    assert (found.rows, found.rows_left_out) == (V - 7, 7)
    json.dumps(to_plain(found), allow_nan=False)


def test_bad_input_is_one_clear_line(counts, told):
    rng = np.random.default_rng(11)
    for table, message in [
        (rng.normal(size=(V, 1)), "D of at least 2"),
        (rng.normal(size=(V, 2, 2)), r"must be \[V, D\]"),
        (rng.normal(size=(10, 4)), "the table only 10 rows"),
        (np.ones((V, 4)), "only 0 of 60 sampled rows have a direction"),
    ]:
        with pytest.raises(UserError, match=message):
            cooccurrence(table, told)
    with pytest.raises(UserError, match="only 0 tokens occur 1000000 times"):
        contexts(counts, least_count=10**6)


def test_the_command_measures_a_run_against_its_text(finished, tmp_path, capsys):
    argv = ["analyze", "cooccurrence", str(finished), "--least-count", "2", "--sample", "50"]
    out = tmp_path / "cooccurrence.json"
    assert cli.main([*argv, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    run = load_run(finished)
    assert found["text"]["counted"] == found["text"]["available"] == run.token_counts[0].sum()
    assert (found["rows"], found["width"], list(found["roles"])) == (50, 16, ["shared"])
    assert f"{found['roles']['shared']['as_target']['score']:.4f}" in capsys.readouterr().out
    assert cli.main([*argv[:3], "--sample", "3"]) == 2
    assert "--sample: must be at least 4, got 3" in capsys.readouterr().err


def test_the_section_counts_shared_text_once_and_says_what_is_missing(finished, monkeypatch):
    study, runs = fake_study(seeds=(0, 1), steps=[0, 400])
    records = section.collect(StudyRuns(study, runs))
    assert len(records) == 2 * 4
    assert all("not_measured" in r for r in records)
    assert section.not_measured({"cooccurrence": records}) == records[0]["not_measured"]
    assert list(section.plots({"cooccurrence": records})) == []

    counted = []
    count = section.contexts_of
    monkeypatch.setattr(section, "contexts_of", lambda *args: counted.append(1) or count(*args))
    of_text = {"fingerprint": "same", "windows": lambda *_: Windows([text() % 200], 50)}
    prepared = make_dataclass("Prepared", [("begin_id", int | None, None)], namespace=of_text)()
    records = section.collect(StudyRuns(study, runs, lambda run: prepared))
    assert counted == [1]
    results = to_plain({"cooccurrence": records})
    assert section.not_measured(results) is None
    assert [row["table"] for row in section.rows(results)] == ["untied input", "untied output", "tied", "tied-x5"]
    assert all(row["verdict"] in ("neither", "what precedes", "what follows") for row in section.rows(results))
    assert section.facts(results)["tokens"] == "60"


def test_analyze_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        analyze("cooccurrence", tmp_path / "nowhere")
    assert not list(Path(tmp_path).iterdir())


def test_partial_correlations_are_those_of_residuals_and_order_the_planted_tables(counts, told):
    """By hand: rank both sides, take the other similarity out of each by least squares, correlate what is left."""
    table = planted(counts)["output"][:V, :5] + 0.3 * np.random.default_rng(14).normal(size=(V, 5))
    found = cooccurrence(table, told, bootstrap=50).partial
    own = 1 - pdist(table - table.mean(0), "cosine")
    target, context = (squareform(m, checks=False) for m in (told.as_target_NN, told.as_context_NN))
    ranked = [stats.rankdata(x) - (len(x) + 1) / 2 for x in (own, target, context)]
    left = lambda x, fixed: x - fixed * (x @ fixed) / (fixed @ fixed)
    for score, other, fixed in [(found.as_target, 1, 2), (found.as_context, 2, 1)]:
        by_hand = np.corrcoef(left(ranked[0], ranked[fixed]), left(ranked[other], ranked[fixed]))[0, 1]
        assert score.score == pytest.approx(by_hand, abs=1e-9)
        assert abs(score.floor) < 0.1
        assert score.low < score.score < score.high
    assert found.position.mean == pytest.approx(found.as_target.score - found.as_context.score)
    tables = {role: x + 0.1 * np.random.default_rng(16).normal(size=x.shape) for role, x in planted(counts).items()}
    positions = {role: cooccurrence(tables[role], told, bootstrap=50).partial.position for role in tables}
    assert positions["output"].low > 0 > positions["input"].high


def test_a_text_whose_two_sides_are_one_leaves_no_partial_correlation(told):
    one = replace(told, as_context_NN=told.as_target_NN)
    found = cooccurrence(np.random.default_rng(15).normal(size=(V, 4)), one, bootstrap=20)
    assert found.partial.as_target.score is None
    assert found.partial.position.mean is None
    json.dumps(to_plain(found), allow_nan=False)
