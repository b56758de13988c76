"""Control: FlashAttention-1's loop order with FlashAttention-2's other ideas.  [definitions: an honest loop_order]

Parent fwd_v1; the one idea: be lazy.  O travels through global memory unnormalised and is divided by l only at its
row block's last visit, and tiles that the mask empties are not visited.  Against fwd_v2_one_block nothing differs
but the order of the two loops.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Shared, Softmax, Threads, Visit, conversions, scratch
from ..device.scalar import NEG_INF, ONE, ZERO, log
from ..variant import Variant


def layout(problem, tile, device):
    t = Threads.of(tile, problem.d, device, overhead=176 + 8 * problem.mask.boolean)
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
    rescale_O, put_P = blocks.scale_rows(RA, RD), blocks.put(RA, RB)
    get_O, put_O = blocks.get_heads(RA, RD), blocks.put_heads(RA, RD)
    store_O, store_O_acc = blocks.store(narrow), blocks.store()
    next_visit, visits, score, query_blocks = visit.next_visit, visit.visits, visit.score, visit.query_blocks
    update, row_sum = softmax.update, softmax.row_sum
    bits = visit.bits

    @cuda.jit
    def fwd_v2_kv_outer(Q, K, V, mask, O, O_acc, l, m, LSE, scale, softcap, lo, hi):
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
        rseen = cuda.local.array(RA, bits)  # [Br] x [Bc] bits

        for j in range(Tc):
            j0 = j * Bc
            arrive()
            cuda.syncthreads()  # the last step with K and V of before has been computed
            first_i, end_i = query_blocks(j0, N_q, N_k, lo, hi)
            if first_i < end_i:
                copy_KV(sK, K[b, :, h // group], j0, min(j0 + Bc, N_k), ty, tx)
                copy_KV(sV, V[b, :, h // group], j0, min(j0 + Bc, N_k), ty, tx)

            i, seen, any_seen = next_visit(rseen, mask[b, h], 0, j, N_q, N_k, lo, hi, ty, tx)
            if i < Tr:
                copy_Q(sQ, Q[b, :, h], i * Br, min(i * Br + Br, N_q), ty, tx)
            while i < Tr:
                i0 = i * Br
                end = min(i0 + Br, N_q)
                first_j, end_j = visits(i0, N_q, N_k, lo, hi)
                first, last, live = j == first_j, j == end_j - 1, any_seen != 0
                arrive()
                cuda.syncthreads()  # Q is here; the step before has been stored
                if not first:
                    load_rows(sl, l[b, h], i0, end, thread)
                    load_rows(sm, m[b, h], i0, end, thread)
                    copy_O(sO, O_acc[b, :, h], i0, end, ty, tx)

                # S = scale · Q Kᵀ, softcapped and masked  [Br, Bc]
                clear_S(rS, ZERO)
                if live:
                    QKt(rS, sQ, sK, ty, tx)
                    score(rS, rseen, seen, scale, softcap)

                i, seen, any_seen = next_visit(rseen, mask[b, h], i + 1, j, N_q, N_k, lo, hi, ty, tx)
                arrive()
                cuda.syncthreads()  # O, l and m are here; Q has been read
                if i < Tr:
                    copy_Q(sQ, Q[b, :, h], i * Br, min(i * Br + Br, N_q), ty, tx)
                if first:
                    clear_O(rO, ZERO)
                else:
                    get_O(rO, sO, ty, tx)
                for a in range(RA):
                    rm[a] = NEG_INF if first else sm[ty + a * TY]

                fill_rows(rl, ZERO)
                fill_rows(ralpha, ONE)
                if live:
                    # m, l, P̃ = exp(S - m)
                    update(rS, rm, rl, ralpha)

                    # O = diag(exp(m_old - m)) O + P̃ V  [Br, d]
                    rescale_O(rO, ralpha)
                    put_P(sP, rS, ty, tx)
                    cuda.syncwarp()  # a row of P̃ is written and read by the lanes of one warp
                    PV(rO, sP, sV, ty, tx)

                for a in range(RA):
                    l_old = ZERO if first else sl[ty + a * TY] * ralpha[a]
                    rl[a] = l_old + row_sum(rl[a])
                    row = i0 + ty + a * TY
                    if tx == 0 and row < end:
                        l[b, h, row] = rl[a]
                        m[b, h, row] = rm[a]
                        if last:
                            LSE[b, h, row] = rm[a] + log(rl[a]) if rl[a] != ZERO else NEG_INF
                    ralpha[a] = ONE / rl[a] if rl[a] != ZERO else ZERO

                # O = diag(l)⁻¹ O, once
                if last:
                    rescale_O(rO, ralpha)
                put_O(sO, rO, ty, tx)
                cuda.syncthreads()
                if last:
                    store_O(O[b, :, h], sO, i0, end, ty, tx)
                else:
                    store_O_acc(O_acc[b, :, h], sO, i0, end, ty, tx)
        arrive()

    run = Launch(fwd_v2_kv_outer, t.count, shared.bytes, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        B, N_q, H, d = Q.shape
        O_acc = O if problem.dtype == "fp32" else scratch(B, N_q, H, d, like=Q)
        l, m = scratch(B, H, N_q, like=Q), scratch(B, H, N_q, like=Q)
        run(B * H, Q, K, V, mask, O, O_acc, l, m, LSE, problem.scale, problem.softcap, lo, hi)

    return launch


VARIANT = Variant(
    name="fwd_v2_kv_outer",
    direction="fwd",
    generation="v2",
    loop_order="kv_outer",
    parent="fwd_v1",
    delta="normalised once, at a row block's last visit; tiles that the mask empties are skipped",
    one_block_a_head=True,
    fit=fit,
    build=build,
)
