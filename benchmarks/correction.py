"""Simulates the reproducible share where the truth is known: bias, coverage of its intervals, errors of its gate.

    python benchmarks/correction.py --machine "2-core x86-64 virtual machine"

Writes benchmarks/results/correction.json. Runs of `SEEDS` seeds are drawn at a time, with tables [2048, 64] of three
roles, and cut into disjoint sets of 3, 4, 5 and 8 seeds. Two kinds of seed:

    additive   a seed's table is the arm's signal plus noise of its own, larger for rare tokens; the truth is exact
    uneven     each seed learns the signal's directions to other degrees, some not at all, adds noise, saturates, and
               scales every row; the truth is that of Gram matrices averaged over 400 other seeds

In both, tables of one seed share half of their noise, and every table is rotated and scaled at random. Signals have
row lengths that vary, a direction of token frequency, and decaying spectra. The noise is such that tables of different
seeds align above chance as those of the quick study do. Beside it, alignment put through Spearman's correction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.instruments.alignment.align import align
from tiedjax.analysis.study.reproducibility import Geometry, across_seeds, frequency_groups, inner, share_of

SAVED = Path(__file__).parent / "results" / "correction.json"
V, D = 2048, 64
SEEDS = 10
SIZES = (3, 4, 5, 8)
TRUTHS = ((0.9, 0.3), (0.6, 0.6), (0.3, 0.9))  # with the output and with the input signal
OUTPUT_WITH_INPUT = 0.24  # as in the quick study
LEVELS = {"output": 0.35, "input": 0.15, "shared": 0.34}  # alignment above chance between seeds, as in the quick study
TRUTH_SEEDS = 400
ROLES = ("output", "input")

Tables = dict[str, dict[int, np.ndarray]]  # role: seed: [V, D]


@dataclass(frozen=True)
class World:
    """What is the same for every seed: signals and size of the noise by role, and the frequency of tokens."""

    kind: str
    signals: Mapping[str, np.ndarray]
    noise: Mapping[str, float]
    frequency_V: np.ndarray  # standardised logarithm, within two deviations
    part_V: np.ndarray


def token_counts() -> np.ndarray:
    """Zipf's, int64 [2, V]."""
    return np.tile((1.5e6 / (np.arange(V) + 2.7)).astype(np.int64), (2, 1))


def unit(table_VD: np.ndarray) -> np.ndarray:
    """With rows of mean squared length 1, float32."""
    return (table_VD / math.sqrt(np.square(table_VD).sum(axis=1).mean())).astype(np.float32)


def rotation(rng: np.random.Generator) -> np.ndarray:
    """Of D dimensions, at random."""
    return np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)


def signal(rng: np.random.Generator, frequency_V: np.ndarray, along_frequency: float) -> np.ndarray:
    """A decaying spectrum in a random basis, uneven rows, longer for frequent tokens, and a direction of frequency."""
    spectrum_D = np.arange(1, D + 1) ** -0.4
    length_V = np.exp(0.25 * frequency_V + 0.3 * rng.normal(size=V))
    table_VD = unit(rng.normal(size=(V, D)) * spectrum_D * length_V[:, None]) @ rotation(rng)
    direction_D = rng.normal(size=D)
    direction_D /= np.linalg.norm(direction_D)
    return table_VD + along_frequency * np.outer(frequency_V, direction_D)


def correlation(x: Geometry, y: Geometry) -> float:
    """Of two signals, which no noise attenuates."""
    return inner(x, y) / (x.norm * y.norm)


def mixture(parts: Sequence[np.ndarray], wanted: Sequence[float], rest: np.ndarray, part_V: np.ndarray) -> np.ndarray:
    """A sum of `parts` and `rest`, weighted so that its correlations with the parts are those wanted."""
    geometries = [Geometry(part, part_V) for part in parts]
    total = lambda logs: sum((math.exp(log) * part for log, part in zip(logs, parts, strict=True)), rest)
    error = lambda logs: [
        correlation(Geometry(total(logs), part_V), g) - t for g, t in zip(geometries, wanted, strict=True)
    ]
    solution = least_squares(error, np.zeros(len(parts)))
    if np.abs(solution.fun).max() > 1e-6:
        raise RuntimeError(f"no mixture has the correlations {wanted}")
    return total(solution.x)


