"""Tiles: where they lie in shared memory, how they are loaded, multiplied and stored by `Threads`.

Tiles come from global memory by `copy`: asynchronous where hardware can (16 bytes at a time, past the registers), so
that the next tile is on its way while this one is multiplied.

Registers are `cuda.local.array`s indexed by compile-time constants only: NVVM unrolls the loops and keeps them in
registers.  Each function here is made for one tile, since its trip counts must be constants.
"""

from __future__ import annotations

import math

from numba import cuda, float32

from ..target import SIMULATED
from .scalar import ZERO, device_function, same
from .threads import Threads, ceil

if SIMULATED:
    from .cuda_simulated import tile_of
    from .intrinsics_simulated import adjacent, copies_arrive, copy_quad, in_quads, put_quad, quad
else:
    from .intrinsics import adjacent, copies_arrive, copy_quad, in_quads, put_quad, quad, tile_view

IN_FLIGHT = 64  # global loads that a thread has under way at once


class Shared:
    """The shared-memory tiles of a kernel, one after another: ``Shared(sQ=(Br, d), sK=(Bc, d))``.

    Each row is padded by four elements, so that lanes that walk down a column by 16-byte loads meet different banks.
    Iterating gives, in order, the functions that a kernel calls to get its tiles: ``tile_Q(smem)``.
    """

    def __init__(self, **shapes: tuple[int, ...]):
        self.tiles, offset = [], 0
        for name, shape in shapes.items():
            rows, ld = (shape[0], shape[1] + 4) if len(shape) == 2 else (1, ceil(shape[0], 4) * 4)
            self.tiles.append(shared_tile(name, offset, rows, ld, len(shape)))
            offset += rows * ld
        self.bytes = 4 * offset

    def __iter__(self):
        return iter(self.tiles)


def shared_tile(name: str, offset: int, rows: int, ld: int, ndim: int):
    """A function smem -> float32 tile [rows, ld] (or [ld] where ndim is 1), `offset` elements into smem."""
    shape = (rows, ld) if ndim == 2 else (ld,)
    return (lambda smem: tile_of(smem, name, shape)) if SIMULATED else tile_view(offset, shape)


