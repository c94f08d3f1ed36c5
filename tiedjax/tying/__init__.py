"""Tying: who owns the table parameters, and the exact split of their gradient by role.

Only this room knows tied from untied. Everyone else is given `Tables`, one [V, D] array for each role; under tying
the two are the same array. `tables` holds the pair, `split` what divides its gradient, `schemes` how it comes from
parameters.
"""

from tiedjax.tying.schemes import SCHEMES, Parameter, Scheme, init_tables, scheme_of, without_scales
from tiedjax.tying.split import role_scale, split_gradient, zero_taps
from tiedjax.tying.tables import SHARED, Tables, distinct

__all__ = [
    "SCHEMES",
    "SHARED",
    "Parameter",
    "Scheme",
    "Tables",
    "distinct",
    "init_tables",
    "role_scale",
    "scheme_of",
    "split_gradient",
    "without_scales",
    "zero_taps",
]
