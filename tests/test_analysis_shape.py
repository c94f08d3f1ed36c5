"""The shape of a space and of two: agreement with NumPy, SciPy and brute force, laws, and chance."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
from scipy import stats
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax.analysis.basis import blocked
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.shape import section, space_similarity
from tiedjax.analysis.instruments.shape.space_similarity import measure as compare
from tiedjax.analysis.instruments.shape.table_shape import isotropic_singular_values, mean_cosine_floor
from tiedjax.analysis.instruments.shape.table_shape import measure as spectrum
from tiedjax.errors import UserError

MEASURES = ("effective_rank", "stable_rank", "first_energy", "isotropy", "mean_cosine")
rng = np.random.default_rng(0)
SKEWED = (rng.normal(size=(400, 12)) * np.geomspace(1, 0.01, 12) + 0.3 * rng.normal(size=12)).astype(np.float32)
OTHER = (SKEWED[:, :9] @ rng.normal(size=(9, 9)) + 0.2 * rng.normal(size=(400, 9))).astype(np.float32)
TURN = stats.ortho_group.rvs(12, random_state=1)


def centred(table):
    return table.astype(np.float64) - table.astype(np.float64).mean(0)


def scores(shape):
    return {name: getattr(shape, name).score for name in MEASURES}


@pytest.mark.parametrize("form", ["raw", "centred"])
@pytest.mark.parametrize("shape", [(400, 12), (7, 12)])
def test_measures_are_those_of_numpy(form, shape):
    table = SKEWED[: shape[0]]
    x = centred(table) if form == "centred" else table.astype(np.float64)
    _, s, vt = np.linalg.svd(x, full_matrices=True)
    p = s[s > 0] / s.sum()
    Z = np.exp(x @ np.vstack([vt, -vt]).T).sum(0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    wanted = {
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "stable_rank": np.linalg.norm(x) ** 2 / np.linalg.norm(x, 2) ** 2,
        "first_energy": s[0] ** 2 / np.sum(s**2),
        "isotropy": Z.min() / Z.max(),
        "mean_cosine": (unit @ unit.T)[np.triu_indices(len(x), 1)].mean(),
    }
    found = getattr(spectrum(table), form)
    np.testing.assert_allclose(found.singular_values, s, atol=1e-5 * s[0])
    assert scores(found) == pytest.approx(wanted, rel=1e-5)


def test_blocks_change_nothing(monkeypatch):
    whole, both = spectrum(SKEWED), compare(SKEWED, OTHER)
    monkeypatch.setattr(blocked.row_blocks, "__defaults__", (4, 1000))
    assert scores(spectrum(SKEWED).centred) == pytest.approx(scores(whole.centred), rel=1e-6)
    assert scores(spectrum(SKEWED).raw) == pytest.approx(scores(whole.raw), rel=1e-6)
    again = compare(SKEWED, OTHER)
    assert (again.cka.score, again.pairs.score) == pytest.approx((both.cka.score, both.pairs.score), rel=1e-9)


def test_rotation_and_order_change_nothing_and_scale_only_isotropy():
    wanted = spectrum(SKEWED)
    for same in (SKEWED @ TURN, SKEWED[rng.permutation(400)]):
        for form in ("raw", "centred"):
            found = getattr(spectrum(same), form)
            np.testing.assert_allclose(found.singular_values, getattr(wanted, form).singular_values, rtol=1e-4)
            assert scores(found) == pytest.approx(scores(getattr(wanted, form)), rel=1e-4)
    scaled = scores(spectrum(8 * SKEWED).raw)
    plain = scores(wanted.raw)
    assert scaled.pop("isotropy") < 0.5 * plain.pop("isotropy")
    assert scaled == pytest.approx(plain, rel=1e-6)


def test_known_spectra():
    flat = np.vstack([np.eye(5), -np.eye(5)])
    found = spectrum(flat)
    assert scores(found.raw) == pytest.approx(
        {"effective_rank": 5, "stable_rank": 5, "first_energy": 0.2, "isotropy": 1, "mean_cosine": -1 / 9}
    )
    line = np.outer(np.arange(1, 9), [3.0, 4.0])
    one = scores(spectrum(line).raw)
    assert (one["effective_rank"], one["stable_rank"], one["first_energy"]) == pytest.approx((1, 1, 1), abs=1e-6)
    assert one["mean_cosine"] == pytest.approx(1)


def test_isotropy_does_not_overflow(recwarn):
    found = spectrum(1e4 * SKEWED)
    assert 0 <= found.raw.isotropy.score < 1e-300
    json.dumps(to_plain(found), allow_nan=False)
    assert not recwarn.list


@pytest.mark.parametrize("shape", [(2000, 32), (300, 100), (40, 60)])
def test_isotropic_tables_lie_at_their_floors(shape):
    for seed in range(2):
        found = spectrum(0.4 * np.random.default_rng([9, seed]).normal(size=shape), draws=25)
        for form in (found.raw, found.centred):
            for name in MEASURES:
                measure = getattr(form, name)
                deviation = measure.floor_deviation * (2 if shape[0] < shape[1] else 1)  # the formula is for many rows
                assert abs(measure.score - measure.floor) < 3.5 * deviation, (form is found.raw, name)
                assert measure.floor_deviation < 0.2 * abs(measure.floor) or name == "mean_cosine"


def test_simulated_floors_have_the_law_of_drawn_tables():
    draw = np.random.default_rng(5)
    for rows, width in [(200, 20), (20, 30)]:
        fast = np.array([isotropic_singular_values(rows, width, draw) for _ in range(300)])
        slow = np.array([np.linalg.svd(draw.normal(size=(rows, width)), compute_uv=False) for _ in range(300)])
        kept = slow.shape[1]
        error = np.sqrt(fast[:, :kept].var(axis=0) + slow.var(axis=0)) / np.sqrt(300)
        assert np.all(np.abs(fast[:, :kept].mean(0) - slow.mean(0)) < 4 * error)
        np.testing.assert_allclose(fast[:, :kept].std(0), slow.std(0), rtol=0.25)


@pytest.mark.parametrize("is_centred", [False, True])
def test_the_mean_cosine_of_isotropic_rows_has_its_formula(is_centred):
    draw, found = np.random.default_rng(6), []
    for _ in range(400):
        x = draw.normal(size=(150, 4))
        x = x - x.mean(0) if is_centred else x
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        found.append((unit @ unit.T)[np.triu_indices(150, 1)].mean())
    floor, deviation = mean_cosine_floor(150, 4, is_centred)
    assert abs(np.mean(found) - floor) < 3 * deviation / np.sqrt(400)
    assert np.std(found) == pytest.approx(deviation, rel=0.2)


# ---- two spaces


def test_subspaces_are_those_of_scipy():
    found = compare(SKEWED, OTHER)
    ux, uy = (np.linalg.svd(centred(t), full_matrices=False)[0] for t in (SKEWED, OTHER))
    assert [s.dimensions for s in found.subspaces] == [1, 2, 4, 8, 9]
    for each in found.subspaces:
        angles = scipy.linalg.subspace_angles(ux[:, : each.dimensions], uy[:, : each.dimensions])
        assert each.cosine.score == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-5)
        extremes = np.degrees([angles.min(), angles.max()])
        assert (each.smallest_angle_degrees, each.largest_angle_degrees) == pytest.approx(extremes, abs=1e-3)


def test_cka_is_that_of_brute_force():
    x, y = centred(SKEWED), centred(OTHER)
    k, m = x @ x.T, y @ y.T
    found = compare(SKEWED, OTHER, draws=3)
    assert found.cka.score == pytest.approx(np.sum(k * m) / np.linalg.norm(k) / np.linalg.norm(m), abs=1e-6)
    draw = np.random.default_rng(0)
    orders = [draw.permutation(400) for _ in range(3)]
    floor = np.mean([np.sum(k * m[np.ix_(p, p)]) for p in orders]) / np.linalg.norm(k) / np.linalg.norm(m)
    assert found.cka.floor == pytest.approx(floor, abs=1e-6)
    assert found.cka.corrected == pytest.approx((found.cka.score - floor) / (1 - floor), abs=1e-6)


def test_similarity_of_pairs_is_that_of_scipy():
    found = compare(SKEWED, OTHER).pairs
    cosines = [1 - scipy.spatial.distance.pdist(centred(t), "cosine") for t in (SKEWED, OTHER)]
    assert found.rows == 400
    assert found.score == pytest.approx(stats.spearmanr(*cosines).statistic, abs=1e-5)
    assert found.low < found.score < found.high < found.low + 0.3


def test_the_floor_of_pairs_permutes_rows_not_pairs():
    found = compare(SKEWED[:100], OTHER[:100]).pairs
    x, y = (centred(t[:100]) for t in (SKEWED, OTHER))
    cosines = lambda table: 1 - scipy.spatial.distance.pdist(table, "cosine")
    draw = np.random.default_rng(0)
    floors = [stats.spearmanr(cosines(x), cosines(y[draw.permutation(100)])).statistic for _ in range(20)]
    assert (found.floor, found.floor_deviation) == pytest.approx((np.mean(floors), np.std(floors, ddof=1)), abs=1e-6)


def test_a_rotated_copy_is_the_same_space():
    found = compare(SKEWED, 3 * SKEWED @ TURN + 5)
    assert found.cka.score == pytest.approx(1, abs=1e-6)
    assert found.pairs.score > 0.99999
    assert all(s.cosine.score > 0.9999 for s in found.subspaces)


def test_nothing_depends_on_rotation_scale_or_common_order_and_cka_is_symmetric():
    wanted, order = compare(SKEWED, OTHER), rng.permutation(400)
    for x, y in [(SKEWED @ TURN, 7 * OTHER), (SKEWED[order], OTHER[order]), (OTHER, SKEWED)]:
        found = compare(x, y)
        assert found.cka.score == pytest.approx(wanted.cka.score, abs=1e-6)
        assert found.pairs.score == pytest.approx(wanted.pairs.score, abs=1e-5)
        assert [s.cosine.score for s in found.subspaces] == pytest.approx(
            [s.cosine.score for s in wanted.subspaces], abs=1e-4
        )


def test_unrelated_tables_lie_at_their_floors():
    draw = np.random.default_rng(11)
    found = compare(SKEWED, draw.normal(size=(400, 9)), draws=20)
    for each in (found.cka, *(s.cosine for s in found.subspaces), found.pairs):
        assert abs(each.score - each.floor) < 3.5 * each.floor_deviation
        assert abs(each.floor - each.floor_closed_form) < 3.5 * each.floor_standard_error
    assert found.pairs.low < 0 < found.pairs.high


def test_closed_form_floors_are_the_mean_over_all_permutations():
    x, y = SKEWED[:6, :3], OTHER[:6, 2:4]
    found = compare(x, y)
    cx, cy = centred(x), centred(y)
    ux, uy = (np.linalg.svd(t, full_matrices=False)[0] for t in (cx, cy))
    orders = [list(p) for p in itertools.permutations(range(6))]
    both = np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy)
    cka = np.mean([np.sum((cx.T @ cy[p]) ** 2) / both for p in orders])
    assert found.cka.floor_closed_form == pytest.approx(cka, rel=1e-6)
    for each in found.subspaces:
        r = each.dimensions
        overlap = np.mean([np.sum((ux[:, :r].T @ uy[p, :r]) ** 2) / r for p in orders])
        assert each.cosine.floor_closed_form == pytest.approx(overlap, rel=1e-6)


def test_the_interval_of_pairs_covers_what_all_rows_give(monkeypatch):
    """Samples of rows of one large table: pairs that were taken for independent would cover far more rarely."""
    draw = np.random.default_rng(3)
    x = draw.normal(size=(4000, 6))
    y = x + 2 * draw.normal(size=x.shape)
    monkeypatch.setattr(space_similarity, "SAMPLED_ROWS", 1200)
    truth = compare(x, y, draws=1).pairs.score
    monkeypatch.setattr(space_similarity, "SAMPLED_ROWS", 80)
    found = [compare(x[part], y[part], draws=1).pairs for part in np.split(draw.permutation(4000), 50)]
    assert 0.84 <= np.mean([f.low <= truth <= f.high for f in found]) <= 1
    independent = 2 / np.sqrt(80 * 79 / 2)
    assert np.mean([abs(f.score - truth) < independent for f in found]) < 0.8
    assert np.median([f.high - f.low for f in found]) < 0.25


@pytest.mark.parametrize(
    ("table", "raw", "is_centred"),
    [
        (np.ones((1, 3)), True, False),
        (np.full((10, 3), 0.1), True, False),
        (np.zeros((6, 3)), False, False),
        (np.arange(5.0)[:, None], True, True),
        (np.vstack([np.zeros((2, 3)), rng.normal(size=(4, 3))]), True, True),
        (rng.normal(size=(2, 5)), True, True),
    ],
)
def test_odd_tables_are_measured_or_said_to_have_no_shape(table, raw, is_centred, recwarn):
    found = spectrum(table)
    assert (found.raw is not None, found.centred is not None) == (raw, is_centred)
    json.dumps(to_plain(found), allow_nan=False)
    assert to_plain(found) == json.loads(json.dumps(to_plain(found), allow_nan=False))
    if is_centred:
        json.dumps(to_plain(compare(table, table)), allow_nan=False)
    else:
        with pytest.raises(UserError, match="the rows of the first table are all equal"):
            compare(table, np.arange(len(table) * 2.0).reshape(-1, 2))
    assert not recwarn.list
    if raw:
        assert found.raw.rows_left_out == (~table.any(1)).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(np.ones(3)), r"must have 2 dimensions \[V, D\] and rows, got shape \[3\]"),
        (lambda: spectrum(np.ones((0, 3))), r"and rows, got shape \[0, 3\]"),
        (lambda: spectrum(np.full((4, 2), np.nan)), "must lie between 1e-30 and 1e30, got inf"),
        (lambda: spectrum(np.full((4, 2), 1e200)), "must lie between 1e-30 and 1e30, got 1e"),
        (lambda: compare(SKEWED, OTHER[:9]), "must have the same rows, got 400 and 9"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_command_takes_one_table_or_two(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", SKEWED)
    np.save("b.npy", OTHER)
    np.save("counts.npy", np.arange(400) // 100)
    analyze("spectrum", "a.npy", "--json", "one.json")
    one, text = json.loads(Path("one.json").read_text()), capsys.readouterr().out
    assert (one["rows"], one["rows_masked_out"], one["width"], len(one["tables"])) == (400, 0, 12, 1)
    assert "comparison" not in one
    assert f"{one['tables'][0]['centred']['effective_rank']['score']:.4f}" in text
    analyze("spectrum", "a.npy", "b.npy", "--counts", "counts.npy", "--draws", "2", "--json", "two.json")
    two, text = json.loads(Path("two.json").read_text()), capsys.readouterr().out
    assert (two["rows"], two["rows_masked_out"], two["comparison"]["draws"]) == (300, 100, 2)
    assert two["comparison"]["cka"]["score"] == compare(SKEWED[100:], OTHER[100:], draws=2).cka.score
    assert f"{two['comparison']['pairs']['high']:.4f}" in text
    np.save("short.npy", OTHER[:5])
    for words, message in [
        (["b.npy", "short.npy"], "b.npy has 400 rows but short.npy has 5"),
        (["short.npy", "--counts", "counts.npy"], "has 5 rows but there are counts for 400 tokens"),
        (["a.npy", "--draws", "0"], "--draws: must be at least 1, got 0"),
    ]:
        with pytest.raises(UserError, match=message):
            analyze("spectrum", *words)


def test_the_section_says_what_could_not_be_measured():
    study, runs = fake_study(seeds=(0, 1), steps=[0, 400])
    flat = runs["tied", 1].tables()
    flat.input[:] = 1.0
    runs["tied", 1].tables = lambda step=None: flat
    found = {"spectrum": to_plain(section.collect(StudyRuns(study, runs)))}
    found |= {"headline": {"reference": "untied"}}
    reasons = [r.get("not_measured") for r in found["spectrum"]["pairs"] if (r["arm"], r["seed"]) == ("tied", 1)]
    assert reasons == ["spectrum: the rows of the second table are all equal, so that they span no space"] * 2
    assert section.not_measured(found) == reasons[:1]
    names = [row["name"] for row in section.similarities(found)]
    assert names[:3] == ["untied output and its input", "tied and untied output", "tied and untied input"]
    assert [row["name"] for row in section.shapes(found)][-1] == "isotropic"
