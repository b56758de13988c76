"""attention_fp8, quantize_fp8 and transpose_v, on the emulator or a Hopper GPU: what they give and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sandbox
from sandbox import emulator, target
from sandbox.device import quantize as fused
from sandbox.kernels.fwd_v3_fp8 import tile_for
from sandbox.mask import Mask
from sandbox.measure import gate_fp8
from sandbox.problem import Problem
from sandbox.quantize import E4M3, SCALES, Quantized, quantize, transpose_keys

SIMULATED = target.KIND == "simulator"
WHERE = target.torch_device()
runs = pytest.mark.skipif(
    emulator.compiler() is None if SIMULATED else torch.cuda.get_device_capability()[0] != 9,
    reason="no C++ compiler to emulate it with" if SIMULATED else "this GPU is no Hopper",
)
gpu_only = pytest.mark.skipif(SIMULATED, reason="needs a GPU: the emulator has no graphs")
NAN, INF = math.nan, math.inf
USUAL = {64: 64, 128: 96, 256: 128}  # keys of a block, where there are few
BLOCKS = {64: (64, 128, 160), 128: (64, 96, 192), 256: (64, 128)}


def tensors(seed=0, B=1, N_q=70, N_k=90, H=2, H_kv=1, d=64, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, N_q, H, d), (B, N_k, H_kv, d), (B, N_k, H_kv, d)
    return [torch.randn(shape, generator=g).to(dtype).to(WHERE) for shape in shapes]


def same(x: Quantized, y: Quantized) -> bool:
    """Bit for bit, wherever they lie."""
    pairs = [(getattr(x, name), getattr(y, name)) for name in vars(x)]
    return all(bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def bits(a, b) -> bool:
    return a.shape == b.shape and torch.equal(*(z.cpu().contiguous().view(torch.uint8) for z in (a, b)))


def laid_out(x, layout: str):
    """x with the same numbers in other strides: heads before rows; gaps between rows, or between columns."""
    if x.dtype == E4M3:
        return laid_out(x.view(torch.uint8), layout).view(E4M3)
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "rows apart":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    if layout == "columns apart":
        return torch.stack((x, x), -1)[..., 0]
    return x


LAYOUTS = "contiguous", "heads first", "rows apart", "columns apart"

# ---- the pass on the GPU gives the reference's bits -----------------------------------------------------------------


@st.composite
def cases(draw):
    """q, k, v with blocks of zeros, subnormals and what is not finite; options of quantize_fp8."""
    d, H_kv = draw(st.sampled_from(sorted(USUAL))), draw(st.integers(1, 2))
    lengths = st.sampled_from([0, 1, 31, 64, 97, 161, 200])
    seed, B, group = draw(st.integers(0, 999)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    x = tensors(seed, B, draw(lengths), draw(lengths), H_kv * group, H_kv, d, dtype)
    for y in x:
        for value in draw(st.lists(st.sampled_from([NAN, INF, -INF, 65504.0, 1e-39, 6e-8, -0.0]), max_size=3)):
            if y.numel():
                y.view(-1)[draw(st.integers(0, y.numel() - 1))] = value
        if draw(st.booleans()):
            y[:, : draw(st.sampled_from([32, 64, 160]))] *= draw(st.sampled_from([0.0, 1e-7, 1e-30]))
    x = [laid_out(y, draw(st.sampled_from(LAYOUTS))) for y in x]
    options = dict(scales=draw(st.sampled_from(SCALES)), incoherent=draw(st.booleans()), seed=draw(st.integers(0, 3)))
    return x, options | dict(kv_block=draw(st.sampled_from(BLOCKS[d])))


@runs
@given(cases())
def test_the_pass_gives_the_reference_s_bits(case):
    x, options = case
    assert same(fused.quantize(*x, **options), quantize(*(y.cpu() for y in x), **options))


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", USUAL)
def test_a_row_major_v_is_transposed(d, layout):
    for N in (0, 1, 15, 16, 130):
        v = laid_out(tensors(N, B=2, N_k=N, H=2, H_kv=2, d=d)[2].to(E4M3), layout)
        expected = transpose_keys(v.cpu())
        assert bits(fused.transpose_keys(v), expected) and bits(sandbox.transpose_v(v), expected)


@pytest.mark.parametrize(
    "N_k, d, keys", [*((90, d, keys) for d, keys in USUAL.items()), (2048, 64, 128), (2049, 64, 160), (1025, 128, 192)]
)
def test_blocks_are_those_of_the_kernel(N_k, d, keys):
    q, k, v = tensors(N_k=N_k, d=d)
    x = sandbox.quantize_fp8(q, k, v)
    assert (x.q_block, x.kv_block) == (64, keys)
    assert same(x, quantize(q.cpu(), k.cpu(), v.cpu(), kv_block=keys))


def test_what_the_pass_cannot_do_the_reference_does():
    for x, blocks in (
        (tensors(dtype=torch.float32), {}), (tensors(d=24), dict(incoherent=False)), (tensors(), dict(kv_block=40)),
        (tensors(d=256), dict(kv_block=160)),
    ):  # fmt: skip
        blocks = {"kv_block": 64} | blocks
        assert not fused.takes(*x, "block", 64, blocks["kv_block"])
        assert same(sandbox.quantize_fp8(*x, **blocks), quantize(*(y.cpu() for y in x), **blocks))


# ---- attention ------------------------------------------------------------------------------------------------------


def problem_of(x, **mask):
    (B, N_q, H, d), (N_k, H_kv) = x.q.shape, x.k.shape[1:3]
    return Problem(B, H, H_kv, N_q, N_k, d, "bf16", mask=Mask(**mask))


def check(x, scale=None, softcap=0.0, **mask):
    """attention_fp8 is its emulation, within what fp8's gate allows."""
    problem = replace(problem_of(x, **mask), softcap=softcap)
    problem = problem if scale is None else replace(problem, scale=scale)
    tile = tile_for(problem, target.device(), x)
    outputs = sandbox.attention_fp8(x, scale=scale, softcap=softcap, **mask, return_lse=True)
    for output, (E, allowed) in zip(outputs, gate_fp8.allowances(problem, tile, x, None).values()):
        off = (output.double() - E).abs()
        assert ((off <= allowed) | (output == E) | (output.isnan() & E.isnan())).all()
    return outputs


