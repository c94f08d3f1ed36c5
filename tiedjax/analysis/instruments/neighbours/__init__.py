"""Shared nearest neighbours of two tables."""
