"""A small study's results, made by hand: every number names what it is of, so that whatever is swapped shows.

The digits after the point of a value are the arm (1 untied, 2 tied, 3 tied-x5), what it is compared with (1 input,
2 output, or the place in a list) and the role of its table (1 input, 2 output, 3 shared); the digit before says which
quantity. Seeds 0, 1, 2 differ by -0.002, 0 and +0.002 times the middle digit. With frequency controlled, tied-x5 is
0.25 less near to the output table.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from typing import Any

from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval, paired
from tiedjax.analysis.instruments.account.account import RunAccount
from tiedjax.analysis.instruments.calibration.section import RunCalibration
from tiedjax.analysis.instruments.contribution.contribution import RunContribution
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Cooccurrence
from tiedjax.analysis.instruments.diversity.diversity import RunDiversity
from tiedjax.analysis.instruments.evolution.evolution import Evolution
from tiedjax.analysis.instruments.graph_distance.graph_distance import GraphDistance
from tiedjax.analysis.instruments.hurdles.hurdles import Hurdles
from tiedjax.analysis.instruments.hurdles.section import over_seeds
from tiedjax.analysis.instruments.lens.lens import RunLens
from tiedjax.analysis.instruments.neighbours.overlap import NeighbourOverlap
from tiedjax.analysis.instruments.norms.norms import Norms
from tiedjax.analysis.instruments.picture.section import DrawnTable
from tiedjax.analysis.instruments.regret.regret import RunRegret
from tiedjax.analysis.instruments.regret.section import together
from tiedjax.analysis.instruments.shape.space_similarity import SpaceSimilarity
from tiedjax.analysis.instruments.shape.table_shape import TableShape
from tiedjax.analysis.study import claims, verdicts
from tiedjax.analysis.study.sections import versions
from tiedjax.config import StudyConfig

ARMS = ("untied", "tied", "tied-x5")
SEEDS = (0, 1, 2)
OFFSETS = (-0.002, 0.0, 0.002)
ROLES = {"untied": ("input", "output"), "tied": ("shared",), "tied-x5": ("shared",)}
THIRDS = ("rare", "middle", "frequent")
STUDY = StudyConfig(
    arms={arm: {"tying": {"scheme": "untied" if arm == "untied" else "tied"}} for arm in ARMS}, seeds=SEEDS
)
TABLES = [(arm, seed, role) for arm in ARMS for seed in SEEDS for role in ROLES[arm]]
PAIRS = [("untied", "output", "input")] + [
    (arm, "shared", role) for arm in ("tied", "tied-x5") for role in ("input", "output")
]


def value(quantity: int, arm: str, role: str, other: str | int = 0, seed: int | None = None) -> float:
    """As above; without a seed, of the middle one."""
    last = {"input": 1, "output": 2}[other] if isinstance(other, str) else other
    digits = 100 * (1 + ARMS.index(arm)) + 10 * last + 1 + ("input", "output", "shared").index(role)
    return round(quantity + digits / 1000 + (0 if seed is None else max(last, 1) * OFFSETS[seed]), 4)


def span(*values: float) -> dict[str, Any]:
    """The interval over seeds."""
    return dict(to_plain(interval(values)))


def of_seeds(quantity: int, arm: str, role: str, other: str | int = 0) -> dict[str, Any]:
    """The interval of `value` over all seeds."""
    return span(*(value(quantity, arm, role, other, seed) for seed in SEEDS))


def score(quantity: int, arm: str, role: str, other: str | int, seed: int) -> dict[str, float]:
    """A score with its floor and what is above it."""
    names = ("score", "floor", "corrected")
    return {name: value(quantity + i, arm, role, other, seed) for i, name in enumerate(names)}


def complete(kind: Any, plain: Any) -> Any:
    """`plain` with what the type `kind` has beside it, which no sentence reads: zeros, and nothing in lists."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if plain is None else complete(next(of for of in inner if of is not type(None)), plain)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        made = {f.name: complete(hints[f.name], (plain or {}).get(f.name)) for f in dataclasses.fields(kind)}
        return {**(plain or {}), **made}
    if origin is list and plain is not None:
        return [complete(inner[0], each) for each in plain]
    if origin is tuple:
        return [complete(of, (plain or [None] * len(inner))[i]) for i, of in enumerate(inner)]
    if origin is dict and plain is not None:
        return {key: complete(inner[1], each) for key, each in plain.items()}
    blank: dict[Any, Any] = {int: 0, float: 0.0, str: "", bool: False, list: [], dict: {}}
    return blank[origin or kind] if plain is None else plain


