"""`tiedjax diagnose`: every sentence from a record with distinct numbers, a run and its export, what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from runs import arguments
from test_interop_instruments import assert_alike

import tiedjax
from tiedjax import cli
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.held_out import FrozenModel
from tiedjax.analysis.basis.plain_json import to_plain
from tiedjax.analysis.basis.run_data import data_of
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.basis.tables import content_hash
from tiedjax.analysis.diagnosis import measure as module
from tiedjax.analysis.diagnosis import page, words
from tiedjax.analysis.instruments.cooccurrence.cooccurrence import Cooccurrence, Partial
from tiedjax.analysis.instruments.lens.rotation import InputLens
from tiedjax.analysis.instruments.norms.norms import Curve, Norms
from tiedjax.analysis.instruments.regret.regret import RunRegret, Saving
from tiedjax.analysis.instruments.rounding.rounding import Cost, Rounding
from tiedjax.errors import UserError
from tiedjax.interop.export import export

N = "\u00a0"
PARTS = ("cooccurrence", "norms", "lens", "rounding", "regret")


def span(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half, 9, 0.95)


def score(value: float, half: float, floor: float, deviation: float) -> Score:
    ends = {"low": value - half, "high": value + half}
    return Score(value, floor, floor_deviation=deviation, floor_draws=4, rows=30, **ends)


def agreement(position: Interval, by: float = 0) -> Cooccurrence:
    target, context = score(0.31 + by, 0.02, 0.001, 0.004), score(0.12 + by, 0.03, -0.002, 0.005)
    return Cooccurrence(30, 0, 8, target, context, span(0.7, 0.1), {}, Partial(target, context, position))


def norms(r2: float, rank: float) -> Norms:
    curve = Curve(1.0, score(rank, 0.04, 0, 0.2), [])
    return Norms(30, 30, 8, curve, curve, curve, score(r2, 0.01, -0.013, 0.006))


def regret(**changes: Any) -> RunRegret:
    saving = lambda mean, half, done=True: Saving(span(mean, half), {}, 0.1, 9, done)
    found = RunRegret(
        shared=True, loss=span(4, 0.1), own=saving(0.051, 0.007), trained_balance=0.023, balance=-0.987,
        regrets={"input": saving(0.013, 0.002), "output": saving(0.017, 0.003), "both": saving(0.029, 0.004)},
        hold=128, fitting_tokens=512, held_out_tokens=256, held_out_windows=16, step=60, rows=320, width=8,
    )  # fmt: skip
    return replace(found, **changes)


def record(**changes: Any) -> dict[str, Any]:
    """A tied one; numbers that no two places share."""
    costs = [
        Cost(bits, use, 0.1, score(0.001 * i, 0.0002 * i, 0.0007 * i, 0.0001), span(0, 1))
        for i, (bits, use) in enumerate(((b, u) for b in (8, 4) for u in ("input", "output", "both")), start=1)
    ]
    lens = InputLens(score(9, 1, 8, 1), score(29.6, 0.4, 16.7, 0.5), span(12.9, 0.6), span(6.2, 0.3), 256, 16)
    d: dict[str, Any] = {
        "kind": "diagnosis", "schema": 1, "inputs": [], "name": "runs/one", "step": 60, "shared": True, "rows": 320,
        "width": 8, "text": "embedded (1,000 training and 90 held-out tokens, windows of 16)", "references": None,
        "reference_sizes": [2048],
        "cooccurrence": {"text": {}, "roles": {"shared": agreement(span(0.19, 0.036))}},
        "norms": {"roles": {"shared": norms(0.83, -0.41)}},
        "lens": lens,
        "rounding": Rounding(60, 320, 8, True, span(4, 1), costs, 3, 256, 16),
        "regret": regret(),
    }  # fmt: skip
    return json.loads(json.dumps(to_plain(d | changes)))


REFERENCES = {
    "study": "quick", "seeds": 5,
    "position": {"input": to_plain(span(-0.25, 0.011)), "output": to_plain(span(0.24, 0.012))},
    "frequency": {"input": to_plain(span(0.12, 0.021)), "output": to_plain(span(0.87, 0.031))},
    "regret": to_plain(span(0.0001, 0.0006)) | {"fitting_tokens": 512, "held_out_tokens": 256, "n": 5},
}  # fmt: skip

TIED = f"""\
runs/one at step 60: one table for both roles, 320 rows of width 8; measured on embedded (1,000 training and 90 \
held-out tokens, windows of 16).
The shared table agrees more with what precedes a token than with what follows it, as tables that predict do: its \
position is +0.190{N}±{N}0.036.

