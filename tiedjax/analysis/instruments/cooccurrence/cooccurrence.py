"""Co-occurrence: do tokens that keep the same company in the text lie close in a table?

A token keeps company in two ways: as target with the tokens that precede it, as context with those that follow it. Both
are rows of one matrix of counts [V, V] of neighbouring tokens, weighted by positive pointwise mutual information
(Bullinaria and Levy 2007, Behavior Research Methods 39; Levy and Goldberg 2014, arXiv 1402.3722); the similarity of two
tokens is the cosine of their rows. How a table's cosines rank the pairs of tokens is compared with how these do.

Axes: V tokens, N sampled ones, M those of a stratum, P pairs of tokens that were neighbours, W windows, S = T + 1, U
tokens that are neighbours of a sampled one, B a block of them, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse

from tiedjax.analysis.basis.blocked import MULTIPLIED, row_blocks
from tiedjax.analysis.basis.chance import Score
from tiedjax.analysis.basis.directions import centre
from tiedjax.analysis.basis.statistics import Interval
from tiedjax.analysis.basis.strata import strata
from tiedjax.analysis.basis.token_pairs import (
    BOOTSTRAP_DRAWS,
    DRAWS,
    Ranking,
    agreements,
    partial_agreements,
)
from tiedjax.data.prepared import Prepared, Windows
from tiedjax.errors import UserError

MOST_TOKENS = 50_000_000  # pairs of neighbours that are counted
LEAST_COUNT = 10  # of a sampled token, in either role
SAMPLE = 1000  # tokens, whose pairs are all compared
_CHUNK = 2**22  # pairs counted at a time


@dataclass(frozen=True)
class Contexts:
    """What the text says of the sampled tokens: cosines of their contexts as target and as context, [N, N] each.

    `tokens` [N] are their ids, `eligible` how many tokens were frequent enough to be sampled, `counted` how many pairs
    of neighbours were counted of how many there are, `strata` boolean [N] masks by count.
    """

    tokens: np.ndarray
    as_target_NN: np.ndarray
    as_context_NN: np.ndarray
    strata: dict[str, np.ndarray]
    eligible: int
    least_count: int
    counted: int
    available: int

    @cached_property
    def rankings(self) -> tuple[Ranking, Ranking]:
        """Both similarities as ranks."""
        return Ranking(self.as_target_NN), Ranking(self.as_context_NN)

    @cached_property
    def parts(self) -> dict[str, Contexts]:
        """The tokens of each stratum by themselves."""
        return {name: self.only(np.flatnonzero(mask)) for name, mask in self.strata.items()}

    @property
    def facts(self) -> dict[str, int]:
        """What was counted, as results state it."""
        return {name: getattr(self, name) for name in ("counted", "available", "eligible", "least_count")}

    def only(self, index: np.ndarray) -> Contexts:
        """The same of some of the tokens."""
        block = np.ix_(index, index)
        return dataclasses.replace(
            self,
            tokens=self.tokens[index],
            as_target_NN=self.as_target_NN[block],
            as_context_NN=self.as_context_NN[block],
            strata={name: mask[index] for name, mask in self.strata.items()},
        )


@dataclass(frozen=True)
class Stratum:
    """The agreements over the pairs within one third of the tokens by count, without intervals."""

    rows: int
    as_target: Score
    as_context: Score
    difference: Interval


@dataclass(frozen=True)
class Partial:
    """Both agreements, each with the other side of the contexts held fixed, and the first minus the second.

    That difference is the table's position: above 0 where it follows what precedes a token.
    """

    as_target: Score
    as_context: Score
    position: Interval


@dataclass(frozen=True)
class Cooccurrence:
    """A table's agreement with the contexts as target (what precedes) and as context (what follows), and the first
    minus the second. `rows_left_out`: sampled tokens whose centred row in the table is zero. `partial` is None in what
    was saved before it was measured."""

    rows: int
    rows_left_out: int
    width: int
    as_target: Score
    as_context: Score
    difference: Interval
    strata: dict[str, Stratum]
    partial: Partial | None = None


def bigram_counts(
    windows: Windows,
    rows: int,
    *,
    most: int = MOST_TOKENS,
    report: Callable[[str], None] = lambda line: None,
) -> scipy.sparse.csr_array:
    """How often each token (row) followed each other token (column) in the windows: int64 [rows, rows].

    Its sums over columns and rows are the token counts as target and as input. Of more than `most` pairs, only those of
    windows spread evenly over the text are counted.
    """
    T = windows.seq_len
    window_W = np.arange(len(windows))
    if len(windows) * T > most:
        window_W = np.linspace(0, len(windows) - 1, max(1, most // T)).round().astype(np.int64)
    counts_VV = scipy.sparse.csr_array((rows, rows), dtype=np.int64)
    step = max(1, _CHUNK // T)
    for start in range(0, len(window_W), step):
        tokens_WS = windows.read(window_W[start : start + step])
        target_and_context = (tokens_WS[:, 1:].ravel(), tokens_WS[:, :-1].ravel())
        counts_VV += scipy.sparse.coo_array(
            (np.ones(len(target_and_context[0]), np.int64), target_and_context), shape=counts_VV.shape
        ).tocsr()
        report(f"pairs of neighbours: {min(start + step, len(window_W)) * T:,} of {len(window_W) * T:,}")
    return counts_VV


def ppmi(counts_VV: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """max(0, ln(n_ij n / (n_i n_j))) of the counts, float64, sparse."""
    pairs_VV = counts_VV.tocoo().astype(np.float64)
    row_V, column_V = (np.asarray(counts_VV.sum(axis=axis), np.float64) for axis in (1, 0))
    information_P = np.log(pairs_VV.data * row_V.sum() / (row_V[pairs_VV.coords[0]] * column_V[pairs_VV.coords[1]]))
    ppmi_VV = scipy.sparse.coo_array((np.maximum(information_P, 0), pairs_VV.coords), shape=pairs_VV.shape).tocsr()
    ppmi_VV.eliminate_zeros()
    return ppmi_VV


def contexts(
    counts_VV: scipy.sparse.csr_array,
    *,
    available: int | None = None,
    sample: int = SAMPLE,
    least_count: int = LEAST_COUNT,
) -> Contexts:
    """What the counts say of `sample` tokens, drawn by `numpy.random.default_rng(0)` from those that occurred at least
    `least_count` times in either role and have a context of positive information in both.

    `available` is how many pairs there were to count. UserError where fewer than 4 tokens are frequent enough.
    """
    counts_2V = np.stack([np.asarray(counts_VV.sum(axis=axis)) for axis in (0, 1)])
    ppmi_VV = ppmi(counts_VV)
    informed_V = (np.diff(ppmi_VV.indptr) > 0) & (np.diff(ppmi_VV.tocsc().indptr) > 0)
    eligible_N = np.flatnonzero((counts_2V.min(axis=0) >= least_count) & informed_V)
    if len(eligible_N) < 4:
        raise UserError(
            f"cooccurrence: only {len(eligible_N)} tokens occur {least_count} times as input and as target; it takes 4"
        )
    token_N = eligible_N
    if len(eligible_N) > sample:
        token_N = np.sort(np.random.default_rng(0).choice(eligible_N, sample, replace=False))
    pairs_counted = int(counts_2V[0].sum())
    return Contexts(
        tokens=token_N,
        as_target_NN=_cosines(ppmi_VV[token_N]),
        as_context_NN=_cosines(ppmi_VV.T.tocsr()[token_N]),
        strata=strata(counts_2V[:, token_N]),
        eligible=len(eligible_N),
        least_count=least_count,
        counted=pairs_counted,
        available=pairs_counted if available is None else available,
    )


def contexts_of(
    prepared: Prepared,
    seq_len: int,
    rows: int,
    *,
    sample: int = SAMPLE,
    least_count: int = LEAST_COUNT,
    report: Callable[[str], None] = lambda line: None,
) -> Contexts:
    """`contexts` of a run's training text, in windows of `seq_len` tokens, for a table of so many rows."""
    text = replace(prepared, begin_id=None)  # no text holds the token that a model is shown before each window
    windows = text.windows("train", seq_len)
    counts = bigram_counts(windows, rows, report=report)
    return contexts(counts, available=len(windows) * seq_len, sample=sample, least_count=least_count)


