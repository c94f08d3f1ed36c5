"""The command line. Heavy imports wait until a command runs, so that help answers at once."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tiedjax
from tiedjax.analysis import command as analyze_command
from tiedjax.config import RunConfig, StudyConfig, leaf_fields
from tiedjax.config_errors import meant_key
from tiedjax.config_files import find_config, load_run_config, packaged_configs
from tiedjax.data import command as data_command
from tiedjax.errors import Status, TrainingError, UserError
from tiedjax.files import local_path, place_and_step, write_atomically
from tiedjax.host import ending, platform_flags, signals, storage
from tiedjax.text import nearest, seconds


class _Parser(argparse.ArgumentParser):
    """Its usage is one line with what must be given: argparse's own would show every key of a config.

    What it parses holds the parser of the innermost command as `parser`.
    """

    def __init__(self, **kwargs: Any):
        self._required: list[str] = []
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.set_defaults(parser=self)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As argparse's; shown in the usage unless it is an option that may be left out."""
        action = super().add_argument(*names, **kwargs)
        if not action.option_strings:
            self._show(f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar), "[options]")
        elif action.required:
            self._show(f"{action.option_strings[0]} {action.metavar}", "[options]")
        return action

    def add_subparsers(self, **kwargs: Any) -> Any:
        """As argparse's."""
        self._show(kwargs["metavar"], "...")
        return super().add_subparsers(prog=self.prog, **kwargs)

    def _show(self, word: str, end: str) -> None:
        self._required.append(word)
        self.usage = " ".join(["%(prog)s", *self._required, end])

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        if choice := re.match(r"argument (\w+): invalid choice: '(.*?)'.*\(choose from (.*)\)", message):
            name, given, valid = choice[1], choice[2], re.findall(r"[\w-]+", choice[3])
            raise UserError(f"{name}: must be one of {', '.join(valid)}; got {given!r}{nearest(given, valid)}")
        raise UserError(f"{message}; {self.format_usage().strip()} (see {self.prog} --help)")

    def unexpected(self, word: str) -> UserError:
        """What to raise for a word that nothing takes."""
        written = word.split("=")[0]
        name, options = written.lstrip("-"), re.findall(r"^  (?:-\w, )?--([\w.-]+)", self.format_help(), re.MULTILINE)
        if not written.startswith("-") and name not in options:
            return UserError(f"unexpected argument {word!r}; {self.format_usage().strip()} (see {self.prog} --help)")
        meant = meant_key(name, options)
        hint = f"did you mean '--{meant}'?" if meant else f"{self.prog} --help lists all"
        return UserError(f"unknown option {written!r}; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit `Status`. Signals are heard from before JAX is imported."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have the characters that a model writes
    try:
        with signals.hearing():
            args = _parse(sys.argv[1:] if argv is None else list(argv))
            if args.run is _check:
                platform_flags.use_cpu()  # what trains the run may hold the accelerator
            # Before any command imports JAX.
            (platform_flags.apply_for_absent if args.run is _compile else platform_flags.apply)()
            status: int = args.run(args)
            return status
    except signals.Stopped as stopped:
        ending.abandon_threads()
        return _fail(str(stopped), stopped.status)
    except (UserError, TrainingError) as error:
        return _fail(" ".join(str(error).split()), error.status)
    except BrokenPipeError:  # who reads what is printed has seen enough
        return Status.FAILED
    except Exception as error:
        if line := storage.failure(error):
            return _fail(line, Status.FAILED)
        if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
            return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}", Status.FAILED)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # what has a name says it
            return _fail(f"standard output: cannot be written: {error.strerror}", Status.FAILED)
        raise


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="tiedjax", description=tiedjax.__doc__)
    parser.add_argument("--version", action="version", version=f"tiedjax {importlib.metadata.version('tiedjax')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def new(name: str, meaning: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=meaning, description=meaning)
        sub.set_defaults(run=run)
        return sub

    _add_study(new("study", "train every run of a study, analyse them, write the report", _study))

    _add_decide(new("decide", "should I tie, when, at what cost: train a ladder, write the answer page", _decide))

    train = new("train", "train one run, or continue it", _train)
    named = ", ".join(packaged_configs("run"))
    train.add_argument("config", metavar="CONFIG", help=f"run config: a file, or a name of these: {named}")
    train.add_argument("--out", metavar="DIR", help="run directory; default: runs/NAME")
    train.add_argument(
        "--profile-steps", metavar="A:B", help="write an XLA trace of steps A to B, both included, into DIR/profile"
    )
    _add_cluster(train)
    _add_overrides(train)

    bench = new("bench", "measure a config's train step: tokens per second, FLOP utilisation, memory", _bench)
    bench.add_argument("config", metavar="CONFIG", help="run config, as for train; its data is not read")
    bench.add_argument("--steps", type=int, default=50, metavar="N", help="steps measured, after a warm-up [50]")
    bench.add_argument("--json", metavar="FILE", help="save the result here")
    _add_cluster(bench)
    _add_overrides(bench)

    compile_ = new("compile", "compile a train step for TPUs or GPUs that are not there: memory, traffic", _compile)
    compile_.add_argument("config", metavar="CONFIG", help="run config, as for train; its data is not read")
    compile_.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="what to compile for: v5p:4x4x4, v6e:8x8, ... (slices of TPUs); h100:8, h200:2x8, ... (GPUs of one host; "
        "hosts x GPUs); 2*v5p:4x4x4, 2*h100:8, ... (slices joined by a data-centre network)",
    )
    compile_.add_argument("--json", metavar="FILE", help="save the result here")
    _add_overrides(compile_)

    data_command.add_arguments(new("data", "prepare text for training", data_command.run))
    analyze_command.add_arguments(new("analyze", "run one instrument on tables or runs", analyze_command.run))

    _add_diagnose(new("diagnose", "what tying did to one model, without a twin", _diagnose))

    sample = new("sample", "print what a trained model writes", _sample)
    sample.add_argument("directory", metavar="RUN", help="a run directory, or RUN@STEP for an earlier checkpoint")
    sample.add_argument(
        "--prompt", default="", metavar="TEXT", help="how the document begins; needs a run with a tokenizer [nothing]"
    )
    sample.add_argument("--tokens", type=int, default=100, metavar="N", help="tokens written after it [100]")
    sample.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="logits are divided by it; 1: the model's own probabilities, 0: the likeliest token each time [1]",
    )
    sample.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws: the same, the same text [0]")

    inspect = new("inspect", "what a Hugging Face model directory holds, and whether its tables are one", _inspect)
    inspect.add_argument("directory", metavar="DIR", help="a local directory with config.json and weights")
    inspect.add_argument("--json", metavar="FILE", help="save the result here")
    inspect.add_argument("--config", metavar="FILE", help="write the config of a run that begins with this model here")

    import_ = new("import", "write a GGUF file of llama.cpp as a Hugging Face directory", _import)
    import_.add_argument("file", metavar="FILE.gguf", help="a Llama with a byte-level BPE; needs tiedjax[gguf]")
    import_.add_argument("--out", metavar="DIR", required=True, help="a new directory")

    export = new("export", "write a run's model as a Hugging Face directory", _export)
    export.add_argument(
        "source", metavar="RUN[@STEP]", help="a run, at its last checkpoint or another; or a model's DIR"
    )
    export.add_argument("--out", metavar="DIR", required=True, help="a new directory")
    export.add_argument("--untie", action="store_true", help="write both tables, equal now, where there is one")

    check = new("check", "read everything that a run has saved, and say what of it is damaged", _check)
    check.add_argument("directory", metavar="RUN", help="a run directory; nothing in it is changed")
    check.add_argument("--json", metavar="FILE", help="save what was found here")

    report = new("report", "redraw the report of a study, or the page of a decision, from saved results", _report)
    report.add_argument("directory", metavar="DIR", help="directory of a study or a decision")

    args, unknown = parser.parse_known_args(list(_joined(argv)))
    if unknown:
        raise args.parser.unexpected(unknown[0])
    return args


