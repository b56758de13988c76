"""SplitK: warps that share the rows of a block and divide its keys ("split-K").  [FA2, 2307.08691, §3.3, Figure 3 left]

Of a row a warp sees its own keys only, so that the warps meet through shared memory at every step: for the maximum of
a row, for the sum of its weights, and for P̃ V, of which each has the part of its keys, [Br, d].  In rounds of some rows
and 16 columns a warp, each writes its part; they wait for each other; and each adds up all parts of 16 columns.  Those
are the columns of O that it owns, of all rows: columns 16·(W·p + warp) … + 15 of part p, W being the warps.

rO [MI, 2·PARTS, 4] has them side by side, laid out as mma.py says.  The parts lie in shared memory, twice, as the lanes
hold them: four float32 a lane, so that each lane reads back what the same lane of another warp wrote.
"""

from __future__ import annotations

from numba import cuda, float32

from .mma import MMA, Warps
from .ptx import stmatrix
from .rows import rescale
from .scalar import device_function
from .tiles import put_quad, quad, shared_tile


class SplitK:
    """W warps on Br = 16·MI rows, KEYS keys each; rounds of 16·RI rows."""

    def __init__(self, warps: Warps, MI: int, RI: int, KEYS: int, d: int):
        W = warps.count
        self.warps, self.MI, self.RI, self.KEYS, self.d = warps, MI, RI, KEYS, d
        self.PARTS = d // (16 * W)
        self.rows = 2 * W * RI * 2 * W  # of the shared tile sX [rows, 128]
        self.bytes = 4 * 128 * self.rows

    def tile(self, offset: int):
        """tile(smem) -> sX, that many bytes into smem, ``cuda.shared.array(0, float32, 16)``."""
        return shared_tile("sX", offset // 4, self.rows, 128, 2)

    def tell(self):
        """tell(sx, rx, warp, lane): sx [W, Br], at this warp: a number a row."""
        MI = self.MI

        @device_function
        def tell(sx, rx, warp, lane):
            if lane % 4 == 0:
                for mi in range(MI):
                    for h in range(2):
                        sx[warp, 16 * mi + 8 * h + lane // 4] = rx[mi, h]

        return tell

    def largest(self):
        """largest(rx, sx, lane): rx [MI, 2] = the maximum of what all warps have told."""
        MI, W = self.MI, self.warps.count

        @device_function
        def largest(rx, sx, lane):
            for mi in range(MI):
                for h in range(2):
                    x = sx[0, 16 * mi + 8 * h + lane // 4]
                    for w in range(1, W):
                        x = max(x, sx[w, 16 * mi + 8 * h + lane // 4])
                    rx[mi, h] = x

        return largest

    def total(self):
        """total(rx, sx, lane): rx [MI, 2] = the sum of what all warps have told."""
        MI, W = self.MI, self.warps.count

        @device_function
        def total(rx, sx, lane):
            for mi in range(MI):
                for h in range(2):
                    x = sx[0, 16 * mi + 8 * h + lane // 4]
                    for w in range(1, W):
                        x += sx[w, 16 * mi + 8 * h + lane // 4]
                    rx[mi, h] = x

        return total

    def product(self, scaled: bool):
        """product(rO, rP, sV, b, rx, sX, any_seen, warp, lane): rO += Σ over the warps of P̃ · sV[b : b + KEYS].

        rP [MI, KEYS / 16, 4] are the words of P̃ and b the first key of this warp; it has nothing to add unless
        any_seen.  scaled: rO += diag(rx) Σ …
        """
        last = self.MI // self.RI * self.PARTS - 1
        chain = self._round(last, scaled)
        for n in reversed(range(last)):
            chain = _followed(self._round(n, scaled), chain)
        return chain

    def _round(self, n: int, scaled: bool):
        """Round n.  Each is a function of its own, so that n is a constant: NVVM unrolls short loops only."""
        W, RI = self.warps.count, self.RI
        NX, first, part, half = 2 * W, n // self.PARTS * RI, n % self.PARTS, n % 2
        PV, clear = self.warps.product_rn_part(RI, 16 * W, self.KEYS, first), self.warps.fill(RI, 16 * W)
        scale, SCALED = rescale(RI, 16 * W), scaled

        @device_function
        def round(rO, rP, sV, b, rx, sX, any_seen, warp, lane):
            rX = cuda.local.array((RI, NX, 4), float32)
            clear(rX)
            if any_seen:
                PV(rX, rP, 0, sV, b, 16 * W * part)
            if SCALED:
                rfactor = cuda.local.array((RI, 2), float32)
                for mi in range(RI):
                    rfactor[mi, 0], rfactor[mi, 1] = rx[first + mi, 0], rx[first + mi, 1]
                scale(rX, rfactor)
            for mi in range(RI):
                for x in range(NX):
                    row = ((half * W + warp) * RI + mi) * NX + x
                    put_quad(sX, row, 4 * lane, rX[mi, x, 0], rX[mi, x, 1], rX[mi, x, 2], rX[mi, x, 3])
            cuda.syncthreads()  # the other half is free from here on
            for mi in range(RI):
                for u in range(2):
                    for w in range(W):
                        row = ((half * W + w) * RI + mi) * NX + 2 * warp + u
                        x0, x1, x2, x3 = quad(sX, row, 4 * lane)
                        rO[first + mi, 2 * part + u, 0] += x0
                        rO[first + mi, 2 * part + u, 1] += x1
                        rO[first + mi, 2 * part + u, 2] += x2
                        rO[first + mi, 2 * part + u, 3] += x3

        return round

    def put(self):
        """put(sC, r0, rO, warp): sC[r0 : r0 + Br], at the columns that this warp owns, = rO, rounded."""
        _, pack = MMA[self.warps.dtype]
        MI, PARTS, W = self.MI, self.PARTS, self.warps.count

        @device_function
        def put(sC, r0, rO, warp):
            for mi in range(MI):
                for p in range(PARTS):
                    n = 2 * p
                    stmatrix(sC, r0 + 16 * mi, 16 * (W * p + warp), (
                        pack(rO[mi, n, 0], rO[mi, n, 1]), pack(rO[mi, n, 2], rO[mi, n, 3]),
                        pack(rO[mi, n + 1, 0], rO[mi, n + 1, 1]), pack(rO[mi, n + 1, 2], rO[mi, n + 1, 3]),
                    ))  # fmt: skip

        return put


def _followed(first, rest):
    @device_function
    def both(rO, rP, sV, b, rx, sX, any_seen, warp, lane):
        first(rO, rP, sV, b, rx, sX, any_seen, warp, lane)
        rest(rO, rP, sV, b, rx, sX, any_seen, warp, lane)

    return both
