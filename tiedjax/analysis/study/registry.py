"""The sections of the report, in its order. A new one is one more folder and one more entry here."""

from __future__ import annotations

from typing import Any

from tiedjax.analysis.instruments.alignment import section as alignment
from tiedjax.analysis.instruments.calibration import section as calibration
from tiedjax.analysis.instruments.cooccurrence import section as cooccurrence
from tiedjax.analysis.instruments.evolution import section as evolution
from tiedjax.analysis.instruments.gradients import section as gradients
from tiedjax.analysis.instruments.graph_distance import section as graph_distance
from tiedjax.analysis.instruments.lens import section as lens
from tiedjax.analysis.instruments.neighbours import section as neighbours
from tiedjax.analysis.instruments.norms import section as norms
from tiedjax.analysis.instruments.picture import section as picture
from tiedjax.analysis.instruments.shape import section as shape
from tiedjax.analysis.study import two_forms

SCHEMA = 3  # of results.json: another number where a key changes its meaning or goes

SECTIONS: dict[str, Any] = {
    "alignment": alignment,
    "knn": neighbours,
    "spectral": graph_distance,
    "gradients": gradients,
    "evolution": evolution,
    "norms": norms,
    "spectrum": shape,
    "lens": lens,
    "calibration": calibration,
    "cooccurrence": cooccurrence,
    "map": picture,
    "forms": two_forms,
}
