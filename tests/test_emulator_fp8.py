"""The kernels in e4m3 on the emulator: the forward beside a float64 oracle, and the quantization bit for bit.

The forward is exact but for P̃, of which e4m3 keeps four bits.  Each row's error is told in units of what that costs.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from sandbox import emulator, target
from sandbox.device import quantize as fused
from sandbox.device.hopper import HEADERS
from sandbox.kernels import fwd_v3_fp8
from sandbox.kernels.fwd_v3_fp8 import Launch
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import DTYPES, Problem
from sandbox.quantize import dequantize, quantize, to_e4m3, transpose_keys
from sandbox.variant import SIMULATOR, Tile

pytestmark = [
    pytest.mark.skipif(target.KIND != "simulator", reason="a GPU runs the kernels itself"),
    pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler on this machine"),
]
ORDERS = [  # when things happen, and who runs first
    dict(late_arrivals=arrivals, late_readers=readers, seed=seed)
    for seed in (0, 1) for arrivals, readers in ((True, False), (False, True), (True, True))
]  # fmt: skip


def forward(problem, x, Br, Bc, blocks=2, **turned):
    """O and LSE of the kernel on a Quantized, by so many thread blocks."""
    B, N_q, H, d = x.q.shape
    O, LSE = torch.full((B, N_q, H, d), math.nan, dtype=DTYPES[problem.dtype]), torch.full((B, H, N_q), math.nan)
    launch = Launch(problem.kind, Tile(Br, Bc), replace(SIMULATOR, sms=blocks), scales=x.scales, **turned)
    launch.attend(problem, x, O, LSE)
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
    x = quantize(*made, scales=scales, kv_block=Bc, incoherent=False)
    others = torch.tensor([1.0, 1.1, 0.7, 1.3])[torch.arange(x.v_scale.shape[-1]) % 4]
    return replace(x, v_scale=x.v_scale * others)  # any that a caller may have, not powers of 2 alone


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
    return f"O is off by {off.max()}, {rms} on average" if off.max() > 0.3 or rms > 0.06 else ""


TILES = {64: [(192, 128), (192, 160)], 128: [(192, 96), (128, 192)], 256: [(128, 128)]}
SMALL = dict(Br=128, Bc=64, stages=2, o_apart=True, q_in_registers=1)  # few stages: whoever is early is too early


# ---- the forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d, Br, Bc", [(d, *tile) for d in TILES for tile in TILES[d]])
def test_the_forward_is_right(d, Br, Bc, causal, scales):
    problem = Problem(1, 2, 1, 200, 460, d, "bf16", mask=Mask(causal=causal))
    x = inputs(problem, scales, Bc)
    assert not why(problem, x, *forward(problem, x, Br, Bc))


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 1, 1, 1, 1, 64, "fp16"),
        Problem(1, 1, 1, 129, 63, 64, "fp16"),
        Problem(2, 4, 2, 70, 150, 64, "bf16"),
        Problem(2, 1, 1, 150, 70, 64, "fp16", mask=Mask(causal=True)),
        Problem(1, 1, 1, 300, 300, 64, "fp16", mask=Mask(window=(70, 9))),
    ],
    ids=str,
)
def test_sizes_heads_and_masks(problem, scales):
    x = inputs(problem, scales, SMALL["Bc"])
    assert not why(problem, x, *forward(problem, x, **SMALL))


@pytest.mark.parametrize(
    "turned",
    [
        dict(ping_pong=True), dict(overlap=False), dict(dynamic=False), dict(q_in_registers=2),
        dict(q_in_registers=0, ping_pong=True, overlap=False), dict(two_level=True),
    ],
    ids=str,
)  # fmt: skip
def test_a_switch_turned(turned):
    problem = Problem(1, 2, 1, 290, 260, 64, "fp16", mask=Mask(causal=True))
    x = inputs(problem, "block", SMALL["Bc"])
    assert not why(problem, x, *forward(problem, x, **SMALL | turned))


@pytest.fixture
def ordered(monkeypatch):
    """Makes launches run in an order."""
    launch = emulator.launch
    return lambda order: monkeypatch.setattr(emulator, "launch", lambda *a, **more: launch(*a, **more | order))


PROBLEM = Problem(1, 2, 1, 200, 260, 64, "fp16", mask=Mask(causal=True))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_the_forward_is_right_in_every_order(ordered, order, apart):
    ordered(order)
    build = SMALL | dict(o_apart=apart, stages=2 + 2 * (not apart))
    for scales in ("block", "head"):
        x = inputs(PROBLEM, scales, build["Bc"])
        assert not why(PROBLEM, x, *forward(PROBLEM, x, **build, blocks=1))


def test_every_number_of_e4m3_is_multiplied_as_it_is():
    """Every row sees one key: O is V."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    v = every.masked_fill(every.isnan(), 1).reshape(1, 4, 1, 64)
    problem = Problem(1, 1, 1, 4, 4, 64, "fp16", mask=Mask(window=(0, 0)))
    x = quantize(torch.zeros_like(v), torch.zeros_like(v), v, scales="head", incoherent=False)
    assert torch.equal(dequantize(x)[2], v)
    assert torch.equal(forward(problem, x, **SMALL)[0].float(), v)


