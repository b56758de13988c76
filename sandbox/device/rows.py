"""Rows: the mask and the online softmax on a warp's scores in registers.  [1805.02867, Algorithm 3; FA2, Algorithm 1]

rS [MI, Bc / 8, 4] as mma.py lays it out: a lane holds rows g and g + 8 of each 16, four neighbouring lanes share a row.
Arrays of rows are [MI, 2].  Scores are powers of 2: `unit` · S, unit = log2 e times the scale that S has not had yet.

m need not be the maximum: any m gives the same quotient, as long as P̃ = 2^(unit·S - m) is neither too large nor too
small for its format.  So m follows the maximum only where that has grown by more than ROOM: seldom, and until
then nobody needs the maximum, and O is left alone.
m is subtracted by one fused multiply-add, which rounds the difference, not unit·S; alpha comes from the same m.
m starts at the lowest finite number: -inf less that is -inf, and P̃ of a row that has seen nothing is 0.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, int32

from ..problem import Problem
from .mma import MMA
from .ptx import fma
from .scalar import LOG2_E, NEG_INF, as_float, as_int, device_function, divide, exp2, tanh_fast
from .softmax import ALL_LANES

NONE, SOME, ALL = 0, 1, 2  # what a warp sees of a tile
ROOM = 8  # powers of 2 by which a maximum may be above m: P̃ <= 256 fits fp16


class Rows:
    """Of MI·16 rows and Bc keys.  Compile-time: the mask's kind.  Run time: its band (lo, hi), as Mask.band has it."""

    def __init__(self, problem: Problem, MI: int, Bc: int, lazy: bool = True):
        BANDED, SOFTCAP, NI = problem.mask.banded, problem.softcap > 0, Bc // 8
        LEEWAY = np.float32(ROOM if lazy else 0)
        _, pack = MMA[problem.dtype]

        @device_function
        def look(i0, j0, N_q, N_k, lo, hi):
            """What rows i0 … of the warp see of keys j0 … j0 + Bc - 1."""
            i1, j1 = int32(min(i0 + 16 * MI, N_q) - 1), int32(j0 + Bc - 1)  # the last ones
            if i1 < i0 or j0 >= N_k:
                return NONE
            if BANDED:
                if int32(i1 + hi) < j0 or j1 < int32(i0 + lo):
                    return NONE
                if j0 < int32(i1 + lo) or int32(i0 + hi) < j1:
                    return SOME
            return ALL if j1 < N_k else SOME

        @device_function
        def hide(rS, i0, j0, N_k, lo, hi, lane):
            """-inf where a row does not see a key."""
            left = BANDED and j0 < int32(i0 + 16 * MI - 1 + lo)  # whether keys are too early for a row: seldom
            for mi in range(MI):
                for h in range(2):
                    i, j = i0 + 16 * mi + 8 * h + lane // 4, j0 + 2 * (lane % 4)
                    first, last = int32(i + lo - j), int32(N_k - 1 - j)  # of the keys seen, counted from j
                    if BANDED:
                        last = int32(min(last, i + hi - j))
                    for n in range(NI):
                        for e in range(2):
                            if int32(8 * n + e) > last:
                                rS[mi, n, 2 * h + e] = NEG_INF
                    if left:
                        for n in range(NI):
                            for e in range(2):
                                if int32(8 * n + e) < first:
                                    rS[mi, n, 2 * h + e] = NEG_INF

        @device_function
        def score(rS, scale, softcap):
            """S = scale · S, softcapped."""
            if SOFTCAP:
                scale = divide(scale, softcap)
            for mi in range(MI):
                for n in range(NI):
                    for e in range(4):
                        rS[mi, n, e] *= scale
                        if SOFTCAP:
                            rS[mi, n, e] = softcap * tanh_fast(rS[mi, n, e])

        @device_function
        def rises(rS, rm, unit):
            """Whether m of a row may have to follow what this lane has of it: never False where it has to.

            No lane asks another, and the card compares three integers at a time, of floats two; floats above 0 are in
            order as integers, too.  So this takes 0 for the maximum where that is less.
            """
            rise = False
            for mi in range(MI):
                for h in range(2):
                    most = int32(0)
                    for n in range(NI):
                        most = max(max(most, as_int(rS[mi, n, 2 * h])), as_int(rS[mi, n, 2 * h + 1]))
                    rise |= as_float(most) * unit > rm[mi, h] + LEEWAY
            return rise

        @device_function
        def tops(rtop, rS):
            """The maximum of each row."""
            for mi in range(MI):
                for h in range(2):
                    top = max(rS[mi, 0, 2 * h], rS[mi, 0, 2 * h + 1])
                    for n in range(1, NI):
                        top = max(top, max(rS[mi, n, 2 * h], rS[mi, n, 2 * h + 1]))
                    top = max(top, cuda.shfl_xor_sync(ALL_LANES, top, 1))
                    rtop[mi, h] = max(top, cuda.shfl_xor_sync(ALL_LANES, top, 2))

        @device_function
        def above(rtop, rm, unit):
            """Whether the maximum of any row of the warp is so far above m that m has to follow."""
            rise = False
            for mi in range(MI):
                for h in range(2):
                    rise |= rtop[mi, h] * unit > rm[mi, h] + LEEWAY
            return cuda.any_sync(ALL_LANES, rise)

        @device_function
        def follow(rtop, rm, rl, ralpha, unit):
            """m is at least the maximum, alpha = 2^(m_old - m) what O of before is worth now; l is brought up to it."""
            for mi in range(MI):
                for h in range(2):
                    m = max(rm[mi, h], rtop[mi, h] * unit)
                    ralpha[mi, h] = exp2(rm[mi, h] - m)
                    rm[mi, h] = m
                    rl[mi, h] *= ralpha[mi, h]

        @device_function
        def weights(rP, rS, k, rm, rl, unit):
            """rP [MI, 1, 4] = P̃ = 2^(unit·S - m) of keys 16k … 16k + 15, as words; l sums it before it is rounded."""
            for mi in range(MI):
                for h in range(2):
                    for u in range(2):
                        p0 = exp2(fma(rS[mi, 2 * k + u, 2 * h], unit, -rm[mi, h]))
                        p1 = exp2(fma(rS[mi, 2 * k + u, 2 * h + 1], unit, -rm[mi, h]))
                        rl[mi, h] += p0 + p1
                        rP[mi, 0, 2 * u + h] = pack(p0, p1)

        @device_function
        def row_sum(x):
            """The sum over the four lanes of a row."""
            x += cuda.shfl_xor_sync(ALL_LANES, x, 1)
            return x + cuda.shfl_xor_sync(ALL_LANES, x, 2)

        self.look, self.hide, self.score, self.rises = look, hide, score, rises
        self.tops, self.above, self.follow, self.weights, self.row_sum = tops, above, follow, weights, row_sum


