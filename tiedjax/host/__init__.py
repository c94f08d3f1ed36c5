"""This machine and its cluster: processes and what ends them, signals, workers, flags of XLA, profiling."""