Position: what precedes a token, or what follows it
  The shared table’s cosines correlate with what precedes a token at 0.310{N}±{N}0.020 and with what follows it at \
0.120{N}±{N}0.030, each with the other held fixed.
  The shared table agrees more with what precedes a token than with what follows it, as tables that predict do: its \
position is +0.190{N}±{N}0.036.
  Null: Permuted tokens give the shared table 0.001 and −0.002, with a standard deviation of 0.005. There is no \
reference for tables of 320 rows: our own untied runs have 2,048.
  It says which contexts of this text the table’s cosines follow: tables that predict follow what precedes a token, \
tables that look up what follows it.
  It cannot say which role wrote the table, or what that costs; on other text the numbers are others.

Frequency: a direction of the table
  A linear probe reads log10 of a token’s count from the shared table with a cross-validated R² of 0.830.
  The norms of its rows have a rank correlation with the counts of −0.410{N}±{N}0.040.
  Null: Permuted counts give the shared table’s probe −0.013 ± 0.006.
  It says how much of a token’s frequency in this text a linear direction of the table holds.
  It cannot say which role put it there: the tables of untied models hold some of it too.

Layer 0: what looked-up vectors predict
  Read by the output table, looked-up vectors predict the next token at 29.600{N}±{N}0.400 bits; the whole model takes \
6.200{N}±{N}0.300.
  Rotated output tables take 12.900{N}±{N}0.600 bits less: the tables share directions, but not towards the next token.
  Null: 4 random rotations of the output table’s columns give 16.700 bits, with a standard deviation of 0.500.
  It says whether looked-up vectors and output rows lie in one space, and whether that helps to predict the next token.
  It cannot say what any later layer holds, or what the model would do with another table.

Rounding: what fewer bits cost each role
  At 8 bits the lookup’s rows cost 0.0010{N}±{N}0.0002 nats a held-out token, the prediction’s rows \
0.0020{N}±{N}0.0004, and both 0.0030{N}±{N}0.0006.
  At 4 bits the lookup’s rows cost 0.0040{N}±{N}0.0008 nats a held-out token, the prediction’s rows \
0.0050{N}±{N}0.0010, and both 0.0060{N}±{N}0.0012.
  Null: Noise of the same norm in every row costs 0.0007, 0.0014 and 0.0021 at 8 bits. Noise of the same norm in \
every row costs 0.0028, 0.0035 and 0.0042 at 4 bits.
  It says how much precision each use of the table needs, with the body as it is.
  It cannot say what a scheme of quantisation that is fitted would cost, or that the tie is the cause.

