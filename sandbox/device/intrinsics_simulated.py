"""The functions of intrinsics.py that tiles.py calls, on the simulator."""

from __future__ import annotations

from .copies_simulated import copies_arrive, copy_quad

__all__ = ["adjacent", "copies_arrive", "copy_quad", "in_quads", "put_quad", "quad"]


def quad(tile, r, k):
    """(tile[r, k], …, tile[r, k + 3])."""
    return tile[r, k], tile[r, k + 1], tile[r, k + 2], tile[r, k + 3]


def put_quad(tile, r, k, x0, x1, x2, x3):
    """tile[r, k], …, tile[r, k + 3] = x0, …, x3."""
    tile[r, k], tile[r, k + 1], tile[r, k + 2], tile[r, k + 3] = x0, x1, x2, x3


def adjacent(X, n, c):
    """X[n, c] of an array whose columns lie side by side."""
    return X[n, c]


def in_quads(X):
    """Whether every row of X starts at a multiple of 16 bytes and its columns lie side by side."""
    return X.strides[1] == X.itemsize and (X.address | X.strides[0]) % 16 == 0
