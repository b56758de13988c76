"""The FP8 forward emulated: exact where nothing rounds, no further off than its roundings allow where they do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import reference
from sandbox.algorithms_fp8 import (
    ACCUMULATE,
    flash_attention_3_fp8,
    flash_attention_16bit,
    plain,
    standard_attention,
)
from sandbox.mask import ALIGNS, Mask
from sandbox.problem import Problem
from sandbox.quantize import SCALES, dequantize, quantize, rotate, signs

INF = math.inf
E4M3, FP16 = 2.0**-4, 2.0**-11  # unit roundoffs


def tensors(seed, problem):
    generator = torch.Generator().manual_seed(seed)
    B, d = problem.B, problem.d
    shapes = (B, problem.N_q, problem.H, d), (B, problem.N_k, problem.H_kv, d), (B, problem.N_k, problem.H_kv, d)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@st.composite
def cases(draw):
    """A problem, its tensors, a boolean mask or None, and a tile."""
    H_kv = draw(st.integers(1, 2))
    mask = Mask(
        draw(st.booleans()), draw(st.sampled_from(ALIGNS)), draw(st.sampled_from([(-1, -1), (3, 2), (0, -1), (20, 0)]))
    )
    problem = Problem(
        draw(st.integers(1, 2)), H_kv * draw(st.integers(1, 2)), H_kv, draw(st.integers(0, 40)),
        draw(st.integers(0, 40)), 64, scale=draw(st.sampled_from([None, 0.3, -1.0])), mask=mask,
        softcap=draw(st.sampled_from([0.0, 2.0])),
    )  # fmt: skip
    x = tensors(draw(st.integers(0, 999)), problem)
    seen = torch.rand(problem.N_q, problem.N_k, generator=torch.Generator().manual_seed(1)) < 0.6
    return problem, x, seen if draw(st.booleans()) else None, draw(st.sampled_from([16, 32, 64]))


def options(problem, seen, Bc):
    return dict(scale=problem.scale, mask=problem.mask, softcap=problem.softcap, seen=seen, Bc=Bc)


@given(cases(), st.sampled_from([-1, 1]), st.integers(0, 8))
def test_without_roundings_it_is_attention(case, order, exponent):
    problem, x, seen, Bc = case
    expected = reference.forward(problem, *x, seen)
    found = flash_attention_3_fp8(
        plain(*x), P_dtype="fp32", order=order, exponent=exponent, **options(problem, seen, Bc)
    )
    for actual, exact in zip(found, expected):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


@given(cases(), st.sampled_from(SCALES), st.booleans())
def test_e4m3_P_is_within_its_unit(case, scales, incoherent):
    """Given Q, K, V in e4m3, P alone rounds: by 2⁻⁴ of each, or 2⁻¹⁰ of 2⁻⁸ where it is small; l does not see it."""
    problem, x, seen, Bc = case
    x8 = quantize(*x, scales=scales, q_block=8, kv_block=16, incoherent=incoherent)
    q, k, v = dequantize(x8)
    O, LSE = flash_attention_3_fp8(x8, **options(problem, seen, Bc))
    O_star, LSE_star = reference.forward(problem, q, k, v, seen)
    torch.testing.assert_close(LSE.double(), LSE_star, rtol=1e-4, atol=1e-4)
    bound, _ = reference.forward(problem, q, k, v.abs(), seen)
    small = 2.0**-18 * v.abs().sum(1, keepdim=True).repeat_interleave(problem.group, 2)
    assert ((O - O_star).abs() <= (E4M3 * bound + small) * (1 + 1e-4) + 1e-5).all()


@given(cases(), st.sampled_from(ACCUMULATE))
def test_tensor_core_sums_lose_bits_not_more(case, accumulate):
    problem, x, seen, Bc = case
    x8 = quantize(*x, kv_block=16)
    O, LSE = flash_attention_3_fp8(x8, accumulate=accumulate, **options(problem, seen, Bc))
    exact, LSE_exact = flash_attention_3_fp8(x8, **options(problem, seen, Bc))
    q, k, v = dequantize(x8)
    size = v.abs().amax() if v.numel() else 0
    assert ((O - exact).abs() <= size * (0.2 if accumulate != "fp32" else 0)).all()
    torch.testing.assert_close(LSE, LSE_exact, rtol=0.01, atol=0.02)


def test_tensor_core_sums_are_biased_where_they_are_long():
    """Dropped bits all pull towards 0: a long sum in one accumulator loses more than the same in two levels."""
    problem = Problem(1, 1, 1, 1, 4096, 64)
    q, k, v = tensors(0, problem)
    x = quantize(0 * q, k, 1 + v.abs(), incoherent=False)
    O_star, _ = reference.forward(problem, *dequantize(x))
    lost = {name: (1 - flash_attention_3_fp8(x, accumulate=name)[0] / O_star).mean().item() for name in ACCUMULATE}
    assert abs(lost["fp32"]) < 1e-6 and abs(lost["two_level"]) < 1e-4 and 1e-3 < lost["fp22"] < 2e-2


@given(st.integers(0, 999), st.sampled_from([16, 64]), st.sampled_from(SCALES))
def test_scales_of_a_power_of_two_move_nothing(seed, kv_block, scales):
    """V's scales ride in O's rescaling: blocks of V of very different size are still summed right."""
    problem = Problem(1, 2, 1, 9, 200, 64)
    q, k, v = tensors(seed, problem)
    v = v * 2.0 ** torch.randint(-30, 30, (1, 200, 1, 1), generator=torch.Generator().manual_seed(seed))
    x = quantize(q, k, v, scales=scales, kv_block=kv_block, incoherent=False)
    O, _ = flash_attention_3_fp8(x, Bc=64, P_dtype="fp32")
    O_star, _ = reference.forward(problem, *dequantize(x))
    assert (O - O_star).abs().max() <= 1e-5 * O_star.abs().max()


def test_rows_that_see_nothing():
    problem = Problem(1, 1, 1, 40, 20, 64, mask=Mask(True))
    x = quantize(*tensors(0, problem))
    O, LSE = flash_attention_3_fp8(x, mask=problem.mask, Bc=64)
    assert (O[:, :20] == 0).all() and (LSE[..., :20] == -INF).all()
    assert O.isfinite().all() and LSE[..., 20:].isfinite().all()


def test_what_is_masked_does_not_leak():
    problem = Problem(1, 1, 1, 40, 40, 64, mask=Mask(True))
    q, k, v = tensors(0, problem)
    x = quantize(q, k, v, kv_block=16, incoherent=False)
    k[:, 32:], v[:, 32:] = math.nan, INF
    bad = quantize(q, k, v, kv_block=16, incoherent=False)
    O, bad_O = (flash_attention_3_fp8(y, mask=problem.mask, Bc=16)[0] for y in (x, bad))
    torch.testing.assert_close(bad_O[:, :32], O[:, :32])
    assert bad_O[:, 32:].isnan().all()


def test_a_tile_is_whole_blocks():
    x = quantize(*tensors(0, Problem(1, 1, 1, 4, 4, 64)))
    with pytest.raises(ValueError, match="Bc=96: expected a multiple of kv_block=64"):
        flash_attention_3_fp8(x, Bc=96)


# ---- where the roundings show ---------------------------------------------------------------------------------------


def rmse(O, O_star):
    return (O.double() - O_star).square().mean().sqrt().item()


def test_a_larger_exponent_serves_small_P():
    """Without 2⁸, P below 2⁻¹⁰ vanishes."""
    problem = Problem(1, 1, 1, 64, 4096, 64)
    q, k, v = tensors(0, problem)
    x = quantize(2 * q, k, v)
    O_star, _ = reference.forward(problem, *dequantize(x))
    off = {e: rmse(flash_attention_3_fp8(x, exponent=e)[0], O_star) for e in (0, 8)}
    assert off[8] < 0.9 * off[0]
    assert flash_attention_3_fp8(x, exponent=12)[0].isfinite().all()  # it saturates


def test_only_one_operand_rounds():
    problem = Problem(1, 2, 2, 64, 64, 64)
    q, k, v = tensors(0, problem)
    x8, sign = quantize(q, k, v), signs(64)
    exact = plain(rotate(q, sign), rotate(k, sign), v)
    O_star, _ = reference.forward(problem, q, k, v)
    alone = replace(x8, q=exact.q, q_scale=torch.ones_like(x8.q_scale))
    assert 0 < rmse(flash_attention_3_fp8(alone)[0], O_star) < rmse(flash_attention_3_fp8(x8)[0], O_star)


@pytest.mark.parametrize("causal", [False, True])
def test_sixteen_bits(causal):
    problem = Problem(1, 2, 1, 100, 130, 64, "fp16", mask=Mask(causal))
    q, k, v = (x.half() for x in tensors(0, problem))
    O_star, LSE_star = reference.forward(problem, q, k, v)
    bound, _ = reference.forward(problem, q, k, v.abs())
    for order in (-1, 1):
        O, LSE = flash_attention_16bit(q, k, v, Bc=32, order=order, mask=problem.mask)
        assert ((O - O_star).abs() <= 1.01 * FP16 * bound + 1e-5).all()
        torch.testing.assert_close(LSE.double(), LSE_star, rtol=1e-5, atol=1e-5)
    twin = reference.twin_forward(problem, q, k, v)
    standard = standard_attention(q, k, v, mask=problem.mask, rows=33)
    assert rmse(standard, O_star) < 1.5 * rmse(twin, O_star) and (standard - twin).abs().max() < 4e-3
    assert rmse(O, O_star) < rmse(standard, O_star)


def test_standard_attention_of_rows_that_see_nothing():
    problem = Problem(1, 1, 1, 8, 4, 64, mask=Mask(True))
    O = standard_attention(*tensors(0, problem), mask=problem.mask)
    assert (O[:, :4] == 0).all() and O.isfinite().all()


def test_a_lazy_kernel_keeps_the_weight_of_a_key_that_outweighs_all_others():
    """e4m3 has P̃ = 2⁸ exactly, and half and twice as much, but for other ratios of two blocks' scales it rounds."""
    errors = {}
    q, k, v = tensors(0, Problem(1, 1, 1, 128, 512, 64, "fp16"))
    k[:, ::2] *= 12  # a few scores are far above the others
    v = v * torch.linspace(1, 3, 8).repeat_interleave(64)[:, None, None]
    x = quantize(q, k, v, kv_block=64)
    one = torch.ones_like
    x = replace(x, q=q, k=k, q_scale=one(x.q_scale), k_scale=one(x.k_scale))
    P = (q[0, :, 0].double() @ k[0, :, 0].double().T / 8).softmax(-1)
    for factor in (1.0, 1.3):
        uneven = torch.where(torch.arange(8) % 2 == 0, factor, 1.0)
        given = replace(x, v_scale=x.v_scale * uneven)
        for lazy in (False, True):
            O, _ = flash_attention_3_fp8(given, Bc=64, lazy=lazy)
            errors[factor, lazy] = (O[0, :, 0] - P @ dequantize(given)[2][0, :, 0].double()).square().mean().sqrt()
    assert errors[1.0, True] < 2 * errors[1.0, False] and errors[1.3, True] > 2 * errors[1.3, False]
