"""What does FP8 cost in accuracy, and what do block scales and incoherent processing give back?

FlashAttention-3, section 3.3 and Table 3 (2407.08608).  The forward is emulated, rounding for rounding
(sandbox/algorithms_fp8.py), at real size and without a GPU.  The error is against float64 on the draws as they are;
everything else gets them in fp16, and leaves O in fp16: 16 bits too err by what that costs, as in the paper's table.
Four parts:

    table3      the paper's table: three ways in 16 bits, four in FP8, on its distribution
    strength    four ways in FP8 while the outliers grow, by distribution (see `draw_inputs`)
    factors     from FlashAttention-3 in FP8 one thing changed: scales, P's scale, how sums are kept
    sources     one operand rounded to e4m3, the others exact

Where the kernel runs, on a Hopper GPU or, for a few keys, on the emulator of one, it is measured on the same draws,
with the scales and the rotation of the point.  But a tile's keys share a scale in it, and its tile is its own: so it
stands beside another emulation, of just these blocks and this tile.

e4m3 is a floating format: a scale moves its range and nothing else, so that block scales have something to give only
where the numbers of a tensor span more than its 15 binades.

What the rows say is in fp8_error_answer.py, the picture in fp8_error_picture.py.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import click
import torch

from sandbox import algorithms_fp8, emulator, quantize, reference, target
from sandbox.choose import choose_tile
from sandbox.kernels import fwd_v3_fp8
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import Problem
from sandbox.variant import Device, Tile, Unsupported, Variant

from . import common, inputs
from .common import Experiment
from .fp8_error_answer import (
    BLOCKS,
    CHANNELS,
    ENTRIES,
    LAYERS,
    NEITHER,
    NO_BLOCKS,
    NO_ROTATION,
    PAPER,
    STANDARD8,
    STANDARD16,
    STRENGTHS,
    SWEPT,
    V2,
    V3,
    V3_FP8,
    answer,
    claims,
    table,
)
from .fp8_error_picture import draw

__all__ = ["EXPERIMENT", "claims"]  # what experiments/claims.py looks for

PARTS = ("table3", "strength", "factors", "sources")
RATE, PAPER_STRENGTH = 0.001, 10  # of outlying entries; their standard deviation
SECONDS_PER_SCORE = 1.6e-8  # measured at d=128
KERNELS = {  # by scales, and whether Q and K are rotated
    (scales, incoherent): fwd_v3_fp8.turned(scales=scales, incoherent=incoherent)
    for scales in quantize.SCALES for incoherent in (True, False)
}  # fmt: skip
EMULATED_KEYS = 48  # up to which the kernel is run where there is no GPU
OF_KERNEL = ("kernel_tile", "kernel_rmse", "kernel_emulated_rmse", "kernel_over", "gate", "error_ratio")
MEASURED = ("rmse", "rmse_least", "rmse_most", "row_error", "O_rms", *OF_KERNEL, "seconds")

# ---- the points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One way to compute attention, on `seeds` draws of one distribution.

    rounds    which of Q, K, V and P become e4m3; '' where the way is one of 16 bits
    """

    part: str
    variant: str
    input: str
    strength: float | None
    N: int
    d: int
    causal: bool
    seeds: int
    rounds: str = "QKVP"
    scales: str | None = "block"
    q_block: int | None = quantize.Q_BLOCK
    kv_block: int | None = quantize.KV_BLOCK
    incoherent: bool = True
    exponent: int = 8
    accumulate: str = "fp32"
    Bc: int = 128

    infeasible, count_bytes = None, False

    def fields(self) -> dict:
        return {**vars(self), "Br": None, "H": self.heads, "infeasible": None}

    @property
    def heads(self) -> int:
        return inputs.HEADS if self.input in LAYERS else 1

    def seconds(self) -> float:
        """On one core of a CPU; nothing of it runs on the simulator."""
        return SECONDS_PER_SCORE * self.seeds * self.heads * self.N**2


KEY = tuple(Point.__dataclass_fields__)