def _joined(argv: list[str]) -> Iterator[str]:
    """Writes `--section.key -1` as `--section.key=-1`: argparse takes a negative number such as -1e-3 for an option."""
    rest = iter(argv)
    for arg in rest:
        following = next(rest, None) if re.fullmatch(r"--\w+\.\w+", arg) else None
        if following is None:
            yield arg
        elif re.match(r"-[\d.]", following):
            yield f"{arg}={following}"
        else:
            yield from (arg, following)


def _add_study(study: argparse.ArgumentParser) -> None:
    named = ", ".join(packaged_configs("study"))
    study.add_argument("config", nargs="?", metavar="STUDY", help=f"study file, or a name of these: {named} [quick]")
    study.add_argument("--out", metavar="DIR", help="study directory; default: studies/NAME")
    study.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs trained side by side on a CPU; default: one for every train.threads cores",
    )
    study.add_argument("--train-only", action="store_true", help="train, and leave the analysis for later")
    study.add_argument("--analyse-only", action="store_true", help="analyse the runs that are trained, and train none")
    study.add_argument(
        "--instruments",
        metavar="A,B",
        help="analyse with these alone, beside what the answer needs; default: all but slow ones, and those of "
        "slow_instruments in the study file",
    )
    study.add_argument(
        "--time-limit",
        metavar="TIME",
        help="stop training after so long (90s, 8m, 1.5h), between two steps, analyse what is trained and exit with "
        "status 75; the same command continues",
    )
    study.epilog = "keys of a study file:\n" + "\n".join(f"  {f.key}: {f.meaning}" for f in leaf_fields(StudyConfig))
    _add_cluster(study)
    _add_overrides(study)


