"""Tensor maps: what the tensor copy engine (TMA) has to know of a tensor, checked and encoded.  [floor 1]

[CUDA driver API, cuTensorMapEncodeTiled; PTX ISA, Tensors]  The engine copies boxes of a tensor between global and
shared memory; elements outside the tensor read as zero and are not written.
"""

from __future__ import annotations

import ctypes

import torch

from . import library

ELEMENT = {  # CUtensorMapDataType; e4m3 travels as bytes
    torch.float8_e4m3fn: 0,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
SWIZZLE = {"none": 0, "32B": 1, "64B": 2, "128B": 3}  # CUtensorMapSwizzle
L2_PROMOTION = {"none": 0, "64B": 1, "128B": 2, "256B": 3}  # CUtensorMapL2promotion
ALIGNMENT = 64


class Opaque(ctypes.Structure):
    """CUtensorMap: 128 bytes, which a kernel takes by value, as `const __grid_constant__`, at a multiple of 64."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]
    alignment = ALIGNMENT


class TensorMap:
    """A tensor map, as an argument of a kernel.  It keeps its tensor alive."""

    def __init__(self, tensor: torch.Tensor, opaque: Opaque):
        self.tensor, self.opaque = tensor, opaque

    @classmethod
    def tiled(
        cls, tensor: torch.Tensor, box: tuple[int, ...], swizzle: str = "128B", l2_promotion: str = "256B"
    ) -> TensorMap:
        """The map of a tensor that is copied in boxes.

        tensor        float8_e4m3fn, bfloat16, float16 or float32, on CUDA; 2 to 5 dimensions, the last contiguous,
                      the strides of the others multiples of 16 bytes
        box           elements of a copy along each dimension, in the order of tensor.shape (a kernel names coordinates
                      in the opposite order, the last dimension's first)
        swizzle       'none', '32B', '64B' or '128B': how the 16-byte chunks of a box change places in shared memory;
                      the last dimension of the box has at most that many bytes
        l2_promotion  'none', '64B', '128B' or '256B': what L2 fetches at a time
        Raises ValueError or TypeError on what the engine does not take, NotFound without a GPU.
        """
        sizes, strides, box = layout(tensor, box, swizzle)
        if l2_promotion not in L2_PROMOTION:
            raise ValueError(f"l2_promotion={l2_promotion!r}: expected one of {', '.join(L2_PROMOTION)}")
        driver = library.driver()
        if not tensor.is_cuda:
            raise ValueError(f"tensor is on {tensor.device}: expected cuda")
        rank, opaque = len(sizes), _aligned()
        wide, narrow = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        driver.cuTensorMapEncodeTiled(
            ctypes.addressof(opaque), ELEMENT[tensor.dtype], rank, tensor.data_ptr(), wide(*sizes), wide(*strides),
            narrow(*box), narrow(*[1] * rank), 0, SWIZZLE[swizzle], L2_PROMOTION[l2_promotion], 0,
        )  # fmt: skip
        return cls(tensor, opaque)

    def moved_to(self, tensor: torch.Tensor) -> TensorMap:
        """The same map of another tensor, which differs in its place alone; cheaper than `tiled`.

        Raises ValueError where dtype, shape or strides differ, or where it starts at no multiple of 16 bytes.
        """
        old = self.tensor
        if tensor.dtype != old.dtype or tensor.shape != old.shape or tensor.stride() != old.stride():
            found, expected = (f"{x.dtype}, shape {tuple(x.shape)}, strides {x.stride()}" for x in (tensor, old))
            raise ValueError(f"tensor is {found}: expected {expected}, as before")
        check_start(tensor.data_ptr())
        opaque = _aligned()
        ctypes.memmove(ctypes.addressof(opaque), ctypes.addressof(self.opaque), ctypes.sizeof(Opaque))
        library.driver().cuTensorMapReplaceAddress(ctypes.addressof(opaque), tensor.data_ptr())
        return TensorMap(tensor, opaque)


def _aligned() -> Opaque:
    raw = ctypes.create_string_buffer(ctypes.sizeof(Opaque) + ALIGNMENT)
    return Opaque.from_buffer(raw, -ctypes.addressof(raw) % ALIGNMENT)


def check_start(address: int) -> None:
    if past := address % 16:
        raise ValueError(f"tensor starts {past} bytes after a multiple of 16: expected at one")


def layout(tensor: torch.Tensor, box: tuple[int, ...], swizzle: str) -> tuple[list[int], list[int], list[int]]:
    """Sizes, strides in bytes of all but the fastest dimension, and box: fastest dimension first, as the driver asks.

    Needs no GPU.  Raises ValueError or TypeError, in one line, at the first rule of the engine that is broken.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor={tensor!r}: expected a torch tensor")
    shape, size = tuple(tensor.shape), tensor.element_size()
    if tensor.dtype not in ELEMENT:
        raise ValueError(f"tensor is {tensor.dtype}: expected one of {', '.join(map(str, ELEMENT))}")
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"tensor has shape {shape}: expected 2 to 5 dimensions")
    if not all(0 < n <= 2**32 for n in shape):
        raise ValueError(f"tensor has shape {shape}: expected 1 to 2**32 elements along each dimension")
    check_start(tensor.data_ptr())
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"tensor.stride(-1) is {tensor.stride(-1)}: expected 1, its last dimension contiguous")
    strides = [tensor.stride(n) * size if shape[n] > 1 else 16 for n in range(len(shape) - 1)]  # of one, any would do
    for n, stride in enumerate(strides):
        if stride % 16 or stride >= 2**40:
            raise ValueError(f"tensor.stride({n}) is {stride} bytes: expected a multiple of 16, below 2**40")

    if swizzle not in SWIZZLE:
        raise ValueError(f"swizzle={swizzle!r}: expected one of {', '.join(SWIZZLE)}")
    box = tuple(box)
    if len(box) != len(shape):
        raise ValueError(f"box={box}: expected {len(shape)} sizes, one for each dimension of the tensor")
    if not all(type(n) is int and 1 <= n <= 256 for n in box):
        raise ValueError(f"box={box}: expected integers from 1 to 256")
    inner = box[-1] * size
    if inner % 16:
        raise ValueError(f"box={box}: its last dimension is {inner} bytes: expected a multiple of 16")
    if swizzle != "none" and inner > int(swizzle[:-1]):
        raise ValueError(f"box={box}: its last dimension is {inner} bytes: swizzle={swizzle!r} takes at most {swizzle}")
    return list(shape[::-1]), strides[::-1], list(box[::-1])
