"""The simulator sees what a GPU lets pass: races, divergence, bad indices; and computes and counts rightly.

Each kernel here is a few lines with one mistake, or with none and then nothing may be found.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import cuda, float32, int32

from sandbox import catalog, target
from sandbox.device import Launch, conversions, device_function
from sandbox.device import simulator as sim
from sandbox.device.copies_simulated import copies_arrive, copy_quad
from sandbox.device.cuda_simulated import tile_of
from sandbox.device.scalar import exp, from_bf16, to_bf16
from sandbox.device.softmax import ALL_LANES
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import DTYPES, Problem
from sandbox.variant import Tile

pytestmark = pytest.mark.skipif(target.KIND != "simulator", reason="these are tests of the simulator")

THREADS = 8


def run(kernel, *args, threads=THREADS, grid=1, warp=32):
    Launch(kernel, threads, warp=warp)(grid, *args)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------- races in one block


def hand_over(barrier, distance, first):
    """A kernel in which thread t and thread t ^ distance share an element, with that barrier between write and read.

    first: 'writer' or 'reader', which of the two the simulator runs first; without a barrier a reader reads what was.
    """

    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        s = cuda.shared.array(THREADS, float32)
        s[t] = float32(-1)
        cuda.syncthreads()
        writes = (t & distance == 0) == (first == "writer")
        if writes:
            s[t] = float32(t)
        if barrier == "warp":
            cuda.syncwarp()
        elif barrier == "block":
            cuda.syncthreads()
        if not writes:
            Y[t] = s[t ^ distance]

    return kernel


@pytest.mark.parametrize("first", ["writer", "reader"])
@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("warp", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("barrier", ["none", "warp", "block"])
def test_only_a_barrier_that_covers_both_threads_orders_them(barrier, warp, distance, first):
    """syncwarp orders the lanes of one warp, as wide as the launch says; syncthreads orders all; nothing else does."""
    Y = torch.full((THREADS,), torch.nan)
    if barrier == "block" or barrier == "warp" and distance < warp:
        run(hand_over(barrier, distance, first), Y, warp=warp)
        read = [t for t in range(THREADS) if (t & distance != 0) == (first == "writer")]
        assert Y[read].tolist() == [t ^ distance for t in read]
    else:
        with pytest.raises(sim.Race, match=r"shared@.*no barrier between"):
            run(hand_over(barrier, distance, first), Y, warp=warp)


def test_two_writes_race_even_of_the_same_value():
    @cuda.jit
    def kernel():
        s = cuda.shared.array(1, float32)
        s[0] = float32(1)

    run(kernel, threads=1)
    with pytest.raises(sim.Race, match="written by thread 1 of block 0, written by thread 0 of block 0"):
        run(kernel, threads=2)


def test_two_writes_with_a_barrier_between_do_not():
    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        s = cuda.shared.array(1, float32)
        for turn in range(2):
            if t == turn:
                s[0] = float32(turn)
            cuda.syncthreads()
        Y[t] = s[0]

    Y = zeros(2)
    run(kernel, Y, threads=2)
    assert Y.tolist() == [1, 1]


def test_a_shuffle_orders_no_memory():
    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        s = cuda.shared.array(2, float32)
        s[t] = float32(t)
        cuda.shfl_xor_sync(ALL_LANES, float32(t), 1)
        Y[t] = s[t ^ 1]

    with pytest.raises(sim.Race):
        run(kernel, zeros(2), threads=2)


def test_one_of_several_readers_may_write_after_a_warp_barrier():
    """All lanes read, they meet, one reads again and writes: nothing races."""

    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        x = X[0]
        cuda.syncwarp()
        if t == 0:
            X[0] = X[0] + x

    X = torch.ones(1)
    run(kernel, X, threads=4)
    assert X[0] == 2


def test_a_reader_among_several_is_not_forgotten():
    """Threads 0 … 3 read, then thread 4 does, twice: what it writes then still races with the others."""

    @cuda.jit
    def kernel(X):
        if cuda.threadIdx.x < 4:
            x = X[0]
        else:
            for _ in range(2):
                x = X[0]
            X[0] = x

    with pytest.raises(sim.Race, match="read by several threads of block 0"):
        run(kernel, zeros(1), threads=5)


def test_global_memory_races_inside_a_block_too():
    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        X[t] = X[t ^ 1]

    with pytest.raises(sim.Race, match=r"X\[1\]: read by thread 0|X\[0\]: read by thread 1"):
        run(kernel, zeros(2), threads=2)


# ------------------------------------------------------------------------------------------------- asynchronous copies


def copying(*steps):
    """Two threads copy a row of X each; a kernel made of `steps`, each a function (sX, X, t) that both threads call."""

    def kernel(X, Y):
        t = cuda.threadIdx.x
        sX = tile_of(cuda.shared.array(0, float32), "sX", (2, 4))
        for step in steps:
            step(sX, X, t)
        Y[t] = sX[1 - t, 3]

    Y = zeros(2)
    run(cuda.jit(kernel), torch.arange(8.0).view(2, 4), Y, threads=2)
    return Y


def start(sX, X, t):
    copy_quad(sX, t, 0, X, t, True)


def arrive(sX, X, t):
    copies_arrive()


def meet(sX, X, t):
    cuda.syncthreads()


def test_a_copy_is_there_after_its_thread_waited_and_all_met():
    assert copying(start, arrive, meet).tolist() == [7, 3]


def test_what_is_not_seen_is_copied_as_zeros():
    assert copying(lambda sX, X, t: copy_quad(sX, t, 0, X, 2 + t, False), arrive, meet).tolist() == [0, 0]


@pytest.mark.parametrize("steps", [(start, meet), (start, meet, meet), (start, meet, arrive)])
def test_a_copy_that_is_read_before_it_arrived(steps):
    with pytest.raises(sim.Race, match="while a copy into it is on its way"):
        copying(*steps)


def test_a_copy_into_what_others_still_read():
    with pytest.raises(sim.Race, match="written by thread 1 of block 0, read by thread 0"):
        copying(start, arrive, meet, lambda sX, X, t: sX[1, 0] if t == 0 else start(sX, X, t))


def test_two_copies_into_one_place():
    with pytest.raises(sim.Race, match="while a copy into it is on its way"):
        copying(start, start)


def test_a_copy_that_nobody_waits_for():
    @cuda.jit
    def kernel(X):
        sX = tile_of(cuda.shared.array(0, float32), "sX", (1, 4))
        copy_quad(sX, 0, 0, X, 0, True)

    with pytest.raises(sim.SimulatorError, match="copies into sX, by 1 threads of block 0, were never waited for"):
        run(kernel, zeros(1, 4), threads=1)


# ---------------------------------------------------------------------------------------------------- races of blocks


def test_blocks_that_write_one_element():
    @cuda.jit
    def kernel(X):
        X[0] = float32(cuda.blockIdx.x)

    with pytest.raises(sim.Race, match="written by thread 0 of block 1, written by thread 0 of block 0"):
        run(kernel, zeros(1), threads=1, grid=2)


@pytest.mark.parametrize("writer", [0, 1])
def test_a_block_that_reads_what_another_writes(writer):
    """Whichever block runs first, and though every block has passed a barrier."""

    @cuda.jit
    def kernel(X, Y):
        if cuda.blockIdx.x == writer:
            X[0] = float32(1)
        cuda.syncthreads()
        if cuda.blockIdx.x != writer:
            Y[0] = X[0]
        cuda.syncthreads()

    with pytest.raises(sim.Race, match="of block"):
        run(kernel, zeros(1), zeros(1), threads=1, grid=2)


def test_blocks_may_read_one_element_but_none_may_write_it():
    @cuda.jit
    def kernel(X, Y, last):
        Y[cuda.blockIdx.x] = X[0]
        cuda.syncthreads()
        if cuda.blockIdx.x == last:
            X[0] = float32(1)

    run(kernel, zeros(1), zeros(3), -1, threads=1, grid=3)
    with pytest.raises(sim.Race, match="read by threads of several blocks"):
        run(kernel, zeros(1), zeros(3), 2, threads=1, grid=3)


def test_arguments_that_overlap_are_one_memory():
    @cuda.jit
    def kernel(X, Y):
        t = cuda.threadIdx.x
        Y[t] = X[0]

    run(kernel, zeros(2), zeros(2), threads=2)
    X = zeros(2)
    with pytest.raises(sim.Race):
        run(kernel, X, X, threads=2)


def test_an_expanded_axis_is_one_element():
    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        X[t] = float32(1)

    with pytest.raises(sim.Race):
        run(kernel, zeros(1).expand(2), threads=2)


def atomics(also, barrier):
    """A kernel in which every thread adds 1 to X[0], and thread 0 does something else to it before or after."""

    @cuda.jit
    def kernel(X, Y):
        t = cuda.threadIdx.x
        if also == "write before" and t == 0:
            X[0] = float32(0)
        if also == "read before" and t == 0:
            Y[0] = X[0]
        if barrier:
            cuda.syncthreads()
        cuda.atomic.add(X, 0, float32(1))
        if barrier:
            cuda.syncthreads()
        if also == "write after" and t == 0:
            X[0] = float32(0)
        if also == "read after" and t == THREADS - 1:
            Y[0] = X[0]

    return kernel


def test_atomic_adds_of_all_threads_and_blocks_do_not_race():
    X = zeros(1)
    run(atomics("", False), X, zeros(1), grid=3)
    assert X[0] == 3 * THREADS


@pytest.mark.parametrize("also", ["write before", "read before", "write after", "read after"])
def test_an_atomic_add_beside_a_plain_access(also):
    """A race, unless a barrier stands between and there is no other block."""
    run(atomics(also, barrier=True), zeros(1), zeros(1))
    with pytest.raises(sim.Race, match="atomic"):
        run(atomics(also, barrier=False), zeros(1), zeros(1))
    with pytest.raises(sim.Race):
        run(atomics(also, barrier=True), zeros(1), zeros(1), grid=2)


def test_atomic_add_returns_what_was_there():
    @cuda.jit
    def kernel(X, Y):
        t = cuda.threadIdx.x
        Y[t] = cuda.atomic.add(X, (1, 0), float32(t))

    X, Y = zeros(2, 1), zeros(4)
    run(kernel, X, Y, threads=4)
    assert Y.tolist() == [0, 0, 1, 3] and X.tolist() == [[0], [6]]


# -------------------------------------------------------------------------------------------------------- divergence


@cuda.jit
def a_barrier_for_some(k):
    if cuda.threadIdx.x < k:
        cuda.syncthreads()


@cuda.jit
def an_early_return(k):
    if cuda.threadIdx.x >= k:
        return
    cuda.syncthreads()


@cuda.jit
def barriers_at_different_lines(k):
    if cuda.threadIdx.x < k:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


@cuda.jit
def loops_of_different_lengths(k):
    for _ in range(1 if cuda.threadIdx.x < k else 2):
        cuda.syncthreads()


@cuda.jit
def barriers_of_different_kinds(k):
    if cuda.threadIdx.x < k:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


@cuda.jit
def a_warp_barrier_for_some(k):
    if cuda.threadIdx.x < k:
        cuda.syncwarp()


@cuda.jit
def a_shuffle_for_some(k):
    if cuda.threadIdx.x < k:
        cuda.shfl_xor_sync(ALL_LANES, float32(1), 1)


@cuda.jit
def a_vote_for_some(k):
    if cuda.threadIdx.x < k:
        cuda.syncthreads_or(1)


BLOCK_WIDE = [a_barrier_for_some, an_early_return, barriers_at_different_lines, loops_of_different_lengths]
WARP_WIDE = [barriers_of_different_kinds, a_warp_barrier_for_some, a_shuffle_for_some]
names = [k.__name__ for k in BLOCK_WIDE + WARP_WIDE + [a_vote_for_some]]


@pytest.mark.parametrize("kernel", BLOCK_WIDE + WARP_WIDE + [a_vote_for_some], ids=names)
def test_threads_that_part_ways(kernel):
    for k in (1, THREADS - 1):
        with pytest.raises(sim.Divergence, match="part ways"):
            run(kernel, k)
    run(kernel, THREADS)  # all go one way


@pytest.mark.parametrize("kernel", WARP_WIDE, ids=names[len(BLOCK_WIDE) : -1])
def test_all_32_lanes_must_meet_however_narrow_the_declared_warp(kernel):
    """Shuffles and syncwarp name all lanes of a GPU's warp: some of them may not go elsewhere."""
    with pytest.raises(sim.Divergence, match="lanes of warp 0"):
        run(kernel, 4, warp=4)


