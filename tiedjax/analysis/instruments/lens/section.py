"""Lenses: what each layer already predicts, tied against untied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiedjax.analysis.basis import drawing, numbers, published
from tiedjax.analysis.basis.records import to_plain
from tiedjax.analysis.basis.statistics import interval, paired
from tiedjax.analysis.basis.study_runs import StudyRuns
from tiedjax.errors import UserError

HELD_OUT_TOKENS = 4096
QUANTITIES = {f"{lens}_{score}": (lens, score) for lens in ("tuned", "logit") for score in ("kl", "cross_entropy")}
PREDICTORS = ("uniform", "unigram", "bigram")


def collect(study: StudyRuns, seed: int) -> list[dict[str, Any]]:
    """Every run of one seed through the lenses."""
    return [{"arm": arm, "seed": s} | _measured(study, run) for (arm, s), run in study.runs.items() if s == seed]


def together(reference: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `collect` gave for every seed, and the differences between twins, paired by seed."""
    from tiedjax.analysis.instruments.lens.training import CRITERION  # here: it brings JAX, which drawing does not need

    return {"criterion": CRITERION, "runs": list(runs), "twins": list(_twins(reference, runs))}


def _measured(study: StudyRuns, run: Any) -> dict[str, Any]:
    from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows, shown
    from tiedjax.analysis.instruments.lens.baselines import MOST_TOKENS, CountPredictors
    from tiedjax.analysis.instruments.lens.lens import lens, training_tokens

    try:
        prepared = study.text(run)
        model = FrozenModel(run)
        held_out_WS = held_out_windows(prepared, run.config.model.seq_len, HELD_OUT_TOKENS)
    except UserError as error:
        return {"not_measured": str(error)}
    rows, width = model.U_VD.shape
    training_WS = np.concatenate(list(shown(run, prepared, training_tokens(width))))
    found = to_plain(lens(model, training_WS, held_out_WS))
    counted = CountPredictors(shown(run, prepared, MOST_TOKENS), held_out_WS, rows)
    return {"step": model.step, "rows": rows, "width": width, **found, "baselines": to_plain(counted.beside(model))}


