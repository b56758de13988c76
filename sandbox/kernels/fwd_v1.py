"""FlashAttention-1, forward: K and V outside, Q inside.  [FA1, 2205.14135, Algorithm 1]

One block a head.  Each step joins one tile to its row block: O, l and m come from global memory, are rescaled so that
O is normalised again, and go back.  Every tile is visited, whatever the mask; one that it empties adds nothing.
O travels in float32 (O_acc) until its last visit, as 16 bits would round it anew at every step.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Shared, Softmax, Threads, Visit, conversions, scratch
from ..device.scalar import NEG_INF, ONE, ZERO, log
from ..variant import Variant


def layout(problem, tile, device):
    t = Threads.of(tile, problem.d, device, overhead=176)
    rows, keys, columns = t.Br_padded, t.Bc_padded, t.d_padded
    return t, Shared(
        sQ=(rows, columns), sK=(keys, columns), sV=(keys, columns), sP=(rows, keys),
        sO=(rows, columns), sl=(rows,), sm=(rows,),
    )  # fmt: skip


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
    tile_Q, tile_K, tile_V, tile_P, tile_O, tile_l, tile_m = shared
    copy_Q, copy_KV, copy_O = blocks.copy(t.Br_padded, widen), blocks.copy(t.Bc_padded, widen), blocks.copy(t.Br_padded)
    arrive, load_rows = blocks.arrive(), blocks.load_rows(t.Br_padded)
    QKt, PV = blocks.product_nt(RA, RB, d), blocks.product_nn(RA, RD, Bc)
    clear_S, clear_O, fill_rows = blocks.fill(RA, RB), blocks.fill(RA, RD), blocks.fill_rows(RA)
    rescale_O, normalise_P, put_P = blocks.scale_rows(RA, RD), blocks.scale_rows(RA, RB), blocks.put(RA, RB)
    get_O, put_O = blocks.get_heads(RA, RD), blocks.put_heads(RA, RD)
    store_O, store_O_acc = blocks.store(narrow), blocks.store()
    look, score = visit.look, visit.score
    update, row_sum = softmax.update, softmax.row_sum
    bits = visit.bits

    @cuda.jit
    def fwd_v1(Q, K, V, mask, O, O_acc, l, m, LSE, scale, softcap, lo, hi):
        block, thread, ty, tx = where()
        N_q, N_k = Q.shape[1], K.shape[1]
        H, group = Q.shape[2], Q.shape[2] // K.shape[2]
        Tr, Tc = (N_q + Br - 1) // Br, max(1, (N_k + Bc - 1) // Bc)  # with no keys, one visit still writes O
        b, h = block // H, block % H

        smem = cuda.shared.array(0, float32, 16)
        sQ = tile_Q(smem)  # [Br, d]
        sK = tile_K(smem)  # [Bc, d]
        sV = tile_V(smem)  # [Bc, d]
        sP = tile_P(smem)  # [Br, Bc]
        sO = tile_O(smem)  # [Br, d]
        sl = tile_l(smem)  # [Br]
        sm = tile_m(smem)  # [Br]
        rS = cuda.local.array((RA, RB), float32)  # S, then P̃  [Br, Bc]
        rO = cuda.local.array((RA, RD), float32)  # O          [Br, d]
        rm = cuda.local.array(RA, float32)  # [Br]
        rl = cuda.local.array(RA, float32)  # [Br], this lane's part of the tile's sum
        ralpha = cuda.local.array(RA, float32)  # [Br]
        rinverse = cuda.local.array(RA, float32)  # [Br]
        rseen = cuda.local.array(RA, bits)  # [Br] x [Bc] bits

        for j in range(Tc):  # line 5
            j0 = j * Bc
            arrive()
            cuda.syncthreads()  # the last step with K and V of before has been computed
            copy_KV(sK, K[b, :, h // group], j0, min(j0 + Bc, N_k), ty, tx)  # line 6
            copy_KV(sV, V[b, :, h // group], j0, min(j0 + Bc, N_k), ty, tx)

            copy_Q(sQ, Q[b, :, h], 0, min(Br, N_q), ty, tx)
            for i in range(Tr):  # line 7
                i0 = i * Br
                end = min(i0 + Br, N_q)
                seen = look(rseen, mask[b, h], i0, j0, N_q, N_k, lo, hi, ty, tx)
                arrive()
                any_seen = cuda.syncthreads_or(seen)  # Q is here; the step before has been stored
                if j > 0:  # line 8
                    load_rows(sl, l[b, h], i0, end, thread)
                    load_rows(sm, m[b, h], i0, end, thread)
                    copy_O(sO, O_acc[b, :, h], i0, end, ty, tx)

                # S = scale · Q Kᵀ, softcapped and masked  [Br, Bc]   line 9
                clear_S(rS, ZERO)
                QKt(rS, sQ, sK, ty, tx)
                score(rS, rseen, seen, scale, softcap)

                arrive()
                cuda.syncthreads()  # O, l and m are here; Q has been read
                if i + 1 < Tr:
                    copy_Q(sQ, Q[b, :, h], i0 + Br, min(i0 + 2 * Br, N_q), ty, tx)
                if j > 0:
                    get_O(rO, sO, ty, tx)
                else:
                    clear_O(rO, ZERO)
                for a in range(RA):
                    rm[a] = sm[ty + a * TY] if j > 0 else NEG_INF

                # m̃, P̃, l̃ and m_new, l_new; alpha = exp(m - m_new)   lines 10-11
                fill_rows(rl, ZERO)
                update(rS, rm, rl, ralpha)

                # O = diag(l_new)⁻¹ (diag(l) alpha O + P̃ V)  [Br, d]   line 12
                # Each weight is divided before it is used: multiplying O by a rounded 1/l_new at every step drifts.
                for a in range(RA):
                    l_old = sl[ty + a * TY] * ralpha[a] if j > 0 else ZERO
                    rl[a] = l_old + row_sum(rl[a])
                    ralpha[a] = l_old / rl[a] if rl[a] != ZERO else ZERO
                    rinverse[a] = ONE / rl[a] if rl[a] != ZERO else ZERO
                rescale_O(rO, ralpha)
                normalise_P(rS, rinverse)
                put_P(sP, rS, ty, tx)
                cuda.syncwarp()  # a row of P is written and read by the lanes of one warp
                if any_seen != 0:
                    PV(rO, sP, sV, ty, tx)
                put_O(sO, rO, ty, tx)
                cuda.syncthreads()
                if j < Tc - 1:
                    store_O_acc(O_acc[b, :, h], sO, i0, end, ty, tx)
                else:
                    store_O(O[b, :, h], sO, i0, end, ty, tx)

                for a in range(RA):  # line 13
                    row = i0 + ty + a * TY
                    if tx == 0 and row < end:
                        l[b, h, row] = rl[a]
                        m[b, h, row] = rm[a]
                        if j == Tc - 1:
                            LSE[b, h, row] = rm[a] + log(rl[a]) if rl[a] != ZERO else NEG_INF
        arrive()

    run = Launch(fwd_v1, t.count, shared.bytes, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        B, N_q, H, d = Q.shape
        O_acc = O if problem.dtype == "fp32" else scratch(B, N_q, H, d, like=Q)
        l, m = scratch(B, H, N_q, like=Q), scratch(B, H, N_q, like=Q)
        heads = B * H if N_q else 0  # without rows there is nothing to do
        run(heads, Q, K, V, mask, O, O_acc, l, m, LSE, problem.scale, problem.softcap, lo, hi)

    return launch


VARIANT = Variant(
    name="fwd_v1",
    direction="fwd",
    generation="v1",
    loop_order="kv_outer",
    parent=None,
    delta="the paper's Algorithm 1: one kernel, O(N) memory, O, l, m rescaled through global memory at every step",
    one_block_a_head=True,
    fit=fit,
    build=build,
    default=True,
)
