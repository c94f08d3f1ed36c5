"""The sections of the report, in its order: first screen, frontier, instruments, the two forms side by side, texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiedjax.analysis import instruments
from tiedjax.analysis.study import frontier, overview, samples, two_forms

SCHEMA = 3  # of what results.json holds beside its sections: another number where a key changes its meaning or goes
AGAIN = "`tiedjax study` analyses the finished runs again"

SECTIONS: dict[str, Any] = {
    "overview": overview,
    "frontier": frontier,
    **instruments.sections(),
    "forms": two_forms,
    "samples": samples,
}


def keys(name: str) -> tuple[str, ...]:
    """What a section reads of results.json beside what is always there: its own name unless it says otherwise."""
    return tuple(getattr(SECTIONS[name], "KEYS", (name,)))


def versions() -> dict[str, int]:
    """The version of each section's keys in results.json; a section that has changed none says none."""
    return {name: getattr(section, "VERSION", 1) for name, section in SECTIONS.items()}


def sections_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that these results hold as this version draws them."""
    written = results.get("versions", {})
    drawn = versions()
    return {
        name: section
        for name, section in SECTIONS.items()
        if written.get(name, 1) == drawn[name] and all(key in results for key in keys(name))
    }


def without_others(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without what only sections read that cannot be drawn, so that nothing else draws it either."""
    kept = sections_of(results)
    unread = {key for name in SECTIONS if name not in kept for key in keys(name)}
    unread -= {key for name in kept for key in keys(name)}
    return {key: value for key, value in results.items() if key not in unread}


def left_out(results: Mapping[str, Any]) -> list[str]:
    """A line for each section that these results do not hold as this version draws it; none where nobody asked for a
    slow one.
    """
    kept = sections_of(results)
    return [
        f"Left out: {name}. These results do not hold it in the form that this version draws; {AGAIN}."
        for name in SECTIONS
        if name not in kept and (name not in instruments.SLOW or name in results)
    ]
