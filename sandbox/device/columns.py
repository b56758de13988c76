"""Columns: the mask, P and dS on a warp's transposed scores in registers.  [FA2, Algorithm 2, lines 11 and 14]

rS [MI, N / 8, 4] is Sᵀ as mma.py lays it out, of 16·MI keys by N queries: a lane holds keys g and g + 8 of each 16, and
queries 2t and 2t + 1 of each 8.  Each query brings two numbers, L = LSE · log2 e and D = rowsum(dO ∘ O), elements r to
r + N - 1 of sL and sD.  L is +inf where a row sees nothing or is past the end: then P = 2^(unit·S - L) = 0.
"""

from __future__ import annotations

from numba import int32

from ..problem import Problem
from .mma import MMA
from .ptx import fma, read_two, unpack_bf16, unpack_fp16
from .rows import ALL, NONE, SOME
from .scalar import ONE, ZERO, device_function, exp2


class Columns:
    """Of MI·16 keys and N queries.  Compile-time: the mask's kind.  Run time: its band (lo, hi) as Mask.band has it."""

    def __init__(self, problem: Problem, MI: int, N: int):
        BANDED, SOFTCAP, NI = problem.mask.banded, problem.softcap > 0, N // 8
        KEYS = 16 * MI
        unpack = unpack_fp16 if problem.dtype == "fp16" else unpack_bf16
        _, pack = MMA[problem.dtype]

        @device_function
        def look(j0, i0, N_q, N_k, lo, hi):
            """What queries i0 … i0 + N - 1 see of the warp's keys j0 …"""
            far, left = int32(j0 - i0), int32(N_k - j0)  # of the first key from the first query, and from the end
            if left <= 0 or i0 >= N_q:
                return NONE
            if BANDED:
                if int32(hi + N - 1) < far or int32(far + KEYS - 1) < lo:
                    return NONE
                if hi < int32(far + KEYS - 1) or far < int32(lo + N - 1):
                    return SOME
            return ALL if left >= KEYS else SOME

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
        def weigh(rP, rW, rS, sL, r, lane, unit):
            """P = 2^(unit·S - L) and W, P times the slope of the softcap (P where there is none), in words."""
            for n in range(NI):
                L0, L1 = read_two(sL, r + 8 * n + 2 * (lane % 4))
                for mi in range(MI):
                    for h in range(2):
                        s0, s1 = rS[mi, n, 2 * h], rS[mi, n, 2 * h + 1]
                        p0, p1 = exp2(fma(s0, unit, -L0)), exp2(fma(s1, unit, -L1))
                        rP[mi, n // 2, 2 * (n % 2) + h] = pack(p0, p1)
                        if SOFTCAP:
                            p0 = p0 * (ONE - s0 * s0) if p0 != ZERO else ZERO
                            p1 = p1 * (ONE - s1 * s1) if p1 != ZERO else ZERO
                        rW[mi, n // 2, 2 * (n % 2) + h] = pack(p0, p1)

        @device_function
        def slope(rdS, rW, rdP, sD, r, lane):
            """dS = W ∘ (dP - D), in words."""
            for n in range(NI):
                D0, D1 = read_two(sD, r + 8 * n + 2 * (lane % 4))
                for mi in range(MI):
                    for h in range(2):
                        w0, w1 = unpack(rW[mi, n // 2, 2 * (n % 2) + h])
                        x0, x1 = rdP[mi, n, 2 * h] - D0, rdP[mi, n, 2 * h + 1] - D1
                        rdS[mi, n // 2, 2 * (n % 2) + h] = pack(w0 * x0, w1 * x1)

        self.look, self.hide, self.weigh, self.slope = look, hide, weigh, slope
