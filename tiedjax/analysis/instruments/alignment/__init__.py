"""Alignment: one table mapped onto another, row by row."""
