"""From a Python kernel to an sm_90a binary, with or without a GPU, kept on disk.

Numba's public compiler gives PTX, nvJitLink a cubin and ptxas's report.  cubin.py keeps them under a key that covers
the code of the kernel and of all it calls, their constants, the argument types and the compiler's versions, so an
edited kernel or another tile never meets an old binary.
"""

from __future__ import annotations

import dis
import functools
import gc
import importlib.metadata
import re
import threading
import types as python_types
from contextlib import contextmanager

import numpy as np
import torch
from cuda.bindings import nvjitlink
from numba import cuda

from ..cubin import Report, file_of, read, write
from ..nvrtc import Binary
from .internals import dispatcher, types

_lock = threading.RLock()
_ELEMENT = {
    torch.float32: types.float32,
    torch.float16: types.float16,
    torch.bfloat16: types.int16,
    torch.bool: types.uint8,
    torch.uint8: types.uint8,
    torch.int32: types.int32,
}


def signature(args) -> tuple:
    """The Numba types of these arguments.  Arrays are always strided, so strides never ask for another binary."""
    return tuple(
        types.Array(_ELEMENT[a.dtype], a.ndim, "A") if isinstance(a, torch.Tensor)
        else types.float32 if isinstance(a, float) else types.int32
        for a in args
    )  # fmt: skip


capability = 9, 0  # of the GPU that is compiled for where none is seen


def architecture() -> str:
    """Of torch's current GPU; where none is seen, of `capability`."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else capability
    return f"sm_{major}{minor}" + "a" * (major == 9)


def kernel(function, argument_types: tuple, threads: int, blocks: int = 1) -> Binary:
    """The binary of a kernel for these argument types, threads a block and blocks a multiprocessor, from the cache or
    compiled now."""
    arch, bounds = architecture(), (threads, blocks) if blocks > 1 else threads
    file = file_of(function.__name__, (_fingerprint(function), argument_types, bounds, arch, _versions()))
    with _lock:
        if (kept := read(file)) is not None:
            return Binary(*kept, arch)
        binary = _compile(function, argument_types, bounds, arch)
        write(file, binary.cubin, binary.report)
        return binary


def _compile(function, argument_types, bounds, arch) -> Binary:
    _compile_without_gpu()
    cc = tuple(int(x) for x in re.match(r"sm_(\d+)(\d)", arch).groups()) + (("a",) if arch.endswith("a") else ())
    with _uncollected():
        ptx, _ = cuda.compile(
            function, types.void(*argument_types), device=False, abi="numba", cc=cc, output="ptx", launch_bounds=bounds
        )
    entry = re.search(r"\.entry (\S+)\(", ptx).group(1)
    source = ptx.encode()
    handle = nvjitlink.create(4, [f"-arch={arch}", "-O3", "-verbose", "-no-cache"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), function.__name__)
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    log = log.decode(errors="replace")
    if (report := Report.of(entry, log)) is None:
        raise RuntimeError(f"nvJitLink compiled {function.__name__} without reporting on it; its log: {log!r}")
    return Binary(bytes(cubin), report, arch)


@contextmanager
def _uncollected():
    """Without the garbage collector: Numba makes so many objects that it takes a quarter of a compilation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def _compile_without_gpu() -> None:
    """numba-cuda asks for the current device to type a call of a device function: `capability` answers."""
    if not torch.cuda.is_available():
        dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=capability)


def warm_up() -> None:
    """Compiles something small and throws it away: the first kernel of a process takes half a second more."""

    def kernel(X):
        X[cuda.grid(1)] = 0.0

    _compile(kernel, (types.Array(types.float32, 1, "A"),), 32, architecture())


@functools.cache
def _versions() -> tuple:
    names = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink", "cuda-bindings")
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, None))
    return tuple(found)


def _fingerprint(x):
    """All that decides what a function compiles to: its code, its constants, and the same of all it calls."""
    if hasattr(x, "fingerprint"):
        return x.fingerprint
    function = getattr(x, "py_func", x)
    if isinstance(function, python_types.FunctionType):
        code = function.__code__
        loaded = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        used = [c.cell_contents for c in function.__closure__ or ()]
        used += [function.__globals__[name] for name in sorted(loaded & set(function.__globals__))]
        consts = repr([c for c in code.co_consts if not isinstance(c, python_types.CodeType)])
        return code.co_code.hex(), consts, code.co_names, code.co_freevars, [_fingerprint(v) for v in used]
    if isinstance(x, python_types.ModuleType):
        return x.__name__
    if isinstance(x, (int, float, str, tuple, type(None), np.generic, types.Type)):
        return repr(x)
    return getattr(x, "__qualname__", None) or repr(type(x))
