"""Online softmax: two passes over a row.  [Milakov & Gimelshein, 1805.02867, Algorithm 3]

The sum need not wait for the maximum: when x raises it from m_old to m, what has been summed is worth e^(m_old - m) of
what it was.  So (m, l) grow together in one pass, a second writes: 3 accesses an element, 2 reads and 1 write.
Pairs merge by the same rule in any order (equation 4), which is how the lanes of a row join theirs.
"""

from numba import cuda

from ..device import Blocks, Launch, Softmax, Threads, conversions
from ..device.scalar import NEG_INF, ONE, ZERO, exp
from ..variant import Variant


def layout(device):
    """One row for each TX lanes, one column a step for each lane."""
    TY, TX = (2, 4) if device.simulated else (8, 32)
    return Threads(TY, TX, Br=TY, Bc=TX, d=1, overhead=0)


def fit(problem, tile, device):
    """Any shape runs."""


def build(problem, tile, device):
    t = layout(device)
    TY, TX = t.TY, t.TX
    widen, narrow = conversions(problem.dtype)
    softmax = Softmax(t)
    where = Blocks(t).where()
    row_max, row_sum = softmax.row_max, softmax.row_sum

    @cuda.jit
    def softmax_online(X, Y):
        block, thread, ty, tx = where()
        i = block * TY + ty
        N = X.shape[1] if i < X.shape[0] else 0  # lanes without a row walk along none, and shuffle with the others

        # m = max(m_old, x_j),  l = l e^(m_old - m) + e^(x_j - m)   lines 1-6
        m, l = NEG_INF, ZERO
        for j in range(tx, N, TX):
            x = widen(X[i, j])
            m_old, m = m, max(m, x)
            shift = m if m != NEG_INF else ZERO  # nothing but -inf so far: -inf - 0, where -inf - -inf is NaN
            l = l * exp(m_old - shift) + exp(x - shift)

        # (m, l) of the row from those of its lanes   equation 4
        m_lane, m = m, row_max(m)
        shift = m if m != NEG_INF else ZERO
        l = row_sum(l * exp(m_lane - shift))
        total = l if l != ZERO else ONE  # the softmax of a row of -inf is 0

        # y_j = e^(x_j - m) / l   lines 7-9
        for j in range(tx, N, TX):
            Y[i, j] = narrow(exp(widen(X[i, j]) - shift) / total)

    run = Launch(softmax_online, t.count, warp=TX)

    def launch(X, Y):
        run(-(-X.shape[0] // TY), X, Y)

    return launch


VARIANT = Variant(
    name="softmax_online",
    direction="softmax",
    parent="softmax_safe",
    delta="maximum and sum grow together in one pass: 2 reads and 1 write an element",
    fit=fit,
    build=build,
)
