"""Tying: who owns the table parameters, the exact split of their gradient by role, and the account of who wrote them.

Only this room knows tied from untied. Everyone else is given `Tables`, one [V, D] array for each role; under tying
the two are the same array. `tables` holds the pair, `split` what divides its gradient, `schemes` how it comes from
parameters, `account` what each role's updates wrote, `anatomy` what the output role's gradient is made of.
"""

from tiedjax.tying.account import (
    SAMPLE_ROWS,
    Account,
    Follow,
    Parts,
    Rows,
    advanced,
    anatomy_wanted,
    compromise,
    error,
    follow,
    opened,
    rows_of,
    sampled_rows,
    taken,
    update_metrics,
)
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
    "SAMPLE_ROWS",
    "SCHEMES",
    "SHARED",
    "Account",
    "Follow",
    "Law",
    "Parameter",
    "Parts",
    "Rows",
    "Scheme",
    "Tables",
    "advanced",
    "anatomy_wanted",
    "common_mode",
    "compromise",
    "distinct",
    "error",
    "follow",
    "init_tables",
    "opened",
    "pull_and_push",
    "refuse_options_of_roles",
    "role_scale",
    "rows_of",
    "sampled_rows",
    "scheme_of",
    "signal_and_noise",
    "split_gradient",
    "taken",
    "tap_squares",
    "update_metrics",
    "without_scales",
    "zero_taps",
]
