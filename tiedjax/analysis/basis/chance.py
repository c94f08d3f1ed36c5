"""What a score is worth beside the value that it takes by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """A score beside its floor, the value that it takes by chance.

    Attributes:
      score: None where nothing could be scored.
      floor: the mean over chance draws, or exact.
      floor_standard_error: of that mean; 0 where the floor is exact, None where that is not known.
      floor_deviation: the standard deviation of single draws: how far chance alone moves a score.
      floor_draws: how many made the floor; 0 where it is exact.
      floor_closed_form: what a formula gives for it, where there is one.
      corrected: (score - floor) / (1 - floor), 0 by chance and 1 where all is alike; None for scores of other kinds,
        and where chance already reaches 1.
      rows: that were scored.
      rows_left_out: of those asked for, because they have no direction.
      low, high: ends of a 95 % interval over rows; None where none was asked for.
    """

    score: float | None
    floor: float | None
    floor_standard_error: float | None = None
    floor_deviation: float | None = None
    floor_draws: int = 0
    floor_closed_form: float | None = None
    corrected: float | None = None
    rows: int = 0
    rows_left_out: int = 0
    low: float | None = None
    high: float | None = None

    @property
    def excess(self) -> float | None:
        """score - floor: for errors, which have no 1 to be corrected towards."""
        return None if self.score is None or self.floor is None else self.score - self.floor


def correct(score: float | None, floor: float | None) -> float | None:
    """(score - floor) / (1 - floor): 0 is chance, 1 is identical; None where chance already reaches 1.

    >>> correct(0.75, 0.5)
    0.5
    """
    if score is None or floor is None or 1 - floor < 1e-6:
        return None
    return (score - floor) / (1 - floor)


@dataclass(frozen=True)
class Floor:
    """The value that a score takes by chance, and how well it is known: the fields `floor...` of a `Score`."""

    value: float | None
    standard_error: float | None = None
    deviation: float | None = None
    draws: int = 0
    closed_form: float | None = None


def drawn_floor(scores: Sequence[float | None] | np.ndarray, closed_form: float | None = None) -> Floor:
    """The floor that the scores of chance draws make; draws that are None do not count.

    >>> drawn_floor([0.25, 0.75]).value
    0.5
    """
    draws = [score for score in scores if score is not None]
    deviation = float(np.std(draws, ddof=1)) if len(draws) > 1 else None
    return Floor(
        value=float(np.mean(draws)) if draws else None,
        standard_error=None if deviation is None else deviation / math.sqrt(len(draws)),
        deviation=deviation,
        draws=len(draws),
        closed_form=closed_form,
    )


def exact_floor(value: float | None, deviation: float | None = None) -> Floor:
    """A floor that is known without drawing; `deviation` is that of single draws."""
    return Floor(value, standard_error=None if value is None else 0.0, deviation=deviation)


def beside(
    score: float | None,
    floor: Floor,
    *,
    similarity: bool = True,
    rows: int = 0,
    rows_left_out: int = 0,
    interval: tuple[float | None, float | None] = (None, None),
) -> Score:
    """A score beside its floor; `similarity` says that 1 is alike, so that the score can be corrected.

    >>> beside(0.75, drawn_floor([0.25, 0.75])).corrected
    0.5
    """
    return Score(
        score=score,
        floor=floor.value,
        floor_standard_error=floor.standard_error,
        floor_deviation=floor.deviation,
        floor_draws=floor.draws,
        floor_closed_form=floor.closed_form,
        corrected=correct(score, floor.value) if similarity else None,
        rows=rows,
        rows_left_out=rows_left_out,
        low=interval[0],
        high=interval[1],
    )
