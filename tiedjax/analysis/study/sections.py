"""The sections of the report, in its order: the first screen, the instruments, the two forms side by side."""

from __future__ import annotations

from typing import Any

from tiedjax.analysis import instruments
from tiedjax.analysis.study import overview, two_forms

SCHEMA = 3  # of results.json: another number where a key changes its meaning or goes

SECTIONS: dict[str, Any] = {"overview": overview, **instruments.sections(), "forms": two_forms}