def _add_decide(decide: argparse.ArgumentParser) -> None:
    named = ", ".join(packaged_configs("run"))
    decide.add_argument(
        "config", nargs="?", metavar="CONFIG", help=f"run config: a file, or a name of these: {named} [quick]"
    )
    decide.add_argument("--out", metavar="DIR", help="directory of the decision; default: decisions/NAME")
    decide.add_argument(
        "--widths",
        metavar="A,B",
        help="model widths; default: the config's own, which is always tried, 3/4 and 3/2 of it",
    )
    decide.add_argument(
        "--rates",
        default="0.5,1,2",
        metavar="A,B",
        help="what each arm tries: factors of the config's rate of the tables [0.5,1,2]",
    )
    decide.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds of the runs that are compared [5]")
    decide.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="runs trained side by side on a CPU; default: one for every train.threads cores",
    )
    decide.add_argument(
        "--time-limit",
        metavar="TIME",
        help="stop training after so long (90s, 8m, 1.5h), between two steps, and exit with status 75; the same "
        "command continues",
    )
    decide.epilog = (
        "trains tied, untied, and tied for two thirds of the steps, each at its best of some rates of the tables,\n"
        "at every width; at the config's own also a tied model with as many parameters as untied, and untied for\n"
        "the time that tied takes"
    )
    _add_overrides(decide)


def _add_diagnose(diagnose: argparse.ArgumentParser) -> None:
    diagnose.add_argument("directory", metavar="MODEL", help="a run directory, RUN@STEP, or a Hugging Face DIR")
    diagnose.add_argument(
        "--text",
        metavar="GLOB",
        help="text files (.txt, .jsonl) that a Hugging Face DIR is measured on, or a source as data.source names one "
        "[embedded]; of a run, where its text lies now",
    )
    diagnose.add_argument(
        "--seq-len", type=int, metavar="T", help="positions of a window of the text of a DIR [all it has, at most 512]"
    )
    diagnose.add_argument(
        "--held-out-tokens", type=int, metavar="N", help="held-out tokens that lens and rounding score [4096 each]"
    )
    diagnose.add_argument(
        "--no-regret",
        action="store_true",
        help="leave out the re-fits: minutes of a small run, days of a large model on a CPU; of a DIR without --text "
        "they are left out",
    )
    diagnose.add_argument("--json", metavar="FILE", help="save the numbers here")
    diagnose.add_argument("--out", metavar="DIR", help="write the page, diagnosis.html, and its figure here")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes", "SLURM, MPI and TPU slices are recognised without these")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat",
        type=float,
        metavar="SECONDS",
        help="end all when one of them has been silent for so long, at least 1 [60]",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for field in leaf_fields(RunConfig):
        section = field.key.split(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section} (override the config file)")
        default = "null" if field.default is None else str(field.default).lower()
        meaning = f"{field.meaning} [{default}]".replace("%", "%%")
        kind = re.sub(r"Literal\[(.*?)\]", r"\1", field.type).replace('"', "")
        groups[section].add_argument(
            f"--{field.key}", dest=f"set {field.key}", metavar=f"<{kind}>", default=argparse.SUPPRESS, help=meaning
        )


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    return {name.removeprefix("set "): text for name, text in vars(args).items() if name.startswith("set ")}


