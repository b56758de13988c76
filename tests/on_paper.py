"""The driver of C (cuda_driver.py) under both kinds of launch: every kernel loads on it, and none runs."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest
import torch
from cuda_driver import OnCuda, number, on_cuda

from sandbox import nvrtc
from sandbox.cubin import Report
from sandbox.device import hopper
from sandbox.device import launch as launches

BINARY = nvrtc.Binary(b"\177ELF", Report("saxpy", 32, 0, 0), "sm_90a")


@pytest.fixture(name="paper")
def paper_fixture(fake, monkeypatch):
    """The driver of C; paper.counters: the HopperLaunches' own."""
    for module in hopper, launches:
        monkeypatch.setattr(module, "SIMULATED", False)
    monkeypatch.setattr(hopper.HopperLaunch, "binary", lambda launch: BINARY)
    monkeypatch.setattr(launches.Launch, "compiled", lambda launch, *args: BINARY)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counters = {}
    monkeypatch.setattr(hopper, "_counters", lambda *where: counters.setdefault(where, on_cuda(1)))
    fake.counters = counters
    return fake


def given(paper, layout: str, n: int | None = None) -> tuple:
    """The arguments of the n-th launch, or of the last: they lie one after another."""
    kept = number(paper, "kept", ctypes.c_ubyte * 4096 * 64)
    n = number(paper, "launches").value - 1 if n is None else n
    return struct.unpack_from("<" + layout, bytes(kept[n]))


def at_once(paper, call, calls: int = 8, threads: int = 4):
    """call(thread, n) from several threads, while the driver takes its time over every argument."""
    number(paper, "slow").value = 200
    start, errors = threading.Barrier(threads), []

    def run(thread):
        try:
            start.wait()
            for n in range(calls):
                call(thread, n)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors and number(paper, "launches").value == calls * threads, errors


class Plain(OnCuda):
    """One that costs no more than a tensor: what torch does for a subclass costs more than all of ours."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def plain(*shape) -> torch.Tensor:
    return torch.zeros(shape).as_subclass(Plain)
