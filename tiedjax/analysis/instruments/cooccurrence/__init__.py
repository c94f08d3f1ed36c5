"""Whether rows lie as their tokens' contexts do."""
