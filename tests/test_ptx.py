"""The tensor cores' instructions, each alone, on the simulator or a GPU: which lane holds what; and products of tiles.

The layouts are written down once more here, number by number, from the PTX manual.
"""

from __future__ import annotations

import os

import pytest
import torch
from sass import disassembled, nvdisasm

from sandbox import target  # first: it chooses GPU or simulator before numba is imported
from sandbox.device import Launch, ptx
from sandbox.device.mma import MMA, Shared16, Warps
from sandbox.device.scalar import as_float, as_int
from sandbox.device.tiles import shared_tile
from sandbox.problem import DTYPES

from numba import cuda, float32, int16, int32, uint32  # isort: skip

simulated = pytest.mark.skipif(target.KIND != "simulator", reason="these are tests of the simulator")
LANES = range(32)


def on_device(x):
    return x.to(target.torch_device())


def bits(*shape):
    """Numbers that are all different, as fp16."""
    return on_device(torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.int16).view(torch.float16).view(shape))


def halves(words) -> torch.Tensor:
    """int32 [lanes, words] -> the two 16-bit numbers of each, int16 [lanes, words, 2]."""
    return words.cpu().view(torch.int16).view(*words.shape, 2)


def own(lane: int, word: int) -> list[tuple[int, int]]:
    """(row, column) of the two numbers of a word of a 16 x 16 block."""
    row, column = lane // 4 + 8 * (word % 2), lane % 4 * 2 + 8 * (word // 2)
    return [(row, column), (row, column + 1)]


ORDER = {  # which word of the block, or of its transpose, is the n-th that an instruction gives
    "ldmatrix": (0, 1, 2, 3), "ldmatrix_right": (0, 2, 1, 3),
    "ldmatrix_trans": (0, 2, 1, 3), "ldmatrix_trans_right": (0, 1, 2, 3),
    "stmatrix": (0, 1, 2, 3), "stmatrix_trans": (0, 2, 1, 3),
}  # fmt: skip


def words_of(block: torch.Tensor, name: str) -> torch.Tensor:
    """int16 [32, 4, 2]: what the instruction gives each lane of this block [16, 16]."""
    block = block.cpu().view(torch.int16)
    block = block.T if "trans" in name else block
    return torch.stack([
        torch.stack([torch.stack([block[place] for place in own(lane, word)]) for word in ORDER[name]])
        for lane in LANES
    ])  # fmt: skip


# ---- what lies where ------------------------------------------------------------------------------------------------


def loading(name: str, rows: int, d: int, row: int, column: int):
    """kernel(X, Y): X [rows, d] to a tile, and the words of its block at (row, column) to Y [32, 4]."""
    load, copy, where = getattr(ptx, name), Warps(1, "fp16").copy(rows, d), Warps(1, "fp16").where()
    (tile_X,) = shared = Shared16(sX=(rows, d))
    commit, arrived = ptx.commit_group, ptx.wait_group(0)

    @cuda.jit
    def kernel(X, Y):
        _, thread, _, lane = where()
        sX = tile_X(cuda.shared.array(0, int16, 128))
        copy(sX, 0, X, 0, rows, thread)
        commit()
        arrived()
        cuda.syncthreads()
        w0, w1, w2, w3 = load(sX, row, column)
        Y[lane, 0], Y[lane, 1], Y[lane, 2], Y[lane, 3] = int32(w0), int32(w1), int32(w2), int32(w3)

    return Launch(kernel, 32, shared.bytes)


