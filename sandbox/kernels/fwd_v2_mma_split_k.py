"""fwd_v2_mma with FlashAttention-1's partition of the work between warps: split-K.  [FA2, 2307.08691, §3.3, Figure 3]

The warps of a block share its Br rows of Q and divide the keys of each block of K and V: a warp scores its Bc / W keys
against all rows.  So no warp knows a row's maximum, nor P̃ V, by itself.  As FlashAttention-1 does at every step, each
writes what it has to shared memory, waits for the others, and adds up all parts of some columns of O (split_k.py).
The sums l meet once, at the end, as O is normalised there: that is FlashAttention-2's, and not the partition's.

All else is fwd_v2_mma: grid, order, copies, masks, softmax.  A warp reads less of K and V from shared memory, Q and the
parts of O many times as often.
"""

from dataclasses import dataclass, replace
from functools import partial

from numba import cuda, float32, int16, int32, uint32

from ..device import Launch
from ..device.launch import addressable
from ..device.mma import Shared16, Warps
from ..device.ptx import commit_group, wait_group
from ..device.rows import ALL, NONE, Rows, rescale
from ..device.scalar import LN_2, LOG2_E, LOWEST, NEG_INF, ONE, ZERO, divide, log2, quotient
from ..device.sections import heads_a_section
from ..device.split_k import SplitK
from ..variant import Infeasible, Tile, Unsupported, Variant