def test_warps_may_part_ways_between_barriers():
    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        if t < 32:
            Y[t] = cuda.shfl_xor_sync(ALL_LANES, float32(t), 1)
            cuda.syncwarp()
        cuda.syncthreads()

    Y = zeros(64)
    run(kernel, Y, threads=64)
    assert Y[:32].tolist() == [t ^ 1 for t in range(32)]


# -------------------------------------------------------------------------------------------------- bounds and poison


def indexing(read):
    @cuda.jit
    def kernel(X, i, j):
        s = cuda.shared.array((2, 3), float32)
        line = cuda.shared.array(4, float32)
        for r in range(2):
            for c in range(3):
                s[r, c] = float32(0)
        for c in range(4):
            line[c] = float32(0)
        read(X, s, line, i, j)

    return kernel


ACCESSES = {
    "global read": lambda X, s, line, i, j: X[i, j],
    "global write": lambda X, s, line, i, j: X.__setitem__((i, j), float32(0)),
    "global row, then column": lambda X, s, line, i, j: X[i, :][j],
    "global column, then row": lambda X, s, line, i, j: X[:, j][i],
    "atomic add": lambda X, s, line, i, j: cuda.atomic.add(X, (i, j), float32(0)),
    "shared read": lambda X, s, line, i, j: s[i, j],
    "shared write": lambda X, s, line, i, j: s.__setitem__((i, j), float32(0)),
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES)
def test_every_index_must_be_inside(access):
    """Also where the element beyond a row's end exists, and where Python would count from the end."""
    access = device_function(access)
    run(indexing(access), zeros(2, 3), 1, 2, threads=1)
    for i, j in ((0, 3), (2, 0), (-1, 0), (0, -1), (1 << 31, 0)):
        with pytest.raises(sim.OutOfBounds, match="outside"):
            run(indexing(access), zeros(2, 3), i, j, threads=1)


