"""Evolution: known turns, strata, and what a common rotation does not change."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from scipy import stats
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax.analysis.basis import tables
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.instruments.evolution.evolution import measure as evolution
from tiedjax.analysis.instruments.evolution.evolution import row_movement
from tiedjax.errors import UserError

rng = np.random.default_rng(0)
START = rng.normal(size=(600, 12))
LATER = [START + size * rng.normal(size=START.shape) for size in (0.3, 1.0)]
SNAPSHOTS = list(zip([0, 5, 9], [START, *LATER], strict=True))
STRATA = {"rare": np.arange(600) % 3 == 0, "frequent": np.arange(600) % 3 == 1, "none": np.zeros(600, bool)}


def mean_cosine(x, y):
    return np.mean((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))


def test_evolution_of_a_known_turn():
    angle = {0: 0.0, 5: 0.3, 9: 1.0}
    length = rng.uniform(0.5, 2, (3, 40, 1))
    turn = [(step, length[i] * np.tile([np.cos(a), np.sin(a)], (40, 1))) for i, (step, a) in enumerate(angle.items())]
    found = evolution(turn)
    assert found.steps == [0, 5, 9]
    assert found.to_start == pytest.approx(np.cos([0, 0.3, 1.0]))
    assert found.to_previous == pytest.approx(np.cos([0, 0.3, 0.7]))


def test_the_floor_of_evolution_is_chance():
    start = rng.normal(size=(3000, 30))
    found = evolution([(0, start), (1, start + 0.1 * rng.normal(size=start.shape))])
    assert found.to_start[1] > 0.99
    for floor, error in [
        (found.floor[1], found.floor_standard_error[1]),
        (found.previous_floor[1], found.previous_floor_standard_error[1]),
    ]:
        assert error == pytest.approx(1 / np.sqrt(3000 * 30), rel=0.1)
        assert abs(floor) < 3 * error
    offset = evolution([(0, start + 3), (1, start + 3)])  # rows with a common part are alike by chance already
    assert offset.floor[1] > 0.8


def test_masked_rows_and_rows_of_zeros_do_not_count():
    start, end = rng.normal(size=(2, 20, 4))
    mask = np.arange(20) < 15
    wanted = evolution([(0, start[mask]), (3, end[mask])])
    assert evolution([(0, start), (3, end)], mask) == wanted
    turned = [
        evolution([(0, a), (3, b)], rows, draws=1).rotation_free
        for a, b, rows in [(start, end, mask), (start[mask], end[mask], None)]
    ]
    assert turned[0].to_start == pytest.approx(turned[1].to_start)
    padded = [(step, np.vstack([t[mask], np.zeros((2, 4))])) for step, t in [(0, start), (3, end)]]
    found = evolution(padded)
    assert found.to_start == pytest.approx(wanted.to_start)
    assert (wanted.rows, wanted.rows_left_out, found.rows, found.rows_left_out) == (15, [0, 0], 17, [2, 2])
    assert np.isnan(row_movement(padded[0][1], padded[1][1])[-2:]).all()


def test_a_stratum_moves_as_a_table_of_its_rows_would():
    mask = np.arange(600) < 500
    found = evolution(SNAPSHOTS, mask, strata=STRATA)
    assert set(found.strata) == {"rare", "frequent"}
    for name, moved in found.strata.items():
        alone = evolution(SNAPSHOTS, STRATA[name] & mask)
        assert vars(moved) == {field: getattr(alone, field) for field in vars(moved)}
    frozen = [(step, np.where(STRATA["rare"][:, None], START, table)) for step, table in SNAPSHOTS]
    still = evolution(frozen, strata=STRATA).strata
    assert still["rare"].to_start == pytest.approx([1, 1, 1])
    assert still["frequent"].to_start[2] < 0.8


def test_rotation_free_drift_is_that_of_scipy():
    found = evolution(SNAPSHOTS, draws=2).rotation_free
    centred = [t - t.mean(0) for _, t in SNAPSHOTS]
    score = lambda x, y: mean_cosine(x @ scipy.linalg.orthogonal_procrustes(x, y)[0], y)
    assert found.to_start == pytest.approx([1, *(score(t, centred[0]) for t in centred[1:])], abs=1e-6)
    assert found.to_previous == pytest.approx(
        [1, score(centred[1], centred[0]), score(centred[2], centred[1])], abs=1e-6
    )
    draw = np.random.default_rng(0)
    floor = np.mean([score(centred[2], centred[0][draw.permutation(600)]) for _ in range(2)])
    assert found.floor[2] == pytest.approx(floor, abs=1e-6)
    assert found.corrected[2] == pytest.approx((found.to_start[2] - floor) / (1 - floor), abs=1e-6)
    assert found.floor_standard_error[2] > 0
    assert evolution(SNAPSHOTS, draws=0).rotation_free is None


def test_a_common_rotation_is_no_movement_unless_it_is_asked_for():
    turns = [stats.ortho_group.rvs(12, random_state=i) for i in range(3)]
    turned = [
        (step, table @ turn + 0.5 * i) for i, ((step, table), turn) in enumerate(zip(SNAPSHOTS, turns, strict=True))
    ]
    plain, found = (evolution(s, draws=1) for s in (SNAPSHOTS, turned))
    for field in ("to_start", "to_previous"):
        np.testing.assert_allclose(getattr(found.rotation_free, field), getattr(plain.rotation_free, field), atol=1e-9)
    assert found.to_start[1] < 0.5 < plain.to_start[1]


def test_unrelated_tables_drift_to_the_rotation_free_floor():
    unrelated = [(0, START), (1, rng.normal(size=START.shape))]
    found = evolution(unrelated, draws=20).rotation_free
    deviation = found.floor_standard_error[1] * np.sqrt(20)
    assert abs(found.to_start[1] - found.floor[1]) < 3 * deviation < 0.1
    assert found.floor[1] > 0.1


def test_the_order_of_the_rows_does_not_matter():
    order = rng.permutation(600)
    found = evolution([(step, table[order]) for step, table in SNAPSHOTS], draws=1)
    wanted = evolution(SNAPSHOTS, draws=1)
    for of in (lambda e: e, lambda e: e.rotation_free):
        np.testing.assert_allclose(of(found).to_start, of(wanted).to_start, atol=1e-9)
        np.testing.assert_allclose(of(found).to_previous, of(wanted).to_previous, atol=1e-9)


def test_rows_without_direction_give_none_not_nan():
    found = evolution([(0, np.zeros((4, 3))), (1, np.zeros((4, 3)))], draws=1)
    json.dumps(to_plain(found), allow_nan=False)
    assert (found.to_start, found.rows_left_out, found.rotation_free.to_start) == ([None] * 2, [4, 4], [None] * 2)
    single = evolution([(0, np.ones((1, 3))), (2, np.ones((1, 3)))], draws=1)
    assert (single.to_start, single.floor_standard_error) == ([pytest.approx(1)] * 2, [None] * 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evolution([]), "there is no snapshot"),
        (lambda: evolution([(0, START), (4, START[:, :3])]), r"step 4 has shape \[600, 3\], the first .* \[600, 12\]"),
        (lambda: evolution([(0, START)], np.ones(3, bool)), "the mask 'rows' is of 3 rows, the table has 600"),
        (lambda: evolution([(0, np.ones(3))]), r"must have 2 dimensions \[V, D\], got \[3\]"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_command_gives_both_forms(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, made = fake_study(seeds=(0,), steps=[0, 4, 400])
    run = made["untied", 0]
    monkeypatch.setattr(tables, "open_run", lambda place: run)
    analyze("evolution", "untied-0", "--json", "o.json")
    ours, text = json.loads(Path("o.json").read_text()), capsys.readouterr().out
    seen = run.token_counts.sum(0) > 0
    assert (ours["form"], ours["rows"], ours["rows_masked_out"]) == ("corrected", seen.sum(), (~seen).sum())
    output = ours["roles"]["output"]
    start, end = run.tables(0).output, run.tables(400).output
    assert output["to_start"][-1] == pytest.approx(mean_cosine(start[seen], end[seen]), abs=1e-6)
    assert set(output["strata"]) == {"rare", "middle", "frequent"}
    assert sum(s["rows"] for s in output["strata"].values()) == seen.sum()
    assert f"{output['rotation_free']['corrected'][-1]:.4f}" in text
    assert f"{output['strata']['rare']['to_start'][-1]:.4f}" in text
    analyze("evolution", "untied-0", "--paper", "--json", "p.json")
    paper = json.loads(Path("p.json").read_text())
    assert paper["roles"] == ours["paper"]["roles"]
    assert (paper["form"], paper["rows"], paper["rows_masked_out"]) == ("paper", len(seen), 0)
    assert paper["roles"]["output"]["to_start"][-1] == pytest.approx(mean_cosine(start, end), abs=1e-6)
    analyze("evolution", "untied-0", "--all-rows", "--json", "a.json")
    every = json.loads(Path("a.json").read_text())["roles"]["output"]
    assert every["to_start"] == paper["roles"]["output"]["to_start"]
    assert "never seen" in every["strata"]
    monkeypatch.setattr(tables, "open_run", lambda place: SimpleNamespace(snapshot_steps=[], token_counts=None))
    with pytest.raises(UserError, match="untied-0: holds no snapshot"):
        analyze("evolution", "untied-0")
