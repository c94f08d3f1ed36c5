"""Spectral distance: agreement with a dense solution, and what may not change it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from test_analysis_neighbours import brute_force, normal, related, twin

from tiedjax.analysis import command
from tiedjax.analysis.instruments.graph_distance import eigenpairs, graph_distance, section
from tiedjax.analysis.instruments.graph_distance.graph_distance import PAPER_EIGENPAIRS, compare, graph
from tiedjax.analysis.instruments.graph_distance.graph_distance import measure as spectral
from tiedjax.analysis.instruments.neighbours.search import Searches, neighbours
from tiedjax.errors import UserError


def dense(a: np.ndarray, b: np.ndarray, k: int, eigenpairs: int) -> float:
    """The distance from the definition, with NumPy's dense solver and singular values."""
    graphs = []
    for table in (a, b):
        adjacency = np.zeros((len(table), len(table)))
        for row, near in enumerate(brute_force(table, k)):
            adjacency[row, near] = 1
        graphs.append((adjacency + adjacency.T) / 2)
    A, B = graphs
    values, vectors = np.linalg.eigh(np.block([[A, (A + B) / 2], [(A + B) / 2, B]]))
    keep = np.argsort(-np.abs(values))[:eigenpairs]
    Z = vectors[:, keep] * np.sqrt(np.abs(values[keep]))
    za, zb = Z[: len(a)], Z[len(a) :]
    return np.linalg.norm(za - zb, 2) / min(np.linalg.norm(za, 2), np.linalg.norm(zb, 2))


@pytest.mark.parametrize("V", [120, 400])  # with 60 eigenpairs solved whole and by Krylov spaces
@pytest.mark.parametrize(("k", "eigenpairs"), [(10, 5), (16, 60)])
def test_the_distance_is_that_of_a_dense_solver(V, k, eigenpairs):
    a, b = related(V)
    found = spectral(a, b, k=k, eigenpairs=eigenpairs, draws=2)
    distance = found.distance
    assert distance.score == pytest.approx(dense(a, b, k, eigenpairs), abs=1e-6)
    rng = np.random.default_rng(0)
    floor = np.mean([dense(a, b[rng.permutation(V)], k, eigenpairs) for _ in range(2)])
    assert distance.floor == pytest.approx(floor, abs=1e-6)
    assert found.relative == pytest.approx(distance.score / distance.floor)
    assert distance.corrected is None, "a distance is no similarity"
    assert (distance.rows, found.eigenpairs, distance.rows_left_out) == (V, eigenpairs, 0)


def clusters(rng: np.random.Generator, V: int, D: int) -> np.ndarray:
    """Rows about a dozen centres, of lengths that differ a hundredfold."""
    lengths = 10 ** rng.uniform(-1, 1, (V, 1))
    return lengths * (2 * rng.normal(size=(12, D))[rng.integers(12, size=V)] + rng.normal(size=(V, D)))


def common_direction(rng: np.random.Generator, V: int, D: int) -> np.ndarray:
    """Rows with a large mean and a falling spectrum: hubs, and so many one-sided neighbours."""
    return rng.normal(size=(V, D)) / np.sqrt(1 + np.arange(D)) + 1.5 * rng.normal(size=D)


@pytest.mark.parametrize(
    ("seed", "V", "widths", "structure"),
    [
        (11, 200, (12, 12), clusters),
        (12, 330, (24, 9), common_direction),
        (13, 450, (7, 40), clusters),
        (14, 520, (48, 48), common_direction),
    ],
)
def test_the_form_of_the_paper_is_a_dense_computation(seed, V, widths, structure):
    """k-NN graphs as (A + A') / 2, the omnibus matrix, its 128 eigenpairs of largest magnitude, all written out."""
    rng = np.random.default_rng(seed)
    x = structure(rng, V, widths[0])
    y = x @ rng.normal(size=widths) / np.sqrt(widths[0]) + structure(rng, V, widths[1])
    halves = []
    for table in (x, y):
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, -np.inf)
        joined = cosines >= np.sort(cosines, axis=1)[:, [-64]]
        halves.append((joined.astype(float) + joined.T) / 2)
    A, B = halves
    values, vectors = np.linalg.eigh(np.block([[A, (A + B) / 2], [(A + B) / 2, B]]))
    leading = np.argsort(np.abs(values))[-128:]
    za, zb = np.split(vectors[:, leading] * np.sqrt(np.abs(values[leading])), 2)
    wanted = np.linalg.norm(za - zb, 2) / min(np.linalg.norm(za, 2), np.linalg.norm(zb, 2))
    measured = spectral(x, y, eigenpairs=PAPER_EIGENPAIRS, zero_rows=True, draws=0)
    assert measured.distance.score == pytest.approx(wanted, abs=1e-4)
    assert measured.edges == tuple(int(np.count_nonzero(np.triu(half))) for half in halves)


