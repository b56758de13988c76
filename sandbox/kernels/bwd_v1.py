"""FlashAttention-1, backward: K and V outside, Q inside.  [FA1, 2205.14135, Algorithm 4]

One block a key/value head.  P is recomputed from LSE, which says in one number a row what the paper's l and m say in
two.  dK and dV stay in registers; dQ comes from global memory and goes back at every step, in float32 (dQ_acc) until
its last visit; D = rowsum(dO ∘ O) is formed anew at every visit.  Every tile is visited, whatever the mask.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Shared, Softmax, Threads, Visit, conversions, scratch
from ..device.scalar import NEG_INF, ZERO, exp
from ..variant import Variant


def layout(problem, tile, device):
    t = Threads.of(tile, problem.d, device, "bwd", overhead=170)
    rows, keys, columns = t.Br_padded, t.Bc_padded, t.d_padded
    return t, Shared(
        sQ=(rows, columns), sdO=(rows, columns), sK=(keys, columns), sV=(keys, columns),
        sP=(rows, keys), sdS=(rows, keys), sLSE=(rows,), sD=(rows,),
    )  # fmt: skip


def fit(problem, tile, device):
    t, shared = layout(problem, tile, device)
    t.check(tile, shared.bytes, device, "bwd")


def build(problem, tile, device):
    t, shared = layout(problem, tile, device)
    Br, Bc, d = t.Br, t.Bc, t.d
    RA, RB, RC, RD, TY, TX = t.RA, t.RB, t.RC, t.RD, t.TY, t.TX
    widen, narrow = conversions(problem.dtype)
    blocks, softmax, visit = Blocks(t), Softmax(t), Visit(problem, t)
    where = blocks.where()
    tile_Q, tile_dO, tile_K, tile_V, tile_P, tile_dS, tile_LSE, tile_D = shared
    copy_QdO, copy_KV = blocks.copy(t.Br_padded, widen), blocks.copy(t.Bc_padded, widen)
    arrive, load_rows = blocks.arrive(), blocks.load_rows(t.Br_padded)
    QKt, PtdO, dSK = blocks.product_nt(RA, RB, d), blocks.product_tn(RC, RD, Br), blocks.product_nn(RA, RD, Bc)
    dOVt, dStQ = QKt, PtdO  # the same shapes
    clear_S, clear_dQ, clear_dKV = blocks.fill(RA, RB), blocks.fill(RA, RD), blocks.fill(RC, RD)
    put_S, put_dQ, put_dKV = blocks.put(RA, RB), blocks.put_heads(RA, RD), blocks.put_heads(RC, RD)
    store_dKV = blocks.store(narrow)
    store_dQ, store_dQ_acc = blocks.store(narrow), blocks.store()
    add_dQ, add_dQ_acc = blocks.accumulate(narrow), blocks.accumulate()
    look, score, slope, row_sum = visit.look, visit.score, visit.slope, softmax.row_sum
    bits = visit.bits

    @cuda.jit
    def bwd_v1(Q, K, V, mask, O, LSE, dO, dQ, dQ_acc, dK, dV, scale, softcap, lo, hi):
        block, thread, ty, tx = where()
        N_q, N_k = Q.shape[1], K.shape[1]
        H_kv, group = K.shape[2], Q.shape[2] // K.shape[2]
        Tr, Tc = (N_q + Br - 1) // Br, max(1, (N_k + Bc - 1) // Bc)  # with no keys, one visit still writes dQ
        b, h_kv = block // H_kv, block % H_kv

        smem = cuda.shared.array(0, float32, 16)
        sQ = tile_Q(smem)  # [Br, d]
        sdO = tile_dO(smem)  # [Br, d]
        sK = tile_K(smem)  # [Bc, d]
        sV = tile_V(smem)  # [Bc, d]
        sP = tile_P(smem)  # [Br, Bc]
        sdS = tile_dS(smem)  # [Br, Bc]
        sLSE = tile_LSE(smem)  # [Br]
        sD = tile_D(smem)  # [Br]
        rS = cuda.local.array((RA, RB), float32)  # [Br, Bc]
        rdP = cuda.local.array((RA, RB), float32)  # [Br, Bc]
        rdQ = cuda.local.array((RA, RD), float32)  # [Br, d]
        rdK = cuda.local.array((RC, RD), float32)  # [Bc, d]
        rdV = cuda.local.array((RC, RD), float32)  # [Bc, d]
        rseen = cuda.local.array(RA, bits)  # [Br] x [Bc] bits

        for j in range(Tc):  # line 6
            j0 = j * Bc
            cuda.syncthreads()  # the last step with K and V of before has been computed
            copy_KV(sK, K[b, :, h_kv], j0, min(j0 + Bc, N_k), ty, tx)  # line 7
            copy_KV(sV, V[b, :, h_kv], j0, min(j0 + Bc, N_k), ty, tx)
            clear_dKV(rdK, ZERO)  # line 8
            clear_dKV(rdV, ZERO)

            for g in range(group * Tr):  # line 9, for every query head of the group
                h, i0 = h_kv * group + g // Tr, g % Tr * Br
                end = min(i0 + Br, N_q)
                seen = look(rseen, mask[b, h], i0, j0, N_q, N_k, lo, hi, ty, tx)
                any_seen = cuda.syncthreads_or(seen)  # and the step before has been computed
                copy_QdO(sQ, Q[b, :, h], i0, end, ty, tx)  # line 10
                copy_QdO(sdO, dO[b, :, h], i0, end, ty, tx)
                load_rows(sLSE, LSE[b, h], i0, end, thread)
                arrive()
                cuda.syncthreads()

                # D = rowsum(dO ∘ O)  [Br]   line 19
                for a in range(RA):
                    r, D = ty + a * TY, ZERO
                    if i0 + r < end:
                        for c in range(tx, d, TX):
                            D += widen(O[b, i0 + r, h, c]) * sdO[r, c]
                    D = row_sum(D)
                    if tx == 0:
                        sD[r] = D
                cuda.syncwarp()

                clear_dQ(rdQ, ZERO)
                if any_seen != 0:
                    # S = scale · Q Kᵀ, softcapped and masked;  dP = dO Vᵀ  [Br, Bc]   lines 11-13, 17
                    clear_S(rS, ZERO)
                    QKt(rS, sQ, sK, ty, tx)
                    score(rS, rseen, seen, scale, softcap)
                    clear_S(rdP, ZERO)
                    dOVt(rdP, sdO, sV, ty, tx)

                    # P = exp(S - LSE),  dS = P ∘ (dP - D)  [Br, Bc]   lines 13, 20
                    for a in range(RA):
                        lse, D = sLSE[ty + a * TY], sD[ty + a * TY]
                        for e in range(RB):
                            s, p = rS[a, e], ZERO
                            if s != NEG_INF and lse != NEG_INF:
                                p = exp(s - lse)
                            rS[a, e] = p
                            rdP[a, e] = p * (rdP[a, e] - D) * slope(s, softcap) * scale if p != ZERO else ZERO
                    put_S(sP, rS, ty, tx)
                    put_S(sdS, rdP, ty, tx)
                    cuda.syncthreads()

                    # dV += Pᵀ dO,  dQ += dS K,  dK += dSᵀ Q   lines 16, 21, 22
                    PtdO(rdV, sP, sdO, ty, tx)
                    dSK(rdQ, sdS, sK, ty, tx)
                    dStQ(rdK, sdS, sQ, ty, tx)

                cuda.syncthreads()  # sQ has been read: dQ leaves through it
                put_dQ(sQ, rdQ, ty, tx)
                cuda.syncthreads()
                first, last = j == 0, j == Tc - 1
                if first and last:
                    store_dQ(dQ[b, :, h], sQ, i0, end, ty, tx)
                elif first:
                    store_dQ_acc(dQ_acc[b, :, h], sQ, i0, end, ty, tx)
                elif last:
                    add_dQ(dQ[b, :, h], dQ_acc[b, :, h], sQ, i0, end, ty, tx)
                else:
                    add_dQ_acc(dQ_acc[b, :, h], dQ_acc[b, :, h], sQ, i0, end, ty, tx)

            arrive()
            cuda.syncthreads()  # sK and sV have been read: dK and dV leave through them
            put_dKV(sK, rdK, ty, tx)
            put_dKV(sV, rdV, ty, tx)
            cuda.syncthreads()
            store_dKV(dK[b, :, h_kv], sK, j0, min(j0 + Bc, N_k), ty, tx)  # line 24
            store_dKV(dV[b, :, h_kv], sV, j0, min(j0 + Bc, N_k), ty, tx)

    run = Launch(bwd_v1, t.count, shared.bytes, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE, dO, dQ, dK, dV):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        B, N_q, H, d = Q.shape
        dQ_acc = dQ if problem.dtype == "fp32" else scratch(B, N_q, H, d, like=Q)
        grid = B * problem.H_kv
        run(grid, Q, K, V, mask, O, LSE, dO, dQ, dQ_acc, dK, dV, problem.scale, problem.softcap, lo, hi)

    return launch


VARIANT = Variant(
    name="bwd_v1",
    direction="bwd",
    generation="v1",
    loop_order="kv_outer",
    parent=None,
    delta="the paper's Algorithm 4: P recomputed, dQ carried through global memory at every step, one block a head",
    one_block_a_head=True,
    fit=fit,
    build=build,
    default=True,
)