LONG = Problem(1, 1, 1, 70, 40 * SMALL["Bc"] + 9, 64, "bf16")  # more blocks than a warp has lanes


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_more_blocks_than_lanes(causal):
    problem = replace(LONG, mask=Mask(causal=causal))
    x = inputs(problem, "block", SMALL["Bc"])
    assert not why(problem, x, *forward(problem, x, **SMALL))


KERNEL, SCALES, SOFTMAX, PRODUCERS = "fwd_v3_fp8.cu", "scales.cuh", "softmax.cuh", "producers.cuh"

# the file; a line as it is, and as it should not be; what the emulator says (None: the numbers are wrong)
DEFECTS = {
    "the scale of the block before": (SCALES, "of_K = load(K + mine)", "of_K = load(K + before)", None),
    "one scale of V": (SCALES, "rise != 0.f || mine", "mine", None),
    "the scales of 32 blocks again": (KERNEL, "j % STRIP == 0 && j > w.first", "false", None),
    "m not brought to V's scale": (KERNEL, "softmax.lower(rise), sunk", "sunk", None),
    "l not brought to V's scale": (SOFTMAX, "m[a] -= by, l[a] *= exp2_approx(before - m[a]);", "m[a] -= by;", None),
    "O not brought to a lower m": (KERNEL, "scale_rows(rO, {by, by});", "", None),
    "O brought there while it is summed": (
        KERNEL, "products_wait<0>(rO), scale_rows(rO, {by, by})", "scale_rows(rO, {by, by})", None,
    ),
    "S on top of what was there": (KERNEL, "rQ + 4 * c, k, in_K, c > 0)", "rQ + 4 * c, k, in_K, 1)", None),
    "the maximum of negative rows as integers": (
        SOFTMAX, "if (!__any_sync(~0u, most[0] < 0 || most[1] < 0)) return;", "return;", None,
    ),
    "P's keys in another order": (
        KERNEL, "pack_e4m3(x[0], x[1], x[4], x[5])", "pack_e4m3(x[0], x[4], x[1], x[5])", None,
    ),
    "V's panels as wide as Q's": (KERNEL, "s.sV[0]), DEEP)", "s.sV[0]), 128)", None),
    "Q in registers, swizzled as if wider": ("rows.cuh", "^ r * Width / 128 % CHUNKS", "^ r % CHUNKS", None),
    "P overwritten while it is read": (KERNEL, "settled(rS);", "take_P();", None),
    "fewer bytes than arrive": (PRODUCERS, "announce(KV_BYTES)", "announce(KV_BYTES - 32)", "nobody can go on"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_defect_of_the_forward_is_found(ordered, monkeypatch, tmp_path, what):
    name, line, instead, told = DEFECTS[what]
    monkeypatch.setattr(fwd_v3_fp8, "FILE", edited(tmp_path, name, line, instead) / KERNEL)
    problem = LONG if "32 blocks" in what else PROBLEM
    x, found = inputs(problem, "block", SMALL["Bc"]), []
    for order in ORDERS:
        ordered(order)
        try:
            found.append(why(problem, x, *forward(problem, x, **SMALL, blocks=1)))
        except emulator.EmulatorError as error:
            found.append(str(error))
        if found[-1] and (told is None or told in found[-1]):
            return
    pytest.fail(f"{what}: {found}")


def edited(folder, name, line, instead):
    """A copy of the kernels in which one line is another."""
    copy = shutil.copytree(HEADERS, folder / "hopper")
    text = (copy / name).read_text()
    assert text.count(line) == 1, f"{name}: {line!r} stands there {text.count(line)} times"
    (copy / name).write_text(text.replace(line, instead))
    return copy


class Quantizing(Launch):
    """Attends rightly to what it quantized wrongly: V's scales are twice what they are."""

    def quantize(self, *x):
        x = super().quantize(*x)
        return replace(x, v_scale=2 * x.v_scale)


class Dropping(Launch):
    """V's second block is lost on the way to 8 bits."""

    def quantize(self, *x):
        x = super().quantize(*x)
        x.v.view(torch.uint8)[..., self.tile.Bc : 2 * self.tile.Bc] = 0
        return x


@pytest.mark.parametrize("build", [Quantizing, Dropping])
def test_the_gate_does_not_believe_a_kernel_s_own_quantization(build):
    variant = replace(fwd_v3_fp8.VARIANT, name=build.__name__, build=build)
    x = gate.gaussian(PROBLEM, 0)
    assert gate.check(fwd_v3_fp8.VARIANT, PROBLEM, Tile(128, 64), x, SIMULATOR).passed
    assert not gate.check(variant, PROBLEM, Tile(128, 64), x, SIMULATOR).passed


# ---- the quantization -----------------------------------------------------------------------------------------------


def same(x, y) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def sides(d, dtype, B, N_q, N_k, H, H_kv, seed=0):
    """Q, K, V with rows of many sizes, one of them 0, and a few numbers that are not finite; V is laid out by heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, N, h, d, generator=generator) * torch.logspace(-12, 3, N)[:, None, None]
        for N, h in ((N_q, H), (N_k, H_kv), (N_k, H_kv))
    )
    for x in (q, k, v):
        x[:, : x.shape[1] // 3] = 0
        x[0, -1, 0, 3], x[0, x.shape[1] // 2, 0, d - 1] = math.inf, math.nan
    return q.to(dtype), k.to(dtype), v.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


QUANTIZED = [
    (64, torch.float16, (2, 300, 205, 4, 2), dict(q_block=64, kv_block=96)),
    (64, torch.bfloat16, (1, 70, 128, 1, 1), dict(q_block=64, kv_block=64)),
    (128, torch.bfloat16, (1, 100, 150, 2, 1), dict(q_block=64, kv_block=128)),
    (256, torch.float16, (1, 33, 70, 2, 2), dict(q_block=32, kv_block=64)),
    (64, torch.float16, (1, 270, 300, 1, 1), dict(q_block=32, kv_block=256)),  # eight blocks of Q to a thread block
]
PARTS = "q", "k", "v", "q_scale", "k_scale", "v_scale"


@pytest.mark.parametrize("scales", ["block", "head", "tensor"])
@pytest.mark.parametrize("incoherent", [False, True], ids=["as they are", "rotated"])
@pytest.mark.parametrize("d, dtype, sizes, blocks", QUANTIZED, ids=str)
def test_scales_and_numbers_are_torch_s(d, dtype, sizes, blocks, incoherent, scales):
    x = sides(d, dtype, *sizes)
    options = dict(blocks, scales=scales, incoherent=incoherent)
    expected, found = quantize(*x, **options), fused.quantize(*x, **options)
    for part in PARTS:
        assert same(getattr(found, part), getattr(expected, part)), part


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_quantization_is_right_in_every_order(ordered, order):
    ordered(order)
    x = sides(128, torch.bfloat16, 1, 300, 150, 3, 1)
    expected, found = quantize(*x, kv_block=96), fused.quantize(*x, kv_block=96)
    assert all(same(getattr(found, part), getattr(expected, part)) for part in PARTS)
    v = expected.k  # of so many bits
    assert same(fused.transpose_keys(v), transpose_keys(v))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_numbers_of_sixteen_bits_round_as_torchs(dtype, monkeypatch):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype]).view(1, -1, 1, 64)
    monkeypatch.setattr(fused, "scale_of", torch.ones_like)
    found = fused.quantize(every, every[:, :1], every[:, :1], scales="head", incoherent=False)
    assert same(found.q, to_e4m3(every.float()))


@pytest.mark.parametrize(
    "line, instead",
    [
        ("async_fence();\n        __syncthreads();\n        if (uni", "__syncthreads();\n        if (uni"),
        ("        if (threadIdx.x == 0) copies_out_read();  // as all", "        // as all"),
        ("mine.read(shared_address(s.in), two);\n        meet();", "meet(), mine.read(shared_address(s.in), two);"),
        ("if (threadIdx.x % 32 == 0) raise(to, most);", "if (threadIdx.x == 0) raise(to, most);"),
        ("row() / Block : 0", "0 : 0"),
        ("        found().clear();\n        __syncthreads();\n        if (there", "        if (there"),
        ("most * (1.f / 448.f)", "most * (1.f / 449.f)"),
        ("found(1).clear();", ""),
    ],
)  # fmt: skip
def test_a_defect_of_the_quantization_is_found(tmp_path, monkeypatch, ordered, line, instead):
    monkeypatch.setattr(fused, "FILE", edited(tmp_path, "quantize.cu", line, instead) / "quantize.cu")
    monkeypatch.setattr(fused, "_launch", fused._launch.__wrapped__)
    x = sides(128, torch.bfloat16, 1, 300, 400, 3, 1)  # the first tiles of a head are finite, and small or 0
    expected = quantize(*x)
    for order in ORDERS:
        ordered(order)
        found = fused.quantize(*x)
        if not all(same(getattr(found, part), getattr(expected, part)) for part in PARTS):
            return
    pytest.fail(f"{instead}: nothing was found")
