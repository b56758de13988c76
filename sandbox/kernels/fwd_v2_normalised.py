"""Control: FlashAttention-2's loops with FlashAttention-1's normalisation.  [FA1, Algorithm 1, line 12; FA2, §3.1]

Parent fwd_v2; the one idea: after every key block O is normalised again, as if it were to be read there.  Nobody does:
O, m and l stay in registers as before, so what is added is arithmetic alone.  Each step sums l over the lanes of a
row, divides twice a row, and multiplies all of P̃ by 1/l.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Shared, Softmax, Threads, Visit, conversions
from ..device.scalar import NEG_INF, ONE, ZERO, log
from ..variant import Variant


def layout(problem, tile, device):
    t = Threads.of(tile, problem.d, device, overhead=120 + 8 * problem.mask.boolean)
    rows, keys, columns = t.Br_padded, t.Bc_padded, t.d_padded
    return t, Shared(sQ=(rows, columns), sK=(keys, columns), sV=(keys, columns), sP=(rows, keys))


def fit(problem, tile, device):
    t, shared = layout(problem, tile, device)
    t.check(tile, shared.bytes, device, "fwd")


def build(problem, tile, device):
    t, shared = layout(problem, tile, device)
    Br, Bc, d = t.Br, t.Bc, t.d
    RA, RB, RD, TY, TX = t.RA, t.RB, t.RD, t.TY, t.TX
    widen, narrow = conversions(problem.dtype)
    blocks, softmax, visit = Blocks(t), Softmax(t), Visit(problem, t)
    where = blocks.where()
    tile_Q, tile_K, tile_V, tile_P = shared
    copy_Q, copy_KV, arrive = blocks.copy(t.Br_padded, widen), blocks.copy(t.Bc_padded, widen), blocks.arrive()
    QKt, PV = blocks.product_nt(RA, RB, d), blocks.product_nn(RA, RD, Bc)
    clear_S, clear_O, fill_rows = blocks.fill(RA, RB), blocks.fill(RA, RD), blocks.fill_rows(RA)
    rescale_O, normalise_P = blocks.scale_rows(RA, RD), blocks.scale_rows(RA, RB)
    put_P, put_O = blocks.put(RA, RB), blocks.put_heads(RA, RD)
    store_O = blocks.store(narrow)
    next_seen, score, key_blocks = visit.next_seen, visit.score, visit.key_blocks
    update, row_sum = softmax.update, softmax.row_sum
    bits = visit.bits

    @cuda.jit
    def fwd_v2_normalised(Q, K, V, mask, O, LSE, scale, softcap, lo, hi):
        block, thread, ty, tx = where()
        N_q, N_k = Q.shape[1], K.shape[1]
        H, group = Q.shape[2], Q.shape[2] // K.shape[2]
        Tr = (N_q + Br - 1) // Br
        i, bh = block % Tr, block // Tr
        b, h = bh // H, bh % H
        i0 = (Tr - 1 - i) * Br  # a causal mask makes the last rows the longest: they start first

        smem = cuda.shared.array(0, float32, 16)
        sQ = tile_Q(smem)  # [Br, d]
        sK = tile_K(smem)  # [Bc, d]
        sV = tile_V(smem)  # [Bc, d]
        sP = tile_P(smem)  # [Br, Bc]
        rS = cuda.local.array((RA, RB), float32)  # S, then P̃  [Br, Bc]
        rO = cuda.local.array((RA, RD), float32)  # O          [Br, d]
        rm = cuda.local.array(RA, float32)  # [Br]
        rl = cuda.local.array(RA, float32)  # [Br]
        rl_tile = cuda.local.array(RA, float32)  # [Br], this lane's part of the tile's sum
        ralpha = cuda.local.array(RA, float32)  # [Br]
        rinverse = cuda.local.array(RA, float32)  # [Br]
        rseen = cuda.local.array(RA, bits)  # [Br] x [Bc] bits

        clear_O(rO, ZERO)
        fill_rows(rm, NEG_INF)
        fill_rows(rl, ZERO)

        first, end = key_blocks(i0, N_q, N_k, lo, hi)
        j, seen = next_seen(rseen, mask[b, h], i0, first, end, N_q, N_k, lo, hi, ty, tx)
        copy_Q(sQ, Q[b, :, h], i0, min(i0 + Br, N_q), ty, tx)
        if j < end:
            copy_KV(sK, K[b, :, h // group], j * Bc, min(j * Bc + Bc, N_k), ty, tx)
        while j < end:
            arrive()
            cuda.syncthreads()  # K is here; the V of the step before has been read
            copy_KV(sV, V[b, :, h // group], j * Bc, min(j * Bc + Bc, N_k), ty, tx)

            # S = scale · Q Kᵀ, softcapped and masked  [Br, Bc]
            clear_S(rS, ZERO)
            QKt(rS, sQ, sK, ty, tx)
            score(rS, rseen, seen, scale, softcap)

            j, seen = next_seen(rseen, mask[b, h], i0, j + 1, end, N_q, N_k, lo, hi, ty, tx)
            arrive()
            cuda.syncthreads()  # V is here; K has been read
            if j < end:
                copy_KV(sK, K[b, :, h // group], j * Bc, min(j * Bc + Bc, N_k), ty, tx)

            # m, the tile's part of l, P̃ = exp(S - m)
            fill_rows(rl_tile, ZERO)
            update(rS, rm, rl_tile, ralpha)

            # O = diag(l)⁻¹ (diag(l_old exp(m_old - m)) O + P̃ V)  [Br, d]
            # Each weight is divided before it is used: multiplying O by a rounded 1/l at every step drifts.
            for a in range(RA):
                l_old = rl[a] * ralpha[a]
                rl[a] = l_old + row_sum(rl_tile[a])
                ralpha[a] = l_old / rl[a] if rl[a] != ZERO else ZERO
                rinverse[a] = ONE / rl[a] if rl[a] != ZERO else ZERO
            rescale_O(rO, ralpha)
            normalise_P(rS, rinverse)
            put_P(sP, rS, ty, tx)
            cuda.syncwarp()  # a row of P̃ is written and read by the lanes of one warp
            PV(rO, sP, sV, ty, tx)

        # LSE = m + log l
        for a in range(RA):
            row = i0 + ty + a * TY
            if tx == 0 and row < min(i0 + Br, N_q):
                LSE[b, h, row] = rm[a] + log(rl[a]) if rl[a] != ZERO else NEG_INF
        arrive()
        cuda.syncthreads()  # sQ has been read: O leaves through it
        put_O(sQ, rO, ty, tx)
        cuda.syncthreads()
        store_O(O[b, :, h], sQ, i0, min(i0 + Br, N_q), ty, tx)

    run = Launch(fwd_v2_normalised, t.count, shared.bytes, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        grid = -(-problem.N_q // Br) * problem.B * problem.H
        run(grid, Q, K, V, mask, O, LSE, problem.scale, problem.softcap, lo, hi)

    return launch


VARIANT = Variant(
    name="fwd_v2_normalised",
    direction="fwd",
    generation="v2",
    loop_order="q_outer",
    parent="fwd_v2",
    delta="O normalised again at every step, as v1's line 12 does, instead of once at the end",
    fit=fit,
    build=build,
)
