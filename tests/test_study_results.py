"""A study's results: what is in them, what holds, and that they are plain JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from programs import REPOSITORY
from scipy import stats

from tiedjax.analysis.basis.plain_json import write_json
from tiedjax.analysis.basis.strata import frequency_parts
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.analysis.instruments.alignment.align import align
from tiedjax.analysis.instruments.alignment.fitting import FITS
from tiedjax.analysis.study.reproducibility import reproducible_shares
from tiedjax.analysis.study.results import collect, parts_of, seed_of, summarize
from tiedjax.analysis.study.sections import left_out
from tiedjax.config import DataConfig, RunConfig, StudyConfig, TyingConfig
from tiedjax.errors import UserError
from tiedjax.tying import Scheme, scheme_of

ARMS = {
    "untied": {"tying": {"scheme": "untied"}},
    "tied": {"tying": {"scheme": "tied"}},
    "tied-x5": {"tying": {"scheme": "tied", "input_grad_scale": 5.0}},
}
STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 400]


class FakeRun:
    """What `tiedjax.load_run` gives, made up: tables that leave their start for a learned structure."""

    def __init__(
        self, arm: str, seed: int, mix: float | None, V: int, D: int, steps: list[int], tokenizer: Path | None
    ):
        self.name, self.path, self.snapshot_steps, self.tokenizer_path = f"{arm}-{seed}", Path(arm), steps, tokenizer
        tying = TyingConfig(
            scheme="untied" if mix is None else "tied", input_grad_scale=5.0 if arm.endswith("5") else 1.0
        )
        self.config = replace(RunConfig(), tying=tying, data=DataConfig(source="tokens:nowhere/*.npy"))
        self._mix, self._D = mix, D
        shared = np.random.default_rng(7)  # what the data teach either role, the same for every run
        self._lesson = {"input": shared.normal(size=(V, D)), "output": shared.normal(size=(V, D))}
        rng = np.random.default_rng([seed, *arm.encode()])
        self._start = {role: rng.normal(size=(V, D)) for role in ("input", "output")}
        self._noise = {role: rng.normal(size=(V, D)) for role in ("input", "output")}
        counts = (200_000 / (np.arange(V) + 2.7) ** 1.1).astype(np.int64)
        counts[-V // 10 :] = 0  # padding
        self.token_counts = np.stack([counts, counts * (1 + np.arange(V) % 3)])
        self.metrics = self._metrics(np.random.default_rng([seed, 3, *arm.encode()]), steps)

    def scheme(self, step: int) -> Scheme:
        return scheme_of(self.config.tying)

    def tables(self, step: int | None = None) -> SimpleNamespace:
        step = self.snapshot_steps[-1] if step is None else step
        E, U = self._table("input", step), self._table("output", step)
        if self._mix is None:
            return SimpleNamespace(input=E, output=U, tied=False)
        lesson = self._mix * self._lesson["output"] + (1 - self._mix) * self._lesson["input"]
        shared = self._grown(self._start["input"], lesson + 0.6 * self._noise["input"], step, 0.02)
        return SimpleNamespace(input=shared, output=shared, tied=True)

    def account(self, step: int | None = None) -> SimpleNamespace:
        """Three quarters of what the table has besides its start are the output role's."""
        start, table = self.tables(0).input, self.tables(step).input
        parts = {"initial": start, "input": (table - start) / 4, "output": 3 * (table - start) / 4}
        return SimpleNamespace(rows=np.arange(len(table)), log_kept=0.0, regularisers={}, **parts)

    def params(self, step: int | None = None) -> None:
        raise UserError(f"{self.path}: holds no checkpoint")

    def _table(self, role: str, step: int) -> np.ndarray:
        return self._grown(
            self._start[role], self._lesson[role] + 0.6 * self._noise[role], step, 0.02 if role == "output" else 0.004
        )

    def _grown(self, start: np.ndarray, goal: np.ndarray, step: int, rate: float) -> np.ndarray:
        weight = 1 - np.exp(-rate * step)
        length = 1 + 0.6 * np.log10(self.token_counts[1] + 1)[:, None] * weight
        return (length * ((1 - weight) * start + weight * goal) / np.sqrt(self._D)).astype(np.float32)

    def _metrics(self, rng: np.random.Generator, snapshots: list[int]) -> dict[str, np.ndarray]:
        step = np.arange(1, snapshots[-1] + 1)
        input_norm = 0.05 + 0.25 * (1 - np.exp(-step / 120)) * np.exp(rng.normal(0, 0.08, len(step)))
        output_norm = (0.3 + 1.2 * np.exp(-step / 60)) * np.exp(rng.normal(0, 0.06, len(step)))
        snap = np.isin(step, snapshots)[:, None]
        fall = np.linspace(0.3, 1.7, 10) / 10
        nothing = np.full(len(step), np.nan)
        return {
            "step": step,
            "tokens": step * 2048,
            "loss": 4 + 4.3 * np.exp(-step / 80),
            "eval_loss": np.where(step == step[-1], 4.1 + 0.02 * rng.normal(), nothing),
            "learning_rate": 0.01 / (1 + step / 50),
            "input_grad_norm": input_norm,
            "output_grad_norm": output_norm,
            "output_grad_share": output_norm / (input_norm + output_norm),
            "role_grad_cosine": 0.03 * rng.normal(size=len(step)),
            "tokens_per_second": np.full(len(step), 9_500.0),
            "input_grad_norm_deciles": np.where(snap, input_norm[:, None] * fall, np.nan),
            "output_grad_norm_deciles": np.where(snap, output_norm[:, None] * fall**0.5, np.nan),
        }


