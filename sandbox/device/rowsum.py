"""What a backward on the tensor cores needs of each query first: L = LSE · log2 e and D = rowsum(dO ∘ O).  [FA2,
Algorithm 2, line 4]"""

from __future__ import annotations

import math

from numba import cuda

from ..problem import Problem
from ..target import SIMULATED
from .launch import Launch
from .ptx import read_chunk, unpack_bf16, unpack_fp16
from .scalar import LOG2_E, NEG_INF, ZERO, device_function, quotient
from .softmax import ALL_LANES

THREADS = 32 if SIMULATED else 256


def rowsum(problem: Problem):
    """run(O, dO, LSE, L, D): L and D [B·H, Nr]; Nr is at least N_q.

    Of rows that see nothing and of those past the end L is +inf; of the latter D is 0.
    O and dO [B, N_q, H, d] are addressable by 16 bytes, LSE [B, H, N_q] is -inf where a row sees nothing.
    """
    CHUNKS = problem.d // 8
    LANES = math.gcd(CHUNKS, 32)  # threads that share a row
    ROWS = THREADS // LANES
    unpack = unpack_fp16 if problem.dtype == "fp16" else unpack_bf16

    @device_function
    def dot(x, y):
        x0, x1 = unpack(x)
        y0, y1 = unpack(y)
        return x0 * y0 + x1 * y1

    @cuda.jit
    def rowsum(O, dO, LSE, L, D):
        block, thread = cuda.blockIdx.x & 0x7FFFFFFF, cuda.threadIdx.x & 0x3FF
        N_q, Nr = O.shape[1], L.shape[1]
        bh, part = quotient(block, (Nr + ROWS - 1) // ROWS)
        b, h = quotient(bh, O.shape[2])
        i, x = part * ROWS + thread // LANES, thread % LANES
        total = ZERO
        if i < N_q:
            Oh, dOh = O[b, :, h], dO[b, :, h]
            for q in range(CHUNKS // LANES):
                o, do = read_chunk(Oh, i, 8 * (x + q * LANES)), read_chunk(dOh, i, 8 * (x + q * LANES))
                total += dot(o[0], do[0]) + dot(o[1], do[1]) + dot(o[2], do[2]) + dot(o[3], do[3])
        step = 1
        while step < LANES:
            total += cuda.shfl_xor_sync(ALL_LANES, total, step)
            step *= 2
        if x == 0 and i < Nr:
            lse = LSE[b, h, i] if i < N_q else NEG_INF
            L[bh, i], D[bh, i] = -NEG_INF if lse == NEG_INF else lse * LOG2_E, total

    launch = Launch(rowsum, THREADS)

    def run(O, dO, LSE, L, D):
        launch(L.shape[0] * -(-L.shape[1] // ROWS), O, dO, LSE, L, D)

    return run
