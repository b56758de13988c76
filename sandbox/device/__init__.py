"""Tools of a kernel: tiles in shared memory and registers, their products, masks, the online softmax, the launch.

Everything a kernel file needs comes from here; the same kernel source runs on a GPU and on the simulator.
"""

import importlib

HOME = {
    "Blocks": "tiles", "Launch": "launch", "Shared": "tiles", "Softmax": "softmax", "Threads": "threads",
    "Visit": "visit", "conversions": "scalar", "device_function": "scalar", "scratch": "launch", "zeros": "launch",
}  # fmt: skip
__all__ = list(HOME)


def __getattr__(name: str):
    """Found when it is asked for: kernels in CUDA C++ do without numba, which takes half a second to import."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{HOME[name]}", __name__), name)
