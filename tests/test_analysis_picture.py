"""The map of a table: components and trustworthiness against scikit-learn, neighbours against NumPy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness as sklearn_trustworthiness
from sklearn.metrics.pairwise import cosine_similarity
from test_analysis_command import analyze
from test_study_results import fake_study

from tiedjax.analysis.basis import tables
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.basis.tokens import token_ids, token_texts
from tiedjax.analysis.instruments.picture import projection, section
from tiedjax.analysis.instruments.picture.projection import nearest, principal, project, trustworthiness
from tiedjax.data.tokenizer import train_bpe
from tiedjax.errors import UserError


def table(seed: int = 0, V: int = 400, D: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(V, D)) * np.linspace(3, 0.5, D) + 5).astype(np.float32)


def test_components_are_those_of_scikit_learn_up_to_sign():
    x = table()
    points, explained = principal(x, 3)
    pca = PCA(3, svd_solver="full").fit(x.astype(np.float64))
    expected = pca.transform(x.astype(np.float64))
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points * signs, expected, atol=1e-5)
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, rtol=1e-6)


def test_the_sign_of_a_component_is_that_of_its_largest_loading():
    x = table(1)
    points, _ = principal(x, 2)
    for column in points.T:
        loading = np.linalg.lstsq(x - x.mean(axis=0), column, rcond=None)[0]
        assert loading[np.abs(loading).argmax()] > 0
    np.testing.assert_allclose(principal(-x, 2)[0], -points, atol=1e-4)  # the same directions, so the picture turns


def test_the_order_of_the_tokens_changes_nothing():
    x = table(2)
    order = np.random.default_rng(0).permutation(len(x))
    one, other = project(x), project(x[order])
    np.testing.assert_allclose(np.array(one.coordinates)[order], other.coordinates, atol=1e-5)
    assert one.trust.score == pytest.approx(other.trust.score, abs=1e-12)
    near, permuted = nearest(x, [3], 4)[0], nearest(x[order], [int(np.argmax(order == 3))], 4)[0]
    assert near.neighbours == order[permuted.neighbours].tolist()


@pytest.mark.parametrize("k", [1, 10, 50])
def test_trustworthiness_is_that_of_scikit_learn(k):
    x = table(3)
    points = principal(x, 2)[0]
    found = trustworthiness(x, points, k=k)
    assert found.score == pytest.approx(sklearn_trustworthiness(x.astype(np.float64), points, n_neighbors=k), abs=1e-9)
    assert found.rows == 400
    assert found.score > found.floor + 10 * found.floor_deviation


def test_a_faithful_picture_is_trusted_wholly():
    x = table(4, D=2)
    assert trustworthiness(x, 2 * x[:, ::-1].astype(np.float64), k=10).score == 1
    assert trustworthiness(x, 2 * x[:, ::-1].astype(np.float64), k=10).corrected == pytest.approx(1)


def test_blocks_change_nothing_and_a_sample_of_rows_estimates_all(monkeypatch):
    x = table(5, V=600)
    points = principal(x, 2)[0]
    whole = trustworthiness(x, points)
    monkeypatch.setattr(projection, "_BYTES", 8 * 600 * 7)
    assert trustworthiness(x, points) == whole
    monkeypatch.setattr(projection, "EXACT_ROWS", 100)
    monkeypatch.setattr(projection, "SAMPLED_ROWS", 300)
    sampled = trustworthiness(x, points)
    assert sampled.rows == 300
    assert sampled.score == pytest.approx(whole.score, abs=0.02)
    assert sampled.score != whole.score
    assert sampled.floor == whole.floor


def test_unrelated_points_are_trusted_as_chance_has_it():
    rng = np.random.default_rng(6)
    found = [trustworthiness(rng.normal(size=(300, 8)), rng.normal(size=(300, 2)), k=10) for _ in range(30)]
    z = [(f.score - f.floor) / f.floor_deviation for f in found]
    assert abs(np.mean(z)) < 3 / np.sqrt(len(z))
    assert 0.5 < np.std(z) < 2


def test_the_nearest_rows_are_those_of_the_cosines():
    x = table(7)
    rows = np.arange(400) % 3 > 0
    cosines = cosine_similarity(x.astype(np.float64))
    for of in nearest(x, [5, 200], 6, rows):
        known = cosines[of.token].copy()
        known[~rows] = known[of.token] = -2
        order = np.argsort(-known)[:6]
        assert of.neighbours == order.tolist()
        np.testing.assert_allclose(of.cosines, known[order], atol=1e-12)


def test_rows_of_zeros_are_nobodys_neighbours():
    x = table(8, V=9)
    x[[2, 4]] = 0
    of, zero = nearest(x, [0, 4], 8)
    assert sorted(of.neighbours) == [1, 3, 5, 6, 7, 8]
    assert (zero.neighbours, zero.cosines) == ([], [])
    with pytest.raises(UserError, match="there is no token 9; the table has 9 rows"):
        nearest(x, [9], 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((400, 1), "D of at least 2"), ((2, 5), "V of at least 3"), ((4, 4, 4), r"must be \[V, D\]")],
)
def test_tables_without_a_plane_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        project(np.ones(shape))


def test_odd_tables():
    with pytest.raises(UserError, match="the rows of the table are all equal"):
        project(np.full((30, 4), 0.1, np.float32))
    with pytest.raises(UserError, match="no method is named 'umap'; the methods are pca, tsne"):
        project(table(), "umap")
    assert project(table(V=4)).trust is None
    assert project(table(V=5)).near == 1
    json.dumps(to_plain(project(table(V=30, D=2))), allow_nan=False)


def test_without_opentsne_the_line_to_install_it_is_given(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openTSNE" else find(name, *a))
    with pytest.raises(UserError, match=r'needs openTSNE, which is not installed: pip install "tiedjax\[tsne\]"'):
        project(table(), "tsne")


def test_tokens_are_found_by_their_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_bpe(["the cat and the hat"] * 9, 270).save(str(path))
    one, other, number = token_ids(path, ["the", "at", "[7]"])
    assert token_texts(path, [one, other]) == ["the", "at"]
    assert number == 7
    assert token_texts(path, token_ids(path, [" the"])) == [" the"]
    with pytest.raises(UserError, match="'qqqq': is not one token but 4: q q q q"):
        token_ids(path, ["qqqq"])
    with pytest.raises(UserError, match=r"'the': there is no tokenizer to look it up in; write the token's id"):
        token_ids(None, ["the"])


def test_the_command_shows_tables_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", table(9))
    np.save("b.npy", table(10, D=7))
    analyze("map", "a.npy", "b.npy", "--tokens", "[5],[8]", "--neighbours", "3", "--json", "o.json")
    out, shown = json.loads(Path("o.json").read_text()), capsys.readouterr().out
    assert [len(m["coordinates"]) for m in out["maps"]] == [400, 400]
    assert out["tokens"] == list(range(400))
    for values, found in zip((table(9), table(10, D=7)), out["nearest"], strict=True):
        assert found == to_plain(nearest(values, [5, 8], 3))
        assert f"[{found[0]['neighbours'][0]}] {found[0]['cosines'][0]:.2f}" in shown
    assert f"{out['maps'][1]['trust']['score']:.4f}" in shown
    with pytest.raises(UserError, match="there is no token 400"):
        analyze("map", "a.npy", "--tokens", "[400]")


def test_the_command_leaves_out_never_seen_rows_and_takes_the_most_frequent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, made = fake_study(seeds=(0,), steps=[0, 400])
    run = made["tied", 0]
    monkeypatch.setattr(tables, "open_run", lambda place: run)
    analyze("map", "tied-0", "--json", "o.json")
    out = json.loads(Path("o.json").read_text())
    seen = np.flatnonzero(run.token_counts.sum(axis=0))
    assert out["tokens"] == seen.tolist()
    assert out["maps"][0] == to_plain(project(run.tables().input[seen]))
    assert out["rows_masked_out"] == 256 - len(seen)
    assert [n["token"] for n in out["nearest"][0]] == np.argsort(-run.token_counts[1], kind="stable")[:8].tolist()
    assert {i for n in out["nearest"][0] for i in n["neighbours"]} <= set(seen)


def test_the_section_draws_the_reference_and_the_baseline_of_the_first_seed():
    study, runs = fake_study(seeds=(0, 1), steps=[0, 400])
    records = to_plain(section.collect(StudyRuns(study, runs)))
    assert [(r["arm"], r["seed"], r["role"]) for r in records] == [
        ("untied", 0, "input"),
        ("untied", 0, "output"),
        ("tied", 0, "shared"),
    ]
    results = {"map": records}
    assert [len(r["points"]) for r in records] == [230, 230, 230]  # the seen ones
    assert {c for r in records for c in r["classes"]} == set(range(5))
    assert [len(row["tables"]) for row in section.neighbours(results)] == [3] * 8
    templates = jinja2.Environment(loader=jinja2.PackageLoader("tiedjax.analysis", ""), autoescape=True)
    template = templates.get_template("instruments/picture/section.html.j2")
    page = template.render(r=results, s=section, plot=lambda *_: "", swatch=lambda arm: arm)
    assert f"<td>{section.rows(results)[2]['score']}</td>" in page
    nothing = section.collect(StudyRuns(study, {("untied", 0): runs["untied", 0]}))
    assert nothing == []
    assert "no seed has" in template.render(r={"map": nothing}, s=section, plot=None, swatch=None)
