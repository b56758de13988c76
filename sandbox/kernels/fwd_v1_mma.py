"""FlashAttention-1, forward, on the tensor cores: K and V outside, Q inside.  [FA1, 2205.14135, Algorithm 1]

One block a head.  Its warps share the rows of a tile and divide its keys ("split-K", FA2 §3.3, Figure 3 left): maxima,
sums and parts of P̃ V meet in shared memory at every step (split_k.py).  Each step joins one tile to its row block: O, l
and m come from global memory, are rescaled so that O is normalised again, and go back.  Every tile is visited, whatever
the mask; a warp that sees nothing of one leaves out its products.

Instructions, copies ahead of their use, products and softmax are fwd_v2_mma's.  O travels in float32 (O_acc) until its
last visit, in the order in which lanes hold it: 16 bytes a lane, 512 a warp, read back by who wrote them.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from numba import cuda, float32, int16, int32, uint32

from ..device import Launch, device_function, scratch
from ..device.launch import addressable
from ..device.mma import Shared16, Warps
from ..device.ptx import commit_group, wait_group
from ..device.rows import ALL, NONE, Rows, rescale
from ..device.scalar import LN_2, LOG2_E, LOWEST, NEG_INF, ONE, ZERO, divide, log2, quotient
from ..device.split_k import SplitK
from ..device.tiles import put_quad, quad
from ..variant import Infeasible, Tile, Unsupported, Variant

TILES = (
    *(Tile(Br, 32) for Br in (16, 32)),  # where a GPU is simulated: two warps
    *(Tile(Br, Bc) for Br in (32, 64, 128) for Bc in (64, 128)),
)
REGISTERS, HELD, BESIDE = 192, 80, 40  # of a thread: for its tiles at most, for O of them, and beside them


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one.

    stages  tiles of K and of V that are on their way or in use: 1 or 2
    rows    of O that are added up at a time: 16 or 32
    blocks  that are to share a multiprocessor, as far as registers go
    """

    stages: int = 2
    rows: int = 32
    blocks: int = 1


def warps_of(d: int, Bc: int) -> int:
    """Four where each has 16 keys and 16 columns, else two."""
    return 4 if Bc % 64 == 0 and d % 64 == 0 else 2


def registers(problem, tile, s) -> int:
    """That a thread needs for S [Br, Bc / W], a part of O [rows, 16 W], O [Br, d / W], and four numbers of Br rows."""
    W, MI = warps_of(problem.d, tile.Bc), tile.Br // 16
    return MI * (tile.Bc + problem.d) // (2 * W) + s.rows // 2 * W + 8 * MI


def held(problem, tile) -> int:
    """Registers of O, which is there from the beginning of a step to its end."""
    return tile.Br * problem.d // (32 * warps_of(problem.d, tile.Bc))


def chosen(problem, tile, device, **turned) -> Switches:
    """The switches that are used: 32 rows a round where registers allow; up to three blocks a multiprocessor, as
    registers and shared memory allow; those `turned` as they are there."""
    s = replace(Switches(), **turned)
    if "rows" not in turned and (tile.Br % 32 or registers(problem, tile, s) > REGISTERS):
        s = replace(s, rows=16)
    if "stages" not in turned and shared_bytes(problem, tile, s) > device.shared:
        s = replace(s, stages=1)
    if "blocks" not in turned:
        need = registers(problem, tile, s) + BESIDE + BESIDE // 2 * (problem.softcap > 0)
        fits = 65_536 // (need * 32 * warps_of(problem.d, tile.Bc)), device.shared // shared_bytes(problem, tile, s)
        s = replace(s, blocks=max(1, min(3, *fits)))
    return s


def shared_bytes(problem, tile, s) -> int:
    warps, together, shared = parts(problem, tile, s)
    return shared.bytes + together.bytes + 4 * (2 * warps.count + 2) * tile.Br


