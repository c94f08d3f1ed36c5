"""One folder for each instrument: its computation, its command, its section of the report.

The computation's `measure` is what both the command and the section call, with the same defaults, so that a number in
the report is the number of the command. It returns frozen dataclasses; a score with a value by chance is a `Score`.

`command.py`, which imports nothing heavy before it runs, has

    HELP                    one line
    SUBJECT                 what it takes: "run" (RUN, for what only training leaves), "model" (RUN, or a model's
                            directory, and a text), "table" (TABLE), "tables" (one or two) or "pair" (A and B)
    add_arguments(parser)   its arguments and options
    run(args)               what `--json` writes, and the text that is printed; UserError for bad input
    SLOW                    True where a run takes minutes: then only what names it runs it (none: False)

`section.py` has

    collect(study)    what results.json holds under the section's name: plain records, from the study's runs
    plots(results)    its figures, drawn from results.json alone
    VERSION           of these records: another number where a key changes its meaning or goes (none: 1)
    KEYS              what it reads of results.json, where that is not its own name alone

One whose runs take long each has `collect(study, seed)`, records of that seed's runs, so that seeds can be shared out,
and `together(reference, runs)`, what results.json holds of the records of all seeds;

and each what `section.html.j2` calls to put numbers into words (there it is `s`).
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

# The name of each one's command, and its folder: the order of `analyze` and of the report. A new one is one more line.
_FOLDERS = {
    "align": "alignment",
    "knn": "neighbours",
    "spectral": "graph_distance",
    "gradients": "gradients",
    "account": "account",
    "evolution": "evolution",
    "norms": "norms",
    "spectrum": "shape",
    "hurdles": "hurdles",
    "lens": "lens",
    "blocks": "contribution",
    "calibration": "calibration",
    "diversity": "diversity",
    "rounding": "rounding",
    "regret": "regret",
    "cooccurrence": "cooccurrence",
    "map": "picture",
}
INSTRUMENTS: dict[str, Any] = {
    name: importlib.import_module(f"{__name__}.{folder}.command") for name, folder in _FOLDERS.items()
}
# Not part of `analyze all`, nor of a study but by its `slow_instruments` or `--instruments`.
SLOW = frozenset(name for name, module in INSTRUMENTS.items() if getattr(module, "SLOW", False))


def sections() -> dict[str, ModuleType]:
    """The `section` of every instrument that has one, by the name of its command."""
    places = {name: f"{__name__}.{folder}.section" for name, folder in _FOLDERS.items()}
    return {name: importlib.import_module(place) for name, place in places.items() if importlib.util.find_spec(place)}