@runs
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("d", USUAL)
def test_16_bits_and_what_they_are_quantized_to_give_the_same(d, scales):
    q, k, v = tensors(d=d)
    x = sandbox.quantize_fp8(q, k, v, scales=scales)
    O, LSE = check(x, causal=True)
    assert O.shape == q.shape and O.dtype == torch.bfloat16 and LSE.shape == (1, 2, 70) and LSE.dtype == torch.float32
    if scales == "block":
        inside = sandbox.attention(q, k, v, variant="fwd_v3_fp8", causal=True, return_lse=True)
        assert bits(inside[0], O) and bits(inside[1], LSE)


@runs
@pytest.mark.parametrize("d, kv_block", [(64, 32), (64, 256), (128, 224), (256, 96)])
def test_the_tile_is_that_of_the_blocks(d, kv_block):
    x = sandbox.quantize_fp8(*tensors(d=d, N_k=2 * kv_block + 7), kv_block=kv_block, q_block=128)
    assert tile_for(problem_of(x), target.device(), x).Bc == kv_block
    check(x)


@runs
@pytest.mark.parametrize(
    "options", [dict(window=(30, 5)), dict(softcap=2.0), dict(scale=-0.2), dict(scale=0.0)], ids=str
)
def test_options_arrive(options):
    check(sandbox.quantize_fp8(*tensors()), **options)


@runs
def test_strided_tensors_and_scales():
    x = sandbox.quantize_fp8(*tensors(H=2, H_kv=2), scales="tensor")
    O = sandbox.attention_fp8(x)
    fields = {name: laid_out(getattr(x, name), "heads first") for name in "qk"}
    fields["v"] = laid_out(x.v, "columns apart")
    fields |= {name: getattr(x, name)[:, :1].expand(1, 2, 1) for name in ("q_scale", "k_scale", "v_scale")}
    assert bits(sandbox.attention_fp8(replace(x, **fields)), O)