def parts(problem, tile, s):
    """(the warps, what they do together, the 16-bit tiles)."""
    warps = Warps(warps_of(problem.d, tile.Bc), problem.dtype)
    together = SplitK(warps, tile.Br // 16, s.rows // 16, tile.Bc // warps.count, problem.d)
    keys = s.stages * tile.Bc
    return warps, together, Shared16(sQ=(2 * tile.Br, problem.d), sK=(keys, problem.d), sV=(keys, problem.d))


def fit(problem, tile, device, **turned):
    if problem.dtype == "fp32":
        raise Unsupported("fwd_v1_mma takes fp16 and bf16, not fp32: fwd_v1 takes fp32")
    if problem.mask.boolean:
        raise Unsupported("fwd_v1_mma has no boolean masks: fwd_v1 has them")
    if problem.d % 32:
        raise Unsupported(f"fwd_v1_mma takes head_dim in multiples of 32, not {problem.d}: fwd_v1 takes any")
    if device.capability[0] < 9:
        major, minor = device.capability
        raise Unsupported(f"fwd_v1_mma needs sm_90 (stmatrix), this is sm_{major}{minor}: fwd_v1 runs here")
    W = warps_of(problem.d, tile.Bc)
    if tile.Br % 16 or tile.Br > 32 * W or tile.Bc not in (16 * W, 32 * W):
        raise Infeasible(
            tile, f"needs a multiple of 16 rows, {32 * W} at most, and {16 * W} or {32 * W} keys, 16 or 32 a warp"
        )
    s = chosen(problem, tile, device, **turned)
    if tile.Br % s.rows:
        raise Infeasible(tile, f"needs a multiple of {s.rows} rows")
    if (need := registers(problem, tile, s)) > REGISTERS:
        raise Infeasible(tile, f"needs {need} registers a thread for its tiles, there are {REGISTERS}")
    if (need := held(problem, tile)) > HELD:
        raise Infeasible(tile, f"needs {need} registers a thread for O, there are {HELD}")
    if (need := shared_bytes(problem, tile, s)) > device.shared:
        raise Infeasible(tile, f"needs {need:,} B of shared memory, a block has {device.shared:,} B")


def usual(problem, device) -> Tile:
    """128 keys, since O passes through memory for every block of keys: 1.6 times as fast as 64 on an H200 at d = 64
    (64 rows) and d = 128 (32 rows); where they fit twice, and registers for rounds of 32 rows, without a softcap."""
    tile = Tile(16, 32)
    if not device.simulated:
        tile = next(tile for tile in (Tile(64, 64), Tile(32, 64), Tile(16, 64)) if held(problem, tile) <= HELD)
        for longer in (Tile(32, 128), Tile(64, 128)):
            with suppress(Infeasible):
                fit(problem, longer, device)
                if chosen(problem, longer, device) == Switches() and problem.softcap == 0:
                    tile = longer
    fit(problem, tile, device)
    return tile


def build(problem, tile, device, **turned):
    s = chosen(problem, tile, device, **turned)
    warps, together, shared = parts(problem, tile, s)
    d, Br, Bc, MI, STAGES, W = problem.d, tile.Br, tile.Bc, tile.Br // 16, s.stages, warps.count
    KEYS, COLUMNS, PARTS = Bc // W, d // W, together.PARTS  # of S and of O that are a warp's
    NI, NO, KI = KEYS // 8, COLUMNS // 8, KEYS // 16
    rows = Rows(problem, MI, KEYS, lazy=False)
    tile_Q, tile_K, tile_V = shared
    tile_X = together.tile(shared.bytes)
    where, copy_Q, copy_KV = warps.where(), warps.copy(Br, d), warps.copy(Bc, d)
    QKt, PV_of_all = warps.product_nt(MI, KEYS, d), together.product(scaled=True)
    clear_S, clear_O, rescale_O = warps.fill(MI, KEYS), warps.fill(MI, COLUMNS), rescale(MI, COLUMNS)
    tell, largest, total, put_O, store_O = (
        together.tell(), together.largest(), together.total(), together.put(), warps.store(Br // W, d)
    )  # fmt: skip
    look, hide, score, tops, follow, weights = rows.look, rows.hide, rows.score, rows.tops, rows.follow, rows.weights
    row_sum, arrived = rows.row_sum, wait_group(0)

    @device_function
    def load_O_acc(rO, O_acc, place, i0, N_q, lane):
        """A quad is four columns of one row of O; `place` is this warp's row of O_acc."""
        for mi in range(MI):
            for h in range(2):
                seen = i0 + 16 * mi + 8 * h + lane // 4 < N_q
                for p in range(PARTS):
                    x0, x1, x2, x3 = ZERO, ZERO, ZERO, ZERO
                    if seen:
                        x0, x1, x2, x3 = quad(O_acc, place, 128 * ((2 * mi + h) * PARTS + p) + 4 * lane)
                    rO[mi, 2 * p, 2 * h], rO[mi, 2 * p, 2 * h + 1] = x0, x1
                    rO[mi, 2 * p + 1, 2 * h], rO[mi, 2 * p + 1, 2 * h + 1] = x2, x3

    @device_function
    def store_O_acc(O_acc, place, rO, i0, N_q, lane):
        for mi in range(MI):
            for h in range(2):
                if i0 + 16 * mi + 8 * h + lane // 4 < N_q:
                    for p in range(PARTS):
                        put_quad(
                            O_acc, place, 128 * ((2 * mi + h) * PARTS + p) + 4 * lane, rO[mi, 2 * p, 2 * h],
                            rO[mi, 2 * p, 2 * h + 1], rO[mi, 2 * p + 1, 2 * h], rO[mi, 2 * p + 1, 2 * h + 1],
                        )  # fmt: skip

    def kernel(SCORED):
        @cuda.jit
        def fwd_v1_mma(Q, K, V, O, O_acc, l, m, LSE, scale, softcap, unit, lo, hi):
            block, thread, warp, lane = where()
            N_q, N_k, H = int32(Q.shape[1]), int32(K.shape[1]), int32(Q.shape[2])
            Tr, Tc = int32((N_q + Br - 1) // Br), int32(max(1, (N_k + Bc - 1) // Bc))  # no keys: one visit writes O
            b, h = quotient(block, H)
            group, _ = quotient(H, int32(K.shape[2]))
            h_kv, _ = quotient(h, group)
            Qh, Kh, Vh, Oh = Q[b, :, h], K[b, :, h_kv], V[b, :, h_kv], O[b, :, h]  # [N, d]

            smem, smem_X = cuda.shared.array(0, int16, 128), cuda.shared.array(0, float32, 128)
            sQ = tile_Q(smem)  # 2 x [Br, d]
            sK = tile_K(smem)  # STAGES x [Bc, d]
            sV = tile_V(smem)
            sX = tile_X(smem_X)  # parts of P̃ V
            stop = cuda.shared.array((W, Br), float32)  # what each warp tells the others of each row: its maximum
            ssum = cuda.shared.array((W, Br), float32)  # and its sum
            sl = cuda.shared.array(Br, float32)
            sm = cuda.shared.array(Br, float32)
            rS = cuda.local.array((MI, NI, 4), float32)  # S  [Br, KEYS]
            rw = cuda.local.array((MI, 1, 4), uint32)  # P̃, 16 keys of it
            rP = cuda.local.array((MI, KI, 4), uint32)  # P̃
            rO = cuda.local.array((MI, NO, 4), float32)  # O  [Br, COLUMNS]
            rm = cuda.local.array((MI, 2), float32)
            rl = cuda.local.array((MI, 2), float32)
            rsum = cuda.local.array((MI, 2), float32)  # l̃, of the tile
            ralpha = cuda.local.array((MI, 2), float32)
            rinverse = cuda.local.array((MI, 2), float32)
            rtop = cuda.local.array((MI, 2), float32)

            copy_Q(sQ, 0, Qh, 0, N_q, thread)
            copy_KV(sK, 0, Kh, 0, N_k, thread)
            copy_KV(sV, 0, Vh, 0, N_k, thread)
            commit_group()
            at, slot = 0, 0  # the slots of Q, and of K and V
            for j in range(Tc):  # line 5
                j0 = j * Bc
                for i in range(Tr):  # line 7
                    i0 = i * Br
                    arrived()
                    cuda.syncthreads()  # this step's tiles are here; the step before has been computed
                    if STAGES == 1 and i == 0 and j > 0:  # line 6
                        copy_KV(sK, 0, Kh, j0, N_k, thread)
                        copy_KV(sV, 0, Vh, j0, N_k, thread)
                        commit_group()
                        arrived()
                        cuda.syncthreads()
                    if STAGES == 2 and i == 0 and j + 1 < Tc:
                        copy_KV(sK, (1 - slot) * Bc, Kh, j0 + Bc, N_k, thread)
                        copy_KV(sV, (1 - slot) * Bc, Vh, j0 + Bc, N_k, thread)
                    if i + 1 < Tr or j + 1 < Tc:
                        copy_Q(sQ, (1 - at) * Br, Qh, (i + 1) * Br if i + 1 < Tr else 0, N_q, thread)
                    commit_group()

                    place = (block * Tr + i) * W + warp  # of this warp's O_acc
                    l_old, m_old = ZERO, LOWEST
                    if j > 0:  # line 8
                        if thread < Br and i0 + thread < N_q:
                            l_old, m_old = l[block, i0 + thread], m[block, i0 + thread]
                        load_O_acc(rO, O_acc, place, i0, N_q, lane)
                    else:
                        clear_O(rO)

                    # S = Q Kᵀ  [Br, KEYS]   line 9
                    mine = warp * KEYS  # the warp's first key of the block
                    seen = look(i0, j0 + mine, N_q, N_k, lo, hi)
                    clear_S(rS)
                    if seen != NONE:
                        QKt(rS, sQ, at * Br, sK, slot * Bc + mine)
                    if SCORED:
                        score(rS, scale, softcap)
                    if seen != ALL:
                        hide(rS, i0, j0 + mine, N_k, lo, hi, lane)

                    # m̃, m_new; alpha = exp(m - m_new)   lines 10-11
                    tops(rtop, rS)
                    tell(stop, rtop, warp, lane)
                    if thread < Br:
                        sl[thread], sm[thread] = l_old, m_old
                    cuda.syncthreads()
                    largest(rtop, stop, lane)
                    for mi in range(MI):
                        for g in range(2):
                            rl[mi, g] = sl[16 * mi + 8 * g + lane // 4]
                            rm[mi, g] = sm[16 * mi + 8 * g + lane // 4]
                            rsum[mi, g] = ZERO
                    follow(rtop, rm, rl, ralpha, unit)

                    # P̃ = exp(S - m_new), l̃, l_new   lines 10-11
                    for k in range(KI):
                        weights(rw, rS, k, rm, rsum, unit)
                        for mi in range(MI):
                            for e in range(4):
                                rP[mi, k, e] = rw[mi, 0, e]
                    for mi in range(MI):
                        for g in range(2):
                            rsum[mi, g] = row_sum(rsum[mi, g])
                    tell(ssum, rsum, warp, lane)
                    cuda.syncthreads()
                    total(rsum, ssum, lane)
                    for mi in range(MI):
                        for g in range(2):
                            l_new = rl[mi, g] + rsum[mi, g]
                            ralpha[mi, g] = divide(rl[mi, g], l_new) if l_new != ZERO else ZERO
                            rinverse[mi, g] = divide(ONE, l_new) if l_new != ZERO else ZERO
                            if warp == 0 and lane % 4 == 0:
                                sl[16 * mi + 8 * g + lane // 4] = l_new
                                sm[16 * mi + 8 * g + lane // 4] = rm[mi, g]

                    # O = diag(l_new)⁻¹ (diag(l) alpha O + Σ over the warps of P̃ V)  [Br, d]   line 12
                    rescale_O(rO, ralpha)
                    PV_of_all(rO, rP, sV, slot * Bc + mine, rinverse, sX, seen != NONE, warp, lane)
                    if j + 1 < Tc:
                        store_O_acc(O_acc, place, rO, i0, N_q, lane)
                    else:
                        put_O(sQ, at * Br, rO, warp)  # these rows of Q have been read
                        cuda.syncthreads()
                        store_O(Oh, i0 + warp * (Br // W), N_q, sQ, at * Br + warp * (Br // W), lane)

                    if thread < Br and i0 + thread < N_q:  # line 13
                        l_new, m_new = sl[thread], sm[thread]
                        l[block, i0 + thread], m[block, i0 + thread] = l_new, m_new
                        if j + 1 == Tc:
                            LSE[b, h, i0 + thread] = (m_new + log2(l_new)) * LN_2 if l_new != ZERO else NEG_INF
                    at = 1 - at
                slot = slot + 1 if slot + 1 < STAGES else 0
            arrived()

        return Launch(fwd_v1_mma, warps.threads, shared.bytes + together.bytes, blocks=s.blocks, tile=tile)

    plain, scored = kernel(False), kernel(True)

    def launch(problem, Q, K, V, mask, O, LSE):
        lo, hi = problem.mask.band(problem.N_q, problem.N_k)
        B, N_q, H, _ = Q.shape
        run, unit = plain, problem.scale * float(LOG2_E)
        if problem.softcap > 0 or problem.scale <= 0:
            run, unit = scored, float(LOG2_E)
        O_acc = scratch(B * H * -(-N_q // Br) * W, 2 * MI * PARTS * 128, like=Q)
        l, m = scratch(B * H, N_q, like=Q), scratch(B * H, N_q, like=Q)
        heads = B * H if N_q else 0  # without rows there is nothing to do
        run(
            heads, addressable(Q), addressable(K), addressable(V), O, O_acc, l, m, LSE,
            problem.scale, problem.softcap, unit, lo, hi,
        )  # fmt: skip

    return launch


VARIANT = Variant(
    name="fwd_v1_mma",
    direction="fwd",
    generation="v1",
    loop_order="kv_outer",
    parent="fwd_v1",
    delta="on the tensor cores, with fwd_v2_mma's instructions, copies and softmax; its warps divide a tile's keys",
    dtypes=("fp16", "bf16"),
    one_block_a_head=True,
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