def fake_study(
    seeds: tuple[int, ...] = (0, 1, 2),
    mixes: tuple[float, float] = (0.8, 0.6),
    V: int = 256,
    D: int = 16,
    steps: list[int] = STEPS,
    tokenizer: Path | None = None,
) -> tuple[StudyConfig, dict[tuple[str, int], FakeRun]]:
    study = StudyConfig(arms=ARMS, seeds=seeds)
    mix = {"untied": None, "tied": mixes[0], "tied-x5": mixes[1]}
    return study, {(a, s): FakeRun(a, s, mix[a], V, D, steps, tokenizer) for a in ARMS for s in seeds}


@pytest.fixture(scope="module")
def found() -> dict:
    study, runs = fake_study()
    return summarize(study, runs, environment={"device": "made up", "date": "2026-01-01"})


def test_it_is_json_without_nan_and_reads_back_equal(found, tmp_path):
    write_json(tmp_path / "results.json", found)
    json.dumps(found, allow_nan=False)
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_every_key_of_the_results_is_documented(found):
    documented = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
    assert not [key for key in found if f"`{key}`" not in documented]


def test_every_seed_role_and_fit_is_compared_once(found):
    keys = [(c["arm"], c["seed"], c["subject_role"], c["reference_role"], c["fit"]) for c in found["comparisons"]]
    # seeds x (two arms to two tables, untied to itself) x fits
    assert len(keys) == len(set(keys)) == 3 * (2 * 2 + 1) * len(FITS)
    for c in found["comparisons"]:
        assert c["reference_seed"] == c["seed"]
        assert c["corrected"] == pytest.approx((c["score"] - c["floor"]) / (1 - c["floor"]))


def test_comparisons_are_of_the_right_tables(found):
    _, runs = fake_study()
    twin, subject = runs["untied", 1].tables(), runs["tied-x5", 1].tables()
    seen = runs["untied", 1].token_counts.sum(axis=0) > 0
    assert 0 < seen.sum() < len(seen)
    for role in ("input", "output"):
        whole = align(getattr(twin, role), subject.input, kept_V=seen, held_out=True)
        wanted, outside = whole.scores["linear"], whole.held_out["linear"]
        record = {"arm": "tied-x5", "seed": 1, "reference_role": role, "fit": "linear"}
        (c,) = [c for c in found["comparisons"] if record.items() <= c.items()]
        assert (c["score"], c["floor"], c["rows"]) == pytest.approx((wanted.score, wanted.floor, seen.sum()))
        assert [part["rows"] for part in c["strata"].values()] == [77, 77, 76]
        assert c["held_out"] == pytest.approx(outside.score)


