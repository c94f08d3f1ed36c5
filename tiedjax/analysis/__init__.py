"""The public surface of analysis: every instrument by the name of its command, and what they take and return.

    from tiedjax.analysis import align, knn

An instrument is a function of arrays, or of a run's model and its text, that returns frozen dataclasses of plain
numbers; a score stands beside its floor (`Score`). The command line and the report call the same functions with the
same defaults. `fits_of` is the part of `align` that scores each fit: what many pairs of tables need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiedjax.analysis.basis import published
    from tiedjax.analysis.basis.chance import Score
    from tiedjax.analysis.basis.held_out import FrozenModel, held_out_windows
    from tiedjax.analysis.basis.model_on_text import ModelOnText
    from tiedjax.analysis.basis.run_data import data_of
    from tiedjax.analysis.basis.statistics import Interval, interval, paired
    from tiedjax.analysis.basis.strata import strata
    from tiedjax.analysis.basis.tables import seen_rows
    from tiedjax.analysis.basis.tokens import most_frequent, token_texts
    from tiedjax.analysis.instruments.account.account import measure as account
    from tiedjax.analysis.instruments.alignment.align import align as fits_of
    from tiedjax.analysis.instruments.alignment.align import measure as align
    from tiedjax.analysis.instruments.calibration.calibration import measure as calibration
    from tiedjax.analysis.instruments.contribution.contribution import measure as blocks
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import contexts_of
    from tiedjax.analysis.instruments.cooccurrence.cooccurrence import measure as cooccurrence
    from tiedjax.analysis.instruments.diversity.diversity import measure as diversity
    from tiedjax.analysis.instruments.evolution.evolution import measure as evolution
    from tiedjax.analysis.instruments.gradients.gradients import measure as gradients
    from tiedjax.analysis.instruments.gradients.gradients import output_share, smooth
    from tiedjax.analysis.instruments.graph_distance.graph_distance import measure as spectral
    from tiedjax.analysis.instruments.hurdles.hurdles import measure as hurdles
    from tiedjax.analysis.instruments.lens.lens import measure as lens
    from tiedjax.analysis.instruments.neighbours.overlap import measure as knn
    from tiedjax.analysis.instruments.neighbours.overlap import shared
    from tiedjax.analysis.instruments.neighbours.search import Searches, neighbours
    from tiedjax.analysis.instruments.norms.norms import measure as norms
    from tiedjax.analysis.instruments.picture.projection import measure as picture
    from tiedjax.analysis.instruments.regret.regret import measure as regret
    from tiedjax.analysis.instruments.rounding.rounding import measure as rounding
    from tiedjax.analysis.instruments.shape.space_similarity import measure as similarity
    from tiedjax.analysis.instruments.shape.table_shape import measure as spectrum
    from tiedjax.analysis.study.tasks import read_results
    from tiedjax.tying import distinct

__all__ = [
    "FrozenModel",
    "Interval",
    "ModelOnText",
    "Score",
    "Searches",
    "account",
    "align",
    "blocks",
    "calibration",
    "contexts_of",
    "cooccurrence",
    "data_of",
    "distinct",
    "diversity",
    "evolution",
    "fits_of",
    "gradients",
    "held_out_windows",
    "hurdles",
    "interval",
    "knn",
    "lens",
    "most_frequent",
    "neighbours",
    "norms",
    "output_share",
    "paired",
    "picture",
    "published",
    "read_results",
    "regret",
    "rounding",
    "seen_rows",
    "shared",
    "similarity",
    "smooth",
    "spectral",
    "spectrum",
    "strata",
    "token_texts",
]

_INSTRUMENTS = "tiedjax.analysis.instruments"
# Where each name lives: "module:name", or "module" alone. Imported when first asked for: `tiedjax --help` needs none.
_HOMES = {
    "FrozenModel": "tiedjax.analysis.basis.held_out:FrozenModel",
    "Interval": "tiedjax.analysis.basis.statistics:Interval",
    "ModelOnText": "tiedjax.analysis.basis.model_on_text:ModelOnText",
    "Score": "tiedjax.analysis.basis.chance:Score",
    "Searches": f"{_INSTRUMENTS}.neighbours.search:Searches",
    "account": f"{_INSTRUMENTS}.account.account:measure",
    "align": f"{_INSTRUMENTS}.alignment.align:measure",
    "blocks": f"{_INSTRUMENTS}.contribution.contribution:measure",
    "calibration": f"{_INSTRUMENTS}.calibration.calibration:measure",
    "contexts_of": f"{_INSTRUMENTS}.cooccurrence.cooccurrence:contexts_of",
    "cooccurrence": f"{_INSTRUMENTS}.cooccurrence.cooccurrence:measure",
    "data_of": "tiedjax.analysis.basis.run_data:data_of",
    "distinct": "tiedjax.tying:distinct",
    "diversity": f"{_INSTRUMENTS}.diversity.diversity:measure",
    "evolution": f"{_INSTRUMENTS}.evolution.evolution:measure",
    "fits_of": f"{_INSTRUMENTS}.alignment.align:align",
    "gradients": f"{_INSTRUMENTS}.gradients.gradients:measure",
    "held_out_windows": "tiedjax.analysis.basis.held_out:held_out_windows",
    "hurdles": f"{_INSTRUMENTS}.hurdles.hurdles:measure",
    "interval": "tiedjax.analysis.basis.statistics:interval",
    "knn": f"{_INSTRUMENTS}.neighbours.overlap:measure",
    "lens": f"{_INSTRUMENTS}.lens.lens:measure",
    "most_frequent": "tiedjax.analysis.basis.tokens:most_frequent",
    "neighbours": f"{_INSTRUMENTS}.neighbours.search:neighbours",
    "norms": f"{_INSTRUMENTS}.norms.norms:measure",
    "output_share": f"{_INSTRUMENTS}.gradients.gradients:output_share",
    "paired": "tiedjax.analysis.basis.statistics:paired",
    "picture": f"{_INSTRUMENTS}.picture.projection:measure",
    "published": "tiedjax.analysis.basis.published",
    "read_results": "tiedjax.analysis.study.tasks:read_results",
    "regret": f"{_INSTRUMENTS}.regret.regret:measure",
    "rounding": f"{_INSTRUMENTS}.rounding.rounding:measure",
    "seen_rows": "tiedjax.analysis.basis.tables:seen_rows",
    "shared": f"{_INSTRUMENTS}.neighbours.overlap:shared",
    "similarity": f"{_INSTRUMENTS}.shape.space_similarity:measure",
    "smooth": f"{_INSTRUMENTS}.gradients.gradients:smooth",
    "spectral": f"{_INSTRUMENTS}.graph_distance.graph_distance:measure",
    "spectrum": f"{_INSTRUMENTS}.shape.table_shape:measure",
    "strata": "tiedjax.analysis.basis.strata:strata",
    "token_texts": "tiedjax.analysis.basis.tokens:token_texts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tiedjax.analysis' has no attribute {name!r}")
    place, _, attribute = _HOMES[name].partition(":")
    module = importlib.import_module(place)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