def draw(world: World, rng: np.random.Generator, seeds: int) -> Tables:
    """The tables of so many seeds."""
    tables: Tables = {role: {} for role in world.signals}
    spectrum_D = np.arange(1, D + 1) ** -0.25
    noise_VD = np.outer(np.exp(-0.15 * world.frequency_V), spectrum_D)
    noise_VD = (noise_VD / np.linalg.norm(noise_VD) * math.sqrt(V / 2)).astype(np.float32)
    normal = lambda: rng.standard_normal((V, D), dtype=np.float32)
    for seed in range(seeds):
        of_the_seed_VD = normal()
        for role, signal_VD in world.signals.items():
            noise = world.noise[role] * noise_VD * (of_the_seed_VD + normal())
            if world.kind == "additive":
                table_VD = signal_VD + noise
            else:
                gain_D = (rng.gamma(16, 1 / 16, size=D) * (rng.random(D) < 0.9)).astype(np.float32)
                directions_DD = np.linalg.svd(signal_VD, full_matrices=False)[2]
                table_VD = np.tanh(4 * ((signal_VD @ directions_DD.T * gain_D + noise) @ rotation(rng)))
                table_VD *= np.exp(0.3 * rng.standard_normal((V, 1), dtype=np.float32))
            tables[role][seed] = np.exp(0.1 * rng.normal()).astype(np.float32) * (table_VD @ rotation(rng))
    return tables


def aligned(x_VD: np.ndarray, y_VD: np.ndarray) -> float:
    """Alignment above chance."""
    score = align(x_VD, y_VD, fits=("orthogonal",), draws=1).scores["orthogonal"].corrected
    assert score is not None
    return score


def make_world(kind: str, truths: tuple[float, float]) -> World:
    """Signals with these correlations, and noise that makes tables repeat as LEVELS say."""
    rng = np.random.default_rng(1)
    counts = token_counts()
    frequency_V = np.log(counts[0])
    frequency_V = np.clip((frequency_V - frequency_V.mean()) / frequency_V.std(), -2, 2)
    part_V = frequency_groups([counts])
    output, rest = signal(rng, frequency_V, 0.4), signal(rng, frequency_V, 0.3)
    input_ = mixture([output], [OUTPUT_WITH_INPUT], signal(rng, frequency_V, 0.15), part_V)
    shared = mixture([output, input_], truths, rest, part_V)
    signals = {"output": unit(output), "input": unit(input_), "shared": unit(shared)}
    noise = {}
    for role, table_VD in signals.items():
        low, high = 0.05, 20.0
        for _ in range(9):
            middle = math.sqrt(low * high)
            world = World(kind, {role: table_VD}, {role: middle}, frequency_V, part_V)
            first, second = draw(world, np.random.default_rng(2), 2)[role].values()
            low, high = (middle, high) if aligned(first, second) > LEVELS[role] else (low, middle)
        noise[role] = math.sqrt(low * high)
    return World(kind, signals, noise, frequency_V, part_V)


def cleared(gram_VV: np.ndarray, part_V: np.ndarray) -> np.ndarray:
    """A Gram matrix without its diagonal and without the row and column sums of every block, entry by entry."""
    result_VV = np.zeros_like(gram_VV, dtype=np.float64)
    rows = [np.flatnonzero(part_V == part) for part in np.unique(part_V)]
    for first, second in itertools.product(rows, rows):
        block = gram_VV[np.ix_(first, second)].astype(np.float64)
        if first is second:
            n = len(first)
            np.fill_diagonal(block, 0)
            sums = block.sum(axis=1)
            block += sums.sum() / ((n - 1) * (n - 2)) - (sums[:, None] + sums[None, :]) / (n - 2)
            np.fill_diagonal(block, 0)
        else:
            block += block.mean() - block.mean(axis=0)[None, :] - block.mean(axis=1)[:, None]
        result_VV[np.ix_(first, second)] = block
    return result_VV


