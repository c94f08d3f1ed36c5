"""N-grams of a text by brute force: probabilities as fractions, and strengths by really leaving targets out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest

from tiedjax.analysis.basis import ngrams
from tiedjax.analysis.basis.ngrams import PREDICTORS, STRENGTHS, NGrams

V, T = 11, 7


def text(windows: int, seed: int = 0, V: int = V, T: int = T) -> np.ndarray:
    """Windows of a chain whose next token goes by the two before, int32 [windows, T + 1]; the last token never comes.

    Tokens recur more often after the pairs after which they came.
    """
    rng = np.random.default_rng(seed)
    chance = np.random.default_rng(9).dirichlet(np.full(V - 1, 0.15), size=(V, V))
    tokens_WS = np.zeros((windows, T + 1), np.int32)
    for row in tokens_WS:
        for t in range(T + 1):
            row[t] = rng.choice(V - 1, p=chance[row[t - 2] if t > 1 else V - 1, row[t - 1] if t else V - 1])
    return tokens_WS


Event = tuple[int | None, int, int]  # two tokens before, None at a window's first target; the token before; the target


def events(tokens_WS: np.ndarray) -> list[Event]:
    """What is predicted from what, one after the other."""
    return [
        (row[t - 2] if t > 1 else None, row[t - 1], row[t]) for row in tokens_WS.tolist() for t in range(1, len(row))
    ]


class BruteForce:
    """The predictors of a list of events, by dictionaries and fractions."""

    def __init__(self, shown: Iterable[Event], V: int = V) -> None:
        self.V, shown = V, list(shown)
        self.counts = Counter(key for a, c, w in shown for key in (("", w), (c, ""), (c, w), (a, c, ""), (a, c, w)))
        self.n = len(shown)

    def count(self, event: Event, sign: int) -> None:
        """Puts an event in, or takes it out."""
        a, c, w = event
        for key in (("", w), (c, ""), (c, w), (a, c, ""), (a, c, w)):
            self.counts[key] += sign
        self.n += sign

    def unigram(self, w: int) -> Fraction:
        return Fraction(self.counts["", w] + 1, self.n + self.V)

    def bigram(self, c: int, w: int, beta: float) -> Fraction:
        return (self.counts[c, w] + Fraction(beta) * self.unigram(w)) / (self.counts[c, ""] + Fraction(beta))

    def trigram(self, event: Event, beta: float, gamma: float) -> Fraction:
        a, c, w = event
        prior = self.bigram(c, w, beta)
        if a is None:
            return prior
        return (self.counts[a, c, w] + Fraction(gamma) * prior) / (self.counts[a, c, ""] + Fraction(gamma))

    def left_out(self, event: Event, beta: float, gamma: float) -> tuple[float, float]:
        """log of bigram and trigram of an event, from the text without it."""
        self.count(event, -1)
        logs = math.log(self.bigram(*event[1:], beta)), math.log(self.trigram(event, beta, gamma))
        self.count(event, 1)
        return logs


def batches(tokens_WS: np.ndarray, rows: int = 5) -> list[np.ndarray]:
    return [tokens_WS[start : start + rows] for start in range(0, len(tokens_WS), rows)]


def test_every_predictor_is_that_of_brute_force() -> None:
    shown, held_out = text(60), text(9, seed=1)
    held_out[0, 3] = V - 1  # which was never shown
    found = NGrams(batches(shown), held_out, V)
    exact = BruteForce(events(shown))
    bits = found.bits(held_out)
    assert list(bits) == list(PREDICTORS) == ["uniform", "unigram", "bigram", "trigram"]
    assert {values.shape for values in bits.values()} == {(9, T)}
    wanted = {
        "uniform": [1 / V for _ in events(held_out)],
        "unigram": [exact.unigram(w) for _, _, w in events(held_out)],
        "bigram": [exact.bigram(c, w, found.beta) for _, c, w in events(held_out)],
        "trigram": [exact.trigram(event, found.beta, found.gamma) for event in events(held_out)],
    }
    for name, probabilities in wanted.items():
        expected = [-math.log2(p) for p in probabilities]
        np.testing.assert_allclose(bits[name].ravel(), expected, rtol=0, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found.unigram_V, [float(exact.unigram(w)) for w in range(V)], atol=1e-12)
    assert found.training_tokens == exact.n == 60 * T
    np.testing.assert_array_equal(bits["trigram"][:, 0], bits["bigram"][:, 0])
    assert (bits["trigram"][:, 1:] != bits["bigram"][:, 1:]).mean() > 0.9
    means = [values.mean() for values in bits.values()]
    assert means == sorted(means, reverse=True), "each context helps on this text"


def test_strengths_make_targets_that_are_really_left_out_most_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta by the bigram, then gamma by the trigram, over the first batches that together hold the sample."""
    shown = text(60)
    monkeypatch.setattr(ngrams, "_SAMPLE", 11 * T)  # three batches of five windows
    found = NGrams(batches(shown), text(3, seed=1), V)
    exact, sample = BruteForce(events(shown)), events(shown[:15])
    by_beta = [sum(exact.left_out(event, beta, 1.0)[0] for event in sample) for beta in STRENGTHS]
    assert found.beta == STRENGTHS[int(np.argmax(by_beta))]
    by_gamma = [sum(exact.left_out(event, found.beta, gamma)[1] for event in sample) for gamma in STRENGTHS]
    assert found.gamma == STRENGTHS[int(np.argmax(by_gamma))]
    for chosen, likelihood in [(found.beta, by_beta), (found.gamma, by_gamma)]:
        assert STRENGTHS[0] < chosen < STRENGTHS[-1]
        assert sorted(likelihood)[-1] - sorted(likelihood)[-2] > 1e-3, "no tie decides"
    shown_counts = [exact.trigram(event, found.beta, STRENGTHS[0]) for event in sample]
    assert sum(map(math.log, shown_counts)) > max(by_gamma), "which is what counts that hold the target would choose"


