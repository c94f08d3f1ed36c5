"""How varied what a model writes is, beside held-out text."""
