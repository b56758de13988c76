"""The simulator sees an asynchronous copy that is used, or overwritten, before it is there."""

from __future__ import annotations

import pytest
import torch
from numba import cuda, float32
from simulated import on_simulator, run, zeros

from sandbox.device import simulator as sim
from sandbox.device.copies_simulated import copies_arrive, copy_quad
from sandbox.device.cuda_simulated import tile_of

pytestmark = on_simulator


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
