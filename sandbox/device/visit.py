"""Which tiles a block visits and what it sees there: the mask, on the device.

The kernel's arguments `lo, hi` are Mask.band's: row i sees key j when i + lo <= j <= i + hi.
"""

from __future__ import annotations

from numba import cuda, int32, int64

from ..problem import Problem
from .scalar import NEG_INF, ONE, device_function, tanh
from .threads import Threads

NONE, SOME, ALL = 0, 1, 2  # what a thread sees of a tile


@device_function
def ceil_div(n, step):
    return (n + step - 1) // step


class Visit:
    """The mask of a problem as a kernel meets it, tile by tile.  Compile-time: its kind.  Run time: its sizes."""

    def __init__(self, problem: Problem, threads: Threads):
        TY, TX, Br, Bc = threads.TY, threads.TX, threads.Br, threads.Bc
        RA, RB = threads.RA, threads.RB
        BANDED, BOOLEAN, SOFTCAP = problem.mask.banded, problem.mask.boolean, problem.softcap > 0
        bits = int32 if RB < 32 else int64
        PADDED = threads.RA * TY - Br + RB * TX - Bc

        @device_function
        def key_blocks(i0, N_q, N_k, lo, hi):
            """(first, end) of the key blocks that rows i0 … i0+Br-1 touch; the band empties all others."""
            if not BANDED:
                return 0, ceil_div(N_k, Bc)
            first, end = max(0, i0 + lo), min(N_k, min(i0 + Br, N_q) + hi)
            if first >= end:
                return 0, 0
            return first // Bc, ceil_div(end, Bc)

        @device_function
        def query_blocks(j0, N_q, N_k, lo, hi):
            """(first, end) of the query blocks that see any of keys j0 … j0+Bc-1."""
            if not BANDED:
                return 0, ceil_div(N_q, Br)
            first, end = max(0, j0 - hi), min(N_q, min(j0 + Bc, N_k) - lo)
            if first >= end:
                return 0, 0
            return first // Br, ceil_div(end, Br)

        @device_function
        def look(rseen, mask, i0, j0, N_q, N_k, lo, hi, ty, tx):
            """Bit e of rseen[a]: whether the thread's row a sees its column e.

            Returns ALL if every pair of the tile is seen (then rseen is not set), else SOME or NONE, for this thread.
            """
            if PADDED == 0 and not BOOLEAN and i0 + Br <= N_q and j0 + Bc <= N_k:
                if not BANDED or (i0 + Br - 1 + lo <= j0 and j0 + Bc - 1 <= i0 + hi):
                    return ALL
            any_seen = NONE
            for a in range(RA):
                r, i, seen = ty + a * TY, i0 + ty + a * TY, 0
                if r < Br and i < N_q:
                    for e in range(RB):
                        c, j = tx + e * TX, j0 + tx + e * TX
                        if c < Bc and j < N_k:
                            if not BANDED or (i + lo <= j and j <= i + hi):
                                if not BOOLEAN or mask[i, j] != 0:
                                    seen |= 1 << e
                rseen[a] = seen
                if seen != 0:
                    any_seen = SOME
            return any_seen

        @device_function
        def next_seen(rseen, mask, i0, j, end, N_q, N_k, lo, hi, ty, tx):
            """(j, seen) of the first key block from j on that any thread sees, with `look`'s answer; (end, _) if none.

            Under a boolean mask the threads meet at a barrier here.
            """
            seen = NONE
            while j < end:
                seen = look(rseen, mask, i0, j * Bc, N_q, N_k, lo, hi, ty, tx)
                if not BOOLEAN:
                    break
                if cuda.syncthreads_or(seen) != 0:
                    break
                j += 1
            return j, seen

        @device_function
        def visits(i0, N_q, N_k, lo, hi):
            """(first, end) of the key blocks at which a kernel with K outside visits rows i0 … i0+Br-1.

            `key_blocks`, but rows that see no key at all are visited once, to write O = 0.
            """
            first, end = key_blocks(i0, N_q, N_k, lo, hi)
            return (first, end) if first < end else (0, 1)

        @device_function
        def next_visit(rseen, mask, i, j, N_q, N_k, lo, hi, ty, tx):
            """(i, seen, any_seen) of the first row block from i on that visits key block j; (Tr, _, _) if none.

            seen is `look`'s answer, any_seen that of all threads.  A tile that a boolean mask empties is visited only
            as the first of its row block or the last.  The threads meet at a barrier here.
            """
            seen, any_seen = NONE, NONE
            while i * Br < N_q:
                first, end = visits(i * Br, N_q, N_k, lo, hi)
                if first <= j and j < end:
                    seen = look(rseen, mask, i * Br, j * Bc, N_q, N_k, lo, hi, ty, tx)
                    any_seen = cuda.syncthreads_or(seen)
                    if not BOOLEAN or any_seen != 0 or first == j or j == end - 1:
                        break
                i += 1
            return i, seen, any_seen

        @device_function
        def score(rS, rseen, seen, scale, softcap):
            """S = scale · S, softcapped, -inf where the mask hides the key; seen is what `look` returned."""
            for a in range(RA):
                for e in range(RB):
                    rS[a, e] *= scale
                    if SOFTCAP:
                        rS[a, e] = softcap * tanh(rS[a, e] / softcap)
            if seen != ALL:
                for a in range(RA):
                    for e in range(RB):
                        if (rseen[a] >> e) & 1 == 0:
                            rS[a, e] = NEG_INF

        @device_function
        def slope(s, softcap):
            """d(capped score)/d(score), from the capped score s."""
            if SOFTCAP:
                x = s / softcap
                return ONE - x * x
            return ONE

        self.key_blocks, self.query_blocks, self.look, self.next_seen = key_blocks, query_blocks, look, next_seen
        self.visits, self.next_visit, self.score, self.slope = visits, next_visit, score, slope
        self.bits, self.boolean = bits, BOOLEAN
