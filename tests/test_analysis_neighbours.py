"""Neighbours: agreement with brute force, what may not change a score, and what chance is."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from tiedjax.analysis import command
from tiedjax.analysis.basis.study_runs import LastTable, TwinTables
from tiedjax.analysis.instruments.neighbours import search as search
from tiedjax.analysis.instruments.neighbours import section
from tiedjax.analysis.instruments.neighbours.overlap import hubness, shared
from tiedjax.analysis.instruments.neighbours.overlap import measure as knn
from tiedjax.analysis.instruments.neighbours.search import neighbours
from tiedjax.errors import UserError


def brute_force(table: np.ndarray, k: int) -> np.ndarray:
    """The k nearest by cosine in float64, equals (to 12 digits) by index."""
    table = table.astype(np.float64)
    table = table / np.abs(table).max()
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.where(norm == 0, 1, norm)
    cosines = np.round(unit @ unit.T, 12)
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]


def brute_score(a: np.ndarray, b: np.ndarray, k: int) -> float:
    pairs = zip(brute_force(a, k), brute_force(b, k), strict=True)
    return float(np.mean([len(set(x) & set(y)) / k for x, y in pairs]))


def normal(V: int, D: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((V, D), np.float32)


def related(V: int = 600, widths: tuple[int, int] = (16, 24), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two tables whose rows lie alike, and apart from that are noise."""
    common = normal(V, 8, seed)
    return tuple(common @ normal(8, D, seed + D) + normal(V, D, seed + 2 * D) for D in widths)  # type: ignore[return-value]


