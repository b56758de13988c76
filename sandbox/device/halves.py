"""Halves: half of a block's warps form S and P and sum dV, the others form dP and dS and sum dK.  [FA2, Algorithm 2]

Where dK and dV of 32 keys are too many registers for a warp (d > 128), warps that share keys, each with S and dP of its
own, have 16 queries each.  Here a warp has 32 of one of the two: each operand that it reads serves twice as many
products, and it sums only one of dV and dK.  P goes from the first half to the second by way of shared memory.

Neither half waits for the other but where it needs something of it: the second for P, the first for dS before it adds
to dQ, and for Q and dO, which the second half copies.  So the first is ahead by the second's part of dQ, and while one
half is busy with exp or with dS, the other has products to form.

That is also enough for every tile to be read before it is written again.  P is written when dS of the step before has
been taken: by then both have read P.  dS is written when P of its step has been taken: by then both have added to
dQ.  And then a row block is copied to where that of the step before was: by then both have left it.
"""

from __future__ import annotations

from numba import cuda, float32, int16, int32, uint32

from . import Launch, device_function
from .columns import Columns
from .layout import Layout
from .mma import Shared16, Warps
from .ptx import (
    add_four,
    commit_group,
    copy_four,
    here,
    ldmatrix,
    ldmatrix_trans_right,
    named_give,
    named_take,
    wait_group,
)
from .rows import ALL, NONE, capped
from .scalar import NEG_INF, ONE, ZERO, quotient
from .tiles import shared_tile

STAGES = 2
# What is handed over is the name of its barrier.  Warps of one half meet at AMONG + role, parts of P have one each
DS, COPIES, AMONG, P = 1, 2, 3, 5


