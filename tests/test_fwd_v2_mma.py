"""fwd_v2_mma: the tough list on the simulator or a GPU; what it refuses; its switches; its binaries for sm_90a."""

from __future__ import annotations

import math
import os

import pytest
import torch
from sass import disassembled, nvdisasm

from sandbox import catalog, target
from sandbox.choose import choose_tile
from sandbox.device import rows, sections
from sandbox.kernels import fwd_v2_mma
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Device, Infeasible, Tile, Unsupported

VARIANT = catalog.find("fwd_v2_mma")
TILE = Tile(16, 16) if target.KIND == "simulator" else Tile(64, 64)  # few kinds of kernel, since each is compiled


def check(problem, inputs=None, tile=TILE, seed=0, variant=VARIANT):
    inputs = inputs or gate.gaussian(problem, seed, target.torch_device())
    verdict = gate.check(variant, problem, tile, inputs, target.device())
    assert verdict.passed, f"{problem}: {verdict.why}"


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("N_q, N_k", [(40, 20), (20, 40)])
def test_both_alignments(align, N_q, N_k):
    check(Problem(1, 2, 1, N_q, N_k, 32, "fp16", mask=Mask(True, align)), seed=1)


@pytest.mark.parametrize("N_q, N_k", [(0, 5), (5, 0), (1, 1), (1, 50), (50, 1), (16, 16), (17, 33), (15, 31)])
def test_sizes_at_the_edges(N_q, N_k):
    check(Problem(1, 1, 1, N_q, N_k, 32, "fp16"), seed=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_live_non_finite_inputs_give_what_the_oracle_gives(which, value):
    problem = Problem(1, 1, 1, 20, 40, 32, "fp16")
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    check(problem, gate.Inputs(**x))


def test_keys_past_the_end_do_not_leak():
    problem = Problem(1, 1, 1, 13, 37, 32, "fp16")
    x = gate.gaussian(problem, 3, target.torch_device())
    wide = [torch.full((1, 128, 1, 32), math.nan, dtype=x.k.dtype, device=x.k.device) for _ in range(2)]
    for w, y in zip(wide, (x.k, x.v)):
        w[:, :37] = y
    check(problem, gate.Inputs(x.q, wide[0][:, :37], wide[1][:, :37]))


def test_keys_that_the_band_hides_do_not_leak():
    """K, NaN, in tiles that the mask empties and in tiles that it cuts."""
    problem = Problem(1, 1, 1, 24, 200, 32, "fp16", mask=Mask(True, "top_left"))
    x = gate.gaussian(problem, 3, target.torch_device())
    k, v = x.k.clone(), x.v.clone()
    k[:, 24:], v[:, 64:] = math.nan, math.nan
    check(problem, gate.Inputs(x.q, k, v))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_large_logits_all_equal_one_hot_and_rising(dtype):
    """The last: the maximum grows at every step, by less than O is rescaled for and by more."""
    problem = Problem(1, 1, 1, 20, 70, 32, dtype)
    x = gate.gaussian(problem, 5, target.torch_device())
    reach = (1e4 * 32**0.5 / 32) ** 0.5
    check(problem, gate.Inputs(x.q.sign() * reach, x.k.sign() * reach, x.v))
    check(problem, gate.Inputs(torch.full_like(x.q, 0.5), torch.full_like(x.k, 0.25), x.v))
    check(problem, gate.Inputs(*((y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (x.q, x.k, x.v))))
    for slope in (0.02, 0.2):
        rising = torch.linspace(2, 2 - 70 * slope, 70, device=x.k.device).view(1, 70, 1, 1)
        check(problem, gate.Inputs(x.q.abs(), (x.k * 0.1 + rising).to(x.k.dtype), x.v))


@pytest.mark.parametrize("rows", ["all", "one", "zero"])
@pytest.mark.parametrize("mask", [Mask(), Mask(True)], ids=str)
def test_rows_with_negative_scores_alone(mask, rows):
    """A warp looks for its maxima as integers, and where a row has none above 0 as floats."""
    problem = Problem(1, 1, 1, 20, 70, 32, "fp16", mask=mask)
    x = gate.gaussian(problem, 7, target.torch_device())
    q, k = x.q.abs(), -x.k.abs()
    if rows == "one":
        q = torch.cat((q[:, :1], -q[:, 1:]), 1)
    if rows == "zero":
        q[:, ::3] = 0
    check(problem, gate.Inputs(q, k, x.v))


@pytest.mark.parametrize("layout", ["heads-first", "gapped", "expanded-batch", "off by one", "aliased"])
def test_any_strides(layout):
    problem = Problem(2, 2, 2, 20, 20, 32, "fp16")
    x = gate.gaussian(problem, 6, target.torch_device())

    def laid(y):
        if layout == "heads-first":
            return y.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "gapped":
            return torch.stack((y, y), -1).flatten(-2)[..., ::2]
        if layout == "off by one":
            return torch.cat((y.new_zeros(1), y.flatten()))[1:].view(y.shape)
        return y[:1].expand_as(y) if layout == "expanded-batch" else x.q

    check(problem, gate.Inputs(*map(laid, (x.q, x.k, x.v))))


@pytest.mark.parametrize("mask", [Mask(True, "bottom_right"), Mask(window=(0, 2)), Mask(True, "top_left")], ids=str)
@pytest.mark.parametrize("N_q, N_k", [(40, 0), (60, 3), (3, 60)])
def test_row_blocks_that_see_no_key(N_q, N_k, mask):
    check(Problem(1, 1, 1, N_q, N_k, 16, "fp16", mask=mask))


@pytest.mark.parametrize("switches", [dict(rows=16), dict(rows=32), dict(pairs=True)], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, -0.0, -1e-3, 1e-60, -1e-60])
def test_scales_not_above_0(scale, dtype, switches):
    """Q takes the sign of the scale in shared memory; hidden keys still have no weight."""
    problem = Problem(1, 2, 1, 40, 75, 32, dtype, scale, Mask(True))
    check(problem, tile=Tile(32, 32), variant=fwd_v2_mma.turned(**switches))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k"])
def test_scales_not_above_0_of_non_finite_inputs(which, value, scale):
    """0·inf is NaN, whether the inf is in Q, which becomes 0, or in K."""
    problem = Problem(1, 1, 1, 20, 40, 32, "bf16", scale)
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    check(problem, gate.Inputs(**x))


def test_one_kernel_for_all_scales():
    """(what multiplies S before the softmax, the softmax's unit)."""
    found = {scale: rows.scale_and_unit(Problem(1, 1, 1, 1, 1, 32, "fp16", scale)) for scale in (2.0, -2.0, 0.0, 1e-60)}
    unit = math.log2(math.e)
    assert found[2.0] == (1.0, pytest.approx(2 * unit)) and found[-2.0] == (-1.0, pytest.approx(2 * unit))
    assert found[0.0] == found[1e-60] == (0.0, pytest.approx(unit))
    assert rows.scale_and_unit(Problem(1, 1, 1, 1, 1, 32, "fp16", -2.0, softcap=3.0)) == (-2.0, pytest.approx(unit))


def test_small_scores_softcapped():
    """The error of a score that is far below the cap is relative to the score."""
    for scale in (0.25, 1e-3):
        check(Problem(1, 1, 1, 16, 16, 16, "fp16", scale, softcap=15.0))


def test_sections_are_as_large_as_l2_lets_them_be_and_alike():
    MB = 1 << 20
    assert [sections.heads_a_section(heads, 4 * MB) for heads in (0, 1, 7, 8, 9, 12, 16, 17)] == [
        0,
        1,
        7,
        8,
        5,
        6,
        8,
        6,
    ]
    assert sections.heads_a_section(36, 4 * 2500 * 112) == 18
    assert sections.heads_a_section(5, 0) == 5 and sections.heads_a_section(5, 33 * MB) == 1


def test_heads_in_sections(monkeypatch):
    """Five heads of two batches, two at a time: every row block of every head is computed, once."""
    monkeypatch.setattr(sections, "L2_BYTES", 2 * 4 * 40 * 16)
    check(Problem(2, 5, 5, 40, 40, 16, "fp16", mask=Mask(True)))


SWITCHED = [
    dict(rows=16), dict(rows=32), dict(lazy=False), dict(pairs=True), dict(pairs=True, rows=16),
    dict(late=True),
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHED, ids=str)
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(window=(9, 3))], ids=str)
def test_exact_with_a_switch_turned(switches, mask):
    problem = Problem(1, 2, 1, 40, 75, 32, "fp16", mask=mask)
    tile = Tile(32, 32 if "pairs" in switches else 16)
    check(problem, tile=tile, variant=fwd_v2_mma.turned(**switches))