def test_the_graph_is_symmetric_and_hollow_and_a_one_sided_neighbour_weighs_half():
    near = neighbours(normal(200, 6), 9).indices_VK
    adjacency = graph(near).toarray()
    np.testing.assert_array_equal(adjacency, adjacency.T)
    assert not adjacency.diagonal().any()
    for row in range(200):
        for other in range(200):
            assert adjacency[row, other] == ((other in near[row]) + (row in near[other])) / 2
    assert adjacency.sum() == 200 * 9


@pytest.mark.parametrize("V", [150, 400])
def test_a_table_is_at_no_distance_from_itself_turned_or_stretched(V):
    a, b = related(V)
    turn, _ = np.linalg.qr(normal(16, 16, 5))
    for copy in (a, (3 * a @ turn.astype(np.float64))):
        assert spectral(a, copy, k=8, eigenpairs=20, draws=0).distance.score < 1e-6
    assert spectral(a, b, k=8, eigenpairs=20, draws=0).distance.score > 0.1


def test_order_of_tables_and_of_rows_changes_nothing():
    a, b = related(400)
    measure = lambda a, b: spectral(a, b, k=12, eigenpairs=24, draws=0).distance.score
    order = np.random.default_rng(3).permutation(400)
    first = measure(a, b)
    assert measure(b, a) == pytest.approx(first, abs=1e-6)
    assert measure(a[order], b[order]) == pytest.approx(first, abs=1e-6)
    assert measure(a, b[order]) > 1.1 * first


def test_unrelated_tables_lie_as_far_apart_as_chance_puts_them():
    found = spectral(normal(400, 12), normal(400, 12, 1), k=12, eigenpairs=24, draws=8).distance
    deviation = found.floor_standard_error * np.sqrt(found.floor_draws)
    assert abs(found.score - found.floor) < 3 * deviation * np.sqrt(1 + 1 / found.floor_draws)
    near = spectral(*related(400), k=12, eigenpairs=24, draws=8).distance
    assert near.score < near.floor - 3 * near.floor_standard_error * np.sqrt(8)


def test_masked_rows_and_rows_of_zeros_do_not_count():
    a, b = related(300)
    wanted = spectral(a[:240], b[:240], k=8, eigenpairs=16, draws=1)
    holed = a.copy()
    holed[240:250] = 0
    found = spectral(holed, b, k=8, eigenpairs=16, draws=1, kept_V=np.arange(300) < 250)
    assert found == replace(wanted, distance=replace(wanted.distance, rows_left_out=10))
    assert spectral(holed, b, k=8, eigenpairs=16, draws=0, zero_rows=True).distance.score == pytest.approx(
        dense(holed, b, 8, 16), abs=1e-6
    )


def test_what_cannot_be_measured_is_one_clear_line(monkeypatch):
    a, b = related(50)
    with pytest.raises(UserError, match="60 eigenpairs need at least as many rows, got 50"):
        spectral(a, b, k=5, eigenpairs=60)
    with pytest.raises(UserError, match="50 rows, but 64 neighbours need at least 65"):
        spectral(a, b)
    monkeypatch.setattr(eigenpairs, "PRODUCTS", 160)
    monkeypatch.setattr(eigenpairs, "PRODUCTS_PER_PAIR", 2)
    with pytest.raises(
        UserError, match=r"^spectral: [1-5]\d of 60 eigenpairs converged; ask for fewer by --eigenpairs$"
    ):
        spectral(*related(300), k=5, eigenpairs=60)


SPECTRA = {
    "both signs": np.linspace(-10, 9.7, 600),
    "falling": np.concatenate([50 / np.arange(1, 101), np.linspace(-0.4, 0.4, 500)]),
    "an edge that does not separate": 2 * np.cos(np.linspace(0.02, 3.1, 600)),
    "as many equal ones as a block has": np.concatenate([np.full(4, 5.0), np.full(4, -3.0), np.linspace(-2, 2, 592)]),
    "few distinct, of low rank": np.concatenate([np.full(3, 4.0), np.full(30, 2.0), np.zeros(567)]),
}


