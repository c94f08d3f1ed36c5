"""The share of what training makes every time: its inner product, its correction, its interval and its gate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tiedjax.analysis.instruments.alignment.align import align
from tiedjax.analysis.study.reproducibility import (
    Geometry,
    across_seeds,
    correlation,
    frequency_groups,
    inner,
    jackknife,
    mean_of,
    reproducible_shares,
    share_of,
    similarity,
)

V, D = 400, 16
COUNTS = np.tile(np.arange(1, V + 1), (2, 1))
SEEDS = range(5)


def rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(D, D)))[0]


def study(share: float, noise: float = 0.7, seeds: int = 5) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Tied tables whose signal correlates so with the output's, and by the rest with the input's; beside untied ones.

    Every run is rotated, scaled and has noise of its own.
    """
    rng = np.random.default_rng(0)
    output, input_ = (np.linalg.qr(rng.normal(size=(V, D)))[0] * np.sqrt(V) for _ in range(2))
    angle = np.arccos(share)
    tied = np.hstack([np.sqrt(np.cos(angle)) * output, np.sqrt(np.sin(angle)) * input_])
    wide = lambda table: np.hstack([table, np.zeros((V, D))])

    def run(signal: np.ndarray) -> np.ndarray:
        table = signal + noise * rng.normal(size=signal.shape)
        return rng.lognormal() * table @ np.linalg.qr(rng.normal(size=(2 * D, 2 * D)))[0]

    tables: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for seed in range(seeds):
        tables["untied", seed] = {"input": run(wide(input_)), "output": run(wide(output))}
        tables["tied", seed] = {"shared": run(tied)}
    return tables


def shares(tables, reference="untied"):
    return reproducible_shares(tables, dict.fromkeys(tables, COUNTS), reference)


# ---- The inner product ----


def test_the_inner_product_is_that_of_the_projections_written_out():
    # Least squares leave of the off-diagonal entries what no row and column term of any block of parts explains.
    rng = np.random.default_rng(0)
    part_V = np.repeat([1, 2, 3, 0], [5, 6, 4, 3])[rng.permutation(18)]
    x_VD, y_VE = rng.normal(size=(18, 3)), rng.normal(size=(18, 4)) + 2.0
    y_VE[:, :3] += x_VD
    kept = part_V > 0
    part, n = part_V[kept], int(kept.sum())
    terms = []
    for row, other in itertools.product(range(n), (1, 2, 3)):
        term = np.zeros((n, n))
        term[row, part == other] = 1
        terms.append((term + term.T)[~np.eye(n, dtype=bool)])
    basis = np.array(terms).T

    def projected(table: np.ndarray) -> np.ndarray:
        entries = (table[kept] @ table[kept].T)[~np.eye(n, dtype=bool)]
        return entries - basis @ np.linalg.lstsq(basis, entries, rcond=None)[0]

    wanted = projected(x_VD) @ projected(y_VE)
    assert inner(Geometry(x_VD, part_V), Geometry(y_VE, part_V)) == pytest.approx(wanted, rel=1e-10)


def test_with_one_part_it_is_the_unbiased_hilbert_schmidt_criterion():
    rng = np.random.default_rng(1)
    n = 30
    x_VD, y_VD = rng.normal(size=(2, n, 4))
    K, L = (table @ table.T for table in (x_VD, y_VD + x_VD))
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    one = np.ones(n)
    wanted = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ K @ L @ one
    part_V = np.ones(n, int)
    assert inner(Geometry(x_VD, part_V), Geometry(y_VD + x_VD, part_V)) == pytest.approx(wanted, rel=1e-10)


def test_neither_rotation_scale_nor_a_row_added_to_a_part_changes_the_similarity():
    rng = np.random.default_rng(2)
    part_V = frequency_groups([COUNTS])
    x_VD, y_VD = rng.normal(size=(2, V, D)) + rng.normal(size=(V, D))
    moved_VD = 3.0 * (x_VD + rng.normal(size=(part_V.max() + 1, D))[part_V]) @ rotation(rng)
    s = similarity(Geometry(x_VD, part_V), Geometry(y_VD, part_V))
    assert 0.1 < s < 0.9
    assert similarity(Geometry(moved_VD, part_V), Geometry(y_VD, part_V)) == pytest.approx(s, rel=1e-9)
    assert similarity(Geometry(y_VD, part_V), Geometry(x_VD, part_V)) == pytest.approx(s, rel=1e-12)
    assert similarity(Geometry(x_VD, part_V), Geometry(moved_VD, part_V)) == pytest.approx(1, rel=1e-9)


