"""HopperLaunch: a kernel in CUDA C++ on a grid of blocks, compiled by NVRTC for a GPU, emulated without.  [floor 1]

A launch on a GPU is prepared once a thread; after that a call writes addresses, structures and tensor maps into its
buffer.  Maps are encoded once for all tensors of those dtypes, shapes and strides, and moved to where each one lies.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import emulator, nvrtc
from ..problem import Problem
from ..target import SIMULATED
from ..variant import Infeasible, Tile
from . import launch as launches
from .counting import count
from .launch import addressable
from .sections import heads_a_section

HEADERS = Path(__file__).parents[1] / "kernels" / "hopper"  # of kernels elsewhere, too
MOST_LAYOUTS = 1024  # of tensors, that a kernel keeps maps for


class Shape(ctypes.Structure):
    """A problem's sizes and mask: scheduler.cuh."""

    _fields_ = [(name, ctypes.c_int) for name in ("N_q", "N_k", "H", "group", "lo", "hi", "heads", "section")]
    _fields_ += [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]


@functools.lru_cache(256)
def shape_of(p: Problem, head_bytes: int) -> Shape:
    """head_bytes: of K and V of one head, as they are read; as many heads are worked on at a time as L2 holds."""
    lo, hi = p.mask.band(p.N_q, p.N_k)
    section = p.group * heads_a_section(p.B * p.H_kv, head_bytes)
    return Shape(p.N_q, p.N_k, p.H, p.group, lo, hi, p.B * p.H, section, p.scale, p.softcap)


def width(bytes: int) -> int:
    """Of a panel of rows of so many bytes: 128, 64 or 32, what the copy engine swizzles."""
    return next(w for w in (128, 64, 32) if bytes % w == 0)


@dataclass(frozen=True)
class Panels:
    """A tensor [batch, N, heads, d] that a kernel copies in boxes of `width` bytes of d x `rows` rows of one head.

    width    128, 64 or 32: of the swizzle, too
    written  by the kernel; one that is only read is cloned first where the copy engine cannot address it
    """

    name: str
    rows: int
    width: int = 128
    written: bool = False


@dataclass(frozen=True)
class Output:
    """A float32 tensor that a kernel writes number by number: its address, or null for None."""

    name: str


@dataclass(frozen=True)
class Counter:
    """An int32 of the kernel's own, 0 before a launch and after it: kernels that run at once have different ones."""


