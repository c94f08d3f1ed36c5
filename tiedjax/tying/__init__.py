"""Tying: who owns the table parameters, and the exact split of their gradient by role.

Only this room knows tied from untied. Everyone else is given `Tables`, one [V, D] array for each role; under tying
the two are the same array. `tables` holds the pair, `split` what divides its gradient, `schemes` how it comes from
parameters, `anatomy` what the output role's gradient is made of.
"""

from tiedjax.tying.anatomy import common_mode, pull_and_push, signal_and_noise
from tiedjax.tying.schemes import (
    SCHEMES,
    Law,
    Parameter,
    Scheme,
    init_tables,
    refuse_options_of_roles,
    scheme_of,
    without_scales,
)
from tiedjax.tying.split import role_scale, split_gradient, tap_squares, zero_taps
from tiedjax.tying.tables import SHARED, Tables, distinct

__all__ = [
    "SCHEMES",
    "SHARED",
    "Law",
    "Parameter",
    "Scheme",
    "Tables",
    "common_mode",
    "distinct",
    "init_tables",
    "pull_and_push",
    "refuse_options_of_roles",
    "role_scale",
    "scheme_of",
    "signal_and_noise",
    "split_gradient",
    "tap_squares",
    "without_scales",
    "zero_taps",
]