def small_study() -> dict[str, Any]:
    """results.json of the study, as plain JSON."""
    results: dict[str, Any] = {
        "kind": "study",
        "schema": 3,
        "versions": versions(),
        "name": "small",
        "comparisons": [_comparison(*pair, seed, fit) for pair in PAIRS for seed in SEEDS for fit in verdict_fits()],
        "alignment_over_steps": [_curve(*pair, seed) for pair in PAIRS for seed in SEEDS],
        "gradients": [_gradients(arm, seed) for arm in ARMS for seed in SEEDS],
        "account": [_account(arm, seed) for arm in ARMS[1:] for seed in SEEDS],
        "evolution": [_evolution(*table) for table in TABLES],
        "knn": {"k": 7, "pairs": [_neighbours(*pair, seed) for pair in PAIRS for seed in SEEDS]},
        "spectral": {"k": 9, "eigenpairs": 11, "pairs": [_distance(*pair, seed) for pair in PAIRS for seed in SEEDS]},
        "norms": [_norms(*table) for table in TABLES],
        "spectrum": {
            "tables": [_spectrum(*table) for table in TABLES],
            "pairs": [_similarity(*pair, seed) for pair in PAIRS for seed in SEEDS],
        },
        "calibration": _calibration(),
        "cooccurrence": [_cooccurrence(*table) for table in TABLES],
        "map": [_map(arm, role) for arm in ARMS[:2] for role in ROLES[arm]],
        "hurdles": {"runs": [_hurdles(arm, seed) for arm in ARMS for seed in SEEDS]},
        "lens": _lens(),
        "blocks": _blocks(),
        "diversity": _diversity(),
        "regret": _regret(),
        "samples": _samples(),
        "examples": _examples(),
        "runs": [_run(arm, seed) for arm in ARMS for seed in SEEDS],
        "study": {
            "reference": "untied",
            "baseline": "tied",
            "seeds": list(SEEDS),
            "arms": dict(STUDY.arms),
            "config": {
                "model": {"layers": 2, "d_model": 64, "vocab_size": 2048},
                "train": {"steps": 400, "seed": 0},
                "data": {"second_source": None},
            },
        },
        "environment": {"device": "none", "packages": {"jax": "1.2.3"}, "study_seconds": 61.0},
        "notes": ["A note."],
    }
    of_arm = lambda arm: {"hurdles": to_plain(over_seeds(results["hurdles"]["runs"], arm))}
    results["arms"] = {arm: _arm(arm, results["comparisons"]) | of_arm(arm) for arm in ARMS}
    results["between_seeds"] = to_plain(verdicts.between_seeds(list(_between_seeds())))
    results["headline"] = to_plain(verdicts.headline(STUDY, results["arms"], results["comparisons"]))
    results["changes"] = to_plain(verdicts.changes(STUDY, results["arms"], results["comparisons"]))
    results["reproducible_share"] = {
        arm: {"shared": {f"vs_{role}": of_seeds(0, arm, "shared", role) for role in ("input", "output")}
              | {"margin": span(*(value(0, arm, "shared", 1, s) - (0.2 if arm == "tied" else 0.9) for s in SEEDS))}}
        for arm in ARMS[1:]
    }  # fmt: skip
    made = verdicts.statements(STUDY, _with_intervals(results["arms"]), results["comparisons"])
    made |= verdicts.share_statements(STUDY, results["reproducible_share"]) | claims.claims(results)
    results["statements"] = to_plain(verdicts.decided(made))
    return results


