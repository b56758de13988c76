"""Numba's CUDA simulator with another scheduler: fast, repeatable, and strict.

Numba's own runs one OS thread per CUDA thread and polls.  Here the threads of a block are greenlets that run in a
fixed order from one barrier to the next, which is some fifty times faster, always gives the same result, and sees
what a GPU lets pass or only sometimes punishes:

* a barrier or warp operation that not every thread reaches, or that threads reach at different lines;
* a race: every element of shared and global memory remembers its last writer and its readers, and two accesses, one
  of them a write, are a race unless a barrier stands between them, whichever thread happens to run first;
* an index out of bounds (no wrap-around), and a read of shared memory that nothing wrote;
* every global load and store, counted per array.

The warp is as wide as a launch says: a kernel that is right with narrow warps is right with 32 lanes.
This module is the only one that touches the simulator's internals.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager

import numpy as np

_lock = threading.RLock()
_device_globals: dict[int, dict] = {}  # the modules of device functions, where `cuda` is swapped during a launch
_traffic: list[Traffic] = []


class SimulatorError(RuntimeError):
    """A defect of a kernel that the simulator found."""


class Race(SimulatorError):
    """Two threads touch one element, at least one writes, and no barrier orders them."""


class Divergence(SimulatorError):
    """Threads of one block or warp do not meet at the same barrier."""


class OutOfBounds(SimulatorError, IndexError):
    """An index outside its array."""


class Uninitialised(SimulatorError):
    """A read of shared memory that no thread wrote."""


class Traffic:
    """Global-memory accesses of the launches inside a ``counting()`` block, per array, in elements and bytes."""

    def __init__(self):
        self.reads, self.writes = Counter(), Counter()
        self.read_bytes = self.write_bytes = 0
        self.shared_reads, self.shared_writes = Counter(), Counter()


@contextmanager
def counting():
    """Counts every launch made inside: ``with counting() as traffic: launch(...)``."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


class Stamp:
    """When and by whom: one thread between two of its barriers."""

    __slots__ = ("thread", "warp", "block", "epoch", "warp_epoch")

    def __init__(self, thread, warp, block, epoch, warp_epoch):
        self.thread, self.warp, self.block, self.epoch, self.warp_epoch = thread, warp, block, epoch, warp_epoch

    def before(self, other: Stamp) -> bool:
        """Whether a barrier orders this access before the other, or the same thread made both."""
        if self.block != other.block:
            return False
        if self.epoch < other.epoch:
            return True
        if self.warp != other.warp:
            return False
        return self.warp_epoch < other.warp_epoch or self.thread == other.thread

    def __str__(self):
        return f"thread {self.thread} of block {self.block}"


_now = Stamp(0, 0, -1, 0, 0)  # the stamp of the thread that is running


class Tally:
    """How often an array was read and written."""

    __slots__ = ("reads", "writes")

    def __init__(self):
        self.reads = self.writes = 0


class Tracked:
    """An array whose every element remembers its last write and its reads since; bounds are checked."""

    __slots__ = ("name", "shape", "strides", "dtype", "writer", "readers", "tally")

    def _flat(self, index):
        if len(self.shape) == 1:
            index = index if isinstance(index, tuple) else (index,)
        flat = 0
        if len(index) != len(self.shape):
            raise OutOfBounds(f"{self.name}{list(index)}: {len(self.shape)} indices expected")
        for i, n, stride in zip(index, self.shape, self.strides):
            if not 0 <= i < n:
                raise OutOfBounds(f"{self.name}{[int(i) for i in index]} is outside {list(self.shape)} ({_now})")
            flat += i * stride
        return int(flat)

    def _on_read(self, flat, index):
        self.tally.reads += 1
        w = self.writer.get(flat)
        if w is not None and w is not _now and not (w.epoch < _now.epoch and w.block == _now.block):
            if not w.before(_now):
                raise Race(f"{self.name}{list(index)}: read by {_now}, written by {w}, no barrier between")
        r = self.readers.get(flat)
        if r is not _now:
            if r is None or r.epoch < _now.epoch and r.block == _now.block:
                self.readers[flat] = _now
            elif r.thread != _now.thread or r.block != _now.block:  # several readers: thread -1 is like no one
                warp = r.warp if r.warp == _now.warp and r.block == _now.block else -1
                block = r.block if r.block == _now.block else -1
                self.readers[flat] = Stamp(-1, warp, block, _now.epoch, _now.warp_epoch)
            else:
                self.readers[flat] = _now

    def _on_write(self, flat, index):
        self.tally.writes += 1
        for verb, past in (("written", self.writer.get(flat)), ("read", self.readers.get(flat))):
            if past is not None and past is not _now and not past.before(_now):
                raise Race(f"{self.name}{list(index)}: written by {_now}, {verb} by {past}, no barrier between")
        self.writer[flat] = _now

    @property
    def ndim(self):
        return len(self.shape)