@pytest.mark.parametrize("d", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("name", [name for name in ORDER if name.startswith("ld")])
def test_ldmatrix(name, d):
    for row, column in {(0, 0), (16, d - 16), (8, d // 32 * 16)}:
        X, Y = bits(32, d), on_device(torch.zeros(32, 4, dtype=torch.int32))
        loading(name, 32, d, row, column)(1, X, Y)
        assert torch.equal(halves(Y), words_of(X[row : row + 16, column : column + 16], name)), (row, column)


@pytest.mark.parametrize("d", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("name", ["stmatrix", "stmatrix_trans"])
def test_stmatrix(name, d):
    """Words to every block of a tile, and its rows to global memory by 16 bytes."""
    store, warps = getattr(ptx, name), Warps(1, "fp16")
    store_rows, where = warps.store(16, d), warps.where()
    (tile_X,) = shared = Shared16(sX=(16, d))
    BLOCKS = d // 16

    @cuda.jit
    def kernel(X, Y):
        _, _, _, lane = where()
        sX = tile_X(cuda.shared.array(0, int16, 128))
        for n in range(BLOCKS):
            store(sX, 0, 16 * n, (
                uint32(Y[n, lane, 0]), uint32(Y[n, lane, 1]), uint32(Y[n, lane, 2]), uint32(Y[n, lane, 3])
            ))  # fmt: skip
        cuda.syncwarp()
        store_rows(X, 0, 16, sX, 0, lane)

    expected, X = bits(16, d), on_device(torch.full((16, d), torch.nan, dtype=torch.float16))
    blocks = [words_of(expected[:, n : n + 16], name).view(torch.int32).squeeze(-1) for n in range(0, d, 16)]
    Launch(kernel, 32, shared.bytes)(1, X, on_device(torch.stack(blocks)))
    assert torch.equal(X.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_mma(dtype):
    """C + A·B of small integers, which is exact in any order."""
    mma, _ = MMA[dtype]

    @cuda.jit
    def kernel(A, B, C):
        lane = cuda.threadIdx.x
        D = mma(
            (uint32(A[lane, 0]), uint32(A[lane, 1]), uint32(A[lane, 2]), uint32(A[lane, 3])),
            (uint32(B[lane, 0]), uint32(B[lane, 1])), (C[lane, 0], C[lane, 1], C[lane, 2], C[lane, 3]),
        )  # fmt: skip
        for e in range(4):
            C[lane, e] = D[e]

    random = torch.Generator().manual_seed(0)
    A, B, C = (torch.randint(-9, 9, shape, generator=random).float() for shape in ((16, 16), (16, 8), (16, 8)))
    places = [[(lane // 4 + 8 * (e // 2), lane % 4 * 2 + e % 2) for e in range(4)] for lane in LANES]

    def accumulator(x):
        return torch.stack([torch.stack([x[place] for place in four]) for four in places])

    words_A = words_of(A.to(DTYPES[dtype]), "ldmatrix").view(torch.int32).squeeze(-1)
    # word r of B: rows 2t + 8r and the next one of column g
    words_B = torch.stack([
        torch.stack([torch.stack([B[lane % 4 * 2 + 8 * r + e, lane // 4] for e in (0, 1)]) for r in (0, 1)])
        for lane in LANES
    ]).to(DTYPES[dtype]).view(torch.int32).squeeze(-1)  # fmt: skip
    given = on_device(accumulator(C))
    Launch(kernel, 32)(1, on_device(words_A), on_device(words_B), given)
    assert torch.equal(given.cpu(), accumulator(C + A @ B))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_pack(dtype):
    """Two float32 to a word, rounded as torch does: to nearest even, NaN, infinities, ties, subnormals."""
    _, pack = MMA[dtype]

    @cuda.jit
    def kernel(X, Y):
        lane = cuda.threadIdx.x
        Y[lane] = int32(pack(X[lane, 0], X[lane, 1]))

    edges = [0.0, -0.0, 1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 65519.0, 65520.0, 3e38]
    edges += [-7e4, torch.inf, -torch.inf, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-40]
    X = torch.cat([torch.tensor(edges), torch.randn(64 - len(edges), generator=torch.Generator().manual_seed(1))])
    Y = on_device(torch.zeros(32, dtype=torch.int32))
    Launch(kernel, 32)(1, on_device(X.view(32, 2)), Y)
    assert torch.equal(Y.cpu().view(torch.int16), X.to(DTYPES[dtype]).view(torch.int16))


def test_fma_rounds_once():
    fma = ptx.fma

    @cuda.jit
    def kernel(X, Y):
        Y[0] = fma(X[0], X[1], X[2])

    x, Y = 1 + 2**-20, on_device(torch.zeros(1))
    Launch(kernel, 1)(1, on_device(torch.tensor([x, x, -1 - 2**-19])), Y)
    assert Y.item() == 2**-40


@pytest.mark.parametrize("named", [[], [5], [40], [63, 70]])
def test_any_of_a_pair_of_warps(named):
    """On a GPU warps 0 and 1, and 2 and 3, ask each other alone; the simulator's block is one group."""
    met, where = ptx.named_any(64), Warps(4, "fp16").where()

    @cuda.jit
    def kernel(X, Y):
        _, thread, warp, _ = where()
        Y[thread] = int32(1) if met(1 + warp // 2, X[thread] > 0) else int32(0)

    X, Y = torch.zeros(128, dtype=torch.int32), on_device(torch.full((128,), 7, dtype=torch.int32))
    X[named] = 1
    Launch(kernel, 128)(1, on_device(X), Y)
    group = 128 if target.KIND == "simulator" else 64
    expected = X.view(-1, group).amax(1, keepdim=True).expand(-1, group).flatten()
    assert torch.equal(Y.cpu(), expected)


def test_one_half_gives_and_the_other_takes():
    """The first two warps write and go on, the others wait and read; then the other way round, by another name."""
    give, take, where = ptx.named_give(128), ptx.named_take(128), Warps(4, "fp16").where()

    @cuda.jit
    def kernel(X, Y):
        _, thread, warp, _ = where()
        sX = cuda.shared.array(128, int32)
        for name in range(1, 3):
            mine = (warp < 2) == (name == 1)
            if mine:
                sX[thread] = X[thread]
            give(name, mine)
            take(name, not mine)
            if not mine:
                Y[thread] = sX[127 - thread]

    X, Y = torch.arange(128, dtype=torch.int32), on_device(torch.full((128,), -1, dtype=torch.int32))
    Launch(kernel, 128)(1, on_device(X), Y)
    assert torch.equal(Y.cpu(), X.flip(0))


def test_floats_as_integers_and_back():
    @cuda.jit
    def kernel(X, Y, Z):
        lane = cuda.threadIdx.x
        Y[lane] = as_int(X[lane])
        Z[lane] = as_float(Y[lane])

    X = torch.tensor([0.0, -0.0, 1.5, -1.5, torch.inf, -torch.inf, 1e-40, torch.nan])
    Y, Z = on_device(torch.zeros(8, dtype=torch.int32)), on_device(torch.zeros(8))
    Launch(kernel, 8)(1, on_device(X), Y, Z)
    assert torch.equal(Y.cpu(), X.view(torch.int32)) and torch.equal(Z.cpu().view(torch.int32), X.view(torch.int32))


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n0, end", [(0, 32), (5, 32), (5, 20), (31, 32), (32, 32), (40, 32)])
def test_a_copy_takes_zeros_past_the_end(n0, end):
    warps = Warps(2, "fp16")
    copy, store, where, commit, arrived = warps.copy(16, 48), warps.store(16, 48), warps.where(), *COPIES
    (tile_X,) = shared = Shared16(sX=(32, 48))

    @cuda.jit
    def kernel(X, Y, n0, end):
        _, thread, warp, lane = where()
        sX = tile_X(cuda.shared.array(0, int16, 128))
        copy(sX, 16, X, n0, end, thread)
        commit()
        arrived()
        cuda.syncthreads()
        if warp == 1:
            store(Y, 0, 16, sX, 16, lane)

    wide = bits(1, 32, 2, 48)  # X is one of two heads
    X, Y = wide[0, :, 1], on_device(torch.full((16, 48), torch.nan, dtype=torch.float16))
    Launch(kernel, warps.threads, shared.bytes)(1, X, Y, n0, end)
    expected = torch.zeros_like(Y)
    expected[: max(0, min(end - n0, 16))] = X[n0 : min(end, n0 + 16)]
    assert torch.equal(Y, expected)


COPIES = (ptx.commit_group, ptx.wait_group(0))


def groups(newest: int, read: int):
    """kernel(X, Y): three groups of copies; all but the newest arrive, and Y is the tile that group `read` filled."""
    warps = Warps(1, "fp16")
    copy, store, where = warps.copy(16, 16), warps.store(16, 16), warps.where()
    commit, arrived, all_arrived = ptx.commit_group, ptx.wait_group(newest), ptx.wait_group(0)
    (tile_X,) = shared = Shared16(sX=(48, 16))

    @cuda.jit
    def kernel(X, Y):
        _, thread, _, lane = where()
        sX = tile_X(cuda.shared.array(0, int16, 128))
        for group in range(3):
            copy(sX, 16 * group, X, 16 * group, 48, thread)
            commit()
        arrived()
        cuda.syncthreads()
        store(Y, 0, 16, sX, 16 * read, lane)
        all_arrived()

    return Launch(kernel, 32, shared.bytes)


@pytest.mark.parametrize("newest", [0, 1, 2])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_wait_leaves_the_newest_groups_under_way(newest, read):
    X, Y = bits(48, 16), on_device(torch.zeros(16, 16, dtype=torch.float16))
    if read < 3 - newest:
        groups(newest, read)(1, X, Y)
        assert torch.equal(Y, X[16 * read : 16 * read + 16])
    elif target.KIND == "simulator":
        from sandbox.device.simulator import Race

        with pytest.raises(Race, match="while a copy into it is on its way"):
            groups(newest, read)(1, X, Y)


# ---- 16 bytes at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_chunk_is_read_and_unpacked(dtype):
    read, unpack = ptx.read_chunk, {"fp16": ptx.unpack_fp16, "bf16": ptx.unpack_bf16}[dtype]

    @cuda.jit
    def kernel(X, Y):
        lane = cuda.threadIdx.x
        w0, w1, w2, w3 = read(X, lane, 8)
        Y[lane, 0], Y[lane, 1] = unpack(w0)
        Y[lane, 2], Y[lane, 3] = unpack(w1)
        Y[lane, 4], Y[lane, 5] = unpack(w2)
        Y[lane, 6], Y[lane, 7] = unpack(w3)

    edges = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, 2.0**-24, 6e4])
    X = torch.randn(32, 24, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    X[3, 8:16] = edges.to(X.dtype)
    Y = on_device(torch.full((32, 8), torch.nan))
    Launch(kernel, 32)(1, on_device(X), Y)
    assert torch.equal(Y.cpu(), X[:, 8:16].float())


def test_four_are_copied_read_and_added():
    """Two blocks add to the same four; what was copied to shared memory is read by two."""
    copy_four, read_two, read_four, add_four = ptx.copy_four, ptx.read_two, ptx.read_four, ptx.add_four
    line, commit, arrived = shared_tile("sx", 0, 1, 128, 1), *COPIES

    @cuda.jit
    def kernel(X, Y, Z):
        lane = cuda.threadIdx.x
        sx = line(cuda.shared.array(0, float32, 128))
        copy_four(sx, 4 * lane, X[1], 4 * lane)
        commit()
        arrived()
        cuda.syncthreads()
        block = cuda.blockIdx.x
        Y[block, lane, 0], Y[block, lane, 1] = read_two(sx, 126 - 2 * lane)
        add_four(Z, 4 * lane, read_four(X[0], 124 - 4 * lane))

    X = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    Y, Z = on_device(torch.full((2, 32, 2), torch.nan)), on_device(torch.zeros(128))
    Launch(kernel, 32, 512)(2, on_device(X), Y, Z)
    assert torch.equal(Y.cpu(), X[1].view(64, 2).flip(0)[:32].expand(2, 32, 2))
    assert torch.equal(Z.cpu(), 2 * X[0].view(32, 4).flip(0).flatten())


@simulated
def test_four_that_16_bytes_cannot_address():
    from sandbox.device.simulator import SimulatorError

    read = ptx.read_four

    @cuda.jit
    def kernel(X, n):
        read(X, n)

    for X, n in ((torch.zeros(16)[::2], 0), (torch.zeros(16), 2), (torch.zeros(17)[1:], 0)):
        with pytest.raises(SimulatorError, match="multiple of 16"):
            Launch(kernel, 1)(1, X, n)


# ---- products -------------------------------------------------------------------------------------------------------


def product(kind: str, dtype: str, M: int, N: int, K: int):
    """kernel(A, B, C, D): C [M, N] in 16 bits and D in float32 = A·B; A [M, K], or Aᵀ where kind[0] is t; B [K, N], or
    Bᵀ where kind[1] is t; A in registers where kind[0] is r.  Both tiles start 16 rows further down."""
    warps, MI, NI, KI = Warps(1, dtype), M // 16, N // 8, K // 16
    shape_A, shape_B = (K, M) if kind[0] == "t" else (M, K), (N, K) if kind[1] == "t" else (K, N)
    tile_A, tile_B, tile_C = shared = Shared16(
        sA=(shape_A[0] + 16, shape_A[1]), sB=(shape_B[0] + 16, shape_B[1]), sC=(M, N)
    )
    copy_A, copy_B, store, where = warps.copy(*shape_A), warps.copy(*shape_B), warps.store(M, N), warps.where()
    clear, put, load, commit, arrived = warps.fill(MI, N), warps.put(MI, N), warps.load(MI, K), *COPIES
    multiply = getattr(warps, f"product_{kind}")(MI, N, K)
    FROM, IN_REGISTERS = 0 if kind[0] == "t" else 16, kind[0] == "r"

    @cuda.jit
    def kernel(A, B, C, D):
        _, thread, _, lane = where()
        smem = cuda.shared.array(0, int16, 128)
        sA, sB, sC = tile_A(smem), tile_B(smem), tile_C(smem)
        copy_A(sA, FROM, A, 0, A.shape[0], thread)
        copy_B(sB, 16, B, 0, B.shape[0], thread)
        commit()
        arrived()
        cuda.syncthreads()
        rA = cuda.local.array((MI, KI, 4), uint32)
        rC = cuda.local.array((MI, NI, 4), float32)
        clear(rC)
        if IN_REGISTERS:
            load(rA, sA, FROM)
            multiply(rC, rA, 0, sB, 16)
        else:
            multiply(rC, sA, FROM, sB, 16)
        for mi in range(MI):
            for n in range(NI):
                for e in range(4):
                    D[16 * mi + lane // 4 + 8 * (e // 2), 8 * n + 2 * (lane % 4) + e % 2] = rC[mi, n, e]
        put(sC, 0, rC)
        cuda.syncwarp()
        store(C, 0, M, sC, 0, lane)

    return Launch(kernel, 32, shared.bytes), shape_A, shape_B


def product_of_blocks(kind: str, M: int, N: int, K: int):
    """kernel(A, B, C): C [M, 16 + N] = (0, 2·a·b), by product_at and put_at: a is a block of A [M, K], of Aᵀ or of A's
    words, b one of B [K, N] or of Bᵀ, each 16 rows down and 32 columns in (but the words)."""
    warps, MI, NI, KI = Warps(1, "fp16"), M // 16, N // 8, K // 16
    rows_A, columns_A = (K, M) if kind[0] == "t" else (M, K)
    rows_B, columns_B = (N, K) if kind[1] == "t" else (K, N)
    tile_A, tile_B, tile_C = shared = Shared16(
        sA=(rows_A + 16, columns_A + 32), sB=(rows_B + 16, columns_B + 32), sC=(M + 16, N + 16)
    )
    copy_A, copy_B = warps.copy(rows_A + 16, columns_A + 32), warps.copy(rows_B + 16, columns_B + 32)
    store, where, commit, arrived = warps.store(M, N + 16), warps.where(), *COPIES
    clear, put, put_words, load = warps.fill(MI, N), warps.put_at(MI, N), warps.put_words_at(MI, 16), warps.load(MI, K)
    multiply, TWO, IN_REGISTERS = warps.product_at(kind, MI, N, K), float32(2), kind[0] == "r"

    @cuda.jit
    def kernel(A, B, C):
        _, thread, _, lane = where()
        smem = cuda.shared.array(0, int16, 128)
        sA, sB, sC = tile_A(smem), tile_B(smem), tile_C(smem)
        copy_A(sA, 0, A, 0, A.shape[0], thread)
        copy_B(sB, 0, B, 0, B.shape[0], thread)
        commit()
        arrived()
        cuda.syncthreads()
        rA = cuda.local.array((MI, KI, 4), uint32)
        rZ = cuda.local.array((MI, 1, 4), uint32)
        rC = cuda.local.array((MI, NI, 4), float32)
        clear(rC)
        if IN_REGISTERS:
            load(rA, sA, 0)
            multiply(rC, rA, (0, 0), sB, (16, 32))
        else:
            multiply(rC, sA, (16, 32), sB, (16, 32))
        for mi in range(MI):
            for e in range(4):
                rZ[mi, 0, e] = uint32(0)
        put_words(sC, (16, 0), rZ)
        put(sC, (16, 16), rC, TWO)
        cuda.syncwarp()
        store(C, 0, M, sC, 16, lane)

    return Launch(kernel, 32, shared.bytes), (rows_A + 16, columns_A + 32), (rows_B + 16, columns_B + 32)


@pytest.mark.parametrize("M, N, K", [(16, 32, 16), (32, 48, 32)])
@pytest.mark.parametrize("kind", ["nt", "nn", "tn", "tt", "rt", "rn"])
def test_product_of_blocks(kind, M, N, K):
    launch, shape_A, shape_B = product_of_blocks(kind, M, N, K)
    random = torch.Generator().manual_seed(M + N + K)
    A, B = (torch.randint(-4, 5, shape, generator=random).to(torch.float16) for shape in (shape_A, shape_B))
    C = on_device(torch.full((M, N + 16), torch.nan, dtype=torch.float16))
    launch(1, on_device(A), on_device(B), C)
    a, b = A[:M, :K] if kind[0] == "r" else A[16:, 32:], B[16:, 32:]
    expected = (a.float().T if kind[0] == "t" else a.float()) @ (b.float().T if kind[1] == "t" else b.float())
    assert torch.equal(C.cpu().float(), torch.cat((torch.zeros(M, 16), 2 * expected), 1))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("M, N, K", [(16, 16, 16), (32, 48, 32), (16, 32, 96)])
@pytest.mark.parametrize("kind", ["nt", "nn", "tn", "rt", "rn"])
def test_product(kind, M, N, K, dtype):
    launch, shape_A, shape_B = product(kind, dtype, M, N, K)
    random = torch.Generator().manual_seed(M + N + K)
    A, B = (torch.randint(-9, 9, shape, generator=random).to(DTYPES[dtype]) for shape in (shape_A, shape_B))
    C, D = on_device(torch.full((M, N), torch.nan, dtype=DTYPES[dtype])), on_device(torch.full((M, N), torch.nan))
    launch(1, on_device(A), on_device(B), C, D)
    expected = (A.float().T if kind[0] == "t" else A.float()) @ (B.float().T if kind[1] == "t" else B.float())
    assert torch.equal(D.cpu(), expected) and torch.equal(C.cpu(), expected.to(DTYPES[dtype]))


# ---- mistakes -------------------------------------------------------------------------------------------------------


@simulated
def test_what_the_simulator_sees():
    """A block at an odd row, a warp that is not whole, lanes elsewhere, a tile nobody wrote, a barrier forgotten."""
    from sandbox.device import simulator as sim

    with pytest.raises(sim.SimulatorError, match=r"block \(4, 0\) of sX\[32, 16\]"):
        loading("ldmatrix", 32, 16, 4, 0)(1, bits(32, 16), torch.zeros(32, 4, dtype=torch.int32))
    with pytest.raises(sim.OutOfBounds):
        loading("ldmatrix", 32, 16, 24, 0)(1, bits(32, 16), torch.zeros(32, 4, dtype=torch.int32))

    load, copy, (tile_X,) = ptx.ldmatrix, Warps(1, "fp16").copy(16, 16), Shared16(sX=(16, 16))
    commit, arrived = COPIES

    def kernel(fault):
        @cuda.jit
        def kernel(X):
            thread = cuda.threadIdx.x
            sX = tile_X(cuda.shared.array(0, int16, 128))
            if fault != "nobody wrote":
                copy(sX, 0, X, 0, 16, thread)
                commit()
                arrived()
            if fault != "no barrier":
                cuda.syncthreads()
            if fault != "apart" or thread != 3:
                load(sX, 0, 0)

        return kernel

    X = bits(16, 16)
    for fault, error in (
        ("nobody wrote", sim.Uninitialised), ("no barrier", (sim.Race, sim.Uninitialised)), ("apart", sim.Divergence),
    ):  # fmt: skip
        with pytest.raises(error):
            Launch(kernel(fault), 32)(1, X)
    Launch(kernel(""), 32)(1, X)
    mma, zero = ptx.mma_fp16, uint32(0)

    @cuda.jit
    def half_a_warp():
        mma((zero, zero, zero, zero), (zero, zero), (0, 0, 0, 0))

    with pytest.raises(sim.SimulatorError, match="a warp of 16 lanes"):
        Launch(half_a_warp, 16)(1)


@simulated
def test_rows_that_copies_of_16_bytes_cannot_address():
    from sandbox.device.simulator import SimulatorError

    launch, A, B = product("nt", "fp16", 16, 16, 16)
    C, D = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 16)
    for X in (bits(16, 32)[:, ::2], bits(1, 257)[0, 1:].view(16, 16), bits(16, 17)[:, :16]):
        with pytest.raises(SimulatorError, match="multiples of 16 bytes"):
            launch(1, X, bits(*B), C, D)


# ---- the binary for sm_90a, with or without a GPU -------------------------------------------------------------------


def compile_product(kind: str, dtype: str, folder) -> tuple:
    """(ptxas's report, the cubin) of a product of 32 x 64 by 128."""
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    launch, A, B = product(kind, dtype, 32, 64, 128)
    shapes = (A, DTYPES[dtype]), (B, DTYPES[dtype]), ((32, 64), DTYPES[dtype]), ((32, 64), torch.float32)
    tensors = [torch.empty(shape, dtype=of, device="meta") for shape, of in shapes]
    with compiling():
        launch(1, *tensors)
    binary = launch.compiled(*tensors)
    return binary.report, binary.cubin


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm on this machine")
def test_is_made_of_tensor_core_instructions(compiler, tmp_path):
    """One HMMA for each 16 x 8 x 16, one LDSM for each block of a tile, and nothing spilled."""
    for kind, dtype in (("nt", "fp16"), ("tn", "bf16"), ("rn", "fp16")):
        report, cubin = compiler.submit(compile_product, kind, dtype, tmp_path).result()
        assert (report.stack, report.spills) == (0, 0), f"{kind}: {report}"
        text = disassembled(cubin, tmp_path)
        assert text.count("HMMA.16816.F32" + ".BF16" * (dtype == "bf16")) == 2 * 8 * 8, kind
        assert text.count("LDSM.16.M") == 2 * 8 + 4 * 8, kind
        assert text.count("STSM.16.M") == 2 * 4 and "LDGSTS.E.BYPASS.LTC128B.128" in text, kind