def verdict_fits() -> tuple[str, ...]:
    return ("identity", "orthogonal", "linear", "ridge")


def _with_intervals(arms: dict[str, Any]) -> dict[str, Any]:
    """The arms with the spans that statements are made of as Intervals, as they are before they become JSON."""
    from tiedjax.analysis.basis.statistics import Interval

    names = ("early_output_share", "eval_loss_against_baseline", "eval_loss_against_reference")
    return {arm: summary | {name: Interval(**summary[name]) for name in names} for arm, summary in arms.items()}


def _comparison(arm: str, role: str, other: str, seed: int, fit: str) -> dict[str, Any]:
    at = verdict_fits().index(fit)
    names = ("score", "floor", "corrected", "beyond_frequency", "held_out", "paper")
    record: dict[str, Any] = {name: value(10 * i + at, arm, role, other, seed) for i, name in enumerate(names)}
    record |= {"arm": arm, "seed": seed, "subject_role": role, "reference_role": other, "fit": fit}
    if (arm, other) == ("tied-x5", "output"):
        record["beyond_frequency"] -= 0.25  # so that the two changes differ, and one of them is a fall
    strata = {third: {"corrected": value(60 + i, arm, role, other, seed)} for i, third in enumerate(THIRDS)}
    record["strata"] = complete(dict[str, Score], strata)
    record["histogram"] = [1, 2 + ARMS.index(arm), 3 if other == "input" else 5, 4]
    return record | {"floor_closed_form": 0.5, "reference_seed": seed, "step": 400}


def _between_seeds() -> Any:
    for arm, role, other in [("untied", "input", "input"), ("untied", "output", "output"), *PAIRS[1:]]:
        for seed, (first, second) in zip(SEEDS, itertools.combinations(SEEDS, 2), strict=True):
            record = _comparison(arm, role, other, seed, "orthogonal")
            yield record | {"seed": f"{second} to {first}", "beyond_frequency": value(5, arm, role, other)}


def _curve(arm: str, role: str, other: str, seed: int) -> dict[str, Any]:
    curve: dict[str, Any] = {"arm": arm, "seed": seed, "subject_role": role, "reference_role": other, "steps": [0, 400]}
    for i, name in enumerate(("score", "floor", "corrected")):
        curve[name] = [value(i, arm, role, other, seed), value(i + 3, arm, role, other, seed)]
    return curve


def _gradients(arm: str, seed: int) -> dict[str, Any]:
    at = ARMS.index(arm)
    window = lambda first, last, i: {
        "first": first, "last": last, "logged_steps": 3, "cosine": 0.1,
        "output_share": value(i, arm, "output", 1, seed),
        "paper_output_share": value(i, arm, "output", 2, seed),
        "activation_ratio": value(i, arm, "output", 3, seed),
    }  # fmt: skip
    return {
        "arm": arm,
        "seed": seed,
        "steps": [1, 10, 400],
        "input_norm": [1.1 + at, 1.2 + at, 1.3 + at],
        "output_norm": [2.1 + at, 2.2 + at, 2.3 + at],
        "activation_norm": [3.1 + at, 3.2 + at, 3.3 + at],
        "output_share": [0.61 + at / 100, 0.62 + at / 100, 0.63 + at / 100],
        "cosine": [0.1, 0.2, 0.3],
        "windows": [window(1, 10, 0), window(11, 50, 1)],
        "early": window(1, 50, 2),
        "overall": window(1, 400, 3),
        "deciles": [
            {
                "step": step,
                "input_norm": [step + 0.01 * d for d in range(1, 11)],
                "output_norm": [step + 0.02 * d for d in range(1, 11)],
                "output_share": [at / 10 + step / 1000 + 0.001 * d for d in range(1, 11)],
            }
            for step in (1, 400)
        ],
        "makeup": {"steps": [1, 400]}
        | {
            part: [value(i, arm, "output", place, seed) for place in (4, 5)]
            for i, part in enumerate(("push", "common", "rest", "cross"))
        },
        "noise": {"logged_steps": 3} | {role: value(0, arm, role, 6, seed) for role in ("input", "output")},
    }