def halves(problem, tile, a: Layout):
    """kernel(scored), a Launch, of (Q, K, V, dO, L, D, dQ_acc, dK, dV, scale, softcap, unit, lo, hi, section)."""
    d, Br, Bc, MI, MQ, SIDE, HALF = problem.d, tile.Br, tile.Bc, a.rows // 16, a.rows_dQ // 16, a.side, a.warps // 2
    ROWS, QUERIES, COLUMNS, ROWS_dQ, COLUMNS_dQ, PIECE = a.rows, a.queries, a.columns, a.rows_dQ, a.columns_dQ, a.piece
    NS, NW, NK, NQ, NP, NA = QUERIES // 8, QUERIES // 16, COLUMNS // 8, COLUMNS_dQ // 8, PIECE // 8, Bc // 16
    PARTS, ACROSS, PIECES, HELD = Br // (SIDE * QUERIES), d // COLUMNS_dQ, COLUMNS_dQ // PIECE, PIECE < COLUMNS_dQ
    warps, half, columns = Warps(a.warps, problem.dtype), Warps(HALF, problem.dtype), Columns(problem, MI, QUERIES)
    BANDED, SOFTCAP = problem.mask.banded, problem.softcap > 0
    STAGGERED, KEYS, THREADS = a.stagger and not BANDED, Bc // a.warps, half.threads
    W = dict(sW=(Bc, Br)) if SOFTCAP else {}
    shared = Shared16(sKV=(2 * Bc, d), sQdO=(2 * STAGES * Br, d), sPdS=(2 * Bc, Br), **W)
    tile_KV, tile_QdO, tile_PdS, *tile_W = shared
    (tile_W,) = tile_W or [tile_PdS]
    # Half a block at a time, in a loop: that is what ptxas needs in order to spill nothing
    where, copy_QdO, copy_KV = warps.where_lean(), half.copy_lean(Br // 2, d, d), warps.copy_lean(Bc, d, d)
    product = warps.product_nt(MI, QUERIES, d)
    own, others = warps.product_at("rn", MI, COLUMNS, QUERIES), warps.product_at("nn", MI, COLUMNS, QUERIES)
    dSK = warps.product_at("rn" if HELD else "tn", MQ, PIECE, Bc)
    clear_S, clear_dX, clear_dQ = warps.fill(MI, QUERIES), warps.fill(MI, COLUMNS), warps.fill(MQ, PIECE)
    put_S, put_dX, store = warps.put_words_at(MI, QUERIES), warps.put_at(MI, COLUMNS), warps.store(KEYS, d)
    look, hide, weigh, slope = columns.look, columns.hide, columns.weigh, columns.slope
    score, all_arrived = capped(MI, QUERIES, SOFTCAP), wait_group(0)
    give, take, take_among = named_give(warps.threads), named_take(warps.threads), named_take(half.threads)

    tile_L = shared_tile("sL", shared.bytes // 4, 1, STAGES * Br, 1)
    tile_D = shared_tile("sD", shared.bytes // 4 + STAGES * Br, 1, STAGES * Br, 1)

    @device_function
    def share(warp):
        """(role, w0, x, c0, q0, cq) of a warp: 0 or 1, the half it is of; its keys begin at w0, it is the x-th of those
        of its half that share them; its columns of dV or dK begin at c0, its rows of dQ at q0 and its columns at cq."""
        role, w = int32(warp // HALF), int32(warp % HALF)
        x, q0, cq = int32(w % SIDE), int32(warp // ACROSS * ROWS_dQ), int32(warp % ACROSS * COLUMNS_dQ)
        return role, int32(w // SIDE * ROWS), x, int32(x * COLUMNS), q0, cq

    @device_function
    def load(sQdO, sL, sD, slot, Q, dO, L, D, b, h, i, N_q, thread):
        """Row block i of Q, dO, L and D of a head is on its way to a slot, by the second half (line 9)."""
        thread = int32(here(thread) & (THREADS - 1))
        b, h = int32(here(b) & 0x7FFFFFFF), int32(here(h) & 0x7FFFFFFF)  # so addresses take no registers meanwhile
        bh = int32(b * Q.shape[2] + h)
        for r in range(0, Br, Br // 2):
            copy_QdO(sQdO, slot + r, Q[b, :, h], i * Br + r, N_q, thread)
            copy_QdO(sQdO, STAGES * Br + slot + r, dO[b, :, h], i * Br + r, N_q, thread)
        if thread < Br // 4:
            copy_four(sL, slot + 4 * thread, L[bh], i * Br + 4 * thread)
            copy_four(sD, slot + 4 * thread, D[bh], i * Br + 4 * thread)

    @device_function
    def after(i, end):
        """The row block of the next step; staggered, after the last comes the first, 0."""
        i += 1
        return int32(0) if STAGGERED and i == end else int32(i)

    def kernel(SCORED):
        @cuda.jit
        def halves(Q, K, V, dO, L, D, dQ_acc, dK, dV, scale, softcap, unit, lo, hi, section):
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
            sKV = tile_KV(smem)  # [Bc, d] of K, then of V
            sQdO = tile_QdO(smem)  # STAGES x [Br, d] of Q, then of dO
            sPdS = tile_PdS(smem)  # Pᵀ [Bc, Br], then dSᵀ
            sW = tile_W(smem)  # Pᵀ times the slope of the softcap; else Pᵀ
            floats = cuda.shared.array(0, float32, 128)  # the same memory
            sL = tile_L(floats)  # STAGES x [Br]
            sD = tile_D(floats)
            rS = cuda.local.array((MI, NS, 4), float32)  # Sᵀ or dPᵀ  [rows, queries]
            rX = cuda.local.array((MI, NW, 4), uint32)  # Pᵀ or dSᵀ in words
            rW = cuda.local.array((MI, NW, 4), uint32)
            rdX = cuda.local.array((MI, NK, 4), float32)  # dV or dK  [rows, columns]
            rdS = cuda.local.array((MQ, NA, 4), uint32)  # dS of the warp's rows of dQ
            rdQ = cuda.local.array((MQ, NP, 4), float32)
            clear_dX(rdX)

            first, end = 0, N_q
            if BANDED:
                first, end = max(0, j0 - hi), min(N_q, min(j0 + Bc, N_k) - lo)
            first, end = int32(first // Br), int32((end + Br - 1) // Br)
            steps, start = int32(max(0, end - first)), first
            if STAGGERED and steps > 0:
                _, start = quotient(int32(j0 // Br), steps)

            copy_KV(sKV, 0, K[b, :, h_kv], j0, N_k, thread)  # line 7
            copy_KV(sKV, Bc, V[b, :, h_kv], j0, N_k, thread)
            commit_group()
            slot = int32(0)  # of sQdO, sL and sD: first row of this step's
            for g in range(group):
                h = int32(h_kv * group + g)
                if steps > 0 and thread >= THREADS:
                    load(sQdO, sL, sD, slot, Q, dO, L, D, b, h, start, N_q, thread)
                commit_group()
                all_arrived()
                cuda.syncthreads()
                i, left = start, steps
                while left > 0:  # line 8
                    role, w0, x, c0, q0, cq = share(here(warp))
                    for part in range(PARTS):
                        r0 = int32((part * SIDE + x) * QUERIES)  # the warp's queries in the tile
                        over = int32(role * (STAGES * Br) + slot)  # of Q for S = K Qᵀ, or of dO for dP = V dOᵀ
                        right = int32((1 - role) * (STAGES * Br) + slot)  # of dO for dV += Pᵀ dO, or of Q for dK
                        seen = look(int32(j0 + w0), int32(i * Br + r0), N_q, N_k, lo, hi)
                        if seen != NONE:
                            # Sᵀ = K Qᵀ or dPᵀ = V dOᵀ;  P = exp(S - LSE)    lines 10, 11, 13
                            clear_S(rS)
                            product(rS, sKV, role * Bc + w0, sQdO, over + r0)
                            if role == 0:
                                if SCORED:
                                    score(rS, scale, softcap)
                                if seen != ALL:
                                    hide(rS, NEG_INF, j0 + w0, i * Br + r0, N_k, lo, hi, lane)
                                weigh(rX, rW, rS, sL, slot + r0, lane, unit)
                        else:
                            for mi in range(MI):
                                for n in range(NW):
                                    for e in range(4):
                                        rX[mi, n, e] = rW[mi, n, e] = uint32(0)
                        if role == 0:
                            put_S(sPdS, (w0, r0), rX)
                            if SOFTCAP:
                                put_S(sW, (w0, r0), rW)
                        give(P + part, role == 0)
                        take(P + part, role == 1)
                        if part == 0:
                            if role == 1 and left > 1:
                                load(sQdO, sL, sD, int32(Br - slot), Q, dO, L, D, b, h, after(i, end), N_q, thread)
                            commit_group()
                        if role == 1:
                            if seen != NONE:
                                # dS = P ∘ (dP - D)    line 14
                                if seen != ALL:
                                    hide(rS, ZERO, j0 + w0, i * Br + r0, N_k, lo, hi, lane)
                                for mi in range(MI):
                                    for n in range(NW):
                                        word = ldmatrix(sW, w0 + 16 * mi, r0 + 16 * n)
                                        rW[mi, n, 0], rW[mi, n, 1], rW[mi, n, 2], rW[mi, n, 3] = word
                                slope(rX, rW, rS, sD, slot + r0, lane)
                            put_S(sPdS, (Bc + w0, r0), rX)
                        if part == PARTS - 1:
                            give(DS, role == 1)
                        if seen != NONE:
                            own(rdX, rX, (0, 0), sQdO, (right + r0, c0))  # dV += Pᵀ dO or dK += dSᵀ Q, lines 12, 16

                    # dV or dK of what the warps beside have computed
                    role, w0, x, c0, q0, cq = share(here(warp))
                    right = int32((1 - role) * (STAGES * Br) + slot)
                    take_among(AMONG + role, True)
                    for part in range(PARTS):
                        for beside in range(1, SIDE):
                            r0 = int32((part * SIDE + (x + beside) % SIDE) * QUERIES)
                            others(rdX, sPdS, (role * Bc + w0, r0), sQdO, (right + r0, c0))
                    if left > 1:
                        all_arrived()
                        give(COPIES, role == 1)
                    take(DS, role == 0)

                    # dQ += dS K, line 15
                    dQh = dQ_acc[int32(here(int32(b * Q.shape[2] + h)) & 0x7FFFFFFF)]
                    to = int32(i * (Br * d) + warp * (ROWS_dQ * COLUMNS_dQ) + 4 * lane)
                    if HELD:
                        for mi in range(MQ):
                            for n in range(NA):
                                word = ldmatrix_trans_right(sPdS, Bc + 16 * n, q0 + 16 * mi)
                                rdS[mi, n, 0], rdS[mi, n, 1], rdS[mi, n, 2], rdS[mi, n, 3] = word
                    for piece in range(PIECES):
                        clear_dQ(rdQ)
                        if HELD:
                            dSK(rdQ, rdS, (0, 0), sKV, (0, cq + piece * PIECE))
                        else:
                            dSK(rdQ, sPdS, (Bc, q0), sKV, (0, cq))
                        for mi in range(MQ):
                            for n in range(NP):
                                add_four(dQh, to + 128 * (mi * NQ + piece * NP + n), (
                                    rdQ[mi, n, 0], rdQ[mi, n, 1], rdQ[mi, n, 2], rdQ[mi, n, 3]
                                ))  # fmt: skip
                    if left > 1:
                        take(COPIES, role == 0)
                        take_among(AMONG + 1, role == 1)
                    i, left, slot = after(i, end), int32(left - 1), int32(Br - slot)

            all_arrived()
            cuda.syncthreads()  # sKV has been read: dK and dV leave through it
            role, w0, x, c0, q0, cq = share(warp)
            put_dX(sKV, (role * Bc + w0, c0), rdX, scale if role == 1 else ONE)
            cuda.syncthreads()
            r0 = int32(warp * KEYS)
            store(dV[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sKV, r0, lane)  # line 18
            store(dK[b, :, h_kv], j0 + r0, min(j0 + Bc, N_k), sKV, Bc + r0, lane)

        return Launch(halves, warps.threads, a.bytes(problem, tile), blocks=a.blocks, tile=tile)

    return kernel
