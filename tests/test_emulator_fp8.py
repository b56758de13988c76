"""The kernels in e4m3 on the emulator: the forward beside a float64 oracle, and the quantization bit for bit.

The forward is exact but for P̃, of which e4m3 keeps four bits.  Each row's error is told in units of what that costs.
"""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch

from sandbox import emulator, target
from sandbox.device.hopper import HEADERS, Counter, HopperLaunch, Output, Panels
from sandbox.kernels.fwd_v3 import Shape
from sandbox.mask import Mask
from sandbox.problem import DTYPES, Problem
from sandbox.quantize import dequantize, quantize, signs, to_e4m3

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
    return f"O is off by {off.max()}, {rms} on average" if off.max() > 0.3 or rms > 0.06 else ""


BUILDS = {
    64: [dict(Br=192, Bc=128, stages=4, apart=1, held=2), dict(Br=192, Bc=160, stages=4, apart=1, held=0)],
    128: [dict(Br=192, Bc=96, stages=4, apart=1, held=0), dict(Br=128, Bc=128, stages=3, apart=1, held=4)],
    256: [dict(Br=128, Bc=128, stages=2, apart=0, held=0)],
}
SMALL = dict(Br=128, Bc=64, stages=2, apart=1, held=1)  # few stages: whoever is early is too early


# ---- the forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d, build", [(d, build) for d in BUILDS for build in BUILDS[d]], ids=str)
def test_the_forward_is_right(d, build, causal, scales):
    problem = Problem(1, 2, 1, 200, 460, d, "bf16", mask=Mask(causal=causal))
    x = inputs(problem, scales, build["Bc"])
    assert not why(problem, x, *forward(problem, x, **build))


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
        dict(PING_PONG=1), dict(OVERLAP=0), dict(DYNAMIC=0), dict(UNROLL=2), dict(Q_IN_REGISTERS=2),
        dict(Q_IN_REGISTERS=0, PING_PONG=1, OVERLAP=0),
    ],
    ids=str,
)  # fmt: skip
def test_a_switch_turned(turned):
    problem = Problem(1, 2, 1, 290, 260, 64, "fp16", mask=Mask(causal=True))
    x = inputs(problem, "block", SMALL["Bc"])
    assert not why(problem, x, *forward(problem, x, **SMALL, **turned))


@pytest.fixture
def ordered(monkeypatch):
    """Makes launches run in an order."""
    launch = emulator.launch
    return lambda order: monkeypatch.setattr(emulator, "launch", lambda *a, **more: launch(*a, **more | order))


PROBLEM = Problem(1, 2, 1, 200, 260, 64, "fp16", mask=Mask(causal=True))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("apart", [0, 1])
def test_the_forward_is_right_in_every_order(ordered, order, apart):
    ordered(order)
    build = SMALL | dict(apart=apart, stages=2 + 2 * (not apart))
    for scales in ("block", "head"):
        x = inputs(PROBLEM, scales, build["Bc"])
        assert not why(PROBLEM, x, *forward(PROBLEM, x, **build, grid=1))


