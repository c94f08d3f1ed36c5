"""Every option has one default, one meaning and one line for whoever gets it wrong; every config file works."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pytest
from programs import REPOSITORY

from tiedjax import config, lm
from tiedjax.config import ModelConfig, RunConfig, StudyConfig, TyingConfig, leaf_fields
from tiedjax.config_errors import SYNONYMS, meant_key
from tiedjax.config_files import Kind, find_config, load_run_config, parse_overrides, read_yaml, structure, to_yaml
from tiedjax.errors import UserError
from tiedjax.plan import load_study

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))
SECTIONS = [cls for cls in vars(config).values() if dataclasses.is_dataclass(cls) and issubclass(cls, config._Checked)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def complaint(path: Path, overrides: dict[str, str] | None = None) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_run_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- The files in configs/ ----


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_round_trips_and_has_shapes(path: Path, tmp_path: Path) -> None:
    cfg = load_run_config(path)
    assert load_run_config(written(tmp_path, to_yaml(cfg))) == cfg
    assert parameters(cfg) > 0
    command = f"tiedjax train {path.stem} --"
    assert command in path.read_text(), "the header must say how the file is used"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_loads_round_trips_and_has_shapes(path: Path, tmp_path: Path) -> None:
    plan = load_study(path)
    assert structure(StudyConfig, read_yaml(written(tmp_path, to_yaml(plan.study))), "again") == plan.study
    assert len(plan.runs) == len(plan.study.arms) * len(plan.study.seeds)
    for (_, seed), cfg in plan.runs.items():
        assert cfg.train.seed == seed
        assert parameters(cfg) > 0
    header = path.read_text().split("base:")[0]
    assert "tiedjax study\n" in header or f" study {path.stem}" in header


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_arms_of_a_study_are_twins(path: Path) -> None:
    """They differ in what the study file lists and in nothing else: never in data, schedule or, unless their parameters
    are made equal, in the body; and where a sweep settles options, in those.
    """
    plan = load_study(path)
    for seed in plan.study.seeds:
        arms = [cfg for (arm, s), cfg in plan.runs.items() if s == seed and arm not in plan.study.equal_parameters]
        # Of the study of mechanisms an arm may differ in how its tables are updated, and in a bias that is not trained;
        # of that of initialisation in how its tables begin.
        options = (
            () if plan.trials or path.stem.removeprefix("g43-") in ("mechanism", "initialisation") else ("optimizer",)
        )
        without_bias = [dataclasses.replace(cfg.model, output_bias="none") for cfg in arms]
        assert len(set(without_bias)) == 1
        for name in ("data", "train", *options):
            assert len({getattr(cfg, name) for cfg in arms}) == 1, name
        assert len({cfg.optimizer.body for cfg in arms}) == 1


def parameters(cfg: RunConfig) -> int:
    """Their number, from shapes alone."""
    shapes = nn.unbox(jax.eval_shape(lambda: lm.init_params(cfg, jax.random.key(0))))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "L", "D", "F", "millions"),
    [
        ("olmo_60m", 16, 384, 1536, "57.1"),
        ("olmo_300m", 16, 1024, 4096, "319.9"),
        ("olmo_1b", 16, 2048, 8192, "1176.8"),
        ("olmo_7b", 32, 4096, 11008, "6682.1"),
    ],
)
def test_the_model_sizes_are_those_of_olmo(name: str, L: int, D: int, F: int, millions: str) -> None:
    """Four attention matrices and three of SwiGLU per layer, one padded table, no biases, no norm scales."""
    path = REPOSITORY / "configs" / f"{name}.yaml"
    tied, untied = (parameters(load_run_config(path, {"tying.scheme": s})) for s in ("tied", "untied"))
    assert tied == L * (4 * D * D + 3 * D * F) + 50304 * D
    assert f"{tied / 1e6:.1f}" == millions
    cfg = load_run_config(path)
    assert cfg.model.vocab_size == 50280
    assert cfg.model.table_rows == 50304
    assert untied - tied == 50304 * cfg.model.d_model


# ---- Finding them ----


def test_a_config_is_found_by_its_bare_name_and_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quick", "run") == REPOSITORY / "configs" / "quick.yaml"
    assert find_config("quick", "study") == REPOSITORY / "configs" / "studies" / "quick.yaml"
    (tmp_path / "quick").mkdir()  # a folder is no config
    assert find_config("quick", "run") == REPOSITORY / "configs" / "quick.yaml"
    (tmp_path / "quick").rmdir()
    for given in ("quick", "quick.yaml", "./quick.yaml", str(tmp_path / "quick.yaml")):
        Path(given).touch()
        assert find_config(given, "run") == find_config(given, "study") == Path(given)


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (
            "tinny",
            "run",
            "tinny: no such file, and no run config of that name; there are g43, olmo_1b, olmo_300m, olmo_60m, "
            "olmo_7b, prose, quick, tiny; did you mean 'tiny'?",
        ),
        (
            "configs/olmo_7b.yaml",
            "run",
            "configs/olmo_7b.yaml: no such file, and no run config of that name; there are g43, olmo_1b, olmo_300m, "
            "olmo_60m, olmo_7b, prose, quick, tiny; did you mean 'olmo_7b'?",
        ),
        (
            "xyz",
            "study",
            "xyz: no such file, and no study of that name; there are g43, g43-initialisation, g43-schemes, "
            "g43-shape-8192, g43-untie, initialisation, mechanism, olmo_1b, quick, rates, schemes, shape-512, "
            "shape-8192, small, untie",
        ),
    ],
)
def test_a_config_that_is_nowhere_is_refused_with_the_names_that_there_are(
    given: str, kind: Kind, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_config(given, kind)
    assert str(caught.value) == says


# ---- Defaults and fields ----


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_run_config(written(tmp_path, "")) == RunConfig()
    defaults = {f.key: f.default for f in leaf_fields(RunConfig)}
    for key, default in defaults.items():
        assert functools.reduce(getattr, key.split("."), RunConfig()) == default


def test_every_field_is_frozen_and_explained() -> None:
    for cls in SECTIONS:
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]
    for cls in (RunConfig, StudyConfig):
        for f in leaf_fields(cls):
            assert f.meaning, f.key


def test_every_field_is_read_by_some_code() -> None:
    """An option that nothing reads is a lie; a read is an attribute of that name outside config.py."""
    read = set()
    for path in (REPOSITORY / "tiedjax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = path.name == "config.py"
        for node in ast.walk(tree):
            # In config.py only what a property returns counts, such as the rows of a table; checks do not.
            if inside and not is_property(node):
                continue
            for each in ast.walk(node) if inside else [node]:
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Load):
                    read.add(each.attr)
    names = {f.name for cls in SECTIONS for f in dataclasses.fields(cls)}
    assert names - read == set()


def is_property(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list
    )


def test_no_default_is_written_twice() -> None:
    """No code gives a config field a second default through getattr or get."""
    for path in (REPOSITORY / "tiedjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                fields = {f.name for cls in SECTIONS for f in dataclasses.fields(cls)}
                assert not (len(node.args) == 3 and names and names[0] in fields), f"{path}: line {node.lineno}"


# ---- YAML ----


def test_yaml_reads_as_people_write_it(tmp_path: Path) -> None:
    text = "optimizer:\n  learning_rate: 1e-3\n  clip_norm: null\ndata:\n  text_field: no\n  source: 'text:*.txt'\n"
    cfg = load_run_config(written(tmp_path, text))
    assert cfg.optimizer.learning_rate == 0.001
    assert cfg.optimizer.clip_norm is None
    assert cfg.data.text_field == "no"
    overridden = load_run_config(
        written(tmp_path, text),
        {"optimizer.learning_rate": "2E-4", "model.norm_bias": "false", "data.text_field": "on"},
    )
    assert overridden.optimizer.learning_rate == 0.0002
    assert overridden.model.norm_bias is False
    assert overridden.data.text_field == "on"
    assert overridden.optimizer.clip_norm is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  steps: 300\ntrain:\n  seed: 1\n", 'duplicate key "train"'),
        ("train:\n  steps: 300\n  steps: 400\n", 'duplicate key "steps"'),
        ("train: [1, 2\n", "line 2 is not YAML"),
        ("- 1\n- 2\n", "must hold a mapping of keys to values, got list"),
        ("train: 300\n", "train: must be "),
        ("train:\n  steps: 2026-01-01\n", "train.steps: must be a valid integer, got '2026-01-01'"),
        ("train:\n  steps: .inf\n", "train.steps"),
        ("optimizer:\n  learning_rate: .nan\n", "learning_rate"),
        ("data:\n  source: !!python/object/apply:os.system ['true']\n", "python/object"),
        ("\x00", "not YAML"),
    ],
)
def test_what_is_not_a_config_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    line = complaint(written(tmp_path, text))
    assert says in line
    assert "config.yaml" in line


def test_unreadable_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path / "missing.yaml")
    assert "cannot be read" in complaint(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in complaint(binary)


# ---- Wrong values ----


def wrong_values() -> Iterator[tuple[dict[str, str], str]]:
    yield {"train.stesp": "3"}, "train.stesp"
    yield {"train.steps": "many"}, "train.steps"
    yield {"train.steps": "3.5"}, "train.steps"
    yield {"train.steps": "true"}, "train.steps"
    yield {"train.steps": "null"}, "train.steps"
    yield {"train.steps": "0"}, "train.steps"
    yield {"model.norm_bias": "1"}, "model.norm_bias"
    yield {"model.qk_norm": "true"}, "model.qk_norm"
    yield {"model.norm": "batchnorm"}, "model.norm"
    yield {"tying.scheme": "tie"}, "tying.scheme"
    yield {"tying.input_grad_scale": "-1"}, "tying.input_grad_scale"
    yield {"optimizer.b2": "1"}, "optimizer.b2"
    yield {"optimizer.learning_rate": ".inf"}, "learning_rate"
    yield {"data.holdout": "1"}, "data.holdout"
    yield {"mesh.data": "0"}, "mesh.data"
    # combinations
    yield {"model.heads": "3"}, "heads"
    yield {"model.kv_heads": "3"}, "kv_heads"
    yield {"model.heads": "128", "model.d_model": "128"}, "heads"
    yield {"data.microbatches": "3"}, "microbatches"
    yield {"mesh.tensor": "3"}, "mesh.tensor"
    yield {"mesh.fsdp": "3"}, "mesh.fsdp"
    yield {"mesh.data": "3"}, "mesh"


@pytest.mark.parametrize(("overrides", "key"), list(wrong_values()), ids=lambda value: str(value))
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(
    tmp_path: Path, overrides: dict[str, str], key: str
) -> None:
    line = complaint(written(tmp_path, ""), overrides)
    assert key in line
    given = next(iter(overrides.values()))
    if given not in ("null", "true", ".inf", "128") and key != "train.stesp":
        assert given in line, "it says what was given"


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no factor": ({"rope_scaling": "linear"}, "rope_factor: rope_scaling linear needs one"),
    "no positions": (
        {"rope_scaling": "yarn", "rope_factor": 2.0},
        "rope_positions: rope_scaling yarn needs one",
    ),
    "factor of nothing": (
        {"rope_factor": 2.0},
        "rope_factor: goes with rope_scaling linear or llama3 or yarn, got none",
    ),
    "turns of nothing": (
        {"rope_scaling": "linear", "rope_factor": 2.0, "rope_turns": (1.0, 4.0)},
        "rope_turns: goes with rope_scaling llama3 or yarn, got linear",
    ),
    "magnitude": (
        {"rope_scaling": "llama3", "rope_factor": 2.0, "rope_positions": 64, "rope_magnitude": 1.1},
        "rope_magnitude: goes with rope_scaling yarn, got llama3",
    ),
    "turns turned": (
        {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_positions": 64, "rope_turns": (32.0, 1.0)},
        "rope_turns: must be two numbers above 0, the smaller one first, got [32.0, 1.0]",
    ),
    "theta of 1": (
        {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_positions": 64, "rope_theta": 1.0},
        "rope_theta: must be > 1 with rope_scaling yarn, got 1.0",
    ),
    "scaled without rope": (
        {"rope_scaling": "linear", "rope_factor": 2.0, "position": "none"},
        "rope_scaling: goes with position rope, got none",
    ),
    "scaled windows": (
        {"rope_scaling": "linear", "rope_factor": 2.0, "window": 8},
        "rope_scaling: is of layers without a window, and all have one",
    ),
    "kinds": (
        {"window": 8, "window_layers": "window, half"},
        "window_layers: must be window or full for each layer, separated by commas, got 'window, half'",
    ),
    "layers of no window": ({"window_layers": "window,full"}, "window_layers: goes with a window, got window null"),
    "theta of no window": ({"window_theta": 10.0}, "window_theta: goes with a window, got window null"),
    "window of no layer": (
        {"window": 8, "window_layers": "full"},
        "window_layers: leaves no layer with the window, got 'full'",
    ),
    "beyond the last layer": (
        {"window": 8, "window_layers": "full,full,full,full,window"},
        "window_layers: leaves no layer with the window, got 'full,full,full,full,window'",
    ),
    "theta without rope": (
        {"window": 8, "window_theta": 10.0, "position": "none"},
        "window_theta: goes with position rope, got none",
    ),
    "scanned": (
        {"window": 8, "window_layers": "window,full", "scan_layers": True},
        "scan_layers: must be false or null where some layers have a window and others not: a loop has one compiled "
        "layer for all",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_bodies_are_refused_in_one_line(case: str) -> None:
    options, line = IMPOSSIBLE[case]
    with pytest.raises(UserError) as caught:
        config.ModelConfig(**options)
    assert str(caught.value) == line


def test_windows_are_of_the_layers_that_are_named_over_and_over() -> None:
    windows = lambda **options: config.ModelConfig(layers=5, **options).windows
    assert windows() == (None,) * 5
    assert windows(window=3) == (3,) * 5
    assert windows(window=3, window_layers="full, window") == (None, 3, None, 3, None)
    assert windows(window=3, window_layers="full,full,full,full,window") == (None, None, None, None, 3)


def test_a_misspelt_name_gets_the_nearest_one(tmp_path: Path) -> None:
    assert "did you mean 'train.steps'?" in complaint(written(tmp_path, "train:\n  stesp: 3\n"))
    assert "did you mean 'tied'?" in complaint(written(tmp_path, "tying:\n  scheme: tyed\n"))
    line = complaint(written(tmp_path, "model:\n  norm: layer_norm\n"))
    for allowed in ("nonparametric_layernorm", "layernorm", "rmsnorm"):
        assert f"'{allowed}'" in line


MEANT = {
    "train.lr": "optimizer.learning_rate",
    "optim.lr": "optimizer.learning_rate",
    "model.max_lr": "optimizer.learning_rate",
    "train.learning_rate": "optimizer.learning_rate",
    "train.wd": "optimizer.weight_decay",
    "train.warmup": "optimizer.warmup_steps",
    "train.max_grad_norm": "optimizer.clip_norm",
    "train.bs": "data.batch_size",
    "train.batch": "data.batch_size",
    "model.batch_size": "data.batch_size",
    "data.seed": "train.seed",
    "train.seeds": "train.seed",
    "train.epochs": "train.steps",
    "train.max_steps": "train.steps",
    "train.stesp": "train.steps",
    "trian.steps": "train.steps",
    "model.dim": "model.d_model",
    "model.hidden": "model.d_model",
    "model.n_embd": "model.d_model",
    "model.n_layer": "model.layers",
    "model.num_attention_heads": "model.heads",
    "model.ctx": "model.seq_len",
    "data.context": "model.seq_len",
    "data.seq": "model.seq_len",
    "model.max_seq_len": "model.seq_len",
    "model.max_position_embeddings": "model.seq_len",
    "data.vocab": "model.vocab_size",
    "model.tie_word_embeddings": "tying.scheme",
    "train.z": "train.z_loss",
    "train.checkpoints": "train.checkpoint_every",
    "train.eval": None,  # every or batches
    "optimizer.min_lr": None,
    "model.dropout": None,
    "model.size": None,
    "train.foo": None,
}


@pytest.mark.parametrize("key", MEANT)
def test_an_unknown_key_gets_the_one_that_was_meant_or_none(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    path = written(tmp_path, f"{section}:\n  {name}: 3\n")
    shown = section if section in ("trian", "optim") else key  # the first thing that is wrong
    meant = {"trian": "train", "optim": "optimizer"}.get(section, MEANT[key])
    assert complaint(path) == f"{path}: unknown key {shown!r}" + (f"; did you mean {meant!r}?" if meant else "")
    assert meant_key(key, [f.key for f in leaf_fields(RunConfig)]) == MEANT[key]


def test_the_synonyms_name_keys_that_there_are_and_one_each() -> None:
    keys = [f.key for f in leaf_fields(RunConfig)]
    others = ["train", "optimizer", "out"]
    assert set(SYNONYMS) <= {*keys, *others}
    words = [word for words in SYNONYMS.values() for word in words]
    assert len(set(words)) == len(words)
    assert not set(words) & {key.split(".")[1] for key in keys}
    for key, its_words in SYNONYMS.items():
        for word in its_words:
            assert meant_key(f"train.{word}", [*keys, *others]) == key, word


def test_an_error_of_the_file_is_not_blamed_on_the_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "train:\n  steps: -1\n")
    assert complaint(path, {"train.seed": "1"}).startswith(f"{path}: train.steps")
    assert complaint(written(tmp_path, ""), {"train.seed": "-1"}).startswith("overrides: train.seed")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "none"}, "reference: no arm is named 'none'"),
        ({"arms": {"a b": {}, "untied": {}, "tied": {}}}, "'a b' cannot name a folder"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seed": 1}, "unknown key 'seed'; did you mean 'seeds'?"),
    ],
)
def test_a_wrong_study_is_refused(changes: dict[str, Any], says: str) -> None:
    tree = {"base": "x.yaml", "arms": {"untied": {}, "tied": {}}, **changes}
    with pytest.raises(UserError) as caught:
        structure(StudyConfig, tree, "study.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_on_the_command_line_stays_text() -> None:
    given = {"data.source": "text:a #1/*.txt", "data.cache": "2024", "data.tokenizer": "null", "tying.scheme": "untied"}
    tree = parse_overrides(given | {"data.workers": "null"})
    assert tree == {
        "data": {"source": "text:a #1/*.txt", "cache": "2024", "tokenizer": "null", "workers": None},
        "tying": {"scheme": "untied"},
    }
    assert parse_overrides({"data.cache": "null"}) == {"data": {"cache": None}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("", "base: missing"),
        ("base: run.yaml\noverrides: {train: {seed: 3}}", "train.seed is set from the study's seeds"),
        ("base: run.yaml\nreference: tied", "'tied' needs a scheme with a table for each role"),
        ("base: run.yaml\nbaseline: untied", "'untied' needs a scheme with one table in both roles"),
        ("base: run.yaml\nseeds: [1, 1]", "must be distinct"),
        ("base: none.yaml", "no such file"),
        (
            "base: run.yaml\noverrides: {optimizer: {tables: {input: {b2: 0.9}}}}",
            "study.yaml: arm 'tied': optimizer.tables.input.b2: the tied scheme has no table for the input role alone; "
            "give optimizer.tables.b2 instead$",
        ),
    ],
)
def test_a_study_that_cannot_answer_is_refused_before_it_trains(tmp_path: Path, changes: str, says: str) -> None:
    (tmp_path / "run.yaml").write_text("")
    arms = "arms: {untied: {tying: {scheme: untied}}, tied: {}}\n"
    (tmp_path / "study.yaml").write_text(arms + changes)
    with pytest.raises(UserError, match=says):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ModelConfig(norm="RMSNorm"),  # type: ignore[arg-type]
            "norm: must be 'nonparametric_layernorm' or 'layernorm' or 'rmsnorm', got 'RMSNorm'",
        ),
        (lambda: ModelConfig(layers=2.5), "layers: must be a whole number, got 2.5"),
        (lambda: ModelConfig(layers=True), "layers: must be a whole number, got True"),
        (lambda: ModelConfig(d_model=None), "d_model: must be a whole number, got None"),
        (lambda: ModelConfig(kv_heads="2"), "kv_heads: must be a whole number or None, got '2'"),
        (lambda: TyingConfig(scheme="foo"), "scheme: must be "),
        (
            lambda: TyingConfig(input_grad_scale_deciles=[1.0] * 10),  # type: ignore[arg-type]
            "input_grad_scale_deciles: must be tuple[float, ...] or None, got [",
        ),
        (lambda: RunConfig(model={}), "model: must be a ModelConfig, got {}"),
        (
            lambda: ModelConfig(d_model=10**9, heads=4),
            "heads: must have at most 16,384 columns each, got d_model / heads = 250,000,000",
        ),
    ],
)
def test_configs_made_in_python_are_checked_as_those_of_files_are(make: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(message)
