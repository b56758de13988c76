"""FlashAttention-2, backward, on the tensor cores, in Python.  [FA2, 2307.08691, Algorithm 2; §3.2]

A block of warps owns Bc keys and walks along the query blocks.  Scores are formed transposed, Sᵀ = K Qᵀ, each warp's
32 keys by some queries: Pᵀ and dSᵀ, accumulators as they come, are then the left operands of dV += Pᵀ dO and
dK += dSᵀ Q without leaving registers.  Where dK and dV of 32 keys are too many registers for one warp (d > 64), `side`
warps share the keys: each owns some columns of dK and dV and some queries of Sᵀ, and gets the others' Pᵀ and dSᵀ from
shared memory.  For d > 128 half of the warps form S, the other half dP: device/halves.py.  dQ = dS K, to which all keys
contribute, is summed in float32 by atomic adds of 16 bytes: in memory it lies as the accumulators do, and a kernel of
its own puts it in order.  dS is made of P as it was rounded for dV.

What the warps read of shared memory for each m16n8k16, in bytes, and with P and dS written, too; 128 B are a clock of
shared memory, a product is about two of the tensor cores:

    d    Br x Bc  warps   Sᵀ, dPᵀ   dV, dK    dQ    all   beside: P and dS in, registers of a thread for tiles
    64   64 x 128   4       256      128     256    205     13    128 + 64
    128  64 x 128   8       256      160     256    218     13    128 + 64
    256  64 x 64    8       256      144     192    198     10    128 + 64
"""

from dataclasses import replace
from functools import partial

from numba import cuda, float32, int16, int32, uint32

from ..device import Launch, device_function, scratch, zeros
from ..device.columns import Columns
from ..device.halves import halves
from ..device.launch import addressable, all_or_none
from ..device.layout import TILES, Switches, check, chosen, nearest_tiles  # noqa: F401  (Switches: for the catalog)
from ..device.mma import Shared16, Warps
from ..device.ptx import add_four, commit_group, copy_four, here, read_four, wait_group
from ..device.rows import ALL, NONE, capped
from ..device.rowsum import rowsum
from ..device.scalar import LOG2_E, NEG_INF, ONE, ZERO, quotient
from ..device.sections import heads_a_section
from ..device.tiles import shared_tile
from ..variant import Variant

NAMES = "bwd_v2_mma", "bwd_v2"
fit, nearest = partial(check, *NAMES), partial(nearest_tiles, *NAMES)