KINDS = {
    "random": lambda x: x,
    "few values, many ties": lambda x: np.sign(np.round(x)),
    "copies at another length": lambda x: np.concatenate([x[: len(x) // 2], 3 * x[: len(x) - len(x) // 2]]),
    "rows of zeros": lambda x: np.where(np.arange(len(x))[:, None] % 3 == 0, 0, x),
    "all rows equal": lambda x: np.ones_like(x),
    "one direction": lambda x: x[:1] + 1e-3 * x,
    "huge": lambda x: x * np.float64(1e200),
    "tiny": lambda x: x * np.float64(1e-200),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("V", "D", "k"), [(1100, 24, 10), (9, 3, 8), (700, 5, 1), (300, 40, 64)])
def test_neighbours_are_those_of_brute_force_on_every_path(kind, V, D, k):
    table = KINDS[kind](normal(V, D))
    wanted = brute_force(table, k)
    np.testing.assert_array_equal(neighbours(table, k).indices_VK, wanted)
    device = search._Search(table, k)
    device.on_device()
    np.testing.assert_array_equal(device.indices, wanted)
    by_index = np.sort(wanted, axis=1)
    np.testing.assert_array_equal(np.sort(neighbours(table, k, ordered=False).indices_VK, axis=1), by_index)
    np.testing.assert_array_equal(search.Searches().indices(table, np.ones(V, bool), k), by_index)


@pytest.mark.parametrize("V", [1000, 1537])
def test_blocks_change_nothing(monkeypatch, V):
    table = normal(V, 20) + 2
    whole = neighbours(table, 10)
    monkeypatch.setattr(search, "_ROWS", 64)
    monkeypatch.setattr(search, "_COLUMNS", 192)
    monkeypatch.setattr(search, "_BYTES", 100_000)
    monkeypatch.setattr(search, "_DEVICE_BYTES", 400_000)
    device = search._Search(table, 10)
    device.on_device()
    np.testing.assert_array_equal(device.indices, whole.indices_VK)
    small = neighbours(table, 10)
    np.testing.assert_array_equal(small.indices_VK, whole.indices_VK)
    np.testing.assert_allclose(small.cosines_VK, whole.cosines_VK, atol=1e-6)


@pytest.mark.parametrize("V", [512, 1003])
def test_what_is_kept_of_a_row_is_all_that_lies_above_a_threshold_but_itself(monkeypatch, V):
    """In a table that is sorted, too: the sample is random."""
    monkeypatch.setattr(search, "_ROWS", 64)
    monkeypatch.setattr(search, "_COLUMNS", 192)
    table = normal(V, 12) + np.linspace(-3, 3, V, dtype=np.float32)[:, None]
    found = search._Search(table, 5)
    with ThreadPoolExecutor(2) as threads:
        above, crowded = found._above_thresholds(threads)
        above = above.toarray()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    kept = above != 0
    assert not crowded.any()
    assert not kept.diagonal().any()
    assert (kept.sum(axis=1) >= found.near).all()
    assert kept.mean() < 0.3
    np.testing.assert_allclose(above[kept], cosines[kept], atol=1e-6)
    largest_left_out = np.where(kept, -2, cosines).max(axis=1)
    assert (np.where(kept, cosines, 2).min(axis=1) > largest_left_out - 1e-6).all()


def test_rows_that_keep_too_many_keep_no_more_and_are_done_whole(monkeypatch):
    """All rows but those of the sample lie along one direction: above each one's threshold lie all the others."""
    monkeypatch.setattr(search, "_ROWS", 64)
    monkeypatch.setattr(search, "_COLUMNS", 192)
    table = normal(2000, 24)
    others = np.random.default_rng(0).permutation(2000)[192:]
    table[others] = table[0] + 1e-3 * table[others]
    with ThreadPoolExecutor(2) as threads:
        above, crowded = search._Search(table, 10)._above_thresholds(threads)
    assert crowded[others].all()
    assert np.diff(above.indptr).max() < 1000
    np.testing.assert_array_equal(neighbours(table, 10).indices_VK, brute_force(table, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_those_of_brute_force_where_thresholds_come_from_a_sample(monkeypatch, kind):
    monkeypatch.setattr(search, "_ROWS", 64)
    monkeypatch.setattr(search, "_COLUMNS", 192)
    table = KINDS[kind](normal(1100, 24))
    np.testing.assert_array_equal(neighbours(table, 10).indices_VK, brute_force(table, 10))


def test_cosines_are_those_of_the_indices():
    table = normal(500, 16)
    found = neighbours(table, 7)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    np.testing.assert_allclose(found.cosines_VK, np.einsum("vd,vkd->vk", unit, unit[found.indices_VK]), atol=1e-6)
    assert (np.diff(found.cosines_VK) <= 0).all()


def test_float32_alone_would_name_others():
    """Rows so near to each other that float32 products order them wrongly."""
    table = np.concatenate([1 + 3e-4 * normal(400, 512), normal(1600, 512)])
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    rounded = unit @ unit.T
    np.fill_diagonal(rounded, -2)
    plain = np.argsort(-rounded, axis=1, kind="stable")[:, :10]
    wanted = brute_force(table, 10)
    assert (plain[:400] != wanted[:400]).any()
    assert (np.sort(plain[:400], axis=1) != np.sort(wanted[:400], axis=1)).any()
    np.testing.assert_array_equal(neighbours(table, 10).indices_VK, wanted)
    unordered = neighbours(table, 10, ordered=False).indices_VK
    np.testing.assert_array_equal(np.sort(unordered, axis=1), np.sort(wanted, axis=1))


def test_only_what_changes_the_answer_is_decided_in_float64(monkeypatch):
    """Of 64 near rows at width 512 some two always are too near each other for float32; the last one seldom is."""
    table, exact_rows = normal(1500, 512), []
    unit = search._Search.unit
    monkeypatch.setattr(search._Search, "unit", lambda self, index: exact_rows.append(index) or unit(self, index))
    counts = []
    for ordered in (True, False):
        exact_rows.clear()
        neighbours(table, 64, ordered=ordered)
        asked_rows = sum(len(index) for index in exact_rows if not isinstance(index, slice))
        counts.append(asked_rows - len(table))  # the float32 copy asks for each of them once
    assert 0 < counts[1] < counts[0] / 50


def test_progress_is_reported(monkeypatch):
    ticks = iter(range(0, 10_000, 6))
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(search, "_ROWS", 256)
    lines: list[str] = []
    neighbours(normal(1000, 8), 3, report=lines.append)
    assert lines[-1].startswith("neighbours of 1,000 rows: 100%")


# ---- the score


@pytest.mark.parametrize("k", [1, 10, 50])
def test_the_score_is_that_of_brute_force(k):
    a, b = related()
    found = knn(a, b, k=k)
    assert found.overlap.rows_left_out == 0
    assert found.paper == replace(found.overlap, corrected=None), "every row counts"
    assert found.overlap.score == pytest.approx(brute_score(a, b, k), abs=1e-12)
    assert found.overlap.score > 10 * found.overlap.floor or k == 50
    assert found.interval.low < found.overlap.score < found.interval.high
    assert found.interval.mean == pytest.approx(found.overlap.score)
    assert sum(found.histogram) == 600
    assert np.dot(found.histogram, np.arange(k + 1)) / k / 600 == pytest.approx(found.overlap.score)
    per_row = np.repeat(np.arange(k + 1) / k, found.histogram)
    assert found.quantiles == {f"{q:g}": pytest.approx(np.quantile(per_row, q)) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}


def test_a_table_and_its_turned_and_stretched_copy_agree_wholly():
    a, _ = related()
    turn, _ = np.linalg.qr(normal(16, 16, 5))
    lengths = np.random.default_rng(1).uniform(0.1, 9, (600, 1))
    for copy in (a, 3 * a @ turn, lengths * a, np.pad(a, [(0, 0), (0, 7)])):
        assert knn(a, copy).overlap.score == pytest.approx(1, abs=1e-3)
        assert knn(a, copy).overlap.corrected == pytest.approx(1, abs=1e-3)


def test_order_of_rows_and_of_tables_changes_nothing():
    a, b = related()
    order = np.random.default_rng(3).permutation(len(a))
    first = knn(a, b).overlap.score
    assert knn(a[order], b[order]).overlap.score == first == knn(b, a).overlap.score
    assert knn(a, b[order]).overlap.score < 0.1 * first


def test_unrelated_tables_score_as_chance_does():
    n = 12
    scores = [knn(normal(800, 16, s), normal(800, 16, 100 + s), draws=1).overlap.score for s in range(n)]
    closed = 10 / 799
    assert abs(np.mean(scores) - closed) < 3 * np.std(scores, ddof=1) / np.sqrt(n)
    found = knn(normal(800, 16), normal(800, 16, 1), draws=40).overlap
    assert found.floor_closed_form == pytest.approx(closed)
    assert abs(found.floor - closed) < 3 * found.floor_standard_error
    assert found.floor_draws == 40
    assert abs(found.score - found.floor) < 3 * found.floor_standard_error * np.sqrt(41)
    assert found.corrected == pytest.approx((found.score - found.floor) / (1 - found.floor))


def test_the_floor_is_that_of_permuted_tables():
    a, b = related(300)
    rng = np.random.default_rng(0)
    wanted = [brute_score(a, b[rng.permutation(300)], 10) for _ in range(4)]
    found = knn(a, b, draws=4).overlap
    assert found.floor == pytest.approx(np.mean(wanted), abs=1e-12)
    assert found.floor_standard_error == pytest.approx(stats.sem(wanted))


def test_centring_is_of_the_rows_that_count():
    a, b = related()
    rows = np.arange(600) % 5 != 0
    offset = np.where(rows[:, None], 7, -100).astype(np.float32)
    plain = [t - t[rows].mean(axis=0) for t in (a, b)]
    wanted = brute_score(plain[0][rows], plain[1][rows], 10)
    assert knn(a + offset, b, kept_V=rows, centred=True).overlap.score == pytest.approx(wanted, abs=2e-3)
    assert knn(a + offset, b, kept_V=rows).overlap.score < 0.9 * wanted


def test_masked_rows_and_rows_of_zeros_do_not_count():
    a, b = related()
    rows = np.arange(600) < 500
    wanted = knn(a[:490], b[:490])
    holed = a.copy()
    holed[490:500] = 0
    found = knn(holed, b, kept_V=rows)
    everything = knn(holed, b, zero_rows=True)
    assert found == replace(wanted, overlap=replace(wanted.overlap, rows_left_out=10), paper=everything.paper)
    assert (everything.overlap.rows, everything.overlap.rows_left_out) == (600, 0)
    assert everything.overlap.score == pytest.approx(brute_score(holed, b, 10))
    constant = np.tile(np.random.default_rng(0).normal(size=16), (600, 1))  # its float64 mean differs by rounding
    with pytest.raises(UserError, match=r"0 rows \(600 more have no direction\)"):
        knn(constant, b, centred=True)


def test_strata_split_the_score_by_count():
    a, b = related()
    counts = np.random.default_rng(0).integers(1, 1000, 600)
    counts[:60] = 0
    found = knn(a, b, counts=counts)
    per_row = shared(brute_force(a, 10), brute_force(b, 10)) / 10
    assert found.strata["never seen"].score == pytest.approx(per_row[:60].mean())
    assert [o.rows for o in found.strata.values()] == [60, 180, 180, 180]
    assert found.overlap.score == pytest.approx(
        np.average([o.score for o in found.strata.values()], weights=[1, 3, 3, 3])
    )
    assert all(abs(o.floor - o.floor_closed_form) < 4 * o.floor_standard_error for o in found.strata.values())


def test_hubness_is_the_skewness_of_scipy():
    table = normal(500, 50) + 1.5
    found = neighbours(table, 10).indices_VK
    times = np.bincount(found.ravel(), minlength=500)
    hubs = hubness(found)
    assert hubs.skewness == pytest.approx(stats.skew(times))
    assert (hubs.orphans, hubs.largest) == (np.mean(times == 0), times.max())
    assert hubness(np.array([[1], [0]])).skewness is None


@pytest.mark.parametrize(
    ("a", "b", "k", "message"),
    [
        (normal(5, 4), normal(6, 4), 2, "the same rows, got 5 and 6"),
        (normal(5, 4)[None], normal(5, 4), 2, "the first table must have 2 dimensions"),
        (normal(5, 4), normal(5, 1), 2, "the second table has width 1"),
        (normal(5, 4), normal(5, 4), 5, "5 rows, but 5 neighbours need at least 6"),
        (normal(1, 4), normal(1, 4), 1, "1 rows, but 1 neighbours need at least 2"),
        (normal(5, 4), normal(5, 4), 0, "k must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(a, b, k, message):
    with pytest.raises(UserError, match=message) as error:
        knn(a, b, k=k)
    assert "\n" not in str(error.value)


# ---- the command and the section


def analyze(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([*words, "--json", "out.json"]))
    with open("out.json", encoding="utf-8") as file:
        return json.load(file)


def test_the_command_gives_both_forms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = related(400)
    a[7] = 0
    counts = np.arange(400) - 20
    np.save("a.npy", a)
    np.save("b.npy", b)
    np.save("counts.npy", np.maximum(counts, 0))
    paper = analyze("knn", "a.npy", "b.npy", "--paper")
    assert (paper["form"], paper["k"], paper["rows"]) == ("paper", 10, 400)
    assert paper["score"] == pytest.approx(brute_score(a, b, 10), abs=1e-12)
    assert "corrected" not in paper
    ours = analyze("knn", "a.npy", "b.npy", "--counts", "counts.npy", "--k", "5")
    kept = counts > 0
    assert (ours["rows"], ours["rows_masked_out"], ours["rows_left_out"]) == (379, 21, 0)
    assert ours["score"] == pytest.approx(brute_score(a[kept], b[kept], 5), abs=1e-12)
    assert ours["paper"]["score"] == pytest.approx(brute_score(a, b, 5), abs=1e-12)
    assert list(ours["strata"]) == ["rare", "middle", "frequent"]
    assert (ours["width"], ours["other_width"], len(ours["hubness"])) == (16, 24, 2)
    assert f"{ours['score']:.4f}" in capsys.readouterr().out
    assert analyze("knn", "a.npy", "b.npy")["rows_left_out"] == 1
    with pytest.raises(UserError, match="does not centre"):
        analyze("knn", "a.npy", "b.npy", "--paper", "--centre")


def twin(V: int = 300) -> TwinTables:
    a, b = related(V)
    counts = np.stack([np.arange(V) - 30, np.arange(V) - 30]).clip(0)
    make = lambda arm, role, values: LastTable(arm, 0, role, values, counts, None)
    return TwinTables(make("untied", "output", a), make("tied", "shared", b))


def test_the_section_measures_the_rows_both_saw():
    pair = twin()
    study = SimpleNamespace(twins=[pair])
    found = section.collect(study)["pairs"][0]
    a, b = pair.reference.values, pair.subject.values
    assert found["overlap"]["rows"] == 269
    assert found["overlap"]["score"] == pytest.approx(brute_score(a[31:], b[31:], 10))
    assert found["paper"]["score"] == pytest.approx(brute_score(a, b, 10))
    assert list(found["strata"]) == ["rare", "middle", "frequent"]
    few = section.collect(SimpleNamespace(twins=[twin(40)]))["pairs"][0]
    assert few["not_measured"] == "knn: 9 rows, but 10 neighbours need at least 11"
    results = {
        "knn": {"k": 10, "pairs": [found, few]},
        "headline": {"arm": "tied", "reference": "untied"},
        "arms": {"untied": {}, "tied": {}},
    }
    row = section.overlaps(results)[0]
    assert (row["name"], row["published"], row["score"]) == (
        "tied and untied output",
        "0.733",
        f"{found['overlap']['score']:.3f}",
    )
    assert section.not_measured(results) == [few["not_measured"]]
    assert {h["name"] for h in section.hubs(results)} == {"tied", "untied output"}
