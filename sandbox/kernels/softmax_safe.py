"""Safe softmax: three passes over a row.  [Milakov & Gimelshein, 1805.02867, Algorithm 2]

e^x overflows where x is large, e^(x - max) never does; but the maximum is known only when the whole row has been seen.
So a row is read for its maximum, again for the sum, again for the result: 4 accesses an element, 3 reads and 1 write.
TX neighbouring lanes share a row; each walks along every TX-th column, and shuffles join what they found.
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
    def softmax_safe(X, Y):
        block, thread, ty, tx = where()
        i = block * TY + ty
        N = X.shape[1] if i < X.shape[0] else 0  # lanes without a row walk along none, and shuffle with the others

        # m = max_j x_j   lines 1-4
        m = NEG_INF
        for j in range(tx, N, TX):
            m = max(m, widen(X[i, j]))
        m = row_max(m)
        shift = m if m != NEG_INF else ZERO  # a row of -inf: -inf - 0, where -inf - -inf is NaN

        # l = Σ_j e^(x_j - m)   lines 5-8
        l = ZERO
        for j in range(tx, N, TX):
            l += exp(widen(X[i, j]) - shift)
        l = row_sum(l)
        total = l if l != ZERO else ONE  # and its softmax is 0

        # y_j = e^(x_j - m) / l   lines 9-11
        for j in range(tx, N, TX):
            Y[i, j] = narrow(exp(widen(X[i, j]) - shift) / total)

    run = Launch(softmax_safe, t.count, warp=TX)

    def launch(X, Y):
        run(-(-X.shape[0] // TY), X, Y)

    return launch


VARIANT = Variant(
    name="softmax_safe",
    direction="softmax",
    parent=None,
    delta="three passes over a row: maximum, sum, result; 3 reads and 1 write an element",
    fit=fit,
    build=build,
)
