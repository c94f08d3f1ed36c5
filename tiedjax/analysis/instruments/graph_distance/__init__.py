"""The spectral distance of two tables' neighbour graphs."""