@pytest.mark.parametrize("space_bytes", [1 << 30, 8 * 600 * 96])  # begun again seldom, and often
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenpairs_are_those_of_largest_magnitude_to_a_small_residual(spectrum, space_bytes):
    rng = np.random.default_rng(1)
    turn_NN = np.linalg.qr(rng.standard_normal((600, 600)))[0]
    matrix_NN = (turn_NN * SPECTRA[spectrum]) @ turn_NN.T
    value_P, vector_NP = eigenpairs.leading(lambda block_NB: matrix_NN @ block_NB, 600, 32, space_bytes=space_bytes)
    wanted_P = -np.sort(-np.abs(SPECTRA[spectrum]))[:32]
    np.testing.assert_allclose(np.abs(value_P), wanted_P, rtol=0, atol=1e-8 * wanted_P[0])
    residual_P = np.linalg.norm(matrix_NN @ vector_NP - vector_NP * value_P, axis=0)
    assert residual_P.max() < 2e-6 * wanted_P[0]
    np.testing.assert_allclose(vector_NP.T @ vector_NP, np.eye(32), rtol=0, atol=1e-12)


def test_graphs_that_stand_in_both_forms_are_embedded_once(monkeypatch):
    a, b = related(300)
    asked = []
    found = graph_distance.leading
    monkeypatch.setattr(graph_distance, "leading", lambda *args: asked.append(args[2]) or found(*args))
    alone = spectral(a, b, k=8, eigenpairs=16, draws=0).distance.score
    remembered = {"k": 8, "draws": 0, "searches": Searches(), "embeddings": graph_distance.Embeddings()}
    spectral(a, b, eigenpairs=48, zero_rows=True, **remembered)
    assert spectral(a, b, eigenpairs=16, **remembered).distance.score == pytest.approx(alone, abs=1e-7)
    assert asked == [16, 48]
    spectral(a, b, eigenpairs=16, kept_V=np.arange(300) < 250, **remembered)
    spectral(a, b, eigenpairs=50, **remembered)
    assert asked == [16, 48, 16, 50]


def test_floors_are_optional_and_counted():
    graphs = [graph(neighbours(t, 6).indices_VK) for t in related(100)]
    bare = compare(*graphs, eigenpairs=8)
    floor = bare.distance
    assert (floor.floor, floor.floor_standard_error, bare.relative, floor.floor_draws) == (None, None, None, 0)
    one = compare(*graphs, eigenpairs=8, draws=1)
    assert one.distance.floor is not None
    assert one.distance.floor_standard_error is None
    assert one.edges == tuple(np.count_nonzero(g.toarray()) // 2 for g in graphs)


def test_the_command_gives_both_forms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = related(200)
    np.save("a.npy", a)
    np.save("b.npy", b)
    np.save("counts.npy", np.maximum(np.arange(200) - 19, 0))

    def analyze(*words: str) -> dict:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        options = ["--k", "8", "--eigenpairs", "16", "--draws", "2", "--json", "out.json"]
        command.run(parser.parse_args(["spectral", "a.npy", "b.npy", *options, *words]))
        return json.loads((tmp_path / "out.json").read_text())

    ours, paper = analyze("--counts", "counts.npy"), analyze("--paper")
    assert (ours["form"], ours["rows"], ours["rows_masked_out"], ours["k"]) == ("corrected", 180, 20, 8)
    assert ours["distance"]["score"] == pytest.approx(dense(a[20:], b[20:], 8, 16), abs=1e-6)
    assert paper["distance"]["score"] == ours["paper"]["score"] == pytest.approx(dense(a, b, 8, 16), abs=1e-6)
    assert paper["rows"] == 200
    assert "relative" not in paper
    assert f"{ours['relative']:.4f}" in capsys.readouterr().out


def test_the_section_measures_the_rows_both_saw(monkeypatch):
    monkeypatch.setattr(section, "measure", partial(spectral, k=12))
    pair, few = twin(), twin(40)
    results = {
        "spectral": section.collect(SimpleNamespace(twins=[pair, few])),
        "headline": {"reference": "untied"},
    }
    found = results["spectral"]["pairs"][0]
    a, b = pair.reference.values[31:], pair.subject.values[31:]
    assert found["distance"]["score"] == pytest.approx(dense(b, a, 12, section.EIGENPAIRS), abs=1e-6)
    row = section.distances(results)[0]
    assert (row["name"], row["distance"]) == ("tied and untied output", f"{found['distance']['score']:.3f}")
    assert section.not_measured(results) == ["knn: 9 rows, but 12 neighbours need at least 13"]
