"""Row norms against token frequency."""
