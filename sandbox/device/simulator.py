"""Numba's CUDA simulator with another scheduler: fast, repeatable, and strict.

Numba's own runs one OS thread per CUDA thread and polls.  Here the threads of a block are greenlets that run in a
fixed order from one barrier to the next, which is some fifty times faster, always gives the same result, and sees
what a GPU lets pass or only sometimes punishes:

* a barrier or warp operation that not every thread reaches, or that threads reach at different lines;
* a race: every element of shared and global memory remembers its last writer and its readers, and two accesses, one
  of them a write, are a race unless a barrier stands between them, whichever thread happens to run first;
* an index out of bounds (no wrap-around), and a read of shared memory that nothing wrote;
* every global load and store, counted per array.

Only as many lanes as a launch says hand data to each other within a warp, while all 32 must meet: a kernel that is
right with narrow warps is right with wide ones.
This module is the only one that touches the simulator's internals.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager

import numpy as np

from ..variant import SECONDS_PER_MULTIPLY_ADD

_lock = threading.RLock()
_device_globals: dict[int, dict] = {}  # the modules of device functions, where `cuda` is swapped during a launch


class _Counting(threading.local):
    """The `counting()` blocks that a Python thread is inside of."""

    def __init__(self):
        self.blocks: list[Traffic] = []


_counting = _Counting()


class SimulatorError(RuntimeError):
    """A defect of a kernel that the simulator found.

    sites  the kernel's lines (file, line) that it is about, where the traceback does not lead there
    """

    sites: tuple[tuple[str, int], ...] = ()


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
    """Counts every launch that this Python thread makes inside: ``with counting() as traffic: launch(...)``."""
    traffic = Traffic()
    _counting.blocks.append(traffic)
    try:
        yield traffic
    finally:
        _counting.blocks.remove(traffic)


def count(name: str, reads: int, writes: int, itemsize: int) -> None:
    """Adds accesses of one array to every `counting()` block that this Python thread is inside of."""
    letter = name.partition("_")[0]  # O_acc is O, kept in fp32
    for traffic in _counting.blocks:
        traffic.reads[letter] += reads
        traffic.writes[letter] += writes
        traffic.read_bytes += reads * itemsize
        traffic.write_bytes += writes * itemsize


class Stamp:
    """When and by whom: one thread between two of its barriers, or several threads that no barrier orders.

    warp is -1 for threads of several warps, block -1 for those of several blocks.
    lanes, block_mates: the stamps that stand for this thread together with others of its warp, or of its block.
    """

    __slots__ = ("thread", "warp", "block", "epoch", "warp_epoch", "lanes", "block_mates")

    def __init__(self, thread, warp, block, epoch, warp_epoch, lanes=None, block_mates=None):
        self.thread, self.warp, self.block, self.epoch, self.warp_epoch = thread, warp, block, epoch, warp_epoch
        self.lanes, self.block_mates = lanes, block_mates

    def before(self, other: Stamp) -> bool:
        """Whether a barrier orders this access before that of another thread, or the same thread made both."""
        if self.block != other.block:
            return False
        if self.epoch < other.epoch:
            return True
        if self.warp != other.warp:
            return False
        return self.warp_epoch < other.warp_epoch or self.thread == other.thread

    def joining(self, past: Stamp | None) -> Stamp:
        """Whom to remember when this thread makes an access that no other need be ordered with."""
        if past is None or past.before(self):
            return self
        if past.block != self.block:
            return _ANYONE
        return self.lanes if past.warp == self.warp else self.block_mates

    def __str__(self):
        if self.thread >= 0:
            return f"thread {self.thread} of block {self.block}"
        return f"several threads of block {self.block}" if self.block >= 0 else "threads of several blocks"


_ANYONE = Stamp(-1, -1, -1, 0, 0)
_now = Stamp(0, 0, -2, 0, 0)  # the stamp of the thread that is running


class Tally:
    """How often a kernel argument was read and written, through all of its views."""

    __slots__ = ("reads", "writes")

    def __init__(self):
        self.reads = self.writes = 0


class Tracked:
    """An array whose every element remembers who wrote it last and who read it since; bounds are checked.

    Two threads that touch one element, one of them writing, must have a barrier between them, whichever ran first.
    """

    __slots__ = ("name", "shape", "strides", "dtype", "writer", "readers")

    def _flat(self, index):
        if len(index) != len(self.shape):
            raise OutOfBounds(f"{self.name}{list(index)}: {len(self.shape)} indices expected")
        flat = 0
        for i, n, stride in zip(index, self.shape, self.strides):
            if not 0 <= i < n:
                raise self._outside(index)
            flat += i * stride
        return int(flat)

    def _outside(self, index):
        place = [i if isinstance(i, slice) else int(i) for i in index]
        return OutOfBounds(f"{self.name}{place} is outside {list(self.shape)} ({_now})")

    def _race(self, index, verb, verb_past, past):
        return Race(f"{self.name}{list(_tuple(index))}: {verb} by {_now}, {verb_past} by {past}, no barrier between")

    @property
    def ndim(self):
        return len(self.shape)


class SharedArray(Tracked):
    """A shared-memory tile: C order, poisoned until written."""

    __slots__ = ("data", "columns", "reads", "writes")

    def __init__(self, name, shape, dtype):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.name, self.shape, self.dtype = name, shape, dtype
        self.strides = tuple(int(np.prod(shape[k + 1 :], dtype=int)) for k in range(len(shape)))
        size = int(np.prod(shape, dtype=int))
        self.data, self.writer, self.readers = [None] * size, [None] * size, [None] * size
        self.reads = self.writes = 0
        self.columns = shape[1] if len(shape) == 2 else None

    def _flat(self, index):
        if self.columns is None:
            return super()._flat(_tuple(index))
        i, j = index  # two dimensions by hand: every multiply-add of a simulated product comes here
        if 0 <= i < self.shape[0] and 0 <= j < self.columns:
            return i * self.columns + j
        raise self._outside(index)

    def __getitem__(self, index):
        flat = self._flat(index)
        now, writer, readers = _now, self.writer[flat], self.readers[flat]
        if writer is None:
            if self.data[flat] is _ON_ITS_WAY:
                raise Race(f"{self.name}{list(_tuple(index))}: read by {now} while a copy into it is on its way")
            raise Uninitialised(f"{self.name}{list(_tuple(index))}: read by {now}, written by nobody")
        if writer.epoch == now.epoch and not writer.before(now):
            raise self._race(index, "read", "written", writer)
        if readers is not now and readers is not now.lanes and readers is not now.block_mates:
            self.readers[flat] = now.joining(readers)
        self.reads += 1
        return self.data[flat]

    def __setitem__(self, index, value):
        flat = self._flat(index)
        now, writer, readers = _now, self.writer[flat], self.readers[flat]
        if writer is None:
            if self.data[flat] is _ON_ITS_WAY:
                raise Race(f"{self.name}{list(_tuple(index))}: written by {now} while a copy into it is on its way")
        elif not writer.before(now):
            raise self._race(index, "written", "written", writer)
        if readers is not None and not readers.before(now):
            raise self._race(index, "written", "read", readers)
        self.writer[flat] = now
        self.writes += 1
        self.data[flat] = self.dtype(value)

    def start_copy(self, index):
        """An asynchronous copy into this element is on its way: nobody may touch it before `end_copy`."""
        self[index] = 0
        self.writes -= 1
        flat = self._flat(index)
        self.writer[flat], self.data[flat] = None, _ON_ITS_WAY

    def end_copy(self, index, value):
        self.data[self._flat(index)] = None
        self[index] = value


_ON_ITS_WAY = object()


def _tuple(index):
    return index if isinstance(index, tuple) else (index,)


class _Accesses:
    """Who touched global memory in this launch: address -> Stamp of its writer, its readers, its atomic adders."""

    def __init__(self):
        self.writer, self.readers, self.adders = {}, {}, {}


class GlobalArray(Tracked):
    """A kernel argument: a strided view of a NumPy array, tracked and counted under its parameter's name.

    Elements are known by their address, so views, expanded axes (stride 0) and arguments that overlap alias as they
    do in memory.
    """

    __slots__ = ("array", "address", "accesses", "adders", "tally")

    def __init__(self, name, array, accesses, tally=None):
        self.name, self.array, self.dtype = name, array, array.dtype
        self.shape, self.strides = array.shape, array.strides
        self.address = array.__array_interface__["data"][0]
        self.accesses, self.tally = accesses, tally or Tally()
        self.writer, self.readers, self.adders = accesses.writer, accesses.readers, accesses.adders

    @property
    def itemsize(self):
        return self.dtype.itemsize

    def _flat(self, index):
        return self.address + super()._flat(index)

    def _view(self, index):
        """X[b, :, h]: integers and whole slices."""
        index += (slice(None),) * (len(self.shape) - len(index))
        for i, n in zip(index, self.shape):
            if isinstance(i, slice):
                if i != slice(None):
                    raise SimulatorError(f"{self.name}[{i}]: only whole slices (:) are simulated")
            elif not 0 <= i < n:
                raise self._outside(index)
        return GlobalArray(self.name, self.array[index], self.accesses, self.tally)

    def __getitem__(self, index):
        index = _tuple(index)
        if len(index) < len(self.shape) or slice in map(type, index):
            return self._view(index)
        flat, now = self._flat(index), _now
        for verb, who in (("written", self.writer), ("atomically added to", self.adders)):
            past = who.get(flat) if who else None
            if past is not None and not past.before(now):
                raise self._race(index, "read", verb, past)
        self.readers[flat] = now.joining(self.readers.get(flat))
        self.tally.reads += 1
        return self.array[index]

    def __setitem__(self, index, value):
        index = _tuple(index)
        flat = self._flat(index)
        for verb, who in (("written", self.writer), ("read", self.readers), ("atomically added to", self.adders)):
            past = who.get(flat)
            if past is not None and not past.before(_now):
                raise self._race(index, "written", verb, past)
        self.writer[flat] = _now
        self.tally.writes += 1
        self.array[index] = value

    def atomic_add(self, index, value):
        """One read and one write that no other atomic races with."""
        index = _tuple(index)
        flat = self._flat(index)
        for verb, who in (("written", self.writer), ("read", self.readers)):
            past = who.get(flat)
            if past is not None and not past.before(_now):
                raise self._race(index, "atomically added to", verb, past)
        self.adders[flat] = _now.joining(self.adders.get(flat))
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
    __slots__ = ("threadIdx", "lane", "stamp", "greenlet", "request", "reply")


class _Cuda:
    """What a kernel sees as `cuda` while it is simulated; another Python thread may build one meanwhile, by jit."""

    def __init__(self, grid, threads, warp, jit):
        self.jit = jit
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
        if partner // self.warpsize != x // self.warpsize or partner not in values:
            raise OutOfBounds(f"thread {x} shuffles with thread {partner}: not in its warp of {self.warpsize} lanes")
        return values[partner]

    def any_sync(self, mask, value):
        return any(self._meet("shuffle", value).values())

    def exchange(self, value):
        """What each of a warp's 32 lanes gives: lane -> value, one dictionary for all of them."""
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