@runs
def test_of_a_peer_s_tensors():
    """Row-major e4m3 and a scale a head, as others take them."""
    q, k, v = (y.to(E4M3) for y in tensors(H=2, H_kv=2))
    one = torch.ones(1, 2, 1, device=WHERE)
    check(Quantized(q, k, sandbox.transpose_v(v), one, one / 2, one * 3, 70, 90, "head"))


@runs
@pytest.mark.parametrize("sizes", [dict(N_q=0), dict(N_k=0), dict(N_q=1, N_k=1), dict(H=0, H_kv=0), dict(B=0)], ids=str)
@pytest.mark.parametrize("scales", ["block", "head"])
def test_sizes_at_the_edges(sizes, scales):
    q, k, v = tensors(**sizes)
    O, LSE = sandbox.attention_fp8(sandbox.quantize_fp8(q, k, v, scales=scales), return_lse=True)
    assert O.shape == q.shape and LSE.shape == (q.shape[0], q.shape[2], q.shape[1])
    if not k.shape[1]:
        assert (O == 0).all() and (LSE == -INF).all()
    inside = sandbox.attention(q, k, v, variant="fwd_v3_fp8", return_lse=True)
    assert scales != "block" or bits(inside[0], O) and bits(inside[1], LSE)


@runs
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_becomes_nan_where_it_is_seen(which, value):
    x = tensors(N_q=80, N_k=200)
    x[which][0, 50, 0, 2] = value
    O, _ = check(sandbox.quantize_fp8(*x), causal=True, align="top_left")  # row i sees keys up to i
    where = {0: (50, 0), 1: (slice(50, None),), 2: (slice(None), slice(None), 2)}  # of V all, as 0·NaN is NaN
    expected = torch.zeros(80, 2, 64, dtype=torch.bool)
    expected[where[which]] = True
    assert torch.equal(O[0].isnan().cpu(), expected)


# ---- what is refused ------------------------------------------------------------------------------------------------


GOOD = quantize(*tensors(), kv_block=160)
scale = GOOD.v_scale
BAD = [
    (dict(v_scale=scale[0]), {}, ValueError, "v_scale has shape (1, 1): expected (1, 1, 1), by scales='block'"),
    (dict(v_scale=scale.half()), {}, TypeError, "v_scale has dtype torch.float16: expected torch.float32"),
    (dict(v_scale=0 * scale), {}, ValueError, "v_scale holds 0.0: expected finite numbers above 0"),
    (dict(q_scale=-GOOD.q_scale), {}, ValueError, "q_scale holds -"),
    (dict(k_scale=scale * NAN), {}, ValueError, "k_scale holds nan"),
    (dict(k_scale=None), {}, TypeError, "k_scale is missing: expected a torch.Tensor, fp32 of shape (1, 1, 1)"),
    (dict(k=GOOD.k.to(torch.float8_e5m2)), {}, TypeError, "k has dtype torch.float8_e5m2: expected torch.float8_e4m3"),
    (dict(k=GOOD.k.to("meta")), {}, ValueError, f"k is on meta: expected q's device, {GOOD.q.device}"),
    (dict(v_scale=scale.to("meta")), {}, ValueError, "v_scale is on meta: expected q's device"),
    (dict(kv_block=100), {}, ValueError, "kv_block=100: expected 32, 64, 96, 128, 160, 192, 224 or 256 keys"),
    (dict(), dict(tile=(192, 128)), ValueError, "kv_block=160: expected 128 keys, those of tile 192x128"),
    (dict(q_block=96, q_scale=GOOD.q_scale[..., :1]), {}, ValueError, "q_block=96: expected a multiple of 64 rows"),
    (dict(), dict(tile=(100, 160)), ValueError, "tile 100x160: fwd_v3_fp8 takes 128, 192 or 256 rows"),
    (dict(), dict(scale=INF), ValueError, "scale=inf: expected a finite number"),
    (dict(), dict(dtype=torch.float32), TypeError, "dtype=torch.float32: expected torch.float16 or torch.bfloat16"),
    (dict(), dict(window=3), TypeError, "window"),
    (dict(), dict(softcap=-1.0), ValueError, "softcap=-1.0"),
    (dict(v_scale=scale.clone().requires_grad_()), {}, ValueError, "v_scale requires gradients: fwd_v3_fp8 has no"),
]  # fmt: skip


