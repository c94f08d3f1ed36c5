"""Writes the blocks of numbers in README.md and docs/ from saved results: none is typed by hand.

python benchmarks/readme.py studies/quick --machine "2-core x86-64 virtual machine"   # after `tiedjax study`
python benchmarks/readme.py studies/small --machine "2-core x86-64 virtual machine"   # after `tiedjax study small`
python benchmarks/readme.py studies/rates --machine "2-core x86-64 virtual machine"   # after `tiedjax study rates`
python benchmarks/readme.py studies/mechanism --machine "2-core x86-64 virtual machine"   # after that study
python benchmarks/readme.py studies/schemes --machine "2-core x86-64 virtual machine"     # after that study
python benchmarks/readme.py studies/untie --machine "2-core x86-64 virtual machine"       # after that study
python benchmarks/readme.py studies/initialisation --machine "2-core x86-64 virtual machine"   # after that study
python benchmarks/readme.py studies/shape-512 --machine "2-core x86-64 virtual machine"   # and shape-8192
python benchmarks/readme.py decisions/quick --machine "2-core x86-64 virtual machine"     # after `tiedjax decide`
python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --machine "..."          # saves by itself
python benchmarks/readme.py                                                           # again, from what was saved
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tiedjax.analysis.basis import numbers
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.statistics import interval, paired
from tiedjax.analysis.decision import page as decision_page
from tiedjax.analysis.decision import rows as decision_rows
from tiedjax.analysis.decision import verdicts as decision_verdicts
from tiedjax.analysis.diagnosis import words as diagnosis_words
from tiedjax.analysis.instruments.account import section as account
from tiedjax.analysis.instruments.regret import section as regret
from tiedjax.analysis.study import losses, sentences
from tiedjax.cost.gpus import CARDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STUDIES = ("quick", "small", "rates", "mechanism", "schemes", "untie", "initialisation", "shape-512", "shape-8192")
DECISION = RESULTS / "decision.json"
WIDTH_HEADS = ("Width", "Parameters, tied", "The table’s share", "Held-out loss, tied", "untied less tied")
OF_BOTH = "4-bit body, 8-bit table"  # of what numbers of SmolLM2 are
PICTURE = ROOT / "docs" / "small_study.png"
PEERS = {
    "torch_compiled": "PyTorch {torch}, compiled (default mode; {loss}), both role gradients by hooks",
    "without_roles": "without role split, account and their metrics",
}
TABLES = {"trained_like": "tables that look trained", "random": "tables of independent normals"}
# What the sentences read of results.json: they are made anew whenever README is written.
KEPT = (
    *("statements", "headline", "arms", "changes", "between_seeds", "reproducible_share", "runs", "study", "sweep"),
    "environment",
)
NO_CURVE: dict[str, list[float]] = {name: [] for name in ("steps", "in_in", "in_out", "out_in", "out_out")}


def saved(name: str) -> Path:
    """Where a study's results are kept."""
    return RESULTS / f"{name}_study.json"


def save(study: Path, machine: str) -> None:
    """Keeps of a study what README shows, and of the small one the picture."""
    results = json.loads((study / "results.json").read_text(encoding="utf-8"))
    if results["name"] not in STUDIES:
        raise SystemExit(f"{study}: is the study {results['name']!r}; README shows {', '.join(STUDIES)}")
    kept = {name: results[name] for name in KEPT}
    kept["account"] = [record | {"curve": NO_CURVE, "spans": []} for record in results["account"]]
    kept["environment"]["machine"] = machine
    saved(results["name"]).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if results["name"] == "small":
        shutil.copyfile(study / "figures" / "nearness.png", PICTURE)


def save_decision(folder: Path, machine: str) -> None:
    """Keeps of a decision what the pages show."""
    found = decision_page.read(folder)
    kept = (*KEPT, "account", "regret")
    of_rungs = {width: {name: each[name] for name in kept if name in each} for width, each in found["results"].items()}
    for each in of_rungs.values():
        each["account"] = [record | {"curve": NO_CURVE, "spans": []} for record in each.get("account", [])]
    found["environment"]["machine"] = machine
    DECISION.write_text(json.dumps(found | {"results": of_rungs}, indent=1) + "\n", encoding="utf-8")


def decision() -> dict[str, Any]:
    """The decision that was kept."""
    kept: dict[str, Any] = json.loads(DECISION.read_text(encoding="utf-8"))
    return kept


def decided() -> str:
    """What the default ladder decides: the verdicts, the arms, the widths."""
    found = decision()
    rungs = found["results"].values()
    minutes = sum(each["environment"]["study_seconds"] for each in rungs) / 60
    tried = [point for each in rungs for choice in each["sweep"].values() for point in choice["tried"]]
    runs = sum(len(each["runs"]) for each in rungs) + sum(len(point["losses"]) for point in tried)
    arms = [list(row.values()) for row in decision_rows.arms(found)]
    widths = [list(row.values()) for row in decision_rows.widths(found)]
    lines = [
        *(f"* {sentence}" for sentence in decision_verdicts.said(found)),
        *(f"* {sentence}" for sentence in decision_verdicts.carries(found)),
        f"* {decision_rows.rates(found)}",
        "",
        *table(
            ["Arm", "Best rate", "Steps", "Parameters", "Held-out loss, nats a token", "Difference from tied"], arms
        ),
        "",
        *table([*WIDTH_HEADS, f"{found['arms']['until']} less tied"], widths),
        "",
        decision_rows.legend(found),
        decision_rows.time(found),
        f"The default ladder: {runs} runs in all, with those of the sweeps, trained and analysed in {minutes:.0f} "
        f"minutes {_where(found)}.",
    ]
    return "\n".join(lines) + "\n"


