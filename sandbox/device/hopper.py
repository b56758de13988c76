"""HopperLaunch: a kernel in CUDA C++ on a grid of blocks, compiled by NVRTC for a GPU, emulated without.  [floor 1]"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import emulator, nvrtc
from ..problem import Problem
from . import launch as launches
from .scalar import SIMULATED

HEADERS = Path(__file__).parents[1] / "kernels" / "hopper"  # of kernels elsewhere, too
L2_BYTES = 32 << 20  # of K and V that are worked on at a time


class Shape(ctypes.Structure):
    """A problem's sizes and mask: scheduler.cuh."""

    _fields_ = [(name, ctypes.c_int) for name in ("N_q", "N_k", "H", "group", "lo", "hi", "heads", "section")]
    _fields_ += [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]


def shape_of(p: Problem, head_bytes: int) -> Shape:
    """head_bytes: of K and V of one head, as they are read; as many heads are worked on at a time as L2 holds."""
    lo, hi = p.mask.band(p.N_q, p.N_k)
    section = p.group * max(1, L2_BYTES // head_bytes)
    return Shape(p.N_q, p.N_k, p.H, p.group, lo, hi, p.B * p.H, section, p.scale, p.softcap)


@dataclass(frozen=True)
class Panels:
    """A tensor [batch, N, heads, d] that a kernel copies in boxes of `width` bytes of d x `rows` rows of one head.

    width  128, 64 or 32: of the swizzle, too
    """

    name: str
    x: torch.Tensor
    rows: int
    width: int = 128


@dataclass(frozen=True)
class Output:
    """A float32 tensor that a kernel writes number by number: its address."""

    name: str
    x: torch.Tensor


@dataclass(frozen=True)
class Counter:
    """An int32 of the kernel's own, 0 before a launch and after it: kernels that run at once have different ones."""


class HopperLaunch:
    """A kernel with its block size and shared memory: ``HopperLaunch(file, entry, threads, shared, defines)(grid, …)``.

    file     the .cu file; entry: its kernel; defines: macro -> int
    threads  threads a block
    shared   bytes of dynamic shared memory
    Arguments are Panels, Outputs, Counters and ctypes structures, in the order of the kernel's parameters.
    """

    def __init__(self, file: Path, entry: str, threads: int, shared: int, defines: dict[str, int]):
        self.file, self.name, self.defines = file, entry, defines
        self.threads, self.shared = threads, shared
        self._kernel, self._emulated = None, 0

    def __call__(self, grid: int, *args) -> None:
        if grid == 0:
            return
        if SIMULATED:
            self._emulate(grid, args)
        elif launches._compiling:
            launches._compiling[-1].append((self, self.binary().report))
        else:
            if self._kernel is None:
                self._kernel = nvrtc.Kernel(self.binary())
            self._kernel.prepare(
                grid=(grid, 1, 1), block=(self.threads, 1, 1), shared=self.shared, args=[_device(a) for a in args]
            )()

    def binary(self) -> nvrtc.Binary:
        """The cubin for sm_90a: compiled, or read from the disk cache."""
        return nvrtc.compile(self.file, self.name, self.defines, folders=(HEADERS,))

    def _emulate(self, grid, args) -> None:
        from .simulator import count

        library = emulator.library(self.file, self.name, tuple(self.defines.items()), HEADERS)
        given = [_host(a) for a in args]
        early, self._emulated = self._emulated % 2 == 1, self._emulated + 1  # every second launch the other way
        stored = emulator.launch(
            library, grid, self.threads, given, shared=self.shared, late_arrivals=not early, late_readers=early,
            seed=self._emulated,
        )  # fmt: skip
        for a, there in zip(args, given):
            if isinstance(a, Panels):
                count(a.name, *there.moved, a.x.element_size())
            elif isinstance(a, Output):
                count(a.name, 0, stored, 4)
            elif isinstance(a, Counter) and there.zero.value:
                raise emulator.EmulatorError(f"a counter was left at {there.zero.value}: expected 0")


def _device(a):
    if isinstance(a, Panels):
        return nvrtc.TensorMap.tiled(*_boxes(a))
    if isinstance(a, Counter):
        return _counter()
    return a.x if isinstance(a, Output) else a


def _boxes(a: Panels) -> tuple[torch.Tensor, tuple[int, ...], str]:
    return a.x.transpose(1, 2), (1, 1, a.rows, a.width // a.x.element_size()), f"{a.width}B"


def _counter() -> torch.Tensor:
    """Zero, and the stream's own, whose launches follow one another; a graph, which any stream may run, has its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream()
    return _counters(stream.device, stream.cuda_stream)


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _host(a):
    if isinstance(a, Panels):
        nvrtc.tensor_map.layout(*_boxes(a))  # what the copy engine would refuse
        return emulator.TensorMap.of(a.x, a.rows, a.width)
    if isinstance(a, Counter):
        zero = ctypes.c_int(0)
        pointer = ctypes.c_void_p(ctypes.addressof(zero))
        pointer.zero = zero
        return pointer
    return ctypes.c_void_p(a.x.data_ptr()) if isinstance(a, Output) else a
