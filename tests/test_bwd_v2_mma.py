"""bwd_v2_mma: the tough list on the simulator or a GPU; what it refuses; its switches; its binaries for sm_90a.

bwd_v2_mma_deterministic where it differs.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from sass import disassembled, nvdisasm

from sandbox import catalog, target
from sandbox.choose import choose_tile
from sandbox.device import layout, sections
from sandbox.kernels import bwd_v2_mma, bwd_v2_mma_deterministic
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Device, Infeasible, Tile, Unsupported

VARIANT = catalog.find("bwd_v2_mma")
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


@pytest.mark.parametrize("mask", [Mask(True, "bottom_right"), Mask(window=(0, 2)), Mask(True, "top_left")], ids=str)
@pytest.mark.parametrize("N_q, N_k", [(40, 0), (60, 3), (3, 60)])
def test_rows_and_keys_that_see_nothing(N_q, N_k, mask):
    check(Problem(1, 1, 1, N_q, N_k, 16, "fp16", mask=mask))


@pytest.mark.parametrize("which", ["k", "v"])
def test_keys_past_the_end_do_not_leak(which):
    problem = Problem(1, 1, 1, 13, 37, 32, "fp16")
    x = gate.gaussian(problem, 3, target.torch_device()).named()
    wide = torch.full((1, 128, 1, 32), math.nan, dtype=x[which].dtype, device=x[which].device)
    wide[:, :37] = x[which]
    check(problem, gate.Inputs(**{**x, which: wide[:, :37]}))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_large_logits_all_equal_and_one_hot(dtype):
    problem = Problem(1, 1, 1, 20, 40, 32, dtype)
    x = gate.gaussian(problem, 5, target.torch_device())
    reach = (1e4 * 32**0.5 / 32) ** 0.5
    check(problem, gate.Inputs(x.q.sign() * reach, x.k.sign() * reach, x.v, None, x.dO))
    check(problem, gate.Inputs(torch.full_like(x.q, 0.5), torch.full_like(x.k, 0.25), x.v, None, x.dO))
    hot = [(y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (x.q, x.k, x.v)]
    check(problem, gate.Inputs(*hot, None, x.dO))


@pytest.mark.parametrize("layout", ["heads-first", "gapped", "expanded-batch", "off by one", "aliased"])
def test_any_strides(layout):
    """Of dO, too."""
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

    q, k, v, dO = map(laid, (x.q, x.k, x.v, x.dO))
    check(problem, gate.Inputs(q, k, v, None, dO))


KINDS = [VARIANT, bwd_v2_mma.turned(roles=2), bwd_v2_mma_deterministic.VARIANT]


@pytest.mark.parametrize("variant", KINDS, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    "scale, softcap",
    [(1e-3, 15.0), (0.0, 0.0), (-0.0, 0.0), (-1e-60, 0.0), (-0.3, 0.0), (-0.3, 2.0), (None, 0.7)],
)
def test_scales_and_softcaps(scale, softcap, variant):
    check(Problem(1, 2, 1, 40, 37, 32, "fp16", scale, Mask(True), softcap), tile=Tile(32, 32), variant=variant)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k"])
def test_scales_not_above_0_of_non_finite_inputs(which, value, scale):
    """0·inf is NaN, whether the inf is in K, which becomes 0, or in Q."""
    problem = Problem(1, 1, 1, 20, 40, 32, "bf16", scale)
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    for variant in KINDS:
        check(problem, gate.Inputs(**x), Tile(32, 32), variant=variant)


@pytest.mark.parametrize(
    "d, variant", [*((d, VARIANT) for d in (112, 144, 176)), (144, bwd_v2_mma_deterministic.VARIANT)]
)
def test_tiles_wider_than_a_head(d, variant):
    problem = Problem(1, 1, 1, 20, 20, d, "fp16", mask=Mask(True))
    check(problem, tile=choose_tile(problem, target.device(), variant), variant=variant)


def test_heads_in_sections(monkeypatch):
    """Six heads of two batches and three groups, two at a time: every key block of every head is computed, once."""
    monkeypatch.setattr(sections, "L2_BYTES", 2 * 2 * 8 * 40 * 16)
    check(Problem(2, 6, 3, 40, 40, 16, "fp16", mask=Mask(True)))


SWITCHED = [
    dict(side=2), dict(side=2, barriers=2), dict(side=2, rows=32, queries=16), dict(barriers=2), dict(rows=16),
    dict(queries=16), dict(stagger=False), dict(roles=2), dict(roles=2, rows=16, queries=16),
    dict(roles=2, side=2, queries=16),
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHED, ids=str)
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(window=(9, 3))], ids=str)
def test_exact_with_a_switch_turned(switches, mask):
    problem = Problem(1, 2, 1, 70, 75, 32, "fp16", mask=mask)
    check(problem, tile=Tile(32, 32), variant=bwd_v2_mma.turned(**switches))


@pytest.mark.parametrize("switches", [{}, dict(side=2)], ids=str)
def test_two_roles_and_a_softcap(switches):
    problem = Problem(1, 2, 1, 70, 40, 32, "bf16", -0.3, Mask(True), softcap=2.0)
    check(problem, tile=Tile(32, 32), variant=bwd_v2_mma.turned(roles=2, queries=16, **switches))


def test_wide_heads_have_two_roles():
    problem = Problem(1, 1, 1, 80, 20, 256, "fp16", mask=Mask(True))
    tile = choose_tile(problem, target.device(), VARIANT)
    assert bwd_v2_mma.chosen(problem, tile, target.device()).roles == 2
    check(problem, tile=tile)


@pytest.mark.parametrize("problem, switches", [
    (Problem(1, 2, 1, 40, 20, 32, "fp16", mask=Mask(True)), {}),
    (Problem(1, 2, 2, 20, 40, 32, "bf16", mask=Mask(True, "top_left")), {}),
    (Problem(1, 1, 1, 35, 35, 32, "fp16", mask=Mask(window=(9, 3))), dict(side=2)),
    (Problem(1, 1, 1, 35, 18, 32, "fp16", -0.3, softcap=2.0), dict(barriers=2)),
    (Problem(1, 1, 1, 0, 5, 16, "fp16"), {}), (Problem(1, 1, 1, 5, 0, 16, "fp16"), {}),
    (Problem(1, 1, 1, 60, 3, 16, "fp16", mask=Mask(True)), {}),
], ids=str)  # fmt: skip
def test_deterministic(problem, switches):
    check(problem, tile=Tile(32, 32), variant=bwd_v2_mma_deterministic.turned(**switches))


# ---- what it takes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem, words", [
    (Problem(1, 1, 1, 8, 8, 64, "fp32"), "bwd_v2 takes fp32"),
    (Problem(1, 1, 1, 8, 8, 64, "fp16", mask=Mask(boolean=True)), "no boolean masks: bwd_v2 has them"),
    (Problem(1, 1, 1, 8, 8, 40, "fp16"), "multiples of 16, not 40: bwd_v2 takes any"),
])  # fmt: skip
def test_what_it_does_not_take(problem, words):
    with pytest.raises(Unsupported, match=words):
        bwd_v2_mma.fit(problem, TILE, HOPPER)


def test_switches_by_name():
    """As they are written on a command line."""
    problem = Problem(1, 1, 1, 40, 40, 32, "fp16")
    check(problem, tile=Tile(32, 32), variant=catalog.find("bwd_v2_mma side=2 stagger=0"))
    with pytest.raises(ValueError, match="switch sides=2: did you mean side"):
        catalog.find("bwd_v2_mma_deterministic sides=2")


def test_an_older_gpu():
    ampere = Device("A100", "gpu", 108, 166_912, 255, 1024, (8, 0))
    with pytest.raises(Unsupported, match="needs sm_90 .stmatrix., this is sm_80: bwd_v2 runs here"):
        bwd_v2_mma.fit(Problem(1, 1, 1, 8, 8, 64, "fp16"), TILE, ampere)


@pytest.mark.parametrize("d, tile, words", [
    (64, Tile(24, 16), "shared evenly"), (64, Tile(32, 24), "shared evenly"), (64, Tile(64, 512), "8 warps"),
    (256, Tile(64, 128), "192 registers"), (128, Tile(128, 128), "of shared memory"),
])  # fmt: skip
def test_tiles_that_do_not_fit(d, tile, words):
    with pytest.raises(Infeasible, match=words):
        bwd_v2_mma.fit(Problem(1, 1, 1, 8, 8, d, "fp16"), tile, HOPPER)


@pytest.mark.parametrize("device", [HOPPER, SIMULATOR], ids=lambda device: device.kind)
@pytest.mark.parametrize("d", range(16, 257, 16))
def test_head_dims_have_a_tile(d, device):
    for mask in (Mask(), Mask(True)):
        problem = Problem(1, 1, 1, 4096, 4096, d, "fp16", mask=mask)
        bwd_v2_mma.fit(problem, choose_tile(problem, device, VARIANT), device)


def test_columns_that_warps_share():
    """Sevenths, ninths, elevenths and thirteenths are shared as eighths, tenths, twelfths and sixteenths."""
    for d, wide in (80, 80), (112, 128), (128, 128), (144, 160), (160, 160), (176, 192), (208, 256), (256, 256):
        problem = Problem(1, 1, 1, 8, 8, d, "fp16")
        a = bwd_v2_mma.chosen(problem, choose_tile(problem, HOPPER, VARIANT), HOPPER)
        assert a.wide == a.side * a.columns == wide


# ---- the binary for sm_90a, with or without a GPU -------------------------------------------------------------------


def compiled(variant: str, problem: Problem, folder, tile: Tile | None = None) -> tuple:
    """(tile, which is the usual one unless given, layout, kernel -> (ptxas's report, the cubin))."""
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    tile = tile or choose_tile(problem, HOPPER, VARIANT)
    q = torch.empty(1, problem.N_q, problem.H, problem.d, dtype=problem.torch_dtype, device="meta")
    with compiling() as done:
        launch = catalog.find(variant).launcher(problem, tile, HOPPER)
        launch(problem, q, q, q, None, q, torch.empty(1, problem.H, problem.N_q, device="meta"), q, q, q, q)
    found = {kernel.name: (report, *(b.cubin for b in kernel._compiled.values())) for kernel, report in done}
    return tile, bwd_v2_mma.chosen(problem, tile, HOPPER), found


LONG = os.environ.get("HYPOTHESIS_PROFILE") == "ci" or os.environ.get("CI", "").lower() in ("1", "true")
CASES = [(64, "bf16", False, 0.0), (128, "fp16", True, 0.0), (256, "bf16", False, 0.0)]
if LONG:
    CASES = [(d, dtype, causal, 0.0) for d in (32, 64, 96, 128, 256) for dtype in ("fp16", "bf16") for causal in (0, 1)]
    CASES.append((64, "bf16", True, 5.0))


@pytest.mark.parametrize("d, dtype, causal, softcap", CASES)
def test_tensor_cores_and_no_spills(d, dtype, causal, softcap, compiler, tmp_path):
    """One HMMA for each 16 x 8 x 16 of a warp's part of the five products; dQ leaves 16 bytes at a time."""
    problem = Problem(1, 32, 32, 4096, 4096, d, dtype, mask=Mask(causal), softcap=softcap)
    tile, a, found = compiler.submit(compiled, "bwd_v2_mma", problem, tmp_path).result()
    main = "halves" if a.roles == 2 else "bwd_v2_mma"
    assert set(found) == {"rowsum", main, "to_dtype"} and a.roles == (2 if d > 128 else 1)
    for name, (report, _) in found.items():
        assert (report.stack, report.spills) == (0, 0) and report.registers <= 255, f"{name}: {report}"
    if nvdisasm() is not None:
        text, keys = disassembled(found[main][1], tmp_path), a.rows // 16
        scores, own = keys * a.queries // 8 * d // 16, keys * a.columns // 8 * a.queries // 16
        dQ = a.rows_dQ // 16 * a.piece // 8 * tile.Bc // 16
        once = (3 - a.roles) * (scores + own * (2 if a.side > 1 else 1)) + dQ  # some loops are rolled
        assert text.count("HMMA.16816.F32" + ".BF16" * (dtype == "bf16")) >= once
        assert text.count("REDG.E.ADD.F32x4") == a.rows_dQ // 16 * a.piece // 8
        assert all(name in text for name in ("LDGSTS.E.BYPASS.LTC128B.128", "MUFU.EX2", "STSM.16.M")), text[:99]
        assert "CALL" not in text and "LDL" not in text


OF_64 = [("bwd_v2_mma", 128, "bf16", -0.3)]
if LONG:
    names = "bwd_v2_mma", "bwd_v2_mma_deterministic"
    OF_64 = list(itertools.product(names, (112, 128), ("fp16", "bf16"), (None, -0.3)))


@pytest.mark.parametrize("name, d, dtype, scale", OF_64)
def test_64x64_may_be_chosen_and_spills_nothing(name, d, dtype, scale, compiler, tmp_path):
    """It takes all registers; unmasked it spilled up to 112 bytes while each part of a step found its share anew."""
    problem = Problem(1, 32, 32, 4096, 4096, d, dtype, scale)
    assert Tile(64, 64) in layout.paces(name, "bwd_v2", problem.kind, HOPPER)
    _, _, found = compiler.submit(compiled, name, problem, tmp_path, Tile(64, 64)).result()
    for name, (report, _) in found.items():
        assert (report.stack, report.spills) == (0, 0) and report.registers <= 255, f"{name}: {report}"


ANY_SIGN = [(*case, None) for case in (CASES if LONG else [(128, "bf16", True, 0.0)])]
ANY_SIGN.append((128, "fp16", True, 0.0, -0.3))


@pytest.mark.parametrize("d, dtype, causal, softcap, scale", ANY_SIGN)
def test_deterministic_spills_nothing(d, dtype, causal, softcap, scale, compiler, tmp_path):
    problem = Problem(1, 32, 32, 4096, 4096, d, dtype, scale, Mask(causal), softcap)
    _, _, found = compiler.submit(compiled, "bwd_v2_mma_deterministic", problem, tmp_path).result()
    assert set(found) == {"rowsum", "dkdv", "dq"}
    for name, (report, _) in found.items():
        assert (report.stack, report.spills) == (0, 0) and report.registers <= 255, f"{name}: {report}"
