"""A table drawn in two dimensions."""