def _twins(reference_arm: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Arm minus reference at every state."""
    from tiedjax.analysis.instruments.lens.lens import early_states

    by_arm = {arm: {r["seed"]: r["states"] for r in of if "states" in r} for arm, of in drawing.by_arm(runs)}
    reference = by_arm.get(reference_arm, {})
    for arm, own in by_arm.items():
        common = reference.keys() & own.keys()
        if arm == reference_arm or not common:
            continue
        states = own[min(common)]
        for state, about in enumerate(states):
            record = {"arm": arm, "state": state, "name": about["name"]}
            record["early"] = state in early_states(len(states) - 1)
            for name, quantity in QUANTITIES.items():
                record[name] = to_plain(paired(_by_seed(own, state, *quantity), _by_seed(reference, state, *quantity)))
            record["beyond_last"] = to_plain(paired(_above_last(own, state), _above_last(reference, state)))
            yield record


def _by_seed(states: Mapping[int, Any], state: int, lens: str, score: str) -> dict[int, float | None]:
    return {seed: of[state][lens][score]["mean"] for seed, of in states.items()}


def _above_last(states: Mapping[int, Any], state: int) -> dict[int, float | None]:
    """How much worse at the next token a state's tuned lens is than the model in the end, by seed."""
    own, last = (_by_seed(states, at, "tuned", "cross_entropy") for at in (state, -1))
    return {seed: a - b for seed in own if (a := own[seed]) is not None and (b := last[seed]) is not None}


def plots(results: drawing.Results) -> Iterator[drawing.Plot]:
    """Its figures; none where nothing was measured."""
    if _known(results):
        yield drawing.Plot("lens", [_divergence, _cross_entropy])
        yield drawing.Plot("lens_paper", [_paper_theirs, _paper_ours])
    if results["lens"]["twins"]:
        yield drawing.Plot("lens_twins", [_difference("kl", "KL"), _difference("cross_entropy", "cross-entropy")])


def not_measured(results: drawing.Results) -> list[str]:
    """What could not be measured, and why."""
    return list(dict.fromkeys(r["not_measured"] for r in results["lens"]["runs"] if "not_measured" in r))


def sentences(results: drawing.Results) -> list[str]:
    """For the baseline arm, one sentence per state: does it differ from the reference there?"""
    head = results["headline"]
    arm, reference = head["arm"], head["reference"]
    found = []
    for twin in results["lens"]["twins"]:
        if twin["arm"] != arm or not any(twin["tuned_kl"][end] for end in ("mean", "low", "high")):
            continue  # the last state, which is read as it is
        where = "At the input" if twin["state"] == 0 else f"After {twin['name']}"
        parts = [
            f"{title} {_moved(twin[name], reference)}"
            for name, title in [("tuned_kl", "divergence"), ("tuned_cross_entropy", "cross-entropy")]
        ]
        found.append(f"{where}, the {arm} lens’s {' and its '.join(parts)}.")
    return found


def _moved(span: Mapping[str, Any], reference: str) -> str:
    size = numbers.spread(span)
    if span["low"] is None:
        return f"differs from {reference}’s by {size} bits (one seed)"
    if span["low"] > 0:
        return f"is higher than {reference}’s by {size} bits"
    if span["high"] < 0:
        return f"is lower than {reference}’s by {size.removeprefix('−')} bits"
    return f"does not measurably differ from {reference}’s ({size} bits)"


def verdict(results: drawing.Results) -> list[str]:
    """Whether tying hurts early layers, in the paper's sense (a higher divergence there) and in the next token's."""
    arm = results["headline"]["arm"]
    early = [t for t in results["lens"]["twins"] if t["arm"] == arm and t["early"]]
    if not early or any(t["tuned_kl"]["low"] is None for t in early):
        return []
    farther = _placed(early, "tuned_kl", "farther from the final prediction", "nearer to it")
    worse = _placed(early, "beyond_last", "behind at the next token by more than in the end", "by less")
    states = " and ".join(t["name"] for t in early)
    twins = f"{results['headline']['reference']} twins"
    return [f"In the first third ({states}), {arm} lenses are {farther} than those of the {twins}, and {worse}."]


def _placed(early: Sequence[Mapping[str, Any]], name: str, higher: str, lower: str) -> str:
    """Where among the early states the twins differ measurably, and which way."""
    sides = [
        (higher, [t["name"] for t in early if t[name]["low"] > 0]),
        (lower, [t["name"] for t in early if t[name]["high"] < 0]),
    ]
    found = [f"{side} at {' and '.join(names)}" for side, names in sides if names]
    return " but ".join(found) or f"nowhere measurably {higher}"


def against_bigram(results: drawing.Results) -> list[str]:
    """Whether the models predict better than a bigram of the text that they were shown."""
    found = [r for r in _known(results) if r["baselines"]["bigram_cross_entropy"]["mean"] is not None]
    own = lambda r: r["states"][-1]["tuned"]["cross_entropy"]["mean"]
    gaps = interval(own(r) - r["baselines"]["bigram_cross_entropy"]["mean"] for r in found)
    if gaps.mean is None:
        return []
    better = "better" if gaps.mean < 0 else "worse"
    size = numbers.number(abs(gaps.mean), 2)
    return [
        f"On average the models are {size} bits a token {better} than a bigram of the text that they were shown"
        + ("." if gaps.mean < 0 else ": read what follows as early training.")
    ]


def rows(results: drawing.Results) -> list[dict[str, str]]:
    """Per arm and state: tuned lens, logit lens and the published reading, over seeds."""
    lines = []
    for arm, of in drawing.by_arm(_known(results)):
        for state in range(len(of[0]["states"])):
            line = {"arm": arm, "name": of[0]["states"][state]["name"], "first": not state}
            for name, (lens, score) in (QUANTITIES | {"published_kl": ("published", "kl")}).items():
                line[name] = numbers.spread(vars(interval(r["states"][state][lens][score]["mean"] for r in of)))
            lines.append(line)
    return lines


def baselines(results: drawing.Results) -> list[dict[str, str]]:
    """What predicting without a model costs, over runs."""
    found = [r["baselines"] for r in _known(results)]
    return [{"name": name, "bits": numbers.number(_bits(found, name))} for name in PREDICTORS] if found else []


def training(results: drawing.Results) -> str:
    """How the translators were fitted, in one sentence."""
    found = [(r, s) for r in _known(results) for s in r["states"] if s["fit"]]
    if not found:
        return ""
    done = sum(s["fit"]["converged"] for _, s in found)
    gap = np.mean([s["tuned"]["kl"]["mean"] - s["fit"]["training_kl"] for _, s in found])
    most = max(s["fit"]["iterations"] for _, s in found)
    first = found[0][0]
    return (
        f"Fitted on {first['training_tokens']:,} tokens of training text, scored on {first['held_out_tokens']:,} "
        f"held-out ones. {done} of {len(found)} translators converged ({results['lens']['criterion']}), after at most "
        f"{most} iterations; their divergence is on average {numbers.number(gap)} bits higher on held-out text."
    )


def _bits(found: Sequence[Mapping[str, Any]], name: str) -> float:
    span = [b["bigram_cross_entropy"] if name == "bigram" else b[name]["cross_entropy"] for b in found]
    return float(np.mean([s["mean"] for s in span]))


def _known(results: drawing.Results) -> list[Mapping[str, Any]]:
    return [r for r in results["lens"]["runs"] if "states" in r]


def _curve(of: Sequence[Mapping[str, Any]], lens: str, score: str) -> np.ndarray:
    """Mean over seeds at every state."""
    return np.mean([[s[lens][score]["mean"] for s in r["states"]] for r in of], axis=0)


def _divergence(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, of in drawing.by_arm(_known(results)):
        colour = drawing.colours(results)[arm]
        for run in of:
            ax.plot(_curve([run], "tuned", "kl"), color=colour, linewidth=0.6, alpha=0.4)
        ax.plot(_curve(of, "tuned", "kl"), color=colour, marker="o", markersize=3.5, label=arm)
    _state_axis(ax, results)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title("tuned lens to final prediction")


def _cross_entropy(ax: drawing.Axes, results: drawing.Results) -> None:
    known = _known(results)
    for arm, of in drawing.by_arm(known):
        colour = drawing.colours(results)[arm]
        ax.plot(_curve(of, "tuned", "cross_entropy"), color=colour, marker="o", markersize=3.5)
        ax.plot(_curve(of, "logit", "cross_entropy"), color=colour, linestyle=(0, (1, 1.5)), linewidth=1.4)
    last = len(known[0]["states"]) - 1
    found = [r["baselines"] for r in known]
    for name in PREDICTORS:
        bits = _bits(found, name)
        ax.axhline(bits, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        offset = (0, -11 if name == "bigram" else 2)  # the curves end just above the bigram's line
        ax.annotate(name, (last, bits), xytext=offset, textcoords="offset points", ha="right", color=drawing.MUTED)
    _state_axis(ax, results)
    low = min(_curve(known, "tuned", "cross_entropy").min(), _bits(found, "bigram"))
    ax.set_ylim(low - 0.7, _bits(found, "uniform") + 0.6)
    ax.set_ylabel("bits per held-out token")
    ax.set_title("next token; dotted: logit lens")


def _difference(score: str, title: str) -> Callable[[drawing.Axes, drawing.Results], None]:
    def draw(ax: drawing.Axes, results: drawing.Results) -> None:
        arms = list(drawing.by_arm(results["lens"]["twins"]))
        for i, (arm, of) in enumerate(arms):
            spans = [t[f"tuned_{score}"] for t in of]
            at = np.arange(len(of)) + 0.08 * (i - (len(arms) - 1) / 2)
            mean = drawing.floats([s["mean"] for s in spans])
            half = [0.0 if s["low"] is None else (s["high"] - s["low"]) / 2 for s in spans]
            colour = drawing.colours(results)[arm]
            ax.errorbar(at, mean, half, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=arm)
        ax.axhline(0, color=drawing.MUTED, linestyle=drawing.DASHES, linewidth=1.2)
        _state_axis(ax, results)
        ax.set_ylabel("difference, bits")
        ax.set_title(f"tuned {title} less {results['headline']['reference']}’s")

    return draw


def _paper_theirs(ax: drawing.Axes, results: drawing.Results) -> None:
    head, colours = results["headline"], drawing.colours(results)
    for name, arm in [("untied", head["reference"]), ("tied", head["arm"])]:
        values = published.LENS[name]
        colour = colours.get(arm, drawing.MUTED)
        ax.plot(values, color=colour, marker="o", markersize=3, label=name if arm not in colours else None)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("state (0: input)")
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title(f"published: {published.LENS_PAIR.split(';')[0].replace(' and ', ', ')}")


def _paper_ours(ax: drawing.Axes, results: drawing.Results) -> None:
    for arm, of in drawing.by_arm(_known(results)):
        colour = drawing.colours(results)[arm]
        ax.plot(_curve(of, "published", "kl"), color=colour, marker="o", markersize=3, label=arm)
        ax.plot(_curve(of, "tuned", "kl"), color=colour, linestyle=drawing.DASHES, linewidth=1.2)
    _state_axis(ax, results)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL(final || lens), bits")
    ax.set_title("here, read the same way; dashed: corrected")


def _state_axis(ax: drawing.Axes, results: drawing.Results) -> None:
    last = max(len(r["states"]) for r in _known(results)) - 1
    every = max(1, last // 8)
    ax.set_xticks(range(0, last + 1, every), ["input", *(f"{i}" for i in range(every, last + 1, every))])
    ax.set_xlabel("after layer")
