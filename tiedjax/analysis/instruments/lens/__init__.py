"""What each hidden state already predicts."""