def refused(call, error, told):
    with pytest.raises(error) as raised:
        call()
    assert told in str(raised.value) and "\n" not in str(raised.value)


@runs
@pytest.mark.parametrize("fields, options, error, told", BAD)
def test_bad_8_bits_are_one_line(monkeypatch, fields, options, error, told):
    monkeypatch.setattr("sandbox.kernels.fwd_v3_fp8.Launch.attend", None)  # nothing is launched
    refused(lambda: sandbox.attention_fp8(replace(GOOD, **fields), **options), error, told)


def test_8_bits_without_scales():
    told = "expected float32, float16 or bfloat16; 8 bits need scales: attention_fp8 takes what quantize_fp8 makes"
    for dtype in (E4M3, torch.float8_e5m2):
        q, k, v = (y.to(dtype) for y in tensors())
        refused(lambda: sandbox.attention(q, k, v), TypeError, told)
        refused(lambda: sandbox.attention(q, k, v, variant="fwd_v3_fp8"), TypeError, told)
        refused(lambda: sandbox.attention_fp8(q), TypeError, "x is Tensor: expected a Quantized")
    refused(lambda: sandbox.transpose_v(v), TypeError, "v has dtype torch.float8_e5m2: expected a torch.Tensor of")
    refused(lambda: sandbox.transpose_v(v[0].to(E4M3)), ValueError, "v has shape (90, 1, 64): expected 4 axes")
    refused(lambda: sandbox.transpose_v(None), TypeError, "v is NoneType")


def test_a_head_dimension_without_hadamard():
    q, k, v = tensors(d=96)
    told = "fwd_v3_fp8 takes head_dim 64, 128 and 256, not 96: fwd_v3 takes multiples of 8"
    refused(lambda: sandbox.attention(q, k, v, variant="fwd_v3_fp8"), ValueError, told)
    refused(lambda: sandbox.attention_fp8(sandbox.quantize_fp8(q, k, v, incoherent=False)), ValueError, told)
    refused(lambda: sandbox.quantize_fp8(q, k, v), ValueError, "head_dim d=96: incoherent processing has Hadamard")


def test_what_the_kernel_does_not_do_with_16_bits():
    q, k, v = tensors()
    mask = torch.ones(70, 90, dtype=torch.bool, device=WHERE)
    for told, x, options in (
        ("no boolean masks: fwd_v2 has them", (q, k, v), dict(mask=mask)),
        ("not fp32: fwd_v2 takes fp32", tensors(dtype=torch.float32), {}),
        ("variant='fwd_v3_fp8' has no backward", (q.clone().requires_grad_(), k, v), {}),
    ):
        refused(lambda: sandbox.attention(*x, variant="fwd_v3_fp8", **options), ValueError, told)


def test_inputs_of_two_devices():
    q, k, v = tensors()
    refused(lambda: sandbox.quantize_fp8(q, k.to("meta"), v), ValueError, "k is on meta: expected q's device")
    if SIMULATED:
        everywhere = {name: y.to("meta") for name, y in vars(GOOD).items() if isinstance(y, torch.Tensor)}
        refused(lambda: sandbox.attention_fp8(replace(GOOD, **everywhere)), ValueError, "q is on meta: the simulator")


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@runs
@gpu_only
@pytest.mark.parametrize("scales", SCALES)
def test_a_graph_waits_for_nothing(scales):
    static = tensors(N_q=1000, N_k=1000)

    def step():
        return sandbox.attention_fp8(sandbox.quantize_fp8(*static, scales=scales))

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        O = step()
    for x, y in zip(static, tensors(1, N_q=1000, N_k=1000)):
        x.copy_(y)
    graph.replay()
    assert bits(O, step())


@runs
@gpu_only
def test_a_transposition_in_a_graph_and_at_size():
    v = torch.randn(2, 5000, 8, 128, device=WHERE).to(E4M3)
    sandbox.transpose_v(v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vT = sandbox.transpose_v(v)
    graph.replay()
    assert bits(vT, transpose_keys(v.cpu()))