class _SharedNamespace:
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


PRODUCTS = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}


def estimate_seconds(problem, direction: str = "fwd", pace: float = SECONDS_PER_MULTIPLY_ADD) -> float:
    """About how long a problem takes to simulate; direction 'fwd', 'bwd' or 'fwd+bwd'."""
    pairs = problem.B * problem.H * problem.mask.pairs(problem.N_q, problem.N_k)
    return PRODUCTS[direction] * pairs * (problem.d + 4) * pace


def register(function):
    """Makes `cuda` inside the module of this device function the simulated one during a launch."""
    _device_globals[id(function.__globals__)] = function.__globals__
    return function


def tile_of(smem, name, shape, dtype=np.float32):
    """The block's shared tile of that name and shape."""
    if name not in smem:
        smem[name] = SharedArray(name, shape, dtype)
    return smem[name]


_copies: dict[int, list[list]] = {}  # thread -> groups of copies under way, (tile, index, value); the last is open
_copies_from: dict[int, tuple] = {}  # and the line of the kernel that started the first of them


def copy_quad(tile, r, k, X, n, seen):
    """tile[r, k : k + 4] = X[n, k : k + 4], or zeros where not seen: there once the thread calls `copies_arrive`."""
    copy(tile, r, k, 4, lambda c: X[n, c] if seen else 0)