class SharedArray(Tracked):
    """A shared-memory tile: C order, poisoned until written."""

    __slots__ = ("data",)

    def __init__(self, name, shape, dtype):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.name, self.shape, self.dtype = name, shape, dtype
        self.strides = tuple(int(np.prod(shape[k + 1 :], dtype=int)) for k in range(len(shape)))
        size = int(np.prod(shape, dtype=int))
        self.data, self.writer, self.readers = [None] * size, _Sparse(size), _Sparse(size)
        self.tally = Tally()

    def __getitem__(self, index):
        # The hot path of every simulated product, hence two dimensions by hand.
        if len(self.shape) == 2:
            i, j = index
            n, ld = self.shape
            if not (0 <= i < n and 0 <= j < ld):
                raise OutOfBounds(f"{self.name}[{i}, {j}] is outside {list(self.shape)} ({_now})")
            flat = i * ld + j
        else:
            flat = self._flat(index)
            index = index if isinstance(index, tuple) else (index,)
        value = self.data[flat]
        if value is None:
            raise Uninitialised(f"{self.name}{list(index)}: read by {_now}, written by nobody")
        self._on_read(flat, index)
        return value

    def __setitem__(self, index, value):
        flat = self._flat(index)
        self._on_write(flat, index if isinstance(index, tuple) else (index,))
        self.data[flat] = self.dtype(value)


class _Sparse(list):
    """A list that answers like a dict; None is absent."""

    def __init__(self, size):
        super().__init__([None] * size)

    get = list.__getitem__


class GlobalArray(Tracked):
    """A kernel argument: a strided view of a NumPy array, tracked and counted under its parameter's name.

    Elements are known by their address, so views and expanded axes (stride 0) alias as they do in memory.
    """

    __slots__ = ("array", "address", "atomics")

    def __init__(self, name, array):
        self.name, self.array, self.dtype = name, array, array.dtype
        self.shape, self.strides = array.shape, array.strides
        self.address = array.__array_interface__["data"][0]
        self.writer, self.readers, self.atomics = {}, {}, set()
        self.tally = Tally()

    def _flat(self, index):
        return self.address + super()._flat(index)

    def _view(self, index):
        """X[b, :, h]: integers and whole slices."""
        index += (slice(None),) * (len(self.shape) - len(index))
        for i, n in zip(index, self.shape):
            if not isinstance(i, slice) and not 0 <= i < n:
                raise OutOfBounds(f"{self.name}{list(index)} is outside {list(self.shape)} ({_now})")
        view = GlobalArray(self.name, self.array[index])
        view.writer, view.readers, view.atomics = self.writer, self.readers, self.atomics
        view.tally = self.tally
        return view

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) < len(self.shape) or any(isinstance(i, slice) for i in index):
            return self._view(index)
        self._on_read(self._flat(index), index)
        return self.array[index]

    def __setitem__(self, index, value):
        index = index if isinstance(index, tuple) else (index,)
        flat = self._flat(index)
        if flat in self.atomics:
            raise Race(f"{self.name}{list(index)}: plain write by {_now} beside atomic ones")
        self._on_write(flat, index)
        self.array[index] = value

    def atomic_add(self, index, value):
        """One read and one write that no other atomic races with."""
        flat = self._flat(index)
        past = self.writer.get(flat)
        if past is not None and flat not in self.atomics and not past.before(_now):
            raise Race(f"{self.name}{list(index)}: atomic add by {_now}, plain write by {past}, no barrier between")
        self.atomics.add(flat)
        self.writer[flat] = _now
        self.tally.reads += 1
        self.tally.writes += 1
        old = self.array[index]
        self.array[index] = old + value
        return old


class _Dim3:
    __slots__ = ("x", "y", "z")

    def __init__(self, x, y=1, z=1):
        self.x, self.y, self.z = x, y, z


class _Thread:
    __slots__ = ("threadIdx", "lane", "warp", "stamp", "greenlet", "request", "reply")


class _Cuda:
    """What a kernel sees as `cuda` while it is simulated."""

    def __init__(self, grid, threads, warp):
        self.gridDim, self.blockDim, self.blockIdx = _Dim3(grid), _Dim3(threads), _Dim3(0, 0, 0)
        self.warpsize = warp
        self.current: _Thread | None = None
        self.hub = None
        self.tiles: dict = {}
        self.local = _Local
        self.shared = _SharedNamespace(self)
        self.atomic = _Atomic

    @property
    def threadIdx(self):
        return self.current.threadIdx

    @property
    def laneid(self):
        return self.current.lane

    def _meet(self, kind, value=None):
        frame = sys._getframe(2)
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
        values = self._meet("shuffle", value)
        return values.get(self.current.threadIdx.x ^ lane_mask, value)


class _Local:
    @staticmethod
    def array(shape, dtype):
        """Registers or local memory of one thread, poisoned with NaN (or a large integer)."""
        dtype = _numpy(dtype)
        return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max // 3, dtype)


class _SharedNamespace:
    def __init__(self, cuda):
        self.cuda = cuda

    def array(self, shape, dtype):
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


SECONDS_PER_MULTIPLY_ADD = 1.2e-6  # measured: 0.5 to 1.5 on one core, with all the bookkeeping
PRODUCTS = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}