def answer(results: dict[str, Any]) -> str:
    """The verdict in one sentence, the picture, and what must be known beside them."""
    caption = "Nearness of the shared tables to the input and the output table of their untied twins"
    beside = " ".join(beside_answer(results))
    return f"**{sentences.verdict(results)}**\n\n![{caption}]({PICTURE.relative_to(ROOT)})\n\n{beside}\n"


def beside_answer(results: dict[str, Any]) -> list[str]:
    """What the interventions do, and how much of either table training repeats, which nearness hangs on too."""
    baseline = results["headline"]["arm"]
    repeats = [
        said for said in sentences.what_repeats(results) if said.startswith("Between") or f" {baseline} " in said
    ]
    return [*sentences.against_baseline(results), *repeats]


def findings(name: str, results: dict[str, Any], made: str) -> str:
    """The table of arms, the other findings, how sure they are, and what the study was."""
    found = [*losses.verdicts(results), *sentences.answer(results)]
    if name == "small":  # which README begins with
        told = {sentences.verdict(results), *beside_answer(results)}
        found = [finding for finding in found if finding not in told]
    lines = [
        *table(list(sentences.arm_columns(results).values()), [list(r.values()) for r in sentences.arm_rows(results)]),
        "",
        *(f"* {finding}" for finding in found),
        *(f"* {sentence}" for sentence in (losses.sweeps(results) if results["sweep"] else [])),
        *(f"* {sentence}" for sentence in (account.why(results) if "account" in results else [])),
        "",
        "Nearness has token frequency controlled: 0 is chance, 1 the same table up to a rotation. Output shares are "
        "taken before any scaling.",
        " ".join(filter(None, [sentences.certainty(results), sentences.near_edge(results)])),
        f"The {name} study: {made} {_where(results)}.",
    ]
    return "\n".join(lines) + "\n"


def _where(results: dict[str, Any]) -> str:
    """The machine, the day and the versions."""
    environment = results["environment"]
    packages = environment["packages"]
    return (
        f"on a {environment['machine']} ({environment['date']}, Python {environment['python']}, jax {packages['jax']}, "
        f"flax {packages['flax']})"
    )


def mechanism(results: dict[str, Any], made: str) -> str:
    """Each arm's loss and nearness, who wrote its table and what that did to the loss, and of tied in words."""
    wanted = ("arm", "loss", "cost", "output", "input")
    columns = {key: label for key, label in sentences.arm_columns(results).items() if key in wanted}
    arms = [[row[key] for key in columns] for row in sentences.arm_rows(results)]
    wrote = {row["arm"]: row for row in account.shares(results) if row["tokens"] == "all"}
    updates = {row["arm"]: row for row in account.updates(results)}
    changes = {row["arm"]: row for row in account.changes(results)}  # the last of each arm: over all steps
    heads = ["Arm", "Output role wrote", "Input role wrote", "Lookup, by output", "Lookup, by input"]
    heads += ["Prediction, by output", "Prediction, by input", "Output share of updates", "Steps clipped"]
    rows = [
        [
            *(arm, wrote[arm]["output"], wrote[arm]["input"]),
            *(changes[arm][name] for name in ("in_out", "in_in", "out_out", "out_in")),
            *(updates[arm][name] for name in ("output_update_share", "clipped")),
        ]
        for arm in wrote
    ]
    lines = [
        *table(list(columns.values()), arms),
        "",
        "Who wrote the final table (shares of its squared norm), and how an update changes the next batch's loss "
        "through either use of the table, by the role that wrote (thousandths of a nat a token, to first order at the "
        "point after the update; mean over all steps):",
        "",
        *table(heads, rows),
        "",
        *(f"* {sentence}" for sentence in [*account.why(results), account.when(results)[0]]),
        "",
        " ".join(filter(None, [sentences.certainty(results), sentences.near_edge(results)])),
        f"The mechanism study: {made} {_where(results)}.",
    ]
    return "\n".join(lines) + "\n"


def between(name: str, results: dict[str, Any], made: str) -> str:
    """Each arm's size and loss, and its loss less those of the baseline and the reference arm, paired by seed."""
    about = results["study"]
    losses_of = {
        arm: {run["seed"]: run["eval_loss"] for run in results["runs"] if run["arm"] == arm} for arm in about["arms"]
    }
    size = {run["arm"]: run["parameters"] for run in results["runs"]}
    rows = []
    for arm in about["arms"]:
        less = [
            numbers.NONE if arm == other else numbers.signed(to_plain(paired(losses_of[arm], losses_of[other])))
            for other in (about["baseline"], about["reference"])
        ]
        rows.append([arm, f"{size[arm]:,}", numbers.spread(results["arms"][arm]["eval_loss"]), *less])
    heads = ["Arm", "Parameters", "Held-out loss, nats a token"]
    heads += [f"Less {about[other]}’s" for other in ("baseline", "reference")]
    lines = [
        *table(heads, rows),
        "",
        "Differences are paired by seed; intervals are of 95 %, each by itself.",
        f"The {name} study: {made} {_where(results)}.",
    ]
    return "\n".join(lines) + "\n"


