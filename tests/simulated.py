"""Kernels of a few lines on the simulator: tests of its parts run each with one mistake, or with none."""

from __future__ import annotations

import pytest
import torch

from sandbox import target
from sandbox.device import Launch

on_simulator = pytest.mark.skipif(target.KIND != "simulator", reason="these are tests of the simulator")

THREADS = 8


def run(kernel, *args, threads=THREADS, grid=1, warp=32):
    Launch(kernel, threads, warp=warp)(grid, *args)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)