def _account(arm: str, seed: int) -> dict[str, Any]:
    def shares(i: int) -> dict[str, float]:
        parts = ("initial", "input", "output")
        return {part: value(j, arm, "shared", i, seed) for j, part in enumerate(parts)}

    changes = ("in_in", "in_out", "out_in", "out_out", "decay", "body", "output_update_share", "cosine")
    changes += ("input_step_share", "clipped")
    spans = [(0, 20, 1), (20, 200, 2), (0, 200, 3)]
    names = ("input_to_input", "input_to_output", "output_to_input", "output_to_output")
    return complete(RunAccount, {
        "arm": arm, "seed": seed, "step": 200, "shares": shares(0),
        "strata": {name: shares(i) for i, name in enumerate(THIRDS, 1)},
        "early": {"first": 0, "last": 20, "rate": value(0, arm, "input", 4, seed)}
        | {role: value(i, arm, role, 5, seed) for i, role in enumerate(("input", "output"), 1)},
        "changes": [
            {"first": first, "last": last}
            | {
                name: (-1) ** j * value(j, arm, "shared", i, seed) / (1000 if j < 6 else 10)
                for j, name in enumerate(changes)
            }
            for first, last, i in spans
        ],
        "curve": {"steps": [1, 200]}
        | {name: [value(j, arm, "shared", i, seed) / 1000 for i in (1, 2)] for j, name in enumerate(changes[:4])},
        "nearness": {name: {"corrected": value(i, arm, "shared", 6, seed)} for i, name in enumerate(names)},
    })  # fmt: skip


def _evolution(arm: str, seed: int, role: str) -> dict[str, Any]:
    curves = lambda i: {
        "to_start": [1.0, value(i, arm, role, 1, seed)],
        "to_previous": [1.0, value(i, arm, role, 2, seed)],
        "floor": [0.1, value(i, arm, role, 3, seed)],
    }
    record = {"arm": arm, "seed": seed, "role": role, "steps": [0, 400]} | curves(-1)
    record["rotation_free"] = curves(-2)
    return dict(complete(Evolution, record | {"strata": {third: curves(-3 - i) for i, third in enumerate(THIRDS)}}))


def _neighbours(arm: str, role: str, other: str, seed: int) -> dict[str, Any]:
    record: dict[str, Any] = {"arm": arm, "seed": seed, "subject_role": role}
    record |= {
        "reference_role": other,
        "overlap": score(0, arm, role, other, seed),
        "strata": {third: {"corrected": value(3 + i, arm, role, other, seed)} for i, third in enumerate(THIRDS)},
        "hubness": [
            {"skewness": value(6, arm, role, 0, seed), "orphans": value(0, arm, role, 5, seed) / 10},
            {"skewness": value(7, "untied", other, 0, seed), "orphans": value(0, "untied", other, 6, seed) / 10},
        ],
        "paper": {"score": value(9, arm, role, other, seed)},
    }
    return dict(complete(NeighbourOverlap, record))


def _distance(arm: str, role: str, other: str, seed: int) -> dict[str, Any]:
    distance = {name: value(i, arm, role, other, seed) for i, name in enumerate(("score", "floor"))}
    record = {"distance": distance, "relative": value(2, arm, role, other, seed)}
    record |= {"arm": arm, "seed": seed, "subject_role": role, "reference_role": other}
    return dict(complete(GraphDistance, record))