TILES = (
    *(Tile(Br, 32) for Br in (16, 32)),  # where a GPU is simulated: two warps
    *(Tile(Br, Bc) for Br in (32, 64, 128) for Bc in (64, 128)),
)
REGISTERS, ROOMY, BESIDE = 192, 184, 40  # of a thread: for its tiles at most, with rounds of 32 rows, and beside
HELD = 80  # of a thread, for O: what `usual` takes at most


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one.

    stages  tiles of K and of V that are on their way or in use
    rows    of O that are added up at a time: 16 or 32
    blocks  that are to share a multiprocessor, as far as registers go
    lazy    O is rescaled only where a row's maximum has grown a lot
    """

    stages: int = 2
    rows: int = 32
    blocks: int = 1
    lazy: bool = True


def warps_of(d: int, Bc: int) -> int:
    """Four where each has 16 keys and 16 columns, else two."""
    return 4 if Bc % 64 == 0 and d % 64 == 0 else 2


def registers(problem, tile, s) -> int:
    """That a thread needs for S [Br, Bc / W], a part of O [rows, 16 W], O [Br, d / W], and three numbers of Br rows."""
    W, MI = warps_of(problem.d, tile.Bc), tile.Br // 16
    return MI * (tile.Bc + problem.d) // (2 * W) + s.rows // 2 * W + 6 * MI


def chosen(problem, tile, device, **turned) -> Switches:
    """The switches that are used: 32 rows a round where registers allow; up to three blocks a multiprocessor, as
    registers and shared memory allow; those `turned` as they are there."""
    s = replace(Switches(), **turned)
    if "rows" not in turned and (tile.Br % 32 or registers(problem, tile, s) > ROOMY):
        s = replace(s, rows=16)
    if "blocks" not in turned:
        need = registers(problem, tile, s) + BESIDE + BESIDE // 2 * (problem.softcap > 0)
        fits = 65_536 // (need * 32 * warps_of(problem.d, tile.Bc)), device.shared // shared_bytes(problem, tile, s)
        s = replace(s, blocks=max(1, min(3, *fits)))
    return s


def shared_bytes(problem, tile, s) -> int:
    warps, together, shared = parts(problem, tile, s)
    return shared.bytes + together.bytes + 4 * warps.count * tile.Br


def parts(problem, tile, s):
    """(the warps, what they do together, the 16-bit tiles)."""
    warps = Warps(warps_of(problem.d, tile.Bc), problem.dtype)
    together = SplitK(warps, tile.Br // 16, s.rows // 16, tile.Bc // warps.count, problem.d)
    keys = s.stages * tile.Bc
    return warps, together, Shared16(sQ=(tile.Br, problem.d), sK=(keys, problem.d), sV=(keys, problem.d))


def fit(problem, tile, device, **turned):
    if problem.dtype == "fp32":
        raise Unsupported("fwd_v2_mma_split_k takes fp16 and bf16, not fp32: fwd_v2 takes fp32")
    if problem.mask.boolean:
        raise Unsupported("fwd_v2_mma_split_k has no boolean masks: fwd_v2 has them")
    if problem.d % 32:
        raise Unsupported(f"fwd_v2_mma_split_k takes head_dim in multiples of 32, not {problem.d}: fwd_v2 takes any")
    if device.capability[0] < 9:
        major, minor = device.capability
        raise Unsupported(f"fwd_v2_mma_split_k needs sm_90 (stmatrix), this is sm_{major}{minor}: fwd_v2 runs here")
    s, W = chosen(problem, tile, device, **turned), warps_of(problem.d, tile.Bc)
    if tile.Br % s.rows or tile.Bc not in (16 * W, 32 * W):
        raise Infeasible(tile, f"needs a multiple of {s.rows} rows, and {16 * W} or {32 * W} keys, 16 or 32 a warp")
    if (need := registers(problem, tile, s)) > REGISTERS:
        raise Infeasible(tile, f"needs {need} registers a thread for its tiles, there are {REGISTERS}")
    if (need := shared_bytes(problem, tile, s)) > device.shared:
        raise Infeasible(tile, f"needs {need:,} B of shared memory, a block has {device.shared:,} B")


def usual(problem, device) -> Tile:
    tile = Tile(16, 32)
    if not device.simulated:
        W = warps_of(problem.d, 64)
        tile = next(Tile(Br, 64) for Br in (64, 32, 16) if Br * problem.d <= 32 * W * HELD)
    fit(problem, tile, device)
    return tile


def build(problem, tile, device, **turned):
    s = chosen(problem, tile, device, **turned)
    warps, together, shared = parts(problem, tile, s)
    d, Br, Bc, MI, STAGES, W = problem.d, tile.Br, tile.Bc, tile.Br // 16, s.stages, warps.count
    KEYS, COLUMNS = Bc // W, d // W  # of S and of O that are a warp's
    NI, NO, KI = KEYS // 8, COLUMNS // 8, KEYS // 16
    rows = Rows(problem, MI, KEYS, s.lazy)
    tile_Q, tile_K, tile_V = shared
    tile_X = together.tile(shared.bytes)
    where, copy_Q, copy_KV = warps.where(), warps.copy(Br, d), warps.copy(Bc, d)
    QKt, PV_of_all = warps.product_nt(MI, KEYS, d), together.product(scaled=False)
    clear_S, clear_O, rescale_O = warps.fill(MI, KEYS), warps.fill(MI, COLUMNS), rescale(MI, COLUMNS)
    tell, largest, total, put_O, store_O = (
        together.tell(), together.largest(), together.total(), together.put(), warps.store(Br // W, d)
    )  # fmt: skip
    look, hide, score, weights = rows.look, rows.hide, rows.score, rows.weights
    tops, above, follow = rows.tops, rows.above, rows.follow
    row_sum, arrived, all_arrived = rows.row_sum, wait_group(STAGES - 2), wait_group(0)
    BANDED = problem.mask.banded

    def kernel(SCORED):
        @cuda.jit
        def fwd_v2_mma_split_k(Q, K, V, O, LSE, scale, softcap, unit, lo, hi, section):
            block, thread, warp, lane = where()
            N_q, N_k, H = int32(Q.shape[1]), int32(K.shape[1]), int32(Q.shape[2])
            # The last rows, which see most under a causal mask, come first; heads in sections, for L2
            Tr = int32((N_q + Br - 1) // Br)
            part, place = quotient(block, int32(section * Tr))
            i, bh = quotient(place, int32(min(section, Q.shape[0] * H - part * section)))
            b, h = quotient(int32(part * section + bh), H)
            group, _ = quotient(H, int32(K.shape[2]))
            h_kv, _ = quotient(h, group)
            i0 = int32((Tr - 1 - i) * Br)
            Qh, Kh, Vh, Oh = Q[b, :, h], K[b, :, h_kv], V[b, :, h_kv], O[b, :, h]  # [N, d]

            smem, smem_X = cuda.shared.array(0, int16, 128), cuda.shared.array(0, float32, 128)
            sQ = tile_Q(smem)  # [Br, d]
            sK = tile_K(smem)  # STAGES x [Bc, d]
            sV = tile_V(smem)
            sX = tile_X(smem_X)  # parts of O
            sx = cuda.shared.array((W, Br), float32)  # what each warp tells the others of each row
            rS = cuda.local.array((MI, NI, 4), float32)  # S  [Br, KEYS]
            rw = cuda.local.array((MI, 1, 4), uint32)  # P̃, 16 keys of it
            rP = cuda.local.array((MI, KI, 4), uint32)  # P̃
            rO = cuda.local.array((MI, NO, 4), float32)  # O  [Br, COLUMNS]
            rm = cuda.local.array((MI, 2), float32)
            rl = cuda.local.array((MI, 2), float32)  # of the warp's keys
            ralpha = cuda.local.array((MI, 2), float32)
            rtop = cuda.local.array((MI, 2), float32)
            clear_O(rO)
            for mi in range(MI):
                for g in range(2):
                    rm[mi, g], rl[mi, g] = LOWEST, ZERO

            first, end = 0, N_k
            if BANDED:
                first, end = max(0, i0 + lo), min(N_k, min(i0 + Br, N_q) + hi)
            first, end = int32(first // Bc), int32((end + Bc - 1) // Bc)
            steps = int32(end - first)

            # Step p works on key block end - 1 - p, in slot p % STAGES
            copy_Q(sQ, 0, Qh, i0, N_q, thread)
            for p in range(STAGES - 1):
                if p < steps:
                    copy_KV(sK, p * Bc, Kh, (end - 1 - p) * Bc, N_k, thread)
                    copy_KV(sV, p * Bc, Vh, (end - 1 - p) * Bc, N_k, thread)
                commit_group()
            slot, free = 0, STAGES - 1
            for p in range(steps):
                arrived()
                cuda.syncthreads()  # this step's K and V are here; those of the step before have been read
                j = end - 1 - p
                if j - (STAGES - 1) >= first:
                    copy_KV(sK, free * Bc, Kh, (j - (STAGES - 1)) * Bc, N_k, thread)
                    copy_KV(sV, free * Bc, Vh, (j - (STAGES - 1)) * Bc, N_k, thread)
                commit_group()

                # S = Q Kᵀ  [Br, KEYS]
                mine = warp * KEYS  # the warp's first key of the block
                seen = look(i0, j * Bc + mine, N_q, N_k, lo, hi)
                clear_S(rS)
                if seen != NONE:
                    QKt(rS, sQ, 0, sK, slot * Bc + mine)
                if SCORED:
                    score(rS, scale, softcap)
                if seen != ALL:
                    hide(rS, i0, j * Bc + mine, N_k, lo, hi, lane)

                # m, of all keys; O = diag(exp(m_old - m)) O
                tops(rtop, rS)
                tell(sx, rtop, warp, lane)
                cuda.syncthreads()
                largest(rtop, sx, lane)
                if above(rtop, rm, unit):
                    follow(rtop, rm, rl, ralpha, unit)
                    rescale_O(rO, ralpha)

                # l, P̃ = exp(S - m), O += Σ over the warps of P̃ V  [Br, d]
                for k in range(KI):
                    weights(rw, rS, k, rm, rl, unit)
                    for mi in range(MI):
                        for e in range(4):
                            rP[mi, k, e] = rw[mi, 0, e]
                PV_of_all(rO, rP, sV, slot * Bc + mine, ralpha, sX, seen != NONE, warp, lane)
                free, slot = slot, (slot + 1 if slot + 1 < STAGES else 0)

            # O = diag(l)⁻¹ O,  LSE = m + log l
            all_arrived()
            cuda.syncthreads()
            for mi in range(MI):
                for g in range(2):
                    rl[mi, g] = row_sum(rl[mi, g])
            tell(sx, rl, warp, lane)
            cuda.syncthreads()
            total(rl, sx, lane)
            for mi in range(MI):
                for g in range(2):
                    row, l = i0 + 16 * mi + 8 * g + lane // 4, rl[mi, g]
                    if lane % 4 == 0 and warp == 0 and row < N_q:
                        LSE[b, h, row] = (rm[mi, g] + log2(l)) * LN_2 if l != ZERO else NEG_INF
                    ralpha[mi, g] = divide(ONE, l) if l != ZERO else ZERO
            rescale_O(rO, ralpha)
            put_O(sQ, 0, rO, warp)
            cuda.syncthreads()
            store_O(Oh, i0 + warp * (Br // W), N_q, sQ, warp * (Br // W), lane)

        return Launch(fwd_v2_mma_split_k, warps.threads, shared.bytes + together.bytes, blocks=s.blocks, tile=tile)

    plain, scored = kernel(False), kernel(True)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        heads = problem.B * problem.H
        run, unit = plain, problem.scale * float(LOG2_E)
        if problem.softcap > 0 or problem.scale <= 0:
            run, unit = scored, float(LOG2_E)
        section = problem.group * heads_a_section(problem.B * problem.H_kv, 4 * problem.N_k * d)
        run(
            -(-problem.N_q // Br) * heads, addressable(Q), addressable(K), addressable(V), O, LSE,
            problem.scale, problem.softcap, unit, lo, hi, section,
        )  # fmt: skip

    return launch


VARIANT = Variant(
    name="fwd_v2_mma_split_k",
    direction="fwd",
    generation="v2",
    loop_order="q_outer",
    parent="fwd_v2_mma",
    delta="v1's warps: they share rows and divide keys; maxima and parts of P̃ V meet in shared memory at every step",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=build,
    tiles=TILES,
    usual=usual,
    unit="tensor",
    pace=1e-6,
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join([VARIANT.name, *(f"{switch}={value}" for switch, value in switches.items())])
    return replace(VARIANT, name=name, default=False, fit=partial(fit, **switches), build=partial(build, **switches))
