"""Online softmax, a tile at a time: the step that FlashAttention is made of.  [1805.02867, §3.1; FA2, 2307.08691, §3.1]

(m, l) are merged once a tile [Br, Bc], not once an element: a tile has its own maximum, and one e^(m_old - m) a row and
tile rescales what came before.  `update` is the very function that fwd_v1 and fwd_v2 call on S = scale · Q Kᵀ; here S
is read from memory, and a second pass writes what attention multiplies by V.  2 reads and 1 write an element.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Softmax, Threads, conversions
from ..device.scalar import NEG_INF, ONE, ZERO, exp
from ..variant import Variant


def layout(device):
    """Tiles of TY·RA rows and TX·RB columns."""
    if device.simulated:
        return Threads(TY=2, TX=4, Br=4, Bc=8, d=1, overhead=0)
    return Threads(TY=8, TX=16, Br=16, Bc=128, d=1, overhead=0)


def fit(problem, tile, device):
    """Any shape runs."""


def build(problem, tile, device):
    t = layout(device)
    Br, Bc = t.Br, t.Bc
    RA, RB, TY, TX = t.RA, t.RB, t.TY, t.TX
    widen, narrow = conversions(problem.dtype)
    blocks, softmax = Blocks(t), Softmax(t)
    where, fill_rows = blocks.where(), blocks.fill_rows(RA)
    update, row_sum = softmax.update, softmax.row_sum

    @cuda.jit
    def softmax_tiled(X, Y):
        block, thread, ty, tx = where()
        rows, columns = X.shape
        i0 = block * Br
        rX = cuda.local.array((RA, RB), float32)  # X, then P̃  [Br, Bc]
        rm = cuda.local.array(RA, float32)  # [Br]
        rl = cuda.local.array(RA, float32)  # [Br], this lane's part
        ralpha = cuda.local.array(RA, float32)  # [Br], what attention would rescale O by
        fill_rows(rm, NEG_INF)
        fill_rows(rl, ZERO)

        # m, l: one tile after another joins them
        for j0 in range(0, columns, Bc):
            for a in range(RA):
                for e in range(RB):
                    i, j = i0 + ty + a * TY, j0 + tx + e * TX
                    rX[a, e] = widen(X[i, j]) if i < rows and j < columns else NEG_INF
            update(rX, rm, rl, ralpha)

        # Y = diag(l)⁻¹ exp(X - m); 0 for a row of -inf, where l = 0 and m = -inf
        for a in range(RA):
            l, i = row_sum(rl[a]), i0 + ty + a * TY
            total = l if l != ZERO else ONE
            shift = rm[a] if rm[a] != NEG_INF else ZERO
            if i < rows:
                for j in range(tx, columns, TX):
                    Y[i, j] = narrow(exp(widen(X[i, j]) - shift) / total)

    run = Launch(softmax_tiled, t.count, warp=TX)

    def launch(X, Y):
        run(-(-X.shape[0] // Br), X, Y)

    return launch


VARIANT = Variant(
    name="softmax_tiled",
    direction="softmax",
    parent="softmax_online",
    delta="m and l are merged a tile at a time, as v1 and v2 do: one rescale a row and tile, not one an element",
    fit=fit,
    build=build,
)