def _norms(arm: str, seed: int, role: str) -> dict[str, Any]:
    record: dict[str, Any] = {"arm": arm, "seed": seed, "role": role}
    sign = -1 if arm == "untied" else 1
    for i, name in enumerate(("norm", "distance_to_mean", "cosine_to_mean")):
        quartiles = {"median": 2.0 + i, "quantile_25": 1.0 + i, "quantile_75": value(3 + i, arm, role)}
        record[name] = {
            "spearman": {"score": sign * value(0, arm, role, i, seed)},
            "bins": [{"low": 0.5, "high": 1.0} | quartiles, {"low": 0.0, "high": 0.0} | quartiles],
        }
    record["log_frequency"] = {"score": value(0, arm, role, 4, seed), "floor": value(0, arm, role, 5, seed)}
    return dict(complete(Norms, record))


def _spectrum(arm: str, seed: int, role: str) -> dict[str, Any]:
    def form(i: int) -> dict[str, Any]:
        names = ("effective_rank", "stable_rank", "first_energy", "isotropy", "mean_cosine")
        made: dict[str, Any] = {
            name: {"score": value(i + k, arm, role, 1, seed), "floor": value(i + k, arm, role, 2, seed)}
            for k, name in enumerate(names)
        }
        return made | {"singular_values": [3.0 + i, value(i, arm, role)], "isotropic_singular_values": [1.0, 0.9]}

    record = {"arm": arm, "seed": seed, "role": role, "raw": form(0), "centred": form(5)}
    return dict(complete(TableShape, record))


def _similarity(arm: str, role: str, other: str, seed: int) -> dict[str, Any]:
    subspaces = [{"dimensions": d, "cosine": score(3 + d, arm, role, other, seed)} for d in (1, 8)]
    record: dict[str, Any] = {"arm": arm, "seed": seed, "subject_role": role, "reference_role": other}
    record |= {
        "cka": score(0, arm, role, other, seed),
        "pairs": {"score": value(3, arm, role, other, seed)},
        "subspaces": subspaces,
    }
    return dict(complete(SpaceSimilarity, record))


def _calibration() -> dict[str, Any]:
    scored = ("log2_ratio", "group_error", "top_error", "overconfidence")

    def group(name: str, i: int, arm: str, seed: int) -> dict[str, Any]:
        about: dict[str, Any] = {"name": name, "log_count": 1.0 + i, "target_positions": 99, "predicted_positions": 99}
        for k, quantity in enumerate(scored):
            about[quantity] = {
                "score": value(k, arm, "shared", i, seed),
                "floor": value(k, arm, "input", i, seed),
                "floor_deviation": value(0, arm, "output", i, seed),
            }
        return about | {"share": value(4, arm, "shared", i), "target_probability": value(5, arm, "shared", i),
                        "entropy": value(6, arm, "shared", i)}  # fmt: skip

    def calibration(arm: str, seed: int, groups: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "groups": groups,
            "loss": {"mean": value(0, arm, "output", 3, seed)},
            "entropy": {"mean": value(1, arm, "output", 3, seed)},
            "accuracy": {"mean": value(2, arm, "output", 3, seed)},
            "top_error": {"score": value(7, arm, "output", 4, seed), "floor": value(8, arm, "output", 4, seed)},
        }

    def run(arm: str, seed: int) -> dict[str, Any]:
        strata = [group(third, i, arm, seed) for i, third in enumerate(THIRDS)]
        bins = [group(f"bin {i}", i, arm, seed) for i in range(2)]
        both = {"by_stratum": calibration(arm, seed, strata), "by_bin": calibration(arm, seed, bins)}
        return {"arm": arm, "seed": seed} | both

    runs = [complete(RunCalibration, run(arm, seed)) for arm in ARMS for seed in SEEDS]
    twins = [
        {"arm": arm, "stratum": third}
        | {
            name: span(*((1 if third == "rare" else -1) * value(k, arm, "shared", i, seed) for seed in SEEDS))
            for k, name in enumerate((*scored, "target_probability"))
        }
        for arm in ARMS[1:]
        for i, third in enumerate(THIRDS)
    ]
    return {"runs": runs, "twins": twins}