def shapes(studies: dict[str, dict[str, Any]]) -> str:
    """Tied beside untied at three shares of the table, in bits a byte, from the smallest share on."""
    heads = [
        "Study",
        "Vocabulary",
        "Width",
        "The table’s share of tied",
        "Steps",
        "Bits a byte, tied",
        "untied less tied, bits a byte",
    ]
    rows = []
    for name in ("shape-512", "quick", "shape-8192"):
        results = studies[name]
        config, runs = results["study"]["config"], results["runs"]
        V, D = config["model"]["vocab_size"], config["model"]["d_model"]
        size = next(run["parameters"] for run in runs if run["arm"] == "tied")
        loss = results["arms"]["tied"]["eval_loss"]["mean"]
        bits = results["arms"]["tied"]["hurdles"]["bits_per_byte"]
        nats = to_plain(
            paired(*({r["seed"]: r["eval_loss"] for r in runs if r["arm"] == a} for a in ("untied", "tied")))
        )
        less = {key: nats[key] * bits["mean"] / loss for key in ("mean", "low", "high")}
        share = f"{100 * V * D / size:.0f} %"
        steps = f"{config['train']['steps']:,}"
        rows.append([name, f"{V:,}", str(D), share, steps, numbers.spread(bits), numbers.signed(less)])
    made = "; ".join(f"{name}: {at_once(studies[name])}" for name in ("shape-512", "shape-8192"))
    return "\n".join([*table(heads, rows), "", f"{made}, {_where(studies['shape-512'])}."]) + "\n"


def at_once(results: dict[str, Any]) -> str:
    """How long a study took that was trained and analysed by one command."""
    minutes = results["environment"]["study_seconds"] / 60
    return f"{len(results['runs'])} runs trained and analysed in {minutes:.1f} minutes"


def in_parts(results: dict[str, Any]) -> str:
    """How long training took of a study that was trained first and analysed later."""
    minutes = sum(run["training_seconds"] for run in results["runs"]) / 60
    return f"{len(results['runs'])} runs that trained for {minutes:.0f} minutes in all, beside others, analysed later"


def span(quantiles: dict[str, float], digits: int = 2) -> str:
    """A median with its 10 % and 90 % quantiles."""
    median, low, high = (f"{quantiles[q]:.{digits}f}" for q in ("median", "p10", "p90"))
    return f"{median} ({low} to {high})"