def test_every_number_of_e4m3_is_multiplied_as_it_is():
    """Every row sees one key: O is V."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    v = every.masked_fill(every.isnan(), 1).reshape(1, 4, 1, 64)
    problem = Problem(1, 1, 1, 4, 4, 64, "fp16", mask=Mask(window=(0, 0)))
    x = quantize(torch.zeros_like(v), torch.zeros_like(v), v, scales="head", incoherent=False)
    assert torch.equal(dequantize(x)[2], v)
    assert torch.equal(forward(problem, x, **SMALL)[0].float(), v)


NL = "\n        "  # between two statements of a member function
FREE = f"release_K(j);{NL}if (MASKED)"
WRITE, ACQUIRE = "if (BLOCKED && !IS_V) s.worth[ring.stage] = scaled.next(max(j - 1, w.first));", "ring.acquire();"

# lines as they are, as they should not be; what the emulator says (None: the numbers are wrong)
DEFECTS = {
    "a scale read after the release of its stage": (
        FREE, f"release_K(j), worth = s.worth[(K.stage + STAGES - 1) % STAGES];{NL}if (MASKED)", None,
    ),
    "a scale written where one is read": (
        f"{ACQUIRE}\n            {WRITE}", f"{WRITE} {ACQUIRE}", None,
    ),
    "the scale of the block before": (
        "V = scales.V + head * scales.kv_blocks;", "V = scales.V + head * scales.kv_blocks - 1;", None,
    ),
    "O not brought to V's scale": ("softmax.alpha[0] *= ratio, softmax.alpha[1] *= ratio, ", "", None),
    "l not brought to V's scale": (f"worth.fold, worth.unfold);{NL}settled", f"worth.fold, 1.f);{NL}settled", None),
    "P's keys in another order": ("pack_e4m3(x[0], x[1], x[4], x[5])", "pack_e4m3(x[0], x[4], x[1], x[5])", None),
    "V's panels as wide as Q's": ("s.sV[V.stage]), DEEP)", "s.sV[V.stage]), 128)", None),
    "Q in registers, swizzled as if wider": ("^ r * Width / 128 % CHUNKS", "^ r % CHUNKS", None),
    "P overwritten while it is read": ("settled(rS);", "take_P();", None),
    "fewer bytes than arrive": ("ring.announce(KV_BYTES)", "ring.announce(KV_BYTES - 32)", "nobody can go on"),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_defect_of_the_forward_is_found(ordered, tmp_path, what):
    line, instead, told = DEFECTS[what]
    text = FORWARD.read_text()
    assert text.count(line) == 1, f"{what}: the line stands there {text.count(line)} times"
    file = shutil.copytree(HEADERS, tmp_path / "hopper") / FORWARD.name
    file.write_text(text.replace(line, instead))
    x, found = inputs(PROBLEM, "block", SMALL["Bc"]), []
    for order in ORDERS:
        ordered(order)
        try:
            found.append(why(PROBLEM, x, *forward(PROBLEM, x, **SMALL, file=file, grid=1)))
        except emulator.EmulatorError as error:
            found.append(str(error))
        if found[-1] and (told is None or told in found[-1]):
            return
    pytest.fail(f"{what}: {found}")


# ---- the quantization -----------------------------------------------------------------------------------------------


class Side(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "to", "scale")]
    _fields_ += [(name, ctypes.c_longlong) for name in ("batch", "row", "head")]
    _fields_ += [(name, ctypes.c_int) for name in ("N", "H", "blocks", "tiles")]


class Sides(ctypes.Structure):
    _fields_ = [(name, Side) for name in "QKV"] + [(name, ctypes.c_int) for name in ("heads_q", "heads_kv")]
    _fields_ += [("flip", ctypes.c_uint32 * 8)]


BLOCKS, AMAX, GIVEN = range(3)  # STEP


def quantized(step, q, k, v, scales, *, rows, q_block, kv_block, incoherent, file=QUANTIZE):
    """e4m3 of Q, K and Vᵀ; into `scales` go scales or amaxima, or scales come from there."""
    (B, _, H, d), (N_k, H_kv) = q.shape, k.shape[1:3]
    to = [torch.empty(shape, dtype=torch.uint8) for shape in (q.shape, k.shape, (B, H_kv, d, -(-N_k // 16) * 16))]
    flip = sum(int(sign < 0) << c for c, sign in enumerate(signs(d)))
    sides = Sides(
        *(
            Side(
                x.data_ptr(), y.data_ptr(), s.data_ptr(), *x.stride()[:3], *x.shape[1:3], s.shape[2],
                -(-x.shape[1] // rows),
            )
            for x, y, s in zip((q, k, v), to, scales)
        ),
        B * H, B * H_kv, (ctypes.c_uint32 * 8)(*(flip >> 32 * word & 0xFFFFFFFF for word in range(8))),
    )  # fmt: skip
    defines = dict(HEAD_DIM=d, ROWS=rows, Q_BLOCK=q_block, KV_BLOCK=kv_block, BF16=int(q.dtype == torch.bfloat16))
    defines |= dict(INCOHERENT=int(incoherent), STEP=step)
    launch = HopperLaunch(file, "quantize", rows * d // 32, rows * (d + 8) + rows * d // 256, defines)
    launch(B * H * sides.Q.tiles + 2 * B * H_kv * sides.K.tiles, sides)
    return [x.view(torch.float8_e4m3fn) for x in to]


def same(x, y) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


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
    (64, torch.float16, (2, 300, 205, 4, 2), dict(rows=192, q_block=64, kv_block=96)),
    (64, torch.bfloat16, (1, 70, 128, 1, 1), dict(rows=64, q_block=64, kv_block=64)),
    (128, torch.bfloat16, (1, 100, 150, 2, 1), dict(rows=128, q_block=64, kv_block=128)),
    (256, torch.float16, (1, 33, 70, 2, 2), dict(rows=64, q_block=32, kv_block=64)),
]


@pytest.mark.parametrize("incoherent", [False, True], ids=["as they are", "rotated"])
@pytest.mark.parametrize("d, dtype, sizes, blocks", QUANTIZED, ids=str)
def test_scales_of_blocks_and_numbers_are_torch_s(monkeypatch, d, dtype, sizes, blocks, incoherent):
    launch, stored = emulator.launch, []
    monkeypatch.setattr(emulator, "launch", lambda *a, **more: stored.append(launch(*a, **more)))
    q, k, v = sides(d, dtype, *sizes)
    options = dict(q_block=blocks["q_block"], kv_block=blocks["kv_block"], incoherent=incoherent)
    expected = quantize(q, k, v, **options)
    scales = [torch.full_like(s, math.nan) for s in (expected.q_scale, expected.k_scale, expected.v_scale)]
    found = quantized(BLOCKS, q, k, v, scales, **blocks, incoherent=incoherent)
    for name, x, s in zip("qkv", found, scales):
        assert torch.equal(s, getattr(expected, f"{name}_scale")), name
        assert same(x, getattr(expected, name)), name
    assert stored == [sum(x.numel() for x in found)]


@pytest.mark.parametrize("d, dtype, sizes, blocks", QUANTIZED[1:3], ids=str)
def test_scales_of_heads_in_two_steps(d, dtype, sizes, blocks):
    q, k, v = sides(d, dtype, *sizes)
    expected = quantize(q, k, v, scales="head")
    scales = [torch.zeros_like(s) for s in (expected.q_scale, expected.k_scale, expected.v_scale)]
    quantized(AMAX, q, k, v, scales, **blocks, incoherent=True)
    for name, s in zip("qkv", scales):
        s /= 448
        assert torch.equal(s, getattr(expected, f"{name}_scale")), name
    for name, x in zip("qkv", quantized(GIVEN, q, k, v, scales, **blocks, incoherent=True)):
        assert same(x, getattr(expected, name)), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_numbers_of_sixteen_bits_round_as_torchs(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype]).view(1, -1, 1, 64)
    k = every[:, :1]
    options = dict(rows=128, q_block=128, kv_block=128, incoherent=False)
    found = quantized(GIVEN, every, k, k, [torch.ones(1, 1, 1)] * 3, **options)[0]
    assert same(found, to_e4m3(every.float()))


@pytest.mark.parametrize(
    "line, instead",
    [
        ("if (Transposed) {\n        __syncthreads();", "if (Transposed) {"),
        ("of_warp[threadIdx.x / 32] = most;\n    __syncthreads();", "of_warp[threadIdx.x / 32] = most;"),
        ("at[8 * (d + 8)] << 16", "at[4 * (d + 8)] << 16"),
        ("theirs - x[e]", "x[e] - theirs"),
        ("most / 448.f", "most * (1.f / 448.f)"),
    ],
)  # fmt: skip
def test_a_defect_of_the_quantization_is_found(tmp_path, ordered, line, instead):
    text = QUANTIZE.read_text()
    assert text.count(line) == 1, f"the line stands there {text.count(line)} times"
    file = shutil.copytree(HEADERS, tmp_path / "hopper") / QUANTIZE.name
    file.write_text(text.replace(line, instead))
    q, k, v = sides(128, torch.bfloat16, 1, 100, 150, 2, 1)
    expected = quantize(q, k, v)
    right = (*(getattr(expected, name) for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale")),)
    for seed in range(3):
        ordered(dict(seed=seed))
        scales = [torch.full_like(s, math.nan) for s in right[3:]]
        found = quantized(BLOCKS, q, k, v, scales, rows=64, q_block=64, kv_block=64, incoherent=True, file=file)
        if not all(map(same, (*found, *scales), right)):
            return
    pytest.fail(f"{instead}: nothing was found")
