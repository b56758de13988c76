"""A CUDA driver made of C, driver.c, compiled against NVIDIA's own cuda.h; tensors that say they are on its GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from sandbox import target
from sandbox.nvrtc import library


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda:0"))

    def get_device(self):
        return 0


def on_cuda(*shape, **kind):
    return torch.zeros(*shape, **kind).as_subclass(OnCuda)


@pytest.fixture(name="driver_file", scope="module")
def driver_file_fixture(tmp_path_factory):
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("there is no C compiler, cc, to make a driver with")
    source, made = Path(__file__).with_name("driver.c"), tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run([cc, "-shared", "-fPIC", "-O1", f"-I{library.headers()[0]}", "-o", made, source], check=True)
    return made


@pytest.fixture(name="fake")
def fake_fixture(driver_file, unloaded, monkeypatch, tmp_path):
    """The driver of C, as the one of this machine; torch says what it would with a GPU."""
    loaded = shutil.copy(driver_file, tmp_path / "libcuda.so.1")  # its variables are fresh
    properties = types.SimpleNamespace(name="paper", major=9, minor=0, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(target, "_why_no_gpu", lambda: None)
    monkeypatch.setattr(library, "DRIVER", str(loaded))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0xABC, raising=False)
    return ctypes.CDLL(str(loaded))


def number(fake, name: str, kind=ctypes.c_int):
    return kind.in_dll(fake, name)


def takes(fake, *sizes: int):
    """The driver's kernel has parameters of these sizes."""
    number(fake, "parameter_count").value = len(sizes)
    number(fake, "parameters", ctypes.c_size_t * 128)[: len(sizes)] = sizes
