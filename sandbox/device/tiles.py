"""Tiles: who owns what, where they lie in shared memory, how they are loaded, multiplied and stored.

A block is TY x TX threads; thread (ty, tx) owns rows ty, ty + TY, … of every tile that it holds in registers, of a
tile of scores (rS, …) columns tx, tx + TX, …, of a tile of head columns (rO, …) quads tx, tx + TX, … if d allows.
The TX threads of a row are neighbours in one warp, so a row of S is reduced by shuffles and a row of P handed over
through shared memory without a block barrier.

Tiles come from global memory by `copy`: asynchronous where hardware can (16 bytes at a time, past the registers), so
that the next tile is on its way while this one is multiplied.

Registers are `cuda.local.array`s indexed by compile-time constants only: NVVM unrolls the loops and keeps them in
registers.  Each function here is made for one tile, since its trip counts must be constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from numba import cuda, float32

from ..target import SIMULATED
from ..variant import Device, Infeasible, Tile
from .scalar import ZERO, device_function, same


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


@dataclass(frozen=True)
class Threads:
    """How TY x TX threads share tiles of Br query rows, Bc key rows and d columns.

    Tiles are padded, never the data: rows and columns past Br, Bc, d are zeros that no result depends on.
    """

    TY: int
    TX: int
    Br: int
    Bc: int
    d: int
    overhead: int

    @classmethod
    def of(cls, tile: Tile, d: int, device: Device, direction: str = "fwd", overhead: int = 100) -> Threads:
        """The fewest threads that keep a thread's tiles in registers.

        overhead: registers that the kernel needs beside its tiles (addresses, operands in flight), as ptxas reports.
        """
        if device.simulated:
            return cls(4, 4, tile.Br, tile.Bc, d, 0)
        choices = [cls(TY, TX, tile.Br, tile.Bc, d, overhead) for TY, TX in ((16, 8), (16, 16), (32, 16))]
        fits = [t for t in choices if t.registers(direction) <= t.most_registers(device)]
        return next((t for t in fits if t.accumulators(direction) <= ACCUMULATORS), (fits or choices)[-1])

    @property
    def count(self) -> int:
        return self.TY * self.TX

    @property
    def RA(self) -> int:
        """Query rows of a thread."""
        return _ceil(self.Br, self.TY)

    @property
    def RB(self) -> int:
        """Keys of a thread, as columns of S."""
        return self.Bc_padded // self.TX

    @property
    def RC(self) -> int:
        """Keys of a thread, as rows of dK and dV."""
        return self.Bc_padded // self.TY

    @property
    def RD(self) -> int:
        """Head columns of a thread."""
        return _ceil(self.d, self.TX)

    @property
    def WIDE(self) -> int:
        """Head columns of a thread that lie side by side: 4, so that 16 bytes travel at once, or 1."""
        return 4 if self.RD % 4 == 0 else 1

    @property
    def Br_padded(self) -> int:
        return self.RA * self.TY

    @property
    def Bc_padded(self) -> int:
        step = max(self.TX, self.TY)
        return _ceil(self.Bc, step) * step

    @property
    def d_padded(self) -> int:
        return self.RD * self.TX

    def accumulators(self, direction: str) -> int:
        """float32 registers that a thread's tiles take."""
        S, O = self.RA * self.RB, self.RA * self.RD
        return S + O if direction == "fwd" else 2 * S + O + 2 * self.RC * self.RD

    def registers(self, direction: str) -> int:
        """Registers that a thread is expected to need."""
        return self.accumulators(direction) + self.overhead

    def most_registers(self, device: Device) -> int:
        """Registers that a thread of a block this large may have."""
        return min(device.registers, 65_536 // self.count)

    def check(self, tile: Tile, shared_bytes: int, device: Device, direction: str) -> None:
        """Raises Infeasible where shared memory or registers do not suffice."""
        if shared_bytes > device.shared:
            raise Infeasible(tile, f"needs {shared_bytes:,} B of shared memory, a block has {device.shared:,} B")
        need, most = self.registers(direction), self.most_registers(device)
        if not device.simulated and need > most:
            raise Infeasible(tile, f"needs about {need} registers a thread, one of {self.count} has {most}")


IN_FLIGHT = 64  # global loads that a thread has under way at once
ACCUMULATORS = 128  # what a thread's tiles take at most, where more rows of threads can bring it down


class Shared:
    """The shared-memory tiles of a kernel, one after another: ``Shared(sQ=(Br, d), sK=(Bc, d))``.

    Each row is padded by four elements, so that lanes that walk down a column by 16-byte loads meet different banks.
    Iterating gives, in order, the functions that a kernel calls to get its tiles: ``tile_Q(smem)``.
    """

    def __init__(self, **shapes: tuple[int, ...]):
        self.tiles, offset = [], 0
        for name, shape in shapes.items():
            rows, ld = (shape[0], shape[1] + 4) if len(shape) == 2 else (1, _ceil(shape[0], 4) * 4)
            self.tiles.append(shared_tile(name, offset, rows, ld, len(shape)))
            offset += rows * ld
        self.bytes = 4 * offset

    def __iter__(self):
        return iter(self.tiles)


def shared_tile(name: str, offset: int, rows: int, ld: int, ndim: int):
    """A function smem -> float32 tile [rows, ld] (or [ld] where ndim is 1), `offset` elements into smem."""
    if SIMULATED:
        from .cuda_simulated import tile_of

        return lambda smem: tile_of(smem, name, (rows, ld) if ndim == 2 else (ld,))

    from .intrinsics import tile_view

    return tile_view(offset, (rows, ld) if ndim == 2 else (ld,))


if SIMULATED:

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

    from .copies_simulated import copies_arrive, copy_quad

else:
    from .intrinsics import adjacent, copies_arrive, copy_quad, in_quads, put_quad, quad


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
        STEPS = _ceil(rows, STEP)
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
    FOURS, TWO = _ceil(K, 4), 2 if twice and _ceil(K, 4) % 2 == 0 else 1

    @device_function
    def product(rC, sA, sB, ty, tx):
        for step in range(FOURS // TWO):
            four(rC, sA, sB, 4 * TWO * step, ty, tx)
            if TWO == 2:
                four(rC, sA, sB, 8 * step + 4, ty, tx)

    return product
