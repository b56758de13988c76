"""Threads of the simulator meet, or part ways and are refused; what they tell each other; every time the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from numba import cuda, float32
from simulated import THREADS, on_simulator, run, zeros

from sandbox import catalog, target
from sandbox.device import simulator as sim
from sandbox.device.softmax import ALL_LANES
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import Problem
from sandbox.variant import Tile

pytestmark = on_simulator


# ----------------------------------------------------------------------------------------------------------- divergence


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


# --------------------------------------------------------------------------------------------- what threads tell others


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


# ------------------------------------------------------------------------------------------------ repeatable and robust


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

    @cuda.jit
    def add(X, Y):
        t = cuda.threadIdx.x
        Y[0, t, 1] = X[0, t, 1] + X[0, 0, 1]

    with sim.counting() as traffic, pytest.raises(fault):
        run(kernel, zeros(THREADS), zeros(THREADS))
    assert not traffic.writes
    assert kernel.py_func.__globals__["cuda"] is cuda and hasattr(cuda, "to_device")
    X, Y = torch.arange(2.0 * THREADS).reshape(1, THREADS, 2), zeros(1, THREADS, 2)
    run(add, X, Y)
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
