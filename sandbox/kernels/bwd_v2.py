"""FlashAttention-2, backward: parallel over key blocks.  [FA2, 2307.08691, Algorithm 2; §3.2]

A block owns Bc keys, keeps their dK and dV in registers and walks along the query blocks; dQ, to which every key
block contributes, is summed in float32 by atomic adds, in whatever order they arrive.  D = rowsum(dO ∘ O) is formed
once, by a kernel of its own.  P is recomputed from LSE; query blocks that see none of the keys are not visited.
"""

from numba import cuda, float32

from ..device import Blocks, Launch, Shared, Softmax, Threads, Visit, conversions, scratch
from ..device.scalar import NEG_INF, ZERO, exp
from ..variant import Variant


def layout(problem, tile, device):
    t = Threads.of(tile, problem.d, device, "bwd", overhead=79)
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
    add_dQ = blocks.atomic_add()
    look, score, slope, query_blocks = visit.look, visit.score, visit.slope, visit.query_blocks
    BOOLEAN, bits = visit.boolean, visit.bits
    row_sum, rows_a_block = softmax.row_sum, TY

    @cuda.jit
    def rowsum(O, dO, D, dQ_acc):
        """D = rowsum(dO ∘ O) [Br] and dQ = 0, lines 4-5: TX lanes a row."""
        N_q, H = O.shape[1], O.shape[2]
        block, thread, ty, tx = where()
        row = block * rows_a_block + ty
        b, i, h = row // (N_q * H), row // H % N_q, row % H
        x = ZERO
        if b < O.shape[0]:
            for c in range(tx, d, TX):
                x += widen(O[b, i, h, c]) * widen(dO[b, i, h, c])
                dQ_acc[b, i, h, c] = ZERO
        x = row_sum(x)
        if tx == 0 and b < O.shape[0]:
            D[b, h, i] = x

    @cuda.jit
    def bwd_v2(Q, K, V, mask, LSE, dO, D, dQ_acc, dK, dV, scale, softcap, lo, hi):
        block, thread, ty, tx = where()
        N_q, N_k = Q.shape[1], K.shape[1]
        H_kv, group = K.shape[2], Q.shape[2] // K.shape[2]
        Tc = (N_k + Bc - 1) // Bc
        j, bh = block % Tc, block // Tc
        b, h_kv = bh // H_kv, bh % H_kv
        j0 = j * Bc

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

        copy_KV(sK, K[b, :, h_kv], j0, min(j0 + Bc, N_k), ty, tx)  # line 7
        copy_KV(sV, V[b, :, h_kv], j0, min(j0 + Bc, N_k), ty, tx)
        clear_dKV(rdK, ZERO)
        clear_dKV(rdV, ZERO)
        first, end = query_blocks(j0, N_q, N_k, lo, hi)

        for g in range(group * (end - first)):  # line 8, for every query head of the group
            h, i0 = h_kv * group + g // (end - first), (first + g % (end - first)) * Br
            i1 = min(i0 + Br, N_q)
            seen = look(rseen, mask[b, h], i0, j0, N_q, N_k, lo, hi, ty, tx)
            if BOOLEAN:
                if cuda.syncthreads_or(seen) == 0:
                    continue
            cuda.syncthreads()  # the step before has been computed
            copy_QdO(sQ, Q[b, :, h], i0, i1, ty, tx)  # line 9
            copy_QdO(sdO, dO[b, :, h], i0, i1, ty, tx)
            load_rows(sLSE, LSE[b, h], i0, i1, thread)
            load_rows(sD, D[b, h], i0, i1, thread)
            arrive()
            cuda.syncthreads()

            # S = scale · Q Kᵀ, softcapped and masked;  dP = dO Vᵀ  [Br, Bc]   lines 10, 13
            clear_S(rS, ZERO)
            QKt(rS, sQ, sK, ty, tx)
            score(rS, rseen, seen, scale, softcap)
            clear_S(rdP, ZERO)
            dOVt(rdP, sdO, sV, ty, tx)

            # P = exp(S - LSE),  dS = P ∘ (dP - D)  [Br, Bc]   lines 11, 14
            for a in range(RA):
                lse, delta = sLSE[ty + a * TY], sD[ty + a * TY]
                for e in range(RB):
                    s, p = rS[a, e], ZERO
                    if s != NEG_INF and lse != NEG_INF:
                        p = exp(s - lse)
                    rS[a, e] = p
                    rdP[a, e] = p * (rdP[a, e] - delta) * slope(s, softcap) * scale if p != ZERO else ZERO
            put_S(sP, rS, ty, tx)
            put_S(sdS, rdP, ty, tx)
            cuda.syncthreads()

            # dV += Pᵀ dO,  dK += dSᵀ Q,  dQ += dS K by atomics   lines 12, 15, 16
            PtdO(rdV, sP, sdO, ty, tx)
            dStQ(rdK, sdS, sQ, ty, tx)
            clear_dQ(rdQ, ZERO)
            dSK(rdQ, sdS, sK, ty, tx)
            cuda.syncthreads()  # sQ has been read: dQ leaves through it
            put_dQ(sQ, rdQ, ty, tx)
            cuda.syncthreads()
            add_dQ(dQ_acc[b, :, h], sQ, i0, i1, ty, tx)

        arrive()
        cuda.syncthreads()  # sK and sV have been read: dK and dV leave through them
        put_dKV(sK, rdK, ty, tx)
        put_dKV(sV, rdV, ty, tx)
        cuda.syncthreads()
        store_dKV(dK[b, :, h_kv], sK, j0, min(j0 + Bc, N_k), ty, tx)  # line 18
        store_dKV(dV[b, :, h_kv], sV, j0, min(j0 + Bc, N_k), ty, tx)

    @cuda.jit
    def to_dtype(dQ_acc, dQ):
        """dQ, rounded to its dtype."""
        N_q, H = dQ.shape[1], dQ.shape[2]
        block, thread, ty, tx = where()
        row = block * rows_a_block + ty
        b, i, h = row // (N_q * H), row // H % N_q, row % H
        if b < dQ.shape[0]:
            for c in range(tx, d, TX):
                dQ[b, i, h, c] = narrow(dQ_acc[b, i, h, c])

    run_rowsum = Launch(rowsum, t.count, warp=TX)
    run = Launch(bwd_v2, t.count, shared.bytes, warp=TX)
    run_to_dtype = Launch(to_dtype, t.count, warp=TX)

    def launch(problem, Q, K, V, mask, O, LSE, dO, dQ, dK, dV):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        B, N_q, H, d = Q.shape
        D = scratch(B, H, N_q, like=Q)
        dQ_acc = dQ if problem.dtype == "fp32" else scratch(B, N_q, H, d, like=Q)
        rows = -(-B * H * N_q // rows_a_block)
        keys = -(-problem.N_k // Bc) * B * problem.H_kv
        run_rowsum(rows, O, dO, D, dQ_acc)
        run(keys, Q, K, V, mask, LSE, dO, D, dQ_acc, dK, dV, problem.scale, problem.softcap, lo, hi)
        if dQ_acc is not dQ:
            run_to_dtype(rows, dQ_acc, dQ)

    return launch


VARIANT = Variant(
    name="bwd_v2",
    direction="bwd",
    generation="v2",
    loop_order="kv_outer",
    parent="bwd_v1",
    delta="one block a key block, dQ summed by atomic adds, D formed once, tiles that the mask empties skipped",
    fit=fit,
    build=build,
    default=True,
    deterministic=False,
)