@pytest.mark.parametrize("i", [-1, 4])
def test_one_dimension_too(i):
    access = device_function(lambda X, s, line, i, j: line[i])
    with pytest.raises(sim.OutOfBounds, match="outside"):
        run(indexing(access), zeros(2, 3), i, 0, threads=1)


def test_slices_other_than_whole_ones_are_refused():
    access = device_function(lambda X, s, line, i, j: X[i, 0:j])
    with pytest.raises(sim.SimulatorError, match="only whole slices"):
        run(indexing(access), zeros(2, 3), 0, 2, threads=1)


def test_shared_memory_holds_nothing_before_it_is_written():
    @cuda.jit
    def kernel(Y):
        s = cuda.shared.array(2, float32)
        s[0] = float32(0)
        Y[0] = s[1]

    with pytest.raises(sim.Uninitialised, match=r"shared@\d+\[1\]: read by thread 0 of block 0, written by nobody"):
        run(kernel, zeros(1), threads=1)


def test_nor_does_it_survive_from_one_block_to_the_next():
    @cuda.jit
    def kernel(Y):
        s = cuda.shared.array(1, float32)
        if cuda.blockIdx.x == 0:
            s[0] = float32(1)
        Y[cuda.blockIdx.x] = s[0]

    with pytest.raises(sim.Uninitialised, match="block 1"):
        run(kernel, zeros(2), threads=1, grid=2)


