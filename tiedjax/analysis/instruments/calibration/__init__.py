"""Whether a model's probabilities are the frequencies that they claim to be."""
