"""A kernel's arguments, packed once as it lays out its parameters, each replaceable afterwards.  [floor 1: no GPU]"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch

from .tensor_map import ALIGNMENT, TensorMap

BY_VALUE = (ctypes.Structure, ctypes.Array, ctypes._SimpleCData)
CODES = {ctypes.c_void_p: "Q", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f"}  # others: their bytes


class Arguments:
    """Values in order, each at the next multiple of its own alignment, and pointers to them: what the driver takes.

    A tensor is the pointer to its first element, an int an int32, a float a float32, a TensorMap its 128 bytes; a
    value of ctypes is itself.  Raises TypeError on anything else, ValueError on an int that int32 cannot hold.
    """

    def __init__(self, values: Sequence):
        self.values = list(values)  # keeps the tensors alive
        packed = [_packed(index, value) for index, value in enumerate(self.values)]
        self.types = [type(value) for value in packed]
        self.sizes = [ctypes.sizeof(kind) for kind in self.types]
        self.offsets, end, codes = [], 0, "="
        for kind, size in zip(self.types, self.sizes):
            alignment = getattr(kind, "alignment", None) or ctypes.alignment(kind)
            self.offsets.append(-(-end // alignment) * alignment)
            codes += "x" * (self.offsets[-1] - end) + CODES.get(kind, f"{size}s")
            end = self.offsets[-1] + size
        self._all = struct.Struct(codes)
        self._memory = ctypes.create_string_buffer(end + ALIGNMENT)
        self._start = -ctypes.addressof(self._memory) % ALIGNMENT
        start = ctypes.addressof(self._memory) + self._start
        self.addresses = [start + offset for offset in self.offsets]
        self.pointers = (ctypes.c_void_p * len(packed))(*self.addresses)
        for index, value in enumerate(packed):
            self._put(index, value)

    def replace(self, index: int, value) -> None:
        """Another value of the same kind.  Raises TypeError where the kinds differ, IndexError where there is none."""
        packed, old = _packed(index, value), self.values[index]
        if type(packed) is not self.types[index]:
            raise TypeError(f"args[{index}] is a {type(value).__name__}: expected a {type(old).__name__}, as before")
        self._put(index, packed)
        self.values[index] = value

    def fill(self, numbers: Sequence) -> None:
        """All values anew, at once: pointers, ints and floats as numbers, all else as bytes.  None is kept alive."""
        self._all.pack_into(self._memory, self._start, *numbers)

    def _put(self, index: int, packed) -> None:
        ctypes.memmove(self.addresses[index], ctypes.addressof(packed), self.sizes[index])


def _packed(index: int, value):
    """The value of ctypes that a kernel gets."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, TensorMap):
        return value.opaque
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"args[{index}]={value}: expected an int32 (ctypes.c_int64 passes a wider one)")
        return ctypes.c_int32(value)
    if isinstance(value, BY_VALUE):
        return value
    kinds = "a tensor, an int, a float, a TensorMap or a value of ctypes"
    raise TypeError(f"args[{index}] is a {type(value).__name__}: expected {kinds}")