def times(side: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times as long as another's a side's step takes, with its interval over starts."""
    starts = zip(side["windows"], other["windows"], strict=True)
    over = interval(median(a / b for a, b in zip(*start, strict=True)) for start in starts)
    return f"{over.mean:.2f} ({over.low:.2f} to {over.high:.2f})"


def part_of_step(side: dict[str, Any]) -> str:
    """How much of our step a side does without, with its interval over starts."""
    mean, low, high = (f"{100 * (1 - side['interval'][name]):.1f}" for name in ("mean", "high", "low"))
    return f"{mean} % ({low} to {high})".replace("-", "−")


def over(side: dict[str, Any]) -> float:
    """How many times as long as ours a side's step takes: the mean over starts, or the median where there is one."""
    return float(side["interval"]["mean"] if "interval" in side else side["over_tiedjax"]["median"])


def cost_rows() -> str:
    """A row for each step that was timed: its time, MFU, PyTorch's time, and what the role split costs."""
    heads = [
        "config",
        "on",
        "step under AdamW, ms",
        "MFU, and its bound",
        "compiled PyTorch, times ours",
        "without role split and account, times ours",
    ]
    rows, shapes = [], []

    def add(config: str, machine: str, seconds: float, mfu: str, sides: dict[str, Any]) -> None:
        cells = (f"{over(sides[side]):.2f}{sides[side].get('under', '')}" if side in sides else "–" for side in PEERS)
        rows.append([f"`{config}`", machine, f"{1e3 * seconds:.1f}", mfu, *cells])

    for name, measured in steps_on_cpus():
        sides = measured["sides"]
        machine = measured["environment"]["machine"]
        add(name, machine, sides["tiedjax"]["step_seconds"]["median"], "–", sides)
    for path in sorted(RESULTS.glob("gpu_*.json")):
        parts = json.loads(path.read_text(encoding="utf-8"))
        for part, measured in parts.items():
            kind, _, name = part.partition(":")
            if kind == "step":
                beside = [parts[key] for key in (f"torch:{name}", f"roles:{name}") if key in parts]
                sides = {
                    side: timed | {"under": other_than(measured, each)}
                    for each in beside
                    for side, timed in each["sides"].items()
                }
                card = measured["environment"]["device"]["kind"]
                mfu = f"{measured['mfu_causal']:.1%}{bound(name, card)}"
                add(name, card, measured["step_seconds"]["median"], mfu, sides)
                model, batch = measured["config"]["model"], measured["config"]["data"]["batch_size"]
                shapes.append(f"`{name}` {batch} sequences of {model['seq_len']:,} tokens, remat {model['remat']}")
    on_gpus = [f"\nOn GPUs a step has other sizes than the config files: {'; '.join(shapes)}."] if shapes else []
    return "\n".join(table(heads, rows) + on_gpus) + "\n"


def steps_on_cpus() -> Iterator[tuple[str, dict[str, Any]]]:
    """Configs and what was measured of their steps, machine by machine: what is fastest depends on the processor."""
    for path in sorted(RESULTS.glob("step_cpu*.json")):
        yield from json.loads(path.read_text(encoding="utf-8")).items()


def other_than(step: dict[str, Any], part: dict[str, Any]) -> str:
    """What our side of a comparison had otherwise than the timed step, in brackets."""
    batch = part["config"]["data"]["batch_size"]
    said = [f"batch {batch}"] * (batch != step["config"]["data"]["batch_size"])
    said += [] if has_account(part) else ["ours without an account"]
    return f" ({', '.join(said)})" if said else ""


def has_account(part: dict[str, Any]) -> bool:
    """Whether our side of a saved part kept an account of its updates; before there were any, none did."""
    return part["config"]["tying"].get("account", "off") != "off"


def compiled_for(name: str, card: str) -> dict[str, Any] | None:
    """What was compiled of this model for one such card, if anything was."""
    compiled = json.loads((RESULTS / "compile_gpu.json").read_text(encoding="utf-8")).get(name)
    known = compiled and CARDS[compiled["topology"].partition(":")[0]].device_kind == card
    return compiled if known else None


def bound(name: str, card: str) -> str:
    """What a step's compiled program allows on this card at most, in words to put behind what was measured."""
    compiled = compiled_for(name, card)
    return f" of at most {compiled['gpu']['mfu_causal_bound']:.0%}" if compiled else ""


def least_milliseconds(name: str, card: str) -> dict[str, str]:
    """By part of the step, in brackets, the least that its compiled program's kernels take on this card."""
    compiled = compiled_for(name, card)
    parts = compiled["gpu"]["parts"] if compiled else {}
    return {part: f" ({1e3 * of['seconds']:.1f})" for part, of in parts.items()}


def model(name: str, program: dict[str, Any]) -> str:
    """The config of a compiled case, or what is left of it."""
    if "loss_buffer_bytes" not in program:
        return f"`{name.split(',')[0]}`"
    size = program["config"]["model"]
    return f"{size['layers']} layers, V = {size['vocab_size']:,}, D = {size['d_model']:,}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.1f}" if size >= 2**30 / 20 else "less than 0.1"


def loss_buffers(compiled: dict[str, Any], noun: str) -> list[str]:
    """What the loss needs where a case has a large table."""
    return [
        f"\nWhere most is needed, the loss of {model(name, program)} has {gib(program['loss_buffer_bytes'])} GiB a "
        f"{noun} beside the table and the table's gradient."
        for name, program in compiled.items()
        if "loss_buffer_bytes" in program
    ]


def gpu_bounds() -> str:
    """What was compiled for GPUs that were not there."""
    compiled = json.loads((RESULTS / "compile_gpu.json").read_text(encoding="utf-8"))
    gib = lambda size: f"{size / 2**30:.1f}"
    heads = ["config", "for", "tokens a GPU", "in all, GiB", "GB moved", "kernels", "bound, ms", "MFU at most"]
    heads += ["bytes sent, times a count by hand", "of them beside computing", "roles' share of the bytes moved"]
    heads += ["the account's"]
    rows = []
    for name, program in compiled.items():
        work, cfg = program["gpu"]["total"], program["config"]
        sent = sum(kind["bytes"] for kind in program["collectives"].values())
        beside = sum(kind["asynchronous_bytes"] for kind in program["collectives"].values())
        roles, account = program.get("role_share_of_bytes"), program.get("account_share_of_bytes")
        rows.append(
            [
                model(name, program),
                ", ".join([program["topology"], *(f"{axis} {n}" for axis, n in program["mesh"].items() if n > 1)]),
                f"{cfg['data']['batch_size'] * cfg['model']['seq_len'] // program['devices']:,}",
                gib(program["needed_bytes"]),
                f"{work['bytes'] / 1e9:.0f}",
                f"{work['launches']:,}",
                f"{1e3 * work['seconds']:.1f}",
                f"{program['gpu']['mfu_causal_bound']:.1%}",
                f"{program['sent_over_count_by_hand']:.2f}" if program["devices"] > 1 else "–",
                f"{beside / sent:.0%}" if program["devices"] > 1 else "–",
                "–" if roles is None else f"{roles:.2%}",
                "–" if account is None else f"{account:.2%}",
            ]
        )
    versions = next(iter(compiled.values()))["versions"]
    lines = [
        f"Compiled for GPUs with jax {versions['jax']} (static estimates, nothing was run). A bound lets every kernel "
        "take the time that its bytes need at the memory's full rate, or its products at the card's peak, and no "
        "collective any.",
        "",
        *table(heads, rows),
    ]
    return "\n".join(lines + loss_buffers(compiled, "GPU")) + "\n"


def costs() -> str:
    """What the benchmarks on a CPU measured and what was compiled for TPUs, a line each."""
    read = lambda name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    loss, data, compiled = (read(name) for name in ("loss_cpu", "data", "compile"))
    lines, usual = [], read("step_cpu")["quick"]["environment"]["machine"]
    for name, measured in steps_on_cpus():
        sides = measured["sides"]
        milliseconds = span({q: 1e3 * value for q, value in sides["tiedjax"]["step_seconds"].items()}, 1)
        ours = sides["tiedjax"]
        others = ", ".join(
            f"{times(sides[side], ours)} times that {words}"
            for side, words in [("torch_eager", "in PyTorch eager with hooks"), ("torch_compiled", "compiled")]
        )
        roles = f"without role split, account and their metrics {times(sides['without_roles'], ours)}"
        if "by_hand" in sides:
            roles += f", in plain JAX by hand, with the loss as only metric, {times(sides['by_hand'], ours)}"
        machine = measured["environment"]["machine"]
        lines.append(
            f"* A step of `{name}.yaml` under AdamW, role metrics on: {milliseconds} ms; {others}; {roles}: means over "
            f"{len(measured['window_steps'])} starts, with 95 % intervals{'' if machine == usual else f'; {machine}'}."
        )
    for name, measured in read("account_cpu").items():
        lines.append(
            f"* Of a step of `{name}.yaml` the account of updates takes "
            f"{part_of_step(measured['sides']['without_account'])} with what metrics.jsonl has of updates, that alone "
            f"{part_of_step(measured['sides']['without_update_metrics'])}: means over {len(measured['window_steps'])} "
            f"starts of {measured['rounds']} rounds, with 95 % intervals; {measured['environment']['machine']}."
        )
    memory = loss["memory"]
    lines.append(
        f"* The loss with its gradients at {memory['tokens']:,} tokens, V = {memory['rows']:,}, D = {memory['width']}: "
        f"{memory['ratio']:.1%} of the plain one's temporary memory."
    )
    for timed in loss["time"]:
        shape = f"{timed['tokens']:,} tokens, V = {timed['rows']:,}, D = {timed['width']}"
        lines.append(f"  At {shape} it takes {span(timed['ratio'])} of its time.")
    rate = lambda timed: f"{timed['tokens_per_second'] / 1e6:.2f}"
    prepared = ", ".join(
        f"{rate(timed)} ({timed['source']}, V = {timed['vocab_size']:,})" for timed in data["preparation"]
    )
    batches = ", ".join(f"{rate(timed)} (T = {timed['seq_len']:,})" for timed in data["batches"])
    lines.append(f"* Millions of tokens per second prepared: {prepared}; read in batches: {batches}.")
    lines += spectral_costs()
    lines.append(f"* Above, where nothing else is said: {usual}, medians with 10 % and 90 % quantiles.")
    gib = lambda count: f"{count / 2**30:.1f}"
    rows = [
        [
            model(name, program),
            f"{program['topology']}, {' x '.join(f'{axis} {n}' for axis, n in program['mesh'].items() if n > 1)}",
            gib(program["temp_bytes"]),
            gib(program["needed_bytes"]),
            f"{program['sent_over_count_by_hand']:.2f}",
        ]
        for name, program in compiled.items()
    ]
    hbm = {gib(program["hbm_bytes"]) for program in compiled.values()}
    lines.append(f"\nCompiled for TPUs (static estimates, nothing was run), of {', '.join(hbm)} GiB per chip:\n")
    heads = ["config", "for", "temporary, GiB", "in all, GiB", "bytes sent, times a count by hand"]
    return "\n".join(lines + table(heads, rows) + loss_buffers(compiled, "chip")) + "\n"


def spectral_costs() -> list[str]:
    """What `analyze spectral` takes on each kind of tables, a line each; none where it was not run."""
    path, lines = RESULTS / "spectral.json", []
    for measured in json.loads(path.read_text(encoding="utf-8")).values() if path.is_file() else ():
        now = measured["now"]
        seconds, low, high = (f"{now['seconds'][q]:.0f}" for q in ("median", "low", "high"))
        lines.append(
            f"* `tiedjax analyze spectral` on two {TABLES[measured['kind']]}, V = {measured['rows']:,}, "
            f"D = {measured['width']:,}: {seconds} s (least {low}, most {high}), "
            f"{now['cpu_seconds']['median']:.0f} s of CPU time, {now['peak_bytes']['high'] / 1e9:.1f} GB."
        )
    return lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def gpu_costs() -> str:
    """What `gpu.py` found on each card; a part that was not run has no row."""
    lines = []
    for path in sorted(RESULTS.glob("gpu_*.json")):
        parts = json.loads(path.read_text(encoding="utf-8"))
        environment = next(iter(parts.values()))["environment"]
        versions, card = environment["versions"], environment["device"]["kind"]
        made = f"{environment['date']}, Python {versions['python']}, jax {versions['jax']}, flax {versions['flax']}"
        lines += [f"On one {card} ({made}):\n", *_correctness(parts), "", *_gpu_steps(parts, card), "", *_peers(parts)]
    return "\n".join(lines) + "\n"


def _correctness(parts: dict[str, Any]) -> list[str]:
    """How far losses, role gradients and a continued run are from what they should be."""
    lines, dtypes = [], ("float32", "bfloat16")
    if right := parts.get("correctness"):
        apart = " and ".join(f"{right[dtype]['largest_difference']:.1e} in {dtype}" for dtype in dtypes)
        lines.append(f"* {right['steps']} losses of `tiny` differ from the CPU's float32 by at most {apart}, in nats.")
    if right := parts.get("muon"):
        apart = lambda dtype, n: max(
            abs(a - b) for a, b in zip(right[dtype]["losses"][:n], right["cpu_float32"][:n], strict=True)
        )
        early, late = (" and ".join(f"{apart(d, n):.1e} in {d}" for d in dtypes) for n in (4, right["steps"]))
        lines.append(
            "* Those of `quick`, whose body Muon updates with bfloat16 products on a GPU, differ by at most "
            f"{early} in 4 steps, {late} in {right['steps']}: far more than those of `tiny`, and "
            "growing."
        )
    if roles := parts.get("gradients"):
        apart = " and ".join(f"{max(roles[d]['input'], roles[d]['output']):.1e} in {d}" for d in dtypes)
        lines.append(f"* Both role gradients of one batch differ from float64's by at most {apart} of their norms.")
    if resumed := parts.get("resume"):
        equal = " and ".join(f"{resumed[dtype]['equal_steps']} in {dtype}" for dtype in dtypes)
        missed = max(resumed[dtype]["account_error"] for dtype in dtypes)
        lines.append(
            f"* Of a run of {resumed['steps']} steps, interrupted and continued with `--model.table_gradient "
            f"deterministic`, so many are equal bit for bit: {equal}."
        )
        lines.append(
            f"* The parts of those runs' accounts add up to the rows that they follow, but for {missed:.1e} of "
            "their norm."
        )
    return lines


def _gpu_steps(parts: dict[str, Any], card: str) -> list[str]:
    """A table of steps, and one of where the time of each goes, beside what was compiled for this card."""
    heads = ["config", "T", "batch", "step, ms", "tokens/s", "MFU", "with all of attention", "GB", "compiled in, s"]
    steps = {name.partition(":")[2]: part for name, part in parts.items() if name.startswith("step:")}
    rows = [
        [
            f"`{name}`",
            f"{part['config']['model']['seq_len']:,}",
            str(part["config"]["data"]["batch_size"]),
            span({q: 1e3 * value for q, value in part["step_seconds"].items()}, 1),
            f"{part['tokens_per_second']:,.0f}",
            f"{part['mfu_causal']:.1%}",
            f"{part['mfu_full']:.1%}",
            f"{part['peak_memory_bytes'] / 1e9:.1f}",
            f"{part['compile_seconds']:.0f}",
        ]
        for name, part in steps.items()
    ]
    kinds = list(dict.fromkeys(kind for part in steps.values() for kind in part["kernels"]["by_part"]))
    times = []
    for name, of in ((name, part["kernels"]) for name, part in steps.items()):
        least = least_milliseconds(name, card)
        times += [
            [f"`{name}`", f"{of['step_milliseconds']:.1f}"]
            + [f"{of['by_part'].get(kind, 0.0):.1f}{least.get(kind, '')}" for kind in kinds]
            + [f"{of['between_kernels']:.1f}"]
        ]
    where = [
        "Where the time goes, by a trace of the kernels, in ms of a step; in brackets what their bytes or products "
        "need at least, by a program that another version of jax compiled (below), whose kernels may belong to other "
        "parts:",
        "",
    ]
    return [*table(heads, rows), "", *where, *table(["config", "all", *kinds, "no kernel"], times)]


def _peers(parts: dict[str, Any]) -> list[str]:
    """A table of the other sides' times over ours."""
    rows = []
    for name, part in parts.items():
        kind, _, model = name.partition(":")
        sides = {
            "torch_compiled": "PyTorch {torch}, compiled (default mode; {loss}), both role gradients by hooks",
            "without_account": "without the account of updates",
            "without_roles": "without role split, account and their metrics",
        }
        for side, whose in sides.items():
            if kind in ("torch", "roles") and side in part["sides"]:
                about = part["sides"][side]
                whose = whose.format(torch=part["environment"].get("pytorch", {}).get("torch"), loss=about.get("loss"))
                when = part["environment"]["date"]
                whose += "" if has_account(part) else f" ({when}, ours without an account)"
                rows.append(
                    [f"`{model}`", str(part["config"]["data"]["batch_size"]), whose, span(about["over_tiedjax"], 3)]
                )
    return table(["config", "batch", "side", "its time, times ours"], rows)


def larger() -> str:
    """What a study's held-out losses say that was trained on a GPU, and was not analysed."""
    study = json.loads((RESULTS / "g43_losses.json").read_text(encoding="utf-8"))
    arms, baseline = study["arms"], study["baseline"]
    least = min(each["n"] for each in study["differences"].values())
    ended = next(iter(arms[baseline].values()))
    about = ", ".join(
        f"{arm} {each['mean']:+.3f} ± {each['high'] - each['mean']:.3f}" for arm, each in study["differences"].items()
    )
    warmup = study["config"]["optimizer"]["warmup_steps"]
    passes = ended["tokens"] / study["text_tokens"]
    mean = lambda arm: sum(run["eval_loss"] for run in arms[arm].values()) / len(arms[arm])
    step = 1e3 * study["bench"]["step_seconds"]["median"]
    read = f"{ended['tokens'] / 1e6:.1f} million tokens of English prose, documentation and Python"
    batch = study["config"]["data"]["batch_size"]
    sentences = (
        f"`configs/studies/g43.yaml` cut to {ended['step']} steps ({warmup} of warmup) of {batch} sequences, on "
        f"{study['machine']} ({step:.0f} ms a step): after {read}, {passes:.1f} passes over the text, {baseline} ends "
        f"at {mean(baseline):.3f} nats a token held out.",
        f"Held-out loss less that of {baseline}, over {least} seeds: {about}; ± is half of a 95 % "
        "interval, each by itself.",
        "Every arm has the same learning rates, none of them tuned. The tables were not analysed.",
    )
    return " ".join(sentences) + "\n"


def diagnosed() -> str:
    """What `benchmarks/diagnosis.py` found of the quick study's runs."""
    found = json.loads((RESULTS / "diagnosis.json").read_text(encoding="utf-8"))
    heads = ["Arm", "Table", "Position", "Frequency, R²", "Lookup at 4 bits, nats a token", "Prediction at 4 bits"]
    rows = []
    for arm, of in found["arms"].items():
        for role in ("shared", "input", "output"):
            if f"{role} position" in of:
                costs = [
                    numbers.spread(of[f"4 bits {use}"]) if role in ("shared", use) else numbers.NONE
                    for use in ("input", "output")
                ]
                cells = (f"{role} position", f"{role} frequency R2")
                rows.append([arm, role, *(numbers.spread(of[name]) for name in cells), *costs])
    lens = [f"{numbers.signed(of['lens less rotated, bits'])} in {arm}" for arm, of in found["arms"].items()]
    regret = [f"{numbers.spread(of['regret both'], 4)} in {arm}" for arm, of in found["arms"].items()]
    seeds = len(found["runs"][next(iter(found["runs"]))])
    versions, tokens = found["versions"], found["regret"]["fitting_tokens"]
    made = f"{found['machine']}, {found['date']}, Python {versions['python']}, jax {versions['jax']}"
    lines = [
        *table(heads, rows),
        "",
        f"Bits that looked-up vectors take through the output table less those by rotated ones: {', '.join(lens)}.",
        f"Nats a held-out token that a table for each role saves after the tables’ own re-fit: {', '.join(regret)}.",
        "",
        f"± is half of a 95 % interval over {seeds} seeds; tables are re-fitted on {tokens:,} tokens instead of 65,536 "
        f"({made}).",
    ]
    return "\n".join(lines) + "\n"


def regrets() -> str:
    """What `tiedjax study quick --analyse-only --instruments regret` found: `regret` of its results.json, as saved."""
    found = json.loads((RESULTS / "regret_study.json").read_text(encoding="utf-8"))
    about = found["environment"]
    lines = [f"* {sentence}" for sentence in regret.answers(found)]
    made = f"{found['machine']}, {about['date']}, jax {about['packages']['jax']}"
    return "\n".join([f"Of the quick study ({made}):\n", *lines, "", regret.about(found)]) + "\n"


def smollm2() -> str:
    """What `smollm2.py` found of a quantised SmolLM2, a row each, with what of the model it is about."""
    found = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))
    by_name = found["instruments"]
    quantised = {"body": OF_BOTH, "table": "8-bit table"}
    if found["stored"] != "Q4_1 body, Q8_0 table":
        raise SystemExit(f"smollm2.json: is of a {found['stored']}; say anew how many bits that is")
    rows = [["`inspect`", *_inspected(found["inspect"], quantised["body"])]]
    for name, (part, sentence) in SMOLLM2.items():
        rows.append([f"`{name}`", quantised[part], sentence(by_name[name])])
    text = by_name["norms"]["measured_on"]
    lines = [
        *table(["Command", "Of", "Finds"], rows),
        "",
        f"{found['file']} on the embedded corpus ({text['training_tokens']:,} training and {text['held_out_tokens']:,} "
        f"held-out tokens in windows of {text['seq_len']}), on a {found['machine']} ({found['date']}, Python "
        f"{found['python']}, jax {found['jax']}). A number after ± is half a 95 % interval.",
    ]
    return "\n".join(lines) + "\n"


