"""A corpus that every machine with Python already has, as a TFDS dataset (import the builder module to register it)."""