def _cooccurrence(arm: str, seed: int, role: str) -> dict[str, Any]:
    cell = lambda i: {
        "as_target": {"score": value(i, arm, role, 2, seed), "floor_deviation": 0.02},
        "as_context": {"score": value(i, arm, role, 1, seed), "floor_deviation": 0.01},
    }
    sign = -1 if role == "input" else 1
    record: dict[str, Any] = {"arm": arm, "seed": seed, "role": role, "rows": 1234} | cell(0)
    record |= {
        "difference": {"mean": sign * value(0, arm, role, 3, seed)},
        "text": {"counted": 5000, "available": 7000, "eligible": 1300, "least_count": 17},
        "strata": {third: cell(1 + i) for i, third in enumerate(THIRDS)},
    }
    return dict(complete(Cooccurrence, record))


def _map(arm: str, role: str) -> dict[str, Any]:
    near = [{"token": f"{arm} {role} near {i}", "cosine": 0.5} for i in range(2)]
    record: dict[str, Any] = {
        "arm": arm, "seed": 0, "role": role, "method": "pca",
        "explained": [value(0, arm, role, 1), 0.02],
        "trust": score(1, arm, role, 1, 1),
        "points": [[float(i), value(2, arm, role, i)] for i in range(5)],
        "classes": list(range(5)),
        "nearest": [{"token": " word", "neighbours": near}],
    }  # fmt: skip
    return dict(complete(DrawnTable, record))


def _lens() -> dict[str, Any]:
    names = ("input", "layer 1", "layer 2")

    def state(i: int, arm: str, seed: int) -> dict[str, Any]:
        quantities = [
            (lens, quantity) for lens in ("tuned", "logit", "published") for quantity in ("kl", "cross_entropy")
        ]
        made: dict[str, Any] = {"name": names[i], "fit": None}
        for k, (lens, quantity) in enumerate(quantities):
            made.setdefault(lens, {})[quantity] = {"mean": value(k, arm, "shared", i, seed)}
        if i < 2:
            made["fit"] = {
                "converged": i == 0,
                "iterations": 31 + i,
                "training_kl": value(0, arm, "shared", i, seed) - 0.25,
            }
        return made

    runs = [
        complete(RunLens, {
            "arm": arm, "seed": seed, "training_tokens": 9001, "held_out_tokens": 802, "criterion": "a small gradient",
            "states": [state(i, arm, seed) for i in range(3)],
            "baselines": {
                "uniform": {"cross_entropy": {"mean": 11.0}}, "unigram": {"cross_entropy": {"mean": 9.0}},
                "bigram_cross_entropy": {"mean": value(1, arm, "shared", 2, seed) - 0.75},
                "trigram_cross_entropy": {"mean": value(1, arm, "shared", 2, seed) - 0.95},
            },
        })
        for arm in ARMS for seed in SEEDS
    ]  # fmt: skip
    twins = [
        {
            "arm": arm, "state": i, "name": name, "early": i < 2,
            "tuned_kl": span(*(sign * (1 - i) * value(0, arm, "shared", 1, seed) for seed in SEEDS)),
            "tuned_cross_entropy": span(*(sign * (i - 1) * value(1, arm, "shared", 2, seed) for seed in SEEDS)),
            "beyond_last": span(*(sign * (2 * i - 1) * value(0, arm, "shared", 3, seed) for seed in SEEDS)),
        }
        for arm, sign in (("tied", 1), ("tied-x5", -1))
        for i, name in enumerate(names)
    ]  # fmt: skip
    return {"criterion": "a small gradient", "runs": runs, "twins": twins}


