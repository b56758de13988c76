"""From which N on does FP8 pay?

The products of FlashAttention-3 in FP8 take e4m3, which tensor cores multiply twice as fast as 16 bits.  But inputs of
16 bits must be quantized first: one pass, which costs the same for each token whatever N is, where attention costs a
token 4·N·d FLOPs.  Tokens and width stay, B·N = 16k and H·d = 2048, as in the papers' benchmarks; what N a sequence
needs before the faster products outweigh the pass is what is asked.

All that is compared at one N is gated, then timed in turns, in the same run: the ratios are of one clock and
temperature.  The pass is gated too: bit for bit what sandbox/quantize.py says.  So is what comes from a row-major V in
e4m3, as others take it, which is transposed first, and timed: bit for bit what comes from its transpose.

What the rows say is in fp8_speed_report.py.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from sandbox import emulator, quantize, target
from sandbox.choose import choose_tile
from sandbox.device.quantize import transpose_keys
from sandbox.kernels import fwd_v3, fwd_v3_fp8
from sandbox.mask import Mask
from sandbox.measure import bench, gate, rivals, timing
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile, Variant

from . import common, inputs
from .common import Experiment
from .fp8_speed_report import (
    CUDNN,
    FROM_BF16,
    HEADS,
    KERNEL,
    PASS,
    ROW_MAJOR,
    ROW_MAJOR_HEADS,
    TWO_LEVELS,
    V3,
    answer,
    claims,
    draw,
    table,
)

__all__ = ["EXPERIMENT", "claims"]  # what experiments/claims.py looks for

BLOCKS, BY_HEAD = fwd_v3_fp8.VARIANT, fwd_v3_fp8.turned(scales="head")
OURS = {
    KERNEL: BLOCKS, ROW_MAJOR: BLOCKS, HEADS: BY_HEAD, ROW_MAJOR_HEADS: BY_HEAD,
    TWO_LEVELS: fwd_v3_fp8.turned(two_level=True), FROM_BF16: BLOCKS, V3: fwd_v3.VARIANT,
}  # fmt: skip
PROVIDERS = (*OURS, CUDNN, PASS)
ROWS = ROW_MAJOR, ROW_MAJOR_HEADS
ALONE = KERNEL, HEADS, TWO_LEVELS, *ROWS  # of inputs that are in e4m3 already
SCALES = {name: variant.scales for name, variant in OURS.items()} | {PASS: "block"}
SEQLEN, EMULATED = (512, 1024, 2048, 4096, 8192, 16384), (200,)
BUDGET_S = 0.1  # of launches a row

# ---- the points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One provider on one problem; the tile is that of our kernels."""

    provider: str
    problem: Problem
    seed: int
    tile: Tile | None = None

    infeasible, count_bytes = None, False

    def fields(self) -> dict:
        p, tile, variant, alone = self.problem, self.tile, OURS.get(self.provider), self.provider in ALONE
        return {
            "provider": self.provider, "variant": variant.name if variant else self.provider, "direction": "fwd",
            "dtype": "e4m3" if alone else p.dtype, "scales": SCALES.get(self.provider),
            "V": ("row-major" if self.provider in ROWS else "transposed") if alone else None,
            "accumulation": ("two levels" if self.provider == TWO_LEVELS else "one level") if alone else None,
            "input": "gauss", "seed": self.seed, "B": p.B, "H": p.H, "N": p.N_q, "d": p.d, "causal": p.mask.causal,
            "Br": tile and tile.Br, "Bc": tile and tile.Bc, "infeasible": None,
        }  # fmt: skip

    def seconds(self) -> float:
        """About how long the emulator takes; it compiles first."""
        return 2 + fwd_v3_fp8.VARIANT.pace * 2 * self.problem.N_q**2 * self.problem.d


KEY = ("provider", "dtype", "scales", "input", "seed", "B", "H", "N", "d", "causal")
MEASURED = (
    "gate", "max_error", "error_ratio", "seconds", "seconds_p20", "seconds_p80", "tflops", "over_v3", "over_cudnn",
    "share", "bytes", "gigabytes_per_second",
)  # fmt: skip