def test_registers_are_poisoned():
    @cuda.jit
    def kernel(Y):
        r = cuda.local.array(1, float32)
        n = cuda.local.array(1, int32)
        Y[0], Y[1] = r[0], n[0]

    Y = zeros(2)
    run(kernel, Y, threads=1)
    assert Y[0].isnan() and Y[1] > 1e8


# -------------------------------------------------------------------------------------------- what threads tell others


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("threads", [8, 64])
def test_shuffles_exchange_with_the_right_lane(step, threads):
    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        Y[t] = cuda.shfl_xor_sync(ALL_LANES, float32(10 * t), step)

    for warp in (8, 32):
        Y = zeros(threads)
        run(kernel, Y, threads=threads, warp=warp)
        assert Y.tolist() == [10 * (t ^ step) for t in range(threads)]


@pytest.mark.parametrize("threads, warp", [(8, 4), (4, 32)])
def test_a_shuffle_with_a_lane_that_is_not_there(threads, warp):
    """Beyond the declared warp, or beyond the last thread."""

    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        Y[t] = cuda.shfl_xor_sync(ALL_LANES, float32(t), 4)

    with pytest.raises(sim.OutOfBounds, match="shuffles with thread 4"):
        run(kernel, zeros(threads), threads=threads, warp=warp)


