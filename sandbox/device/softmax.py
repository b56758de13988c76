"""The online softmax: one tile of scores joins the running maximum m and sum l of each row.  [1805.02867, Alg. 3]"""

from __future__ import annotations

from numba import cuda

from .scalar import NEG_INF, ZERO, device_function, exp
from .threads import Threads

ALL_LANES = 0xFFFFFFFF


class Softmax:
    """Row operations on a tile of S [Br, Bc] whose rows are spread over TX neighbouring lanes."""

    def __init__(self, threads: Threads):
        TX, RA, RB = threads.TX, threads.RA, threads.RB

        @device_function
        def row_max(x):
            """The maximum over the lanes of a row."""
            step = 1
            while step < TX:
                x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, step))
                step *= 2
            return x

        @device_function
        def row_sum(x):
            """The sum over the lanes of a row."""
            step = 1
            while step < TX:
                x += cuda.shfl_xor_sync(ALL_LANES, x, step)
                step *= 2
            return x

        @device_function
        def update(rS, rm, rl, ralpha):
            """S becomes P̃ = exp(S - m); m and l go on; alpha = exp(m_old - m_new) is what older sums are worth now.

            l is this lane's part of the row's sum: `row_sum` gives the whole.  A row that has seen nothing keeps
            m = -inf, P̃ = 0, l = 0.  The difference is taken first: the multiply-add x·log2 e - (m·log2 e) is one
            instruction less, but P̃ and alpha would be off by |m|·2^-24, by another factor for every m.
            """
            for a in range(RA):
                m = rm[a]
                for b in range(RB):
                    m = max(m, rS[a, b])
                m = row_max(m)
                shift = m if m != NEG_INF else ZERO
                alpha = exp(rm[a] - shift)
                l = ZERO
                for b in range(RB):
                    rS[a, b] = exp(rS[a, b] - shift)
                    l += rS[a, b]
                rm[a] = m
                rl[a] = alpha * rl[a] + l
                ralpha[a] = alpha

        self.row_max, self.row_sum, self.update = row_max, row_sum, update