def _train(args: argparse.Namespace) -> int:
    path = find_config(args.config, "run")
    cfg = load_run_config(path, _overrides(args))

    from tiedjax.host.profiling import StepRange

    out = storage.place(args.out or f"runs/{path.stem}", "--out")
    platform_flags.use_threads(cfg.train.threads)
    profile = None if args.profile_steps is None else StepRange.parse(args.profile_steps)
    return _with_cluster(args, lambda loop: loop.train(cfg, out, profile=profile))


def _study(args: argparse.Namespace) -> int:
    from tiedjax import plan as plans
    from tiedjax import study
    from tiedjax.host import launched

    path = find_config(args.config, "study") if args.config else packaged_configs("study")["quick"]
    plan = plans.load_study(path, _overrides(args))
    out = storage.place(args.out or f"studies/{path.stem}", "--out")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: must be at least 1, got {args.workers}")
    extent = _extent(args, plan.study)
    alone = args.processes is None and launched.told() is None
    workers = study.workers_for(plan, args.workers) if alone else 1
    if workers == 1:
        platform_flags.use_threads(plan.threads)
    return _with_cluster(args, lambda _: study.run_study(plan, out, workers, extent), unfinished=Status.AGAIN)


def _decide(args: argparse.Namespace) -> int:
    from tiedjax import decide, study
    from tiedjax.host import launched

    path = find_config(args.config, "run") if args.config else packaged_configs("run")["quick"]
    widths = None if args.widths is None else _numbers(args.widths, int, "--widths", "whole numbers", "48,64,96")
    rates = _numbers(args.rates, float, "--rates", "numbers", "0.5,1,2")
    ladder = decide.load_ladder(path, _overrides(args), widths, args.seeds, rates)
    out = storage.place(args.out or f"decisions/{path.stem}", "--out")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: must be at least 1, got {args.workers}")
    limit = None if args.time_limit is None else seconds(args.time_limit, "--time-limit")
    if launched.told():
        raise UserError("decide: runs in one process; start it by itself, or train its studies with `tiedjax study`")
    plan = ladder.plan(ladder.own)
    workers = study.workers_for(plan, args.workers)
    if workers == 1:
        platform_flags.use_threads(plan.threads)

    def work(_: Any) -> Any:
        from tiedjax.cost.bench import step_ratio

        return decide.decide(ladder, out, workers, limit, step_ratio)

    return _with_cluster(args, work, unfinished=Status.AGAIN)