def smollm2_diagnosed() -> str:
    """What `diagnose` says of it part by part, what every state predicts, and both pictures."""
    found = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))
    d, lens = (found["instruments"][name] for name in ("diagnose", "lens"))
    rows, lines = [], []
    for part in diagnosis_words.parts(d):
        of = OF_BOTH if part.name in ("lens", "rounding") else "8-bit table"
        if part.not_measured:
            rows.append([part.title, numbers.NONE, f"Not measured: {part.not_measured}", numbers.NONE])
            continue
        rows.append([part.title, of, " ".join(part.found), " ".join(part.null)])
        lines.append(f"* {part.title}. It says {part.claims}. It cannot say {part.limits}.")
    seconds = lambda name: f"{found['instruments'][name]['seconds']:.0f} s"
    return "\n".join(
        [
            f"**{diagnosis_words.headline(d)}** (8-bit table)",
            "",
            "![The table's position, between tables that look up and tables that predict](smollm2_position.png)",
            "",
            *table(["Part", "Of", "Finds", "Null"], rows),
            "",
            *lines,
            "",
            "![Bits a held-out token that each hidden state costs by the logit lens](smollm2_lens.png)",
            "",
            *(f"* {sentence} ({OF_BOTH})" for sentence in _by_states(lens)),
            "",
            f"`diagnose` on {d['text']}; bits and nats on {d['lens']['held_out_windows']} held-out windows, of which "
            f"intervals are wide. `lens` on {lens['held_out_windows']} windows of {lens['measured_on']['seq_len']}. "
            f"They took {seconds('diagnose')} and {seconds('lens')} on a {found['machine']} ({found['date']}, Python "
            f"{found['python']}, jax {found['jax']}).\n",
        ]
    )


