"""What a train step costs, measured here or compiled for hardware that is not there."""
