"""FlashAttention-2's backward on the tensor cores, the same bits on every run.

Parent bwd_v2_mma; the one idea: no two blocks write one element.  dK and dV are summed by key blocks as in the parent,
dQ by query blocks in a kernel of its own, which forms S and dP a second time: seven products instead of five, no atomic
adds, no float32 dQ in memory.  There a warp owns rows of Q, as in the forward, and dS goes from registers into dS K.
"""

from dataclasses import replace
from functools import partial

from numba import cuda, float32, int16, int32, uint32

from ..device import Launch, device_function, scratch
from ..device.columns import Columns
from ..device.launch import addressable, all_or_none
from ..device.layout import TILES, Switches, check, chosen, chosen_dQ, nearest_tiles  # noqa: F401  (Switches: for the catalog)
from ..device.mma import MMA, Warps
from ..device.ptx import commit_group, copy_four, fma, here, wait_group
from ..device.rows import ALL, NONE, Rows, capped
from ..device.rowsum import rowsum
from ..device.scalar import LOG2_E, NEG_INF, ONE, ZERO, exp2, quotient
from ..device.sections import heads_a_section
from ..device.tiles import shared_tile
from ..variant import Variant

NAMES = "bwd_v2_mma_deterministic", "bwd_v2_deterministic"
fit, nearest = partial(check, *NAMES, roles=1), partial(nearest_tiles, *NAMES, roles=1)