def measure(
    table_VD: np.ndarray,
    text: Contexts,
    *,
    kept_V: np.ndarray | None = None,
    draws: int = DRAWS,
    bootstrap: int = BOOTSTRAP_DRAWS,
) -> Cooccurrence:
    """How the cosines of the table's rows agree with the text.

    The table is centred by the mean of `kept_V`, boolean [V], by default of all. UserError: a table that is not [V, D]
    with D of at least 2, of fewer rows than the text has tokens, or with fewer than 4 sampled rows that have a
    direction.

    >>> counts = scipy.sparse.csr_array(np.random.default_rng(0).poisson(3, (30, 30)))
    >>> text = contexts(counts, least_count=1)
    >>> measure(np.random.default_rng(1).normal(size=(30, 4)), text).rows
    30
    """
    if table_VD.ndim != 2 or table_VD.shape[1] < 2:
        raise UserError(f"cooccurrence: a table must be [V, D] with D of at least 2, got {list(table_VD.shape)}")
    if text.tokens[-1] >= len(table_VD):
        raise UserError(f"cooccurrence: the text has a token {text.tokens[-1]}, the table only {len(table_VD)} rows")
    mean_D, least = centre(table_VD if kept_V is None else table_VD[kept_V])
    x_ND = np.asarray(table_VD[text.tokens], np.float64) - mean_D
    norm_N = np.linalg.norm(x_ND, axis=1)
    index_N = np.flatnonzero(norm_N > least)
    if len(index_N) < 4:
        raise UserError(f"cooccurrence: only {len(index_N)} of {len(norm_N)} sampled rows have a direction; it takes 4")
    unit_ND = x_ND[index_N] / norm_N[index_N, None]
    cosine_NN = unit_ND @ unit_ND.T
    text = text if len(index_N) == len(norm_N) else text.only(index_N)
    (as_target, as_context), difference = agreements(
        cosine_NN, text.rankings, draws=draws, bootstrap=bootstrap, rows_left_out=len(norm_N) - len(index_N)
    )
    (target_alone, context_alone), position = partial_agreements(
        cosine_NN, text.rankings, draws=draws, bootstrap=bootstrap, rows_left_out=len(norm_N) - len(index_N)
    )
    parts = {}
    for name, part in text.parts.items():
        index_M = np.flatnonzero(text.strata[name])
        (a, b), gap = agreements(cosine_NN[np.ix_(index_M, index_M)], part.rankings, draws=draws, bootstrap=0)
        parts[name] = Stratum(a.rows, a, b, gap)
    return Cooccurrence(
        rows=len(index_N),
        rows_left_out=len(norm_N) - len(index_N),
        width=table_VD.shape[1],
        as_target=as_target,
        as_context=as_context,
        difference=difference,
        strata=parts,
        partial=Partial(target_alone, context_alone, position),
    )


def _cosines(rows_NV: scipy.sparse.csr_array) -> np.ndarray:
    """Cosines of every two sparse rows, float64 [N, N]; the columns that are used are made dense block by block."""
    used_U = np.flatnonzero(np.bincount(rows_NV.indices, minlength=rows_NV.shape[1]))
    columns_NU = rows_NV[:, used_U].tocsc()
    product_NN = np.zeros((rows_NV.shape[0],) * 2)
    for block in row_blocks(len(used_U), rows_NV.shape[0], itemsize=8, block_bytes=MULTIPLIED):
        dense_NB = columns_NU[:, block].toarray()
        product_NN += dense_NB @ dense_NB.T
    norm_N = np.sqrt(np.diagonal(product_NN))
    return product_NN / norm_N[:, None] / norm_N[None, :]
