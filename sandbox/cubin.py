"""Compiled kernels on disk, and what ptxas says of them; for whoever compiles, Numba or NVRTC.  [floor 1: no numba]

A file is one line of JSON, the report and a hash of the rest, and then the cubin.  Files appear by atomic rename, so
processes need not wait for one another; a broken one reads as none, and where the folder cannot be written nothing is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel: registers a thread, bytes of stack and of spills a thread."""

    entry: str
    registers: int
    stack: int
    spills: int

    @classmethod
    def of(cls, entry: str, log: str) -> Report | None:
        """The report of one kernel, from the log of a verbose ptxas; None where it has none.

        Functions that the kernel calls have stack and spills of their own: they are added.  Where a cache of
        nvJitLink's spared it ptxas, the log is a linker's: all local memory beyond the stack counts as spills.
        """
        linked = re.search(rf"'{re.escape(entry)}':\n.*used (\d+) registers,.* (\d+) stack,.* (\d+) bytes lmem", log)
        if linked and "entry function" not in log:
            registers, stack, local = map(int, linked.groups())
            return cls(entry, registers, stack, max(0, local - stack))
        part = log.partition(f"entry function '{entry}'")[2].partition("entry function '")[0]
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not memory or registers is None:
            return None
        stack, stores, loads = (sum(map(int, column)) for column in zip(*memory))
        return cls(entry, int(registers.group(1)), stack, stores + loads)


def cache_folder() -> Path:
    """What SANDBOX_CACHE names, or ~/.cache/sandbox."""
    return Path(os.environ.get("SANDBOX_CACHE") or Path.home() / ".cache" / "sandbox")


def file_of(name: str, key: tuple) -> Path:
    """Where a kernel is kept.  The key's repr holds all that decides what it compiles to."""
    return cache_folder() / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.cubin"


class Missing(LookupError):
    """A kernel that is not in the cache, where nothing is to be compiled."""


_only_kept = ContextVar("only_kept", default=False)


@contextmanager
def only_kept():
    """Inside, a kernel that is not in the cache raises Missing, and is not compiled."""
    token = _only_kept.set(True)
    try:
        yield
    finally:
        _only_kept.reset(token)


def read(file: Path) -> tuple[bytes, Report] | None:
    """The cubin and its report; None where there is no such file, or a broken one.  Raises Missing inside only_kept."""
    try:
        header, _, cubin = file.read_bytes().partition(b"\n")
        header = json.loads(header)
        if header.pop("sha256") == hashlib.sha256(cubin).hexdigest():
            return cubin, Report(**header)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if _only_kept.get():
        raise Missing(file.name)
    return None


def adopt(folder: Path) -> None:
    """The kernels of another folder are in the cache, too."""
    for file in Path(folder).glob("*.cubin"):
        if (kept := read(file)) is not None:
            write(cache_folder() / file.name, *kept)


def write(file: Path, cubin: bytes, report: Report) -> None:
    """The file appears, or changes, at one instant; or not at all, where it cannot."""
    header = json.dumps({**asdict(report), "sha256": hashlib.sha256(cubin).hexdigest()})
    appear(file, header.encode() + b"\n" + cubin)


def appear(file: Path, content: bytes) -> None:
    """As `write`, whatever it is."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as draft:
            draft.write(content)
        os.replace(draft.name, file)
    except OSError:
        pass  # a read-only folder: found out again in the next process
