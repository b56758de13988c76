"""fwd_v1_mma and fwd_v2_mma_split_k: the tough list, what they move, what they refuse, their binaries for sm_90a."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import settings
from sass import disassembled, nvdisasm

from sandbox import catalog, target
from sandbox.choose import choose_tile
from sandbox.kernels import fwd_v1_mma
from sandbox.mask import Mask
from sandbox.measure import formulas, gate
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Device, Infeasible, Tile, Unsupported

KERNELS = ["fwd_v1_mma", "fwd_v2_mma_split_k"]
SIMULATED = target.KIND == "simulator"
TILE = Tile(16, 32) if SIMULATED else Tile(64, 64)  # two warps where simulated, else four
by_name = pytest.mark.parametrize("name", KERNELS)


def check(name, problem, inputs=None, tile=TILE, seed=0):
    inputs = inputs or gate.gaussian(problem, seed, target.torch_device())
    verdict = gate.check(catalog.find(name), problem, tile, inputs, target.device())
    assert verdict.passed, f"{name} {problem}: {verdict.why}"
    return verdict


# ---- exactness ------------------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("N_q, N_k", [(40, 20), (20, 70)])
def test_both_alignments(align, N_q, N_k, name):
    check(name, Problem(1, 2, 1, N_q, N_k, 32, "fp16", mask=Mask(True, align)), seed=1)


@by_name
@pytest.mark.parametrize("N_q, N_k", [(0, 5), (5, 0), (1, 1), (1, 70), (50, 1), (16, 32), (17, 65), (15, 31)])
def test_sizes_at_the_edges(N_q, N_k, name):
    check(name, Problem(1, 1, 1, N_q, N_k, 32, "fp16"), seed=2)


@by_name
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_live_non_finite_inputs_give_what_the_oracle_gives(which, value, name):
    problem = Problem(1, 1, 1, 20, 40, 32, "fp16")
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    check(name, problem, gate.Inputs(**x))


@by_name
def test_keys_past_the_end_and_hidden_ones_do_not_leak(name):
    problem = Problem(1, 1, 1, 13, 37, 32, "fp16")
    x = gate.gaussian(problem, 3, target.torch_device())
    wide = [torch.full((1, 128, 1, 32), math.nan, dtype=x.k.dtype, device=x.k.device) for _ in range(2)]
    for w, y in zip(wide, (x.k, x.v)):
        w[:, :37] = y
    check(name, problem, gate.Inputs(x.q, wide[0][:, :37], wide[1][:, :37]))
    problem = Problem(1, 1, 1, 24, 140, 32, "fp16", mask=Mask(True, "top_left"))
    x = gate.gaussian(problem, 3, target.torch_device())
    x.k[:, 24:] = math.nan
    check(name, problem, x)


@by_name
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_large_logits_all_equal_one_hot_and_rising(dtype, name):
    problem = Problem(1, 1, 1, 20, 70, 32, dtype)
    x = gate.gaussian(problem, 5, target.torch_device())
    reach = (1e4 * 32**0.5 / 32) ** 0.5
    check(name, problem, gate.Inputs(x.q.sign() * reach, x.k.sign() * reach, x.v))
    check(name, problem, gate.Inputs(torch.full_like(x.q, 0.5), torch.full_like(x.k, 0.25), x.v))
    check(name, problem, gate.Inputs(*((y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (x.q, x.k, x.v))))
    for slope in (0.02, 0.2):
        rising = torch.linspace(2, 2 - 70 * slope, 70, device=x.k.device).view(1, 70, 1, 1)
        check(name, problem, gate.Inputs(x.q.abs(), (x.k * 0.1 + rising).to(x.k.dtype), x.v))


@by_name
@pytest.mark.parametrize("layout", ["heads-first", "gapped", "expanded-batch", "aliased"])
def test_any_strides(layout, name):
    problem = Problem(2, 2, 2, 20, 20, 32, "fp16")
    x = gate.gaussian(problem, 6, target.torch_device())

    def laid(y):
        if layout == "heads-first":
            return y.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "gapped":
            return torch.stack((y, y), -1).flatten(-2)[..., ::2]
        return y[:1].expand_as(y) if layout == "expanded-batch" else x.q

    check(name, problem, gate.Inputs(*map(laid, (x.q, x.k, x.v))))


@by_name
@pytest.mark.parametrize("mask", [Mask(True, "bottom_right"), Mask(window=(0, 2)), Mask(True, "top_left")], ids=str)
@pytest.mark.parametrize("N_q, N_k", [(40, 0), (60, 3), (3, 70)])
def test_rows_that_see_no_key(N_q, N_k, mask, name):
    check(name, Problem(1, 1, 1, N_q, N_k, 32, "fp16", mask=mask))


@by_name
@pytest.mark.parametrize("d, tile", [(64, Tile(32, 64)), (96, Tile(16, 32)), (128, Tile(64, 64))], ids=str)
def test_four_warps_and_several_rounds(d, tile, name):
    for problem in (
        Problem(1, 1, 1, tile.Br + 3, 70, d, "bf16", mask=Mask(True)),
        Problem(1, 2, 1, 20, 70, d, "fp16", -0.3, Mask(window=(9, 3)), softcap=5.0),
    ):
        check(name, problem, tile=tile)


SWITCHED = [(name, words) for name in KERNELS for words in ("rows=16", "stages=1", "stages=3", "lazy=0")]
SWITCHED = [(name, words) for name, words in SWITCHED if (name, words[:4]) != ("fwd_v1_mma", "lazy")]
SWITCHED.remove(("fwd_v1_mma", "stages=3"))
SWITCHED.remove(("fwd_v2_mma_split_k", "stages=1"))


@pytest.mark.parametrize("name, words", SWITCHED)
@pytest.mark.parametrize("mask", [Mask(), Mask(True)], ids=str)
def test_exact_with_a_switch_turned(name, words, mask):
    check(f"{name} {words}", Problem(1, 2, 1, 40, 100, 32, "fp16", mask=mask), tile=Tile(32, 32))


# ---- what they move -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SIMULATED, reason="accesses are counted on the simulator")
@pytest.mark.parametrize("name", [*KERNELS, "fwd_v2_mma"])
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(window=(9, 3))], ids=str)
@pytest.mark.parametrize("N_q, N_k", [(40, 75), (1, 33), (33, 32), (16, 0)])
def test_counted_equals_the_formula(N_q, N_k, mask, name):
    problem = Problem(2, 2, 1, N_q, N_k, 32, "fp16", mask=mask)
    counted, formula = check(name, problem).traffic, formulas.traffic(name, problem, TILE)
    for way in ("reads", "writes"):
        counts = [{array: n for array, n in getattr(t, way).items() if n} for t in (counted, formula)]
        assert counts[0] == counts[1]
    assert (counted.read_bytes, counted.write_bytes) == (formula.read_bytes, formula.write_bytes)


@pytest.mark.skipif(not SIMULATED, reason="accesses are counted on the simulator")
def test_what_passes_through_shared_memory():
    """Of one block, Br = 32, Bc = 32, d = 64, two warps, two steps: split-Q reads K and V twice a step, split-K Q."""
    from sandbox.device import simulator

    problem, tile, d = Problem(1, 1, 1, 32, 64, 64, "fp16"), Tile(32, 32), 64
    counts = {}
    for name in ("fwd_v2_mma rows=16", "fwd_v2_mma_split_k"):
        with simulator.counting() as counted:
            check(name, problem, tile=tile)
        counts[name] = counted
    q, k = counts.values()
    O = 32 * d  # it leaves through sQ
    assert [q.shared_reads[x] for x in ("sQ", "sK", "sV")] == [2 * 32 * d + O, 2 * 2 * 32 * d, 2 * 2 * 32 * d]
    assert [k.shared_reads[x] for x in ("sQ", "sK", "sV")] == [2 * 2 * 32 * d + O, 2 * 32 * d, 2 * 32 * d]
    assert k.shared_writes["sX"] == k.shared_reads["sX"] == 2 * 2 * 32 * d  # steps · W · Br · d
    for way in ("shared_reads", "shared_writes"):
        assert getattr(q, way)["sX"] == 0


# ---- what they take -------------------------------------------------------------------------------------------------


@by_name
def test_what_they_do_not_take(name):
    simt = name[:6]
    for problem, words in (
        (Problem(1, 1, 1, 8, 8, 64, "fp32"), f"{simt} takes fp32"),
        (Problem(1, 1, 1, 8, 8, 64, "fp16", mask=Mask(boolean=True)), f"no boolean masks: {simt} has them"),
        (Problem(1, 1, 1, 8, 8, 48, "fp16"), f"multiples of 32, not 48: {simt} takes any"),
    ):
        with pytest.raises(Unsupported, match=words):
            catalog.find(name).fit(problem, TILE, HOPPER)
    ampere = Device("A100", "gpu", 108, 166_912, 255, 1024, (8, 0))
    with pytest.raises(Unsupported, match=f"this is sm_80: {simt} runs here"):
        catalog.find(name).fit(Problem(1, 1, 1, 8, 8, 64, "fp16"), TILE, ampere)


@by_name
@pytest.mark.parametrize("d, tile, words", [
    (64, Tile(24, 64), "multiple of"), (64, Tile(32, 40), "16 or 32 a warp"), (96, Tile(32, 128), "16 or 32 a warp"),
    (128, Tile(128, 128), "registers a thread"), (64, Tile(1, 1), "multiple of 16 rows"),
])  # fmt: skip
def test_tiles_that_do_not_fit(d, tile, words, name):
    with pytest.raises(Infeasible, match=words):
        catalog.find(name).fit(Problem(1, 1, 1, 8, 8, d, "fp16"), tile, HOPPER)


def test_one_stage_where_two_do_not_fit():
    problem, tile = Problem(1, 1, 1, 8, 8, 256, "fp16"), Tile(32, 128)
    with pytest.raises(Infeasible, match="of shared memory"):
        catalog.find("fwd_v2_mma_split_k").fit(problem, tile, HOPPER)
    assert fwd_v1_mma.chosen(problem, tile, HOPPER).stages == 1


@by_name
@pytest.mark.parametrize("device", [HOPPER, SIMULATOR], ids=lambda device: device.kind)
@pytest.mark.parametrize("d", range(32, 257, 32))
def test_every_head_dim_has_a_tile(d, device, name):
    choose_tile(Problem(1, 1, 1, 4096, 4096, d, "fp16"), device, catalog.find(name))


def test_what_they_say_of_themselves():
    v1, split = map(catalog.find, KERNELS)
    assert (v1.generation, v1.loop_order, v1.parent, v1.one_block_a_head, v1.default) == (
        "v1", "kv_outer", "fwd_v1", True, False
    )  # fmt: skip
    assert (split.generation, split.loop_order, split.parent, split.default) == ("v2", "q_outer", "fwd_v2_mma", False)


# ---- the binaries for sm_90a, with or without a GPU -----------------------------------------------------------------


def compiled(name: str, problem: Problem, tile: Tile | None, folder) -> tuple | str:
    """(tile, ptxas's report, the cubin), or why the tile is infeasible."""
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    variant = catalog.find(name)
    tile = tile or choose_tile(problem, HOPPER, variant)
    q = torch.empty(1, problem.N_q, problem.H, problem.d, dtype=problem.torch_dtype, device="meta")
    try:
        with compiling() as done:
            launch = variant.launcher(problem, tile, HOPPER)
            launch(problem, q, q, q, None, q, torch.empty(1, problem.H, problem.N_q, device="meta"))
    except Infeasible as misfit:
        return misfit.reason
    ((kernel, report),) = done
    (binary,) = kernel._compiled.values()
    return tile, report, binary.cubin


KINDS = [(False, 0.0), (True, 5.0)]
CASES = [(64, "fp16", None, *KINDS[1]), (128, "bf16", None, *KINDS[0])]
if settings.default.max_examples >= 300:  # the ci profile
    CASES = [(d, "bf16", None, *KINDS[d % 64 == 0]) for d in (32, 64, 96, 128, 192, 256)]  # others: tests/spills.py
    CASES += [(d, "fp16", Tile(64, 128), *KINDS[0]) for d in (64, 128)]
SPILLS = "fwd_v1_mma", 128, Tile(64, 128)


@by_name
@pytest.mark.parametrize("d, dtype, tile, causal, softcap", CASES)
def test_tensor_cores_and_no_spills(d, dtype, tile, causal, softcap, name, compiler, tmp_path):
    """One HMMA for each 16 x 8 x 16 of S and of the parts of O: as many as one warp of split-Q has for Br / W rows."""
    problem = Problem(1, 32, 32, 4096, 4096, d, dtype, mask=Mask(causal), softcap=softcap)
    found = compiler.submit(compiled, name, problem, tile, tmp_path).result()
    if (name, d, tile) == SPILLS:
        assert isinstance(found, str) and "B of spills" in found
        return
    tile, report, cubin = found
    assert (report.stack, report.spills) == (0, 0) and report.registers <= 255, report
    if nvdisasm() is not None:
        text, W = disassembled(cubin, tmp_path), 4 if d % 64 == 0 else 2
        assert text.count("HMMA.16816.F32" + ".BF16" * (dtype == "bf16")) == 4 * tile.Br * tile.Bc * d // W // 16**3
        assert all(name in text for name in ("LDGSTS.E.BYPASS.LTC128B.128", "MUFU.EX2", "STSM.16.M", "STS.128"))
        assert "CALL" not in text and "LDL" not in text