def ways(point: Point) -> dict[str, Point]:
    """Table 3's columns, and what the sweeps need beside them."""
    sixteen = replace(point, rounds="", scales=None, q_block=None, kv_block=None, incoherent=False, exponent=0)
    per_tensor = replace(point, scales="tensor", q_block=None, kv_block=None)
    per_head = replace(per_tensor, scales="head")
    found = {
        STANDARD16: sixteen, V2: replace(sixteen, Bc=64), V3: sixteen,
        STANDARD8: replace(per_tensor, rounds="QKV", incoherent=False, exponent=0), V3_FP8: point, NO_BLOCKS: per_head,
        NO_ROTATION: replace(point, incoherent=False), NEITHER: replace(per_head, incoherent=False),
    }  # fmt: skip
    return {name: replace(way, variant=name) for name, way in found.items()}


def plan(device: Device, part, seqlen, swept_seqlen, head_dim, seeds):
    if head_dim not in quantize.HADAMARD:
        raise ValueError(f"--head-dim {head_dim}: incoherent processing takes one of {quantize.HADAMARD}")
    seeds = seeds or (2 if device.simulated else 16)
    base = Point("table3", V3_FP8, ENTRIES, PAPER_STRENGTH, seqlen, head_dim, False, seeds)
    points = [ways(base)[name] for name in PAPER] if "table3" in part else []
    for input, causal in ((ENTRIES, False), (ENTRIES, True), (CHANNELS, False), (BLOCKS, True)):
        for strength in STRENGTHS[input] if "strength" in part else ():
            swept = replace(base, part="strength", input=input, strength=strength, N=swept_seqlen, causal=causal)
            points += [ways(swept)[name] for name in SWEPT]
    for layer in LAYERS if "strength" in part else ():
        real = dict(part="strength", input=layer, strength=None, N=min(swept_seqlen, inputs.TOKENS))
        points += [ways(replace(base, **real, d=inputs.HEAD_DIM, seeds=1))[name] for name in SWEPT]
    if "factors" in part:
        points += factors(replace(base, part="factors"))
    if "sources" in part:
        alone = [(rounds, True) for rounds in "QKVP"] + [(rounds, False) for rounds in "QK"]  # V and P are not rotated
        points += [
            replace(base, part="sources", variant=f"only {rounds}", rounds=rounds, incoherent=incoherent)
            for rounds, incoherent in alone
        ]
    return points


def factors(base: Point) -> list[Point]:
    """What each choice is worth on the paper's distribution."""
    every = ways(base)
    found = {V3_FP8: base, NO_BLOCKS: every[NO_BLOCKS]}
    for rows, keys in ((32, 32), (128, 64), (128, 128), (256, 256)):
        found[f"blocks {rows}, {keys}"] = replace(base, q_block=rows, kv_block=keys, Bc=max(base.Bc, keys))
    found |= {f"P × 2^{exponent}": replace(base, exponent=exponent) for exponent in (0, 4)}
    found |= {f"sums {name}": replace(base, accumulate=name) for name in ("fp22", "two_level")}
    return [replace(way, variant=name) for name, way in found.items()]


# ---- what is measured -----------------------------------------------------------------------------------------------


def draw_inputs(input: str, strength: float | None, N: int, d: int, seed: int):
    """Q, K, V [1, N, H, d], fp32: N(0, 1), of which each distribution makes something else.

    entries     + N(0, strength²) in one entry of a thousand, in Q, K and V: the paper's, at strength 10
    channels    one channel of 32 is `strength` times as large in K, and as much smaller in Q: S is what it was
    blocks      sizes drift along the sequence, K's and V's ends `strength` apart, Q's the other way: neighbours are
                alike, and under a causal mask every row sees keys of its own size
    minilm      layer 0, 2 or 5 of all-MiniLM-L6-v2, real activations
    """
    if input in LAYERS:
        layer = LAYERS.index(input)
        return tuple(torch.from_numpy(x[layer : layer + 1, :N]).float() for x in inputs._minilm())
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, 1, N, 1, d, generator=generator)
    if input == ENTRIES:

        def outlying():
            x, outliers = draw(), draw()
            return x + strength * outliers * (torch.rand(x.shape, generator=generator) < RATE)

        q, k, v = outlying(), outlying(), outlying()
    else:
        q, k, v = draw(), draw(), draw()
    if input == CHANNELS:
        size = 1 + (strength - 1) * (torch.arange(d) % 32 == 0)
        q, k = q / size, k * size
    if input == BLOCKS:
        size = strength ** (torch.linspace(-0.5, 0.5, N))[:, None, None]
        q, k, v = q / size, k * size, v * size
    return q, k, v