def test_noise_alone_has_no_similarity_on_average():
    rng = np.random.default_rng(3)
    part_V = frequency_groups([COUNTS])
    s = [similarity(*(Geometry(rng.normal(size=(V, D)), part_V) for _ in range(2))) for _ in range(100)]
    assert abs(np.mean(s)) < 4 * np.std(s) / 10
    assert np.std(s) / 10 < 0.001  # below the share D / V = 0.04 that the diagonal would leave


def test_a_table_of_equal_rows_is_similar_to_nothing():
    part_V = frequency_groups([COUNTS])
    constant, other = Geometry(np.full((V, D), 0.1), part_V), Geometry(np.eye(V, D), part_V)
    assert (constant.norm, similarity(constant, other), similarity(constant, constant)) == (0, 0, 0)


def test_a_tables_own_values_are_left_as_they_are():
    table_VD = np.ones((V, D))
    Geometry(table_VD, np.ones(V, int))
    assert (table_VD == 1).all()


def test_parts_hold_fifty_rows_that_every_run_saw():
    second = 3 * COUNTS
    second[:, :100] = 0
    part_V = frequency_groups([COUNTS, second])
    assert np.bincount(part_V).tolist() == [100, *[50] * 6]
    assert (np.diff(part_V) >= 0).all()


# ---- The correction ----


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_correlation_of_the_signals_is_recovered_where_alignment_fails(share):
    tables = study(share)
    cell = shares(tables)["tied"]["shared"]
    wanted = {"vs_output": share, "vs_input": np.sqrt(1 - share**2)}
    for name, value in wanted.items():
        assert getattr(cell, name).mean == pytest.approx(value, abs=0.02)
    assert cell.margin.mean == pytest.approx(cell.vs_output.mean - cell.vs_input.mean)
    assert cell.margin.low < share - wanted["vs_input"] < cell.margin.high
    assert (cell.reason, cell.rows, cell.parts, cell.vs_output.n) == (None, V, 8, 5)


def test_alignment_put_through_the_same_correction_is_biased():
    tables = study(0.3, noise=1.2)
    near = lambda x, y: align(x, y, fits=("orthogonal",), draws=1).scores["orthogonal"].corrected
    table = lambda role, seed: tables["tied" if role == "shared" else "untied", seed][role]
    pairs = lambda a, b: {(i, j): near(table(a, i), table(b, j)) for i, j in itertools.permutations(range(3), 2)}
    value = correlation(pairs("shared", "output"), pairs("shared", "shared"), pairs("output", "output"), range(3))
    signals = study(0.3, noise=0.0, seeds=1)
    true = near(signals["tied", 0]["shared"], signals["untied", 0]["output"])
    assert abs(value - true) > 0.03


def test_a_signal_is_all_its_own_and_nothing_of_an_independent_one():
    tables = study(1.0)
    cell = shares(tables)["tied"]["shared"]
    assert cell.vs_output.mean == pytest.approx(1, abs=0.03)
    assert cell.vs_input.mean == pytest.approx(0, abs=0.03)


def test_what_runs_of_one_seed_have_in_common_is_not_counted():
    tables = study(0.6)
    rng = np.random.default_rng(4)
    for seed in SEEDS:
        both = rng.normal(size=(V, 2 * D))
        for roles in (tables["untied", seed], tables["tied", seed]):
            for role, table in roles.items():
                roles[role] = table / table.std() + both
    assert shares(tables)["tied"]["shared"].vs_output.mean == pytest.approx(0.6, abs=0.05)


