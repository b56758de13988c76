"""Columns: the mask, P and dS on a warp's transposed scores in registers.  [FA2, Algorithm 2, lines 11 and 14]

rS [MI, N / 8, 4] is Sᵀ as mma.py lays it out, of 16·MI keys by N queries: a lane holds keys g and g + 8 of each 16, and
queries 2t and 2t + 1 of each 8.  Each query i brings two numbers, L = LSE · log2 e and D = rowsum(dO ∘ O), side by
side in memory.  L is +inf where a row sees nothing or is past the end: then P = 2^(unit·S - L) = 0.
"""

from __future__ import annotations

from numba import int32

from ..problem import Problem
from .mma import MMA
from .ptx import fma, read_four
from .rows import ALL, NONE, SOME
from .scalar import ONE, ZERO, device_function, divide, exp2


class Columns:
    """Of MI·16 keys and N queries.  Compile-time: the mask's kind.  Run time: its band (lo, hi), as Mask.band has it."""

    def __init__(self, problem: Problem, MI: int, N: int):
        BANDED, SOFTCAP, NI = problem.mask.banded, problem.softcap > 0, N // 8
        _, pack = MMA[problem.dtype]

        @device_function
        def look(j0, i0, N_q, N_k, lo, hi):
            """What queries i0 … i0 + N - 1 see of the warp's keys j0 …"""
            last = min(j0 + 16 * MI, N_k) - 1
            if last < j0 or i0 >= N_q:
                return NONE
            if BANDED:
                if i0 + N - 1 + hi < j0 or last < i0 + lo:
                    return NONE
                if i0 + hi < j0 + 16 * MI - 1 or j0 < i0 + N - 1 + lo:
                    return SOME
            return ALL if j0 + 16 * MI <= N_k else SOME

        @device_function
        def hide(rX, x, j0, i0, N_k, lo, hi, lane):
            """x where a query does not see a key, and for keys past the end."""
            for mi in range(MI):
                for h in range(2):
                    j, i = j0 + 16 * mi + 8 * h + lane // 4, i0 + 2 * (lane % 4)
                    first, last = int32(0), int32(N)  # of the queries that see it, counted from i
                    if BANDED:
                        first, last = int32(j - hi - i), int32(j - lo - i)
                    if j >= N_k:
                        first = int32(N)
                    for n in range(NI):
                        for e in range(2):
                            if 8 * n + e < first or BANDED and 8 * n + e > last:
                                rX[mi, n, 2 * h + e] = x

        @device_function
        def load(rLD, LD, i0, lane):
            """rLD [N / 8, 4]: L and D of the lane's queries; LD holds those of a head, two by two."""
            for n in range(NI):
                rLD[n, 0], rLD[n, 1], rLD[n, 2], rLD[n, 3] = read_four(LD, 2 * (i0 + 8 * n + 2 * (lane % 4)))

        @device_function
        def weigh(rP, rS, rLD, unit, softcap):
            """The words rP of P = 2^(unit·S - L); S becomes P times the slope of the softcap."""
            for mi in range(MI):
                for n in range(NI):
                    for h in range(2):
                        s0, s1 = rS[mi, n, 2 * h], rS[mi, n, 2 * h + 1]
                        p0, p1 = exp2(fma(s0, unit, -rLD[n, 0])), exp2(fma(s1, unit, -rLD[n, 2]))
                        rP[mi, n // 2, 2 * (n % 2) + h] = pack(p0, p1)
                        if SOFTCAP:
                            t0, t1 = divide(s0, softcap), divide(s1, softcap)
                            p0 = p0 * (ONE - t0 * t0) if p0 != ZERO else ZERO
                            p1 = p1 * (ONE - t1 * t1) if p1 != ZERO else ZERO
                        rS[mi, n, 2 * h], rS[mi, n, 2 * h + 1] = p0, p1

        @device_function
        def slope(rdS, rS, rdP, rLD):
            """The words rdS of dS = P ∘ (dP - D); S is what `weigh` left."""
            for mi in range(MI):
                for n in range(NI):
                    for h in range(2):
                        rdS[mi, n // 2, 2 * (n % 2) + h] = pack(
                            rS[mi, n, 2 * h] * (rdP[mi, n, 2 * h] - rLD[n, 1]),
                            rS[mi, n, 2 * h + 1] * (rdP[mi, n, 2 * h + 1] - rLD[n, 3]),
                        )

        self.look, self.hide, self.load, self.weigh, self.slope = look, hide, load, weigh, slope
