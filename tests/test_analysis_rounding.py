"""Rounding: the loss of rounded tables by hand in float64, what changes nothing, the noise, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_analysis_command import analyze
from test_analysis_regret import HELD_OUT, D, T, V, nats, toy

from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.held_out import FrozenModel
from tiedjax.analysis.basis.statistics import Interval, bootstrap_mean
from tiedjax.analysis.instruments.rounding import rounding as module
from tiedjax.analysis.instruments.rounding.rounding import BITS, USES, Cost, Rounding, measure, noise_like, rounded
from tiedjax.errors import UserError
from tiedjax.tying import Tables


def by_hand(table_VD: np.ndarray, bits: int) -> np.ndarray:
    rows = []
    for row_D in np.asarray(table_VD, np.float64):
        scale = max(abs(row_D)) / (2 ** (bits - 1) - 1)
        rows.append([scale * round(number / scale) for number in row_D])
    return np.array(rows)


class Text:
    """A run's text whose held-out windows are those of HELD_OUT."""

    def windows(self, split: str, seq_len: int) -> Any:
        assert (split, seq_len) == ("eval", T)
        return self

    def __len__(self) -> int:
        return len(HELD_OUT)

    def read(self, index: np.ndarray) -> np.ndarray:
        return HELD_OUT[index]


def measured(model: FrozenModel, **options: Any) -> Rounding:
    return measure(model, SimpleNamespace(seq_len=T), Text(), held_out_tokens=HELD_OUT[:, 1:].size, **options)


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_costs_are_those_of_rounded_tables_by_hand(scheme: str) -> None:
    model = toy(scheme)
    found = measured(model, draws=1)
    E_VD, U_VD = (np.asarray(table_VD, np.float64) for table_VD in (model.tables.input, model.tables.output))
    trained_WT = nats(model, Tables(E_VD, U_VD), HELD_OUT)
    assert (found.shared, found.step, found.rows, found.width) == (scheme == "tied", 7, V, D)
    assert (found.held_out_tokens, found.held_out_windows) == (HELD_OUT[:, 1:].size, len(HELD_OUT))
    assert found.loss.mean == pytest.approx(trained_WT.mean(), abs=1e-5)
    assert [(cost.bits, cost.use) for cost in found.costs] == [(bits, use) for bits in BITS for use in USES]
    for cost in found.costs:
        E, U = by_hand(E_VD, cost.bits), by_hand(U_VD, cost.bits)
        tables = {"input": Tables(E, U_VD), "output": Tables(E_VD, U), "both": Tables(E, U)}[cost.use]
        by_window = (nats(model, tables, HELD_OUT) - trained_WT).mean(axis=1)
        span = bootstrap_mean(by_window)
        assert (cost.cost.score, cost.cost.low, cost.cost.high) == pytest.approx(
            (span.mean, span.low, span.high), abs=5e-6
        )
        moved = {"input": [E - E_VD], "output": [U - U_VD], "both": [E - E_VD, U - U_VD]}[cost.use]
        of = {"input": [E_VD], "output": [U_VD], "both": [E_VD, U_VD]}[cost.use]
        norm = lambda parts: math.sqrt(sum(np.square(part).sum() for part in parts))
        assert cost.error == pytest.approx(norm(moved) / norm(of), rel=1e-5)
        assert cost.cost.score - cost.cost.floor == pytest.approx(cost.less_noise.mean, abs=1e-9)
        assert (cost.cost.rows, cost.cost.floor_draws, cost.cost.corrected) == (V, 1, None)
    worst = {use: next(c for c in found.costs if (c.bits, c.use) == (4, use)).cost.score for use in USES}
    assert len(set(worst.values())) == 3


def test_very_many_bits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("untied")
    np.testing.assert_allclose(rounded(model.tables.input, 40), model.tables.input, rtol=1e-7)
    monkeypatch.setattr(module, "BITS", (40,))
    for cost in measured(model, draws=1).costs:
        assert abs(cost.cost.score) < 1e-6


def test_rows_keep_their_largest_number_and_zeros_stay() -> None:
    table = np.random.default_rng(1).normal(size=(9, 5))
    table[3] = 0
    for bits in (2, 4, 8):
        found = rounded(table, bits)
        assert not found[3].any()
        np.testing.assert_allclose(np.abs(found).max(axis=1), np.abs(table).max(axis=1), rtol=1e-6)
        assert max(len(np.unique(np.abs(row))) for row in found) <= 2 ** (bits - 1)
        half_step = np.abs(table).max(axis=1) / (2 ** (bits - 1) - 1) / 2
        assert (np.abs(found - table).max(axis=1) <= half_step * (1 + 1e-6)).all()


