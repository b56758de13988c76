"""HopperLaunch: a kernel in CUDA C++ on a grid of blocks, compiled by NVRTC for a GPU, emulated without.  [floor 1]"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import emulator, nvrtc
from . import launch as launches
from .scalar import SIMULATED

HEADERS = Path(__file__).parents[1] / "kernels" / "hopper"  # of kernels elsewhere, too
SWIZZLE_BYTES = 128  # of a panel's row


@dataclass(frozen=True)
class Panels:
    """A tensor [batch, N, heads, d] that a kernel copies in boxes of 128 bytes of d x `rows` rows of one head."""

    name: str
    x: torch.Tensor
    rows: int


@dataclass(frozen=True)
class Output:
    """A float32 tensor that a kernel writes number by number: its address."""

    name: str
    x: torch.Tensor


class HopperLaunch:
    """A kernel with its block size and shared memory: ``HopperLaunch(file, entry, threads, shared, defines)(grid, …)``.

    file     the .cu file; entry: its kernel; defines: macro -> int
    threads  threads a block
    shared   bytes of dynamic shared memory
    Arguments are Panels, Outputs and ctypes structures, in the order of the kernel's parameters.
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


def _device(a):
    if isinstance(a, Panels):
        box = (1, 1, a.rows, SWIZZLE_BYTES // a.x.element_size())
        return nvrtc.TensorMap.tiled(a.x.transpose(1, 2), box, swizzle="128B")
    return a.x if isinstance(a, Output) else a


def _host(a):
    if isinstance(a, Panels):
        return emulator.TensorMap.of(a.x, a.rows)
    return ctypes.c_void_p(a.x.data_ptr()) if isinstance(a, Output) else a


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the copy engine cannot address it: gaps between columns, odd strides, expanded dimensions."""
    size = x.element_size()
    strides = [s * size for s, n in zip(x.stride()[:-1], x.shape[:-1]) if n > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)
    return x if fits else x.contiguous()