def copy(tile, r, k, width, value_at):
    """tile[r, c] = value_at(c) for columns k … k + width - 1: read now, there once the thread has waited for it."""
    _copy(tile, [((r, c), value_at(c)) for c in range(k, k + width)])


def copy_line(line, r, width, value_at):
    """line[r + e] = value_at(e), e < width, of one dimension, likewise."""
    _copy(line, [(r + e, value_at(e)) for e in range(width)])


def _copy(tile, values):
    group = _copies.setdefault(_now.thread, [[]])[-1]
    for index, value in values:
        tile.start_copy(index)
        group.append((tile, index, value))
    if _now.thread not in _copies_from:
        _copies_from[_now.thread] = _kernel_line(sys._getframe())


def commit_group():
    """The copies that this thread has started since it did so last are one group."""
    if _now.thread in _copies:
        _copies[_now.thread].append([])


def wait_group(newest):
    """A function that waits until all but that many of this thread's groups have arrived, the newest."""

    def wait():
        groups = _copies.get(_now.thread, [[]])
        _end_copies(groups, max(0, len(groups) - 1 - newest))

    return wait


def copies_arrive():
    groups = _copies.get(_now.thread, [])
    _end_copies(groups, len(groups))


def _end_copies(groups, count):
    """The first so many groups of this thread arrive."""
    for group in groups[:count]:
        for tile, index, value in group:
            tile.end_copy(index, value)
    del groups[:count]
    if not any(groups):
        _copies_from.pop(_now.thread, None)
    if not groups:
        _copies.pop(_now.thread, None)


