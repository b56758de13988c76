"""Accesses of kernels to memory, counted per array by what runs them without a GPU: the simulator, and the emulator."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager


class Traffic:
    """Global-memory accesses of the launches inside a ``counting()`` block, per array, in elements and bytes.

    shared_reads, shared_writes: of shared memory, per tile, in elements
    """

    def __init__(self):
        self.reads, self.writes = Counter(), Counter()
        self.read_bytes = self.write_bytes = 0
        self.shared_reads, self.shared_writes = Counter(), Counter()


class _Counting(threading.local):
    """The `counting()` blocks that a Python thread is inside of."""

    def __init__(self):
        self.blocks: list[Traffic] = []


_counting = _Counting()


@contextmanager
def counting():
    """Counts every launch that this Python thread makes inside: ``with counting() as traffic: launch(...)``."""
    traffic = Traffic()
    _counting.blocks.append(traffic)
    try:
        yield traffic
    finally:
        _counting.blocks.remove(traffic)


def count(name: str, reads: int, writes: int, itemsize: int) -> None:
    """Adds accesses of one array to every `counting()` block that this Python thread is inside of."""
    letter = name.partition("_")[0]  # O_acc is O, kept in fp32
    for traffic in _counting.blocks:
        traffic.reads[letter] += reads
        traffic.writes[letter] += writes
        traffic.read_bytes += reads * itemsize
        traffic.write_bytes += writes * itemsize


def count_shared(name: str, reads: int, writes: int) -> None:
    """The same of one tile in shared memory."""
    for traffic in _counting.blocks:
        traffic.shared_reads[name] += reads
        traffic.shared_writes[name] += writes
