"""The role gradients over a run."""
