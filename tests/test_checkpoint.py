"""What is restored is what was saved, or nothing is."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.metadata import checkpoint as notes
from programs import finish, start
from programs import tiedjax as tiedjax_command
from runs import STEPS, arguments, assert_same_run

import tiedjax
from tiedjax import cli
from tiedjax.beginning import begin
from tiedjax.checkpoint import Checkpoints, DamagedError, failed_saves, fingerprints
from tiedjax.errors import UserError
from tiedjax.saves import Kept
from tiedjax.sharding import make_mesh


def some_tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.standard_normal((6, 10)), jnp.float32), "scale": jnp.ones(10)},
        "half": jnp.asarray(rng.standard_normal((4, 3, 2)), jnp.bfloat16),
        "bytes": jnp.asarray(rng.integers(0, 255, 7), jnp.uint8),
        "count": jnp.asarray(3, jnp.int32),
    }


def shapes(tree: Any, *, on_device: bool = False) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if on_device else None
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the saves 3 and 5 of `some_tree`."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (3, 5):
        checkpoints.save(step, some_tree(step), {"note": step})
    checkpoints.close()
    return folder


def test_a_round_trip_keeps_every_bit_on_the_device_and_as_numpy(saved: Path) -> None:
    checkpoints = Checkpoints(saved, create=False)
    assert checkpoints.steps() == [3, 5]
    assert checkpoints.about(3)["note"] == 3
    for on_device, kind in ((True, jax.Array), (False, np.ndarray)):
        tree = checkpoints.restore(5, shapes(some_tree(), on_device=on_device))
        assert jax.tree.structure(tree) == jax.tree.structure(some_tree())
        for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(some_tree(5)), strict=True):
            assert isinstance(leaf, kind)
            assert leaf.dtype == expected.dtype
            assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


def test_a_part_can_be_restored_and_what_was_not_saved_cannot(saved: Path) -> None:
    checkpoints = Checkpoints(saved, create=False)
    part = checkpoints.restore(3, {"a": {"kernel": shapes(some_tree())["a"]["kernel"]}})
    assert jax.tree.structure(part) == jax.tree.structure({"a": {"kernel": 0}})
    np.testing.assert_array_equal(part["a"]["kernel"], some_tree(3)["a"]["kernel"])
    with pytest.raises(UserError, match=r"3: holds no 'a/bias'; it was saved from another model"):
        checkpoints.restore(3, {"a": {"bias": jax.ShapeDtypeStruct((10,), jnp.float32)}})


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((10, 6), "float32"), ((6, 9), "float32"), ((7, 10), "float32"), ((6, 10), "bfloat16"), ((6, 10), "int32")],
)
def test_another_shape_or_dtype_is_refused(saved: Path, shape: tuple[int, ...], dtype: str, on_device: bool) -> None:
    """Orbax alone would cut, pad or cast without a word."""
    wrong = shapes({"a": {"kernel": jnp.zeros(shape, dtype)}}, on_device=on_device)
    with pytest.raises(UserError) as caught:
        Checkpoints(saved, create=False).restore(3, wrong)
    assert "\n" not in str(caught.value)


def test_every_single_flipped_bit_changes_the_fingerprint() -> None:
    tree = jax.tree.map(np.asarray, some_tree())
    whole = fingerprints(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits = np.frombuffer(leaf.tobytes(), np.uint8)
        for bit in range(0, 8 * len(bits), 1 if len(bits) <= 16 else 37):
            flipped = bits.copy()
            flipped[bit // 8] ^= 1 << bit % 8
            damaged = np.frombuffer(flipped.tobytes(), leaf.dtype).reshape(leaf.shape)
            assert fingerprints({name: damaged})[name] != whole[name], (name, bit)


def test_swapped_values_change_the_fingerprint() -> None:
    tree = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    for swapped in (tree["x"][::-1], tree["x"][:, [1, 0, 2, 3]], tree["x"].T.reshape(3, 4)):
        assert fingerprints({"x": swapped.copy()}) != fingerprints(tree)


FINGERPRINTS = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tiedjax.checkpoint import fingerprints
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
found = [fingerprints({"x": x})]
for spec in (P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))):
    found.append(fingerprints({"x": jax.device_put(x, NamedSharding(mesh, spec))}))
print(json.dumps(found))
"""


