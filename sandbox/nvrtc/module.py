"""A binary on a GPU: loaded once a device, its launches prepared once and then cheap.  [floor 1: GPU]

It lives in the primary context, which is torch's, and runs on torch's current stream.  Numba's launcher costs 38-103 µs
a call; here all but the stream is packed when a launch is prepared, and a call is little more than cuLaunchKernelEx.
Where every call has other tensors, `relaunch` writes all arguments anew: that is how our kernels are launched.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections.abc import Sequence

import torch

from . import library
from .arguments import Arguments
from .compile import Binary
from .tensor_map import TensorMap

THREADS, STATIC_SHARED, DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 0, 1, 8, 14  # CUfunction_attribute
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
LARGEST = {"grid": (2**31 - 1, 65_535, 65_535), "block": (1024, 1024, 64), "cluster": (16, 16, 16)}
LARGEST_BLOCK, LARGEST_CLUSTER, PORTABLE_CLUSTER = 1024, 16, 8  # threads, blocks, blocks
MOST_BLOCKS = LARGEST["grid"][0]
SYNC = os.environ.get("SANDBOX_SYNC") == "1"  # looked at once: a look costs as much as a call of the driver


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: of its 64 bytes of value a cluster's size takes 12."""

    _fields_ = [("id", ctypes.c_uint64), ("cluster", ctypes.c_uint * 3), ("rest", ctypes.c_uint * 13)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class Kernel:
    """The entry of a binary, as a function on each device where it is launched."""

    def __init__(self, binary: Binary):
        self.binary = binary
        self._lock = threading.Lock()
        self._loaded: dict[int, _Function] = {}

    def prepare(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
        args: Sequence = (),
    ) -> Launch:
        """A launch with its arguments packed, on the device of its tensors; loads the kernel there if need be.

        grid     blocks along x, y and z; block: threads; cluster: blocks that share shared memory, dividing the grid
        shared   bytes of dynamic shared memory a block, up to what the device lets a block have
        args     tensors (the pointer to the first element), ints (int32), floats (float32), TensorMaps and values of
                 ctypes; their number and sizes must be those of the kernel's parameters
        Raises ValueError or TypeError on what cannot be launched, NotFound without a GPU.
        """
        _check(grid, block, shared, cluster)
        arguments = Arguments(args)
        library.driver()
        device = _device(arguments)
        with self._lock, torch.cuda.device(device):
            _enter(device)
            if device not in self._loaded:
                self._loaded[device] = _Function(self.binary, device)
            function = self._loaded[device]
            function.allow(block, shared, cluster)
        if arguments.sizes != function.parameters:
            raise TypeError(
                f"args have {arguments.sizes} bytes: {self.binary.report.entry} takes {function.parameters}"
            )
        return Launch(function, arguments, grid, block, shared, cluster)


class Launch:
    """A prepared launch: call it.  Not to be shared by threads that launch at once, since a call sets its stream.

    It keeps its tensors alive.  A call is captured where torch captures a graph.
    """

    def __init__(self, function: _Function, arguments: Arguments, grid, block, shared: int, cluster):
        self.device = function.device
        self._function, self._arguments = function, arguments
        self._config = LaunchConfig(tuple(grid), tuple(block), shared)
        if math.prod(cluster) > 1:
            self._config.attributes = ctypes.pointer(LaunchAttribute(CLUSTER_DIMENSION, tuple(cluster)))
            self._config.attribute_count = 1
        self._call = library.driver().cuLaunchKernelEx
        self._given = ctypes.addressof(self._config), function.handle, ctypes.addressof(arguments.pointers), None
        self._stream = torch._C._cuda_getCurrentRawStream  # torch.cuda.current_stream makes an object first
        self._move = library.driver().cuTensorMapReplaceAddress

    def __call__(self) -> None:
        """Launches on torch's current stream of its device.  Raises CallError where the driver refuses."""
        if torch.cuda.current_device() == self.device:
            self._run()
        else:
            with torch.cuda.device(self.device):
                self._run()

    def relaunch(self, grid: int, numbers: Sequence, moved: Sequence[tuple[int, int]] = ()) -> None:
        """Launches so many blocks, with all arguments anew, where its device is current.

        numbers  as Arguments.fill takes them; of a tensor its address, and nothing keeps it alive
        moved    (index, address) of each tensor map that is to be another tensor's, of the same shape and strides;
                 a multiple of 16, as they all are that a map can be encoded for
        Raises ValueError on a grid that cannot be, struct.error on what a parameter cannot hold.
        """
        if not 1 <= grid <= MOST_BLOCKS:
            raise ValueError(f"grid={grid}: expected 1 to {MOST_BLOCKS} blocks")
        self._config.grid[0] = grid
        self._arguments.fill(numbers)
        move, places = self._move, self._arguments.addresses
        for index, address in moved:
            move(places[index], address)
        self._run()

    def _run(self) -> None:
        self._config.stream = self._stream(self.device)
        try:
            self._call(*self._given)
        except library.CallError as error:
            if error.code != library.INVALID_CONTEXT:
                raise
            _enter(self.device)
            self._call(*self._given)
        if SYNC:
            torch.cuda.synchronize()

    def update(self, index: int, value) -> None:
        """Replaces args[index], from the next call on, by a value of the same kind and on the same device.

        A tensor in the place of a TensorMap is one that the map moves to.  Raises TypeError or ValueError on others.
        """
        if (tensor := _tensor(value)) is not None and tensor.get_device() != self.device:
            raise ValueError(f"args[{index}] is on {tensor.device}: expected cuda:{self.device}")
        old = self._arguments.values[index]
        if isinstance(old, TensorMap) and isinstance(value, torch.Tensor):
            value = old.moved_to(value)
        self._arguments.replace(index, value)


class _Function:
    """A kernel loaded on one device, which is current."""

    def __init__(self, binary: Binary, device: int):
        self.device, self.entry = device, binary.report.entry
        self.handle, module, self._allowed = ctypes.c_void_p(), ctypes.c_void_p(), 0
        driver, properties = library.driver(), torch.cuda.get_device_properties(device)
        try:
            driver.cuModuleLoadData(module, binary.cubin)
        except library.CallError as error:
            where = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
            raise RuntimeError(f"{self.entry}, compiled for {binary.arch}, does not load on {where}: {error}") from None
        driver.cuModuleGetFunction(self.handle, module, self.entry.encode())
        self.parameters = self._parameters()
        self._threads = self._attribute(THREADS)
        self._shared = properties.shared_memory_per_block_optin - self._attribute(STATIC_SHARED)

    def _parameters(self) -> list[int]:
        """Bytes of each parameter."""
        sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
        while True:
            try:
                library.driver().cuFuncGetParamInfo(self.handle, len(sizes), offset, size)
            except library.CallError as error:
                if error.code != library.INVALID_VALUE:
                    raise
                return sizes  # there is no such parameter
            sizes.append(size.value)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        library.driver().cuFuncGetAttribute(value, which, self.handle)
        return value.value

    def allow(self, block, shared: int, cluster) -> None:
        """Lifts the driver's default limits for a launch.  Raises ValueError where the kernel or device has less."""
        if math.prod(block) > self._threads:
            raise ValueError(f"block={block}: {self.entry} has registers for {self._threads} threads")
        if shared > self._shared:
            raise ValueError(f"shared={shared}: {self.entry} can have {self._shared} bytes on this device")
        if shared > self._allowed:
            library.driver().cuFuncSetAttribute(self.handle, DYNAMIC_SHARED, shared)
            self._allowed = shared
        if math.prod(cluster) > PORTABLE_CLUSTER:
            library.driver().cuFuncSetAttribute(self.handle, NON_PORTABLE_CLUSTER, 1)


def _check(grid, block, shared: int, cluster) -> None:
    """Raises ValueError on a launch that no device takes."""
    for name, sizes in ("grid", grid), ("block", block), ("cluster", cluster):
        most = LARGEST[name]
        three = isinstance(sizes, Sequence) and len(sizes) == 3
        if not three or not all(type(n) is int and 1 <= n <= top for n, top in zip(sizes, most)):
            raise ValueError(f"{name}={sizes}: expected three integers, from 1 to {', '.join(map(str, most))}")
    if math.prod(block) > LARGEST_BLOCK:
        raise ValueError(f"block={block}: expected at most {LARGEST_BLOCK} threads")
    if math.prod(cluster) > LARGEST_CLUSTER or any(n % c for n, c in zip(grid, cluster)):
        raise ValueError(f"cluster={cluster}: expected at most {LARGEST_CLUSTER} blocks, dividing grid={grid}")
    if type(shared) is not int or shared < 0:
        raise ValueError(f"shared={shared!r}: expected a number of bytes")


def _tensor(value) -> torch.Tensor | None:
    return value.tensor if isinstance(value, TensorMap) else value if isinstance(value, torch.Tensor) else None


def _device(arguments: Arguments) -> int:
    """The one CUDA device of all tensors, the current one where there are none."""
    devices = {n: tensor.device for n, value in enumerate(arguments.values) if (tensor := _tensor(value)) is not None}
    first = next(iter(devices.values()), None)
    for n, device in devices.items():
        if device.type != "cuda" or device != first:
            raise ValueError(f"args[{n}] is on {device}: expected all tensors on one CUDA device")
    return torch.cuda.current_device() if first is None else first.index


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The device's primary context, which is torch's."""
    driver, handle, context = library.driver(), ctypes.c_int(), ctypes.c_void_p()
    driver.cuDeviceGet(handle, device)
    driver.cuDevicePrimaryCtxRetain(context, handle)
    return context


def _enter(device: int) -> None:
    """Makes that context current to this thread, which may not have called CUDA before."""
    library.driver().cuCtxSetCurrent(_context(device))