def test_tables_of_different_seeds_are_paired_both_ways():
    rng = np.random.default_rng(6)
    a, b, c, d = (Geometry(rng.normal(size=(V, D)), frequency_groups([COUNTS])) for _ in range(4))
    assert across_seeds({0: a, 1: b}, {0: c, 1: d}) == {(0, 1): similarity(a, d), (1, 0): similarity(b, c)}
    runs = {0: a, 1: b}
    assert across_seeds(runs, runs) == {(0, 1): similarity(a, b), (1, 0): similarity(a, b)}


# ---- The interval and the gate ----


def test_tables_that_do_not_repeat_have_no_share():
    tables = study(0.6)
    rng = np.random.default_rng(5)
    for seed in SEEDS:
        tables["untied", seed]["input"] = rng.normal(size=(V, 2 * D))
    cell = shares(tables)["tied"]["shared"]
    assert cell.divides_by["input"].low < 0 < cell.divides_by["input"].high
    assert cell.divides_by["output"].low > 0
    assert cell.vs_output.mean == pytest.approx(0.6, abs=0.02)
    assert (cell.vs_input.mean, cell.margin.mean, cell.margin.n) == (None, None, 5)
    assert cell.reason == "not measurably alike between seeds: input"
    for seed in SEEDS:
        tables["tied", seed]["shared"] = rng.normal(size=(V, 2 * D))
    cell = shares(tables)["tied"]["shared"]
    assert (cell.vs_output.mean, cell.vs_input.mean, cell.margin.mean) == (None, None, None)
    assert cell.reason == "not measurably alike between seeds: subject, input"


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_seeds_have_no_share(seeds):
    cell = shares(study(0.9, seeds=seeds))["tied"]["shared"]
    assert (cell.vs_output.mean, cell.vs_input.mean, cell.margin.mean) == (None, None, None)
    assert cell.reason == f"{seeds} seeds cannot show what repeats; 3 can"
    assert (cell.divides_by["output"].mean is None) == (seeds == 1)


def test_every_other_arm_and_role_has_a_share_over_the_seeds_it_has():
    tables = study(0.9)
    tables |= {("other", seed): tables["untied", seed] for seed in range(4)}
    by_arm = shares(tables)
    assert {arm: list(by_role) for arm, by_role in by_arm.items()} == {"tied": ["shared"], "other": ["input", "output"]}
    assert by_arm["other"]["output"].vs_output.mean == pytest.approx(1)
    assert by_arm["other"]["output"].vs_output.n == 4
    assert shares(tables, reference="tied") == {}


def test_each_share_divides_by_its_own_two_tables():
    same = lambda value: dict.fromkeys(itertools.permutations(range(3), 2), value)
    repeated = {"subject": same(0.64), "output": same(0.25), "input": same(0.04)}
    fields = share_of({"output": same(0.2), "input": same(0.04)}, repeated, range(3))
    assert fields["vs_output"].mean == pytest.approx(0.2 / (0.8 * 0.5))
    assert fields["vs_input"].mean == pytest.approx(0.04 / (0.8 * 0.2))
    assert fields["margin"].mean == pytest.approx(0.25)


def test_the_jackknife_of_a_mean_is_the_t_interval_of_a_mean():
    from scipy import stats

    values = {0: 0.2, 1: 0.5, 2: 0.9, 3: 0.4}
    span = jackknife(lambda seeds: sum(values[s] for s in seeds) / len(seeds), list(values))
    low, high = stats.t.interval(0.95, 3, loc=0.5, scale=stats.sem(list(values.values())))
    assert (span.mean, span.low, span.high) == pytest.approx((0.5, low, high))


def test_two_seeds_or_a_missing_value_give_no_interval():
    assert jackknife(lambda seeds: 1.0, [0, 1]).low is None
    assert jackknife(lambda seeds: None if 0 not in seeds else 1.0, [0, 1, 2]).low is None
    assert jackknife(lambda seeds: None, [0, 1, 2]).mean is None


def test_a_mean_is_over_the_pairs_of_the_seeds_left():
    pairs = {(0, 1): 1.0, (1, 0): 3.0, (0, 2): 8.0, (2, 0): 8.0}
    assert mean_of(pairs, [0, 1]) == 2.0
    assert mean_of(pairs, [1, 2]) is None