# ---- what it takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem, words", [
    (Problem(1, 1, 1, 8, 8, 64, "fp32"), "fwd_v2 takes fp32"),
    (Problem(1, 1, 1, 8, 8, 64, "fp16", mask=Mask(boolean=True)), "no boolean masks: fwd_v2 has them"),
    (Problem(1, 1, 1, 8, 8, 40, "fp16"), "multiples of 16, not 40: fwd_v2 takes any"),
])  # fmt: skip
def test_what_it_does_not_take(problem, words):
    with pytest.raises(Unsupported, match=words):
        fwd_v2_mma.fit(problem, TILE, HOPPER)


def test_an_older_gpu():
    ampere = Device("A100", "gpu", 108, 166_912, 255, 1024, (8, 0))
    with pytest.raises(Unsupported, match="needs sm_90 .stmatrix., this is sm_80: fwd_v2 runs here"):
        fwd_v2_mma.fit(Problem(1, 1, 1, 8, 8, 64, "fp16"), TILE, ampere)


@pytest.mark.parametrize("d, tile, words", [
    (64, Tile(24, 16), "multiple of 16 rows, a warp's, and of 16 keys"), (64, Tile(32, 24), "of 16 keys"),
    (256, Tile(128, 192), "224 registers a thread"), (64, Tile(512, 64), "512 threads"),
    (256, Tile(128, 128), "361,472 B of shared memory"), (64, Tile(1, 1), "multiple of 16 rows"),
])  # fmt: skip
def test_tiles_that_do_not_fit(d, tile, words):
    with pytest.raises(Infeasible, match=words):
        fwd_v2_mma.fit(Problem(1, 1, 1, 8, 8, d, "fp16"), tile, HOPPER)


