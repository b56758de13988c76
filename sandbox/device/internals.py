"""What numba-cuda does not promise to keep: all of it comes from here, and is looked for at once.  [GPU only]"""

from __future__ import annotations

import importlib.metadata
import inspect
from contextlib import suppress

from numba import cuda


def _moved(what: str) -> ImportError:
    found = "Numba's own numba.cuda"
    if "numba_cuda" in cuda.__file__:
        with suppress(importlib.metadata.PackageNotFoundError):
            found = f"numba-cuda {importlib.metadata.version('numba-cuda')}"
    return ImportError(f'{found} {what}: expected numba-cuda 0.30, pip install "numba-cuda[cu13]==0.30.4"')


if "numba_cuda" not in cuda.__file__:
    raise _moved("was imported")
try:
    from numba.cuda import cgutils, dispatcher, types
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj
except ImportError as error:
    raise _moved(f"has something elsewhere ({error})") from None

USED = {
    arrayobj: ("make_array", "populate_array"),
    cgutils: ("get_or_insert_function", "pack_array"),
    dispatcher: ("get_current_device",),
    types: ("Array", "UniTuple", "void", "intp", "boolean", "float32", "float16", "int32", "int16", "uint32", "uint8"),
}
for module, names in USED.items():
    for name in names:
        if not hasattr(module, name):
            raise _moved(f"has no {module.__name__}.{name}")
for name in ("device", "abi", "cc", "output", "launch_bounds"):
    if name not in inspect.signature(cuda.compile).parameters:
        raise _moved(f"has no {name}= in numba.cuda.compile")

__all__ = ["arrayobj", "cgutils", "dispatcher", "intrinsic", "types"]
