"""Arguments and tensor maps, and what a launch hands to the driver: no GPU needed.

The driver is driver.c, compiled against NVIDIA's own cuda.h, so that prototypes, structures and constants are held
against the original; it keeps what it is given.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
import torch
from cuda_driver import OnCuda, driver_file_fixture, fake_fixture, number, on_cuda, takes  # noqa: F401
from cuda_sources import cache_fixture, microseconds, saxpy_fixture, unloaded_fixture  # noqa: F401

from sandbox import nvrtc
from sandbox.nvrtc import library, module, tensor_map
from sandbox.nvrtc.arguments import Arguments

# ---- arguments ------------------------------------------------------------------------------------------------------


class Shape(ctypes.Structure):
    _fields_ = [("N", ctypes.c_int), ("scale", ctypes.c_float), ("rows", ctypes.c_int64)]


def map_of(tensor, number: int = 7) -> nvrtc.TensorMap:
    """A map that no driver has seen: 128 bytes of the same."""
    return nvrtc.TensorMap(tensor, tensor_map.Opaque.from_buffer_copy(bytes([number] * 128)))


def packed(arguments: Arguments) -> list[bytes]:
    """What the driver reads through the pointers."""
    return [ctypes.string_at(p, size) for p, size in zip(arguments.pointers, arguments.sizes)]


def test_arguments_lie_where_the_kernel_has_them():
    x = torch.zeros(4)
    shape = Shape(5, 0.5, 6)
    arguments = Arguments([3, x, -1.5, map_of(x), ctypes.c_int8(-2), shape, 4])
    assert arguments.sizes == [4, 8, 4, 128, 1, 16, 4]
    assert arguments.offsets == [0, 8, 16, 64, 192, 200, 216]
    assert packed(arguments) == [
        struct.pack("<i", 3), struct.pack("<Q", x.data_ptr()), struct.pack("<f", -1.5), bytes([7] * 128),
        struct.pack("<b", -2), struct.pack("<ifq", 5, 0.5, 6), struct.pack("<i", 4),
    ]  # fmt: skip
    assert [p - arguments.pointers[0] for p in arguments.pointers] == arguments.offsets
    assert arguments.pointers[3] % 64 == 0


def test_an_argument_is_replaced():
    x, y = torch.zeros(4), torch.zeros(4)
    arguments = Arguments([x, 3, map_of(x)])
    before = packed(arguments)
    arguments.replace(0, y)
    arguments.replace(2, map_of(y, 9))
    assert packed(arguments) == [struct.pack("<Q", y.data_ptr()), before[1], bytes([9] * 128)]
    assert arguments.values[0] is y  # it lives on
    with pytest.raises(TypeError, match=r"args\[1\] is a float: expected a int, as before"):
        arguments.replace(1, 3.0)
    with pytest.raises(IndexError):
        arguments.replace(3, 3)
    assert packed(arguments)[1] == before[1]


def test_no_arguments():
    assert list(Arguments([]).pointers) == []


@pytest.mark.parametrize(
    "value, error, told",
    [
        (2**31, ValueError, r"args\[1\]=2147483648: expected an int32"),
        (-(2**31) - 1, ValueError, "expected an int32"),
        (True, TypeError, r"args\[1\] is a bool: expected a tensor, an int, a float, a TensorMap or a value of ctypes"),
        (None, TypeError, "is a NoneType"),
        (np.float32(1), TypeError, "is a float32"),
        ("x", TypeError, "is a str"),
    ],
)
def test_what_is_no_argument(value, error, told):
    with pytest.raises(error, match=told):
        Arguments([0, value])


# ---- tensor maps: the rules that are checked without a driver -------------------------------------------------------


def test_the_layout_of_a_map():
    Q = torch.empty(2, 1024, 8, 128, dtype=torch.bfloat16).transpose(1, 2)  # [batch, heads, N, d]
    assert tensor_map.layout(Q, (1, 1, 64, 32), "64B") == (
        [128, 1024, 8, 2], [2048, 256, 1024 * 2048], [32, 64, 1, 1],
    )  # fmt: skip
    one = torch.empty(1, 5, 16)[:, :, :8]  # a dimension of one element has no stride to speak of
    assert tensor_map.layout(one, (1, 5, 8), "32B") == ([8, 5, 1], [64, 16], [8, 5, 1])


def ragged(*shape, start=0, dtype=torch.float16, pad=0):
    """A tensor that starts some elements after a multiple of 16 bytes, its rows padded."""
    rows = torch.empty(64 + torch.Size(shape[:-1]).numel() * (shape[-1] + pad), dtype=dtype)
    skip = -rows.data_ptr() % 16 // rows.element_size() + start
    return rows[skip:][: torch.Size(shape[:-1]).numel() * (shape[-1] + pad)].view(*shape[:-1], -1)[..., : shape[-1]]


@pytest.mark.parametrize(
    "tensor, changed, told",
    [
        (ragged(8, 64, dtype=torch.float64), {}, "tensor is torch.float64: expected one of torch.float8_e4m3fn"),
        (ragged(64), {}, r"tensor has shape \(64,\): expected 2 to 5 dimensions"),
        (torch.empty(1, 1, 1, 1, 1, 64), {}, r"expected 2 to 5 dimensions"),
        (torch.empty(0, 64), {}, r"tensor has shape \(0, 64\): expected 1 to"),
        (ragged(8, 64, start=3), {}, "tensor starts 6 bytes after a multiple of 16"),
        (torch.empty(64, 64).T, {}, r"tensor.stride\(-1\) is 64: expected 1"),
        (ragged(8, 64, pad=4), {}, r"tensor.stride\(0\) is 136 bytes: expected a multiple of 16, below 2\*\*40"),
        (torch.empty(2, 64, device="meta").expand(2, 64).as_strided((2, 64), (2**39, 1)), {}, "multiple of 16, below"),
        (ragged(8, 64), {"swizzle": "256B"}, "swizzle='256B': expected one of none, 32B, 64B, 128B"),
        (ragged(8, 64), {"box": (8,)}, r"box=\(8,\): expected 2 sizes"),
        (ragged(8, 64), {"box": (257, 64)}, r"box=\(257, 64\): expected integers from 1 to 256"),
        (ragged(8, 64), {"box": (0, 64)}, "expected integers from 1 to 256"),
        (ragged(8, 64), {"box": (8.0, 64)}, "expected integers from 1 to 256"),
        (ragged(8, 64), {"box": (8, 12)}, "its last dimension is 24 bytes: expected a multiple of 16"),
        (ragged(8, 64), {"box": (8, 64), "swizzle": "64B"}, "is 128 bytes: swizzle='64B' takes at most 64B"),
        (ragged(8, 128), {"box": (8, 72)}, "is 144 bytes: swizzle='128B' takes at most 128B"),
        (ragged(8, 64), {"l2_promotion": "512B"}, "l2_promotion='512B': expected one of none, 64B, 128B, 256B"),
        ("x", {}, "tensor='x': expected a torch tensor"),
    ],
)
def test_the_rules_of_a_map(tensor, changed, told):
    with pytest.raises((TypeError, ValueError), match=told) as caught:
        nvrtc.TensorMap.tiled(tensor, **{"box": (8, 64)} | changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("swizzle, most", [("32B", 16), ("64B", 32), ("128B", 64), ("none", 256)])
@pytest.mark.parametrize("dtype", tensor_map.ELEMENT)
def test_the_widest_box(dtype, swizzle, most):
    most = 256 if swizzle == "none" else most * 2 // dtype.itemsize
    tensor = torch.empty(256, 512, dtype=dtype)
    assert tensor_map.layout(tensor, (256, most), swizzle)[2] == [most, 256]
    with pytest.raises(ValueError, match="box="):
        tensor_map.layout(tensor, (256, most + 16 // dtype.itemsize), swizzle)


# ---- launches, on a driver made of C --------------------------------------------------------------------------------


class Map(ctypes.Structure):
    """What the driver of C keeps of the last map."""

    _fields_ = [
        ("start", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 5), ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint * 5), ("steps", ctypes.c_uint * 5), ("rank", ctypes.c_uint), ("type", ctypes.c_uint),
        ("modes", ctypes.c_uint * 4),
    ]  # fmt: skip


@pytest.fixture
def kernel(fake, saxpy, cache):
    takes(fake, 8, 8, 4, 4)
    return nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))


def test_structures_and_constants_are_those_of_cuda_h(fake):
    assert ctypes.sizeof(module.LaunchConfig) == number(fake, "config_bytes").value
    assert ctypes.sizeof(module.LaunchAttribute) == number(fake, "attribute_bytes").value
    ours = [
        module.THREADS, module.STATIC_SHARED, module.DYNAMIC_SHARED, module.NON_PORTABLE_CLUSTER,
        module.CLUSTER_DIMENSION, library.INVALID_VALUE, library.INVALID_CONTEXT, *tensor_map.ELEMENT.values(),
        *tensor_map.SWIZZLE.values(), *tensor_map.L2_PROMOTION.values(), -1,
    ]  # fmt: skip
    assert ours == list(number(fake, "constants", ctypes.c_int * len(ours)))


def test_what_the_driver_is_given(fake, kernel):
    x, y = on_cuda(8), on_cuda(8)
    launch = kernel.prepare(grid=(6, 5, 4), block=(32, 2, 1), shared=200 << 10, cluster=(2, 1, 4), args=[x, y, 0.5, 8])
    assert number(fake, "launches").value == 0
    launch()
    assert list(number(fake, "config", ctypes.c_uint * 10)) == [6, 5, 4, 32, 2, 1, 200 << 10, 2, 1, 4]
    assert number(fake, "stream", ctypes.c_uint64).value == 0xABC
    given = bytes(number(fake, "arguments", ctypes.c_ubyte * 24))
    assert given == struct.pack("<QQfi", x.data_ptr(), y.data_ptr(), 0.5, 8)
    launch.update(0, y)
    launch.update(3, 4)
    launch()
    given = bytes(number(fake, "arguments", ctypes.c_ubyte * 24))
    assert given == struct.pack("<QQfi", y.data_ptr(), y.data_ptr(), 0.5, 4)
    assert number(fake, "launches").value == 2
    with pytest.raises(ValueError, match=r"args\[0\] is on cpu: expected cuda:0"):
        launch.update(0, torch.zeros(8))


def test_limits_are_lifted_no_further_than_needed(fake, kernel):
    lifted = number(fake, "attributes", ctypes.c_int * 64)

    def prepare(**changed):
        kernel.prepare(**{"grid": (16, 1, 1), "block": (32, 1, 1), "args": [on_cuda(8), on_cuda(8), 1.0, 8]} | changed)
        return lifted[module.DYNAMIC_SHARED], lifted[module.NON_PORTABLE_CLUSTER]

    assert prepare() == (0, 0)
    assert prepare(shared=100_000) == (100_000, 0)
    assert prepare(shared=50_000, cluster=(8, 1, 1)) == (100_000, 0)
    assert prepare(cluster=(16, 1, 1)) == (100_000, 1)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"grid": (0, 1, 1)}, r"grid=\(0, 1, 1\): expected three integers, from 1 to 2147483647, 65535, 65535"),
        ({"grid": (1, 65_536, 1)}, "grid="),
        ({"grid": 6}, "grid=6: expected three integers"),
        ({"block": (32, 1)}, r"block=\(32, 1\): expected three integers"),
        ({"block": (1024, 2, 1)}, r"block=\(1024, 2, 1\): expected at most 1024 threads"),
        ({"block": (512, 1, 1)}, r"block=\(512, 1, 1\): saxpy has registers for 384 threads"),
        ({"cluster": (17, 1, 1)}, r"cluster=\(17, 1, 1\): expected three integers, from 1 to 16"),
        ({"cluster": (4, 1, 1)}, r"cluster=\(4, 1, 1\): expected at most 16 blocks, dividing grid=\(6, 1, 1\)"),
        ({"shared": -1}, "shared=-1: expected a number of bytes"),
        ({"shared": 232_448}, "shared=232448: saxpy can have 231424 bytes on this device"),
        ({"args": [on_cuda(8), on_cuda(8), 0.5]}, r"args have \[8, 8, 4\] bytes: saxpy takes \[8, 8, 4, 4\]"),
        ({"args": [on_cuda(8), on_cuda(8), 0.5, ctypes.c_int64(8)]}, r"args have \[8, 8, 4, 8\] bytes"),
        (
            {"args": [on_cuda(8), torch.zeros(8), 0.5, 8]},
            r"args\[1\] is on cpu: expected all tensors on one CUDA device",
        ),
    ],
)
def test_launches_that_cannot_be(changed, told, fake, kernel):
    number(fake, "threads").value, number(fake, "static_shared").value = 384, 1024
    usual = {"grid": (6, 1, 1), "block": (32, 1, 1), "args": [on_cuda(8), on_cuda(8), 0.5, 8]}
    with pytest.raises((TypeError, ValueError), match=told) as caught:
        kernel.prepare(**usual | changed)
    assert "\n" not in str(caught.value) and number(fake, "launches").value == 0


def test_a_map_is_encoded_and_passed_by_value(fake, kernel):
    takes(fake, 4, 128)
    Q = on_cuda(2, 64, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    Q_map = nvrtc.TensorMap.tiled(Q, (1, 1, 64, 64), swizzle="128B", l2_promotion="64B")
    seen = number(fake, "map", Map)
    assert (seen.start, seen.rank, seen.type) == (Q.data_ptr(), 4, tensor_map.ELEMENT[torch.bfloat16])
    assert list(seen.sizes)[:4] == [128, 64, 8, 2] and list(seen.strides)[:3] == [2048, 256, 64 * 2048]
    assert list(seen.box)[:4] == [64, 64, 1, 1] and list(seen.steps)[:4] == [1] * 4
    assert list(seen.modes) == [0, tensor_map.SWIZZLE["128B"], tensor_map.L2_PROMOTION["64B"], 0]
    kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[1, Q_map])()
    assert bytes(number(fake, "arguments", ctypes.c_ubyte * 132)) == struct.pack("<i", 1) + bytes(Q_map.opaque)
    with pytest.raises(ValueError, match="tensor is on cpu: expected cuda"):
        nvrtc.TensorMap.tiled(torch.zeros(64, 64), (8, 32))


def test_a_map_moves_to_another_tensor(fake, kernel):
    takes(fake, 128)
    x, y = on_cuda(2, 16, 64, dtype=torch.float16)
    x_map = nvrtc.TensorMap.tiled(x, (8, 64))
    launch, before = kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[x_map]), bytes(x_map.opaque)
    launch.update(0, y)
    launch()
    moved = struct.pack("<Q", y.data_ptr()) + before[8:]
    assert bytes(number(fake, "arguments", ctypes.c_ubyte * 128)) == moved
    assert bytes(x_map.opaque) == before and x_map.tensor is x  # the map that was given stays as it was
    for other in on_cuda(16, 64), on_cuda(8, 64, dtype=torch.float16), on_cuda(64, 16, dtype=torch.float16).mT:
        with pytest.raises(
            ValueError,
            match=r"tensor is torch.float.*: expected torch.float16, shape \(16, 64\), strides \(64, 1\), as",
        ):
            launch.update(0, other)
    with pytest.raises(ValueError, match="tensor starts 2 bytes after a multiple of 16"):
        launch.update(0, ragged(16, 64, start=1).as_subclass(OnCuda))
    launch()
    assert bytes(number(fake, "arguments", ctypes.c_ubyte * 128)) == moved


def test_a_kernel_for_another_gpu(fake, kernel):
    number(fake, "module_fails").value = 209
    told = r"saxpy, compiled for sm_90a, does not load on paper, compute capability 9.0: cuModuleLoadData: CUDA_ERROR"
    with pytest.raises(RuntimeError, match=told):
        kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[on_cuda(8), on_cuda(8), 1.0, 8])


def test_a_launch_that_the_driver_refuses(fake, kernel):
    launch = kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[on_cuda(8), on_cuda(8), 1.0, 8])
    for code, told in (700, r"cuLaunchKernelEx: CUDA_ERROR_MADE_UP \(made up\)"), (999, "cuLaunchKernelEx: error 999"):
        number(fake, "failing").value = code
        with pytest.raises(nvrtc.CallError, match=told) as caught:
            launch()
        assert caught.value.code == code
    assert number(fake, "launches").value == 0


def test_a_thread_that_has_not_called_cuda(fake, kernel):
    launch = kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[on_cuda(8), on_cuda(8), 1.0, 8])
    number(fake, "failing").value, number(fake, "contexts").value = library.INVALID_CONTEXT, 0
    launch()
    assert number(fake, "contexts").value == 1 and number(fake, "launches").value == 1


def test_sandbox_sync(fake, kernel, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    prepare = lambda: kernel.prepare(  # noqa: E731
        grid=(1, 1, 1), block=(32, 1, 1), args=[on_cuda(8), on_cuda(8), 1.0, 8]
    )
    prepare()()
    assert not waits
    monkeypatch.setattr(nvrtc.module, "SYNC", True)
    prepare()()
    assert waits == [1]


def test_our_part_of_a_launch_is_small(fake, kernel):
    """What Python and ctypes take, the driver's own part left out."""
    launch = kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[on_cuda(8), on_cuda(8), 1.0, 8])
    assert microseconds(launch) < 10