Role regret: what a table of its own would save each role
  Re-fitting the shared table saves 0.051{N}±{N}0.007 nats a held-out token: what training left undone.
  With a table for each role a held-out token then costs 0.029{N}±{N}0.004 nats less: the tension of the roles.
  An output table alone saves 0.017{N}±{N}0.003 nats, an input table alone 0.013{N}±{N}0.002.
  The cosine of the two roles’ gradients is 0.023 as trained and −0.987 after the first re-fit.
  Null: Its null is an untied model, which has no tie to lose; we have none with as many rows, on as many tokens.
  It says what untying is worth to the finished body on this much text, once the tables are re-fitted.
  It cannot say what training untied from the start would have cost: the body has grown to its table."""


def said(**changes: Any) -> list[str]:
    return [line.strip() for line in words.lines(record(**changes))]


def test_every_sentence_of_a_tied_model() -> None:
    assert "\n".join(words.lines(record())) == TIED


def test_references_are_named_as_ours() -> None:
    null = [line for line in said(references=REFERENCES) if line.startswith("Null: ")]
    assert null[0].endswith(
        "Of our own untied runs with as many rows (study quick, 5 seeds, their own text), input tables lie at "
        f"−0.250{N}±{N}0.011 and output tables at +0.240{N}±{N}0.012."
    )
    assert null[1].endswith(
        f"The probe reads 0.120{N}±{N}0.021 from the input tables of our own untied runs, 0.870{N}±{N}0.031 from the "
        "output tables."
    )
    assert null[-1] == (
        "Null: Our own untied runs with as many rows, which have no tie to lose, save "
        f"0.000{N}±{N}0.001 nats by the same re-fits (5 seeds)."
    )
    other = REFERENCES | {"regret": {**REFERENCES["regret"], "fitting_tokens": 511}}  # type: ignore[dict-item]
    assert said(references=other)[-3].startswith("Null: Its null is an untied model")


def test_an_untied_model_is_a_control() -> None:
    roles = {"input": agreement(span(-0.23, 0.02), 0.1), "output": agreement(span(0.27, 0.05), 0.2)}
    lines = said(
        shared=False,
        step=None,
        cooccurrence={"text": {}, "roles": roles},
        norms={"roles": {"input": norms(0.7, 0.2), "output": norms(0.6, 0.3)}},
        regret=regret(shared=False, balance=None, trained_balance=None),
    )
    assert lines[0].startswith("runs/one: a table for each role, 320 rows of width 8; ")
    assert lines[1] == "runs/one has a table for each role: with no tie to lose, all that follows is a control."
    for line in [
        f"The input table’s cosines correlate with what precedes a token at 0.410{N}±{N}0.020 and with what follows it "
        f"at 0.220{N}±{N}0.030, each with the other held fixed.",
        "The input table agrees more with what follows a token than with what precedes it, as tables that look up do: "
        f"its position is −0.230{N}±{N}0.020.",
        "The output table agrees more with what precedes a token than with what follows it, as tables that predict "
        f"do: its position is +0.270{N}±{N}0.050.",
        "A linear probe reads log10 of a token’s count from the output table with a cross-validated R² of 0.600.",
        f"Re-fitting both tables saves 0.051{N}±{N}0.007 nats a held-out token: what training left undone.",
        f"From there another re-fit of both saves 0.029{N}±{N}0.004: the control, for there is no tie to lose.",
    ]:
        assert line in lines, line
    assert not [line for line in lines if "tension of the roles" in line]


def test_a_position_whose_interval_holds_0_is_undecided() -> None:
    assert said(cooccurrence={"text": {}, "roles": {"shared": agreement(span(0.01, 0.036))}})[1] == (
        "Whether the shared table agrees more with what precedes a token or with what follows it is undecided: its "
        f"position is +0.010{N}±{N}0.036."
    )


@pytest.mark.parametrize(
    ("less", "sentence"),
    [
        (
            span(-5.3, 0.4),
            f"Rotated output tables take 5.300{N}±{N}0.400 bits more: the tables share directions that help.",
        ),
        (
            span(0.9, 0.4),  # within two standard deviations of a rotation
            f"Whether rotated output tables predict otherwise is undecided: the difference is 0.900{N}±{N}0.400 bits.",
        ),
        (
            span(-3, 4),
            f"Whether rotated output tables predict otherwise is undecided: the difference is −3.000{N}±{N}4.000 bits.",
        ),
    ],
)  # fmt: skip
def test_what_rotations_say(less: Interval, sentence: str) -> None:
    lens = InputLens(score(9, 1, 8, 1), score(29.6, 0.4, 16.7, 0.5), less, span(6.2, 0.3), 256, 16)
    assert sentence in said(lens=lens)


def of_both(mean: float, half: float) -> dict[str, Saving]:
    return regret().regrets | {"both": Saving(span(mean, half), {}, 0.1, 9, True)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"own": replace(regret().own, converged=False), "balance": -0.42, "regrets": {}},
            "The re-fit of the shared table has not come to rest (balance −0.420, above −0.9): there is neither regret "
            "nor tension.",
        ),
        (
            {"own": replace(regret().own, converged=False), "balance": -0.95, "regrets": {}},
            "The re-fit of the shared table has not come to rest (loss): there is neither regret nor tension.",
        ),
        (
            {"regrets": {"both": replace(regret().own, converged=False)}},
            "A later re-fit has not come to rest: there is neither regret nor tension.",
        ),
        (
            {"regrets": of_both(0.002, 0.004)},
            f"Whether a table for each role then saves anything is undecided: 0.002{N}±{N}0.004 nats a held-out token.",
        ),
        (
            {"regrets": of_both(-0.012, 0.004)},
            f"With a table for each role a held-out token then costs 0.012{N}±{N}0.004 nats more.",
        ),
    ],
)
def test_tension_is_told_only_where_the_tables_have_come_to_rest(changes: dict[str, Any], sentence: str) -> None:
    lines = said(regret=regret(**changes))
    assert sentence in lines
    assert not [line for line in lines if "the tension of the roles" in line]


def test_what_was_not_measured_is_one_line_of_its_part() -> None:
    lines = said(**{name: {"not_measured": f"no {name}"} for name in PARTS})
    assert lines[1] == "runs/one has one table for both roles."
    assert [line for line in lines if "Not measured" in line] == [f"Not measured: no {name}" for name in PARTS]
    assert len(lines) == 2 + 3 * len(PARTS)


def test_the_page_says_what_the_command_prints_and_opens_offline(tmp_path: Path) -> None:
    d = record(references=REFERENCES, name="<script>runs</script>")
    written = page.write(d, tmp_path / "page")
    text = written.read_text(encoding="utf-8")
    plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'")
    for line in words.lines(d):
        stripped = line.strip().removeprefix("Null: ")
        assert stripped in plain, stripped
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert sorted(p.name for p in (tmp_path / "page").rglob("*.p*")) == ["position.pdf", "position.png"]
    for label in ("this shared table", "our untied input tables", "our untied output tables"):
        assert label in text
    without = record(**{name: {"not_measured": "nothing"} for name in PARTS})
    assert "<svg" not in page.write(without, tmp_path / "other").read_text(encoding="utf-8")


def test_a_small_position_is_drawn_on_the_scale_of_untied_tables() -> None:
    for position, reach in ((span(0.03, 0.02), page.LEAST_REACH), (span(0.4, 0.1), 0.5)):
        d = record(cooccurrence={"text": {}, "roles": {"shared": agreement(position)}})
        ax = matplotlib.figure.Figure().add_subplot()
        next(page.plots(d)).panels[0](ax, d)
        assert ax.get_xlim() == pytest.approx((-1.15 * reach, 1.15 * reach))


def test_references_come_with_the_package() -> None:
    known = module.references()
    assert list(known) == ["2048"]
    of = known["2048"]
    assert (of["study"], of["arm"], of["seeds"], of["config"]["model"]["vocab_size"]) == ("quick", "untied", 5, 2048)
    assert of["position"]["input"]["high"] < 0 < of["position"]["output"]["low"]
    assert abs(of["regret"]["mean"]) < 0.001


# ---- A run, and its export ----


@pytest.fixture(scope="module")
def pair(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("diagnosed")
    changes = {"data.holdout": 0.02, "data.batch_size": 16, "train.eval_batches": "null", "train.steps": 120}
    assert cli.main(arguments(folder / "run", text, {**changes, "optimizer.learning_rate": 0.02})) == 0
    export(str(folder / "run"), folder / "model")
    return folder / "run", folder / "model"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regret of few tokens."""
    few = partial(module.regret.measure, fitting_tokens=1024, held_out_tokens=400, iterations=3)
    monkeypatch.setattr(module.regret, "measure", few)