def build(problem, tile, device, **turned):
    a = chosen(problem, tile, device, **turned | dict(roles=1))
    d, Br, Bc, MI, SIDE = problem.d, tile.Br, tile.Bc, a.rows // 16, a.side
    ROWS, QUERIES, COLUMNS, PARTS = a.rows, a.queries, a.columns, Br // (a.side * a.queries)
    NS, NW, NK = QUERIES // 8, QUERIES // 16, COLUMNS // 8
    warps, columns = Warps(a.warps, problem.dtype), Columns(problem, MI, QUERIES)
    STAGES, ONCE, AHEAD, BUFFERS = a.stages, a.barriers == 1, 3 - a.barriers, 3 - a.barriers
    tile_K, tile_V, tile_Q, tile_dO, tile_dS, *tile_P = shared = a.shared(problem, tile)
    (tile_P,) = tile_P or [tile_dS]
    where, copy_QdO, copy_KV = warps.where_lean(), warps.copy_lean(Br, d, a.wide), warps.copy_lean(Bc, d, a.wide)
    KQt = VdOt = warps.product_nt(MI, QUERIES, d)
    own, others = warps.product_at("rn", MI, COLUMNS, QUERIES), warps.product_at("nn", MI, COLUMNS, QUERIES)
    clear_S, clear_dKV, KEYS = warps.fill(MI, QUERIES), warps.fill(MI, COLUMNS), Bc // a.warps
    put_S, put_dKV, store_dKV = warps.put_words_at(MI, QUERIES), warps.put_at(MI, COLUMNS), warps.store(KEYS, d)
    look, hide, weigh, slope = columns.look, columns.hide, columns.weigh, columns.slope
    score, all_arrived, first_arrived = capped(MI, QUERIES, problem.softcap > 0), wait_group(0), wait_group(AHEAD - 1)
    BANDED, SOFTCAP = problem.mask.banded, problem.softcap > 0

    tile_L = shared_tile("sL", shared.bytes // 4, 1, STAGES * Br, 1)
    tile_D = shared_tile("sD", shared.bytes // 4 + STAGES * Br, 1, STAGES * Br, 1)

    @device_function
    def share(warp):
        """(w0, x, c0) of a warp: its keys begin at w0, it is the x-th of those that share them, its columns at c0."""
        x = int32(warp % SIDE)
        return int32(warp // SIDE * ROWS), x, int32(x * COLUMNS)

    @device_function
    def load(sQ, sdO, sL, sD, slot, Q, dO, L, D, i, N_q, thread):
        """Row block i of Q, dO, L and D is on its way to a slot, a group of copies (line 9)."""
        thread = here(thread)
        copy_QdO(sQ, slot, Q, i * Br, N_q, thread)
        copy_QdO(sdO, slot, dO, i * Br, N_q, thread)
        if thread < Br // 4:
            copy_four(sL, slot + 4 * thread, L, i * Br + 4 * thread)
            copy_four(sD, slot + 4 * thread, D, i * Br + 4 * thread)

    @device_function
    def after(slot, steps):
        """The slot of a step that comes so many later."""
        slot += steps * Br
        return int32(slot if slot < STAGES * Br else slot - STAGES * Br)

    def kernel(SCORED):
        SIGNED = SCORED and not SOFTCAP

        @cuda.jit
        def dkdv(Q, K, V, dO, L, D, dK, dV, scale, softcap, unit, lo, hi, section):
            block, thread, warp, lane = where()
            N_q, N_k, H_kv = int32(Q.shape[1]), int32(K.shape[1]), int32(K.shape[2])
            group, _ = quotient(int32(Q.shape[2]), H_kv)
            # The first keys, which most rows see under a causal mask, come first; heads in sections, for L2
            Tc = int32((N_k + Bc - 1) // Bc)
            before, place = quotient(block, int32(section * Tc))
            j, bh = quotient(place, int32(min(section, Q.shape[0] * H_kv - before * section)))
            b, h_kv = quotient(int32(before * section + bh), H_kv)
            j0 = int32(j * Bc)
            thread, warp, lane = int32(thread), int32(warp), int32(lane)

            smem = cuda.shared.array(0, int16, 128)
            sK = tile_K(smem)  # [Bc, d]
            sV = tile_V(smem)  # [Bc, d]
            sQ = tile_Q(smem)  # STAGES x [Br, d]
            sdO = tile_dO(smem)  # STAGES x [Br, d]
            sdS = tile_dS(smem)  # dSᵀ [Bc, Br]
            sP = tile_P(smem)  # Pᵀ [Bc, Br], where warps share keys
            floats = cuda.shared.array(0, float32, 128)  # the same memory
            sL = tile_L(floats)  # STAGES x [Br]
            sD = tile_D(floats)
            rS = cuda.local.array((MI, NS, 4), float32)  # Sᵀ  [rows, queries]
            rdP = cuda.local.array((MI, NS, 4), float32)  # dPᵀ
            rP = cuda.local.array((MI, NW, 4), uint32)  # Pᵀ in words
            rW = cuda.local.array((MI, NW, 4), uint32)  # Pᵀ times the slope of the softcap
            rdS = cuda.local.array((MI, NW, 4), uint32)  # dSᵀ
            rdK = cuda.local.array((MI, NK, 4), float32)  # [rows, columns]
            rdV = cuda.local.array((MI, NK, 4), float32)
            clear_dKV(rdK)
            clear_dKV(rdV)

            first, end = 0, N_q
            if BANDED:
                first, end = max(0, j0 - hi), min(N_q, min(j0 + Bc, N_k) - lo)
            first, end = int32(first // Br), int32((end + Br - 1) // Br)

            copy_KV(sK, 0, K[b, :, h_kv], j0, N_k, thread)  # line 7
            copy_KV(sV, 0, V[b, :, h_kv], j0, N_k, thread)
            commit_group()
            slot, buffer = int32(0), int32(0)  # of sQ, sdO, sL and sD, and of sdS and sP: first rows of this step's
            for g in range(group):
                h = int32(h_kv * group + g)
                bh = int32(b * Q.shape[2] + h)
                Qh, dOh, Lh, Dh = Q[b, :, h], dO[b, :, h], L[bh], D[bh]
                for p in range(AHEAD):
                    if first + p < end:
                        load(sQ, sdO, sL, sD, after(slot, p), Qh, dOh, Lh, Dh, int32(first + p), N_q, thread)
                    commit_group()
                if ONCE:
                    first_arrived()
                    cuda.syncthreads()
                for i in range(first, end):  # line 8
                    w0, x, c0 = share(here(warp))
                    if not ONCE:
                        all_arrived()
                        cuda.syncthreads()  # this step's Q and dO are here, and the step before is done
                        if i + 1 < end:
                            load(sQ, sdO, sL, sD, after(slot, 1), Qh, dOh, Lh, Dh, int32(i + 1), N_q, thread)
                        commit_group()

                    for part in range(PARTS):
                        if not BANDED:  # once more: that is what ptxas needs in order to spill nothing
                            w0, x, c0 = share(here(warp))
                        r0 = int32((part * SIDE + x) * QUERIES)  # the warp's queries in the tile
                        seen = look(int32(j0 + w0), int32(i * Br + r0), N_q, N_k, lo, hi)
                        if seen != NONE:
                            # Sᵀ = K Qᵀ,  P = exp(S - LSE)    lines 10, 11
                            clear_S(rS)
                            KQt(rS, sK, w0, sQ, slot + r0)
                            if SCORED:
                                score(rS, scale, softcap)
                            if seen != ALL:
                                hide(rS, NEG_INF, j0 + w0, i * Br + r0, N_k, lo, hi, lane)
                            weigh(rP, rW, rS, sL, slot + r0, lane, unit)

                            # dPᵀ = V dOᵀ,  dS = P ∘ (dP - D)    lines 13, 14
                            clear_S(rdP)
                            VdOt(rdP, sV, w0, sdO, slot + r0)
                            if seen != ALL:
                                again = int32(here(lane)) if SIGNED else lane  # what ptxas needs to spill nothing
                                hide(rdP, ZERO, j0 + w0, i * Br + r0, N_k, lo, hi, again)
                            slope(rdS, rW, rdP, sD, slot + r0, lane)

                            # dV += Pᵀ dO,  dK += dSᵀ Q    lines 12, 16
                            own(rdV, rP, (0, 0), sdO, (slot + r0, c0))
                            own(rdK, rdS, (0, 0), sQ, (slot + r0, c0))
                        else:
                            for mi in range(MI):
                                for n in range(NW):
                                    for e in range(4):
                                        rP[mi, n, e] = rdS[mi, n, e] = uint32(0)
                        if SIDE > 1:
                            put_S(sP, (buffer + w0, r0), rP)
                            put_S(sdS, (buffer + w0, r0), rdS)
                    if ONCE:
                        all_arrived()
                    cuda.syncthreads()  # this step's dS is here, the step before is done
                    if ONCE:
                        if i + 2 < end:
                            load(sQ, sdO, sL, sD, after(slot, 2), Qh, dOh, Lh, Dh, int32(i + 2), N_q, thread)
                        commit_group()

                    # dV and dK of what the warps beside have computed
                    for part in range(PARTS):
                        for beside in range(1, SIDE):
                            r0 = int32((part * SIDE + (x + beside) % SIDE) * QUERIES)
                            others(rdV, sP, (buffer + w0, r0), sdO, (slot + r0, c0))
                            others(rdK, sdS, (buffer + w0, r0), sQ, (slot + r0, c0))
                    slot, buffer = after(slot, 1), int32(BUFFERS * Bc - Bc - buffer)

            all_arrived()
            cuda.syncthreads()  # sK and sV have been read: dK and dV leave through them
            w0, x, c0 = share(warp)
            put_dKV(sK, (w0, c0), rdK, scale)
            put_dKV(sV, (w0, c0), rdV, ONE)
            cuda.syncthreads()
            r0 = int32(warp * KEYS)
            store_dKV(dK[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sK, r0, lane)  # line 18
            store_dKV(dV[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sV, r0, lane)

        return Launch(dkdv, warps.threads, a.bytes(problem, tile), blocks=a.blocks, tile=tile)

    # dQ: a warp owns rows of Q, and walks along the keys
    q = chosen_dQ(problem, tile)
    MQ, ROWS_Q, Br_Q, KEYS_Q = q.rows // 16, q.rows, q.rows * q.warps, q.keys
    NT, NU, NO = KEYS_Q // 8, KEYS_Q // 16, d // 8
    by_rows, rows = Warps(q.warps, problem.dtype), Rows(problem, MQ, q.keys)
    tile_Qq, tile_dOq, tile_Kq, tile_Vq = shared_dQ = q.shared(d)
    where_q, copy_rows, copy_keys = by_rows.where(), by_rows.copy(Br_Q, d), by_rows.copy(KEYS_Q, d)
    QKt = dOVt = by_rows.product_nt(MQ, KEYS_Q, d)
    dSK, clear_T, clear_dQ = by_rows.product_rn(MQ, d, KEYS_Q), by_rows.fill(MQ, KEYS_Q), by_rows.fill(MQ, d)
    put_dQ, store_dQ, (_, pack) = by_rows.put_at(MQ, d), by_rows.store(ROWS_Q, d), MMA[problem.dtype]
    look_rows, hide_keys, score_rows = rows.look, rows.hide, capped(MQ, KEYS_Q, SOFTCAP)

    @device_function
    def slope_of(s, L, dP, D, unit):
        """dS = P (dP - D) of one pair."""
        p = exp2(fma(s, unit, -L))
        if SOFTCAP:
            p = p * (ONE - s * s) if p != ZERO else ZERO
        return p * (dP - D)

    def kernel_dQ(SCORED):
        @cuda.jit
        def dq(Q, K, V, dO, L, D, dQ, scale, softcap, unit, lo, hi, section):
            block, thread, warp, lane = where_q()
            N_q, N_k, H = int32(Q.shape[1]), int32(K.shape[1]), int32(Q.shape[2])
            group, _ = quotient(H, int32(K.shape[2]))
            Tr = int32((N_q + Br_Q - 1) // Br_Q)  # the last rows first, heads in sections, as in the forward
            before, place = quotient(block, int32(section * Tr))
            i, bh = quotient(place, int32(min(section, Q.shape[0] * H - before * section)))
            b, h = quotient(int32(before * section + bh), H)
            h_kv, _ = quotient(h, group)
            i0, w0 = int32((Tr - 1 - i) * Br_Q), int32(warp * ROWS_Q)
            Kh, Vh, Lh, Dh = K[b, :, h_kv], V[b, :, h_kv], L[before * section + bh], D[before * section + bh]

            smem = cuda.shared.array(0, int16, 128)
            sQ = tile_Qq(smem)  # [Br, d]
            sdO = tile_dOq(smem)  # [Br, d]
            sK = tile_Kq(smem)  # 2 x [keys, d]
            sV = tile_Vq(smem)
            rS = cuda.local.array((MQ, NT, 4), float32)  # S  [rows, keys]
            rdP = cuda.local.array((MQ, NT, 4), float32)
            rdS = cuda.local.array((MQ, NU, 4), uint32)
            rdQ = cuda.local.array((MQ, NO, 4), float32)  # [rows, d]
            rL = cuda.local.array((MQ, 2), float32)
            rD = cuda.local.array((MQ, 2), float32)
            clear_dQ(rdQ)

            first, end = 0, N_k
            if BANDED:
                first, end = max(0, i0 + lo), min(N_k, min(i0 + Br_Q, N_q) + hi)
            first, end = int32(first // KEYS_Q), int32((end + KEYS_Q - 1) // KEYS_Q)

            copy_rows(sQ, 0, Q[b, :, h], i0, N_q, thread)
            copy_rows(sdO, 0, dO[b, :, h], i0, N_q, thread)
            if first < end:
                copy_keys(sK, 0, Kh, first * KEYS_Q, N_k, thread)
                copy_keys(sV, 0, Vh, first * KEYS_Q, N_k, thread)
            commit_group()
            for mi in range(MQ):
                for g in range(2):
                    row = i0 + w0 + 16 * mi + 8 * g + lane // 4
                    rL[mi, g], rD[mi, g] = Lh[row], Dh[row]
            slot = int32(0)
            for j in range(first, end):
                all_arrived()
                cuda.syncthreads()  # this step's K and V are here; those of the step before have been read
                if j + 1 < end:
                    copy_keys(sK, KEYS_Q - slot, Kh, (j + 1) * KEYS_Q, N_k, thread)
                    copy_keys(sV, KEYS_Q - slot, Vh, (j + 1) * KEYS_Q, N_k, thread)
                commit_group()
                seen = look_rows(i0 + w0, j * KEYS_Q, N_q, N_k, lo, hi)
                if seen != NONE:
                    # S = Q Kᵀ,  dP = dO Vᵀ,  dS = P ∘ (dP - D),  dQ += dS K
                    clear_T(rS)
                    QKt(rS, sQ, w0, sK, slot)
                    clear_T(rdP)
                    dOVt(rdP, sdO, w0, sV, slot)
                    if SCORED:
                        score_rows(rS, scale, softcap)
                    if seen != ALL:
                        hide_keys(rS, i0 + w0, j * KEYS_Q, N_k, lo, hi, lane)
                    for mi in range(MQ):
                        for n in range(NT):
                            for g in range(2):
                                e, l, delta = 2 * g, rL[mi, g], rD[mi, g]
                                rdS[mi, n // 2, 2 * (n % 2) + g] = pack(
                                    slope_of(rS[mi, n, e], l, rdP[mi, n, e], delta, unit),
                                    slope_of(rS[mi, n, e + 1], l, rdP[mi, n, e + 1], delta, unit),
                                )
                    dSK(rdQ, rdS, 0, sK, slot)
                slot = int32(KEYS_Q - slot)

            all_arrived()
            cuda.syncthreads()  # sQ has been read: dQ leaves through it
            put_dQ(sQ, (w0, 0), rdQ, scale)
            cuda.syncwarp()
            store_dQ(dQ[b, :, h], i0 + w0, N_q, sQ, w0, lane)

        return Launch(dq, by_rows.threads, shared_dQ.bytes, blocks=q.blocks, tile=tile)

    run_rowsum = rowsum(problem)
    plain, scored = (kernel(False), kernel_dQ(False)), (kernel(True), kernel_dQ(True))

    def launch(problem, Q, K, V, mask, O, LSE, dO, dQ, dK, dV):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        heads, rows = problem.B * problem.H, -(-problem.N_q // max(Br, Br_Q)) * max(Br, Br_Q)
        (run_dkdv, run_dq), unit = plain, problem.scale * float(LOG2_E)
        if problem.softcap > 0 or problem.scale <= 0:
            (run_dkdv, run_dq), unit = scored, (problem.softcap or 1.0) * float(LOG2_E)
        L, D = scratch(heads, rows, like=Q), scratch(heads, rows, like=Q)
        Q, K, V, dO = map(addressable, (Q, K, V, dO))
        run_rowsum(addressable(O), dO, LSE, L, D)
        shape = problem.scale, problem.softcap, unit, lo, hi
        section = heads_a_section(problem.B * problem.H_kv, 4 * problem.N_q * d * problem.group)
        run_dkdv(-(-problem.N_k // Bc) * problem.B * problem.H_kv, Q, K, V, dO, L, D, dK, dV, *shape, section)
        section = problem.group * heads_a_section(problem.B * problem.H_kv, 4 * problem.N_k * d)
        run_dq(-(-problem.N_q // Br_Q) * heads, Q, K, V, dO, L, D, dQ, *shape, section)

    return all_or_none(launch)


VARIANT = Variant(
    name="bwd_v2_mma_deterministic",
    direction="bwd",
    generation="v2",
    loop_order="kv_outer",
    parent="bwd_v2_mma",
    delta="dQ summed by query blocks in its own kernel instead of by atomic adds",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=build,
    tiles=TILES,
    nearest=nearest,
    unit="tensor",
    pace=1e-6,
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join(["bwd_v2_mma_deterministic", *(f"{switch}={value}" for switch, value in switches.items())])
    return replace(VARIANT, name=name, default=False, fit=partial(fit, **switches), build=partial(build, **switches))
