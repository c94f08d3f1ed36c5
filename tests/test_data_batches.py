"""Laws of the order in which windows are read: the batches, their counts, the held-out pass."""

import itertools

import grain
import numpy as np
import pytest

from tiedjax.config import DataConfig
from tiedjax.data.batches import Batches, _Order, eval_batches
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared, Windows
from tiedjax.errors import UserError

T, B, V = 16, 12, 300


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two token files of distinct neighbours, so that every window is recognisable."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for name, count in [("a", 1500), ("b", 700)]:
        np.save(folder / f"{name}.npy", rng.integers(0, V, count).astype(np.uint16))
    data = DataConfig(source=f"tokens:{folder}/*.npy", holdout=0.2, cache=str(folder / "cache"))
    return prepare(data, V, report=lambda line: None)


def all_windows(prepared: Prepared, split: str = "train") -> list[bytes]:
    """Windows as bytes, cut here by hand: stride T, length T + 1, none across two files."""
    found = []
    for tokens in prepared.arrays(split):
        starts = range(0, len(tokens) - T, T)
        found += [tokens[start : start + T + 1].astype(np.int32).tobytes() for start in starts]
    return found


def keys(rows: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in rows]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(prepared: Prepared, processes: int) -> None:
    whole = Batches(prepared, T, B, seed=7)
    size = B // processes
    parts = [Batches(prepared, T, B, seed=7, rows=slice(p * size, (p + 1) * size)) for p in range(processes)]
    for step in (0, 1, 17, 1000):
        np.testing.assert_array_equal(np.concatenate([part.at(step) for part in parts]), whole.at(step))
        assert whole.at(step).shape == (B, T + 1)
        assert whole.at(step).dtype == np.int32


def test_an_epoch_holds_every_window_once_and_epochs_differ_in_order(prepared: Prepared) -> None:
    windows = all_windows(prepared)
    count = len(windows)
    batches = Batches(prepared, T, B, seed=3)
    stream = list(itertools.chain.from_iterable(keys(batches.at(step)) for step in range(-(-3 * count // B))))
    epochs = [stream[i * count : (i + 1) * count] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(windows)
    assert epochs[0] != windows
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_order_differently_and_one_seed_always_alike(prepared: Prepared) -> None:
    first, again, other = (Batches(prepared, T, B, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.at(5), again.at(5))
    assert not np.array_equal(first.at(5), other.at(5))
    # A seed's second epoch must not be the next seed's first, or seeds would not be independent samples.
    count = len(prepared.windows("train", T))
    second_epoch = [w for step in range(-(-2 * count // B)) for w in keys(first.at(step))][count : count + B]
    assert second_epoch != keys(other.at(0))


@pytest.mark.parametrize("start", [0, 9, 12345])
def test_reading_ahead_gives_the_batches_of_its_steps_from_any_start(prepared: Prepared, start: int) -> None:
    batches = Batches(prepared, T, B, seed=5, rows=slice(3, 6), workers=3)
    for step, batch in zip(range(start, start + 40), batches.iterate(start), strict=False):
        np.testing.assert_array_equal(batch, batches.at(step))


def test_fingerprint_tells_apart_what_changes_the_batches(prepared: Prepared) -> None:
    base = Batches(prepared, T, B, seed=1).fingerprint
    assert base == Batches(prepared, T, B, seed=1, rows=slice(0, 1), workers=2).fingerprint
    others = [(T + 1, B, 1), (T, B + 1, 1), (T, B, 2)]
    assert all(base != Batches(prepared, *other).fingerprint for other in others)
    assert base["data"] == prepared.fingerprint


def test_counts_are_those_of_the_windows(prepared: Prepared) -> None:
    counts = prepared.token_counts(T, V + 4)
    windows = np.array([np.frombuffer(window, np.int32) for window in all_windows(prepared)])
    np.testing.assert_array_equal(counts[0], np.bincount(windows[:, :-1].ravel(), minlength=V + 4))
    np.testing.assert_array_equal(counts[1], np.bincount(windows[:, 1:].ravel(), minlength=V + 4))
    assert counts.dtype == np.int64
    assert (prepared.directory / f"counts-{T}.npy").exists()
    np.testing.assert_array_equal(prepared.token_counts(T, V + 4), counts)  # from the file
    with pytest.raises(UserError, match=r"model.vocab_size: 299 is less than the 300"):
        prepared.token_counts(T, V - 1)


def test_counts_do_not_depend_on_how_many_are_counted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(1).integers(0, 9, 1000)
    once = Windows([tokens], T).counts(9)
    monkeypatch.setattr("tiedjax.data.prepared._CHUNK", 7)
    np.testing.assert_array_equal(Windows([tokens], T).counts(9), once)


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_reads_every_held_out_window_once_in_halves(
    prepared: Prepared, processes: int, limit: int | None
) -> None:
    size = B // processes
    shares = [list(eval_batches(prepared, T, B, slice(p * size, (p + 1) * size), limit)) for p in range(processes)]
    assert len({len(share) for share in shares}) == 1
    seen: dict[str, list[object]] = {"even": [], "odd": []}
    for parts in zip(*shares, strict=True):
        for half, tokens, weights in parts:
            assert tokens.shape == (size, T + 1)
            assert weights.dtype == np.float32
            seen[half] += [row for row, weight in zip(keys(tokens), weights, strict=True) if weight]
    windows = all_windows(prepared, "eval")[: limit and limit * B]
    assert seen == {"even": windows[::2], "odd": windows[1::2]}


def test_windows_refuse_numbers_they_do_not_have(prepared: Prepared) -> None:
    windows = prepared.windows("train", T)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows.read([index])


def test_too_little_text_is_said_at_once(prepared: Prepared) -> None:
    count = len(prepared.windows("train", T))
    with pytest.raises(UserError, match=rf"data.batch_size: {count + 1} is more than the {count} training windows"):
        Batches(prepared, T, count + 1, seed=0)
    with pytest.raises(UserError, match="too little text: the 440 eval tokens hold no window"):
        Batches(prepared, 300, 1, seed=0)
    with pytest.raises(UserError, match=r"train.seed"):
        Batches(prepared, T, B, seed=2**32)


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (7, 3), (43_000, 0), (10**6, 2**32 - 1)])
def test_the_order_is_that_of_grain(count: int, seed: int) -> None:
    """Runs that were begun with Grain's own dataset go on with the same batches."""
    theirs = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    places = [*range(min(count, 50)), *np.random.default_rng(0).integers(0, 9 * count, 200).tolist()]
    assert _Order(count, seed).windows(places) == [theirs[place] for place in places]


def test_the_order_of_a_seed_never_changes() -> None:
    """Drawn with Grain 0.2.18: another shuffle in a later one would give every run other data."""
    assert _Order(1000, 0).windows(range(12)) == [297, 371, 706, 141, 935, 215, 144, 766, 695, 836, 71, 596]
    assert _Order(1000, 7).windows(range(996, 1004)) == [430, 297, 366, 433, 186, 373, 122, 990]
    assert _Order(43_000, 1).windows([0, 42_999, 43_000, 10**6]) == [33637, 40657, 6134, 6641]