def scale_and_unit(problem: Problem) -> tuple[float, float]:
    """What multiplies S before the softmax, and `unit`: above 0, so that the greatest S has the greatest weight, and
    -inf none.

    The former is the scale where there is a softcap, else 1, -1 or 0: Q may take that, exactly, before the loop.
    """
    unit = abs(problem.scale) * float(LOG2_E)
    if problem.softcap > 0:
        return problem.scale, float(LOG2_E)
    if np.float32(unit) == 0:
        return 0.0, float(LOG2_E)
    return math.copysign(1.0, problem.scale), unit


def capped(MI: int, N: int, softcap: bool):
    """score(rS, scale, softcap): rS [MI·16, N] = scale · S or, of a softcap c, tanh(scale · S / c): c goes into unit,
    and what a backward needs next is the square of that."""
    NI, SOFTCAP = N // 8, softcap

    @device_function
    def score(rS, scale, softcap):
        if SOFTCAP:
            scale = divide(scale, softcap)
        for mi in range(MI):
            for n in range(NI):
                for e in range(4):
                    rS[mi, n, e] *= scale
                    if SOFTCAP:
                        rS[mi, n, e] = tanh_fast(rS[mi, n, e])

    return score


def rescale(MI: int, N: int):
    """rescale(rO, x): rO [MI·16, N] = diag(x) rO."""

    @device_function
    def rescale(rO, x):
        for mi in range(MI):
            for n in range(N // 8):
                for e in range(4):
                    rO[mi, n, e] *= x[mi, e // 2]

    return rescale