def _numbers(text: str, kind: Callable[[str], Any], where: str, what: str, example: str) -> list[Any]:
    """Numbers of a kind between commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{where}: must be {what} between commas, such as {example}; got {text!r}") from None


def _extent(args: argparse.Namespace, config: StudyConfig) -> Any:
    from tiedjax.study import Extent

    if args.train_only and args.analyse_only:
        raise UserError("--train-only and --analyse-only leave nothing to do; give one of them")
    instruments = None if args.instruments is None else tuple(args.instruments.split(","))
    if instruments is not None or config.slow_instruments:
        from tiedjax.analysis.study.results import parts_of

        parts_of(config, instruments)  # refuses unknown names before anything is trained
    limit = None if args.time_limit is None else seconds(args.time_limit, "--time-limit")
    return Extent(not args.analyse_only, not args.train_only, instruments, limit)


def _json_file(args: argparse.Namespace) -> Path | None:
    path = local_path(args.json, "--json") if args.json else None
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json: must be a file in a folder that exists, got {path}")
    return path


def _bench(args: argparse.Namespace) -> int:
    cfg = load_run_config(find_config(args.config, "run"), _overrides(args))
    json_file = _json_file(args)
    platform_flags.use_threads(cfg.train.threads)

    def measure(_: Any) -> None:
        from tiedjax.cost import bench

        bench.report(bench.bench(cfg, args.steps), json_file)

    return _with_cluster(args, measure)


def _compile(args: argparse.Namespace) -> int:
    cfg = load_run_config(find_config(args.config, "run"), _overrides(args))
    json_file = _json_file(args)
    from tiedjax.cost.compile import run

    return run(cfg, args.topology, json_file)


def _with_cluster(args: argparse.Namespace, work: Callable[[Any], Any], unfinished: int = 0) -> int:
    """The exit status of `work` in the cluster that the arguments name; `unfinished` is that of what stop_at ends."""
    import jax

    from tiedjax import loop
    from tiedjax.host import process

    named = [vars(args).get(name) for name in ("coordinator", "processes", "process_id", "heartbeat")]
    process.join_cluster(*named)
    try:
        outcome = work(loop)
        if outcome and outcome.signal:
            print(f"tiedjax: {signals.sentence(outcome.signal.name)}", file=sys.stderr)
        process.part_from_cluster_if_any()
    except BaseException as error:  # whatever ends this process, a signal too, the others wait until they are told
        why = process.cause(error)
        if not why.enough and jax.process_count() > 1:
            traceback.print_exc()
        process.end_cluster_if_any(why)
        if isinstance(error, signals.Stopped) or not why.enough:
            raise
        return _fail(why.line, why.status)
    if outcome and outcome.stopped:
        return Status.AGAIN
    return unfinished if outcome and not outcome.finished else 0


def _fail(line: str, status: int) -> int:
    print(f"tiedjax: {line}", file=sys.stderr, flush=True)
    return status


def _diagnose(args: argparse.Namespace) -> int:
    json_file = _json_file(args)
    out = local_path(args.out, "--out") if args.out else None
    if out and out.exists() and not out.is_dir():
        raise UserError(f"--out: must be a folder, or the name of a new one; {out} is a file")
    from tiedjax.analysis.basis.arguments import at_least, reporter
    from tiedjax.analysis.diagnosis import page, words
    from tiedjax.analysis.diagnosis.measure import diagnose, source_of

    report, source = reporter("diagnose"), source_of(args.text)
    if args.held_out_tokens is not None:
        at_least(args, "held-out-tokens")
    with_regret, held_out = not args.no_regret, args.held_out_tokens
    found = diagnose(args.directory, source, args.seq_len, with_regret=with_regret, held_out=held_out, report=report)
    print("\n".join(words.lines(found)))
    if json_file:
        write_atomically(json_file, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if out:
        print(f"\n{page.write(found, out)}")
    return Status.DONE


def _sample(args: argparse.Namespace) -> int:
    place, step = place_and_step(args.directory)
    from tiedjax.run import load_run
    from tiedjax.sample import sample_text

    run, options = load_run(place), {"tokens": args.tokens, "temperature": args.temperature, "seed": args.seed}
    print(sample_text(run, args.prompt, step=step, **options))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    json_file = _json_file(args)
    from tiedjax.interop.inspection import config_for, inspect

    found = inspect(args.directory)
    config = config_for(args.directory) if args.config else ""
    print("\n".join(found.lines()))
    if json_file:
        write_atomically(json_file, json.dumps(found.tree(), indent=1) + "\n")
    if args.config:
        write_atomically(local_path(args.config, "--config"), config)
    return Status.DONE


def _import(args: argparse.Namespace) -> int:
    from tiedjax.interop.gguf import import_gguf

    print(import_gguf(args.file, args.out).line())
    return Status.DONE


def _export(args: argparse.Namespace) -> int:
    from tiedjax.interop.export import export

    print(export(args.source, args.out, untie=args.untie).line())
    return Status.DONE


def _check(args: argparse.Namespace) -> int:
    json_file = _json_file(args)
    from tiedjax.check import check

    checked = check(args.directory)
    print("\n".join(checked.lines()))
    if json_file:
        write_atomically(json_file, json.dumps(checked.tree(), indent=1) + "\n")
    return Status.DONE if checked.whole else Status.NO_CHECKPOINT


def _report(args: argparse.Namespace) -> int:
    directory = storage.place(args.directory, "DIR")
    decided = storage.exists(directory / "decision.json")
    name, writer = ("decision.json", "decide") if decided else ("results.json", "study")
    try:
        if decided:
            from tiedjax.decide import draw_decision

            print(draw_decision(directory))
        else:
            from tiedjax.study import draw_report

            print(draw_report(directory))
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:  # of values of other kinds
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{directory / name}: does not hold what this version draws ({what}); `tiedjax {writer}` writes it anew"
        ) from error
    return 0