@functools.lru_cache(16)
def case(input, strength, N, d, causal, seed):
    """q, k, v in fp16, and O*."""
    q, k, v = (x.to(target.torch_device()) for x in draw_inputs(input, strength, N, d, seed))
    B, N, H, d = q.shape
    O_star, _ = reference.forward(Problem(B, H, H, N, N, d, mask=Mask(causal)), q, k, v)
    return q.half(), k.half(), v.half(), O_star


def measure(point: Point) -> dict:
    """RMSE, mean, least and most over the seeds, and the row-relative error: the root mean square over rows of
    |O - O*| / |O*|."""
    rmse, row_error, size = [], [], []
    for seed in range(point.seeds):
        q, k, v, O_star = case(point.input, point.strength, point.N, point.d, point.causal, seed)
        error = emulate(point, q, k, v).to(q.dtype).double() - O_star
        rmse.append(_rms(error))
        row_error.append(_rms(error.norm(dim=-1) / O_star.norm(dim=-1)))
        size.append(_rms(O_star))
    means = {name: mean(x) for name, x in (("rmse", rmse), ("row_error", row_error), ("O_rms", size))}
    row = dict.fromkeys(MEASURED) | means | {"rmse_least": min(rmse), "rmse_most": max(rmse)}
    return row | measure_kernel(point)


def emulate(point: Point, q, k, v):
    """O, fp32."""
    mask, scale = Mask(point.causal), q.shape[-1] ** -0.5
    if point.variant == STANDARD16:
        return algorithms_fp8.standard_attention(q, k, v, mask=mask)
    if point.variant in (V2, V3):
        order = 1 if point.variant == V2 else -1
        return algorithms_fp8.flash_attention_16bit(q, k, v, Bc=point.Bc, order=order, mask=mask)[0]
    if point.variant == STANDARD8:  # S and P in 16 bits, as the paper has it
        x = quantize.quantize(q, k, v, scales=point.scales, incoherent=point.incoherent)
        return algorithms_fp8.standard_attention(*quantize.dequantize(x), mask=mask)
    d = q.shape[-1]
    x = quantized(point, *padded(q, k, v))
    O, _ = algorithms_fp8.flash_attention_3_fp8(
        x, Bc=point.Bc, mask=mask, scale=scale, exponent=point.exponent, accumulate=point.accumulate,
        P_dtype="e4m3" if "P" in point.rounds else "fp32",
    )  # fmt: skip
    return O[..., :d]


def measure_kernel(point: Point) -> dict:
    """RMSE of fwd_v3_fp8 on the same draws, and of its emulation with the kernel's own blocks and tile: their means,
    and how many times larger the former is, at most of all draws.  The gate is that of the first draw."""
    device = target.device()
    variant, problem, tile = kernel(point, device)
    if variant is None:
        return {}
    launcher = variant.launcher(problem, tile, device)
    ours, emulated, row = [], [], {"kernel_tile": str(tile)}
    for seed in range(point.seeds):
        q, k, v, O_star = case(point.input, point.strength, point.N, point.d, point.causal, seed)
        q, k, v = padded(q, k, v)
        if seed == 0:
            verdict = gate.check(variant, problem, tile, gate.Inputs(q, k, v), device)
            row["gate"] = "passed" if verdict.passed else f"failed: {verdict.why}"
            row["error_ratio"] = common.finite(verdict.ratio)
        x, O = launcher.quantize(q, k, v), gate.poisoned(q)
        launcher.attend(problem, x, O, O.new_empty(problem.B, problem.H, problem.N_q, dtype=torch.float32))
        options = {"Bc": tile.Bc, "lazy": True, "mask": problem.mask, "scale": problem.scale}
        E, _ = algorithms_fp8.flash_attention_3_fp8(x, **options)
        for errors, found in ((ours, O), (emulated, E)):
            errors.append(_rms(found[..., : point.d].to(q.dtype).double() - O_star))
    if not all(map(math.isfinite, ours)):
        return row
    over = max(a / b for a, b in zip(ours, emulated))
    return row | {"kernel_rmse": mean(ours), "kernel_emulated_rmse": mean(emulated), "kernel_over": over}


