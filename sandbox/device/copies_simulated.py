"""Asynchronous copies on the simulator: what they read is read at once, and is there once their thread has waited."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from . import memory_simulated as memory
from .memory_simulated import SimulatorError, kernel_line

_copies: dict[int, list[list]] = {}  # thread -> groups of copies under way, (tile, index, value); the last is open
_copies_from: dict[int, tuple] = {}  # and the line of the kernel that started the first of them


def copy_quad(tile, r, k, X, n, seen):
    """tile[r, k : k + 4] = X[n, k : k + 4], or zeros where not seen: there once the thread calls `copies_arrive`."""
    copy(tile, r, k, 4, lambda c: X[n, c] if seen else 0)


def copy(tile, r, k, width, value_at):
    """tile[r, c] = value_at(c) for columns k … k + width - 1: read now, there once the thread has waited for it."""
    _copy(tile, [((r, c), value_at(c)) for c in range(k, k + width)])


def copy_line(line, r, width, value_at):
    """line[r + e] = value_at(e), e < width, of one dimension, likewise."""
    _copy(line, [(r + e, value_at(e)) for e in range(width)])


def _copy(tile, values):
    thread = memory.running.thread
    group = _copies.setdefault(thread, [[]])[-1]
    for index, value in values:
        tile.start_copy(index)
        group.append((tile, index, value))
    if thread not in _copies_from:
        _copies_from[thread] = kernel_line(sys._getframe())


def commit_group():
    """The copies that this thread has started since it did so last are one group."""
    if memory.running.thread in _copies:
        _copies[memory.running.thread].append([])


def wait_group(newest):
    """A function that waits until all but that many of this thread's groups have arrived, the newest."""

    def wait():
        groups = _copies.get(memory.running.thread, [[]])
        _end_copies(groups, max(0, len(groups) - 1 - newest))

    return wait


def copies_arrive():
    groups = _copies.get(memory.running.thread, [])
    _end_copies(groups, len(groups))


def _end_copies(groups, count):
    """The first so many groups of this thread arrive."""
    for group in groups[:count]:
        for tile, index, value in group:
            tile.end_copy(index, value)
    del groups[:count]
    if not any(groups):
        _copies_from.pop(memory.running.thread, None)
    if not groups:
        _copies.pop(memory.running.thread, None)


@contextmanager
def all_waited_for(block: int):
    """While a block runs, whose threads wait for all that they copy.  Raises SimulatorError where they do not."""
    try:
        yield
        left = [copy for groups in _copies.values() for group in groups for copy in group[:1]]
        if left:
            error = SimulatorError(
                f"copies into {left[0][0].name}, by {len(_copies_from)} threads of block {block}, were never waited for"
            )
            error.sites = tuple(sorted(set(_copies_from.values())))
            raise error
    finally:
        _copies.clear()
        _copies_from.clear()
