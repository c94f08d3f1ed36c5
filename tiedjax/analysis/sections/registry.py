"""The sections of the report, in its order. A new one is one more file and one more entry here."""

from __future__ import annotations

from typing import Any

from tiedjax.analysis.sections import (
    alignment,
    calibration,
    cooccurrence,
    evolution,
    forms,
    gradients,
    knn,
    lens,
    map,
    norms,
    spectral,
    spectrum,
)

SCHEMA = 3  # of results.json: another number where a key changes its meaning or goes

SECTIONS: dict[str, Any] = {
    "alignment": alignment,
    "knn": knn,
    "spectral": spectral,
    "gradients": gradients,
    "evolution": evolution,
    "norms": norms,
    "spectrum": spectrum,
    "lens": lens,
    "calibration": calibration,
    "cooccurrence": cooccurrence,
    "map": map,
    "forms": forms,
}
