"""The sections of the report, in its order. A new one is one more file and one more entry here."""

from __future__ import annotations

from typing import Any

from tiedjax.analysis.sections import alignment, evolution, gradients, norms

SECTIONS: dict[str, Any] = {
    "alignment": alignment,
    "gradients": gradients,
    "evolution": evolution,
    "norms": norms,
}
