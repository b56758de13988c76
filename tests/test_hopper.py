"""fwd_v3: the tough list on the emulator or a Hopper GPU; what it refuses; what its binary for sm_90a is made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sass import disassembled, nvdisasm

import sandbox
from sandbox import catalog, emulator, target
from sandbox.choose import choose_tile
from sandbox.device import quantize
from sandbox.kernels import fwd_v3, fwd_v3_fp8
from sandbox.mask import Mask
from sandbox.measure import formulas, gate, search
from sandbox.measure.cases import parse_tile
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Infeasible, Tile, Unsupported

SIMULATED = target.KIND == "simulator"
VARIANT = catalog.find("fwd_v3")
runs = pytest.mark.skipif(
    emulator.compiler() is None if SIMULATED else torch.cuda.get_device_capability()[0] != 9,
    reason="no C++ compiler to emulate it with" if SIMULATED else "this GPU is no Hopper",
)
gpu_only = pytest.mark.skipif(SIMULATED, reason="needs a GPU: the emulator has no streams, graphs or large grids")
simulated = pytest.mark.skipif(not SIMULATED, reason="accesses are counted on the emulator")
TILE = Tile(128, 64)  # of most tests: few kinds of kernel, since each is compiled


def check(problem: Problem, inputs: gate.Inputs | None = None, tile: Tile = TILE, seed: int = 0) -> gate.Verdict:
    inputs = inputs or gate.gaussian(problem, seed, target.torch_device())
    verdict = gate.check(VARIANT, problem, tile, inputs, target.device())
    assert verdict.passed, f"{problem}: {verdict.why}"
    return verdict


# ---- exactness ------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("N_q, N_k", [(150, 70), (70, 150)])
def test_both_alignments(align, N_q, N_k):
    check(Problem(1, 2, 1, N_q, N_k, 64, "fp16", mask=Mask(True, align)), seed=1)


@runs
@pytest.mark.parametrize("N_q, N_k", [(0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (128, 64), (129, 65), (127, 63)])
def test_sizes_at_the_edges(N_q, N_k):
    check(Problem(1, 1, 1, N_q, N_k, 64, "fp16"), seed=2)


@runs
@pytest.mark.parametrize("softcap", [1e-30, 0.7, 1000.0])
def test_low_and_high_caps(softcap):
    """tanh must be exact relative to itself: far below a high cap scores are what they were."""
    check(Problem(1, 2, 1, 150, 70, 64, "fp16", softcap=softcap), seed=4)


@runs
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_live_non_finite_inputs_give_what_the_oracle_gives(which, value):
    problem = Problem(1, 1, 1, 40, 90, 64, "fp16")
    x = gate.gaussian(problem, 4, target.torch_device()).named()
    x[which] = x[which].clone()
    x[which][0, 5, 0, 2] = value
    check(problem, gate.Inputs(**x))


@runs
def test_keys_past_the_end_do_not_leak():
    problem = Problem(1, 1, 1, 13, 70, 64, "fp16")
    x = gate.gaussian(problem, 3, target.torch_device())
    wide = [torch.full((1, 128, 1, 64), math.nan, dtype=x.k.dtype, device=x.k.device) for _ in range(2)]
    for w, y in zip(wide, (x.k, x.v)):
        w[:, :70] = y
    check(problem, gate.Inputs(x.q, wide[0][:, :70], wide[1][:, :70]))


@runs
def test_keys_that_the_band_hides_do_not_leak():
    """K, NaN, in tiles that the mask empties and in tiles that it cuts."""
    problem = Problem(1, 1, 1, 64, 300, 64, "fp16", mask=Mask(True, "top_left"))
    x = gate.gaussian(problem, 3, target.torch_device())
    k, v = x.k.clone(), x.v.clone()
    k[:, 64:], v[:, 128:] = math.nan, math.nan
    check(problem, gate.Inputs(x.q, k, v))


@runs
def test_large_logits_all_equal_and_one_hot():
    problem = Problem(1, 1, 1, 60, 140, 64, "bf16")
    x = gate.gaussian(problem, 5, target.torch_device())
    reach = (1e4 * 8 / 64) ** 0.5
    check(problem, gate.Inputs(x.q.sign() * reach, x.k.sign() * reach, x.v))
    check(problem, gate.Inputs(torch.full_like(x.q, 0.5), torch.full_like(x.k, 0.25), x.v))
    check(problem, gate.Inputs(*((y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (x.q, x.k, x.v))))


@runs
@pytest.mark.parametrize("layout", ["heads-first", "gapped", "expanded-batch", "off by one", "aliased"])
def test_any_strides(layout):
    problem = Problem(2, 2, 2, 70, 70, 64, "fp16")
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


SWITCHED = [
    dict(ping_pong=False), dict(overlap=False), dict(ping_pong=False, overlap=False), dict(dynamic=False),
    dict(lazy=False), dict(persistent=False), dict(dynamic=False, persistent=False),
    dict(o_apart=False, stages=2), dict(o_apart=False, dynamic=False, stages=2),
    dict(q_in_registers=4), dict(q_in_registers=1),
    dict(warp_specialized=False), dict(warp_specialized=False, ping_pong=True, dynamic=False),
    dict(warp_specialized=False, persistent=False, overlap=False, lazy=False, q_in_registers=4),
]  # fmt: skip


@runs
@pytest.mark.parametrize("switches", SWITCHED, ids=str)
@pytest.mark.parametrize("N_q", [100, 290])
def test_exact_with_a_switch_turned(switches, N_q):
    problem = Problem(1, 2, 1, N_q, 260, 64, "fp16", mask=Mask(True))
    verdict = gate.check(
        fwd_v3.turned(**switches), problem, TILE, gate.gaussian(problem, 0, target.torch_device()), target.device()
    )
    assert verdict.passed, verdict.why


@runs
@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("specialized", [True, False], ids=["producers", "none"])
@pytest.mark.parametrize("tile, stages", [("256x64", 2), ("256x16", 2), ("256x32", 4), ("192x16", 2), ("192x112", 2)])
def test_warpgroups_that_see_fewer_blocks_hold_up_nobody(tile, stages, specialized, ping_pong):
    problem = Problem(1, 1, 1, 600, 600, 64, "fp16", mask=Mask(True))
    variant = fwd_v3.turned(stages=stages, ping_pong=ping_pong, warp_specialized=specialized)
    inputs = gate.gaussian(problem, 0, target.torch_device())
    verdict = gate.check(variant, problem, parse_tile(tile), inputs, target.device())
    assert verdict.passed, verdict.why


@runs
@pytest.mark.parametrize(
    "d, tile, stages", [(64, "128x64", 2), (64, "192x64", 3), (64, "256x64", 4), (128, "128x48", 3)]
)
@pytest.mark.parametrize("apart", [False, True], ids=["through V", "apart"])
def test_exact_without_producers(d, tile, stages, apart):
    """Row blocks of fewer key blocks than there are stages, and of more."""
    tile = parse_tile(tile)
    variant = fwd_v3.turned(warp_specialized=False, stages=stages, o_apart=apart)
    for N_q, N_k, mask in (
        (3 * tile.Br + 40, 30, Mask()), (290, 260, Mask(True)), (300, 300, Mask(window=(40, 10))),
    ):  # fmt: skip
        problem = Problem(1, 2, 1, N_q, N_k, d, "fp16", mask=mask)
        verdict = gate.check(variant, problem, tile, gate.gaussian(problem, 0, target.torch_device()), target.device())
        assert verdict.passed, (problem, verdict.why)


@runs
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("slope", [-0.5, -0.02, 0.02, 0.5])
def test_maxima_that_move_with_the_keys(lazy, slope):
    """Scores rise or fall by `slope` a key: too little for a lazy maximum to follow each block, or enough."""
    problem = Problem(1, 2, 1, 100, 400, 64, "fp16")
    x = gate.gaussian(problem, 0, target.torch_device())
    x.q[..., 0], x.k[..., 0] = 8.0, slope * torch.arange(400.0)[:, None]
    verdict = gate.check(fwd_v3.turned(lazy=lazy), problem, TILE, x, target.device())
    assert verdict.passed, verdict.why


@runs
def test_attention_takes_it_by_generation_and_by_name():
    q, k, v = (torch.randn(1, 40, 2, 64, dtype=torch.float16, device=target.torch_device()) for _ in range(3))
    O, LSE = sandbox.attention(q, k, v, variant="v3", causal=True, return_lse=True)
    again = sandbox.attention(q, k, v, variant="fwd_v3", causal=True)
    assert torch.equal(O, again) and O.shape == q.shape and O.dtype == q.dtype and LSE.shape == (1, 2, 40)
    right = sandbox.attention(q, k, v, variant="v2", causal=True)
    assert torch.allclose(O.float(), right.float(), atol=2e-3)


@runs
@simulated
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(window=(20, 5)), Mask(True, "top_left")], ids=str)
@pytest.mark.parametrize("N_q, N_k", [(70, 150), (300, 70)])
def test_counts_are_what_the_formula_says(mask, N_q, N_k):
    problem = Problem(1, 2, 1, N_q, N_k, 64, "fp16", mask=mask)
    counted, formula = check(problem).traffic, formulas.traffic("fwd_v3", problem, TILE)
    assert {a: n for a, n in counted.reads.items() if n} == {a: n for a, n in formula.reads.items() if n}
    assert {a: n for a, n in counted.writes.items() if n} == {a: n for a, n in formula.writes.items() if n}
    assert (counted.read_bytes, counted.write_bytes) == (formula.read_bytes, formula.write_bytes)


# ---- what it refuses ------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(dtype="fp32"), TILE, {}, Unsupported, "takes fp16 and bf16, not fp32"),
    (dict(mask=Mask(boolean=True)), TILE, {}, Unsupported, "no boolean masks"),
    (dict(d=20), TILE, {}, Unsupported, "multiples of 8, not 20"),
    ({}, TILE, dict(capability=(8, 0)), Unsupported, "needs a Hopper GPU .sm_90., this is sm_80: fwd_v2"),
    ({}, Tile(64, 64), {}, Infeasible, "tile 64x64: fwd_v3 takes 128, 192 or 256 rows"),
    ({}, Tile(128, 72), {}, Infeasible, "tile 128x72"),
    (dict(d=256), Tile(128, 176), {}, Infeasible, "429,056 B of shared memory, a block has 232,448 B"),
    (dict(d=256), Tile(192, 64), {}, Infeasible, "needs 176 registers a thread"),
]


@pytest.mark.parametrize("of, tile, device, error, told", REFUSED)
def test_refused_with_the_reason(of, tile, device, error, told):
    problem = Problem(**dict(B=1, H=1, H_kv=1, N_q=9, N_k=9, d=64, dtype="fp16") | of)
    with pytest.raises(error, match=told):
        VARIANT.launcher(problem, tile, replace(HOPPER, **device))


@pytest.mark.parametrize("module", [fwd_v3, fwd_v3_fp8])
def test_a_failure_knows_the_file_of_a_kernel_with_switches_turned(module):
    for variant in (module.VARIANT, module.turned(stages=2), module.traced(None, stages=2)):
        assert search.file_of(variant) == module.__file__


def test_gradients_are_refused_before_anything_is_launched():
    q = torch.zeros(1, 4, 1, 64, dtype=torch.float16, device=target.torch_device(), requires_grad=True)
    with pytest.raises(ValueError, match="variant='fwd_v3' has no backward: expected a variant of v1 or v2"):
        sandbox.attention(q, q, q, variant="v3")


@pytest.mark.parametrize("d", [8, 64, 72, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_there_is_a_tile_for_every_head_dim(d, causal):
    problem = Problem(1, 1, 1, 4096, 4096, d, "bf16", mask=Mask(causal))
    for device in (HOPPER, SIMULATOR):
        tile = choose_tile(problem, device, VARIANT)
        VARIANT.fit(problem, tile, device)
    assert any(isinstance(tile, Tile) for tile in VARIANT.space(problem, HOPPER))


# ---- the binary for sm_90a, with or without a GPU -------------------------------------------------------------------

KINDS = ("plain", "scored", "capped")  # scores are scaled before the softmax, or capped too
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "MUFU.EX2", "STSM")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "d, N", [(64, 1024), (64, 4096), (96, 4096), (128, 1024), (128, 4096), (192, 4096), (256, 4096)]
)
def test_keeps_its_registers(d, N, causal, kind):
    """Spills, a stack, serialised products and an ignored setmaxnreg are errors of nvrtc.compile."""
    problem = Problem(1, 1, 1, N, N, d, "bf16", mask=Mask(causal), softcap=15.0 * (kind == "capped"))
    tile = choose_tile(problem, HOPPER, VARIANT)
    launch = fwd_v3.made(problem, tile, fwd_v3.chosen(problem, tile, HOPPER))[kind == "scored"]
    assert launch.binary().report.registers == 65_536 // launch.threads // 8 * 8


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "d, tile", [(64, "256x64"), (64, "192x128"), (64, "128x224"), (128, "128x176"), (128, "192x80"), (256, "128x64")]
)
def test_without_producers_it_keeps_its_registers(d, tile, causal):
    problem, tile = Problem(1, 1, 1, 4096, 4096, d, "bf16", mask=Mask(causal)), parse_tile(tile)
    fwd_v3.fit(problem, tile, HOPPER, warp_specialized=False)
    switches = fwd_v3.chosen(problem, tile, HOPPER, warp_specialized=False)
    for launch in fwd_v3.made(problem, tile, switches):
        assert launch.threads == 2 * tile.Br
        assert launch.binary().report.registers <= min(255, 65_536 // launch.threads // 8 * 8)


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm on this machine")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_is_made_of_hoppers_own_instructions(dtype, tmp_path):
    problem = Problem(1, 1, 1, 4096, 4096, 128, dtype)
    tile = choose_tile(problem, HOPPER, VARIANT)
    text = disassembled(fwd_v3.made(problem, tile, fwd_v3.chosen(problem, tile, HOPPER))[0].binary().cubin, tmp_path)
    assert all(name in text for name in INSTRUCTIONS), [name for name in INSTRUCTIONS if name not in text]
    products = [line for line in text.splitlines() if "HGMMA" in line]
    assert any(f"HGMMA.64x{tile.Bc}x16.F32" in line for line in products)  # S = Q Kᵀ
    assert any("HGMMA.64x128x16.F32" in line and "tnspB" in line for line in products)  # O += P V, P in registers


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm on this machine")
@pytest.mark.parametrize("specialized", [True, False], ids=["producers", "none"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d, N", [(64, 1024), (64, 4096), (128, 1024), (128, 4096), (256, 4096)])
def test_its_products_follow_one_another(d, N, causal, specialized, tmp_path):
    """Descriptors stay in uniform registers: a move into one (R2UR) before each product made the kernel 10 % slower.

    Without producers there is one before the first product of some batches.
    """
    problem = Problem(1, 1, 1, N, N, d, "bf16", mask=Mask(causal))
    tile = choose_tile(problem, HOPPER, VARIANT)
    launch = fwd_v3.made(problem, tile, fwd_v3.chosen(problem, tile, HOPPER, warp_specialized=specialized))[0]
    text = disassembled(launch.binary().cubin, tmp_path)
    assert "UTMALDG" in text and ("USETMAXREG" in text) == specialized
    lines = [line for line in text.splitlines() if "/*" in line]
    products = [n for n, line in enumerate(lines) if "HGMMA" in line]
    between = [lines[a:b] for a, b in zip(products, products[1:]) if b - a < 20]
    moved = sum(any("R2UR" in line for line in some) for some in between)
    assert len(between) >= 12 and moved <= (0 if specialized else len(between) // 5), f"{moved} of {len(between)}"


EIGHT_BITS = ("QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "MUFU.EX2", "F2FP.SATFINITE.E4M3.F32")
OF_8_BITS = [(64, 1024), (64, 2048), (64, 4096), (128, 1024), (128, 4096), (256, 4096)]  # each has a tile of its own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d, N, turned", [
    *((d, N, {"scales": scales}) for d, N in OF_8_BITS for scales in ("block", "head")),
    (64, 4096, {"two_level": True}), (128, 4096, {"two_level": True}),
], ids=str)  # fmt: skip
def test_in_8_bits_it_keeps_its_registers(d, N, turned, causal, kind, tmp_path):
    problem = Problem(1, 1, 1, N, N, d, "bf16", mask=Mask(causal), softcap=15.0 * (kind == "capped"))
    tile = fwd_v3_fp8.usual(problem, HOPPER, **turned)
    switches = fwd_v3_fp8.chosen(problem, tile, HOPPER, **turned)
    launch = fwd_v3_fp8.made(problem, tile, switches)[kind == "scored"]
    assert launch.binary().report.registers == 65_536 // launch.threads // 8 * 8
    if nvdisasm() is not None:
        text = disassembled(launch.binary().cubin, tmp_path)
        assert all(name in text for name in EIGHT_BITS), [name for name in EIGHT_BITS if name not in text]
        assert f"QGMMA.64x{tile.Bc}x32.F32.E4M3.E4M3" in text and f"QGMMA.64x{d}x32.F32.E4M3.E4M3" in text


@pytest.mark.parametrize("bf16, incoherent", [(1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("step, d, kv_block", [
    *(("BLOCKS", d, keys) for d, most in ((64, 256), (128, 256), (256, 128)) for keys in range(32, most + 1, 32)),
    *((step, d, quantize.ROWS) for step in ("AMAX", "GIVEN", "TRANSPOSE") for d in (64, 128, 256)),
])  # fmt: skip
def test_quantizing_spills_nothing(step, d, kv_block, bf16, incoherent):
    of, blocked = getattr(quantize, step), step == "BLOCKS"
    q_rows, kv_rows = quantize.rows_of(64, kv_block)
    defines = {"HEAD_DIM": d, "Q_ROWS": q_rows, "KV_ROWS": kv_rows, "Q_BLOCK": 64 if blocked else q_rows}
    defines |= {"KV_BLOCK": kv_block, "BF16": bf16, "INCOHERENT": incoherent, "STEP": of}
    launch = quantize.launch_of(defines)
    assert launch.binary().report.registers * launch.threads * quantize.resident(launch.threads, of) <= 65_536


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@gpu_only
@runs
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", [Mask(), Mask(True), Mask(window=(700, 30))], ids=str)
def test_large(d, dtype, mask):
    problem = Problem(2, 8, 4, 4000, 4100, d, dtype, mask=mask)
    check(problem, tile=choose_tile(problem, target.device(), VARIANT), seed=7)


@gpu_only
@runs
def test_many_heads_and_far_offsets():
    check(Problem(70_000, 1, 1, 3, 3, 64, "fp16"))
    N, H = 4096, 8448
    big = torch.zeros(1, N, H, 64, dtype=torch.float16, device="cuda")
    big[:, :, -1] = torch.randn(1, N, 64, device="cuda", dtype=torch.float16)
    assert big.numel() > 2**31
    x = big[:, :, -1:]
    check(Problem(1, 1, 1, N, N, 64, "fp16"), gate.Inputs(x, x, x))


@gpu_only
@runs
def test_same_bits_every_time_while_memory_is_busy():
    problem = Problem(2, 16, 4, 1000, 1000, 128, "bf16", mask=Mask(True))
    tile = choose_tile(problem, target.device(), VARIANT)
    run, outputs = gate.prepare(VARIANT, problem, tile, gate.gaussian(problem, 5, "cuda"), target.device())
    run()
    first, busy = [o.clone() for o in outputs.values()], torch.empty(1 << 28, device="cuda", dtype=torch.int8)
    other = torch.cuda.Stream()
    for _ in range(999):
        with torch.cuda.stream(other):
            busy.zero_()
        run()
        assert all(torch.equal(a, b) for a, b in zip(first, outputs.values()))


@gpu_only
@runs
def test_side_stream_and_graph():
    q, k, v = (torch.randn(1, 2000, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    right = sandbox.attention(q, k, v, variant="v3")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.empty_like(x) for x in (q, k, v)]
        torch.cuda._sleep(200_000_000)
        for a, b in zip(late, (q, k, v)):
            a.copy_(b)
        O = sandbox.attention(*late, variant="v3")
    stream.synchronize()
    assert torch.equal(O, right)
    graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in (q, k, v)]
    with torch.cuda.graph(graph):
        O = sandbox.attention(*static, variant="v3")
    static[0].copy_(q * 2)
    graph.replay()
    assert torch.equal(O, sandbox.attention(q * 2, k, v, variant="v3"))


@gpu_only
@runs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_second_gpu():
    q, k, v = (torch.randn(1, 200, 4, 64, device="cuda:1", dtype=torch.float16) for _ in range(3))
    O = sandbox.attention(q, k, v, variant="v3")
    there = [x.to("cuda:0") for x in (q, k, v)]
    assert O.device == q.device and torch.equal(O.cpu(), sandbox.attention(*there, variant="v3").cpu())