def test_the_fingerprint_is_the_same_on_any_number_of_devices() -> None:
    out, _ = finish(start(["-c", FINGERPRINTS], devices=4))
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    assert json.loads(out.splitlines()[-1]) == [fingerprints({"x": x})] * 6


WITH_X64 = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
import tiedjax
for path in sys.argv[1:]:
    run = tiedjax.load_run(Path(path))
    print(run.tables().input.dtype, sorted(run.params()))
"""


def test_a_healthy_run_is_healthy_with_x64_on_too(finished: Path) -> None:
    """Sums of uint32 widen to uint64 there, unless their dtype is named."""
    out, _ = finish(start(["-c", WITH_X64, finished]))
    assert out == "float32 ['body', 'tables']\n"
    with jax.enable_x64(True):
        wide = fingerprints({"x": np.arange(9, dtype=np.float32), "big": np.full(3, -1, np.int32)})
    assert wide == fingerprints({"x": np.arange(9, dtype=np.float32), "big": np.full(3, -1, np.int32)})


def test_values_that_changed_on_disk_are_noticed(tmp_path: Path) -> None:
    """Orbax stores no checksum: another save's values under this save's fingerprint restore without a word."""
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 5):
        tree = some_tree(3)
        tree["a"]["kernel"] = tree["a"]["kernel"].at[2, 2].add(1e-6 * (step - 3))
        checkpoints.save(step, tree, {})
    checkpoints.close()
    shutil.rmtree(tmp_path / "3" / "tree")
    shutil.copytree(tmp_path / "5" / "tree", tmp_path / "3" / "tree")
    with pytest.raises(UserError, match=r"3: is damaged: 'a/kernel' is not what was saved"):
        Checkpoints(tmp_path, create=False).restore(3, shapes(some_tree()))


def test_a_damaged_run_is_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    """Bits of every data file are flipped one at a time: never restored as if nothing had happened."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    rng = np.random.default_rng(0)
    expected = tiedjax.load_run(finished).params()
    complaints = []
    for data in sorted((run / "checkpoints" / str(STEPS) / "tree").rglob("d/*")):
        whole = data.read_bytes()
        for place in rng.integers(0, len(whole), 12):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            data.write_bytes(damaged)
            try:
                params = tiedjax.load_run(run).params()
            except UserError as error:
                complaints.append(str(error))
            else:  # the bit belonged to the optimizer state, which was not asked for
                jax.tree.map(np.testing.assert_array_equal, params, expected)
        data.write_bytes(whole)
    assert complaints
    assert not [each for each in complaints if "\n" in each]