def _kernel_line(frame) -> tuple[str, int]:
    """(file, line) where the kernel itself stands, in whatever device function its thread is."""
    while frame.f_back is not None and frame.f_back.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


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
        cuda = _Cuda(grid, threads, warp, numba_cuda.jit)
        modules = {**_device_globals, id(function.__globals__): function.__globals__}
        for module in modules.values():
            stack.enter_context(_swapped(module, numba_cuda, cuda))
        stack.enter_context(np.errstate(all="ignore"))
        accesses = _Accesses()
        args = [GlobalArray(n, a, accesses) if isinstance(a, np.ndarray) else a for n, a in zip(names, args)]
        shared = (Counter(), Counter())
        for block in range(grid):
            cuda.blockIdx.x, cuda.tiles = block, {}
            _run_block(greenlet, cuda, function, args, block, threads, warp)
            for tile in cuda.tiles.values():
                shared[0][tile.name] += tile.reads
                shared[1][tile.name] += tile.writes
        for a in args:
            if isinstance(a, GlobalArray):
                count(a.name, a.tally.reads, a.tally.writes, a.dtype.itemsize)
        for traffic in _counting.blocks:
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


LANES = 32  # that must meet, however narrow the warps are that hand data to each other


def _run_block(greenlet, cuda, function, args, block, count, warp):
    """Runs every thread to its next meeting point, releases whoever may go on, until all have returned."""
    global _now
    cuda.hub = greenlet.getcurrent()
    threads = []
    for x in range(count):
        t = _Thread()
        t.threadIdx, t.lane, t.stamp = _Dim3(x, 0, 0), x % warp, Stamp(x, x // warp, block, -1, 0)
        t.greenlet, t.request, t.reply = greenlet.greenlet(lambda: function(*args)), None, None
        t.greenlet.gr_context = contextvars.copy_context()  # np.errstate lives there
        threads.append(t)
    _restamp(threads, "block")
    warps = [threads[x : x + LANES] for x in range(0, count, LANES)]
    runnable = threads
    outer = _now
    try:
        while runnable:
            for t in runnable:
                cuda.current, _now, t.request = t, t.stamp, None
                t.greenlet.switch(t.reply) if t.reply is not None else t.greenlet.switch()
            runnable = []
            for w, lanes in enumerate(warps):
                if _meet(lanes, ("warp", "shuffle"), f"lanes of warp {w}"):
                    runnable += lanes
            if not runnable and _meet(threads, ("block",), "threads"):
                runnable = threads
        left = [copy for groups in _copies.values() for group in groups for copy in group[:1]]
        if left:
            error = SimulatorError(
                f"copies into {left[0][0].name}, by {len(_copies_from)} threads of block {block}, were never waited for"
            )
            error.sites = tuple(sorted(set(_copies_from.values())))
            raise error
    finally:
        _now = outer
        cuda.current = None
        _copies.clear()
        _copies_from.clear()


def _meet(threads, kinds, who) -> bool:
    """Whether all these threads wait at one meeting point of these kinds; then they get each other's values."""
    if not any(t.request and t.request[0] in kinds for t in threads):
        return False
    sites = {t.request[:2] if t.request else None for t in threads}
    if len(sites) > 1:
        places = sorted(f"{s[1][0].co_name}:{s[1][1]} ({s[0]})" if s else "returned" for s in sites)
        error = Divergence(f"{who} of block {threads[0].stamp.block} part ways: {', '.join(places)}")
        error.sites = tuple(sorted({_kernel_line(t.greenlet.gr_frame) for t in threads if t.request}))
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