def build(problem, tile, device, **turned):
    a = chosen(problem, tile, device, **turned)
    d, Br, Bc, MI, MQ, SIDE = problem.d, tile.Br, tile.Bc, a.rows // 16, a.rows_dQ // 16, a.side
    ROWS, QUERIES, COLUMNS, ROWS_dQ, COLUMNS_dQ = a.rows, a.queries, a.columns, a.rows_dQ, a.columns_dQ
    NS, NW, NK, NQ = QUERIES // 8, QUERIES // 16, COLUMNS // 8, COLUMNS_dQ // 8
    PARTS, WIDE, ACROSS = Br // (SIDE * QUERIES), a.wide, a.wide // COLUMNS_dQ
    warps, columns = Warps(a.warps, problem.dtype), Columns(problem, MI, QUERIES)
    STAGES, ONCE, AHEAD, BUFFERS = a.stages, a.barriers == 1, 3 - a.barriers, 3 - a.barriers
    tile_K, tile_V, tile_Q, tile_dO, tile_dS, *tile_P = shared = a.shared(problem, tile)
    tile_P = tile_P[0] if tile_P else tile_dS
    where, copy_QdO, copy_KV = warps.where_lean(), warps.copy_lean(Br, d, a.wide), warps.copy_lean(Bc, d, a.wide)
    KQt = VdOt = warps.product_nt(MI, QUERIES, d)
    own, others = warps.product_at("rn", MI, COLUMNS, QUERIES), warps.product_at("nn", MI, COLUMNS, QUERIES)
    dSK = warps.product_at("tn", MQ, COLUMNS_dQ, Bc)
    clear_S, clear_dKV, clear_dQ = warps.fill(MI, QUERIES), warps.fill(MI, COLUMNS), warps.fill(MQ, COLUMNS_dQ)
    put_S, put_dKV, put_dQ = warps.put_words_at(MI, QUERIES), warps.put_at(MI, COLUMNS), warps.put_at(MQ, COLUMNS_dQ)
    KEYS, QUERIES_OUT = Bc // a.warps, -(-Br // a.warps)  # that a warp stores
    store_dKV, store_dQ, (tile_dQ,) = warps.store(KEYS, d), warps.store(QUERIES_OUT, d), Shared16(sdQ=(Br, WIDE))
    look, hide, weigh, slope = columns.look, columns.hide, columns.weigh, columns.slope
    score, all_arrived, first_arrived = capped(MI, QUERIES, problem.softcap > 0), wait_group(0), wait_group(AHEAD - 1)
    BANDED, SOFTCAP = problem.mask.banded, problem.softcap > 0
    STAGGERED = a.stagger and not BANDED
    EARLY = BANDED or not ONCE  # a warp finds its share once a step, or anew for each part: as ptxas spills nothing

    tile_L = shared_tile("sL", shared.bytes // 4, 1, STAGES * Br, 1)
    tile_D = shared_tile("sD", shared.bytes // 4 + STAGES * Br, 1, STAGES * Br, 1)

    @device_function
    def share(warp):
        """(w0, x, c0, q0, cq) of a warp: its keys begin at w0, it is the x-th of those that share them; its columns of
        dK and dV begin at c0, its rows of dQ at q0 and its columns at cq."""
        x = int32(warp % SIDE)
        q0, cq = int32(warp // ACROSS * ROWS_dQ), int32(warp % ACROSS * COLUMNS_dQ)
        return int32(warp // SIDE * ROWS), x, int32(x * COLUMNS), q0, cq

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

    @device_function
    def step(start, p, end):
        """The row block of step p; staggered, after the last comes the first, 0."""
        i = int32(start + p)
        return int32(i - end) if STAGGERED and i >= end else i

    def kernel(SCORED):
        @cuda.jit
        def bwd_v2_mma(Q, K, V, dO, L, D, dQ_acc, dK, dV, scale, softcap, unit, lo, hi, section):
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
            rdQ = cuda.local.array((MQ, NQ, 4), float32)
            clear_dKV(rdK)
            clear_dKV(rdV)

            first, end = 0, N_q
            if BANDED:
                first, end = max(0, j0 - hi), min(N_q, min(j0 + Bc, N_k) - lo)
            first, end = int32(first // Br), int32((end + Br - 1) // Br)
            steps, start = int32(max(0, end - first)), first
            if STAGGERED and steps > 0:
                _, start = quotient(int32(j0 // Br), steps)

            copy_KV(sK, 0, K[b, :, h_kv], j0, N_k, thread)  # line 7
            copy_KV(sV, 0, V[b, :, h_kv], j0, N_k, thread)
            commit_group()
            slot, buffer = int32(0), int32(0)  # of sQ, sdO, sL and sD, and of sdS and sP: first rows of this step's
            for g in range(group):
                h = int32(h_kv * group + g)
                bh = int32(b * Q.shape[2] + h)
                Qh, dOh, Lh, Dh, dQh = Q[b, :, h], dO[b, :, h], L[bh], D[bh], dQ_acc[bh]
                for p in range(AHEAD):
                    if p < steps:
                        load(sQ, sdO, sL, sD, after(slot, p), Qh, dOh, Lh, Dh, step(start, p, end), N_q, thread)
                    commit_group()
                if ONCE:
                    first_arrived()
                    cuda.syncthreads()
                for p in range(steps):  # line 8
                    i = step(start, p, end)
                    if EARLY:
                        w0, x, c0, q0, cq = share(here(warp))
                    if not ONCE:
                        all_arrived()
                        cuda.syncthreads()  # this step's Q and dO are here, and the step before is done
                        if p + 1 < steps:
                            load(sQ, sdO, sL, sD, after(slot, 1), Qh, dOh, Lh, Dh, step(start, p + 1, end), N_q, thread)
                        commit_group()

                    for part in range(PARTS):
                        if not EARLY:
                            w0, x, c0, q0, cq = share(here(warp))
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
                                again = int32(here(lane)) if SOFTCAP else lane  # what ptxas needs to spill nothing
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
                        if p + 2 < steps:
                            load(sQ, sdO, sL, sD, after(slot, 2), Qh, dOh, Lh, Dh, step(start, p + 2, end), N_q, thread)
                        commit_group()

                    # dV and dK of what the warps beside have computed
                    if not EARLY:
                        w0, x, c0, q0, cq = share(here(warp))
                    for part in range(PARTS):
                        for beside in range(1, SIDE):
                            r0 = int32((part * SIDE + (x + beside) % SIDE) * QUERIES)
                            others(rdV, sP, (buffer + w0, r0), sdO, (slot + r0, c0))
                            others(rdK, sdS, (buffer + w0, r0), sQ, (slot + r0, c0))

                    # dQ += dS K, line 15
                    clear_dQ(rdQ)
                    dSK(rdQ, sdS, (buffer, q0), sK, (0, cq))
                    to = int32(i * (Br * WIDE) + warp * (ROWS_dQ * COLUMNS_dQ) + 4 * lane)
                    for mi in range(MQ):
                        for n in range(NQ):
                            add_four(dQh, to + 128 * (mi * NQ + n), (
                                rdQ[mi, n, 0], rdQ[mi, n, 1], rdQ[mi, n, 2], rdQ[mi, n, 3]
                            ))  # fmt: skip
                    slot, buffer = after(slot, 1), int32(BUFFERS * Bc - Bc - buffer)

            all_arrived()
            cuda.syncthreads()  # sK and sV have been read: dK and dV leave through them
            w0, x, c0, q0, cq = share(warp)
            put_dKV(sK, (w0, c0), rdK, scale)
            put_dKV(sV, (w0, c0), rdV, ONE)
            cuda.syncthreads()
            r0 = int32(warp * KEYS)
            store_dKV(dK[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sK, r0, lane)  # line 18
            store_dKV(dV[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sV, r0, lane)

        return Launch(bwd_v2_mma, warps.threads, a.bytes(problem, tile), blocks=a.blocks, tile=tile)

    @cuda.jit
    def to_dtype(dQ_acc, dQ, scale):
        """dQ = scale · dQ_acc, in order and rounded: one row block of one head."""
        block, thread, warp, lane = where()
        N_q, H = int32(dQ.shape[1]), int32(dQ.shape[2])
        bh, i = quotient(block, int32((N_q + Br - 1) // Br))
        b, h = quotient(bh, H)
        w0, x, c0, q0, cq = share(warp)
        dQ_acc = dQ_acc[bh]
        sdQ = tile_dQ(cuda.shared.array(0, int16, 128))  # [Br, d]
        rdQ = cuda.local.array((MQ, NQ, 4), float32)
        start = int32(i * (Br * WIDE) + warp * (ROWS_dQ * COLUMNS_dQ) + 4 * lane)
        for mi in range(MQ):
            for n in range(NQ):
                at = start + 128 * (mi * NQ + n)
                rdQ[mi, n, 0], rdQ[mi, n, 1], rdQ[mi, n, 2], rdQ[mi, n, 3] = read_four(dQ_acc, at)
        put_dQ(sdQ, (q0, cq), rdQ, scale)
        cuda.syncthreads()
        r0 = int32(warp * QUERIES_OUT)
        store_dQ(dQ[b, :, h], i * Br + r0, min(i * Br + Br, N_q), sdQ, r0, lane)

    make = halves(problem, tile, a) if a.roles == 2 else kernel
    run_rowsum, plain, scored = rowsum(problem), make(False), make(True)
    run_to_dtype = Launch(to_dtype, warps.threads, 2 * Br * WIDE, tile=tile)

    def launch(problem, Q, K, V, mask, O, LSE, dO, dQ, dK, dV):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        heads, Tr, Tc = problem.B * problem.H, -(-problem.N_q // Br), -(-problem.N_k // Bc)
        run, unit = plain, problem.scale * float(LOG2_E)
        if problem.softcap > 0 or problem.scale <= 0:
            run, unit = scored, (problem.softcap or 1.0) * float(LOG2_E)
        section = heads_a_section(problem.B * problem.H_kv, 8 * problem.N_q * d * problem.group)
        L, D = scratch(heads, Tr * Br, like=Q), scratch(heads, Tr * Br, like=Q)
        dQ_acc, dO = zeros("dQ_acc", heads, Tr * Br * WIDE, like=Q), addressable(dO)
        run_rowsum(addressable(O), dO, LSE, L, D)
        run(
            Tc * problem.B * problem.H_kv, addressable(Q), addressable(K), addressable(V), dO, L, D, dQ_acc, dK, dV,
            problem.scale, problem.softcap, unit, lo, hi, min(section, problem.B * problem.H_kv),
        )  # fmt: skip
        run_to_dtype(Tr * heads, dQ_acc, dQ, problem.scale)

    return all_or_none(launch)


VARIANT = Variant(
    name="bwd_v2_mma",
    direction="bwd",
    generation="v2",
    loop_order="kv_outer",
    parent="bwd_v2",
    delta="on the tensor cores: Sᵀ and dPᵀ are a warp's accumulators, and Pᵀ and dSᵀ feed dV and dK from registers",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=build,
    deterministic=False,
    tiles=TILES,
    nearest=nearest,
    unit="tensor",
    pace=1e-6,
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join(["bwd_v2_mma", *(f"{switch}={value}" for switch, value in switches.items())])
    return replace(VARIANT, name=name, default=False, fit=partial(fit, **switches), build=partial(build, **switches))
