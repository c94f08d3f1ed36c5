"""Alignment: its laws, its agreement with plain float64 NumPy and SciPy, and its floor."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from tiedjax.analysis.basis import blocked, linear_maps
from tiedjax.analysis.basis.chance import beside, exact_floor
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.strata import frequency_parts
from tiedjax.analysis.instruments.alignment import fitting
from tiedjax.analysis.instruments.alignment.align import (
    align,
    align_rows,
    by_stratum,
    closed_form_floor,
    distribution,
    measure,
    raw_cosine,
    uncorrected,
)
from tiedjax.analysis.instruments.alignment.fitting import FITS, CentredTables
from tiedjax.errors import UserError


def per_row(x: np.ndarray, y: np.ndarray, fit: str) -> np.ndarray:
    return align(x, y, fits=(fit,), draws=0).cosines[fit]


def tables(V: int, D: int, seed: int = 0, E: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(V, D))
    return X, X @ rng.normal(size=(D, E or D)) / np.sqrt(D) + 1.5 * rng.normal(size=(V, E or D))


def rotation(D: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def oracle(X: np.ndarray, Y: np.ndarray, fit: str) -> float:
    """The definition, written down as plainly as NumPy and SciPy allow."""
    X = X.astype(np.float64) - X.astype(np.float64).mean(axis=0)
    Y = Y.astype(np.float64) - Y.astype(np.float64).mean(axis=0)
    if fit == "orthogonal":
        X = X @ scipy.linalg.orthogonal_procrustes(X, Y)[0]
    elif fit == "linear":
        X = X @ np.linalg.lstsq(X, Y, rcond=None)[0]
    elif fit == "ridge":
        X = ridge_oracle(X, Y)[0]
    return float(np.mean(np.sum(X * Y, axis=1) / (np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1))))


def ridge_oracle(X: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, float]:
    """Fitted values and penalty by generalised cross-validation, each penalty solved for itself."""
    scale = np.square(X).sum() / X.shape[1]
    best = None
    for penalty in scale * np.logspace(-6, 2, 33):
        inverse = np.linalg.inv(X.T @ X + penalty * np.eye(X.shape[1]))
        fitted = X @ (inverse @ (X.T @ Y))
        trace_of_hat = np.trace(inverse @ (X.T @ X))
        criterion = np.square(Y - fitted).sum() / (len(X) - trace_of_hat) ** 2
        if best is None or criterion < best[0]:
            best = criterion, fitted, penalty
    return best[1:]


def oracle_floor(X: np.ndarray, Y: np.ndarray, fit: str, draws: int) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([oracle(X, Y[rng.permutation(len(Y))], fit) for _ in range(draws)]))


def hostile(name: str) -> tuple[np.ndarray, np.ndarray]:
    X, Y = tables(300, 24, seed=5)
    rng = np.random.default_rng(6)
    return {
        "float32": (X.astype(np.float32), Y.astype(np.float32)),
        "far from the origin": (X + 1e4, Y - 3e3),
        "columns from 1e-6 to 1e6": (X * np.logspace(-6, 6, 24), Y),
        "rows from 1e-6 to 1e6": (X * np.logspace(-6, 6, 300)[:, None], Y),
        "condition 1e10": (X @ rotation(24) @ np.diag(np.logspace(0, -10, 24)) @ rotation(24, 2), Y),
        "rank 5 onto full": (X[:, :5] @ rng.normal(size=(5, 24)), Y),
        "full onto rank 5": (Y, X[:, :5] @ rng.normal(size=(5, 24))),
        "two equal columns": (np.hstack([X[:, :23], X[:, :1]]), Y),
        "a constant column": (np.hstack([X[:, :23], np.ones((300, 1))]), Y),
        "one column": (X[:, :1], Y[:, :1]),
        "fewer rows than columns": (X[:16], Y[:16]),
        "as many rows as columns": (X[:24], Y[:24]),
        "two rows": (X[:2], Y[:2]),
    }[name]


HOSTILE = [
    "float32",
    "far from the origin",
    "columns from 1e-6 to 1e6",
    "rows from 1e-6 to 1e6",
    "condition 1e10",
    "rank 5 onto full",
    "full onto rank 5",
    "two equal columns",
    "a constant column",
    "one column",
    "fewer rows than columns",
    "as many rows as columns",
    "two rows",
]


@pytest.mark.parametrize(("V", "D"), [(50, 3), (300, 24), (700, 64), (2000, 17)])
def test_scores_and_floors_are_those_of_the_definition(V, D):
    X, Y = tables(V, D)
    found = align(X, Y, draws=3)
    for fit in FITS:
        assert found.scores[fit].score == pytest.approx(oracle(X, Y, fit), abs=1e-9)
        assert found.scores[fit].floor == pytest.approx(oracle_floor(X, Y, fit, 3), abs=1e-9)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("swap", [False, True])
def test_ill_conditioned_tables_agree_with_the_definition(name, swap):
    X, Y = hostile(name)
    X, Y = (Y, X) if swap else (X, Y)
    found = align(X, Y, draws=2)
    for fit in FITS:
        assert found.scores[fit].score == pytest.approx(oracle(X, Y, fit), abs=1e-6), fit
        assert found.scores[fit].floor == pytest.approx(oracle_floor(X, Y, fit, 2), abs=1e-6), fit


def test_the_scale_of_a_table_does_not_matter_even_where_squares_would_overflow():
    X, Y = tables(100, 8)
    plain, scaled = align(X, Y), align(X * 1e200, Y * 1e-200)
    for fit in FITS:
        assert scaled.scores[fit].score == pytest.approx(plain.scores[fit].score, abs=1e-12)


@pytest.mark.parametrize("D", [1, 2, 16])
def test_a_planted_rotation_is_recovered(D):
    X, _ = tables(200, D)
    found = align(X, 3.0 * X @ rotation(D) + np.arange(D))
    assert found.scores["orthogonal"].score == pytest.approx(1, abs=1e-12)
    assert found.scores["linear"].score == pytest.approx(1, abs=1e-12)
    assert found.scores["orthogonal"].corrected == pytest.approx(1, abs=1e-12)


def test_a_planted_linear_map_is_recovered_by_the_linear_fit_only():
    X, _ = tables(400, 12)
    found = align(X, X @ np.random.default_rng(3).normal(size=(12, 7)), fits=["linear"])
    assert found.scores["linear"].score == pytest.approx(1, abs=1e-12)
    skewed = align(X, X @ np.diag(np.logspace(0, 2, 12)))
    assert skewed.scores["linear"].score == pytest.approx(1, abs=1e-9)
    assert skewed.scores["orthogonal"].score < 0.99


def test_permuting_the_rows_of_both_changes_nothing():
    X, Y = tables(300, 20)
    order = np.random.default_rng(9).permutation(300)
    for fit in FITS:
        one, other = per_row(X, Y, fit), per_row(X[order], Y[order], fit)
        np.testing.assert_allclose(other, one[order], atol=1e-10)


def test_the_orthogonal_and_identity_scores_are_symmetric():
    X, Y = tables(300, 20)
    for fit in ("identity", "orthogonal"):
        assert align(X, Y).scores[fit].score == pytest.approx(align(Y, X).scores[fit].score, abs=1e-10)


def test_a_freer_map_never_leaves_a_larger_residual():
    # The guarantee is of least squares, not of the mean cosine, which usually but not always follows.
    X, Y = (table - table.mean(axis=0) for table in tables(200, 15, seed=4))
    solve = linear_maps.well_conditioned(X.T @ X, 1e-12)
    fitted = {"linear": X @ solve(X.T @ Y), "orthogonal": X @ linear_maps.nearest_orthogonal(X.T @ Y), "identity": X}
    residual = {fit: np.linalg.norm(mapped - Y) for fit, mapped in fitted.items()}
    assert residual["linear"] < residual["orthogonal"] < residual["identity"]


@pytest.mark.parametrize(("V", "D"), [(4096, 32), (6000, 96)])
def test_unrelated_tables_score_the_closed_form_floor(V, D):
    rng = np.random.default_rng(8)
    found = align(rng.normal(size=(V, D)), rng.normal(size=(V, D)), draws=8)
    for fit, score in found.scores.items():
        deviation = score.floor_standard_error * np.sqrt(score.floor_draws)
        # The closed forms are of order D/V off; 5 standard deviations of a draw for the score itself.
        assert score.floor == pytest.approx(
            score.floor_closed_form, abs=0.01 * score.floor_closed_form + 4 * deviation
        ), fit
        assert abs(score.score - score.floor) < 5 * deviation
        assert abs(score.corrected) < 0.02


def test_closed_forms_at_the_size_of_the_paper():
    assert closed_form_floor("orthogonal", 50_304, 2048) == pytest.approx(0.171, abs=5e-4)
    assert closed_form_floor("linear", 50_304, 2048) == pytest.approx(0.202, abs=5e-4)
    assert closed_form_floor("identity", 50_304, 2048) == 0


def test_where_chance_reaches_1_nothing_is_corrected():
    X, Y = tables(10, 20)
    linear = align(X, Y).scores["linear"]
    assert linear.score == pytest.approx(1)
    assert linear.floor == pytest.approx(1)
    assert linear.corrected is None


def test_rows_without_direction_are_left_out_and_counted():
    X, Y = tables(200, 10)
    X[7] = X[np.arange(200) != 7].mean(axis=0)  # then row 7 is the mean, and zero once centred
    found = align(X, Y)
    assert [s.rows_left_out for s in found.scores.values()] == [1] * len(FITS)
    cosines = per_row(X, Y, "orthogonal")
    assert np.flatnonzero(np.isnan(cosines)).tolist() == [7]
    assert found.scores["orthogonal"].score == pytest.approx(np.nanmean(cosines), abs=1e-14)


def test_constant_tables_have_no_score_but_say_so():
    found = align(np.full((50, 4), 0.1), tables(50, 4)[0])
    for score in found.scores.values():
        assert (score.score, score.floor, score.corrected, score.rows_left_out) == (None, None, None, 50)


def test_masked_rows_do_not_count_at_all():
    X, Y = tables(300, 12)
    mask = np.arange(300) % 3 > 0
    wild = X.copy()
    wild[~mask] = 1e6
    assert align(wild, Y, kept_V=mask) == align(X[mask], Y[mask])


def test_unequal_widths_are_for_the_linear_fit():
    X, Y = tables(100, 6, E=9)
    found = align(X, Y, fits=["linear"])
    assert (found.width, found.target_width) == (6, 9)
    assert found.scores["linear"].score == pytest.approx(oracle(X, Y, "linear"), abs=1e-10)
    with pytest.raises(UserError, match="orthogonal fit needs equal widths, got 6 and 9; only linear and ridge"):
        align(X, Y, fits=["orthogonal"])


@pytest.mark.parametrize(
    ("X", "Y", "fits", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), FITS, "same rows, got 3 and 4"),
        (np.ones(3), np.ones((3, 1)), FITS, "first table must have 2 dimensions"),
        (np.ones((3, 2)), np.ones((3, 2)), ["rigid"], "no fit is named 'rigid'"),
    ],
)
def test_misuse_is_one_clear_line(X, Y, fits, message):
    with pytest.raises(UserError, match=message) as error:
        align(X, Y, fits=fits)
    assert "\n" not in str(error.value)


def test_held_out_rows_are_scored_by_the_map_and_the_means_of_the_other_half():
    X, Y = tables(90, 6)
    X, Y = X + 5, Y - 3
    found = align(X, Y, draws=0, held_out=True).held_out
    shuffled = np.random.default_rng(1).permutation(90)
    for fit in FITS:
        cosines = []
        for fitted, scored in [(shuffled[:45], shuffled[45:]), (shuffled[45:], shuffled[:45])]:
            x_mean, y_mean = X[fitted].mean(axis=0), Y[fitted].mean(axis=0)
            x, y = X[fitted] - x_mean, Y[fitted] - y_mean
            T = {
                "identity": lambda x, y: np.eye(6),
                "orthogonal": lambda x, y: scipy.linalg.orthogonal_procrustes(x, y)[0],
                "linear": lambda x, y: np.linalg.lstsq(x, y, rcond=None)[0],
                "ridge": lambda x, y: np.linalg.lstsq(x, ridge_oracle(x, y)[0], rcond=None)[0],
            }[fit](x, y)
            mapped, target = (X[scored] - x_mean) @ T, Y[scored] - y_mean
            cosines += list(
                np.sum(mapped * target, 1) / np.linalg.norm(mapped, axis=1) / np.linalg.norm(target, axis=1)
            )
        assert found[fit].score == pytest.approx(np.mean(cosines), abs=1e-9), fit


def test_held_out_scores_of_unrelated_tables_are_0_where_those_in_sample_are_not():
    rng = np.random.default_rng(2)
    found = align(rng.normal(size=(600, 60)), rng.normal(size=(600, 60)), draws=8, held_out=True)
    for fit in ("orthogonal", "linear"):
        outside, inside = found.held_out[fit], found.scores[fit]
        deviation = outside.floor_standard_error * np.sqrt(outside.floor_draws)
        assert abs(outside.score) < 5 * deviation < 0.05 < inside.score
        assert abs(outside.floor) < 3 * outside.floor_standard_error


def test_strata_share_one_map_and_add_up_to_the_whole():
    X, Y = tables(300, 12)
    masks = {
        "a": np.arange(300) < 100,
        "b": (np.arange(300) >= 100) & (np.arange(300) < 280),
        "c": np.arange(300) >= 280,
    }
    found = align(X, Y, draws=3)
    parts = by_stratum(found.cosines["orthogonal"], found.chance["orthogonal"], masks)
    assert {name: part.rows for name, part in parts.items()} == {"a": 100, "b": 180, "c": 20}
    whole = found.scores["orthogonal"]
    assert sum(part.rows * part.score for part in parts.values()) / 300 == pytest.approx(whole.score, abs=1e-12)
    assert sum(part.rows * part.floor for part in parts.values()) / 300 == pytest.approx(whole.floor, abs=1e-12)
    assert parts["c"].score == pytest.approx(per_row(X, Y, "orthogonal")[280:].mean(), abs=1e-12)


def test_what_tables_share_by_label_alone_is_chance_when_rows_move_within_labels():
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(5), 200)
    of_label = 3 * rng.normal(size=(5, 8))
    X, Y = (of_label[labels] + rng.normal(size=(1000, 8)) for _ in range(2))
    plain = align(X, Y, fits=["orthogonal"], draws=4).scores["orthogonal"]
    alike = align(X, Y, fits=["orthogonal"], draws=4, within=labels).scores["orthogonal"]
    assert plain.score == alike.score
    assert plain.corrected > 0.7
    assert abs(alike.corrected) < 0.02
    mask = np.arange(1000) % 3 > 0
    masked = align(X, Y, fits=["orthogonal"], kept_V=mask, draws=2, within=labels).scores["orthogonal"]
    assert masked == align(X[mask], Y[mask], fits=["orthogonal"], draws=2, within=labels[mask]).scores["orthogonal"]
    assert align(X, Y, draws=2, within=np.zeros(1000, int)).scores == align(X, Y, draws=2).scores


def test_the_distribution_over_rows_and_its_bootstrap():
    cosines = np.append(np.random.default_rng(0).uniform(-0.5, 0.9, 500), np.nan)
    found = distribution(cosines)
    assert found.quantiles["25"] == pytest.approx(np.quantile(cosines[:-1], 0.25))
    assert sum(found.histogram) == 500
    assert found.histogram == np.histogram(cosines[:-1], 40, (-1, 1))[0].tolist()
    resampled = scipy.stats.bootstrap(
        (cosines[:-1],), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean.low == pytest.approx(resampled.low, abs=0.006)
    assert found.mean.high == pytest.approx(resampled.high, abs=0.006)


def test_the_form_of_the_paper_counts_a_row_without_direction_as_0():
    X, Y = tables(200, 10)
    X[7] = X[np.arange(200) != 7].mean(axis=0)
    found = align(X, Y, draws=0)
    cosines = found.cosines["linear"]
    assert uncorrected(cosines) == pytest.approx(np.nansum(cosines) / 200, abs=1e-12)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e7])
def test_large_float32_tables_go_through_the_same_definition(condition, monkeypatch):
    """Float32 products, several blocks, the polar iteration; ill conditioned: float64, then triangles."""
    monkeypatch.setattr(fitting, "SMALL", 0)
    monkeypatch.setattr(linear_maps, "_DECOMPOSED_WIDTH", 0)
    monkeypatch.setattr(blocked.row_blocks, "__defaults__", (4, 2**14))
    X, Y = tables(900, 32, seed=3)
    X = (X @ rotation(32) @ np.diag(np.logspace(0, -np.log10(condition), 32)) @ rotation(32, 2) + 2).astype(np.float32)
    Y = Y.astype(np.float32)
    mask = np.arange(900) % 7 > 0
    found = align(X, Y, kept_V=mask, draws=1)
    for fit in FITS if condition < 1e6 else ("identity", "orthogonal", "linear"):
        assert found.scores[fit].score == pytest.approx(oracle(X[mask], Y[mask], fit), abs=1e-5), fit
        assert found.scores[fit].floor == pytest.approx(oracle_floor(X[mask], Y[mask], fit, 1), abs=1e-5), fit


@pytest.mark.parametrize("small", [fitting.SMALL, 0])
def test_rows_that_stand_in_several_pairs_are_centred_once_and_score_alike(small, monkeypatch):
    monkeypatch.setattr(fitting, "SMALL", small)
    X, Y = tables(300, 8)
    mask, centred = np.arange(300) % 5 > 0, CentredTables()
    for x, y in [(X, Y), (Y, X), (X, 2 * Y), (X, Y)]:
        rows = [centred.rows(table, mask) for table in (x, y)]
        assert align_rows(*rows, draws=2, held_out=True) == align(x, y, kept_V=mask, draws=2, held_out=True)
    assert centred.rows(X, mask) is centred.rows(X, mask.copy())
    assert centred.rows(X, mask) is not centred.rows(X, ~mask)
    assert centred.rows(X, mask) is not centred.rows(X.copy(), mask)


def test_scores_held_out_can_stand_without_floors_and_change_nothing_else():
    X, Y = tables(300, 8)
    options = {"kept_V": np.arange(300) % 5 > 0, "counts": np.arange(600).reshape(2, 300), "draws": 2}
    whole, brief = measure(X, Y, **options), measure(X, Y, held_out_floors=False, **options)
    assert (brief.paper, brief.strata.keys()) == (whole.paper, whole.strata.keys())
    for fit in FITS:
        held_out = brief.alignment.held_out[fit]
        assert (held_out.score, held_out.floor) == (whole.alignment.held_out[fit].score, None)
        for one, other in [
            (brief.alignment.scores[fit], whole.alignment.scores[fit]),
            (brief.beyond_frequency[fit], whole.beyond_frequency[fit]),
        ]:
            assert to_plain(one) == pytest.approx(to_plain(other), abs=1e-12)


def test_a_measure_is_made_of_alignments_of_these_rows_those_of_like_frequency_and_all():
    X, Y = tables(300, 8)
    mask, counts = np.arange(300) % 5 > 0, np.arange(600).reshape(2, 300)
    comparison = measure(X, Y, kept_V=mask, counts=counts, draws=2)
    assert comparison.alignment == align(X, Y, kept_V=mask, draws=2, held_out=True)
    parts = align(X, Y, kept_V=mask, draws=2, within=frequency_parts(counts, 10)).scores
    for fit in FITS:
        assert to_plain(comparison.beyond_frequency[fit]) == pytest.approx(to_plain(parts[fit]), abs=1e-12)
        assert comparison.paper[fit] == pytest.approx(oracle(X, Y, fit), abs=1e-9)
    every_row = measure(X, Y, kept_V=np.ones(300, bool), draws=2)
    assert every_row.paper == {fit: uncorrected(every_row.alignment.cosines[fit]) for fit in FITS}


def test_the_polar_iteration_is_the_polar_factor_and_gives_up_on_a_singular_matrix():
    M = np.random.default_rng(0).normal(size=(60, 60)) @ np.diag(np.logspace(0, -5, 60))
    found = linear_maps._polar_iteration(M)
    u, _, vt = np.linalg.svd(M)
    np.testing.assert_allclose(found, u @ vt, atol=2e-5)
    M[:, 0] = 0
    assert linear_maps._polar_iteration(M) is None
    assert linear_maps._polar_iteration(np.zeros((4, 4))) is None


def raw_by_numpy(X: np.ndarray, Y: np.ndarray) -> float:
    return np.mean(np.sum(X * Y, 1) / np.linalg.norm(X, axis=1) / np.linalg.norm(Y, axis=1))


def test_the_raw_cosine_centres_nothing():
    X, Y = tables(300, 12)
    X, Y = X + 2, Y - 1
    raw = raw_cosine(X, Y)
    assert raw.score == pytest.approx(raw_by_numpy(X, Y), abs=1e-12)
    assert abs(raw.score - align(X, Y, fits=["identity"], draws=0).scores["identity"].score) > 0.3
    assert raw_cosine(X.astype(np.float32), Y.astype(np.float32)).score == pytest.approx(raw.score, abs=1e-6)
    mask = np.arange(300) % 3 > 0
    assert raw_cosine(X, Y, kept_V=mask) == raw_cosine(X[mask], Y[mask])


def test_the_floor_of_the_raw_cosine_is_its_mean_over_all_permutations():
    X, Y = np.random.default_rng(5).normal(1, 1, (2, 5, 3))
    raw = raw_cosine(X, Y)
    scores = [raw_by_numpy(X, Y[list(order)]) for order in itertools.permutations(range(5))]
    assert raw.floor == pytest.approx(np.mean(scores), abs=1e-12)
    assert raw.corrected == pytest.approx((raw.score - raw.floor) / (1 - raw.floor), abs=1e-12)


def test_rows_of_zeros_have_no_raw_cosine_or_count_as_0():
    X, Y = tables(50, 6)
    X[7], Y[[7, 9]] = 0, 0
    known = np.delete(np.arange(50), [7, 9])
    raw, paper = raw_cosine(X, Y), raw_cosine(X, Y, zero_rows=True)
    assert (raw.rows_left_out, paper.rows_left_out) == (2, 0)
    assert raw == replace(raw_cosine(X[known], Y[known]), rows_left_out=2)
    assert paper.score == pytest.approx(raw.score * 48 / 50, abs=1e-12)
    assert raw_cosine(0 * X, Y) == beside(None, exact_floor(None), rows_left_out=50)
    with pytest.raises(UserError, match=r"the raw cosine needs equal shapes, got \[50, 6\] and \[50, 5\]"):
        raw_cosine(X, Y[:, :5])


@pytest.mark.parametrize("blocks", [2**25, 300])
@pytest.mark.parametrize("size", [1e-200, 1, 1e200])
def test_the_raw_cosine_does_not_depend_on_size_or_blocks(monkeypatch, size, blocks):
    monkeypatch.setattr(blocked.row_blocks, "__defaults__", (4, blocks))
    X, Y = tables(90, 5)
    assert raw_cosine(size * X, Y).score == pytest.approx(raw_by_numpy(X, Y), abs=1e-12)


@pytest.mark.parametrize("kept_V", [np.arange(30, 60), np.ones(40, bool), np.ones(90, bool)])
def test_what_is_no_mask_of_the_rows_is_refused(kept_V):
    X, Y = tables(60, 5)
    given = f"{kept_V.dtype} [{len(kept_V)}]"
    with pytest.raises(UserError, match=rf"^kept_V: must be a mask, bool \[60\], got {re.escape(given)}$"):
        align(X, Y, kept_V=kept_V, draws=2)
    with pytest.raises(UserError, match=r"^align: fits must be a list of names, got 'orthogonal'$"):
        align(X, Y, fits="orthogonal")
