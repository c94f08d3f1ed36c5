"""How a number is written, and other text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiedjax import text

Span = Mapping[str, Any]  # statistics.Interval as JSON

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: fixed digits, a real minus sign, a dash for none."""
    if value is None:
        return NONE
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def spread(span: Span | None, digits: int = 3) -> str:
    """mean ± half the interval's width; the mean alone where there is no interval."""
    if span is None or span["mean"] is None:
        return NONE
    if span["low"] is None:
        return number(span["mean"], digits)
    # No-break spaces, so that a number and its uncertainty stay on one line.
    return f"{number(span['mean'], digits)}\u00a0±\u00a0{number((span['high'] - span['low']) / 2, digits)}"


def percent(span: Span) -> str:
    """A share as a percentage, with its interval where there is one; a dash for none."""
    if span["mean"] is None:
        return NONE
    scaled = {k: None if span[k] is None else 100 * span[k] for k in ("mean", "low", "high")}
    return f"{spread(scaled, 0 if scaled['low'] is None else 1)}\u00a0%"


def signed(span: Span) -> str:
    """As `spread`, with a plus sign where the mean is above 0."""
    rounded = float(f"{span['mean'] or 0:.3f}")
    return f"+{spread(span)}" if rounded > 0 else spread(span)


def compared(span: Span, before: str, after: str, unit: str) -> str:
    """A difference in a sentence: "BEFORE more AFTER, by SIZE UNIT", or less, or that it is undecided."""
    question, size = f"Whether {before} more or less {after}", spread(span)
    if span["mean"] is None:
        return f"{question} could not be measured."
    if span["low"] is not None and span["low"] <= 0 <= span["high"]:
        return f"{question} is undecided: the difference is {size} {unit}."
    side, one_seed = "more" if span["mean"] > 0 else "less", " (one seed)" if span["low"] is None else ""
    return f"{before[0].upper()}{before[1:]} {side} {after}, by {size.removeprefix('−')} {unit}{one_seed}."


def ends(values: Sequence[float]) -> str:
    """A number, or the least and the most of those that differ."""
    return " to ".join(f"{value:,.15g}" for value in sorted({min(values), max(values)}))


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them; a dash for none."""
    return NONE if seconds is None else text.duration(seconds)


def visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return "".join({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}.get(c, c if c.isprintable() else "�") for c in text)
