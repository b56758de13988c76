"""Launch: one kernel on a grid of blocks, on a GPU (compiled on first use, on torch's current stream) or simulated.

On a GPU the first launch prepares a buffer for the arguments, and all others only write theirs into it: addresses,
shapes and strides, so that no tensor outlives its call.  Each thread has buffers of its own.  (Numba's own launcher
costs the host 38-103 µs a call.)
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import threading
from contextlib import contextmanager

import numpy as np
import torch

from .. import nvrtc
from ..target import SIMULATED
from ..variant import Infeasible, Tile
from .counting import count

POINTER, WIDE = ctypes.c_void_p, ctypes.c_int64
MOST_LAYOUTS = 4096  # of tensors, that are known again
FEW = 64  # bytes a thread: what ptxas spills at the edge differs by as much with the Python that Numba compiles under


class Prepared(threading.local):
    """Launches of a kernel by the device, and the kinds of arguments where they vary; each thread sees its own."""

    def __init__(self):
        self.launches: dict[tuple, nvrtc.Launch] = {}


class Launch:
    """A kernel with its block size and shared memory: ``Launch(kernel, threads, shared)(grid, *args)``.

    kernel   a ``cuda.jit`` function
    threads  threads a block
    warp     lanes that the kernel relies on to run in step (at most 32); the simulator's warps are that narrow
    shared   bytes of dynamic shared memory
    blocks   that are to share a multiprocessor, as far as registers go
    tile     of a kernel whose tiles live in registers: where they do not fit there, by ptxas's report of what it
             spills, it is Infeasible and never launched
    Arguments are torch tensors (bf16 and bool as their bits), ints (int32) and floats (float32), always in that type.
    """

    def __init__(
        self, kernel, threads: int, shared: int = 0, warp: int = 32, blocks: int = 1, tile: Tile | None = None
    ):
        self.function, self.name = kernel.py_func, kernel.py_func.__name__
        self.names = list(inspect.signature(self.function).parameters)
        self.threads, self.shared, self.warp, self.blocks, self.tile = threads, shared, warp, blocks, tile
        self._compiled, self._kernels, self._here = {}, {}, Prepared()

    def __call__(self, grid: int, *args) -> None:
        if grid == 0:
            return
        if SIMULATED:
            from . import simulator

            simulator.launch(self.function, self.names, grid, self.threads, [_host(a) for a in args], self.warp)
        elif _asked.lists:
            _asked.lists[-1].append((self, self.compiled(*args).report))
        else:
            kinds, numbers = _packed(args)
            key = torch.cuda.current_device(), *kinds
            launch = self._here.launches.get(key) or self._prepare(key, args)
            launch.relaunch(grid, numbers)

    def _prepare(self, key: tuple, args) -> nvrtc.Launch:
        kernel = self._kernels.setdefault(key, nvrtc.Kernel(self.compiled(*args)))  # one of all threads
        blank = [kind() for kind in _parameters(args)]
        launch = kernel.prepare(grid=(1, 1, 1), block=(self.threads, 1, 1), shared=self.shared, args=blank)
        self._here.launches[key] = launch
        return launch

    def compiled(self, *args) -> nvrtc.Binary:
        """The binary for arguments of these types and for the current device: compiled, or read from the disk cache.

        Raises Infeasible where the tile does not stay in registers.
        """
        from . import compile

        key = compile.signature(args), torch.cuda.current_device() if torch.cuda.is_available() else None
        if key not in self._compiled:
            self._compiled[key] = compile.kernel(self.function, key[0], self.threads, self.blocks)
        report = self._compiled[key].report
        if self.tile and max(report.spills, report.stack) > FEW:
            found = f"{report.spills} B of spills and {report.stack} B of stack a thread"
            raise Infeasible(self.tile, f"{self.name} has {found}: take a smaller tile, or None for the usual one")
        return self._compiled[key]


def _packed(args) -> tuple[list, list]:
    """(kinds, numbers): what tells arguments of other parameters apart, and what the parameters get.

    An array is to Numba a struct, passed member by member: two pointers that only a host needs, elements, bytes of one,
    address, shape, and strides in bytes.
    """
    kinds, numbers = [], []
    for a in args:
        if isinstance(a, torch.Tensor):
            kind, before, after = _layout(a.dtype, a.shape, a.stride())
            kinds.append(kind)
            numbers += before
            numbers.append(a.data_ptr())
            numbers += after
        else:
            kinds.append(type(a))
            numbers.append(a)
    return kinds, numbers


@functools.lru_cache(MOST_LAYOUTS)
def _layout(dtype: torch.dtype, shape: tuple, strides: tuple) -> tuple[tuple, tuple, tuple]:
    """(kind, what comes before the address, what after) of a tensor's numbers."""
    size = dtype.itemsize
    return (dtype, len(shape)), (0, 0, math.prod(shape), size), (*shape, *[s * size for s in strides])


