"""From a CUDA C++ file to a cubin and ptxas's report, kept on disk.  [floor 1: no GPU, no driver]

The file and what it includes in quotes are read once, and NVRTC gets those very texts: nothing is compiled that the
key does not cover.  The key also holds the entry, the defines, the options, which NVRTC there is, and which of CUDA's
own headers, where one is included.  What ptxas only mentions in its log is an error here: spills, a stack, and what it
calls a potential performance loss (a `setmaxnreg` that it ignored, `wgmma` that it serialised).
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cubin import Report, file_of, read, write
from . import library

FLAGS = (  # NVRTC's own cache, where there is a driver, keeps no log
    "--std=c++17", "--device-as-default-execution-space", "--no-source-include", "--no-cache", "--ptxas-options=-v",
)  # fmt: skip
UNSEEN = ("-I", "--include-path", "-include", "--pre-include")  # options that bring in files which no key covers
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
ELSEWHERE = re.compile(r'^[ \t]*#[ \t]*include\b[ \t]*[^" \t]', re.MULTILINE)  # one of CUDA's headers, or a macro
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
LOSS = re.compile(r"Potential Performance Loss: (.*)")

_locks: dict[Path, threading.Lock] = {}


class CompileError(ValueError):
    """A kernel that does not compile, or not well: why in the first line, then NVRTC's log, then its options."""


class Spills(CompileError):
    """One that does not stay in registers: with a smaller tile it may."""


@dataclass(frozen=True)
class Binary:
    """A cubin, ptxas's report of its entry, and the architecture that it is for."""

    cubin: bytes
    report: Report
    arch: str


def compile(
    path: Path, entry: str, defines: dict[str, int | str], *, arch: str = "sm_90a", options: Sequence[str] = (),
    folders: Sequence[Path] = (),
) -> Binary:  # fmt: skip
    """The binary of a kernel, from the cache or compiled now.

    path     a .cu file; what it includes in quotes is named as seen from its folder, or from one of `folders`
    entry    the kernel: its name, or a template with its arguments, `gemm<64, true>`
    defines  macro -> value; the source must use each one (CUDA's headers break on macros of one letter: d, T)
    options  more options of NVRTC
    Raises Spills where it spills or has a stack, CompileError where it does not compile or loses speed by ptxas's own
    word; ValueError or TypeError on arguments that cannot be, NotFound without libnvrtc or CUDA's headers, and OSError
    without the file.
    """
    path = Path(path)
    sources = _sources(path, folders)
    command = (f"--gpu-architecture={arch}", *FLAGS, *_macros(path, sources, defines), *options)
    _check(entry, arch, options)
    headers = _headers() if any(map(ELSEWHERE.search, sources.values())) else None
    file = file_of(re.sub(r"\W+", "_", entry), (sources, entry, command, _version(), headers))
    with _locks.setdefault(file, threading.Lock()):
        if (kept := read(file)) is None:
            kept = _compile(path.name, sources, entry, command)
            write(file, *kept)
        return Binary(*kept, arch)


def _sources(path: Path, folders: Sequence[Path]) -> dict[str, str]:
    """The file first, then all that it includes in quotes, by the names that they are included by."""
    found, wanted = {}, [path.name]
    while wanted:
        name = wanted.pop()
        beside, *others = (folder / name for folder in (path.parent, *folders))
        file = next((other for other in others if not beside.is_file() and other.is_file()), beside)
        if name not in found and (file.is_file() or not found):
            found[name] = file.read_text(encoding="utf-8")
            wanted += INCLUDE.findall(found[name])
    return found


def _macros(path: Path, sources: dict[str, str], defines: dict[str, int | str]) -> list[str]:
    words = {word for text in sources.values() for word in re.findall(r"\w+", COMMENT.sub("", text))}
    macros = []
    for name, value in defines.items():
        if not isinstance(value, (int, str)):
            raise TypeError(f"defines={{{name!r}: {value!r}}}: expected an int or a str")
        if name not in words:
            near = difflib.get_close_matches(name, words, n=2, cutoff=0.5)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"defines={{{name!r}: {value!r}}}: {path.name} does not use {name}{hint}")
        macros.append(f"-D{name}={int(value) if isinstance(value, bool) else value}")
    return macros


