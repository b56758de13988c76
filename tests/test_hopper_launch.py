"""What a HopperLaunch hands to the driver when tensors come and go, and what it costs the host.

The driver is driver.c, so no GPU is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from pathlib import Path

import pytest
import torch
from cuda_driver import OnCuda, driver_file_fixture, fake_fixture, number, on_cuda, takes  # noqa: F401
from cuda_sources import looks, unloaded_fixture  # noqa: F401
from on_paper import at_once, given, paper_fixture, plain  # noqa: F401

from sandbox import nvrtc
from sandbox.device import hopper
from sandbox.device.hopper import Counter, HopperLaunch, Output, Panels
from sandbox.problem import Problem
from sandbox.variant import Infeasible, Tile

LAYOUT = "16Q QQ Q 8i2f"  # a map, an output, a counter, null, a shape
MAP = 128  # bytes of a tensor map


def heads(*shape, dtype=torch.bfloat16):
    return on_cuda(*shape, dtype=dtype)


def kernel(written: bool) -> HopperLaunch:
    parameters = Panels("Q", 64, written=written), Output("LSE"), Counter(), Output("marks"), hopper.Shape
    return HopperLaunch(Path("saxpy.cu"), "saxpy", 128, 2048, {}, parameters)


@pytest.fixture
def attend(paper):
    """attend(Q, LSE, grid): a kernel that takes a map, an output, a counter, a pointer that may be null, a shape."""
    takes(paper, MAP, 8, 8, 8, 40)
    launch = kernel(written=True)

    def call(Q, LSE, grid=3):
        B, N, H, d = Q.shape
        shape = hopper.shape_of(Problem(B, H, H, N, N, 128, "bf16"), 1 << 20)
        call.launch(grid, Q, LSE, None, shape)

    call.launch = launch
    return call


def as_map(Q) -> list[int]:
    """What driver.c makes of a tensor [B, N, H, d], as 8-byte numbers."""
    B, N, H, d = Q.shape
    b, n, h, _ = (s * Q.element_size() for s in Q.stride())
    left = 0x5A5A5A5A5A5A5A5A
    return [Q.data_ptr(), d, N, H, B, left, n, h, b, *[left] * 7]


def test_other_tensors_every_call(paper, attend):
    for N, grid in (64, 3), (64, 5), (96, 7), (64, 2):
        Q, LSE = heads(2, N, 4, 128), on_cuda(2, 4, N)
        attend(Q, LSE, grid)
        found = given(paper, LAYOUT)
        assert list(found[:16]) == as_map(Q)
        (counter,) = paper.counters.values()
        assert found[16:19] == (LSE.data_ptr(), counter.data_ptr(), 0) and found[19:22] == (N, N, 4)
        assert list(number(paper, "config", ctypes.c_uint * 7)) == [grid, 1, 1, 128, 1, 1, 2048]
    assert number(paper, "encoded").value == 2  # one map a shape


def test_no_tensor_outlives_its_call(paper, attend):
    Q, LSE = heads(2, 64, 4, 128), on_cuda(2, 4, 64)
    attend(Q, LSE)
    freed = [weakref.ref(Q), weakref.ref(LSE)]
    old = Q.data_ptr()
    kept = Q.data.clone()  # no other tensor gets this place
    del Q, LSE
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    Q, LSE = kept.as_subclass(OnCuda), on_cuda(2, 4, 64)
    attend(Q, LSE)
    assert given(paper, LAYOUT)[0] == Q.data_ptr() != old and given(paper, LAYOUT)[16] == LSE.data_ptr()


def test_other_strides_and_dtypes(paper, attend):
    LSE = on_cuda(2, 4, 64)
    wide = heads(2, 64, 4, 256)
    for Q in (
        heads(2, 64, 4, 128), heads(2, 4, 64, 128).transpose(1, 2), wide[..., :128], wide[:, :, :2],
        heads(2, 64, 4, 128, dtype=torch.float16), heads(2, 64, 4, 128),
    ):  # fmt: skip
        attend(Q, LSE)
        assert list(given(paper, LAYOUT)[:16]) == as_map(Q)
    assert number(paper, "encoded").value == 5


def test_kept_maps_are_bounded(paper, attend, monkeypatch):
    monkeypatch.setattr(hopper, "MOST_LAYOUTS", 3)
    for N in range(2, 20):
        attend(Q := heads(2, N, 4, 128), on_cuda(2, 4, N))
        assert list(given(paper, LAYOUT)[:16]) == as_map(Q) and len(attend.launch._encoded) <= 3


def test_what_cannot_be_copied_is_told_every_time(paper, attend):
    LSE = on_cuda(1, 4, 64)
    good, late = heads(1, 64, 4, 128), heads(1 * 64 * 4 * 128 + 8)[4:-4].view(1, 64, 4, 128)
    for Q in late, good, late:  # the second is of a shape that is known
        if Q is good:
            attend(Q, LSE)
            assert given(paper, LAYOUT)[0] == Q.data_ptr()
        else:
            with pytest.raises(ValueError, match="tensor starts 8 bytes after a multiple of 16"):
                attend(Q, LSE)
    with pytest.raises(ValueError, match="expected one of torch.float8_e4m3fn"):
        attend(good.double(), LSE)
    with pytest.raises(ValueError, match="grid=2147483648: expected 1 to 2147483647 blocks"):
        attend(good, LSE, 2**31)
    assert number(paper, "launches").value == 1


def test_what_is_read_is_cloned_where_it_cannot_be_addressed(paper, attend):
    attend.launch, LSE, seen = kernel(written=False), on_cuda(2, 4, 64), []
    wide = heads(2, 64, 4, 256)
    good, late = wide[..., :128], wide.view(-1)[4:][: 2 * 64 * 4 * 128].view(2, 64, 4, 128)
    for Q in good, late, wide[..., ::2], good[:, :1].expand(2, 64, 4, 128), good:
        attend(Q, LSE)
        address, *sizes = given(paper, LAYOUT)[:16]
        contiguous = torch.empty(Q.shape, dtype=Q.dtype)
        assert (address == Q.data_ptr()) == (Q is good) and address % 16 == 0
        assert sizes == as_map(Q if Q is good else contiguous)[1:]
        seen.append(address)
    assert seen[0] == seen[-1] and number(paper, "launches").value == 5


def test_a_launch_after_one_that_failed(paper, attend):
    Q, LSE = heads(1, 64, 4, 128), on_cuda(1, 4, 64)
    number(paper, "failing").value = 700
    with pytest.raises(nvrtc.CallError, match="made up"):
        attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    attend(Q, LSE)
    assert given(paper, LAYOUT)[0] == Q.data_ptr() and given(paper, LAYOUT)[16] == LSE.data_ptr()
    assert number(paper, "launches").value == 1


def test_the_stream_and_its_counter_are_those_of_the_call(paper, attend, monkeypatch):
    Q, LSE, counters = heads(1, 64, 4, 128), on_cuda(1, 4, 64), []
    for stream in 0xA, 0xB, 0xA:
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream)
        attend(Q, LSE)
        assert number(paper, "stream", ctypes.c_uint64).value == stream
        counters.append(given(paper, LAYOUT)[17])
    assert counters[0] == counters[2] != counters[1]
    own = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kind: own.append(torch.ones(1)) or own[-1])
    attend(Q, LSE)
    assert given(paper, LAYOUT)[17] == own[0].data_ptr()


class OnSecond(OnCuda):
    device = property(lambda self: torch.device("cuda:1"))

    def get_device(self):
        return 1


def test_on_the_device_of_the_tensors(paper, attend, monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], torch.device(device).index if not isinstance(device, int) else device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0xA0 + device)
    monkeypatch.setattr(nvrtc.module, "_enter", lambda device: None)
    for kind, stream in (OnSecond, 0xA1), (OnCuda, 0xA0), (OnSecond, 0xA1):
        Q, LSE = (torch.zeros(*n, dtype=torch.float16).as_subclass(kind) for n in ((1, 64, 4, 128), (1, 4, 64)))
        attend(Q, LSE)
        assert number(paper, "stream", ctypes.c_uint64).value == stream and current == [0]
        assert given(paper, LAYOUT)[0] == Q.data_ptr()
        assert given(paper, LAYOUT)[17] == paper.counters[stream - 0xA0, stream].data_ptr()
    with pytest.raises(ValueError, match="LSE is on cuda:0: expected all tensors on one CUDA device"):
        attend(Q, on_cuda(1, 4, 64))
    with pytest.raises(ValueError, match="Q is on cpu: expected all tensors on one CUDA device"):
        attend(torch.zeros(1, 64, 4, 128, dtype=torch.float16), on_cuda(1, 4, 64))


def test_a_tile_that_spills_is_infeasible(monkeypatch):
    """In one line; of a kernel without a tile all that the compiler said is told."""

    def compile(*_, **__):
        asked.append(1)
        raise nvrtc.Spills("saxpy.cu: saxpy has 60 bytes of spills\nthe log")

    asked = []
    monkeypatch.setattr(nvrtc, "compile", compile)
    launch = kernel(written=True)
    with pytest.raises(nvrtc.Spills, match="the log"):
        launch.binary()
    launch.tile = Tile(128, 192)
    for _ in range(2):  # it is compiled once
        with pytest.raises(Infeasible) as caught:
            launch.binary()
        assert str(caught.value) == (
            "tile 128x192: saxpy.cu: saxpy has 60 bytes of spills: take a smaller tile, or None for the usual one"
        )
    assert len(asked) == 2


def test_threads_do_not_meet_in_a_launch(paper, attend):
    sets = [[(heads(1, 16 + t, 4, 128), on_cuda(1, 4, 16 + t)) for _ in range(8)] for t in range(4)]
    at_once(paper, lambda thread, n: attend(*sets[thread][n]))
    found = {(f[0], f[16], f[19]) for f in (given(paper, LAYOUT, n) for n in range(32))}
    assert found == {(Q.data_ptr(), LSE.data_ptr(), Q.shape[1]) for mine in sets for Q, LSE in mine}


def test_sandbox_sync(paper, attend, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    monkeypatch.setattr(nvrtc.module, "SYNC", True)
    attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    assert waits == [1]


def test_our_part_of_a_launch_is_small(paper, attend):
    """What Python and ctypes take, the driver's own part left out, beside looking at a tensor."""
    Q, LSE = plain(1, 64, 4, 128), plain(1, 4, 64)
    attend(on_cuda(1, 64, 4, 128), LSE)
    assert looks(lambda: attend(Q, LSE), Q) < 45  # 27 to 29
