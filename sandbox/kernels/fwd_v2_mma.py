"""FlashAttention-2, forward, on the tensor cores, in Python.  [FA2, 2307.08691, Algorithm 1, §3.3]

A block of warps owns Br rows of Q, each warp 16 or 32 of them, with their O, m and l in its registers, and all keys: no
warp waits for what another has computed ("split-Q").  With 32 rows, what is read of K and V from shared memory is used
twice: shared memory, not the tensor cores, is what limits a kernel of 16.  P̃ never leaves the registers, since the
accumulators of S are the left operand of P̃ V as they are.  K and V of the next steps are on their way meanwhile.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial

from numba import cuda, float32, int16, int32, uint32

from ..device import Launch, device_function
from ..device.estimate import Pace, lines, nearest, registers, steps_along_keys
from ..device.launch import addressable
from ..device.mma import Shared16, Warps
from ..device.ptx import commit_group, named_any, named_barrier, wait_group
from ..device.rows import ALL, NONE, Rows, rescale, scale_and_unit
from ..device.scalar import LN_2, LOWEST, NEG_INF, ONE, ZERO, divide, log2, quotient
from ..device.sections import heads_a_section
from ..device.softmax import ALL_LANES
from ..variant import Infeasible, Tile, Unsupported, Variant

TILES = (
    *(Tile(Br, Bc) for Br in (16, 32) for Bc in (16, 32)),  # where a GPU is simulated, or nearly idle
    *(Tile(Br, Bc) for Br in (64, 128, 192, 256) for Bc in (32, 64, 96, 128)),
)
REGISTERS, BESIDE = 192, 40  # of a thread: for its tiles at most, and beside them


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one.

    rows    of a warp: 16 or 32
    blocks  that are to share a multiprocessor, as far as registers go
    lazy    O is rescaled only where a row's maximum has grown a lot
    late    the next K and V are asked for after S = Q Kᵀ, beside its last products
    pairs   two warps share rows: each scores half of the keys and owns half of O's columns, and P̃ goes through shared
            memory, where 16 rows a warp would read all of K and V for few products (d > 128)
    """

    rows: int = 32
    blocks: int = 1
    lazy: bool = True
    late: bool = False
    pairs: bool = False

    def registers(self, d: int, Bc: int) -> int:
        """That a thread needs for S [rows, Bc] and O [rows, d]; half of it in a pair."""
        return self.rows // 16 * (Bc + d) // 2 // (1 + self.pairs)

    def warps(self, Br: int) -> int:
        return Br // self.rows * (1 + self.pairs)