def truth(world: World) -> dict[str, float]:
    """The correlation of the arms' mean Gram matrices: of the signals, or by averaging over many seeds."""
    if world.kind == "additive":
        signals = {role: Geometry(table, world.part_V) for role, table in world.signals.items()}
        return {role: correlation(signals["shared"], signals[role]) for role in ROLES}
    halves: list[dict[str, np.ndarray]] = []  # of the seeds, so that no seed's noise meets itself
    for half in range(2):
        total = {role: np.zeros((V, V), np.float32) for role in world.signals}
        for batch in range(TRUTH_SEEDS // 2 // SEEDS):
            for role, tables in draw(world, np.random.default_rng([3, half, batch]), SEEDS).items():
                wide = np.hstack([table / math.sqrt(Geometry(table, world.part_V).norm) for table in tables.values()])
                total[role] += wide @ wide.T
        halves.append({role: cleared(gram, world.part_V) for role, gram in total.items()})
    both = lambda a, b: sum(float((halves[i][a] * halves[1 - i][b]).sum()) for i in range(2))
    return {role: both("shared", role) / math.sqrt(both("shared", "shared") * both(role, role)) for role in ROLES}


def nearness(tables: Tables, alike: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `share_of` asks for, with this measure of two tables of different seeds."""
    pairs = lambda a, b: {(i, j): alike(tables[a][i], tables[b][j]) for i, j in itertools.permutations(tables[a], 2)}
    return {r: pairs("shared", r) for r in ROLES}, {"subject": pairs("shared", "shared")} | {
        r: pairs(r, r) for r in ROLES
    }


def ours(tables: Tables, part_V: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with the package's own measure."""
    geometry = {r: {seed: Geometry(t, part_V) for seed, t in by_seed.items()} for r, by_seed in tables.items()}
    cross = {role: across_seeds(geometry["shared"], geometry[role]) for role in ROLES}
    repeated = {"subject": across_seeds(geometry["shared"], geometry["shared"])}
    return cross, repeated | {role: across_seeds(geometry[role], geometry[role]) for role in ROLES}


def sets(size: int) -> list[list[int]]:
    """Disjoint sets of so many of SEEDS seeds."""
    return [list(range(i, i + size)) for i in range(0, SEEDS - size + 1, size)]


def score(spans: Sequence[Interval], true: float) -> dict[str, Any]:
    """Bias and coverage with their standard errors, over the sets whose share was measured."""
    known = [span for span in spans if span.mean is not None and span.low is not None and span.high is not None]
    if not known:
        return {"true": true, "sets": len(spans), "measured": 0}
    means = np.array([span.mean for span in known])
    covered = np.mean([span.low <= true <= span.high for span in known])
    return {
        "true": true,
        "sets": len(spans),
        "measured": len(known),
        "bias": float(means.mean() - true),
        "bias_standard_error": float(means.std(ddof=1) / math.sqrt(len(known))),
        "coverage": float(covered),
        "coverage_standard_error": math.sqrt(covered * (1 - covered) / len(known)),
        "half_width": float(np.mean([span.half_width for span in known])),
    }


def scored(shares: Sequence[Mapping[str, Any]], true: Mapping[str, float]) -> dict[str, Any]:
    """The scores of the two shares and of their difference."""
    wanted = {f"vs_{role}": true[role] for role in ROLES} | {"margin": true["output"] - true["input"]}
    return {name: score([share[name] for share in shares], value) for name, value in wanted.items()}


def simulate(kind: str, truths: tuple[float, float], repetitions: int) -> dict[str, Any]:
    """One world: how the shares of sets of 3, 4, 5 and 8 seeds lie about the truth."""
    world = make_world(kind, truths)
    rng = np.random.default_rng(4)
    shares: dict[int, list[dict[str, Any]]] = {size: [] for size in SIZES}
    for _ in range(repetitions):
        cross, repeated = ours(draw(world, rng, SEEDS), world.part_V)
        for size in SIZES:
            shares[size] += [share_of(cross, repeated, seeds) for seeds in sets(size)]
    true = truth(world)
    mean = lambda name: float(np.mean([share["divides_by"][name].mean for share in shares[5]]))
    return {
        "kind": kind,
        "signals_correlate": dict(zip(ROLES, truths, strict=True)),
        "repetition_alignment": LEVELS,
        "divides_by": {name: mean(name) for name in ("subject", *ROLES)},
        "draws": repetitions,
        "seeds": {str(size): scored(shares[size], true) for size in SIZES},
    }


def simulate_alignment(truths: tuple[float, float], repetitions: int) -> dict[str, Any]:
    """Alignment above chance through the same correction, five additive seeds; its truth is that of the signals."""
    world = make_world("additive", truths)
    rng = np.random.default_rng(5)
    shares = [share_of(*nearness(draw(world, rng, 5), aligned), range(5)) for _ in range(repetitions)]
    true = {role: aligned(world.signals["shared"], world.signals[role]) for role in ROLES}
    return {"kind": "additive", "draws": repetitions, "seeds": {"5": scored(shares, true)}}


def simulate_noise(repetitions: int) -> dict[str, Any]:
    """How often the gate takes a table for one that repeats though every seed's is noise."""
    frequency_V = make_world("additive", TRUTHS[1]).frequency_V
    part_V = frequency_groups([token_counts()])
    nothing = {role: np.zeros((V, D), np.float32) for role in ("output", "input", "shared")}
    world = World("additive", nothing, dict.fromkeys(nothing, 1.0), frequency_V, part_V)
    rng = np.random.default_rng(6)
    passed: dict[int, list[bool]] = {size: [] for size in SIZES}
    for _ in range(repetitions):
        cross, repeated = ours(draw(world, rng, SEEDS), part_V)
        for size in SIZES:
            for seeds in sets(size):
                spans = share_of(cross, repeated, seeds)["divides_by"].values()
                passed[size] += [span.low is not None and span.low > 0 for span in spans]
    return {str(size): {"tables": len(p), "passed": float(np.mean(p))} for size, p in passed.items()}


def table(results: Mapping[str, Any]) -> str:
    """A line for each world, number of seeds and share."""
    lines = ["measure    kind      seeds  share      true    bias (error)        coverage (error)  half width"]
    for measure in ("share", "alignment"):
        for world, (size, by_name) in ((w, item) for w in results[measure] for item in w["seeds"].items()):
            for name, s in by_name.items():
                head = f"{measure:<10} {world['kind']:<9} {size:>5}  {name:<10} {s['true']:6.3f}"
                lines.append(
                    f"{head}  {s['bias']:+.4f} ({s['bias_standard_error']:.4f})  {s['coverage']:.3f} "
                    f"({s['coverage_standard_error']:.3f})     {s['half_width']:.3f}"
                    if s["measured"]
                    else f"{head}  not measured"
                )
    gate = ", ".join(f"{s['passed']:.3f} with {size}" for size, s in results["noise_passes_gate"].items())
    return "\n".join([*lines, f"Tables of nothing but noise that pass the gate: {gate} seeds."])


def main() -> None:
    """Runs every world and saves what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--draws", type=int, default=150, help="of ten seeds in every world")
    parser.add_argument("--alignment-draws", type=int, default=20, help="of five seeds, for alignment")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers) as pool:
        noise = pool.submit(simulate_noise, args.draws // 3)
        worlds = [pool.submit(simulate, kind, t, args.draws) for kind in ("additive", "uneven") for t in TRUTHS]
        others = [pool.submit(simulate_alignment, t, args.alignment_draws) for t in TRUTHS]
        results = {
            "machine": args.machine,
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "scipy": version("scipy"),
            "rows": V,
            "width": D,
            "share": [world.result() for world in worlds],
            "alignment": [world.result() for world in others],
            "noise_passes_gate": noise.result(),
        }
    SAVED.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
