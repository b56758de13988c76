"""Online softmax of rows that stay on chip.

Parent softmax_online; the one idea: a lane keeps the first HELD elements that it reads in registers, so the second
pass need not read them again.  Rows of up to HELD columns a lane take 2 accesses an element, 1 read and 1 write; what a
longer row has beyond them takes 3, as in the parent.
"""

from numba import cuda, float32

from sandbox.device import Blocks, Launch, Softmax, Threads, conversions
from sandbox.device.scalar import NEG_INF, ONE, ZERO, exp
from sandbox.variant import Variant


def layout(device):
    """One row for each TX lanes, and how many of its columns each lane holds."""
    TY, TX, HELD = (2, 4, 4) if device.simulated else (8, 32, 64)
    return Threads(TY, TX, Br=TY, Bc=TX, d=1, overhead=0), HELD


def fit(problem, tile, device):
    """Any shape runs."""


def build(problem, tile, device):
    t, HELD = layout(device)
    TY, TX = t.TY, t.TX
    widen, narrow = conversions(problem.dtype)
    softmax = Softmax(t)
    where = Blocks(t).where()
    row_max, row_sum = softmax.row_max, softmax.row_sum

    @cuda.jit
    def softmax_held(X, Y):
        block, thread, ty, tx = where()
        i = block * TY + ty
        N = X.shape[1] if i < X.shape[0] else 0  # lanes without a row walk along none, and shuffle with the others
        rX = cuda.local.array(HELD, float32)  # X  [HELD · TX], this lane's part

        # m and l of what is held: its maximum first, then its sum
        m, l = NEG_INF, ZERO
        for e in range(HELD):
            j = tx + e * TX
            rX[e] = widen(X[i, j]) if j < N else NEG_INF
            m = max(m, rX[e])
        shift = m if m != NEG_INF else ZERO
        for e in range(HELD):
            l += exp(rX[e] - shift)

        # the rest of the row joins: m = max(m_old, x_j),  l = l e^(m_old - m) + e^(x_j - m)
        for j in range(tx + HELD * TX, N, TX):
            x = widen(X[i, j])
            m_old, m = m, max(m, x)
            shift = m if m != NEG_INF else ZERO
            l = l * exp(m_old - shift) + exp(x - shift)

        # (m, l) of the row from those of its lanes
        m_lane, m = m, row_max(m)
        shift = m if m != NEG_INF else ZERO
        l = row_sum(l * exp(m_lane - shift))
        total = l if l != ZERO else ONE  # the softmax of a row of -inf is 0

        # y_j = e^(x_j - m) / l
        for e in range(HELD):
            j = tx + e * TX
            if j < N:
                Y[i, j] = narrow(exp(rX[e] - shift) / total)
        for j in range(tx + HELD * TX, N, TX):
            Y[i, j] = narrow(exp(widen(X[i, j]) - shift) / total)

    run = Launch(softmax_held, t.count, warp=TX)

    def launch(X, Y):
        run(-(-X.shape[0] // TY), X, Y)

    return launch


VARIANT = Variant(
    name="softmax_held",
    direction="softmax",
    parent="softmax_online",
    delta="a row's first elements stay in registers: 1 read and 1 write each",
    fit=fit,
    build=build,
)