@pytest.mark.parametrize("votes", [[0] * 8, [1] * 8, [0, 0, 0, 5, 0, 0, 1, 0]], ids=["none", "all", "some"])
def test_votes(votes):
    @cuda.jit
    def kernel(X, Y):
        t = cuda.threadIdx.x
        Y[t, 0] = cuda.syncthreads_or(X[t])
        Y[t, 1] = cuda.syncthreads_and(X[t])
        Y[t, 2] = cuda.syncthreads_count(X[t])

    Y = zeros(THREADS, 3, dtype=torch.int32)
    run(kernel, torch.tensor(votes, dtype=torch.int32), Y, warp=4)
    expected = [int(any(votes)), int(all(votes)), sum(map(bool, votes))]
    assert Y.tolist() == [expected] * THREADS


def test_a_vote_is_a_barrier():
    @cuda.jit
    def kernel(Y):
        t = cuda.threadIdx.x
        s = cuda.shared.array(THREADS, float32)
        s[t] = float32(t)
        cuda.syncthreads_or(0)
        Y[t] = s[THREADS - 1 - t]

    Y = zeros(THREADS)
    run(kernel, Y, warp=1)
    assert Y.tolist() == list(range(THREADS))[::-1]


# ----------------------------------------------------------------------------------------------------------- counting


@cuda.jit
def copy(X, Y):
    t = cuda.threadIdx.x
    Y[0, t, 1] = X[0, t, 1] + X[0, 0, 1]


@cuda.jit
def copy_by_views(X, Y):
    t = cuda.threadIdx.x
    x, y = X[0, :, 1], Y[0, :, 1]
    y[t] = x[t] + x[0]


@pytest.mark.parametrize("kernel", [copy, copy_by_views], ids=["elements", "views"])
def test_loads_and_stores_are_counted(kernel):
    X, Y = torch.arange(2.0 * THREADS).reshape(1, THREADS, 2), zeros(1, THREADS, 2)
    with sim.counting() as traffic:
        run(kernel, X, Y)
    assert torch.equal(Y[0, :, 1], X[0, :, 1] + X[0, 0, 1]) and (Y[0, :, 0] == 0).all()
    assert (traffic.reads, traffic.writes) == ({"X": 2 * THREADS, "Y": 0}, {"X": 0, "Y": THREADS})
    assert (traffic.read_bytes, traffic.write_bytes) == (8 * THREADS, 4 * THREADS)


@pytest.mark.parametrize("kernel", [copy, copy_by_views], ids=["elements", "views"])
def test_expanded_and_strided_arrays_are_counted_by_access(kernel):
    X, Y = torch.ones(1, 1, 2, dtype=torch.float16).expand(1, THREADS, 2), zeros(2, THREADS, 1).transpose(0, 2)
    with sim.counting() as traffic:
        run(kernel, X, Y)
    assert (Y[0, :, 1] == 2).all()
    assert (traffic.reads["X"], traffic.writes["Y"]) == (2 * THREADS, THREADS)
    assert (traffic.read_bytes, traffic.write_bytes) == (4 * THREADS, 4 * THREADS)


def test_counts_add_up_over_launches_and_blocks_of_counting():
    X, Y = zeros(1, THREADS, 2), zeros(1, THREADS, 2)
    with sim.counting() as outer:
        run(copy, X, Y)
        with sim.counting() as inner:
            run(copy, X, Y)
    run(copy, X, Y)
    assert (inner.writes["Y"], outer.writes["Y"]) == (THREADS, 2 * THREADS)


def test_an_array_kept_in_fp32_counts_as_the_one_it_becomes():
    @cuda.jit
    def kernel(O, O_acc):
        O_acc[0] = float32(1)
        O[0] = O_acc[0]

    with sim.counting() as traffic:
        run(kernel, zeros(1, dtype=torch.float16), zeros(1), threads=1)
    assert (traffic.reads, traffic.writes) == ({"O": 1}, {"O": 2})
    assert (traffic.read_bytes, traffic.write_bytes) == (4, 6)


def test_atomics_count_as_a_read_and_a_write_and_shared_memory_apart():
    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        s = cuda.shared.array(THREADS, float32)
        s[t] = float32(t)
        cuda.atomic.add(X, t, s[t])

    with sim.counting() as traffic:
        run(kernel, zeros(THREADS))
    assert (traffic.reads, traffic.writes) == ({"X": THREADS}, {"X": THREADS})
    assert [*traffic.shared_reads.values(), *traffic.shared_writes.values()] == [THREADS, THREADS]


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit_operands_are_multiplied_in_fp32(dtype):
    """A product is not rounded to 16 bits, and a sum does not overflow them; only a store rounds."""
    widen, narrow = conversions(dtype)

    @cuda.jit
    def kernel(X, Y, Z):
        x, y = widen(X[0]), widen(X[1])
        Y[0], Y[1] = x * x, y + y
        Z[0] = narrow(x * x)

    tiny = 2.0 ** (-10 if dtype == "fp16" else -7)
    largest = torch.finfo(DTYPES[dtype]).max if dtype == "fp16" else 1e38
    X, Y, Z = torch.tensor([1 + tiny, largest], dtype=DTYPES[dtype]), zeros(2), zeros(1, dtype=DTYPES[dtype])
    run(kernel, X, Y, Z, threads=1)
    x, y = X.double()
    assert Y.double().tolist() == [(x * x).item(), (y + y).item()]
    assert Z.double().item() == 1 + 2 * tiny


def test_arguments_are_fp32():
    @cuda.jit
    def kernel(Y, scale):
        Y[0] = scale
        Y[1] = exp(scale) - scale

    Y = zeros(2, dtype=torch.float32)
    run(kernel, Y, 0.1, threads=1)
    assert Y.tolist() == [np.float32(0.1), np.exp(np.float32(0.1)) - np.float32(0.1)]


def test_every_bf16_is_widened_as_torch_does():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    expected = bits.view(torch.bfloat16).float()
    actual = torch.tensor(np.array([from_bf16(b) for b in bits.numpy()]))
    assert actual.dtype == torch.float32
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def test_fp32_is_narrowed_to_bf16_as_torch_does():
    """To nearest, ties to even, past the largest to infinity; NaN stays NaN, whatever its payload."""
    random = torch.Generator().manual_seed(0)
    anything = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=random).to(torch.int32)
    high = torch.randint(-(1 << 15), 1 << 15, (2_000,), generator=random) << 16
    near_ties = torch.cat([high + low for low in (0x7FFF, 0x8000, 0x8001, 0, 0xFFFF)]).to(torch.int32)
    x = torch.cat([anything, near_ties]).view(torch.float32)
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1.1754944e-38, 3.3895314e38, 3.4028235e38, -3.4e38]
    x = torch.cat([x, torch.tensor(edges)])
    expected = x.to(torch.bfloat16)
    actual = torch.tensor(np.array([to_bf16(v) for v in x.numpy()])).view(torch.bfloat16)
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_arithmetic_that_is_not_finite_warns_of_nothing():
    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        X[t] = X[t] - X[t] + exp(X[t] * X[t])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kernel, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38]), threads=4)


# ---------------------------------------------------------------------------------------------- repeatable and robust


def test_results_are_the_same_every_time():
    """Atomic adds and all: bits of the gradients, and counts."""
    problem, tile = Problem(1, 2, 1, 19, 21, 8, mask=Mask(causal=True)), Tile(8, 8)
    backward = catalog.variants("bwd")["bwd_v2"]
    inputs, runs = gate.gaussian(problem, seed=0), []
    for _ in range(2):
        outputs = [gate.poisoned(x) for x in (inputs.q, inputs.k, inputs.v)]
        seen = torch.ones(1, 2, 1, 1, dtype=torch.bool)
        O, LSE = inputs.q.clone(), zeros(1, 2, 19)
        with sim.counting() as traffic:
            launch = backward.launcher(problem, tile, target.device())
            launch(problem, inputs.q, inputs.k, inputs.v, seen, O, LSE, inputs.dO, *outputs)
        runs.append((outputs, traffic.reads, traffic.writes))
    (first, *counts), (second, *counts_again) = runs
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and counts == counts_again


def test_a_grid_of_nothing_runs_nothing():
    run(an_early_return, 1, grid=0)


class Fault(Exception):
    pass


@pytest.mark.parametrize("fault", [Fault, sim.Race, sim.Divergence, sim.OutOfBounds, sim.Uninitialised])
def test_after_an_exception_the_simulator_is_as_before(fault):
    """The exception itself comes out, `cuda` is the real one again, nothing is counted, the next launch is right."""

    @cuda.jit
    def kernel(X, Y):
        t = cuda.threadIdx.x
        s = cuda.shared.array(THREADS, float32)
        if fault is not sim.Uninitialised:
            s[t] = X[t]
        if fault is not sim.Divergence or t > 2:
            cuda.syncthreads()
        if fault is Fault:
            raise Fault
        if fault is sim.Race:
            s[0] = X[t]
        Y[t + THREADS * (fault is sim.OutOfBounds)] = s[t]

    with sim.counting() as traffic, pytest.raises(fault):
        run(kernel, zeros(THREADS), zeros(THREADS))
    assert not traffic.writes
    assert kernel.py_func.__globals__["cuda"] is cuda and hasattr(cuda, "to_device")
    X, Y = torch.arange(2.0 * THREADS).reshape(1, THREADS, 2), zeros(1, THREADS, 2)
    run(copy, X, Y)
    assert torch.equal(Y[0, :, 1], X[0, :, 1] + 1)


def in_threads(*work):
    """What each of these functions returns, all run at once; an exception of any comes out."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(w) for w in work]]


def test_python_threads_launch_side_by_side():
    """Each gets its own result, and counts its own launches alone, though all count at the same time."""
    together = threading.Barrier(2)

    @cuda.jit
    def kernel(X, steps):
        t = cuda.threadIdx.x
        for _ in range(steps):
            X[t] = X[t] + float32(1)
            cuda.syncthreads()

    def work(steps):
        X = zeros(THREADS)
        with sim.counting() as traffic:
            together.wait(60)
            for _ in range(5):
                run(kernel, X, steps)
            together.wait(60)
        assert (X == 5 * steps).all() and traffic.reads["X"] == 5 * steps * THREADS

    in_threads(lambda: work(3), lambda: work(7))


def test_a_kernel_is_built_while_another_python_thread_launches():
    """`cuda` is exchanged in a kernel's module while it runs; whoever builds another one there does not notice."""
    inside, built = threading.Event(), threading.Event()

    @cuda.jit
    def slow(Y):
        inside.set()
        Y[0] = float32(built.wait(60))

    def build():
        assert inside.wait(60)

        @cuda.jit
        def kernel(Y):
            Y[0] = float32(2)

        built.set()
        return kernel

    X, Y = zeros(1), zeros(1)
    _, kernel = in_threads(lambda: run(slow, X, threads=1), build)
    run(kernel, Y, threads=1)
    assert (X.item(), Y.item()) == (1, 2)