def chosen(problem, tile, device, **turned) -> Switches:
    """The switches that are used: 32 rows a warp where registers allow, else 32 of a pair, else 16, and 16 in a block
    of few rows; up to three blocks a multiprocessor, as registers allow; late for d > 64, where a sweep on an
    H200 found it faster, but not with a softcap, where it spills; those `turned` as they are there."""
    d, Br, Bc = problem.d, tile.Br, tile.Bc
    s = replace(Switches(late=d > 64 and not problem.softcap), **turned)
    if "pairs" not in turned and s.rows == 32 and Br % 32 == Bc % 32 == d % 32 == 0:
        paired = replace(s, pairs=True)
        s = paired if s.registers(d, Bc) > REGISTERS >= paired.registers(d, Bc) else s
    if "rows" not in turned and (Br % 32 or Br <= 64 and d <= 128 or s.registers(d, Bc) > REGISTERS):
        s = replace(s, rows=16)
    if "blocks" not in turned:
        need = s.registers(d, Bc) + BESIDE + BESIDE // 2 * (problem.softcap > 0)
        s = replace(s, blocks=max(1, min(3, 65_536 // (need * 32 * max(1, s.warps(Br))))))
    return s


def shared_tiles(problem, tile, switches) -> Shared16:
    P = {"sP": (tile.Br, tile.Bc)} if switches.pairs else {}
    return Shared16(sQ=(tile.Br, problem.d), sK=(2 * tile.Bc, problem.d), sV=(2 * tile.Bc, problem.d), **P)


def fit(problem, tile, device, **turned):
    if problem.dtype == "fp32":
        raise Unsupported("fwd_v2_mma takes fp16 and bf16, not fp32: fwd_v2 takes fp32")
    if problem.mask.boolean:
        raise Unsupported("fwd_v2_mma has no boolean masks: fwd_v2 has them")
    if problem.d % 16:
        raise Unsupported(f"fwd_v2_mma takes head_dim in multiples of 16, not {problem.d}: fwd_v2 takes any")
    if device.capability[0] < 9:
        major, minor = device.capability
        raise Unsupported(f"fwd_v2_mma needs sm_90 (stmatrix), this is sm_{major}{minor}: fwd_v2 runs here")
    s = chosen(problem, tile, device, **turned)
    keys = 32 if s.pairs else 16
    if tile.Br % s.rows or tile.Bc % keys:
        raise Infeasible(tile, f"needs a multiple of {s.rows} rows, a warp's, and of {keys} keys")
    if s.pairs and problem.d % 32:
        raise Infeasible(tile, "pairs of warps need head_dim in multiples of 32")
    if (need := s.registers(problem.d, tile.Bc)) > REGISTERS:
        raise Infeasible(tile, f"needs {need} registers a thread for its tiles, there are {REGISTERS}")
    if (threads := 32 * s.warps(tile.Br)) > 256:
        raise Infeasible(tile, f"has {threads} threads: more than 256 have too few registers each")
    if (need := shared_tiles(problem, tile, s).bytes + 8 * tile.Br * s.pairs) > device.shared:
        raise Infeasible(tile, f"needs {need:,} B of shared memory, a block has {device.shared:,} B")


def nearest_tiles(problem, device, most) -> list[Tile]:
    """The tiles of the least estimated time, of those that leave registers to spare: ptxas has others spill.

    With a softcap, not measured: 128 rows and 64 keys, or 64 rows where blocks of 128 would leave half of the GPU idle.
    """
    heads, estimated = problem.B * problem.H, problem.softcap == 0 and not device.simulated
    if estimated and (known := paces(problem.kind, device)):
        steps = {tile: steps_along_keys(problem, tile) for tile in known}
        return nearest(steps, known, heads, section_of(problem), device, most)
    few = 2 * heads * -(-problem.N_q // 128) <= device.sms
    tile = Tile(16, 16) if device.simulated else Tile(64, 64) if few else Tile(128, 64)
    fit(problem, tile, device)
    return [tile]


@cache
def paces(problem, device) -> dict[Tile, Pace]:
    """Of the tiles that fit, leave 60 registers a thread beside S and O (56 where a step has 32 keys, 40 where d < 64),
    and for wide heads give each quarter of a multiprocessor as many warps; without the largest, which were the best at
    one shape of 74, and without 32 keys a step for d <= 64 or 256 rows, the best at none and slower than estimated."""
    found, spilling = {}, [Tile(128, 64)] * (problem.d == 48 and problem.mask.banded)
    for tile in TILES:
        s, d = chosen(problem, tile, device), problem.d
        warps, beside = s.warps(tile.Br), 40 if d < 64 else 56 if tile.Bc == 32 else 60
        with suppress(Infeasible):
            fit(problem, tile, device)
            roomy = registers(warps, s.blocks) - s.registers(d, tile.Bc) >= beside and tile not in spilling
            small = tile.Br * tile.Bc <= (12_288 if d < 64 else 24_576) and tile != Tile(256, 32)
            even = warps % 4 == 0 or warps > 4 and d < 128
            if roomy and small and even and (tile.Bc > 32 or d > 64):
                found[tile] = pace(problem, tile, device)
    return found


def pace(problem, tile, device) -> Pace:
    """Fitted to all tiles at 74 shapes on an H200, in bf16: d 32 to 256, N 512 to 16 Ki, 4 to 160 heads."""
    s, d, Br, Bc = chosen(problem, tile, device), problem.d, tile.Br, tile.Bc
    products, reads, scores = s.rows * Bc * d, Bc * d, s.rows * Bc
    busy = 63 + 392 * s.pairs + (0.00366 * products + 0.0635 * reads + 0.192 * scores) / (1 + s.pairs)
    blocks = (device.shared + 1024) // (shared_tiles(problem, tile, s).bytes + 1024)
    edges, copies = 630 + 0.343 * Br * d + 3060 * s.pairs, 1.12 * 2 * lines(Bc, d, s.warps(Br))
    return Pace(s.warps(Br), max(1, min(s.blocks, blocks)), busy, 275, edges, copies)


def section_of(problem) -> int:
    """How many heads are worked on at a time."""
    return problem.group * heads_a_section(problem.B * problem.H_kv, 4 * problem.N_k * problem.d)


def build(problem, tile, device, **turned):
    s = chosen(problem, tile, device, **turned)
    d, Bc, MI = problem.d, tile.Bc, s.rows // 16
    ROWS, Br, PAIRS, SHARE = s.rows, tile.Br, s.pairs, 1 + s.pairs
    KEYS, COLUMNS = Bc // SHARE, d // SHARE  # of S and of O that are a warp's
    NI, NO = KEYS // 8, COLUMNS // 8
    warps, rows = Warps(s.warps(Br), problem.dtype), Rows(problem, MI, KEYS, s.lazy)
    tile_Q, tile_K, tile_V, *tile_P = shared = shared_tiles(problem, tile, s)
    (tile_P,) = tile_P or (tile_Q,)
    where, copy_Q, copy_KV = warps.where(), warps.copy(Br, d), warps.copy(Bc, d)
    QKt, PV = warps.product_nt(MI, KEYS, d), warps.product_rn(MI, d, 16)
    clear_S, clear_O = warps.fill(MI, KEYS), warps.fill(MI, COLUMNS)
    rescale_O, put_O, store_O = rescale(MI, COLUMNS), warps.put_part(MI, COLUMNS), warps.store(ROWS // SHARE, d)
    PV_shared, put_P = warps.product_nn_part(MI, COLUMNS, Bc), warps.put_words(MI)
    meet, meet_any = named_barrier(64), named_any(64)
    scale_Q, SOFTCAP = warps.scale_part(MI, COLUMNS), problem.softcap > 0
    look, hide, score, rises = rows.look, rows.hide, rows.score, rows.rises
    tops, follow, weights = rows.tops, rows.follow, rows.weights
    row_sum, arrived, BANDED, LATE = rows.row_sum, wait_group(0), problem.mask.banded, s.late

    @device_function
    def exchange(ry, rx, sx, warp, lane):
        """ry = the other warp's rx, each a number a row."""
        g = warp // 2 * ROWS + lane // 4
        if lane % 4 == 0:
            for mi in range(MI):
                for h in range(2):
                    sx[warp % 2, g + 16 * mi + 8 * h] = rx[mi, h]
        meet(1 + warp // 2)
        for mi in range(MI):
            for h in range(2):
                ry[mi, h] = sx[1 - warp % 2, g + 16 * mi + 8 * h]

    @cuda.jit
    def fwd_v2_mma(Q, K, V, O, LSE, scale, softcap, unit, lo, hi, section):
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
        w0, side = int32(warp // SHARE * ROWS), int32(warp % SHARE)  # its rows, and which keys and columns of them
        Qh, Kh, Vh, Oh = Q[b, :, h], K[b, :, h_kv], V[b, :, h_kv], O[b, :, h]  # [N, d]

        smem = cuda.shared.array(0, int16, 128)
        sQ = tile_Q(smem)  # [Br, d]
        sK = tile_K(smem)  # 2 x [Bc, d]
        sV = tile_V(smem)
        sP = tile_P(smem)  # [Br, Bc], of pairs
        sx = cuda.shared.array((2, Br), float32)  # what pairs tell each other of each row
        rS = cuda.local.array((MI, NI, 4), float32)  # S  [rows, Bc]
        rP = cuda.local.array((MI, 1, 4), uint32)  # P̃, 16 keys of it
        rO = cuda.local.array((MI, NO, 4), float32)  # O  [rows, d]
        rm = cuda.local.array((MI, 2), float32)
        rl = cuda.local.array((MI, 2), float32)
        ralpha = cuda.local.array((MI, 2), float32)
        rtop = cuda.local.array((MI, 2), float32)
        rx = cuda.local.array((MI, 2), float32)  # of the other warp
        clear_O(rO)
        for mi in range(MI):
            for g in range(2):
                rm[mi, g], rl[mi, g] = LOWEST, ZERO

        first, end = 0, N_k
        if BANDED:
            first, end = max(0, i0 + lo), min(N_k, min(i0 + Br, N_q) + hi)
        first, end = int32(first // Bc), int32((end + Bc - 1) // Bc)
        steps = int32(end - first)

        copy_Q(sQ, 0, Qh, i0, N_q, thread)
        here, there = int32(0), int32(Bc)  # rows of sK and of sV: of this step's block, of the next one's
        if steps > 0:
            copy_KV(sK, here, Kh, int32((end - 1) * Bc), N_k, thread)
            copy_KV(sV, here, Vh, int32((end - 1) * Bc), N_k, thread)
        commit_group()
        if not SOFTCAP and scale != ONE:  # -1 or 0, of a scale that is not above 0
            arrived()
            cuda.syncthreads()
            scale_Q(sQ, w0, int32(side * COLUMNS), scale)
        for step in range(steps):
            arrived()
            cuda.syncthreads()  # this step's K and V are here; those of the step before have been read
            j0 = int32((end - 1 - step) * Bc)
            n0, n1 = int32(max(j0 - Bc, 0)), int32(N_k if j0 > first * Bc else 0)  # the next step's keys, if any
            if not LATE:
                if n1 > 0:
                    copy_KV(sK, there, Kh, n0, n1, thread)
                    copy_KV(sV, there, Vh, n0, n1, thread)
                commit_group()

            j0 = int32(j0 + side * KEYS)  # the warp's first key
            seen = look(int32(i0 + w0), j0, N_q, N_k, lo, hi)
            if seen != NONE or PAIRS:
                # S = Q Kᵀ  [rows, Bc]
                clear_S(rS)
                QKt(rS, sQ, w0, sK, int32(here + side * KEYS))
                if LATE:
                    copy_KV(sK, there, Kh, n0, n1, thread)
                    copy_KV(sV, there, Vh, n0, n1, thread)
                if SOFTCAP:
                    score(rS, scale, softcap)
                if seen != ALL:
                    hide(rS, int32(i0 + w0), j0, N_k, lo, hi, lane)

                # m, O = diag(exp(m_old - m)) O
                rise = rises(rS, rm, unit)
                if meet_any(1 + warp // 2, rise) if PAIRS else cuda.any_sync(ALL_LANES, rise):
                    tops(rtop, rS)
                    if PAIRS:
                        exchange(rx, rtop, sx, warp, lane)
                        for mi in range(MI):
                            for g in range(2):
                                rtop[mi, g] = max(rtop[mi, g], rx[mi, g])
                    follow(rtop, rm, rl, ralpha, unit)
                    rescale_O(rO, ralpha)

                # l, P̃ = exp(S - m), O += P̃ V  [rows, d], by 16 keys: products go on beside exponentials
                for k in range(KEYS // 16):
                    weights(rP, rS, k, rm, rl, unit)
                    if PAIRS:
                        put_P(sP, w0, side * KEYS + 16 * k, rP)
                    else:
                        PV(rO, rP, 0, sV, int32(here + 16 * k))
                if PAIRS:
                    meet(1 + warp // 2)
                    PV_shared(rO, sP, w0, sV, here, int32(side * COLUMNS))
            elif LATE:
                copy_KV(sK, there, Kh, n0, n1, thread)
                copy_KV(sV, there, Vh, n0, n1, thread)
            if LATE:
                commit_group()
            here, there = there, here

        arrived()  # without keys nobody has waited for Q, and O leaves through its tile
        cuda.syncthreads()

        # O = diag(l)⁻¹ O,  LSE = m + log l
        for mi in range(MI):
            for g in range(2):
                rl[mi, g] = row_sum(rl[mi, g])
        if PAIRS:
            cuda.syncthreads()
            exchange(rx, rl, sx, warp, lane)
        for mi in range(MI):
            for g in range(2):
                row = i0 + w0 + 16 * mi + 8 * g + lane // 4
                l = rl[mi, g] + rx[mi, g] if PAIRS else rl[mi, g]
                if lane % 4 == 0 and side == 0 and row < N_q:
                    LSE[b, h, row] = (rm[mi, g] + log2(l)) * LN_2 if l != ZERO else NEG_INF
                ralpha[mi, g] = divide(ONE, l) if l != ZERO else ZERO
        rescale_O(rO, ralpha)
        put_O(sQ, w0, side * COLUMNS, rO)  # nobody else reads these rows of Q
        if PAIRS:
            cuda.syncthreads()
        cuda.syncwarp()
        mine = w0 + side * (ROWS // SHARE)
        store_O(Oh, i0 + mine, N_q, sQ, mine, lane)

    run = Launch(fwd_v2_mma, warps.threads, shared.bytes, blocks=s.blocks, tile=tile)

    def launch(problem, Q, K, V, mask, O, LSE):
        most, (lo, hi) = problem.N_q + problem.N_k, problem.mask.band(problem.N_q, problem.N_k)
        scale, unit = scale_and_unit(problem)
        run(
            -(-problem.N_q // Br) * problem.B * problem.H, addressable(Q), addressable(K), addressable(V), O, LSE,
            scale, problem.softcap, unit, max(lo, -most), min(hi, most), section_of(problem),
        )  # fmt: skip

    return launch


VARIANT = Variant(
    name="fwd_v2_mma",
    direction="fwd",
    generation="v2",
    loop_order="q_outer",
    parent="fwd_v2",
    delta="on the tensor cores: S and O are a warp's accumulators, and P̃ stays in its registers",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=build,
    tiles=TILES,
    nearest=nearest_tiles,
    unit="tensor",
    pace=1e-6,
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join(["fwd_v2_mma", *(f"{switch}={value}" for switch, value in switches.items())])
    return replace(VARIANT, name=name, default=False, fit=partial(fit, **switches), build=partial(build, **switches))
