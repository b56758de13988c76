"""Hopper kernels in CUDA C++ on a CPU: a .cu file as a shared library of this machine.  [floor 1: no GPU, no numba]

What `emulated.h` models, and what it does not, stands at its head.  A C++ compiler (g++ or clang++) is needed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cubin import cache_folder

HERE = Path(__file__).parent
SHARED_BYTES = 232_448  # what a block of Hopper may have


class EmulatorError(RuntimeError):
    """A defect of the kernel that the emulator saw, or no compiler to emulate it with."""


class TensorMap(ctypes.Structure):
    """A tensor [batch, rows, heads, columns] and the panel of it that one copy moves: `width` bytes x `rows` rows.

    Stands in for the driver's tensor map of the dimensions (columns, rows, heads, batch); counts elements as they move.
    """

    _fields_ = [
        ("data", ctypes.c_void_p), ("size", ctypes.c_uint64 * 4), ("stride", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint64 * 4), ("element", ctypes.c_uint64), ("_moved", ctypes.c_void_p),
        ("unused", ctypes.c_uint64),
    ]  # fmt: skip

    @classmethod
    def of(cls, x: torch.Tensor, rows: int, width: int = 128) -> TensorMap:
        element, order = x.element_size(), (3, 1, 2, 0)
        made = cls(
            x.data_ptr(), tuple(x.shape[i] for i in order), tuple(x.stride(i) * element for i in order),
            (width // element, rows, 1, 1), element,
        )  # fmt: skip
        made.moved = (ctypes.c_uint64 * 2)()  # elements read, elements written
        made._moved = ctypes.addressof(made.moved)
        return made


def compiler() -> str | None:
    """The C++ compiler that is used, or None where there is none."""
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


@functools.cache
def library(kernel: Path, entry: str, defines: tuple[tuple[str, int], ...], headers: Path | None = None) -> ctypes.CDLL:
    """The kernel `entry` of a .cu file for these defines, compiled or from the cache.

    headers  the folder of those that are not beside the file

    Raises EmulatorError, with the compiler's words, where it does not compile or there is no compiler.
    """
    if compiler() is None:
        raise EmulatorError(
            "no C++ compiler on the PATH to emulate Hopper kernels with: install g++ (Debian: apt install g++)"
        )
    words = [f"-D{name}={value}" for name, value in (("ENTRY", entry), *defines)]
    words += [f'-DKERNEL="{kernel.name}"', "-DEMULATED", "-std=c++17", "-O1", "-w", "-fPIC", "-shared"]
    digest = hashlib.sha256(repr((words, compiler())).encode())
    folders = list(dict.fromkeys([kernel.parent, headers or kernel.parent, HERE]))
    for file in sorted(
        {kernel, *(file for folder in folders for file in folder.glob("*.[hc]*") if file.suffix != ".cu")}
    ):
        digest.update(file.name.encode() + file.read_bytes())
    folder = cache_folder()
    path = folder / f"{entry}-{digest.hexdigest()[:24]}.so"
    with tempfile.TemporaryDirectory() as scratch:
        if not path.exists():
            made = Path(scratch) / path.name
            command = [compiler(), *words, *(f"-I{folder}" for folder in folders), "-o", str(made)]
            command.append(str(HERE / "launch.cc"))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise EmulatorError(f"{kernel.name} does not compile for the emulator:\n{done.stderr.strip()}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f".{path.name}.{os.getpid()}")
                shutil.copy(made, draft)
                os.replace(draft, path)
            except OSError:  # a read-only folder: compiled again in the next process
                path = made
        return ctypes.CDLL(str(path))


def launch(
    library: ctypes.CDLL, grid: int, threads: int, arguments: Sequence, *, shared: int = SHARED_BYTES,
    late_arrivals: bool = True, late_readers: bool = False, seed: int = 0,
) -> int:  # fmt: skip
    """Runs the kernel on `grid` blocks, one after another.  arguments: ctypes objects, one for each parameter.

    shared         bytes of dynamic shared memory
    late_arrivals  copies in happen at the last moment, or else at once
    late_readers   products and copies out happen at the last moment, or else at once
    seed           of the order in which threads run; 0 is their own
    Returns how many numbers it stored past the tensor maps.
    Raises EmulatorError for a deadlock, a use of memory that is not there, work that was never waited for.
    """
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    error, stored = ctypes.create_string_buffer(4096), ctypes.c_uint64()
    if library.launch(
        grid, threads, shared, pointers, int(late_arrivals), int(late_readers), seed, ctypes.byref(stored), error,
        len(error),
    ):  # fmt: skip
        raise EmulatorError(error.value.decode())
    return stored.value