def _by_states(lens: dict[str, Any]) -> list[str]:
    """What the logit lens reads, and from which layer on it is better than counting."""
    states, without = lens["states"], lens["baselines"]
    bits = lambda state: numbers.spread(state["logit"]["cross_entropy"], 2)
    first = lambda span: next(s["name"] for s in states if s["logit"]["cross_entropy"]["mean"] < span["mean"])
    unigram, trigram = without["unigram"]["cross_entropy"], without["trigram_cross_entropy"]
    return [
        f"By the logit lens a held-out token costs {bits(states[0])} bits at the input and {bits(states[-1])} in the "
        "end.",
        f"The first state that predicts better than the unigram ({numbers.number(unigram['mean'], 2)} bits) is that "
        f"after {first(unigram)}, than the trigram ({numbers.number(trigram['mean'], 2)} bits) that after "
        f"{first(trigram)}.",
    ]


def _inspected(about: dict[str, Any], quantised: str) -> list[str]:
    tie = "tied: one table" if about["tied"] else "untied: two tables"
    share = about["table_parameters"] / about["parameters"]
    shape = f"{about['rows']:,} rows of width {about['width']}"
    return [quantised, f"{tie} of {shape}, {share:.1%} of {about['parameters']:,} parameters"]


def _by_frequency(found: dict[str, Any]) -> str:
    error, of = found["top_error"], {group["name"]: group for group in found["strata"]}
    rare, frequent = (numbers.number(of[name]["log2_ratio"]["score"], 2) for name in ("rare", "frequent"))
    return (
        f"The likeliest token is right at {numbers.percent(found['accuracy'])} of the positions. Calibration error "
        f"{numbers.number(error['score'])}, by chance {numbers.number(error['floor'])}. log2 of predicted over actual "
        f"share: {rare} for rare tokens, {frequent} for frequent ones"
    )


