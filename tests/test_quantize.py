"""Quantization to e4m3: its scales, its roundings, the rotation, the layout of Vᵀ, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox.quantize import (
    E4M3,
    FP8_MAX,
    HADAMARD,
    SCALE_MIN,
    SCALES,
    check,
    dequantize,
    per_row,
    quantize,
    restore_keys,
    rotate,
    round_e4m3,
    signs,
    transpose_keys,
)

NAN, INF = float("nan"), float("inf")


def tensors(seed, B=1, N_q=5, N_k=7, H=2, H_kv=1, d=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N_q, H, d), (B, N_k, H_kv, d), (B, N_k, H_kv, d)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@st.composite
def cases(draw):
    """(q, k, v), options of quantize."""
    H_kv, dtype = draw(st.integers(1, 2)), draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    sizes = dict(B=draw(st.integers(1, 2)), N_q=draw(st.integers(0, 70)), N_k=draw(st.integers(0, 70)))
    x = tensors(draw(st.integers(0, 999)), **sizes, H=H_kv * draw(st.integers(1, 2)), H_kv=H_kv, dtype=dtype)
    options = dict(scales=draw(st.sampled_from(SCALES)), incoherent=draw(st.booleans()))
    return x, options | dict(q_block=draw(st.integers(1, 40)), kv_block=draw(st.integers(1, 40)))


# ---- numbers and scales ---------------------------------------------------------------------------------------------


@given(cases())
def test_every_number_is_within_half_a_step_of_e4m3(case):
    (q, k, v), options = case
    x = quantize(q, k, v, **options)
    check(x)
    if options["incoherent"]:
        q, k = (rotate(y, signs(64)) for y in (q, k))
    blocks = (x.q_block, x.q_scale), (x.kv_block, x.k_scale), (x.kv_block, x.v_scale)
    for exact, back, (block, scale) in zip((q.float(), k.float(), v.float()), dequantize(x), blocks):
        assert back.shape == exact.shape and back.dtype == torch.float32
        step = (2.0**-4 * exact.abs()).maximum(per_row(scale, block, exact.shape[1]) * 2.0**-10)
        assert ((exact - back).abs() <= step * (1 + 1e-6)).all()


@given(cases())
def test_a_block_s_largest_number_is_448_of_its_scales(case):
    (q, k, v), options = case
    x = quantize(q, k, v, **options | {"incoherent": False})
    B, N, H_kv, _ = k.shape
    if options["scales"] == "tensor":
        assert all(len(scale.unique()) <= 1 for scale in (x.q_scale, x.k_scale, x.v_scale))
        assert not k.numel() or torch.equal(x.k_scale.flatten()[0], k.float().abs().max() * (1 / FP8_MAX))
        return
    block = x.kv_block
    for b in range(B):
        for h in range(H_kv):
            for n, scale in enumerate(x.k_scale[b, h]):
                part = k[b, n * block : (n + 1) * block, h].float()
                assert scale == (part.abs().max() * (1 / FP8_MAX) if part.numel() else 1)
    assert (x.k_scale.shape[-1] == 1) if options["scales"] == "head" else (x.k_scale.shape[-1] == -(-N // block))


def test_rounding_is_to_nearest_even_and_saturates():
    tiny = 2.0**-10  # half of the smallest number
    becomes = {
        0.0: 0.0, 1.0: 1.0, 1.0625: 1.0, 1.1875: 1.25, -1.0625: -1.0, 447.0: 448.0, 464.0: 448.0, 1e9: 448.0,
        -1e9: -448.0, 2 * tiny: 2 * tiny, tiny: 0.0, 1.01 * tiny: 2 * tiny, 3 * tiny: 4 * tiny,
    }  # fmt: skip
    assert round_e4m3(torch.tensor([*becomes])).tolist() == [*becomes.values()]
    assert round_e4m3(torch.tensor([NAN, INF, -INF])).isnan().all()


def test_every_e4m3_number_stays():
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()]
    assert len(every) == 254 and torch.equal(round_e4m3(every), every)


def test_zeros_have_a_scale_of_1():
    x = quantize(*(torch.zeros_like(y) for y in tensors(0)), kv_block=4)
    assert all((scale == 1).all() for scale in (x.q_scale, x.k_scale, x.v_scale))
    assert all((y == 0).all() for y in dequantize(x))


def test_a_block_of_V_has_the_next_power_of_2_for_its_scale():
    q, k, v = tensors(0)
    v[:, :4] = 448.0  # a scale of 1, which is one already
    found = quantize(q, k, v, kv_block=4).v_scale
    amax = torch.stack([part.abs().amax((1, 3)) for part in v.split(4, 1)], -1)  # [B, H, n]
    assert (found.frexp().mantissa == 0.5).all() and (found[..., 0] == 1).all()
    assert (found >= amax / 448.001).all() and (found < 2 * amax / 448).all()
    assert torch.allclose(quantize(q, k, v, scales="head").v_scale, amax.amax(-1, keepdim=True) / 448)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_not_in_the_scale(value):
    q, k, v = tensors(0)
    v[0, 3, 0, 5] = 0
    clean = quantize(q, k, v, kv_block=4, incoherent=False)
    v[0, 3, 0, 5] = value
    x = quantize(q, k, v, kv_block=4, incoherent=False)
    assert torch.equal(x.v_scale, clean.v_scale)
    back, there = dequantize(x)[2], dequantize(clean)[2]
    assert back[0, 3, 0, 5].isnan()
    back[0, 3, 0, 5] = 0
    assert torch.equal(back, there)
    q[0, 2, 1, 7] = value
    rotated = quantize(q, k, v)
    check(rotated)
    assert torch.equal(dequantize(rotated)[0].isnan().all(-1), q.isfinite().logical_not().any(-1))
    everything = quantize(*(torch.full_like(y, value) for y in (q, k, v)))
    assert (everything.k_scale == 1).all() and everything.q.float().isnan().all()


def test_scales_have_a_floor():
    q, k, v = tensors(0)
    tiny = quantize(q * 1e-30, k * 1e-30, v * 1e-30, scales="head")
    assert (tiny.q_scale == SCALE_MIN).all() and (1 / tiny.q_scale).isfinite().all()
    check(tiny)
    subnormal = quantize(*(torch.full_like(y, 1e-45) for y in (q, k, v)))
    assert (subnormal.v_scale == SCALE_MIN).all() and all((y == 0).all() for y in dequantize(subnormal))


def test_the_ratio_of_two_scales_does_not_overflow_an_accumulator():
    largest = 3e10 / FP8_MAX / SCALE_MIN * 2.0**8 * FP8_MAX * 2.0**20  # of Õ: a million keys, each P̃ = 2⁸ and V̂ = 448
    assert torch.tensor(largest).isfinite()
    q, k, v = tensors(0, N_k=8, dtype=torch.float16)
    v[:, :4], v[:, 4:] = 65504, 2.0**-24
    scale = quantize(q, k, v, kv_block=4).v_scale[0, 0]
    assert (scale > SCALE_MIN).all() and (scale[0] / scale[1]).isfinite()


# ---- incoherent processing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", HADAMARD)
def test_rotation_is_orthogonal_and_known(d):
    M = rotate(torch.eye(d), signs(d, 3))
    torch.testing.assert_close(M @ M.T, torch.eye(d))
    i = torch.arange(d)
    common = i[:, None] & i
    parity = sum((common >> bit) & 1 for bit in range(8)) % 2
    torch.testing.assert_close(M, signs(d, 3)[:, None] * (1 - 2 * parity) * d**-0.5)


@given(st.integers(0, 999), st.sampled_from(HADAMARD))
def test_rotation_leaves_the_scores(seed, d):
    q, k, _ = (x[0, :, 0] for x in tensors(seed, d=d))
    sign = signs(d, seed)
    torch.testing.assert_close(rotate(q, sign) @ rotate(k, sign).T, q @ k.T, rtol=1e-4, atol=1e-4)


def test_rotation_spreads_an_outlier():
    x = torch.zeros(128)
    x[17] = 8
    assert (rotate(x, signs(128)).abs() - 8 / 128**0.5).abs().max() < 1e-6


def test_signs_are_the_same_everywhere():
    assert torch.equal(signs(64, 5), signs(64, 5)) and not torch.equal(signs(64, 5), signs(64, 6))
    assert set(signs(256).tolist()) == {1.0, -1.0} and 90 < (signs(256) > 0).sum() < 166
    assert signs(64)[:16].tolist() == [-1, 1, 1, 1, 1, -1, -1, 1, -1, 1, 1, 1, 1, 1, 1, -1]


# ---- Vᵀ -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 3), st.sampled_from([E4M3, torch.float32]))
def test_keys_come_back(N, H, dtype):
    v = torch.randn(2, N, H, 8).to(dtype)
    vT = transpose_keys(v)
    assert vT.shape == (2, H, 8, -(-N // 16) * 16) and vT.is_contiguous() and vT.dtype == dtype
    assert torch.equal(restore_keys(vT, N).float(), v.float())


def test_keys_move_inside_16():
    v = torch.arange(1.0, 21)[None, :, None, None]
    slots = transpose_keys(v)[0, 0, 0]
    for q in range(4):
        for group in (0, 1):
            keys = [16 * group + n for n in (2 * q, 2 * q + 1, 8 + 2 * q, 9 + 2 * q)]
            held = [key + 1 if key < 20 else 0 for key in keys]
            assert slots[16 * group + 4 * q :][:4].tolist() == held


# ---- what is refused ------------------------------------------------------------------------------------------------


GOOD = quantize(*tensors(0), kv_block=4)
BAD = [
    (dict(q=GOOD.q.to(torch.float8_e5m2)), TypeError, "q has dtype torch.float8_e5m2: expected torch.float8_e4m3fn"),
    (dict(k=GOOD.k.float()), TypeError, "k has dtype torch.float32"),
    (dict(q_scale=None), TypeError, "q_scale is missing: expected a torch.Tensor, fp32 of shape (1, 2, 1)"),
    (dict(v_scale=2.0), TypeError, "v_scale is float"),
    (dict(k_scale=GOOD.k_scale.double()), TypeError, "k_scale has dtype torch.float64: expected torch.float32"),
    (dict(k_scale=GOOD.k_scale[..., :1]), ValueError, "k_scale has shape (1, 1, 1): expected (1, 1, 2)"),
    (dict(v_scale=GOOD.v_scale * 0), ValueError, "v_scale holds 0.0: expected finite numbers above 0"),
    (dict(v_scale=-GOOD.v_scale), ValueError, "v_scale holds -"),
    (dict(q_scale=GOOD.q_scale * NAN), ValueError, "q_scale holds nan"),
    (dict(q_scale=GOOD.q_scale * INF), ValueError, "q_scale holds inf"),
    (dict(v=restore_keys(GOOD.v, 7)), ValueError, "expected Vᵀ, (B, H_kv, d, N_pad) = (1, 1, 64, 16); row-major V is"),
    (dict(v=GOOD.v[..., :7]), ValueError, "v has shape (1, 1, 64, 7)"),
    (dict(q=GOOD.q[0]), ValueError, "q has shape (5, 2, 64): expected 4 axes"),
    (dict(k=GOOD.k[..., :32]), ValueError, "k has shape (1, 7, 1, 32)"),
    (dict(kv_block=0), ValueError, "kv_block=0"),
    (dict(q_block=2.0), TypeError, "q_block=2.0"),
    (dict(scales="row"), ValueError, "scales='row': expected one of tensor, head, block"),
    (dict(scales="head"), ValueError, "kv_block=4: expected all 7 rows, by scales='head'"),
]


@pytest.mark.parametrize("fields, error, told", BAD)
def test_a_bad_quantized_is_one_line(fields, error, told):
    check(GOOD)
    with pytest.raises(error) as raised:
        check(replace(GOOD, **fields))
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_values_need_not_be_looked_at():
    check(replace(GOOD, v_scale=GOOD.v_scale * 0), values=False)


@pytest.mark.parametrize(
    "change, options, told",
    [
        ({}, dict(scales="row"), "scales='row'"),
        ({}, dict(q_block=0), "q_block=0"),
        ({}, dict(kv_block=True), "kv_block=True"),
        (dict(d=32), {}, "head_dim d=32: incoherent processing has Hadamard matrices of 64, 128 and 256"),
        (dict(H=3, H_kv=2), {}, "q has 3 heads, k 2"),
        (dict(dtype=torch.float64), {}, "q has dtype torch.float64"),
    ],
)
def test_bad_inputs_are_one_line(change, options, told):
    with pytest.raises((ValueError, TypeError)) as raised:
        quantize(*tensors(0, **change), **options)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_any_head_dimension_without_rotation():
    q, k, v = tensors(0, d=24)
    check(quantize(q, k, v, incoherent=False))
    with pytest.raises(ValueError, match="v has shape"):
        quantize(q, k, v[:, :3], incoherent=False)
    with pytest.raises(TypeError, match="k is missing"):
        quantize(q, None, v)