def kernel(point: Point, device: Device) -> tuple[Variant | None, Problem | None, Tile | None]:
    """What computes the point, but for its tile: the kernel, the problem, the tile.  Three None where nothing does."""
    blocks = (quantize.Q_BLOCK, quantize.KV_BLOCK) if point.scales == "block" else (None, None)
    same = (point.rounds, point.exponent, point.accumulate) == ("QKVP", 8, "fp32")
    here = not device.simulated or point.N <= EMULATED_KEYS and emulator.compiler() is not None
    if not same or not here or (point.q_block, point.kv_block) != blocks:
        return None, None, None
    d, variant = max(point.d, quantize.HADAMARD[0]), KERNELS[point.scales, point.incoherent]
    sizes = (1, point.heads, point.heads, point.N, point.N, d)
    problem = Problem(*sizes, "fp16", scale=point.d**-0.5, mask=Mask(point.causal))
    try:
        tile = choose_tile(problem, device, variant)
    except Unsupported:  # no Hopper
        return None, None, None
    if not device.simulated:
        compiled(point.N, d, device)
    return variant, problem, tile


@functools.cache
def compiled(N: int, d: int, device: Device) -> None:
    """The kernels that this N and d take, on every core of the machine at once."""
    problems = [Problem(1, 1, 1, N, N, d, "fp16", mask=Mask(causal)) for causal in (False, True)]
    wanted = [(KERNELS[scales, True], problem) for scales in ("block", "head") for problem in problems]
    made = [variant.launcher(problem, choose_tile(problem, device, variant), device) for variant, problem in wanted]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda launcher: launcher.plain.binary(), made))


def padded(q, k, v):
    """With zeros up to the least head dimension that can be rotated, which changes no score."""
    return tuple(torch.nn.functional.pad(x, (0, max(0, quantize.HADAMARD[0] - x.shape[-1]))) for x in (q, k, v))


def quantized(point: Point, q, k, v) -> quantize.Quantized:
    """The point's Q, K, V; those that it does not round are exact, with scales of 1."""
    blocks = {name: size for name in ("q_block", "kv_block") if (size := getattr(point, name))}
    x = quantize.quantize(q, k, v, scales=point.scales, incoherent=point.incoherent, **blocks)
    if point.incoherent:
        sign = quantize.signs(q.shape[-1])
        q, k = quantize.rotate(q, sign), quantize.rotate(k, sign)
    exact = {"q": q.float(), "k": k.float(), "v": quantize.transpose_keys(v.float())}
    for name in (name for name in exact if name.upper() not in point.rounds):
        scale = torch.ones_like(getattr(x, f"{name}_scale"))
        x = replace(x, **{name: exact[name], f"{name}_scale": scale})
    return x


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _rms(x) -> float:
    return x.square().mean().sqrt().item()


EXPERIMENT = Experiment(
    name="fp8_error",
    question="What does FP8 cost in accuracy, and what do block scales and incoherent processing give back?",
    fixed="in each part the draws; inputs and O in fp16; the error is against float64",
    factor="what is rounded to e4m3, with which scales, rotated or not; how far outliers stick out",
    varies=KEY,
    options=(
        click.option(
            "--part", type=click.Choice(PARTS), multiple=True, default=PARTS, show_default="all", help="Only these."
        ),
        click.option("--seqlen", type=common.SIZE, default=8192, show_default=True, help="N, but for the strengths."),
        click.option("--swept-seqlen", type=common.SIZE, default=2048, show_default=True, help="N of the strengths."),
        click.option("--head-dim", type=common.SIZE, default=128, show_default=True, help="d: 64, 128 or 256."),
        click.option("--seeds", type=click.IntRange(1, 64), help="Draws, from seed 0 on; 2, on a GPU 16."),
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
