"""The kernels in e4m3 on the emulator: the forward beside a float64 oracle, and the quantization bit for bit.

The forward is exact but for P̃, of which e4m3 keeps four bits.  Each row's error is told in units of what that costs.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from sandbox import emulator, target
from sandbox.device.hopper import HEADERS, Counter, HopperLaunch, Output, Panels
from sandbox.kernels.fwd_v3 import Shape
from sandbox.mask import Mask
from sandbox.problem import DTYPES, Problem
from sandbox.quantize import dequantize, quantize

pytestmark = [
    pytest.mark.skipif(target.KIND != "simulator", reason="a GPU runs the kernels itself"),
    pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler on this machine"),
]
FORWARD, QUANTIZE = HEADERS / "fwd_v3_fp8.cu", HEADERS / "quantize.cu"
ORDERS = [  # when things happen, and who runs first
    dict(late_arrivals=arrivals, late_readers=readers, seed=seed)
    for seed in (0, 1) for arrivals, readers in ((True, False), (False, True), (True, True))
]  # fmt: skip


class Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "QKV"]
    _fields_ += [(name, ctypes.c_int) for name in ("q_blocks", "q_rows", "kv_blocks")]


def forward(problem, x, Br, Bc, *, stages, apart, held, file=FORWARD, grid=2, **turned):
    """O and LSE of the kernel on a Quantized."""
    B, N_q, H, d = x.q.shape
    blocked = x.scales == "block"
    O, LSE = torch.full((B, N_q, H, d), math.nan, dtype=DTYPES[problem.dtype]), torch.full((B, H, N_q), math.nan)
    defines = {
        "HEAD_DIM": d, "WARPGROUPS": Br // 64, "TILE_BC": Bc, "STAGES": stages, "BF16": int(problem.dtype == "bf16"),
        "BANDED": int(problem.mask.banded), "SCORED": 0, "O_APART": apart, "Q_IN_REGISTERS": held, "UNROLL": 1,
        "PING_PONG": 0, "OVERLAP": 1, "DYNAMIC": 1, "LAZY": 1, "BLOCKED": int(blocked),
    }  # fmt: skip
    shared = d * Br + (2 * d * Br if apart else 1024) + 2 * stages * Bc * d + 3072
    launch = HopperLaunch(file, "fwd_v3_fp8", 2 * Br + 128, shared, {**defines, **turned})
    wide = 128 if d % 128 == 0 else 64
    deep = next(width for width in (128, 64, 32) if Bc % width == 0)
    lo, hi = problem.mask.band(N_q, problem.N_k)
    launch(
        min(grid, B * H * -(-N_q // Br)), Panels("Q", x.q, 64, wide), Panels("K", x.k, Bc, wide),
        Panels("V", x.v.transpose(1, 2), d, deep), Panels("O", O, 64), Output("LSE", LSE), Counter(), ctypes.c_void_p(),
        Scales(*(s.data_ptr() for s in (x.q_scale, x.k_scale, x.v_scale)), x.q_scale.shape[2], 64, x.k_scale.shape[2]),
        Shape(N_q, problem.N_k, H, problem.group, lo, hi, B * H, 1, problem.scale, 0.0),
    )  # fmt: skip
    return O, LSE


def oracle(problem, x):
    """O, LSE and the root of Σ (P V)², what rounding P̃ can cost: float64, of the dequantised inputs."""
    q, k, v = (y.double().transpose(1, 2) for y in dequantize(x))
    k, v = (y.repeat_interleave(problem.group, 1) for y in (k, v))
    lo, hi = problem.mask.band(problem.N_q, problem.N_k)
    i, j = torch.arange(problem.N_q)[:, None], torch.arange(problem.N_k)
    S = (q @ k.mT * problem.scale).masked_fill((j < i + lo) | (j > i + hi), -math.inf)
    P = S.softmax(-1).nan_to_num(0)
    return (P @ v).transpose(1, 2), S.logsumexp(-1), (P**2 @ v**2).sqrt().transpose(1, 2)


def inputs(problem, scales, Bc, seed=0):
    """Of a Gaussian; V's size changes from block to block, K's first column makes the maxima grow."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(problem.B, N, H, problem.d, generator=generator)
        for N, H in ((problem.N_q, problem.H), (problem.N_k, problem.H_kv), (problem.N_k, problem.H_kv))
    ]
    made[0][..., 0], made[1][..., 0] = 8.0, -0.02 * torch.arange(float(problem.N_k))[:, None]
    made[2] *= torch.tensor([1.0, 1.1, 0.3, 9.0])[torch.arange(problem.N_k) // Bc % 4][:, None, None]
    return quantize(*made, scales=scales, kv_block=Bc, incoherent=False)


def why(problem, x, O, LSE) -> str:
    """What is wrong with them, or nothing."""
    O_true, LSE_true, room = oracle(problem, x)
    room = room.maximum(O_true.abs() / 16)
    off = ((O.double() - O_true).abs() / room.clamp(min=1e-12)).nan_to_num(math.inf)
    rms = off.square().mean().sqrt()
    seen = LSE_true.isfinite()
    of_LSE = (LSE - LSE_true)[seen].abs().nan_to_num(math.inf)
    if of_LSE.numel() and of_LSE.max() > 1e-4 or not torch.equal(LSE[~seen], LSE_true[~seen].float()):
        return f"LSE is off by {of_LSE.max()}"
    print(f"O max {off.max():.3f} rms {rms:.3f} lse {of_LSE.max():.1e}")
    return f"O is off by {off.max()}, {rms} on average" if off.max() > 0.3 or rms > 0.06 else ""


BUILDS = {
    64: [
        dict(Br=192, Bc=128, stages=4, apart=1, held=2), dict(Br=192, Bc=160, stages=4, apart=1, held=0),
    ],
    128: [
        dict(Br=192, Bc=96, stages=4, apart=1, held=0), dict(Br=128, Bc=128, stages=3, apart=1, held=4),
    ],
    256: [dict(Br=128, Bc=128, stages=2, apart=0, held=0)],
}  # fmt: skip


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("build", [(d, build) for d in BUILDS for build in BUILDS[d]], ids=str)
def test_the_forward_is_right(build, causal, scales):
    d, build = build
    problem = Problem(1, 2, 1, 200, 600, d, "bf16", mask=Mask(causal=causal))
    x = inputs(problem, scales, build["Bc"])
    assert not why(problem, x, *forward(problem, x, **build))
