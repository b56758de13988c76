"""Warps: tiles for the tensor cores: who owns what, how they are copied, multiplied, stored.  [PTX ISA, mma m16n8k16]

A tile in shared memory is 16 bits a number and swizzled (ptx.py).  In registers a warp owns `rows` = 16·MI rows of a
tile of float32, [rows, columns], as an array [MI, columns / 8, 4]: lane 4g + t has of each 16 x 8 numbers

    [mi, n, 0], [mi, n, 1]: row 16·mi + g, columns 8n + 2t, 8n + 2t + 1;     [mi, n, 2], [mi, n, 3]: row 16·mi + g + 8

The same numbers rounded to 16 bits are `words` [MI, columns / 16, 4]: the left operand of the next product as they are.

Arrays are indexed by compile-time constants only, as in tiles.py: each function is made for one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from numba import cuda, int32, uint32

from ..target import SIMULATED
from .ptx import (
    copy_chunk,
    copy_chunk_at,
    ldmatrix,
    ldmatrix_right,
    ldmatrix_trans,
    ldmatrix_trans_right,
    mma_bf16,
    mma_fp16,
    pack_bf16,
    pack_fp16,
    stmatrix,
    store_chunk,
    uniform,
    unpack_bf16,
    unpack_fp16,
)
from .scalar import ZERO, device_function

MMA = {"fp16": (mma_fp16, pack_fp16), "bf16": (mma_bf16, pack_bf16)}
UNPACK = {"fp16": unpack_fp16, "bf16": unpack_bf16}


class Shared16:
    """The 16-bit tiles of a kernel, one after another: ``Shared16(sQ=(Br, d), sK=(Bc, d))``; columns by 16.

    Iterating gives, in order, the functions that a kernel calls to get its tiles: ``tile_Q(smem)``, smem being
    ``cuda.shared.array(0, int16, 128)``.
    """

    def __init__(self, **shapes: tuple[int, int]):
        self.tiles, offset = [], 0
        for name, (rows, columns) in shapes.items():
            self.tiles.append(_tile(name, offset, rows, columns))
            offset += rows * columns
        self.bytes = 2 * offset

    def __iter__(self):
        return iter(self.tiles)


def _tile(name: str, offset: int, rows: int, columns: int):
    if SIMULATED:
        import numpy as np

        from .cuda_simulated import tile_of

        return lambda smem: tile_of(smem, name, (rows, columns), np.uint16)

    from .intrinsics import tile_view

    return tile_view(offset, (rows, columns))


@dataclass(frozen=True)
class Warps:
    """The operations of so many warps on tiles of this dtype, 'fp16' or 'bf16'.

    X is the part of a global array that one head owns, [N, d]: ``Q[b, :, h]``; its rows start at multiples of 16 bytes.
    A block's row and column offsets (a, b, r0) are multiples of 16.
    """

    count: int
    dtype: str

    @property
    def threads(self) -> int:
        return 32 * self.count

    def where(self):
        """where() -> (block, thread, warp, lane)."""

        @device_function
        def where():
            thread = int32(cuda.threadIdx.x & 0x3FF)
            warp = uniform(int32(thread >> 5))
            return int32(cuda.blockIdx.x & 0x7FFFFFFF), thread, warp, int32(thread & 31)

        return where

    def copy(self, rows: int, d: int):
        """copy(sX, r0, X, n0, end, thread): sX[r0 : r0 + rows] = X[n0:end], zeros past the end.

        There once every thread has closed its group, waited for it and met the others at a barrier (ptx.py).
        """
        CHUNKS, T = d // 8, self.threads
        LANES = math.gcd(CHUNKS, 8, T // 8)  # threads that share a row's chunks: a line of 128 bytes at a time
        STEP = T // LANES

        @device_function
        def copy(sX, r0, X, n0, end, thread):
            y, x = int32(thread // LANES), int32(thread % LANES)
            left = int32(end - n0 - y)
            for step in range(0, rows, STEP):
                if rows % STEP == 0 or y + step < rows:
                    for q in range(CHUNKS // LANES):
                        copy_chunk(sX, r0, X, n0, y, 8 * x, step, 8 * LANES * q, int32(step) < left)

        return copy

    def where_lean(self):
        """As `where`, for kernels that have no register to spare: nothing says that a warp's lanes share its number."""

        @device_function
        def where():
            thread = cuda.threadIdx.x & 0x3FF
            return cuda.blockIdx.x & 0x7FFFFFFF, thread, thread >> 5, thread & 31

        return where

    def copy_lean(self, rows: int, d: int, wide: int):
        """As `copy`, for kernels that have no register to spare; it takes more instructions.  Columns d to wide are
        zeros."""
        CHUNKS, T, WHOLE = wide // 8, self.threads, wide == d
        LANES = math.gcd(CHUNKS, T // 8)  # threads that share a row's chunks
        STEP = T // LANES

        @device_function
        def copy(sX, r0, X, n0, end, thread):
            y, x = thread // LANES, thread % LANES
            r, n = r0 + y, n0 + y
            left = int32(end - n)
            for step in range(0, rows, STEP):
                if rows % STEP == 0 or y + step < rows:
                    for q in range(CHUNKS // LANES):
                        column = 8 * (x + q * LANES)
                        copy_chunk_at(sX, r, column, X, n, step, step < left and (WHOLE or column < d))

        return copy

    def product_nt(self, MI: int, N: int, K: int):
        """product(rC, sA, a, sB, b): rC [rows, N] += sA[a : a + rows, :K] · sB[b : b + N, :K]ᵀ."""
        return self._product(MI, N, K, _rows_of_A, _rows_of_B)

    def product_nn(self, MI: int, N: int, K: int):
        """product(rC, sA, a, sB, b): rC [rows, N] += sA[a : a + rows, :K] · sB[b : b + K, :N]."""
        return self._product(MI, N, K, _rows_of_A, _columns_of_B)

    def product_nn_part(self, MI: int, N: int, K: int):
        """product(rC, sA, a, sB, b, c): rC [rows, N] += sA[a : a + rows, :K] · sB[b : b + K, c : c + N]."""
        return self._product_at(MI, N, K, _rows_of_A, _columns_of_B)

    def product_tn(self, MI: int, N: int, K: int):
        """product(rC, sA, a, sB, b): rC [rows, N] += sA[:K, a : a + rows]ᵀ · sB[b : b + K, :N]."""
        return self._product(MI, N, K, _columns_of_A, _columns_of_B)

    def product_rt(self, MI: int, N: int, K: int):
        """product(rC, rA, a, sB, b): rC [rows, N] += rA[:, 16·a : 16·a + K] · sB[b : b + N, :K]ᵀ; rA in words."""
        return self._product(MI, N, K, _words_of_A, _rows_of_B)

    def product_rn(self, MI: int, N: int, K: int):
        """product(rC, rA, a, sB, b): rC [rows, N] += rA[:, 16·a : 16·a + K] · sB[b : b + K, :N]; rA in words."""
        return self._product(MI, N, K, _words_of_A, _columns_of_B)

    def product_rn_part(self, MI: int, N: int, K: int, first: int):
        """product(rC, rA, a, sB, b, c): rC [rows, N] += rA[16·first :, 16·a : 16·a + K] · sB[b : b + K, c : c + N]."""

        @device_function
        def words(rA, a, mi, k):
            return _words_of_A(rA, a, first + mi, k)

        return self._product_at(MI, N, K, words, _columns_of_B)

    def product_at(self, kind: str, MI: int, N: int, K: int):
        """product(rC, A, a, sB, b), as product_`kind` but of blocks at places a, b: (row, column) in sA, (0, column) in
        rA, and (row, column) in sB."""
        block_of_A = {"n": _rows_of_A_at, "t": _columns_of_A_at, "r": _words_of_A_at}[kind[0]]
        block_of_B = {"n": _columns_of_B_at, "t": _rows_of_B_at}[kind[1]]
        return self._product(MI, N, K, block_of_A, block_of_B)

    def _product(self, MI, N, K, block_of_A, block_of_B):
        product_at = self._product_at(MI, N, K, block_of_A, block_of_B)

        @device_function
        def product(rC, A, a, sB, b):
            product_at(rC, A, a, sB, b, 0)

        return product

    def _product_at(self, MI, N, K, block_of_A, block_of_B):
        """By 16 columns of A at a time; each block of B that is read serves all MI blocks of A's rows."""
        mma, _ = MMA[self.dtype]

        @device_function
        def step(rC, A, a, sB, b, c, k):
            rA = cuda.local.array((MI, 4), uint32)
            for mi in range(MI):
                rA[mi, 0], rA[mi, 1], rA[mi, 2], rA[mi, 3] = block_of_A(A, a, mi, k)
            for n in range(0, N // 8, 2):
                B = block_of_B(sB, b, c + 8 * n, k)
                for mi in range(MI):
                    words = rA[mi, 0], rA[mi, 1], rA[mi, 2], rA[mi, 3]
                    for u in range(2):
                        half = (B[0], B[1]) if u == 0 else (B[2], B[3])
                        C = rC[mi, n + u, 0], rC[mi, n + u, 1], rC[mi, n + u, 2], rC[mi, n + u, 3]
                        C = mma(words, half, C)
                        rC[mi, n + u, 0], rC[mi, n + u, 1], rC[mi, n + u, 2], rC[mi, n + u, 3] = C

        return _laid_out(step, 0, K, 16 * min(4, max(1, 64 // (MI * N // 8))))

    def load(self, MI: int, K: int):
        """load(rA, sA, a): the words rA [MI, K / 16, 4] of sA[a : a + rows, :K]."""

        @device_function
        def load(rA, sA, a):
            for mi in range(MI):
                for k in range(K // 16):
                    rA[mi, k, 0], rA[mi, k, 1], rA[mi, k, 2], rA[mi, k, 3] = ldmatrix(sA, a + 16 * mi, 16 * k)

        return load

    def words(self, MI: int, N: int):
        """words(rA, rC): the words rA [MI, N / 16, 4] of rC [MI, N / 8, 4], rounded to nearest even."""
        _, pack = MMA[self.dtype]

        @device_function
        def words(rA, rC):
            for mi in range(MI):
                for n in range(N // 8):
                    for h in range(2):
                        rA[mi, n // 2, 2 * (n % 2) + h] = pack(rC[mi, n, 2 * h], rC[mi, n, 2 * h + 1])

        return words

    def fill(self, MI: int, N: int):
        """fill(rC): every number of rC [rows, N] is 0."""

        @device_function
        def fill(rC):
            for mi in range(MI):
                for n in range(N // 8):
                    for e in range(4):
                        rC[mi, n, e] = ZERO

        return fill

    def put_words_at(self, MI: int, N: int):
        """put(sC, a, rC): the block of sC at the place a, (row, column), = the words rC [MI, N / 16, 4]."""

        @device_function
        def put(sC, a, rC):
            for mi in range(MI):
                for n in range(N // 16):
                    words = rC[mi, n, 0], rC[mi, n, 1], rC[mi, n, 2], rC[mi, n, 3]
                    stmatrix(sC, a[0] + 16 * mi, a[1] + 16 * n, words)

        return put

    def put_at(self, MI: int, N: int):
        """put(sC, a, rC, x): the block of sC at the place a, (row, column), = x·rC [rows, N], rounded."""
        _, pack = MMA[self.dtype]

        @device_function
        def put(sC, a, rC, x):
            for mi in range(MI):
                for n in range(0, N // 8, 2):
                    stmatrix(sC, a[0] + 16 * mi, a[1] + 8 * n, (
                        pack(x * rC[mi, n, 0], x * rC[mi, n, 1]), pack(x * rC[mi, n, 2], x * rC[mi, n, 3]),
                        pack(x * rC[mi, n + 1, 0], x * rC[mi, n + 1, 1]),
                        pack(x * rC[mi, n + 1, 2], x * rC[mi, n + 1, 3]),
                    ))  # fmt: skip

        return put

    def put(self, MI: int, N: int):
        """put(sC, a, rC): sC[a : a + rows, :N] = rC, rounded."""
        put_part = self.put_part(MI, N)

        @device_function
        def put(sC, a, rC):
            put_part(sC, a, 0, rC)

        return put

    def put_part(self, MI: int, N: int):
        """put(sC, a, c, rC): sC[a : a + rows, c : c + N] = rC, rounded."""
        _, pack = MMA[self.dtype]

        @device_function
        def put(sC, a, c, rC):
            for mi in range(MI):
                for n in range(0, N // 8, 2):
                    stmatrix(sC, a + 16 * mi, c + 8 * n, (
                        pack(rC[mi, n, 0], rC[mi, n, 1]), pack(rC[mi, n, 2], rC[mi, n, 3]),
                        pack(rC[mi, n + 1, 0], rC[mi, n + 1, 1]), pack(rC[mi, n + 1, 2], rC[mi, n + 1, 3]),
                    ))  # fmt: skip

        return put

    def scale_part(self, MI: int, N: int):
        """scale(sC, a, c, x): sC[a : a + rows, c : c + N] *= x, rounded."""
        _, pack = MMA[self.dtype]
        unpack = UNPACK[self.dtype]

        @device_function
        def scaled(word, x):
            low, high = unpack(word)
            return pack(x * low, x * high)

        @device_function
        def scale(sC, a, c, x):
            for mi in range(MI):
                for k in range(N // 16):
                    w0, w1, w2, w3 = ldmatrix(sC, a + 16 * mi, c + 16 * k)
                    words = scaled(w0, x), scaled(w1, x), scaled(w2, x), scaled(w3, x)
                    stmatrix(sC, a + 16 * mi, c + 16 * k, words)

        return scale

    def put_words(self, MI: int):
        """put(sC, a, c, rA): sC[a : a + rows, c : c + 16] = the words rA [MI, 1, 4]."""

        @device_function
        def put(sC, a, c, rA):
            for mi in range(MI):
                stmatrix(sC, a + 16 * mi, c, (rA[mi, 0, 0], rA[mi, 0, 1], rA[mi, 0, 2], rA[mi, 0, 3]))

        return put

    def store(self, rows: int, d: int):
        """store(X, n0, end, sX, r0, lane): X[n0:end] = sX[r0 : r0 + rows], by the lanes of one warp."""
        CHUNKS = d // 8
        LANES = math.gcd(CHUNKS, 32)
        STEP = 32 // LANES

        @device_function
        def store(X, n0, end, sX, r0, lane):
            y, x = lane // LANES, lane % LANES
            for r in range(y, min(rows, end - n0), STEP):
                for q in range(CHUNKS // LANES):
                    store_chunk(X, n0 + r, sX, r0 + r, 8 * (x + q * LANES))

        return store


def _laid_out(step, k, end, short):
    """product(rC, A, a, sB, b, c): the steps k, k + 16, … one after the other: NVVM unrolls short loops only."""
    if end - k <= short:

        @device_function
        def product(rC, A, a, sB, b, c):
            for column in range(k, end, 16):
                step(rC, A, a, sB, b, c, column)

    else:
        middle = (k + end) // 32 * 16
        head, tail = _laid_out(step, k, middle, short), _laid_out(step, middle, end, short)

        @device_function
        def product(rC, A, a, sB, b, c):
            head(rC, A, a, sB, b, c)
            tail(rC, A, a, sB, b, c)

    return product


@device_function
def _rows_of_A(sA, a, mi, k):
    return ldmatrix(sA, a + 16 * mi, k)


@device_function
def _columns_of_A(sA, a, mi, k):
    return ldmatrix_trans_right(sA, k, a + 16 * mi)


@device_function
def _words_of_A(rA, a, mi, k):
    return rA[mi, a + k // 16, 0], rA[mi, a + k // 16, 1], rA[mi, a + k // 16, 2], rA[mi, a + k // 16, 3]


@device_function
def _rows_of_B(sB, b, n, k):
    return ldmatrix_right(sB, b + n, k)


@device_function
def _columns_of_B(sB, b, n, k):
    return ldmatrix_trans(sB, b + k, n)


@device_function
def _rows_of_A_at(sA, a, mi, k):
    return ldmatrix(sA, a[0] + 16 * mi, a[1] + k)


@device_function
def _columns_of_A_at(sA, a, mi, k):
    return ldmatrix_trans_right(sA, a[0] + k, a[1] + 16 * mi)


@device_function
def _words_of_A_at(rA, a, mi, k):
    return _words_of_A(rA, a[1], mi, k)


@device_function
def _rows_of_B_at(sB, b, n, k):
    return ldmatrix_right(sB, b[0] + n, b[1] + k)


@device_function
def _columns_of_B_at(sB, b, n, k):
    return ldmatrix_trans(sB, b[0] + k, b[1] + n)
