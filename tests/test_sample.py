"""What a model writes, against the model run over whole windows without a cache, one window for each token."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from scipy import stats
from tokenizers import Tokenizer

import tiedjax
from tiedjax import cli, lm, tying
from tiedjax.analysis.study import samples
from tiedjax.config import ModelConfig, RunConfig
from tiedjax.errors import UserError
from tiedjax.model import Transformer
from tiedjax.sample import continue_tokens, draw, sample_text
from tiedjax.tying import Tables

CONFIGS: dict[str, dict[str, Any]] = {
    "rope, grouped, normed": {"heads": 4, "kv_heads": 2, "qk_norm": "head", "norm": "rmsnorm"},
    "no positions": {"position": "none", "mlp": "gelu", "norm": "layernorm"},
    "scanned": {"layers": 3, "scan_layers": True, "remat": "full"},
    "scanned, one key head": {"scan_layers": True, "kv_heads": 1, "dtype": "bfloat16"},
    "untied": {"scheme": "untied"},
    "padded": {"vocab_size": 30, "vocab_multiple": 16},
    "untied, padded, odd": {"scheme": "untied", "vocab_size": 30, "vocab_multiple": 16, "seq_len": 7},
    "one position": {"seq_len": 1},
    "windows and caps": {
        "layers": 3,
        "norm": "rmsnorm",
        "norm_place": "both",
        "mlp": "geglu",
        "attention_scale": 0.5,
        "attention_cap": 0.8,
        "logit_cap": 2.0,
        "window": 3,
        "window_layers": "window,full",
        "window_theta": 50.0,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_positions": 8,
    },
}


def made(name: str) -> tuple[RunConfig, Tables, Any]:
    """A config with random parameters; the rows of padding are ten times as long, so that they would be drawn.

    Each token's output row is the input row of the id before, so that no text repeats one token, tied or not.
    """
    cfg = small_config(**CONFIGS[name])
    params = nn.unbox(lm.init_params(cfg, jax.random.key(4)))
    longer_V1 = np.where(np.arange(cfg.model.table_rows) < cfg.model.vocab_size, 3.0, 30.0)[:, None]
    tables = tying.scheme_of(cfg.tying).tables({role: table * longer_V1 for role, table in params["tables"].items()})
    shifted_V = np.arange(cfg.model.table_rows)
    shifted_V[: cfg.model.vocab_size] = np.roll(shifted_V[: cfg.model.vocab_size], 1)
    return cfg, Tables(tables.input, tables.output[shifted_V]), params["body"]


@functools.partial(jax.jit, static_argnums=0)
def whole(cfg: ModelConfig, body: Any, x_BTD: jax.Array) -> Any:
    """The states of a window."""
    return Transformer(cfg).apply(body, x_BTD)


def logits_after(cfg: RunConfig, tables: Tables, body: Any, window_T: np.ndarray) -> np.ndarray:
    """Of the token that follows a window, read from its start by the model as training runs it: [vocab_size]."""
    tokens_1T = np.zeros((1, cfg.model.seq_len), int)
    tokens_1T[0, : len(window_T)] = window_T  # what follows it changes nothing
    h_1TD = whole(dataclasses.replace(cfg.model, dtype="float32", remat="none"), body, tables.input[tokens_1T])
    h_D, U_VD = np.asarray(h_1TD[0, len(window_T) - 1], np.float64), np.asarray(tables.output, np.float64)
    product_V, cap = U_VD[: cfg.model.vocab_size] @ h_D, cfg.model.logit_cap
    return product_V if cap is None else cap * np.tanh(product_V / cap)


def likeliest(cfg: RunConfig, tables: Tables, body: Any, text: list[int], count: int) -> list[int]:
    """The likeliest token `count` times over: of a text that a window does not hold, its last half is read."""
    text, begins = list(text), 0
    for _ in range(count):
        if len(text) - begins > cfg.model.seq_len:
            begins = len(text) - max(1, cfg.model.seq_len // 2)
        text.append(int(logits_after(cfg, tables, body, np.array(text[begins:])).argmax()))
    return text[-count:]


@pytest.mark.parametrize("prompt", [1, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_token_is_that_of_the_whole_window_at_every_position(name: str, prompt: int) -> None:
    """Two texts at once, beyond the window and beyond the next one."""
    cfg, tables, body = made(name)
    prompt_BP = np.random.default_rng(prompt).integers(0, cfg.model.vocab_size, (2, prompt))
    count = 2 * cfg.model.seq_len + 3
    written_BN = continue_tokens(cfg.model, tables, body, prompt_BP, count, temperature=0, key=jax.random.key(0))
    assert written_BN.dtype == np.int32
    assert written_BN.tolist() == [likeliest(cfg, tables, body, text, count) for text in prompt_BP.tolist()]
    assert len(np.unique(written_BN)) > 2, "a text that repeats one token shows little"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(temperature: float) -> None:
    cfg, tables, body = made("untied, padded, odd")
    tables = Tables(tables.input, tables.output / 4)
    prompt, draws = [5, 1, 7], 20_000
    logits_V = logits_after(cfg, tables, body, np.array(prompt)) / temperature
    expected_V = draws * np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
    written_B1 = continue_tokens(
        cfg.model, tables, body, [prompt] * draws, 1, temperature=temperature, key=jax.random.key(1)
    )
    counted_V = np.bincount(written_B1[:, 0], minlength=cfg.model.vocab_size)
    rare_V = expected_V < 5  # counted together, as the test needs
    assert rare_V.sum() < cfg.model.vocab_size - 5
    grouped = [np.append(each[~rare_V], each[rare_V].sum()) for each in (counted_V, expected_V)]
    assert stats.chisquare(*(each[grouped[1] > 0] for each in grouped)).pvalue > 0.001


def test_every_draw_has_randomness_of_its_own() -> None:
    """Where all tokens are as likely, all pairs of one token and the next are, in one text and over texts."""
    cfg, tables, body = made("untied")
    nothing = Tables(tables.input, jnp.zeros_like(tables.output))
    model = dataclasses.replace(cfg.model, vocab_size=4)
    written_BN = continue_tokens(model, nothing, body, [[0]] * 200, 40, key=jax.random.key(2))
    for first, second in [(written_BN[:, :-1], written_BN[:, 1:]), (written_BN[:-1], written_BN[1:])]:
        counted = np.bincount((4 * first + second).reshape(-1), minlength=16)
        assert stats.chisquare(counted).pvalue > 0.001


def test_a_draw_at_any_temperature() -> None:
    logits_BV = jnp.array([[1e30, 0.0, 1e30, -1e30], [0.0, 2.0, 1.0, -np.inf]], jnp.float32)
    drawn = lambda temperature, key: draw(logits_BV, temperature, jax.random.key(key)).tolist()
    assert [drawn(0.0, key) for key in range(9)] == [[0, 1]] * 9
    assert {tuple(drawn(1e-40, key)) for key in range(40)} <= {(0, 1), (2, 1)}
    assert {drawn(1000.0, key)[1] for key in range(40)} == {0, 1, 2}


def test_one_program_reads_every_token_after_the_prompt() -> None:
    cfg, tables, _ = made("untied")
    traced: list[Any] = []
    model = dataclasses.replace(cfg.model, d_ff=40)  # which no other test has compiled
    body = nn.unbox(lm.init_params(dataclasses.replace(cfg, model=model), jax.random.key(0)))["body"]
    apply = Transformer.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "apply", lambda *args, **kw: traced.append(args[2].shape) or apply(*args, **kw))
        for seed in (0, 1):
            continue_tokens(model, tables, body, [[1, 2, 3]], 5, key=jax.random.key(seed))
    assert traced == [(1, 3, 16), (1, 1, 16)]


@pytest.mark.parametrize(
    ("prompt_BP", "options", "says"),
    [
        ([[]], {}, "prompt: must hold at least one token"),
        ([[3, 30]], {}, "prompt: token id 30 does not fit model.vocab_size 30"),
        ([[3, -1]], {}, "prompt: token id -1 does not fit model.vocab_size 30"),
        ([[3]], {"count": 0}, "tokens: must be at least 1, got 0"),
        ([[3]], {"temperature": -0.5}, "temperature: must be 0 to 1000, got -0.5"),
        ([[3]], {"temperature": float("nan")}, "temperature: must be 0 to 1000, got nan"),
    ],
)
def test_what_cannot_be_continued(prompt_BP: list[list[int]], options: dict[str, Any], says: str) -> None:
    cfg, tables, body = made("padded")
    with pytest.raises(UserError) as error:
        continue_tokens(cfg.model, tables, body, prompt_BP, **{"count": 1, "key": jax.random.key(0), **options})
    assert str(error.value) == says


# ---- The command line, on a run of eight steps


def sample(capfd: pytest.CaptureFixture[str], *words: Any) -> str:
    """What `tiedjax sample` prints."""
    capfd.readouterr()
    assert cli.main(["sample", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


def greedy_ids(folder: Path, start: list[int], count: int) -> list[int]:
    run = tiedjax.load_run(folder)
    params, t = run.params(), run.tables()
    return likeliest(run.config, Tables(t.input, t.output), params["body"], start, count)


def test_the_same_seed_writes_the_same_text(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = sample(capfd, finished, "--prompt", "a tale", "--tokens", 30)
    assert text.startswith("a tale")
    assert text.endswith("\n")
    last = tiedjax.load_run(finished).checkpoint_steps[-1]
    assert text == sample(capfd, f"{finished}@{last}", "--prompt", "a tale", "--tokens", 30, "--seed", 0)
    other = sample(capfd, finished, "--prompt", "a tale", "--tokens", 30, "--seed", 1)
    assert other.startswith("a tale")
    assert other != text
    assert len({sample(capfd, finished, "--temperature", 0, "--seed", seed) for seed in (0, 1)}) == 1
    assert "\ufffd" in sample(capfd, finished), "bytes of a hundred tokens that are hardly trained are no UTF-8"


@pytest.mark.parametrize("prompt", ["", "lies", "<|endoftext|>"])
def test_a_text_begins_with_the_token_that_separates_documents(
    prompt: str, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is id 0; a prompt that spells it is text all the same."""
    tokenizer = Tokenizer.from_file(str(finished / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    tokenizer.encode_special_tokens = True
    prompt_ids = tokenizer.encode(prompt).ids
    assert 0 not in prompt_ids
    ids = prompt_ids + greedy_ids(finished, [0, *prompt_ids], 20)
    options = ["--prompt", prompt] if prompt else []
    written = sample(capfd, finished, *options, "--tokens", 20, "--temperature", 0)
    assert written == tokenizer.decode(ids, skip_special_tokens=False) + "\n"


@pytest.fixture
def without_tokenizer(finished: Path, tmp_path: Path) -> Path:
    """The finished run as one that was trained on ready token ids."""
    shutil.copytree(finished, tmp_path / "ids", ignore=shutil.ignore_patterns("tokenizer.json"))
    return tmp_path / "ids"


def test_without_a_tokenizer_ids_follow_the_most_frequent_one(
    without_tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = int(np.load(without_tokenizer / "token_counts.npy")[0].argmax())
    ids = greedy_ids(without_tokenizer, [start], 20)
    written = sample(capfd, without_tokenizer, "--tokens", 20, "--temperature", 0)
    assert written == " ".join(f"[{i}]" for i in ids) + "\n"


REFUSED: dict[str, tuple[list[str], str]] = {
    "no run": (["NOWHERE"], "NOWHERE: is no run directory: it holds no config.yaml"),
    "no run at a step": (["NOWHERE@3"], "NOWHERE: is no run directory: it holds no config.yaml"),
    "no such step": (["RUN@3"], "RUN: no checkpoint of step 3; there are 8"),
    "no checkpoint": (["TABLES"], "TABLES: holds no checkpoint"),
    "cold": (["RUN", "--temperature", "-0.5"], "temperature: must be 0 to 1000, got -0.5"),
    "infinite": (["RUN", "--temperature", "inf"], "temperature: must be 0 to 1000, got inf"),
    "nothing": (["RUN", "--tokens", "0"], "tokens: must be at least 1, got 0"),
    "seed": (["RUN", "--seed", "4294967296"], "seed: must be 0 to 2^32 - 1, got 4294967296"),
    "bytes": (["RUN", "--prompt", "caf\udce9"], "prompt: must be UTF-8"),
    "no tokenizer": (["IDS", "--prompt", "a"], "prompt: IDS has no tokenizer to read it with; leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line(
    case: str, finished: Path, without_tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "tables", ignore=shutil.ignore_patterns("checkpoints"))
    places = {"NOWHERE": tmp_path / "x", "TABLES": tmp_path / "tables", "IDS": without_tokenizer, "RUN": finished}
    place = lambda text: re.sub("|".join(places), lambda name: str(places[name[0]]), text)
    words, says = REFUSED[case]
    assert cli.main(["sample", *map(place, words)]) == 2
    assert capfd.readouterr() == ("", f"tiedjax: {place(says)}\n")


# ---- The section of a study's report


def test_a_study_holds_a_text_of_each_arms_first_seed(study_folder: Path) -> None:
    held = json.loads((study_folder / "study" / "results.json").read_text(encoding="utf-8"))["samples"]
    written = {
        arm: sample_text(tiedjax.load_run(study_folder / f"study/runs/{arm}-3"), tokens=40) for arm in ("two", "one")
    }
    assert written["two"] != written["one"]
    assert held == {
        "tokens": 40,
        "temperature": 1.0,
        "draw_seed": 0,
        "arms": [{"arm": arm, "seed": 3, "begins_document": True, "text": text} for arm, text in written.items()],
    }


def test_how_the_texts_of_runs_without_a_tokenizer_begin() -> None:
    arms = [{"arm": "a", "seed": 0, "begins_document": False, "text": "[7] [300]"}]
    results = {"samples": {"tokens": 2, "temperature": 1.0, "arms": arms}, "runs": []}
    assert samples.about(results)[0] == (
        "Each text follows the token that the model was shown most often and is 2 tokens long."
    )
    results["samples"]["arms"] = [{"arm": "a", "seed": 0, "not_measured": "a-0: holds no checkpoint"}]
    assert (samples.about(results), samples.rows(results)) == ([], [])


def test_lines_may_break_after_each_white_space() -> None:
    arms = [{"arm": "a", "seed": 4, "begins_document": True, "text": " one  two\n\nthree"}]
    run = {"arm": "a", "seed": 4, "name": "a-4", "eval_loss": 4.25}
    (row,) = samples.rows({"samples": {"arms": arms}, "runs": [run | {"seed": 5, "eval_loss": 9.0}, run]})
    assert row == {"arm": "a", "run": "a-4", "loss": "4.250", "pieces": ["␣", "one␣", "␣", "two⏎", "⏎", "three"]}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([[2**32 + 5]]), "prompt: token id 4294967301 does not fit model.vocab_size 16"),
        ([[1.9]], "prompt: must be ids [B, P], got float64 [1, 1]"),
        ([[True]], "prompt: must be ids [B, P], got bool [1, 1]"),
        ([1, 2], "prompt: must be ids [B, P], got int64 [2]"),
        ([[1, 2], [3]], "prompt: must be ids [B, P], prompts of equal length"),
    ],
)
def test_a_prompt_that_is_no_ids_is_refused_and_never_rounded(prompt: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        continue_tokens(ModelConfig(vocab_size=16), None, None, prompt, 1, key=jax.random.key(0))  # type: ignore[arg-type]
    assert str(error.value) == message