def _parameters(args) -> list[type]:
    found = []
    for a in args:
        if isinstance(a, torch.Tensor):
            found += [POINTER, POINTER, WIDE, WIDE, POINTER] + [WIDE] * (2 * a.ndim)
        else:
            found.append(ctypes.c_float if isinstance(a, float) else ctypes.c_int32)
    return found


class Asked(threading.local):
    """The lists that `compiling` gives, the innermost last; each thread sees its own."""

    def __init__(self):
        self.lists: list[list] = []


_asked = Asked()


@contextmanager
def compiling():
    """Launches made inside compile their kernels and go no further: ``with compiling() as done: launch(...)``.

    Gives each launch with ptxas's report.  Needs no GPU (SANDBOX_TARGET=compile), and tensors may be on device "meta".
    """
    if SIMULATED:
        raise RuntimeError("the simulator compiles nothing: set SANDBOX_TARGET=compile")
    done: list[tuple[Launch, object]] = []
    _asked.lists.append(done)
    try:
        yield done
    finally:
        _asked.lists.pop()


def all_or_none(launch):
    """launch(problem, *tensors) of several kernels: all are compiled first, and where one is Infeasible none runs."""
    ready = set()

    def run(problem, *tensors):
        Q, K, *_ = tensors
        kind = problem.scale > 0, Q.device, Q.numel() > 0, K.numel() > 0  # which of its kernels run, and where
        if not (SIMULATED or _asked.lists or kind in ready):
            with compiling():
                launch(problem, *tensors)
            ready.add(kind)
        launch(problem, *tensors)

    return run


def scratch(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised float32 tensor on like's device; poisoned with NaN where that costs nothing that matters."""
    return torch.full(shape, torch.nan, device=like.device) if SIMULATED else torch.empty(shape, device=like.device)


def zeros(name: str, *shape: int, like: torch.Tensor) -> torch.Tensor:
    """A float32 tensor of zeros on like's device; where simulated they count as written, under this name."""
    if SIMULATED:
        count(name, 0, math.prod(shape), 4)
    return torch.zeros(shape, device=like.device)


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where copies of 16 bytes cannot read it: gaps between columns, odd strides, expanded dimensions."""
    fits = x.data_ptr() % 16 == 0 and _in_sixteens(x.dtype, x.shape, x.stride())
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(MOST_LAYOUTS)
def _in_sixteens(dtype: torch.dtype, shape: tuple, strides: tuple) -> bool:
    """Whether rows have no gaps between columns and begin at multiples of 16 bytes from one another."""
    apart = [s * dtype.itemsize for s, n in zip(strides[:-1], shape[:-1]) if n > 1]
    return strides[-1] == 1 and all(s > 0 and s % 16 == 0 for s in apart)


BITS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}


def _host(a):
    if isinstance(a, torch.Tensor):
        return a.detach().view(BITS.get(a.dtype, a.dtype)).numpy()
    return np.float32(a) if isinstance(a, float) else a