def test_the_noise_has_the_norm_of_each_rows_error_and_none_where_there_is_none() -> None:
    error = np.random.default_rng(2).normal(size=(200, 16)) * np.linspace(0, 3, 200)[:, None]
    noise = noise_like(error, np.random.default_rng(3))
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), np.linalg.norm(error, axis=1), rtol=1e-12)
    assert not noise[0].any()
    cosines = (noise[1:] * error[1:]).sum(axis=1) / np.square(np.linalg.norm(error[1:], axis=1))
    assert abs(cosines.mean()) < 4 / math.sqrt(16 * 200), "its direction is not that of the error"


def test_one_table_has_one_noise_in_both_uses_and_two_have_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BITS", (4,))
    for scheme, same in [("tied", True), ("untied", False)]:
        model, seen = toy(scheme), []
        with_tables = model.with_tables
        monkeypatch.setattr(model, "with_tables", lambda t, seen=seen, of=with_tables: seen.append(t) or of(t))
        measured(model, draws=1)
        both_noised = seen[-1]
        assert np.array_equal(both_noised.input, both_noised.output) == same


@pytest.mark.parametrize("scheme", ["tied", "untied"])
def test_the_body_is_passed_once_for_each_change_of_what_it_reads(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, parts = [], FrozenModel.parts_of_states
    monkeypatch.setattr(FrozenModel, "parts_of_states", lambda *args: passes.append(1) or parts(*args))
    measured(toy(scheme), draws=2)
    assert len(passes) == 1 + len(BITS) * (1 + 2)


def fixed(shared: bool) -> Rounding:
    uses = enumerate(((bits, use) for bits in BITS for use in USES), start=1)
    span = lambda i: Interval(0.08 * i, 0.07 * i, 0.1 * i, 9, 0.95)
    score = lambda i: Score(0.1 * i, 0.02 * i, low=0.09 * i, high=0.12 * i)
    costs = [Cost(bits, use, 0.01 * i, score(i), span(i)) for i, (bits, use) in uses]
    return Rounding(7, V, D, shared, Interval(4.5, 4.4, 4.7, 9, 0.95), costs, 3, 4096, 64)


def test_what_the_command_prints(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "measure", lambda *_, **__: fixed(shared=True))
    analyze("rounding", str(finished))
    assert capsys.readouterr().out == (
        f"{finished} at step 7: one table for both roles, 4,096 held-out tokens, 4.5000 +- 0.1500 nats each as "
        "trained\n"
        "bits  rounded   error   costs     low    high   noise  less noise      +-\n"
        "8     input    0.0100  0.1000  0.0900  0.1200  0.0200      0.0800  0.0150\n"
        "8     output   0.0200  0.2000  0.1800  0.2400  0.0400      0.1600  0.0300\n"
        "8     both     0.0300  0.3000  0.2700  0.3600  0.0600      0.2400  0.0450\n"
        "4     input    0.0400  0.4000  0.3600  0.4800  0.0800      0.3200  0.0600\n"
        "4     output   0.0500  0.5000  0.4500  0.6000  0.1000      0.4000  0.0750\n"
        "4     both     0.0600  0.6000  0.5400  0.7200  0.1200      0.4800  0.0900\n"
        "costs: nats a held-out token more than as trained, paired by window; error: norm of the rounding error over\n"
        "the table's; noise: 3 Gaussian ones of the same norm in every row; low, high and +-: 95 % intervals over "
        "windows\n"
    )
    monkeypatch.setattr(module, "measure", lambda *_, **__: fixed(shared=False))
    analyze("rounding", str(finished))
    assert "at step 7: a table for each role, 4,096 held-out" in capsys.readouterr().out


def test_what_the_command_writes(finished: Path, tmp_path: Path) -> None:
    analyze("rounding", str(finished), "--held-out-tokens", "200", "--draws", "2", "--json", str(tmp_path / "o.json"))
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["instrument"], found["shared"], found["draws"]) == ("rounding", True, 2)
    assert [(cost["bits"], cost["use"]) for cost in found["costs"]] == [(b, u) for b in (8, 4) for u in USES]
    with pytest.raises(UserError, match="--draws: must be at least 1, got 0"):
        analyze("rounding", str(finished), "--draws", "0")
