"""A run's held-out loss beside what predicting without a model costs."""
