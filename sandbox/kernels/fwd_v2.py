"""FlashAttention-2, forward: Q outside, K and V inside.  [FA2, 2307.08691, Algorithm 1; §3.1-3.2]

A block owns Br rows of Q and walks along the key blocks.  O, m and l never leave its registers: Q is read once, O
written once, nothing is normalised before the end, and the logsumexp is all that the backward needs.  Blocks are
independent, so the sequence itself is parallel; key blocks that the mask empties are not visited.
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
    rescale_O, put_P, put_O = blocks.scale_rows(RA, RD), blocks.put(RA, RB), blocks.put_heads(RA, RD)
    store_O = blocks.store(narrow)
    next_seen, score, key_blocks = visit.next_seen, visit.score, visit.key_blocks
    update, row_sum = softmax.update, softmax.row_sum
    bits = visit.bits

    @cuda.jit
    def fwd_v2(Q, K, V, mask, O, LSE, scale, softcap, lo, hi):
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
        rl = cuda.local.array(RA, float32)  # [Br], this lane's part
        ralpha = cuda.local.array(RA, float32)  # [Br]
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

            # m, l, P̃ = exp(S - m)
            update(rS, rm, rl, ralpha)

            # O = diag(exp(m_old - m)) O + P̃ V  [Br, d]
            rescale_O(rO, ralpha)
            put_P(sP, rS, ty, tx)
            cuda.syncwarp()  # a row of P̃ is written and read by the lanes of one warp
            PV(rO, sP, sV, ty, tx)

        # O = diag(l)⁻¹ O,  LSE = m + log l
        for a in range(RA):
            l = row_sum(rl[a])
            row = i0 + ty + a * TY
            if tx == 0 and row < min(i0 + Br, N_q):
                LSE[b, h, row] = rm[a] + log(l) if l != ZERO else NEG_INF
            ralpha[a] = ONE / l if l != ZERO else ZERO
        rescale_O(rO, ralpha)
        arrive()
        cuda.syncthreads()  # sQ has been read: O leaves through it
        put_O(sQ, rO, ty, tx)
        cuda.syncthreads()
        store_O(O[b, :, h], sQ, i0, min(i0 + Br, N_q), ty, tx)

    run = Launch(fwd_v2, t.count, shared.bytes, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        grid = -(-problem.N_q // Br) * problem.B * problem.H
        run(grid, Q, K, V, mask, O, LSE, problem.scale, problem.softcap, lo, hi)

    return launch


VARIANT = Variant(
    name="fwd_v2",
    direction="fwd",
    generation="v2",
    loop_order="q_outer",
    parent="fwd_v2_one_block",
    delta="one block a row block of Q instead of one a head: the sequence is parallel too",
    fit=fit,
    build=build,
    default=True,
)