class Blocks:
    """The operations of one kernel on its tiles.  Shapes below are [rows, columns] of the whole tile.

    X is the part of a global array that one head owns, [N, d], strided: ``Q[b, :, h]``.
    """

    def __init__(self, threads: Threads):
        self.threads = threads

    def where(self):
        """where() -> (block, thread, ty, tx): which block this is, which thread, and its place in the block.

        The masks change nothing: they tell the compiler that no index is negative, without which it guards every
        access against Python's wrap-around and keeps an address in registers for each.
        """
        TX = self.threads.TX

        @device_function
        def where():
            block, thread = cuda.blockIdx.x & 0x7FFFFFFF, cuda.threadIdx.x & 0x3FF
            return block, thread, thread // TX, thread % TX

        return where

    def copy(self, rows: int, widen=same):
        """copy(sX, X, n0, end, ty, tx): sX [rows, d] = X[n0:end], zeros past the end and past d.

        There once this thread has called `arrive` and then met the others at a barrier; until then nobody reads sX.
        """
        TY, TX, RD, d, W = self.threads.TY, self.threads.TX, self.threads.RD, self.threads.d, self.threads.d_padded
        ROWS, RAGGED = rows // TY, d % TX != 0
        ASYNC = widen is same and d % 4 == 0 and W % 4 == 0
        QUADS = W // 4
        LANES = math.gcd(QUADS, self.threads.count)  # threads that share a row's quads
        STEP = self.threads.count // LANES
        STEPS = ceil(rows, STEP)
        BATCH = max(n for n in range(1, ROWS + 1) if ROWS % n == 0 and (n == 1 or n * RD <= IN_FLIGHT))

        @device_function
        def copy(sX, X, n0, end, ty, tx):
            if ASYNC and in_quads(X):
                y, x = (ty * TX + tx) // LANES, (ty * TX + tx) % LANES
                for step in range(STEPS):
                    r = y + step * STEP
                    if rows % STEP == 0 or r < rows:
                        for q in range(QUADS // LANES):
                            c = 4 * (x + q * LANES)
                            copy_quad(sX, r, c, X, n0 + r, n0 + r < end and (W == d or c < d))
            elif not ASYNC and n0 + rows <= end and X.strides[1] == X.itemsize:
                # Whole rows of adjacent columns: nothing stands between the loads, and a batch is in flight at once.
                rX = cuda.local.array((BATCH, RD), float32)
                for r in range(ty, ty + rows, BATCH * TY):
                    for a in range(BATCH):
                        for e in range(RD):
                            c = tx + e * TX
                            rX[a, e] = widen(adjacent(X, n0 + r + a * TY, c)) if not RAGGED or c < d else ZERO
                    for a in range(BATCH):
                        for e in range(RD):
                            sX[r + a * TY, tx + e * TX] = rX[a, e]
            else:
                for r in range(ty, rows, TY):
                    n = n0 + r
                    for c in range(tx, W, TX):
                        sX[r, c] = widen(X[n, c]) if n < end and c < d else ZERO

        return copy

    def arrive(self):
        """arrive(): this thread's copies have arrived; a barrier shows them to the others."""
        return copies_arrive

    def load_rows(self, rows: int):
        """load_rows(sx, x, n0, end, t): sx [rows] = x[n0:end], zeros past the end."""
        T = self.threads.count

        @device_function
        def load_rows(sx, x, n0, end, t):
            for r in range(t, rows, T):
                sx[r] = x[n0 + r] if n0 + r < end else ZERO

        return load_rows

    def store(self, narrow=same):
        """store(X, sX, n0, end, ty, tx): X[n0:end] = sX, narrowed to X's dtype."""
        TY, TX, d = self.threads.TY, self.threads.TX, self.threads.d

        @device_function
        def store(X, sX, n0, end, ty, tx):
            for r in range(ty, end - n0, TY):
                for c in range(tx, d, TX):
                    X[n0 + r, c] = narrow(sX[r, c])

        return store

    def accumulate(self, narrow=same):
        """accumulate(Y, X, sX, n0, end, ty, tx): Y[n0:end] = X[n0:end] + sX, X in float32."""
        TY, TX, d = self.threads.TY, self.threads.TX, self.threads.d

        @device_function
        def accumulate(Y, X, sX, n0, end, ty, tx):
            for r in range(ty, end - n0, TY):
                for c in range(tx, d, TX):
                    Y[n0 + r, c] = narrow(X[n0 + r, c] + sX[r, c])

        return accumulate

    def atomic_add(self):
        """atomic_add(X, sX, n0, end, ty, tx): X[n0:end] += sX, whoever else adds to it, X in float32."""
        TY, TX, d = self.threads.TY, self.threads.TX, self.threads.d

        @device_function
        def atomic_add(X, sX, n0, end, ty, tx):
            for r in range(ty, end - n0, TY):
                for c in range(tx, d, TX):
                    cuda.atomic.add(X, (n0 + r, c), sX[r, c])

        return atomic_add

    def product_nt(self, RA: int, RB: int, K: int):
        """product(rC, sA, sB, ty, tx): rC [rows, columns] += sA [rows, K] · sB [columns, K]ᵀ."""
        TY, TX = self.threads.TY, self.threads.TX

        @device_function
        def four(rC, sA, sB, k, ty, tx):
            rB = cuda.local.array((RB, 4), float32)
            for b in range(RB):
                rB[b, 0], rB[b, 1], rB[b, 2], rB[b, 3] = quad(sB, tx + b * TX, k)
            for a in range(RA):
                x0, x1, x2, x3 = quad(sA, ty + a * TY, k)
                for b in range(RB):
                    s = rC[a, b]
                    s += x0 * rB[b, 0]
                    s += x1 * rB[b, 1]
                    s += x2 * rB[b, 2]
                    s += x3 * rB[b, 3]
                    rC[a, b] = s

        return _in_fours(four, K, twice=False)

    def product_nn(self, RA: int, RB: int, K: int):
        """product(rC, sA, sB, ty, tx): rC [rows, head columns] += sA [rows, K] · sB [K, head columns]."""
        TY, row = self.threads.TY, self._row(RB)

        @device_function
        def four(rC, sA, sB, k, ty, tx):
            rA = cuda.local.array((RA, 4), float32)
            rB = cuda.local.array(RB, float32)
            for a in range(RA):
                rA[a, 0], rA[a, 1], rA[a, 2], rA[a, 3] = quad(sA, ty + a * TY, k)
            for u in range(4):
                row(rB, sB, k + u, tx)
                for a in range(RA):
                    for b in range(RB):
                        rC[a, b] += rA[a, u] * rB[b]

        return _in_fours(four, K, twice=True)

    def product_tn(self, RA: int, RB: int, K: int):
        """product(rC, sA, sB, ty, tx): rC [rows, head columns] += sA [K, rows]ᵀ · sB [K, head columns]."""
        TY, row = self.threads.TY, self._row(RB)

        @device_function
        def product(rC, sA, sB, ty, tx):
            rB = cuda.local.array(RB, float32)
            for k in range(K):
                row(rB, sB, k, tx)
                for a in range(RA):
                    x = sA[k, ty + a * TY]
                    for b in range(RB):
                        rC[a, b] += x * rB[b]

        return product

    def put(self, RA: int, RB: int):
        """put(sC, rC, ty, tx): sC [rows, columns] = rC, a tile of scores."""
        TY, TX = self.threads.TY, self.threads.TX

        @device_function
        def put(sC, rC, ty, tx):
            for a in range(RA):
                for b in range(RB):
                    sC[ty + a * TY, tx + b * TX] = rC[a, b]

        return put

    def put_heads(self, RA: int, RD: int):
        """put(sC, rC, ty, tx): sC [rows, d] = rC, a tile of head columns."""
        TY, TX, W = self.threads.TY, self.threads.TX, self.threads.WIDE

        @device_function
        def put(sC, rC, ty, tx):
            for a in range(RA):
                for e in range(0, RD, W):
                    c = W * tx + e * TX
                    if W == 4:
                        put_quad(sC, ty + a * TY, c, rC[a, e], rC[a, e + 1], rC[a, e + 2], rC[a, e + 3])
                    else:
                        sC[ty + a * TY, c] = rC[a, e]

        return put

    def get_heads(self, RA: int, RD: int):
        """get(rC, sC, ty, tx): rC = sC [rows, d], a tile of head columns."""
        TY, row = self.threads.TY, self._row(RD)

        @device_function
        def get(rC, sC, ty, tx):
            rRow = cuda.local.array(RD, float32)
            for a in range(RA):
                row(rRow, sC, ty + a * TY, tx)
                for e in range(RD):
                    rC[a, e] = rRow[e]

        return get

    def _row(self, RD: int):
        """row(rX, sX, r, tx): rX = this thread's head columns of row r of sX."""
        TX, W = self.threads.TX, self.threads.WIDE

        @device_function
        def row(rX, sX, r, tx):
            for e in range(0, RD, W):
                c = W * tx + e * TX
                if W == 4:
                    rX[e], rX[e + 1], rX[e + 2], rX[e + 3] = quad(sX, r, c)
                else:
                    rX[e] = sX[r, c]

        return row

    def fill(self, RA: int, RB: int):
        """fill(rC, x): every element of rC is x."""

        @device_function
        def fill(rC, x):
            for a in range(RA):
                for b in range(RB):
                    rC[a, b] = x

        return fill

    def fill_rows(self, RA: int):
        """fill_rows(rc, x): every element of rc [rows] is x."""

        @device_function
        def fill_rows(rc, x):
            for a in range(RA):
                rc[a] = x

        return fill_rows

    def scale_rows(self, RA: int, RB: int):
        """scale_rows(rC, rx): rC = diag(rx) rC."""

        @device_function
        def scale_rows(rC, rx):
            for a in range(RA):
                for b in range(RB):
                    rC[a, b] *= rx[a]

        return scale_rows


def _in_fours(four, K: int, twice: bool):
    """product(rC, sA, sB, ty, tx): `four` for k = 0, 4, …; twice a step, where registers allow, to hide the loads."""
    FOURS, TWO = ceil(K, 4), 2 if twice and ceil(K, 4) % 2 == 0 else 1

    @device_function
    def product(rC, sA, sB, ty, tx):
        for step in range(FOURS // TWO):
            four(rC, sA, sB, 4 * TWO * step, ty, tx)
            if TWO == 2:
                four(rC, sA, sB, 8 * step + 4, ty, tx)

    return product
