"""What this machine can run, why not the rest, and what would mend it.  [floor 3]

Each finding is `ok`, `none` (this machine lacks it, and works without) or `broken` (something that should work does
not; `fix` says what to do).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .cubin import cache_folder

OK, NONE, BROKEN = "ok", "none", "broken"
PACKAGES = ("numpy", "torch", "numba", "numba-cuda", "cuda-bindings", "greenlet", "hypothesis", "click", "matplotlib")
LIBRARIES = {"nvvm": "kernels to PTX", "nvJitLink": "PTX to a binary", "nvrtc": "CUDA C++ to a binary"}
TOOLS = {"ncu": "DRAM and L2 bytes", "compute-sanitizer": "check --sanitize"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str  # OK | NONE | BROKEN
    detail: str
    fix: str = ""


def findings() -> Iterator[Finding]:
    """All of them, the quick ones first."""
    yield Finding("python", OK, f"{platform.python_version()}, {sys.executable}")
    yield from packages()
    yield from target()
    yield from libraries()
    yield cache()
    yield from tools()
    yield from kernels()
    yield _smoke("compiler", NUMBA_SMOKE, "a Numba kernel to sm_90a")
    yield _smoke("nvrtc", NVRTC_SMOKE, "a CUDA C++ kernel to sm_90a")


def packages() -> Iterator[Finding]:
    """The versions there are, and what requirements.py knows to be missing, too old, or to break the rest."""
    found = []
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    yield Finding("packages", OK, ", ".join(found))
    script = Path(__file__).parents[1] / "requirements.py"
    if not script.exists():
        return
    told = _python(str(script), environment={"SANDBOX_TARGET": ""})
    for line in told.stderr.strip().splitlines() if told.returncode else []:
        what, _, fix = line.partition(": ")[2].partition(": ")
        yield Finding("packages", BROKEN, what, fix or "make setup")


def target() -> Iterator[Finding]:
    """GPU or simulator, and why."""
    import torch

    from . import target as chosen

    forced = f", as SANDBOX_TARGET={os.environ['SANDBOX_TARGET']} says" if os.environ.get("SANDBOX_TARGET") else ""
    yield Finding(
        "target", OK, {"gpu": "the GPU", "simulator": "Numba's CUDA simulator"}.get(chosen.KIND, chosen.KIND) + forced
    )
    if reason := chosen._why_no_gpu():
        yield Finding("gpu", NONE, f"{reason}: kernels run on the simulator, are counted, and not timed")
        return
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = f"{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
    yield Finding(
        "gpu", OK, f"{p.name}, sm_{p.major}{p.minor}, {memory}, CUDA {torch.version.cuda}, driver {_driver()}"
    )
    if p.major != 9:
        yield Finding("hopper", NONE, f"sm_{p.major}{p.minor}: kernels for sm_90a alone do not run here")


def libraries() -> Iterator[Finding]:
    """CUDA's compilers, and where each was found."""
    for name, use in LIBRARIES.items():
        try:
            from cuda import pathfinder

            yield Finding(name, OK, f"{pathfinder.load_nvidia_dynamic_lib(name).abs_path} ({use})")
        except Exception as error:  # the library's own exceptions are not public
            yield Finding(name, BROKEN, f"not found ({type(error).__name__}), {use}", "make setup")


def cache() -> Finding:
    """Where compiled kernels are kept."""
    folder = cache_folder()
    files = list(folder.glob("*.cubin"))
    size = sum(file.stat().st_size for file in files) / 1e6
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        detail = f"{folder} cannot be written: every process compiles anew"
        return Finding("cache", NONE, f"{detail}; SANDBOX_CACHE names another folder")
    return Finding("cache", OK, f"{folder}, {len(files)} kernels, {size:.1f} MB")


def tools() -> Iterator[Finding]:
    """NVIDIA's own tools."""
    for name, use in TOOLS.items():
        path = shutil.which(name)
        yield Finding(name, OK if path else NONE, path or f"not on the PATH: no {use}")


def kernels() -> Iterator[Finding]:
    """The kernel files that are none."""
    from . import catalog

    prototypes = len(catalog.variants()) - len(catalog.variants(prototypes=False))
    yield Finding("kernels", OK, f"{len(catalog.variants())}, {prototypes} of them prototypes")
    for file, reason in catalog.broken().items():
        yield Finding("kernels", BROKEN, f"{file.name}: {reason.strip().splitlines()[-1]}", f"mend {file}")


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout.split()[0]
    return "unknown"


# ---- does it really compile? ----------------------------------------------------------------------------------------

NUMBA_SMOKE = """
import torch, sandbox
from sandbox import catalog
from sandbox.device.launch import compiling
from sandbox.problem import Problem
from sandbox.variant import HOPPER
X = torch.empty(2, 2, device="meta")
with compiling() as done:
    catalog.find("softmax_safe").launcher(Problem(1, 1, 1, 1, 1, 1, "fp32"), None, HOPPER)(X, X)
print(f"{done[0][1].registers} registers")
"""
NVRTC_SMOKE = """
from cuda.bindings import nvrtc
def check(result):
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise SystemExit(error.name)
    return values[0] if values else None
source = b'extern "C" __global__ void smoke(float *x) { x[threadIdx.x] = 2 * x[threadIdx.x]; }'
program = check(nvrtc.nvrtcCreateProgram(source, b"smoke.cu", 0, [], []))
check(nvrtc.nvrtcCompileProgram(program, 1, [b"--gpu-architecture=sm_90a"]))
print(f"{check(nvrtc.nvrtcGetCUBINSize(program))} bytes")
"""


def _smoke(what: str, code: str, does: str) -> Finding:
    """Runs a few lines in a process of their own, which may compile whatever this one runs on."""
    begin = time.perf_counter()
    with TemporaryDirectory() as empty:
        done = _python("-c", code, environment={"SANDBOX_TARGET": "compile", "SANDBOX_CACHE": empty})
    seconds = time.perf_counter() - begin
    if done.returncode == 0:
        return Finding(what, OK, f"{does}: {done.stdout.strip()}, {seconds:.1f} s with the start of Python")
    said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
    return Finding(what, BROKEN, f"{does} fails: {said[-1]}", "make setup")


def _python(*words: str, environment: dict) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in (os.environ | environment).items() if key != "NUMBA_ENABLE_CUDASIM"}
    if not environment.get("SANDBOX_TARGET"):
        environment.pop("SANDBOX_TARGET", None)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    )
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