def _norms(found: dict[str, Any]) -> str:
    rank, probe = found["norm"]["spearman"], found["log_frequency"]
    span = {"mean": rank["score"], "low": rank["low"], "high": rank["high"]}
    return (
        f"Rank correlation of a row's norm with its token's count: {numbers.spread(span)}. A linear probe reads the "
        f"logarithm of the count with an R² of {numbers.number(probe['corrected'], 2)}"
    )


def _contexts(found: dict[str, Any]) -> str:
    (role,) = found["roles"].values()
    before, after = (numbers.number(role[name]["corrected"]) for name in ("as_target", "as_context"))
    return (
        f"Its cosines follow what precedes a token ({before}) and what follows it ({after}); the first less the "
        f"second: {numbers.spread(role['difference'])}"
    )


def _nearest(found: dict[str, Any]) -> str:
    (nearest,), texts = found["nearest"], found["texts"]
    words = lambda ids: ", ".join(texts[str(i)] for i in ids[:3])
    return "; ".join(f"{texts[str(near['token'])]}: {words(near['neighbours'])}" for near in nearest)


def _skipped(found: dict[str, Any]) -> str:
    costs = {block["block"]: block["whole"]["skip_cost"] for block in found["blocks"]}
    most = max(costs, key=lambda block: costs[block]["mean"])
    middle = median(cost["mean"] for cost in costs.values())
    return (
        f"Without block {most} of {len(costs)} a token costs {numbers.spread(costs[most], 2)} bits more, the most; the "
        f"median block is worth {numbers.number(middle, 2)} bits"
    )


def _beside_ngrams(found: dict[str, Any]) -> str:
    model, trigram = (found["losses"][name] for name in ("model", "trigram"))
    return (
        f"A held-out token costs {numbers.spread(model['bits'], 2)} bits, {numbers.number(model['bits_per_byte'], 2)} "
        f"a byte; by a trigram counted on the training part {numbers.spread(trigram['bits'], 2)}"
    )


# What each instrument is about, and what is said of what it finds.
SMOLLM2: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "hurdles": ("body", _beside_ngrams),
    "calibration": ("body", _by_frequency),
    "blocks": ("body", _skipped),
    "norms": ("table", _norms),
    "cooccurrence": ("table", _contexts),
    "map": ("table", _nearest),
}


def pages() -> dict[Path, str]:
    """README.md and the pages of docs/ with numbers, as the saved results want them."""
    of = {name: json.loads(saved(name).read_text(encoding="utf-8")) for name in STUDIES}
    blocks = {
        ROOT / "README.md": {
            "answer": answer(of["small"]),
            "decision": "".join(f"* {line}\n" for line in decision_verdicts.said(decision())),
            "small study": findings("small", of["small"], at_once(of["small"])),
            "quick study": findings("quick", of["quick"], at_once(of["quick"])),
            "rates study": findings("rates", of["rates"], in_parts(of["rates"])),
            "g43 study": larger(),
            "mechanism study": mechanism(of["mechanism"], at_once(of["mechanism"])),
            "costs": cost_rows(),
        },
        ROOT / "docs" / "instruments.md": {"regrets": regrets()},
        ROOT / "docs" / "models.md": {
            "SmolLM2": smollm2(),
            "SmolLM2 diagnosis": smollm2_diagnosed(),
            "diagnosis": diagnosed(),
        },
        ROOT / "docs" / "schemes.md": {
            f"{name} study": between(name, of[name], in_parts(of[name])) for name in ("schemes", "untie")
        }
        | {
            "initialisation study": between("initialisation", of["initialisation"], at_once(of["initialisation"])),
            "shape studies": shapes(of),
        },
        ROOT / "docs" / "deciding.md": {"decision": decided()},
        ROOT / "docs" / "speed.md": {
            "CPU and TPU costs": costs(),
            "GPU costs": gpu_costs(),
            "GPU bounds": gpu_bounds(),
        },
    }
    return {page: _filled(page.read_text(encoding="utf-8"), contents) for page, contents in blocks.items()}


def _filled(text: str, blocks: dict[str, str]) -> str:
    for name, content in blocks.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, help=f"a finished study ({', '.join(STUDIES)}), or a decision")
    parser.add_argument("--machine", help="what it ran on, in words")
    args = parser.parse_args()
    if args.study:
        if not args.machine:
            parser.error("--machine: say in words what the study ran on")
        (save_decision if (args.study / decision_page.RECORD).exists() else save)(args.study, args.machine)
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