def estimate_seconds(problem, direction: str = "fwd") -> float:
    """About how long a problem takes to simulate; direction 'fwd', 'bwd' or 'fwd+bwd'."""
    pairs = problem.B * problem.H * problem.mask.pairs(problem.N_q, problem.N_k)
    return PRODUCTS[direction] * pairs * (problem.d + 4) * SECONDS_PER_MULTIPLY_ADD


def register(function):
    """Makes `cuda` inside the module of this device function the simulated one during a launch."""
    _device_globals[id(function.__globals__)] = function.__globals__
    return function


def tile_of(smem, name, shape):
    """The block's shared tile of that name and shape, float32."""
    if name not in smem:
        smem[name] = SharedArray(name, shape, np.float32)
    return smem[name]


def launch(function, names, grid, threads, args, warp=32):
    """Runs function(*args) on grid blocks of `threads` threads, one block after another.

    Arrays are NumPy views; `names` are the parameters' names, under which accesses are counted.
    Raises Race, Divergence, OutOfBounds or Uninitialised for a defect of the kernel.
    """
    try:
        import greenlet
    except ImportError:
        raise RuntimeError("the simulator needs the package greenlet: pip install greenlet") from None
    from numba import cuda as numba_cuda

    with _lock, ExitStack() as stack:
        cuda = _Cuda(grid, threads, warp)
        modules = {**_device_globals, id(function.__globals__): function.__globals__}
        for module in modules.values():
            stack.enter_context(_swapped(module, numba_cuda, cuda))
        stack.enter_context(np.errstate(all="ignore"))
        args = [GlobalArray(n, a) if isinstance(a, np.ndarray) else a for n, a in zip(names, args)]
        shared = (Counter(), Counter())
        for block in range(grid):
            cuda.blockIdx.x, cuda.tiles = block, {}
            _run_block(greenlet, cuda, function, args, block, threads, warp)
            for key, tile in cuda.tiles.items():
                shared[0][tile.name] += tile.tally.reads
                shared[1][tile.name] += tile.tally.writes
        for traffic in _traffic:
            for a in args:
                if isinstance(a, GlobalArray):
                    letter = a.name.partition("_")[0]  # O_acc is O, kept in fp32
                    traffic.reads[letter] += a.tally.reads
                    traffic.writes[letter] += a.tally.writes
                    traffic.read_bytes += a.tally.reads * a.dtype.itemsize
                    traffic.write_bytes += a.tally.writes * a.dtype.itemsize
            traffic.shared_reads.update(shared[0])
            traffic.shared_writes.update(shared[1])


@contextmanager
def _swapped(module, real, fake):
    names = [name for name, value in module.items() if value is real]
    module.update(dict.fromkeys(names, fake))
    try:
        yield
    finally:
        module.update(dict.fromkeys(names, real))


def _run_block(greenlet, cuda, function, args, block, count, warp):
    """Runs every thread to its next meeting point, releases whoever may go on, until all have returned."""
    global _now
    cuda.hub = greenlet.getcurrent()
    live = []
    for x in range(count):
        t = _Thread()
        t.threadIdx, t.warp, t.lane = _Dim3(x, 0, 0), x // warp, x % warp
        t.stamp = Stamp(x, t.warp, block, 0, 0)
        t.greenlet, t.request, t.reply = greenlet.greenlet(lambda: function(*args)), None, None
        live.append(t)
    warps = [live[w : w + warp] for w in range(0, count, warp)]
    runnable = live
    outer = _now
    try:
        while runnable:
            for t in runnable:
                cuda.current, _now, t.request = t, t.stamp, None
                t.greenlet.switch(t.reply) if t.reply is not None else t.greenlet.switch()
            runnable = []
            for lanes in warps:
                if _meets(lanes, ("warp", "shuffle")):
                    runnable += lanes
            if not runnable and _meets(live, ("block",)):
                runnable = live
    finally:
        _now = outer
        cuda.current = None


def _meets(threads, kinds) -> bool:
    """Whether all these threads wait at one meeting point of these kinds; then they get each other's values."""
    waiting = [t for t in threads if t.request is not None and t.request[0] in kinds]
    if not waiting:
        return False
    sites = {t.request[:2] if t.request else None for t in threads}
    if len(sites) > 1:
        if kinds != ("block",) and any(s and s[0] == "block" for s in sites) or None in sites or kinds == ("block",):
            where = sorted(f"{s[1][0].co_name}:{s[1][1]} ({s[0]})" if s else "returned" for s in sites)
            raise Divergence(f"threads of block {threads[0].stamp.block} part ways: {', '.join(where)}")
        raise Divergence(f"lanes of warp {threads[0].warp} of block {threads[0].stamp.block} wait at different lines")
    kind = threads[0].request[0]
    values = {t.threadIdx.x: t.request[2] for t in threads}
    for t in threads:
        t.reply = values
        s = t.stamp
        if kind == "block":
            t.stamp = Stamp(s.thread, s.warp, s.block, s.epoch + 1, s.warp_epoch)
        elif kind == "warp":
            t.stamp = Stamp(s.thread, s.warp, s.block, s.epoch, s.warp_epoch + 1)
    return True