def _blocks() -> dict[str, Any]:
    parts = ("whole", "attention", "mlp")

    def block(i: int, arm: str, seed: int) -> dict[str, Any]:
        made: dict[str, Any] = {"block": i}
        for k, part in enumerate(parts):
            means = value(k, arm, "input", i, seed), value(3 + k, arm, "output", i, seed)
            made[part] = {"added": {"mean": means[0]}, "skip_cost": {"mean": means[1]}}
        return made

    runs = [
        complete(RunContribution, {
            "arm": arm, "seed": seed, "loss": {"mean": value(6, arm, "shared", 3, seed)},
            "blocks": [block(i, arm, seed) for i in (1, 2, 3)],
        })
        for arm in ARMS for seed in SEEDS
    ]  # fmt: skip
    twins = [
        {"arm": arm, "block": i, "early": i == 1}
        | {
            part: {
                "added": span(*(-sign * value(k, arm, "input", i, seed) for seed in SEEDS)),
                "skip_cost": span(*(sign * value(3 + k, arm, "output", i, seed) for seed in SEEDS)),
            }
            for k, part in enumerate(parts)
        }
        for arm, sign in (("tied", 1), ("tied-x5", -1))
        for i in (1, 2, 3)
    ]
    return {"runs": runs, "twins": twins}


def _diversity() -> dict[str, Any]:
    """Held-out text is as varied for all runs; one run of tied-x5 writes shorter texts."""
    variety = ("distinct_1", "distinct_2", "distinct_3", "entropy")
    costs = ("prediction_entropy", "cross_entropy")

    def run(arm: str, seed: int) -> dict[str, Any]:
        written: dict[str, Any] = {name: value(k, arm, "input", 1, seed) for k, name in enumerate(variety)}
        written["prediction_entropy"] = {"mean": value(4, arm, "input", 2, seed)}
        held_out: dict[str, Any] = {name: value(k, "untied", "shared", 7) for k, name in enumerate(variety)}
        held_out |= {name: {"mean": value(5 + k, arm, "output", 2, seed)} for k, name in enumerate(costs)}
        about = {"arm": arm, "seed": seed, "texts": 1061, "tokens": 31 if (arm, seed) == ("tied-x5", 2) else 47}
        return dict(complete(RunDiversity, about | {"written": written, "held_out": held_out}))

    def difference(k: int, arm: str, role: str, other: int) -> dict[str, Any]:
        sign = (-1) ** k * (1 if arm == "tied" else -1)
        return span(*(sign * value(k, arm, role, other, seed) for seed in SEEDS))

    twins = [
        {
            "arm": arm,
            "written": {name: difference(k, arm, "input", 3) for k, name in enumerate((*variety, costs[0]))},
            "held_out": {name: difference(5 + k, arm, "output", 3) for k, name in enumerate(costs)},
        }
        for arm in ARMS[1:]
    ]
    return {"runs": [run(arm, seed) for arm in ARMS for seed in SEEDS], "twins": twins}


def _regret() -> dict[str, Any]:
    """One run of tied-x5 has not converged."""
    names = ("own", "input", "output", "both")

    def saving(i: int, arm: str, seed: int) -> dict[str, Any]:
        strata = {third: {"mean": value(4 + i, arm, "input", 1 + k, seed)} for k, third in enumerate(THIRDS)}
        held_out = {"mean": value(i * (1 + ARMS.index(arm)), arm, "shared", i, seed)}
        made: dict[str, Any] = {"held_out": held_out, "strata": strata, "converged": True}
        return made | {"fitting": value(i, arm, "output", i, seed), "iterations": 31 + i}

    def run(arm: str, seed: int) -> dict[str, Any]:
        own, *regrets = (saving(i, arm, seed) for i in range(len(names)))
        done = (arm, seed) != ("tied-x5", 2)
        about = {"arm": arm, "seed": seed, "shared": arm != "untied", "own": own | {"converged": done}}
        about |= {"regrets": dict(zip(names[1:], regrets, strict=True)) if done else {}}
        about |= {"fitting_tokens": 9002, "held_out_tokens": 803, "hold": 1025}
        balances = {"trained_balance": value(0, arm, "input", 5, seed), "balance": -value(0, arm, "output", 5, seed)}
        return dict(complete(RunRegret, about | (balances if arm != "untied" else {})))

    return together("untied", [run(arm, seed) for arm in ARMS for seed in SEEDS])