def test_probabilities_add_up_to_one_after_seen_and_unseen_tokens() -> None:
    shown = text(60)
    seen = [(a, c) for a, c, _ in events(shown) if a is not None][:2]
    unseen = next((a, c) for a in range(V - 1) for c in range(V - 1) if (a, c) not in {e[:2] for e in events(shown)})
    for a, c in [*seen, unseen, (seen[0][0], V - 1), (V - 1, seen[0][1]), (V - 1, V - 1)]:
        asked = np.array([[a, c, w] for w in range(V)])
        bits = NGrams(batches(shown), asked, V).bits(asked)
        for name in PREDICTORS:
            assert (2.0 ** -bits[name][:, 1]).sum() == pytest.approx(1, abs=1e-12), (name, a, c)


def test_held_out_text_chooses_and_changes_nothing() -> None:
    shown = text(60)
    one, other = (NGrams(batches(shown), held_out, V) for held_out in (text(2, seed=1), text(40, seed=2)))
    assert (one.beta, one.gamma, one.training_tokens) == (other.beta, other.gamma, other.training_tokens)
    both = NGrams(batches(shown), np.concatenate([text(2, seed=1), text(40, seed=2)]), V)
    for name in PREDICTORS:
        np.testing.assert_array_equal(one.bits(text(2, seed=1))[name], both.bits(text(2, seed=1))[name])


def test_batches_are_only_how_the_text_comes() -> None:
    shown, held_out = text(60), text(9, seed=1)
    one, other = (NGrams(batches(shown, rows), held_out, V) for rows in (60, 7))
    for name in PREDICTORS:
        np.testing.assert_array_equal(one.bits(held_out)[name], other.bits(held_out)[name])


def test_no_context_reaches_over_the_edge_of_a_window() -> None:
    """The same windows in another order are the same text, and neighbours in it need not be."""
    shown, held_out = text(60), text(9, seed=1)
    one, other = (NGrams([tokens_WS], held_out, V) for tokens_WS in (shown, shown[::-1]))
    for name in PREDICTORS:
        np.testing.assert_array_equal(one.bits(held_out)[name], other.bits(held_out)[name])


def test_a_target_is_left_out_of_every_count_that_it_is_part_of() -> None:
    shown = text(20)
    left_out = NGrams(batches(shown), text(3, seed=1), V)._counts.of(shown).without_one()
    exact = BruteForce(events(shown))
    wanted = [exact.left_out(event, 2.0, 0.5) for event in events(shown)]
    found = [np.log(p_WT).ravel() for p_WT in (left_out.bigram(2.0), left_out.trigram(2.0, 0.5))]
    np.testing.assert_allclose(np.transpose(found), wanted, rtol=0, atol=1e-12)


def test_contexts_whose_cubes_are_equal_modulo_two_to_the_64_are_told_apart() -> None:
    """a V² + c V + w of rows that are 2²⁰ apart is one number in 64 bits where V is 2²²."""
    large = 2**22
    rename = np.arange(V) % 4 * 2**20 + np.arange(V) // 4
    shown, held_out = rename[text(60)], rename[text(9, seed=1)]
    found = NGrams(batches(shown), held_out, large)
    exact = BruteForce(events(shown), large)
    expected = [-math.log2(exact.trigram(event, found.beta, found.gamma)) for event in events(held_out)]
    np.testing.assert_allclose(found.bits(held_out)["trigram"].ravel(), expected, rtol=0, atol=1e-9)


def test_windows_of_one_target_have_no_trigram() -> None:
    shown, held_out = text(300, T=1), text(9, seed=1, T=1)
    bits = NGrams(batches(shown), held_out, V).bits(held_out)
    np.testing.assert_allclose(bits["trigram"], bits["bigram"], rtol=1e-12)


def test_a_text_of_one_window_and_windows_that_were_not_asked_for() -> None:
    found = NGrams([text(1)], text(2, seed=1), V)
    assert all(np.isfinite(values).all() for values in found.bits(text(2, seed=1)).values())
    with pytest.raises(ValueError, match="hold n-grams that were not asked for"):
        found.bits(text(30, seed=5))
