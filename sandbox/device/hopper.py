"""HopperLaunch: a kernel in CUDA C++ on a grid of blocks, compiled by NVRTC for a GPU, emulated without.  [floor 1]

A launch on a GPU is prepared once a thread; after that a call writes addresses, structures and tensor maps into its
buffer.  A map is encoded once for all tensors of that shape, and moved to where each one lies.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import emulator, nvrtc
from ..problem import Problem
from . import launch as launches
from .scalar import SIMULATED

HEADERS = Path(__file__).parents[1] / "kernels" / "hopper"  # of kernels elsewhere, too
L2_BYTES = 32 << 20  # of K and V that are worked on at a time
MOST_MAPS = 1024  # that are kept


class Shape(ctypes.Structure):
    """A problem's sizes and mask: scheduler.cuh."""

    _fields_ = [(name, ctypes.c_int) for name in ("N_q", "N_k", "H", "group", "lo", "hi", "heads", "section")]
    _fields_ += [("scale", ctypes.c_float), ("softcap", ctypes.c_float)]


@functools.lru_cache(256)
def shape_of(p: Problem, head_bytes: int) -> Shape:
    """head_bytes: of K and V of one head, as they are read; as many heads are worked on at a time as L2 holds."""
    lo, hi = p.mask.band(p.N_q, p.N_k)
    section = p.group * max(1, L2_BYTES // head_bytes)
    return Shape(p.N_q, p.N_k, p.H, p.group, lo, hi, p.B * p.H, section, p.scale, p.softcap)


class Panels(NamedTuple):
    """A tensor [batch, N, heads, d] that a kernel copies in boxes of `width` bytes of d x `rows` rows of one head.

    width  128, 64 or 32: of the swizzle, too
    """

    name: str
    x: torch.Tensor
    rows: int
    width: int = 128


class Output(NamedTuple):
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
        self._kernels, self._here, self._emulated = {}, launches.Prepared(), 0

    def __call__(self, grid: int, *args) -> None:
        if grid == 0:
            return
        if SIMULATED:
            self._emulate(grid, args)
        elif launches._compiling:
            launches._compiling[-1].append((self, self.binary().report))
        else:
            self._launch(grid, args)

    def _launch(self, grid: int, args) -> None:
        device = torch.cuda.current_device()
        key, numbers, moved, counters = [device], [], [], []
        for index, a in enumerate(args):
            key.append(kind := type(a))
            if kind is Panels or kind is Output:
                if a.x.get_device() != device:
                    return self._launch_elsewhere(grid, args)
                address = a.x.data_ptr()
                if kind is Panels:
                    numbers.append(_map(a, device))
                    moved.append((index, address))
                else:
                    numbers.append(address)
            elif kind is Counter:
                counters.append(_counter(device))  # kept until they are in use
                numbers.append(counters[-1].data_ptr())
            else:
                numbers.append(a.value or 0 if kind is ctypes.c_void_p else bytes(a))
        key = tuple(key)
        launch = self._here.launches.get(key) or self._prepare(key, args)
        launch.relaunch(grid, numbers, moved)

    def _launch_elsewhere(self, grid: int, args) -> None:
        """On the device of the tensors, which is not the current one.  Raises ValueError where they have no such."""
        tensors = [a for a in args if isinstance(a, (Panels, Output))]
        for a in tensors:
            if not a.x.is_cuda or a.x.device != tensors[0].x.device:
                raise ValueError(f"{a.name} is on {a.x.device}: expected all tensors on one CUDA device")
        with torch.cuda.device(tensors[0].x.device):
            self._launch(grid, args)

    def _prepare(self, key: tuple, args) -> nvrtc.Launch:
        kernel = self._kernels.setdefault(key, nvrtc.Kernel(self.binary()))  # one of all threads
        blank = [PARAMETER.get(type(a), type(a))() for a in args]
        launch = kernel.prepare(grid=(1, 1, 1), block=(self.threads, 1, 1), shared=self.shared, args=blank)
        self._here.launches[key] = launch
        return launch

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


PARAMETER = {Panels: nvrtc.tensor_map.Opaque, Output: ctypes.c_void_p, Counter: ctypes.c_void_p}


_maps: dict[tuple, bytes] = {}


def _map(a: Panels, device: int) -> bytes:
    """The map of a tensor of this shape, wherever it lies."""
    _, x, rows, width = a
    key = device, x.dtype, x.shape, x.stride(), rows, width
    if (found := _maps.get(key)) is None:
        if len(_maps) >= MOST_MAPS:
            _maps.clear()
        found = _maps[key] = bytes(nvrtc.TensorMap.tiled(*_boxes(a)).opaque)
    return found


def _boxes(a: Panels) -> tuple[torch.Tensor, tuple[int, ...], str]:
    return a.x.transpose(1, 2), (1, 1, a.rows, a.width // a.x.element_size()), f"{a.width}B"


def _counter(device: int) -> torch.Tensor:
    """Zero, and the stream's own, whose launches follow one another; a graph, which any stream may run, has its own."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device="cuda")
    return _counters(device, torch._C._cuda_getCurrentRawStream(device))


@functools.cache
def _counters(device: int, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")


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


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the copy engine cannot address it: gaps between columns, odd strides, expanded dimensions."""
    fits = x.data_ptr() % 16 == 0 and _regular(x.shape, x.stride(), x.element_size())
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(1024)
def _regular(shape: torch.Size, strides: tuple[int, ...], size: int) -> bool:
    bytes = [s * size for s, n in zip(strides[:-1], shape[:-1]) if n > 1]
    return strides[-1] == 1 and all(s > 0 and s % 16 == 0 for s in bytes)
