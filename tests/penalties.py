"""The regularisers of tables and their gradients in NumPy, float64, as they are defined: pair by pair, row by row."""

from __future__ import annotations

import numpy as np

NAMES = ("cosine", "orthogonality", "mean", "anchor")


def value(name: str, table: np.ndarray, n: int, start: np.ndarray) -> float:
    """Of the first n rows of a table that began as `start`."""
    E, A = (np.asarray(each, np.float64)[:n] for each in (table, start))
    if name == "cosine":
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        return float(np.mean([E[i] @ E[j] / np.linalg.norm(E[i]) / np.linalg.norm(E[j]) for i, j in pairs]))
    if name == "orthogonality":
        products = E.T @ E / n
        c = np.mean([column @ column / n for column in E.T])
        return float(np.linalg.norm(products - c * np.eye(len(products)), "fro") ** 2)
    if name == "mean":
        return float(np.linalg.norm(E.mean(axis=0)) ** 2)
    return float(np.mean([np.linalg.norm(e - a) ** 2 for e, a in zip(E, A, strict=True)]))


def gradient(name: str, table: np.ndarray, n: int, start: np.ndarray) -> np.ndarray:
    """Of `value`, by hand; 0 in the rows from n on."""
    E, A = (np.asarray(each, np.float64)[:n] for each in (table, start))
    found = np.zeros(np.shape(table))
    if name == "cosine":
        length = np.linalg.norm(E, axis=1)
        for i in range(n):
            for j in range(n):
                if i != j:
                    u, w = E[i] / length[i], E[j] / length[j]
                    found[i] += 2 * (w - (u @ w) * u) / length[i] / (n * (n - 1))
    elif name == "orthogonality":
        c = np.sum(E**2) / n / E.shape[1]
        found[:n] = 4 / n * E @ (E.T @ E / n - c * np.eye(E.shape[1]))
    elif name == "mean":
        found[:n] = 2 / n * E.mean(axis=0)
    else:
        found[:n] = 2 / n * (E - A)
    return found