def _hurdles(arm: str, seed: int) -> dict[str, Any]:
    """The bigram lies between tied, which is below it, and tied-x5."""
    model = value(6, arm, "output", 4, seed)
    losses: dict[str, Any] = {
        "model": {
            "nats": value(4, arm, "output", 4, seed),
            "bits": {"mean": model},
            "bits_per_byte": value(2, arm, "output", 4, seed),
            "model_less": None,
        }
    }
    for name, bits in {"uniform": 11.0, "unigram": 9.1, "bigram": 6.307, "trigram": 6.025}.items():
        bits += 0 if name == "uniform" else seed / 100
        losses[name] = {"bits": {"mean": bits}, "model_less": {"mean": model - bits}}
    about = {
        "arm": arm,
        "seed": seed,
        "held_out_windows": 13,
        "held_out_documents": None,
        "held_out_tokens": 832,
        "held_out_bytes": 2901,
    }
    counted = {"training_tokens": 8001 + seed, "beta": 32.0, "gamma": 8.0 if seed else 4.0}
    return dict(complete(Hurdles, about | counted | {"losses": losses}))


def _examples() -> dict[str, Any]:
    arms = {
        arm: {role: {"norm": value(4, arm, role), "cosine_to_start": value(0, arm, role)} for role in ROLES[arm]}
        for arm in ARMS
    }
    return {"seed": 0, "tokens": [{"id": 5, "token": " the", "count": 4321, "arms": arms}]}


def _samples() -> dict[str, Any]:
    texts = [
        {"arm": arm, "seed": seed, "begins_document": True, "text": f" the {arm}\n\tof <b>{seed}</b>"}
        for arm, seed in (("untied", 0), ("tied", 1))
    ]
    unwritten = {"arm": "tied-x5", "seed": 0, "not_measured": "tied-x5-0: holds no checkpoint"}
    return {"tokens": 13, "temperature": 0.5, "draw_seed": 0, "arms": [*texts, unwritten]}


def _run(arm: str, seed: int) -> dict[str, Any]:
    about = {"arm": arm, "seed": seed, "name": f"{arm}-{seed}", "steps": 400, "tokens": 8000, "parameters": 12345}
    losses = {"train_loss": value(3, arm, "shared", 1, seed), "eval_loss": value(4, arm, "shared", 1, seed)}
    costs = {"training_seconds": 12.0 + 3 * ARMS.index(arm), "flops_per_token": 1000 + 100 * ARMS.index(arm)}
    return about | losses | costs


def _arm(arm: str, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    losses = lambda name: {seed: value(4, name, "shared", 1) + OFFSETS[seed] * (1 + ARMS.index(name)) for seed in SEEDS}
    summary = verdicts.arm_summary(arm, comparisons, {}, losses(arm), losses("tied"), losses("untied"))
    changed = {"untied": {}, "tied": {"tying.scheme": ["untied", "tied"]}}
    changed["tied-x5"] = changed["tied"] | {"tying.input_grad_scale": [1.0, 5.0]}
    summary |= {
        "early_output_share": interval(value(0, arm, "output", 1, seed) + 0.5 for seed in SEEDS),
        "overall_output_share": interval(value(0, arm, "output", 2, seed) + 0.3 for seed in SEEDS),
        "differs_from_reference": changed[arm],
        "second_eval_loss": interval([]),
        "second_source": None,
        "eval_loss_against_baseline": paired(losses(arm), losses("tied")),
    }
    return dict(to_plain(summary))
