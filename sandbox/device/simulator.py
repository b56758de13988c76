"""The simulator: kernels without a GPU, on a scheduler of its own; fast, repeatable, and strict.

Numba's own runs one OS thread per CUDA thread and polls.  Here the threads of a block are greenlets that run in a
fixed order from one barrier to the next, which is some fifty times faster, always gives the same result, and sees
what a GPU lets pass or only sometimes punishes:

* a barrier or warp operation that not every thread reaches, or that threads reach at different lines;
* a race, an index out of bounds, a read of shared memory that nothing wrote (memory_simulated.py);
* a copy that nobody waits for (copies_simulated.py);
* every global load and store, counted per array (counting.py).

Only as many lanes as a launch says hand data to each other within a warp, while all 32 must meet: a kernel that is
right with narrow warps is right with wide ones.  Callers find here what they need; `cuda`, as a kernel sees it, is
cuda_simulated.py.
"""

from __future__ import annotations

import contextvars
import threading
from collections import Counter

import numpy as np

from ..variant import SECONDS_PER_MULTIPLY_ADD
from . import memory_simulated as memory
from .copies_simulated import all_waited_for
from .counting import count, count_shared, counting
from .cuda_simulated import LANES, Cuda, Dim3, Thread, exchanged
from .memory_simulated import OutOfBounds, Race, SimulatorError, Stamp, Uninitialised, kernel_line

__all__ = [
    "Divergence", "OutOfBounds", "Race", "SimulatorError", "Uninitialised", "counting", "estimate_seconds", "launch",
]  # fmt: skip

_lock = threading.RLock()


class Divergence(SimulatorError):
    """Threads of one block or warp do not meet at the same barrier."""


def launch(function, names, grid, threads, args, warp=32):
    """Runs function(*args) on grid blocks of `threads` threads, one block after another.

    Arrays are NumPy views; `names` are the parameters' names, under which accesses are counted.
    Raises Race, Divergence, OutOfBounds or Uninitialised for a defect of the kernel.
    """
    try:
        import greenlet
    except ImportError:
        raise RuntimeError("the simulator needs the package greenlet: pip install greenlet") from None

    cuda = Cuda(grid, threads, warp)
    with _lock, exchanged(function, cuda), np.errstate(all="ignore"):
        accesses = memory.Accesses()
        args = [memory.GlobalArray(n, a, accesses) if isinstance(a, np.ndarray) else a for n, a in zip(names, args)]
        shared_reads, shared_writes = Counter(), Counter()
        for block in range(grid):
            cuda.blockIdx.x, cuda.tiles = block, {}
            with all_waited_for(block):
                _run_block(greenlet, cuda, function, args, block, threads, warp)
            for tile in cuda.tiles.values():
                shared_reads[tile.name] += tile.reads
                shared_writes[tile.name] += tile.writes
        for a in args:
            if isinstance(a, memory.GlobalArray):
                count(a.name, a.tally.reads, a.tally.writes, a.dtype.itemsize)
        for name in shared_reads:
            count_shared(name, shared_reads[name], shared_writes[name])


def _run_block(greenlet, cuda, function, args, block, count, warp):
    """Runs every thread to its next meeting point, releases whoever may go on, until all have returned."""
    cuda.hub = greenlet.getcurrent()
    threads = []
    for x in range(count):
        t = Thread()
        t.threadIdx, t.stamp = Dim3(x, 0, 0), Stamp(x, x // warp, block, -1, 0)
        t.greenlet, t.request, t.reply = greenlet.greenlet(lambda: function(*args)), None, None
        t.greenlet.gr_context = contextvars.copy_context()  # np.errstate lives there
        threads.append(t)
    _restamp(threads, "block")
    warps = [threads[x : x + LANES] for x in range(0, count, LANES)]
    runnable = threads
    outer = memory.running
    try:
        while runnable:
            for t in runnable:
                cuda.current, memory.running, t.request = t, t.stamp, None
                t.greenlet.switch(t.reply) if t.reply is not None else t.greenlet.switch()
            runnable = []
            for w, lanes in enumerate(warps):
                if _meet(lanes, ("warp", "shuffle"), f"lanes of warp {w}"):
                    runnable += lanes
            if not runnable and _meet(threads, ("block",), "threads"):
                runnable = threads
    finally:
        memory.running = outer
        cuda.current = None


def _meet(threads, kinds, who) -> bool:
    """Whether all these threads wait at one meeting point of these kinds; then they get each other's values."""
    if not any(t.request and t.request[0] in kinds for t in threads):
        return False
    sites = {t.request[:2] if t.request else None for t in threads}
    if len(sites) > 1:
        places = sorted(f"{s[1][0].co_name}:{s[1][1]} ({s[0]})" if s else "returned" for s in sites)
        error = Divergence(f"{who} of block {threads[0].stamp.block} part ways: {', '.join(places)}")
        error.sites = tuple(sorted({kernel_line(t.greenlet.gr_frame) for t in threads if t.request}))
        raise error
    values = {t.threadIdx.x: t.request[2] for t in threads}
    for t in threads:
        t.reply = values
    _restamp(threads, threads[0].request[0])
    return True


def _restamp(threads, kind) -> None:
    """The threads have met: what they did so far is before what they do from now on."""
    if kind == "shuffle":  # exchanges values, orders no memory
        return
    first = threads[0].stamp
    if kind == "block":
        epoch, warp_epoch = first.epoch + 1, 0
        block_mates = Stamp(-1, -1, first.block, epoch, 0)
    else:
        epoch, warp_epoch, block_mates = first.epoch, first.warp_epoch + 1, first.block_mates
    lanes = {s.warp: Stamp(-1, s.warp, s.block, epoch, warp_epoch) for s in (t.stamp for t in threads)}
    for t in threads:
        s = t.stamp
        t.stamp = Stamp(s.thread, s.warp, s.block, epoch, warp_epoch, lanes[s.warp], block_mates)


PRODUCTS = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}


def estimate_seconds(problem, direction: str = "fwd", pace: float = SECONDS_PER_MULTIPLY_ADD) -> float:
    """About how long a problem takes to simulate; direction 'fwd', 'bwd' or 'fwd+bwd'."""
    pairs = problem.B * problem.H * problem.mask.pairs(problem.N_q, problem.N_k)
    return PRODUCTS[direction] * pairs * (problem.d + 4) * pace