@pytest.mark.parametrize("device", [HOPPER, SIMULATOR], ids=lambda device: device.kind)
@pytest.mark.parametrize("d", range(16, 257, 16))
def test_every_head_dim_has_a_tile(d, device):
    for mask in (Mask(), Mask(True)):
        choose_tile(Problem(1, 1, 1, 4096, 4096, d, "fp16", mask=mask), device, VARIANT)


# ---- the binary for sm_90a, with or without a GPU -------------------------------------------------------------------


def compiled(problem: Problem, folder) -> tuple:
    """(tile, switches, ptxas's report, the cubin)."""
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    tile = choose_tile(problem, HOPPER, VARIANT)
    q = torch.empty(1, problem.N_q, problem.H, problem.d, dtype=problem.torch_dtype, device="meta")
    with compiling() as done:
        launch = VARIANT.launcher(problem, tile, HOPPER)
        launch(problem, q, q, q, None, q, torch.empty(1, problem.H, problem.N_q, device="meta"))
    ((kernel, report),) = done
    (binary,) = kernel._compiled.values()
    return tile, fwd_v2_mma.chosen(problem, tile, HOPPER), report, binary.cubin


LONG = os.environ.get("HYPOTHESIS_PROFILE") == "ci" or os.environ.get("CI", "").lower() in ("1", "true")
KINDS = [(False, 0.0), (True, 0.0), (False, 5.0), (True, 5.0)]
CASES = [(64, "fp16", *KINDS[0]), (128, "bf16", *KINDS[1]), (256, "fp16", *KINDS[3])]
if LONG:
    CASES = [(d, t, *kind) for d in (32, 64, 96, 128, 160, 256) for t in ("fp16", "bf16") for kind in KINDS]


@pytest.mark.parametrize("d, dtype, causal, softcap", CASES)
def test_tensor_cores_and_no_spills(d, dtype, causal, softcap, compiler, tmp_path):
    """The loop is laid out whole: one HMMA for each 16 x 8 x 16 of Q Kᵀ and P̃ V, one LDSM for each block read."""
    problem = Problem(1, 32, 32, 4096, 4096, d, dtype, mask=Mask(causal), softcap=softcap)
    tile, switches, report, cubin = compiler.submit(compiled, problem, tmp_path).result()
    assert (report.stack, report.spills) == (0, 0) and report.registers <= 255, report
    if nvdisasm() is not None:
        text, M, N, K = disassembled(cubin, tmp_path), switches.rows // 16, tile.Bc // 16, d // 16
        share = 1 + switches.pairs
        assert text.count("HMMA.16816.F32" + ".BF16" * (dtype == "bf16")) == 4 * M * N * K // share
        read = K * (M + N // share) + N * K // share + switches.pairs * M * N
        again = text.count("LDSM.16.M") - read  # Q, before the loop, where the scale is not above 0: unrolled or not
        assert (softcap == 0) <= again <= (softcap == 0) * M * K // share
        assert all(name in text for name in ("LDGSTS.E.BYPASS.LTC128B.128", "MUFU.EX2", "STSM.16.M")), text[:99]
        assert "CALL" not in text and "LDL" not in text