@pytest.mark.parametrize("reason", ["PERMISSION_DENIED: not yours", "[Errno 24] Too many open files: 'd/1'"])
def test_what_may_not_be_read_is_no_damage(saved: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError(reason)

    checkpoints = Checkpoints(saved, create=False)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", refuses)
    with pytest.raises(UserError) as caught:
        checkpoints.about(5)
    assert str(caught.value) == f"{saved / '5'}: cannot be restored: {reason}"
    assert not isinstance(caught.value, DamagedError)


def damages(folder: Path, seed: int = 0) -> Iterator[str]:
    """Every file of a save in turn: without some of its bytes, all of them or itself, or with a bit that is another."""
    rng = np.random.default_rng(seed)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for length in sorted({0, len(whole) // 2, len(whole) - 1} - {-1, len(whole)}):
            path.write_bytes(whole[:length])
            yield f"{path.relative_to(folder)} cut to {length} bytes"
        for place in rng.integers(0, max(1, len(whole)), 24 if whole else 0):
            bit = int(rng.integers(8))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            yield f"{path.relative_to(folder)} with bit {bit} of byte {place} flipped"
        path.unlink()
        yield f"{path.relative_to(folder)} removed"
        path.write_bytes(whole)


def test_no_damage_gives_other_values_or_a_traceback(saved: Path, tmp_path: Path) -> None:
    """Of the save itself, and of what says which saves there are."""
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    expected, about = some_tree(5), Checkpoints(saved, create=False).about(5)
    refused, read = [], 0
    for damage in damages(folder / "5"):
        try:
            checkpoints = Checkpoints(folder, create=False)
            assert 3 in checkpoints.steps(), damage
            found = checkpoints.about(5)
            tree = checkpoints.restore(5, shapes(some_tree()))
        except DamagedError as error:
            refused.append(str(error))
        else:
            assert found == about, damage
            jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(np.asarray, expected))
            read += 1
    assert len(refused) + read >= 300
    assert len(refused) > 100
    assert not [line for line in refused if "\n" in line]


def damage(folder: Path) -> None:
    """Cuts every file of values in half."""
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("every", "at_least"), [pytest.param(1, 300, id="all", marks=pytest.mark.slow), pytest.param(40, 7, id="some")]
)
def test_whatever_is_damaged_a_run_goes_on_from_a_state_that_was_saved(
    every: int, at_least: int, text: Path, tmp_path: Path
) -> None:
    """Each file of the newest state in turn: that state, bit by bit, or the one before it, and never an error."""
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.checkpoint_every": 6})) == 0
    run, counts_2V = tiedjax.load_run(out), np.load(out / "token_counts.npy")
    whole, place = out / "checkpoints", tmp_path / "damaged"
    about = Checkpoints(whole, create=False).about(STEPS)

    def begun() -> tuple[int, list[bytes]]:
        with closing(Checkpoints(place)) as checkpoints:
            state, _, step = begin(run.config, make_mesh(run.config.mesh), checkpoints, about, counts_2V)
        return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

    states = {}
    for step in (STEPS, 6):
        shutil.copytree(whole, place, ignore=shutil.ignore_patterns(str(STEPS)) if step == 6 else None)
        assert begun()[0] == step
        states[step] = begun()[1]
        shutil.rmtree(place)
    used = []
    for damage in itertools.islice(damages(whole / str(STEPS)), 0, None, every):
        shutil.copytree(whole, place)
        step, leaves = begun()
        assert leaves == states[step], damage
        assert {path.name for path in place.iterdir()} == {"6", "8" if step == STEPS else "damaged-8"}, damage
        used.append(step)
        shutil.rmtree(place)
    assert len(used) >= at_least
    assert used.count(6) >= at_least // 3


def test_a_damaged_state_is_set_aside_and_an_older_one_is_used(
    finished: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.checkpoint_every": 3, "train.keep_checkpoints": 3})) == 0
    for step in (6, STEPS):
        damage(out / "checkpoints" / str(step) / "tree")
    capfd.readouterr()
    assert cli.main(arguments(out, text)) == 0
    said = capfd.readouterr().out.splitlines()
    for line, step in zip(said, (STEPS, 6), strict=False):
        assert line.startswith(f"{out / 'checkpoints' / str(step)}: cannot be restored: "), said
        assert line.endswith("; the state before it is tried")
    assert_same_run(out, finished)
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"3", str(STEPS), "damaged-6", f"damaged-{STEPS}"}


def test_a_run_of_which_no_state_can_be_used_is_left_as_it_is(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli.main(arguments(out, text, {"train.checkpoint_every": 4})) == 0
    for step in (4, STEPS):
        damage(out / "checkpoints" / str(step) / "tree")
    files = lambda: [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]  # it names its holder
    before = {path: path.read_bytes() for path in files()}
    _, stderr = tiedjax_command(*arguments(out, text), status=78)  # by itself, to see what libraries say at its end
    assert stderr.startswith(f"tiedjax: {out / 'checkpoints' / str(STEPS)}: cannot be restored: ")
    assert stderr.endswith("; no other state of this run can be used\n")
    assert stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in files()} == before


KILLED_WHILE_SAVING = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from tiedjax.checkpoint import Checkpoints
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
checkpoints.save(1, {"x": jnp.arange(4.0)}, {})
assert checkpoints.steps() == [1]
def die(event, args):
    if event == "os.rename" and pathlib.Path(args[1]).name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
checkpoints.save(2, {"x": jnp.arange(4.0) + 1}, {})
checkpoints.close()
"""


def test_an_unfinished_save_is_invisible_and_can_be_done_again(tmp_path: Path) -> None:
    """A process is killed at the moment in which the save of step 2 would become visible."""
    finish(start(["-c", KILLED_WHILE_SAVING, tmp_path / "saves"]), status=-signal.SIGKILL)
    assert len(list((tmp_path / "saves").iterdir())) == 2  # the scratch of step 2 was left behind
    assert Checkpoints(tmp_path / "saves", create=False).steps() == [1]
    assert len(list((tmp_path / "saves").iterdir())) == 2  # and a reader leaves alone what another may be writing
    checkpoints = Checkpoints(tmp_path / "saves")
    assert checkpoints.steps() == [1]
    checkpoints.save(2, {"x": jnp.arange(4.0) + 2}, {})
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "saves")) == ["1", "2"]
    restored = Checkpoints(tmp_path / "saves", create=False).restore(2, {"x": jax.ShapeDtypeStruct((4,), "float32")})
    np.testing.assert_array_equal(restored["x"], [2, 3, 4, 5])


def test_older_saves_make_room_and_later_ones_can_be_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=Kept(2))
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
    assert checkpoints.steps() == [2, 3]
    checkpoints.delete_from(3)
    assert checkpoints.steps() == [2]
    checkpoints.save(3, {"x": jnp.full(3, 30)}, {})
    checkpoints.close()
    restored = Checkpoints(tmp_path, create=False).restore(3, {"x": jax.ShapeDtypeStruct((3,), jnp.int32)})
    np.testing.assert_array_equal(restored["x"], [30, 30, 30])


def test_multiples_and_pinned_saves_stay_as_long_as_they_are_pinned(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=Kept(2, 4))
    for step in range(1, 8):
        if step == 4:
            (tmp_path / "3.pinned").touch()
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 6, 7]
    (tmp_path / "3.pinned").unlink()
    for step in (8, 9, 10):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
    checkpoints.close()
    assert Checkpoints(tmp_path, create=False).steps() == [4, 8, 9, 10]


def test_a_step_is_not_saved_twice_in_silence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(3)}, {})
    checkpoints.steps()
    with pytest.raises(Exception, match="1"):
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    checkpoints.close()
    restored = Checkpoints(tmp_path, create=False).restore(1, {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.zeros(3))


def test_a_save_that_fails_says_so_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody waits for it; and saves that do not fail are silent."""
    errors: list[BaseException] = []
    heard = threading.Event()

    def hear(error: BaseException) -> None:
        errors.append(error)
        heard.set()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path)
    with failed_saves(hear):
        checkpoints.save(1, some_tree(), {})
        checkpoints.wait()
        assert errors == []
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
        checkpoints.save(2, some_tree(), {})
        assert heard.wait(30)
    (error,) = errors
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.close()


def test_a_save_that_waits_for_the_one_before_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoints(tmp_path).close()
    log = logging.getLogger("absl")
    log.warning("Waiting for previous save to complete took %f seconds. If this number is high, ...", 1.5)
    log.warning("Something else")
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == ["Something else"]


def test_notes_that_orbax_makes_late_are_not_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of its own begins its notes of a save: what is added to them may come before, and is then lost."""
    late: list[Path] = []
    kind = notes._NonBlockingMetadataStore
    monkeypatch.setattr(kind, "write", lambda _, file_path, metadata: late.append(file_path))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some_tree(), {"said": 1})
    checkpoints.close()
    assert [path.parent.name for path in late] == ["1.orbax-checkpoint-tmp"]
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == []
    (tmp_path / "1" / late[0].name).write_text('{"init_timestamp_nsecs": 1}')
    reader = Checkpoints(tmp_path, create=False)
    assert reader.about(1)["said"] == 1
    jax.tree.map(np.testing.assert_array_equal, reader.restore(1, shapes(some_tree())), some_tree())
    reader.close()
