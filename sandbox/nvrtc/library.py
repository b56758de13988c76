"""libnvrtc and libcuda through ctypes: where they lie, one table of prototypes, every call checked.  [floor 1]

Importing this loads neither; `nvrtc()` and `driver()` do, once.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path

from .. import target

DRIVER = "libcuda.so.1"
INVALID_VALUE, INVALID_CONTEXT = 1, 201  # CUresult

# Every function that is called, and its arguments, as nvrtc.h and cuda.h declare them; each returns 0 if all is well.
PROTOTYPES = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p)),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
    "nvrtcAddNameExpression": (c_void_p, c_char_p),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
    "nvrtcGetLoweredName": (c_void_p, c_char_p, POINTER(c_char_p)),
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cuTensorMapEncodeTiled": (
        c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32),
        POINTER(c_uint32), c_int, c_int, c_int, c_int,
    ),
    "cuTensorMapReplaceAddress": (c_void_p, c_void_p),
}  # fmt: skip


class NotFound(RuntimeError):
    """A library that is not here, or a GPU; says where it was looked for."""


class CallError(RuntimeError):
    """A call that a library refused: the function, the code's name and its meaning.  `code` is the number."""

    def __init__(self, function: str, code: int, meaning: str):
        super().__init__(function, code, meaning)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[2]}"


class Library:
    """The functions of PROTOTYPES whose name has this prefix.  They raise CallError where they do not return 0."""

    def __init__(self, path: str | Path, prefix: str, meaning: Callable[[ctypes.CDLL, int], str]):
        self.path, self._meaning = Path(path), meaning
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NotFound(f"{path} does not load: {error}") from None
        for name, arguments in PROTOTYPES.items():
            if name.startswith(prefix):
                if not hasattr(self._library, name):
                    raise NotFound(f"{path} is too old: it has no {name}")
                function = getattr(self._library, name)
                function.argtypes, function.errcheck = arguments, self._check
                setattr(self, name, function)

    def _check(self, code: int, function, arguments) -> int:
        if code:
            raise CallError(function.__name__, code, self._meaning(self._library, code))
        return code


@functools.cache
def nvrtc() -> Library:
    """libnvrtc, loaded.  Raises NotFound with the folders that it is not in."""
    path = _find("libnvrtc.so.*", ("lib", "lib64", "targets/*/lib"), "nvidia-cuda-nvrtc")
    for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))  # libnvrtc opens it by its bare name, and so finds it where it is loaded already

    def meaning(library, code):
        library.nvrtcGetErrorString.restype = c_char_p
        return library.nvrtcGetErrorString(code).decode()

    return Library(path, "nvrtc", meaning)


@functools.cache
def driver() -> Library:
    """libcuda, loaded and initialised.  Raises NotFound where there is no GPU to launch on."""
    if reason := target._why_no_gpu():
        raise NotFound(f"nvrtc compiles here, but there is no GPU to launch on: {reason}")

    def meaning(library, code):
        name, text = c_char_p(), c_char_p()
        if library.cuGetErrorName(code, ctypes.byref(name)) or library.cuGetErrorString(code, ctypes.byref(text)):
            return f"error {code}"
        return f"{name.value.decode()} ({text.value.decode()})"

    library = Library(DRIVER, "cu", meaning)
    library.cuInit(0)
    return library


@functools.cache
def headers() -> tuple[Path, ...]:
    """The folders of CUDA's own headers.  Raises NotFound with the folders that they are not in."""
    folder = _find("cuda_fp16.h", ("include", "targets/*/include"), "nvidia-cuda-runtime").parent
    return tuple(place for place in (folder, folder / "cccl") if place.is_dir())


def _find(name: str, folders: tuple[str, ...], package: str) -> Path:
    """The newest of the files of that name, in the first place that has one."""
    looked = []
    for place in _places():
        for folder in folders:
            looked.append(f"{place}/{folder}")
            if found := glob.glob(f"{place}/{folder}/{name}"):
                return Path(max(found, key=os.path.basename))
    raise NotFound(f"{name} is in none of {', '.join(looked)}: pip install {package}, or set CUDA_HOME to a toolkit")


def _places() -> list[str]:
    """Where CUDA may lie, as patterns of glob: this interpreter's packages, then the toolkit."""
    spec = importlib.util.find_spec("nvidia")
    packages = [f"{glob.escape(folder)}/*" for folder in (spec.submodule_search_locations if spec else None) or ()]
    toolkits = [glob.escape(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*packages, *toolkits, "/usr/local/cuda"]
