"""GPU or simulator: decided once, when sandbox is imported, before anything imports numba.

``SANDBOX_TARGET`` forces it: ``gpu``, ``simulator``, or ``compile`` (for sm_90a, with no GPU; launches nothing).
"""

from __future__ import annotations

import functools
import os
import sys

import torch

from .variant import SIMULATOR, Device

KINDS = ("gpu", "simulator", "compile")
_forced = os.environ.get("SANDBOX_TARGET") or None


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        built = "torch has no CUDA" if torch.version.cuda is None else "torch finds no usable CUDA driver or device"
        return f"{built} (torch {torch.__version__})"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}, below sm_80"
    return None


def _decide() -> str:
    if _forced is None:
        return "simulator" if _why_no_gpu() else "gpu"
    if _forced not in KINDS:
        raise ValueError(f"SANDBOX_TARGET={_forced!r}: expected one of {', '.join(KINDS)}")
    if _forced == "gpu" and (reason := _why_no_gpu()):
        raise RuntimeError(f"SANDBOX_TARGET=gpu, but {reason}: unset it to run on the simulator")
    return _forced


KIND = _decide()
SIMULATED = KIND == "simulator"

if SIMULATED:
    if "numba.cuda" in sys.modules and os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
        raise RuntimeError("numba.cuda was imported before sandbox chose its simulator: import sandbox first")
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()
elif os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    raise RuntimeError(f"NUMBA_ENABLE_CUDASIM=1 contradicts target {KIND!r}: unset it or set SANDBOX_TARGET=simulator")


@functools.cache
def _announce() -> None:
    if _forced is None:
        print(f"sandbox: {_why_no_gpu()}: running on Numba's CUDA simulator, small and exact", file=sys.stderr)
        os.environ["SANDBOX_TARGET"] = "simulator"  # a child process need not say it again


def device() -> Device:
    """The device that kernels run on: the current CUDA device, or the simulator (said once, in one line)."""
    if SIMULATED:
        _announce()
        return SIMULATOR
    if KIND == "compile":
        raise RuntimeError("SANDBOX_TARGET=compile launches nothing: unset it to run kernels")
    return _gpu(torch.cuda.current_device())


@functools.cache
def _gpu(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(
        p.name, "gpu", p.multi_processor_count, p.shared_memory_per_block_optin, registers=255, threads=1024,
        capability=(p.major, p.minor),
    )  # fmt: skip


def torch_device() -> torch.device:
    """Where tensors for kernels live: cuda, or cpu on the simulator."""
    return torch.device("cuda" if KIND == "gpu" else "cpu")
