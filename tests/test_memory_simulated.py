"""The simulator sees what a GPU lets pass in memory: races, bad indices, reads of what nobody wrote."""

from __future__ import annotations

import pytest
import torch
from numba import cuda, float32, int32
from simulated import THREADS, on_simulator, run, zeros

from sandbox.device import device_function
from sandbox.device import simulator as sim
from sandbox.device.softmax import ALL_LANES

pytestmark = on_simulator


# --------------------------------------------------------------------------------------------------- races in one block


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


# ------------------------------------------------------------------------------------------------------ races of blocks


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


# ---------------------------------------------------------------------------------------------------- bounds and poison


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