def _check(entry: str, arch: str, options: Sequence[str]) -> None:
    if not re.match(r"\w", entry):
        raise ValueError(f"entry={entry!r}: expected the name of a kernel")
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ValueError(f"arch={arch!r}: expected an architecture of machine code, such as 'sm_90a'")
    if isinstance(options, str):
        raise TypeError(f"options={options!r}: expected a tuple of options")
    for option in options:
        if option.startswith(UNSEEN):
            raise ValueError(f"options={option!r}: expected headers beside the source, where the key covers them")


@functools.cache
def _version() -> tuple[int, int, int]:
    """Which NVRTC there is: releases of one version differ in size."""
    nvrtc, major, minor = library.nvrtc(), ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(major, minor)
    return major.value, minor.value, nvrtc.path.stat().st_size


@functools.cache
def _headers() -> str:
    """Which of CUDA's headers there are: a digest of their content, which on a cold disk takes a tenth of a second."""
    cuda, *cccl = library.headers()
    digest = hashlib.sha256()
    for file in [*sorted(cuda.glob("*.h*")), *(folder / "cuda/std/__cccl/version.h" for folder in cccl)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compile(name: str, sources: dict[str, str], entry: str, command: Sequence[str]) -> tuple[bytes, Report]:
    nvrtc = library.nvrtc()
    source, *texts = sources.values()
    flags = [*command, *(f"-I{folder}" for folder in library.headers())]
    program, lowered, failure = ctypes.c_void_p(), ctypes.c_char_p(), None
    nvrtc.nvrtcCreateProgram(program, source.encode(), name.encode(), len(texts), _array(texts), _array([*sources][1:]))
    try:
        nvrtc.nvrtcAddNameExpression(program, entry.encode())
        try:
            nvrtc.nvrtcCompileProgram(program, len(flags), _array(flags))
        except library.CallError as error:
            failure = error
        log = (
            _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            .rstrip(b"\0 \n")
            .decode(errors="replace")
        )
        if failure:
            raise _error(_why(name, sources, entry, log, failure), log, flags)
        nvrtc.nvrtcGetLoweredName(program, entry.encode(), lowered)
        symbol = lowered.value.decode()
        cubin = _text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if (report := Report.of(symbol, log)) is None:
        raise _error(f"{name}: ptxas does not report on {entry}", log, flags)
    if report.spills or report.stack:
        found = f"{report.spills} bytes of spills and {report.stack} of stack a thread, {report.registers} registers"
        raise _error(f"{name}: {entry} has {found}: expected neither spills nor a stack", log, flags, Spills)
    if losses := LOSS.findall(log):
        raise _error(f"{name}: {entry}: {'; '.join(losses)}", log, flags)
    return cubin, report


def _error(why: str, log: str, flags: Sequence[str], kind: type[CompileError] = CompileError) -> CompileError:
    return kind(f"{why}\n{log}\n{library.nvrtc().path}: {' '.join(flags)}")


def _why(name: str, sources: dict[str, str], entry: str, log: str, failure: library.CallError) -> str:
    heads = [head for text in sources.values() for head in re.findall(r"__global__([^;{]*)", COMMENT.sub("", text))]
    kernels = {word for head in heads for word in re.findall(r"(\w+)\s*\(", head) if not word.startswith("__")}
    if "__nv_name_map" in log and re.findall(r"\w+", entry.partition("<")[0])[-1] not in kernels:
        return f"{name}: entry={entry!r} is none of its kernels: {', '.join(sorted(kernels)) or 'it has none'}"
    return f"{name}: {entry} does not compile ({failure})"


def _array(texts: Sequence[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _text(program: ctypes.c_void_p, size_of, get) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, size)
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw
