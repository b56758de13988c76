"""Memory on the simulator: of every element it is known who wrote it last, and who has read it since.

Two accesses, one of them a write, are a race unless a barrier stands between them, whichever thread happens to run
first; an index is inside its array (no wrap-around); shared memory is not read before it is written; and all accesses
are tallied.
"""

from __future__ import annotations

import numpy as np


class SimulatorError(RuntimeError):
    """A defect of a kernel that the simulator found.

    sites  the kernel's lines (file, line) that it is about, where the traceback does not lead there
    """

    sites: tuple[tuple[str, int], ...] = ()


class Race(SimulatorError):
    """Two threads touch one element, at least one writes, and no barrier orders them."""


class OutOfBounds(SimulatorError, IndexError):
    """An index outside its array."""


class Uninitialised(SimulatorError):
    """A read of shared memory that no thread wrote."""


def kernel_line(frame) -> tuple[str, int]:
    """(file, line) where the kernel itself stands, in whatever device function its thread is."""
    while frame.f_back is not None and frame.f_back.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


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
running = Stamp(0, 0, -2, 0, 0)  # the stamp of the thread that runs: the scheduler sets it


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
        return OutOfBounds(f"{self.name}{place} is outside {list(self.shape)} ({running})")

    def _race(self, index, verb, verb_past, past):
        return Race(f"{self.name}{list(_tuple(index))}: {verb} by {running}, {verb_past} by {past}, no barrier between")


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
        now, writer, readers = running, self.writer[flat], self.readers[flat]
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
        now, writer, readers = running, self.writer[flat], self.readers[flat]
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


class Accesses:
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
        flat, now = self._flat(index), running
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
            if past is not None and not past.before(running):
                raise self._race(index, "written", verb, past)
        self.writer[flat] = running
        self.tally.writes += 1
        self.array[index] = value

    def atomic_add(self, index, value):
        """One read and one write that no other atomic races with."""
        index = _tuple(index)
        flat = self._flat(index)
        for verb, who in (("written", self.writer), ("read", self.readers)):
            past = who.get(flat)
            if past is not None and not past.before(running):
                raise self._race(index, "atomically added to", verb, past)
        self.adders[flat] = running.joining(self.adders.get(flat))
        self.tally.reads += 1
        self.tally.writes += 1
        old = self.array[index]
        self.array[index] = old + value
        return old
