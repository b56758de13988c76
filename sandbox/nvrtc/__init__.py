"""CUDA C++ files, compiled and launched beside torch: `compile`, `Kernel`, `TensorMap`.  [floor 1: no numba]

    binary = nvrtc.compile(path, "saxpy", {"BLOCK": 256})
    launch = nvrtc.Kernel(binary).prepare(grid=(n // 256, 1, 1), block=(256, 1, 1), args=[x, y, 2.0, n])
    launch()

Importing it loads no library and needs no GPU; compiling needs libnvrtc alone.
"""

from .compile import Binary, CompileError, Spills, compile
from .library import CallError, NotFound
from .module import Kernel, Launch
from .tensor_map import TensorMap

__all__ = ["Binary", "CallError", "CompileError", "Kernel", "Launch", "NotFound", "Spills", "TensorMap", "compile"]