def test_the_headline_is_the_paired_difference_of_scores_with_frequency_controlled(found):
    def controlled(role):
        wanted = {"arm": "tied", "reference_role": role, "fit": "orthogonal"}
        return np.array([c["beyond_frequency"] for c in found["comparisons"] if wanted.items() <= c.items()])

    differences = controlled("output") - controlled("input")
    low, high = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    margin = found["headline"]["margin"]
    assert (margin["mean"], margin["low"], margin["high"]) == pytest.approx((differences.mean(), low, high))
    statement = found["statements"]["tied_nearer_output"]
    assert statement["verdict"] == "holds"
    assert statement["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    at_level = stats.t.interval(1 - statement["level"], 2, loc=differences.mean(), scale=stats.sem(differences))
    assert statement["margin"] == margin["mean"]
    assert statement["interval"] == pytest.approx(at_level)
    assert found["arms"]["tied"]["margin"]["shared"]["orthogonal"] == margin


def test_every_final_comparison_says_how_its_rows_are_distributed(found):
    for record in found["comparisons"]:
        counts = np.array(record["histogram"])
        assert counts.sum() == record["rows"]
        middles = (np.arange(len(counts)) + 0.5) * 2 / len(counts) - 1
        assert counts @ middles / counts.sum() == pytest.approx(record["score"], abs=0.02)


def test_what_an_intervention_does_is_paired_by_seed(found):
    change = found["changes"]["tied-x5"]["vs_output"]["orthogonal"]
    cells = [found["arms"][arm]["alignment"]["shared"]["vs_output"]["orthogonal"] for arm in ("tied-x5", "tied")]
    assert change["mean"] == pytest.approx(cells[0]["beyond_frequency"]["mean"] - cells[1]["beyond_frequency"]["mean"])
    statement = found["statements"]["tied-x5_lowers_vs_output"]
    assert statement["verdict"] == "holds"
    assert statement["margin"] == -change["mean"] > 0
    assert statement["interval"][0] + statement["interval"][1] == pytest.approx(-2 * change["mean"])
    assert found["statements"]["tied-x5_raises_vs_input"]["verdict"] == "holds"


def test_losses_are_compared_with_the_baseline_by_seed(found):
    loss = {(r["arm"], r["seed"]): r["eval_loss"] for r in found["runs"]}
    for arm in ARMS:
        cost = found["arms"][arm]["eval_loss_against_baseline"]
        assert cost["mean"] == pytest.approx(np.mean([loss[arm, s] - loss["tied", s] for s in range(3)]))
        assert found["arms"][arm]["eval_loss"]["mean"] == pytest.approx(np.mean([loss[arm, s] for s in range(3)]))
    assert found["statements"]["tied-x5_costs_loss"]["claim"] == (
        "tied-x5 has a higher held-out loss than tied (nats per token)"
    )
    assert "tied_costs_loss" not in found["statements"]


@pytest.mark.parametrize(
    ("mixes", "start", "verdict"),
    [
        ((0.8, 0.6), "Yes: with", "holds"),
        ((0.2, 0.6), "No, the opposite: with", "the opposite"),
        ((0.5, 0.5), "Undecided: with", "undecided"),
    ],
)
def test_the_answer_says_what_holds(mixes, start, verdict):
    study, runs = fake_study(mixes=mixes, steps=[0, 400])
    results = summarize(study, runs)
    assert results["findings"][0].startswith(start)
    assert results["statements"]["tied_nearer_output"]["verdict"] == verdict


def test_one_seed_claims_nothing():
    study, runs = fake_study(seeds=(3,), steps=[0, 400])
    results = summarize(study, runs)
    assert results["headline"]["margin"]["low"] is None
    assert results["statements"]["tied_nearer_output"] | {"margin": 0, "claim": ""} == {
        "claim": "",
        "verdict": "undecided",
        "margin": 0,
        "interval": None,
        "p": None,
        "level": None,
        "near_edge": False,
        "n": 1,
    }
    assert results["findings"][0].startswith("One seed, so only a hint")
    assert any("One seed" in note for note in results["notes"])


def test_gradients_are_given_per_step_and_per_window(found):
    flow = found["gradients"][0]
    assert len(flow["steps"]) == len(flow["output_share"]) == 400
    assert [d["step"] for d in flow["deciles"]] == STEPS[1:]
    per_seed = [g["windows"][1]["output_share"] for g in found["gradients"] if g["arm"] == "tied"]
    window = found["arms"]["tied"]["output_share_windows"][1]
    assert (window["first"], window["last"]) == (11, 50)
    assert window["output_share"]["mean"] == pytest.approx(np.mean(per_seed))
    assert found["headline"]["early_output_share"]["mean"] > 0.8


def test_alignment_is_followed_over_the_snapshots_from_chance_on(found):
    wanted = {"arm": "tied", "seed": 0, "reference_role": "output"}
    (curve,) = [c for c in found["alignment_over_steps"] if wanted.items() <= c.items()]
    assert curve["steps"] == STEPS
    assert curve["corrected"][0] == pytest.approx(0, abs=0.1)
    assert curve["corrected"][-1] > 0.4


def test_evolution_norms_and_examples_cover_every_distinct_table(found):
    for section in ("evolution", "norms"):
        assert {(r["arm"], r["role"]) for r in found[section]} == {
            ("untied", "input"), ("untied", "output"), ("tied", "shared"), ("tied-x5", "shared")
        }  # fmt: skip
        assert len(found[section]) == 3 * 4
    moved = {r["role"]: r["to_start"][6] for r in found["evolution"] if r["arm"] == "untied"}
    assert moved["output"] < moved["input"]
    first = found["examples"]["tokens"][0]
    assert first["token"] == f"[{fake_study()[1]['untied', 0].token_counts[1].argmax()}]" == "[2]"
    assert set(first["arms"]["untied"]) == {"input", "output"}


def test_runs_say_their_size_loss_and_time(found):
    (run,) = [r for r in found["runs"] if r["name"] == "tied-2"]
    assert (run["steps"], run["tokens"]) == (400, 400 * 2048)
    assert run["eval_loss"] == pytest.approx(4.1, abs=0.1)
    assert run["training_seconds"] == pytest.approx(400 * 2048 / 9500)
    untied = next(r for r in found["runs"] if r["name"] == "untied-2")
    assert untied["parameters"] - run["parameters"] == 4096 * 128
    assert found["arms"]["tied-x5"]["differs_from_reference"] == {
        "tying.scheme": ["untied", "tied"],
        "tying.input_grad_scale": [1.0, 5.0],
    }


def test_an_arm_with_another_body_is_no_twin_in_that():
    study, runs = fake_study(seeds=(0, 1), steps=[0, 400])
    assert not any("in the body" in note for note in summarize(study, runs)["notes"])
    for seed in study.seeds:
        config = runs["tied-x5", seed].config
        runs["tied-x5", seed].config = replace(config, model=replace(config.model, d_ff=999))
    note = "Not twins of untied in the body, but in the order of the data alone: tied-x5."
    assert note in summarize(study, runs)["notes"]


def test_missing_runs_are_named_and_the_rest_is_used():
    study, runs = fake_study(steps=[0, 400])
    del runs["tied", 1], runs["tied-x5", 0]
    results = summarize(study, runs)
    assert any("tied-1, tied-x5-0" in note for note in results["notes"])
    assert results["headline"]["margin"]["n"] == 2
    assert results["changes"]["tied-x5"]["vs_output"]["orthogonal"]["n"] == 1
    assert results["examples"]["seed"] == 0
    del runs["untied", 0]
    assert summarize(study, runs)["examples"]["seed"] == 1
    for seed in study.seeds:
        runs.pop(("untied", seed), None)
    with pytest.raises(UserError, match="no run of the reference arm 'untied'"):
        summarize(study, runs)


@pytest.mark.parametrize(("steps", "place"), [([0, 8, 100], 400), ([0, 8, 700], 700)])
def test_of_runs_of_other_lengths_the_last_tables_are_compared_beside_common_snapshots(steps, place):
    study, runs = fake_study(seeds=(0, 1), steps=[0, 8, 400])
    runs["tied", 0].snapshot_steps = steps
    results = summarize(study, runs)
    last = {(c["arm"], c["seed"]): c["step"] for c in results["comparisons"]}
    assert last["tied", 0] == place
    assert last["tied", 1] == 400
    (found,) = (
        c["corrected"]
        for c in results["comparisons"]
        if (c["arm"], c["seed"], c["reference_role"], c["fit"]) == ("tied", 0, "output", "orthogonal")
    )
    first, second = (runs[arm, 0].tables().output for arm in ("untied", "tied"))
    seen = runs["untied", 0].token_counts.sum(0) > 0
    assert found == pytest.approx(align(first, second, kept_V=seen).scores["orthogonal"].corrected)
    (curve,) = (
        c
        for c in results["alignment_over_steps"]
        if (c["arm"], c["seed"], c["reference_role"]) == ("tied", 0, "output")
    )
    assert curve["steps"] == [0, 8, place]
    assert "Of another length than untied: tied. Last tables are compared with last tables." in results["notes"]


def test_study_without_the_baseline_says_not_measured():
    study, runs = fake_study(seeds=(0, 1), steps=[0, 400])
    results = summarize(study, {key: run for key, run in runs.items() if key[0] == "untied"})
    assert results["answer"].startswith("Not measured")
    assert results["changes"] == {}
    assert "tied_nearer_output" not in results["statements"]


def test_every_arm_is_compared_with_reference_runs_of_other_seeds(found):
    _, runs = fake_study()
    seen = runs["untied", 0].token_counts.sum(0) > 0
    last = {key: run.tables() for key, run in runs.items()}
    tenths = frequency_parts(runs["untied", 0].token_counts, 10)
    corrected = lambda x, y: align(x, y, kept_V=seen).scores["orthogonal"].corrected
    controlled = lambda x, y: align(x, y, kept_V=seen, within=tenths).scores["orthogonal"].corrected
    own = [corrected(last["untied", j].input, last["untied", i].input) for i, j in [(1, 0), (2, 0), (2, 1)]]
    ordered = [(i, j) for i in range(3) for j in range(3) if i != j]
    other = [corrected(last["untied", j].output, last["tied-x5", i].input) for i, j in ordered]
    between = found["between_seeds"]
    cells = [between["untied"]["input"]["vs_input"], between["tied-x5"]["shared"]["vs_output"]]
    for cell, expected in zip(cells, [own, other], strict=True):
        assert cell["orthogonal"]["corrected"]["mean"] == pytest.approx(np.mean(expected))
        assert cell["orthogonal"]["corrected"]["low"] is None, "pairs share runs: no interval can be given"
    by_seed = [controlled(last["untied", j].output, last["tied-x5", i].input) for i, j in ordered]
    assert list(cells[1]["orthogonal"]["by_seed"].values()) == pytest.approx(by_seed)
    assert list(between["untied"]["input"]) == ["vs_input"]


def test_the_reproducible_share_is_of_the_last_tables_of_the_rows_that_all_saw(found):
    study, runs = fake_study()
    last = {key: run.tables() for key, run in runs.items()}
    tables = {
        (arm, seed): {"shared": t.input} if t.tied else {"input": t.input, "output": t.output}
        for (arm, seed), t in last.items()
    }
    counts = {key: run.token_counts for key, run in runs.items()}
    wanted = reproducible_shares(tables, counts, study.reference)["tied-x5"]["shared"]
    cell = found["reproducible_share"]["tied-x5"]["shared"]
    seen = runs["untied", 0].token_counts.sum(0) > 0
    assert (cell["rows"], cell["parts"], cell["reason"]) == (seen.sum(), 4, None)
    assert cell["margin"]["low"] < cell["margin"]["mean"] < cell["margin"]["high"]
    for name in ("vs_output", "vs_input", "margin"):
        assert cell[name]["mean"] == getattr(wanted, name).mean


def test_an_arm_with_the_reference_scheme_is_noted():
    study, runs = fake_study(seeds=(0, 1))
    assert not any("inherited" in note for note in summarize(study, runs)["notes"])
    for seed in (0, 1):
        runs["tied-x5", seed].config = runs["untied", seed].config
    assert any("tied-x5: begins with the reference's own tables" in note for note in summarize(study, runs)["notes"])


def test_one_seed_has_nothing_to_compare_between_seeds():
    alone = summarize(*fake_study(seeds=(0,)))
    assert alone["between_seeds"] == {}


def test_a_slow_instrument_is_part_of_a_study_that_names_it(found):
    study, runs = fake_study(seeds=(0, 1))
    of_regret = ["regret 0", "regret 1"]
    assert "regret" not in found
    assert not [name for name in parts_of(study) if "regret" in name]
    slow = replace(study, slow_instruments=("regret",))
    assert [name for name in parts_of(slow) if "regret" in name] == of_regret
    assert parts_of(slow).keys() - parts_of(study).keys() == set(of_regret)
    assert [seed_of(name) for name in of_regret] == [0, 1]
    of_seeds = [name for name in parts_of(study, ["regret"]) if seed_of(name) is not None]
    assert of_seeds == ["walk 0", "walk 1", *of_regret]
    assert not [name for name in parts_of(slow, ["norms"]) if "regret" in name]
    assert collect("regret 0", StudyRuns(study, runs)) == collect("regret 0", StudyRuns(slow, runs))
    records = summarize(slow, runs)["regret"]["runs"]
    assert [(record["arm"], record["seed"]) for record in records] == [(a, s) for s in (0, 1) for a in ARMS]
    with pytest.raises(UserError) as error:
        parts_of(replace(study, slow_instruments=("regrets",)))
    assert str(error.value) == "slow_instruments: 'regrets' is none of regret; did you mean 'regret'?"


def test_a_slow_instrument_is_missed_only_where_results_hold_it_in_another_version(found):
    assert not [line for line in left_out(found) if "regret" in line]
    other = found | {"regret": {}, "versions": found["versions"] | {"regret": 0}}
    (line,) = [line for line in left_out(other) if "regret" in line]
    assert line.startswith("Left out: regret. ")