class HopperLaunch:
    """A kernel with its block size and shared memory: ``HopperLaunch(file, entry, …, parameters)(grid, *given)``.

    file        the .cu file; entry: its kernel; defines: macro -> int
    threads     threads a block
    shared      bytes of dynamic shared memory
    parameters  Panels, Outputs, Counters and classes of ctypes structures, in the kernel's order
    tile        what it was built for, if anything: where the kernel spills, the tile is Infeasible
    given       what each of them but a Counter is this time: tensors and structures
    """

    def __init__(
        self, file: Path, entry: str, threads: int, shared: int, defines: dict[str, int], parameters: tuple,
        tile: Tile | None = None,
    ):  # fmt: skip
        self.file, self.name, self.defines, self.tile = file, entry, defines, tile
        self.threads, self.shared, self.parameters = threads, shared, parameters
        self._kernels, self._here, self._encoded, self._emulated = {}, launches.Prepared(), {}, 0
        self._misfit = None  # why the tile is infeasible, once the compiler has said it
        self._given = [(at, p) for at, p in enumerate(parameters) if not isinstance(p, Counter)]
        self._counters = [at for at, p in enumerate(parameters) if isinstance(p, Counter)]
        self._panels, self._outputs, self._structures = (
            [(at, n) for n, (at, p) in enumerate(self._given) if isinstance(p, kind)] for kind in (Panels, Output, type)
        )

    def __call__(self, grid: int, *given) -> None:
        if grid == 0:
            return
        if SIMULATED:
            self._emulate(grid, given)
        elif launches._asked.lists:
            launches._asked.lists[-1].append((self, self.binary().report))
        else:
            self._launch(grid, given)

    def _launch(self, grid: int, given: tuple) -> None:
        device = torch.cuda.current_device()
        key, moved, starts = [device], [], 0  # all that maps are made of but addresses; addresses
        for at, n in self._panels:
            x = given[n]
            if x.get_device() != device:
                return self._launch_elsewhere(grid, given)
            key += x.dtype, x.shape, x.stride()
            address = x.data_ptr()
            moved.append((at, address))
            starts |= address
        key = tuple(key)
        if (encoded := self._encoded.get(key)) is None or starts % 16:
            if (readable := self._readable(given)) is not given:
                return self._launch(grid, readable)
            encoded = self._encode(key, given)
        numbers = encoded.copy()
        for at, n in self._outputs:
            if (x := given[n]) is not None:
                if x.get_device() != device:
                    return self._launch_elsewhere(grid, given)
                numbers[at] = x.data_ptr()
        for at, n in self._structures:
            numbers[at] = bytes(given[n])
        for at in self._counters:
            counter = _counter(device)  # kept until it is in use
            numbers[at] = counter.data_ptr()
        launch = self._here.launches.get(device) or self._prepare(device)
        launch.relaunch(grid, numbers, moved)

    def _launch_elsewhere(self, grid: int, given: tuple) -> None:
        """On the device of the tensors, which is not the current one.  Raises ValueError where they have no such."""
        tensors = [(p.name, x) for (_, p), x in zip(self._given, given) if isinstance(x, torch.Tensor)]
        device = tensors[0][1].device
        for name, x in tensors:
            if not x.is_cuda or x.device != device:
                raise ValueError(f"{name} is on {x.device}: expected all tensors on one CUDA device")
        with torch.cuda.device(device):
            self._launch(grid, given)

    def _readable(self, given: tuple) -> tuple:
        """What is given, with clones of what is read and cannot be addressed; itself where there is no such."""
        reads = (isinstance(p, Panels) and not p.written for _, p in self._given)
        found = tuple(addressable(x) if read else x for read, x in zip(reads, given, strict=True))
        return given if all(x is y for x, y in zip(found, given)) else found

    def _encode(self, key: tuple, given: tuple) -> list:
        """What the parameters get: maps of these tensors, and 0 for all else.  Raises ValueError where none can be."""
        found = [0] * len(self.parameters)
        for at, n in self._panels:
            found[at] = bytes(nvrtc.TensorMap.tiled(*_boxes(self.parameters[at], given[n])).opaque)
        if len(self._encoded) >= MOST_LAYOUTS:
            self._encoded.clear()
        self._encoded[key] = found
        return found

    def _prepare(self, device: int) -> nvrtc.Launch:
        kernel = self._kernels.setdefault(device, nvrtc.Kernel(self.binary()))  # one of all threads
        blank = [_blank(p) for p in self.parameters]
        launch = kernel.prepare(grid=(1, 1, 1), block=(self.threads, 1, 1), shared=self.shared, args=blank)
        self._here.launches[device] = launch
        return launch

    def binary(self) -> nvrtc.Binary:
        """The cubin for sm_90a, compiled or from the cache.  Raises as nvrtc.compile does, and Infeasible."""
        if self._misfit:
            raise Infeasible(self.tile, self._misfit)
        try:
            return nvrtc.compile(self.file, self.name, self.defines, folders=(HEADERS,))
        except nvrtc.Spills as found:
            if self.tile is None:
                raise
            why = str(found).partition("\n")[0]
            self._misfit = f"{why}: take a smaller tile, or None for the usual one"
            raise Infeasible(self.tile, self._misfit) from found

    def _emulate(self, grid: int, given: tuple) -> None:
        library = emulator.library(self.file, self.name, tuple(self.defines.items()), HEADERS)
        given = self._readable(given)
        values = {at: x for (at, _), x in zip(self._given, given)}
        there = [_host(p, values.get(at)) for at, p in enumerate(self.parameters)]
        early, self._emulated = self._emulated % 2 == 1, self._emulated + 1  # every second launch the other way
        stored = emulator.launch(
            library, grid, self.threads, there, shared=self.shared, late_arrivals=not early, late_readers=early,
            seed=self._emulated,
        )  # fmt: skip
        for at, p in enumerate(self.parameters):
            if isinstance(p, Panels):
                count(p.name, *there[at].moved, values[at].element_size())
            elif isinstance(p, Output) and values[at] is not None:
                count(p.name, 0, stored, 4)
            elif isinstance(p, Counter) and there[at].zero.value:
                raise emulator.EmulatorError(f"a counter was left at {there[at].zero.value}: expected 0")


def _blank(parameter):
    """A value of a parameter's type."""
    if isinstance(parameter, type):
        return parameter()
    return nvrtc.tensor_map.Opaque() if isinstance(parameter, Panels) else ctypes.c_void_p()


def _boxes(p: Panels, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], str]:
    return x.transpose(1, 2), (1, 1, p.rows, p.width // x.element_size()), f"{p.width}B"


def _counter(device: int) -> torch.Tensor:
    """Zero, and the stream's own, whose launches follow one another; a graph, which any stream may run, has its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device="cuda")
    return _counters(device, torch._C._cuda_getCurrentRawStream(device))


@functools.cache
def _counters(device: int, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")


def _host(parameter, x):
    if isinstance(parameter, Panels):
        nvrtc.tensor_map.layout(*_boxes(parameter, x))  # what the copy engine would refuse
        return emulator.TensorMap.of(x, parameter.rows, parameter.width)
    if isinstance(parameter, Counter):
        zero = ctypes.c_int(0)
        pointer = ctypes.c_void_p(ctypes.addressof(zero))
        pointer.zero = zero
        return pointer
    if isinstance(parameter, Output):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return x