@pytest.mark.usefixtures("short")
def test_a_run_and_its_export_are_diagnosed_alike(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for i, (place, options) in enumerate(zip(pair, ([], ["--text", str(text)]), strict=True)):
        out = tmp_path / f"page-{i}"
        assert cli.main(["diagnose", str(place), *options, "--json", str(tmp_path / "d.json"), "--out", str(out)]) == 0
        d = json.loads((tmp_path / "d.json").read_text())
        said_last = "\n".join([*words.lines(d), "", f"{out / 'diagnosis.html'}\n"])
        assert capsys.readouterr().out.endswith(said_last)
        found.append(d)
    of_run, of_model = found
    assert (of_run["shared"], of_run["step"], of_model["step"]) == (True, 120, None)
    assert of_model["text"].startswith(f"text:{text} (")
    assert of_run["text"] == of_model["text"]
    for name in ("cooccurrence", "norms", "lens", "rounding", "regret"):
        assert "not_measured" not in of_run[name]
        for d in found:
            d[name].pop("step", None)
        assert_alike(of_run[name], of_model[name], name)


@pytest.fixture(scope="module")
def saved_twice(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two states and more snapshots than these."""
    out = tmp_path_factory.mktemp("saved") / "run"
    changes = {"train.checkpoint_every": 4, "data.holdout": 0.02, "optimizer.learning_rate": 0.02}
    assert cli.main(arguments(out, text, changes)) == 0
    return out


def test_an_earlier_step_is_diagnosed_by_its_own_tables_and_body(
    saved_twice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiedjax.load_run(saved_twice)
    assert run.checkpoint_steps == [4, 8]
    words_ = ["diagnose", f"{saved_twice}@4", "--no-regret", "--held-out-tokens", "64", "--json", tmp_path / "d.json"]
    assert cli.main(list(map(str, words_))) == 0
    d = json.loads((tmp_path / "d.json").read_text())
    assert (
        capsys.readouterr()
        .out.splitlines()[-len(list(words.lines(d)))]
        .startswith(f"{saved_twice} at step 4: one table for both roles, 320 rows of width 16; measured on ")
    )
    assert (d["step"], d["name"], d["inputs"][0]["name"]) == (4, str(saved_twice), f"{saved_twice}@4")
    assert d["inputs"][0]["sha256"] == content_hash(run.tables(4).input) != content_hash(run.tables(8).input)
    prepared = data_of(run)
    for name, instrument in (("lens", module.rotation), ("rounding", module.rounding)):
        of_step = to_plain(instrument.measure(FrozenModel(run, 4), run, prepared, held_out_tokens=64))
        assert d[name] == json.loads(json.dumps(of_step))
        assert d[name]["held_out_tokens"] == 64
    last = module.diagnose(f"{saved_twice}@8", with_regret=False, held_out=64)
    whole = module.diagnose(str(saved_twice), with_regret=False, held_out=64)
    assert {**last, "inputs": []} == {**whole, "inputs": []}


def test_a_step_with_tables_alone_is_not_measured_where_the_body_is_read(saved_twice: Path) -> None:
    assert {2, 4, 8} <= set(tiedjax.load_run(saved_twice).snapshot_steps)
    d = module.diagnose(f"{saved_twice}@2")
    why = {"not_measured": f"{saved_twice}: no checkpoint of step 2; there are 4, 8"}
    assert [d[name] for name in ("lens", "rounding", "regret")] == [why] * 3
    assert (d["step"], "not_measured" in d["cooccurrence"], "not_measured" in d["norms"]) == (2, False, False)


def test_regret_is_of_a_text_that_is_named(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.setattr(module, "EMBEDDED", f"text:{text}")
    for name in ("lens", "rounding"):
        other = {"lens": module.rotation, "rounding": module.rounding}[name]
        monkeypatch.setattr(other, "measure", lambda *_, **__: {})
    monkeypatch.setattr(module.regret, "measure", lambda *_, **__: {"measured": True})
    of = lambda place, *words, **options: module.diagnose(str(place), *words, **options)["regret"]
    assert of(pair[0]) == {"measured": True}
    assert of(pair[0], with_regret=False) == {"not_measured": "left out, as --no-regret asks"}
    assert of(pair[1], f"text:{text}") == {"measured": True}
    assert of(pair[1]) == {"not_measured": "re-fits read a text that is named: give one with --text"}


def test_a_glob_is_a_source_of_text_files() -> None:
    of = {text: module.source_of(text) for text in ("a/*.txt", "text:a/*.txt", "tokens:x.npy", "embedded", None)}
    assert of == {
        "a/*.txt": "text:a/*.txt",
        "text:a/*.txt": "text:a/*.txt",
        "tokens:x.npy": "tokens:x.npy",
        "embedded": "embedded",
        None: None,
    }


# ---- What is refused ----


def test_a_model_has_no_steps(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as error:
        module.diagnose(f"{pair[1]}@3")
    assert str(error.value) == f"{pair[1]}@3: a model has no steps; leave out @3"


NAMED = "tables are named by a run directory, RUN@STEP, a Hugging Face directory, or a .npy, .npz or .safetensors file"
LINES: dict[str, tuple[list[str], str]] = {
    "nothing": (["NOTHING"], f"NOTHING: no such file or directory; {NAMED}"),
    "no text": (
        ["RUN", "--text", "no/such/*.txt"],
        "data.source: missing corpus: no file matches 'no/such/*.txt'; give a path or a glob of files",
    ),
    "a file as --out": (["RUN", "--out", "FILE"], "--out: must be a folder, or the name of a new one; FILE is a file"),
    "a folder as --json": (["RUN", "--json", "DIR"], "--json: must be a file in a folder that exists, got DIR"),
    "no such step": (["RUN@7"], "RUN: no snapshot of step 7; there are 0, 1, 2, 4, 6, 8"),
    "no such run": (["NOTHING@7"], f"NOTHING: no such file or directory; {NAMED}"),
    "no tokens": (["RUN", "--held-out-tokens", "0"], "--held-out-tokens: must be at least 1, got 0"),
    "windows of a run": (
        ["RUN", "--seq-len", "8"],
        "--seq-len: a run is read in windows of its model.seq_len; leave it out",
    ),
    "no model": (
        [],
        "the following arguments are required: MODEL; usage: tiedjax diagnose MODEL [options] "
        "(see tiedjax diagnose --help)",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("here")
    words_, line = LINES[case]
    places = {"RUN": finished, "NOTHING": tmp_path / "nothing", "FILE": tmp_path / "file", "DIR": tmp_path}
    out = [] if "--out" in words_ else ["--out", str(tmp_path / "page")]
    given = [re.sub(r"^[A-Z]+(?=@|$)", lambda name: str(places[name[0]]), word) for word in words_]
    assert cli.main(["diagnose", *given, *out]) == 2
    for name, place in places.items():
        line = re.sub(rf"\b{name}\b(?=[:,;]| is|$)", str(place), line)
    assert capsys.readouterr().err == f"tiedjax: {line}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["diagnose", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: tiedjax diagnose MODEL [options] what tying did to one model, without a twin")
    options = ("--text GLOB", "--seq-len T", "--held-out-tokens N", "--no-regret", "--json FILE", "--out DIR")
    for option in options:
        assert option in shown


def test_a_number_is_that_of_the_instruments_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    d = module.diagnose(str(pair[0]), with_regret=False)

    def of(instrument: str, *options: str) -> dict[str, Any]:
        argv = ["analyze", instrument, str(pair[0]), *options, "--json", str(tmp_path / "o.json")]
        assert cli.main(argv) == 0
        return dict(json.loads((tmp_path / "o.json").read_text()))

    assert d["cooccurrence"]["roles"] == of("cooccurrence")["roles"]
    assert d["rounding"]["costs"] == of("rounding")["costs"]
    assert d["lens"] == of("lens", "--training-tokens", "64")["input"]
    by_probe = of("norms")
    assert {name: by_probe[name] for name in d["norms"]["roles"]["shared"]} == d["norms"]["roles"]["shared"]