def plan(device: Device, seqlen, head_dim, seed):
    if device.simulated and emulator.compiler() is None:
        raise ValueError("fwd_v3_fp8 is emulated where there is no GPU, and that needs a C++ compiler: install g++")
    points = []
    for d in head_dim or ((64,) if device.simulated else (128,)):
        for causal in (False, True):
            for N in seqlen or (EMULATED if device.simulated else SEQLEN):
                problem = problem_of(N, d, causal, device)
                for name in PROVIDERS:
                    if name in OURS:
                        if (tile := tile_of(name, problem, device)) is not None:
                            points.append(Point(name, problem, seed, tile))
                    elif name == PASS or not device.simulated:
                        points.append(Point(name, problem, seed))
    return points


def tile_of(name: str, problem: Problem, device: Device) -> Tile | None:
    """None where two levels need more registers than there are."""
    try:
        return choose_tile(problem, device, OURS[name])
    except Infeasible:
        if name != TWO_LEVELS:
            raise
        return None


def problem_of(N: int, d: int, causal: bool, device: Device) -> Problem:
    """As many tokens at every N; emulated, one sequence and one head."""
    B, H = (1, 1) if device.simulated else (max(1, bench.PAPER_TOKENS // N), max(1, bench.PAPER_WIDTH // d))
    return Problem(B, H, H, N, N, d, "bf16", mask=Mask(causal))


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(point: Point) -> dict:
    """Gate; where there is a GPU, time, beside all others on the same problem."""
    if target.device().simulated:
        return dict.fromkeys(MEASURED) | gated(point.provider, point.problem, point.seed)[0]
    return together(point.problem, point.seed)[point.provider]


@functools.lru_cache(maxsize=1)  # the points of one problem follow one another
def together(problem: Problem, seed: int) -> dict[str, dict]:
    """provider -> the measured fields of its row: each gated, then all timed in turns."""
    compiled(problem.d, target.device())
    rows, launches = {}, {}
    for name in PROVIDERS:
        found, launch = gated(name, problem, seed)
        rows[name] = dict.fromkeys(MEASURED) | found
        if launch:
            launches[name] = launch
        torch.cuda.empty_cache()
    for name, t in zip(launches, timing.time_together(list(launches.values()), BUDGET_S), strict=True):
        row = rows[name]
        row |= {"seconds": t.ms * 1e-3, "seconds_p20": t.ms_p20 * 1e-3, "seconds_p80": t.ms_p80 * 1e-3}
        if name == PASS:
            row["gigabytes_per_second"] = row["bytes"] / row["seconds"] * 1e-9
        else:
            row["tflops"] = problem.flops() / row["seconds"] * 1e-12
    compare(rows)
    return rows


def compare(rows: dict[str, dict]) -> None:
    """Speed over fwd_v3's and over cuDNN's; of the pass, the share that it has of attention from bf16."""
    for field, name in (("over_v3", V3), ("over_cudnn", CUDNN)):
        for row in rows.values():
            if row["tflops"] and rows[name]["seconds"]:
                row[field] = rows[name]["seconds"] / row["seconds"]
    if rows[PASS]["seconds"] and rows[FROM_BF16]["seconds"]:
        rows[PASS]["share"] = rows[PASS]["seconds"] / rows[FROM_BF16]["seconds"]


def gated(name: str, problem: Problem, seed: int) -> tuple[dict, object]:
    """What the gate says, as fields of a row, and the launch to be timed, or None."""
    try:
        if name == CUDNN:  # a yardstick
            return {}, rivals.launcher(name, problem, given(problem, seed), "fwd")[0]
        if name == PASS:
            return gated_pass(problem, given(problem, seed))
        variant, device = OURS[name], target.device()
        tile = choose_tile(problem, device, variant)
        if name in ROWS:
            return gated_rows(variant.launcher(problem, tile, device), problem, given(problem, seed))
        verdict = gate.check(variant, problem, tile, given(problem, seed), device, quantized=name in ALONE)
    except (Infeasible, rivals.Unavailable) as reason:
        return {"infeasible": str(reason)}, None
    except common.OutOfMemory:
        return {"infeasible": "does not fit in the GPU's memory"}, None
    row = {"max_error": common.finite(verdict.max_error), "error_ratio": common.finite(verdict.ratio)}
    if not verdict.passed:
        drawn.cache_clear()  # it may be the inputs that it changed
        return row | {"gate": f"failed: {verdict.why}"}, None
    return row | {"gate": "passed"}, verdict.launch


def gated_pass(problem: Problem, x: gate.Inputs):
    """As `gated`: the pass that comes before the kernel, beside what the reference makes of the same numbers."""
    device = target.device()
    tile = choose_tile(problem, device, OURS[FROM_BF16])
    launcher = OURS[FROM_BF16].launcher(problem, tile, device)
    blocks = {"q_block": fwd_v3_fp8.Q_BLOCK, "kv_block": tile.Bc}
    ours, reference = launcher.quantize(x.q, x.k, x.v), quantize.quantize(x.q, x.k, x.v, **blocks)
    made = {name: y for name, y in vars(ours).items() if isinstance(y, torch.Tensor)}
    wrong = [name for name, y in made.items() if not gate.same_bits(y, getattr(reference, name))]
    row = {"bytes": sum(y.nbytes for y in (x.q, x.k, x.v, *made.values()))}
    if wrong:
        return row | {"gate": f"failed: {', '.join(wrong)} are not what the reference makes of it"}, None
    return row | {"gate": "passed"}, lambda: launcher.quantize(x.q, x.k, x.v)


def gated_rows(launcher, problem: Problem, x: gate.Inputs):
    """As `gated`: of V in e4m3 and row-major, beside what the kernel makes of Vᵀ."""
    ours = launcher.quantize(x.q, x.k, x.v)
    rows = quantize.restore_keys(ours.v.view(torch.uint8), problem.N_k).view(ours.v.dtype)
    outputs = [(gate.poisoned(x.q), ours.q_scale.new_empty(problem.B, problem.H, problem.N_q)) for _ in range(2)]
    launcher.attend(problem, ours, *outputs[0])

    def launch():
        launcher.attend(problem, replace(ours, v=transpose_keys(rows)), *outputs[1])

    launch()
    if not all(gate.same_bits(ours, theirs) for ours, theirs in zip(*outputs)):
        return {"gate": "failed: it is not what comes from Vᵀ"}, None
    return {"gate": "passed"}, launch


def given(problem: Problem, seed: int) -> gate.Inputs:
    """The same numbers at every N, cut into sequences."""
    p = problem
    x = drawn(p.B * p.N_q, p.H, p.d, p.dtype, seed)
    return gate.Inputs(*(y.view(p.B, p.N_q, p.H, p.d) for y in (x.q, x.k, x.v)))


@functools.lru_cache(maxsize=1)
def drawn(tokens: int, H: int, d: int, dtype: str, seed: int) -> gate.Inputs:
    """Drawn anew, it is a second or two a point.  The gate sees that nothing is changed."""
    return inputs.make("gauss", Problem(1, H, H, tokens, tokens, d, dtype), seed)


@functools.cache
def compiled(d: int, device: Device) -> None:
    """Every kernel that this d takes at any of SEQLEN, on every core of the machine at once."""
    kernels = set()
    for N in SEQLEN:
        for problem in (problem_of(N, d, causal, device) for causal in (False, True)):
            tiles = {name: tile_of(name, problem, device) for name in OURS}
            kernels |= {(OURS[name], problem.kind, tile) for name, tile in tiles.items() if tile}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: binary(*kernel, device), kernels))


def binary(variant: Variant, problem: Problem, tile: Tile, device: Device):
    if variant.scales:
        return variant.launcher(problem, tile, device).plain.binary()
    return fwd_v3.made(problem, tile, fwd_v3.chosen(problem, tile, device))[0].binary()


EXPERIMENT = Experiment(
    name="fp8_speed",
    question="From which N on does FP8 pay?",
    fixed="Gaussian input in bf16, the same numbers for all; on a GPU B·N = 16k tokens and H·d = 2048",
    factor="N; who computes it, from what",
    varies=tuple(name for name in KEY if name not in ("input", "seed")),
    options=(
        common.integers("--seqlen", help="N, one or several; 200 emulated, else 512 to 16k."),
        common.integers("--head-dim", help="d: 64, 128 or 256, one or several; 64 emulated, else 128."),
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
