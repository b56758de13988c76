"""Every load and store of a kernel is counted, under the name of its array."""

from __future__ import annotations

import pytest
import torch
from numba import cuda, float32
from simulated import THREADS, on_simulator, run, zeros

from sandbox.device.counting import counting

pytestmark = on_simulator


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
    with counting() as traffic:
        run(kernel, X, Y)
    assert torch.equal(Y[0, :, 1], X[0, :, 1] + X[0, 0, 1]) and (Y[0, :, 0] == 0).all()
    assert (traffic.reads, traffic.writes) == ({"X": 2 * THREADS, "Y": 0}, {"X": 0, "Y": THREADS})
    assert (traffic.read_bytes, traffic.write_bytes) == (8 * THREADS, 4 * THREADS)


@pytest.mark.parametrize("kernel", [copy, copy_by_views], ids=["elements", "views"])
def test_expanded_and_strided_arrays_are_counted_by_access(kernel):
    X, Y = torch.ones(1, 1, 2, dtype=torch.float16).expand(1, THREADS, 2), zeros(2, THREADS, 1).transpose(0, 2)
    with counting() as traffic:
        run(kernel, X, Y)
    assert (Y[0, :, 1] == 2).all()
    assert (traffic.reads["X"], traffic.writes["Y"]) == (2 * THREADS, THREADS)
    assert (traffic.read_bytes, traffic.write_bytes) == (4 * THREADS, 4 * THREADS)


def test_counts_add_up_over_launches_and_blocks_of_counting():
    X, Y = zeros(1, THREADS, 2), zeros(1, THREADS, 2)
    with counting() as outer:
        run(copy, X, Y)
        with counting() as inner:
            run(copy, X, Y)
    run(copy, X, Y)
    assert (inner.writes["Y"], outer.writes["Y"]) == (THREADS, 2 * THREADS)


def test_an_array_kept_in_fp32_counts_as_the_one_it_becomes():
    @cuda.jit
    def kernel(O, O_acc):
        O_acc[0] = float32(1)
        O[0] = O_acc[0]

    with counting() as traffic:
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

    with counting() as traffic:
        run(kernel, zeros(THREADS))
    assert (traffic.reads, traffic.writes) == ({"X": THREADS}, {"X": THREADS})
    assert [*traffic.shared_reads.values(), *traffic.shared_writes.values()] == [THREADS, THREADS]
