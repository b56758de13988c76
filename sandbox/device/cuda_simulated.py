"""`cuda` as a kernel sees it while it is simulated: where its thread is, its arrays, and where threads meet.

A kernel finds it in its module in place of Numba's `cuda`.  Of Numba's own simulator `jit` alone is used, which keeps
the Python function: nothing depends on its internals.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import numpy as np

from .memory_simulated import OutOfBounds, SharedArray, SimulatorError

LANES = 32  # that must meet, however narrow the warps are that hand data to each other


class Dim3:
    __slots__ = ("x", "y", "z")

    def __init__(self, x, y=1, z=1):
        self.x, self.y, self.z = x, y, z


class Thread:
    """Of a block.

    request  what it waits for: (kind, place, value), of kind 'block', 'warp' or 'shuffle'; None while it runs
    reply    what those who met have given: threadIdx.x -> value
    """

    __slots__ = ("threadIdx", "stamp", "greenlet", "request", "reply")


class Cuda:
    """Of one launch.  The scheduler sets blockIdx, tiles and current, the thread that runs, and hub, to go back to."""

    def __init__(self, grid, threads, warp):
        from numba.cuda import jit

        self.jit = jit  # by which another Python thread may build a kernel meanwhile
        self.gridDim, self.blockDim, self.blockIdx = Dim3(grid), Dim3(threads), Dim3(0, 0, 0)
        self.warp = warp
        self.current: Thread | None = None
        self.hub = None
        self.tiles: dict = {}
        self.local = _Local
        self.shared = _Shared(self)
        self.atomic = _Atomic

    @property
    def threadIdx(self):
        return self.current.threadIdx

    def _meet(self, kind, value=None, depth=2):
        frame = sys._getframe(depth)
        self.current.request = (kind, (frame.f_code, frame.f_lineno), value)
        return self.hub.switch()

    def syncthreads(self):
        self._meet("block")

    def syncthreads_or(self, value):
        return int(any(self._meet("block", value).values()))

    def syncthreads_and(self, value):
        return int(all(self._meet("block", value).values()))

    def syncthreads_count(self, value):
        return sum(map(bool, self._meet("block", value).values()))

    def syncwarp(self):
        self._meet("warp")

    def shfl_xor_sync(self, mask, value, lane_mask):
        values, x = self._meet("shuffle", value), self.current.threadIdx.x
        partner = x ^ lane_mask
        if partner // self.warp != x // self.warp or partner not in values:
            raise OutOfBounds(f"thread {x} shuffles with thread {partner}: not in its warp of {self.warp} lanes")
        return values[partner]

    def any_sync(self, mask, value):
        return any(self._meet("shuffle", value).values())

    def exchange(self, value):
        """What each of a warp's 32 lanes gives: lane -> value, one dictionary for all of them."""
        # depth: two functions of ptx_simulated.py lie between here and the kernel's line
        values, first = self._meet("shuffle", value, depth=4), self.current.threadIdx.x // LANES * LANES
        if "lanes" not in values:
            if len(values) != LANES:
                raise SimulatorError(f"a warp of {len(values)} lanes: tensor cores need {LANES}")
            values["lanes"] = {x - first: given for x, given in values.items()}
        return values["lanes"]


class _Local:
    @staticmethod
    def array(shape, dtype):
        """Registers or local memory of one thread, poisoned with NaN (or a large integer)."""
        dtype = _numpy(dtype)
        return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max // 3, dtype)


class _Shared:
    def __init__(self, cuda):
        self.cuda = cuda

    def array(self, shape, dtype, alignment=None):
        """One array for the block: the same source line gives every thread the same one.

        Shape 0 is dynamic shared memory, which `tile_of` divides.
        """
        if shape == 0:
            return self.cuda.tiles
        frame = sys._getframe(1)
        key = (frame.f_code, frame.f_lineno, frame.f_lasti)
        tiles = self.cuda.tiles
        if key not in tiles:
            tiles[key] = SharedArray(f"shared@{frame.f_lineno}", shape, _numpy(dtype).type)
        return tiles[key]


class _Atomic:
    @staticmethod
    def add(array, index, value):
        return array.atomic_add(index, value)


def _numpy(dtype):
    return np.dtype(getattr(dtype, "name", dtype))


def tile_of(smem, name, shape, dtype=np.float32):
    """The block's shared tile of that name and shape."""
    if name not in smem:
        smem[name] = SharedArray(name, shape, dtype)
    return smem[name]


_device_globals: dict[int, dict] = {}  # the modules of device functions


def register(function):
    """Makes `cuda` inside the module of this device function the simulated one during a launch."""
    _device_globals[id(function.__globals__)] = function.__globals__
    return function


@contextmanager
def exchanged(function, cuda: Cuda):
    """`cuda` stands in for Numba's in the modules of this kernel and of all device functions."""
    from numba import cuda as numbas

    modules = {**_device_globals, id(function.__globals__): function.__globals__}
    places = [(module, name) for module in modules.values() for name, value in module.items() if value is numbas]
    try:
        for module, name in places:
            module[name] = cuda
        yield
    finally:
        for module, name in places:
            module[name] = numbas
