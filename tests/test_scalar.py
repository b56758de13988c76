"""Arithmetic on the simulator rounds as a GPU's does, and as torch's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from numba import cuda
from simulated import on_simulator, run, zeros

from sandbox.device import conversions
from sandbox.device.scalar import exp, from_bf16, to_bf16
from sandbox.problem import DTYPES

pytestmark = on_simulator


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit_operands_are_multiplied_in_fp32(dtype):
    """A product is not rounded to 16 bits, and a sum does not overflow them; only a store rounds."""
    widen, narrow = conversions(dtype)

    @cuda.jit
    def kernel(X, Y, Z):
        x, y = widen(X[0]), widen(X[1])
        Y[0], Y[1] = x * x, y + y
        Z[0] = narrow(x * x)

    tiny = 2.0 ** (-10 if dtype == "fp16" else -7)
    largest = torch.finfo(DTYPES[dtype]).max if dtype == "fp16" else 1e38
    X, Y, Z = torch.tensor([1 + tiny, largest], dtype=DTYPES[dtype]), zeros(2), zeros(1, dtype=DTYPES[dtype])
    run(kernel, X, Y, Z, threads=1)
    x, y = X.double()
    assert Y.double().tolist() == [(x * x).item(), (y + y).item()]
    assert Z.double().item() == 1 + 2 * tiny


def test_arguments_are_fp32():
    @cuda.jit
    def kernel(Y, scale):
        Y[0] = scale
        Y[1] = exp(scale) - scale

    Y = zeros(2, dtype=torch.float32)
    run(kernel, Y, 0.1, threads=1)
    assert Y.tolist() == [np.float32(0.1), np.exp(np.float32(0.1)) - np.float32(0.1)]


def test_every_bf16_is_widened_as_torch_does():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    expected = bits.view(torch.bfloat16).float()
    actual = torch.tensor(np.array([from_bf16(b) for b in bits.numpy()]))
    assert actual.dtype == torch.float32
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def test_fp32_is_narrowed_to_bf16_as_torch_does():
    """To nearest, ties to even, past the largest to infinity; NaN stays NaN, whatever its payload."""
    random = torch.Generator().manual_seed(0)
    anything = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=random).to(torch.int32)
    high = torch.randint(-(1 << 15), 1 << 15, (2_000,), generator=random) << 16
    near_ties = torch.cat([high + low for low in (0x7FFF, 0x8000, 0x8001, 0, 0xFFFF)]).to(torch.int32)
    x = torch.cat([anything, near_ties]).view(torch.float32)
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1.1754944e-38, 3.3895314e38, 3.4028235e38, -3.4e38]
    x = torch.cat([x, torch.tensor(edges)])
    expected = x.to(torch.bfloat16)
    actual = torch.tensor(np.array([to_bf16(v) for v in x.numpy()])).view(torch.bfloat16)
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].view(torch.int16), expected[finite].view(torch.int16))


def test_arithmetic_that_is_not_finite_warns_of_nothing():
    @cuda.jit
    def kernel(X):
        t = cuda.threadIdx.x
        X[t] = X[t] - X[t] + exp(X[t] * X[t])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kernel, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38]), threads=4)
