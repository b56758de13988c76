"""How much memory does attention need beside its inputs?

Standard attention keeps S and P, N x N each: O(N²).  FlashAttention keeps O, LSE and a few vectors, and its backward
forms P again: O(N).  [FA1, 2205.14135, Theorem 1]  Here the peak of what a call allocates is measured, outputs
included, and the exponent of N is fitted to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import click
import torch

import sandbox
from sandbox import picture, target
from sandbox.choose import choose_tile
from sandbox.device import simulator
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.measure.memory import peak_bytes
from sandbox.problem import Problem
from sandbox.variant import Device

from . import common, tables
from .common import Experiment

STANDARD = "standard"
WAYS = {STANDARD: picture.GREY, "v1": picture.VERMILION, "v2": picture.BLUE}
DIRECTIONS = {"fwd": "forward", "fwd+bwd": "forward and backward"}
PAPER = "FA1 (B=16, H=8, d=64, fp16, forward and backward, N=4096): 17,024 MB become 836 MB"


# ---- the points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One way to compute attention, at one N."""

    variant: str
    direction: str
    problem: Problem
    seed: int

    infeasible, count_bytes = None, False

    def fields(self) -> dict:
        p = self.problem
        return {
            "variant": self.variant, "direction": self.direction, "input": "gauss", "B": p.B, "H": p.H, "N": p.N_q,
            "d": p.d, "dtype": p.dtype, "causal": p.mask.causal, "seed": self.seed, "Br": None, "Bc": None,
            "infeasible": None,
        }  # fmt: skip

    def seconds(self) -> float:
        return 0.0 if self.variant == STANDARD else simulator.estimate_seconds(self.problem, self.direction)


KEY = ("variant", "direction", "B", "H", "N", "d", "dtype", "causal", "seed")
MEASURED = ("peak_bytes", "input_bytes", "gate", "max_error", "seconds")


def plan(device: Device, seqlen, head_dim, batch, heads, causal, seed, dtype):
    small = device.simulated
    dtype = dtype or ("fp32" if small else "fp16")
    points = []
    for N in seqlen or ((32, 64, 128, 256) if small else (512, 1024, 2048, 4096, 8192)):
        sizes = batch or (1 if small else 16), heads or (1 if small else 8)
        problem = Problem(*sizes, sizes[1], N, N, head_dim or (8 if small else 64), dtype, mask=Mask(causal))
        points += [Point(way, direction, problem, seed) for direction in DIRECTIONS for way in WAYS]
    return points


def measure(point: Point) -> dict:
    """The peak of a call's allocations; the gate judges nothing but the forward's output here, by its own rule."""
    row, p = dict.fromkeys(MEASURED), point.problem
    x = gate.gaussian(p, point.seed, target.torch_device())
    row["input_bytes"] = sum(tensor.nbytes for tensor in (x.q, x.k, x.v))
    try:
        if point.variant != STANDARD:
            verdict = gate.check(*_kernel(point, p), x, target.device())
            row |= {"gate": "passed" if verdict.passed else f"failed: {verdict.why}"}
            row |= {"max_error": common.finite(verdict.max_error)}
            if not verdict.passed:
                return row
        run = call(point, x)
        run()  # compiled, and whatever is allocated once
        row["peak_bytes"] = peak_bytes(run)
    except common.OutOfMemory:
        row["infeasible"] = "does not fit in the GPU's memory"
    if target.KIND == "gpu":
        torch.cuda.empty_cache()
    return row


def _kernel(point: Point, p: Problem):
    from sandbox import catalog

    variant = catalog.forward(point.variant)
    if point.direction != "fwd":
        variant = catalog.backward_of(variant)
    return variant, p, choose_tile(p, target.device(), variant)


def call(point: Point, x: gate.Inputs):
    """A call without arguments of attention() or of standard attention, with its gradients or without."""
    p, backward = point.problem, point.direction != "fwd"
    q, k, v = (tensor.detach().requires_grad_(backward) for tensor in (x.q, x.k, x.v))

    def attend():
        if point.variant == STANDARD:
            return standard_attention(p, q, k, v)
        return sandbox.attention(q, k, v, variant=point.variant, causal=p.mask.causal, force=True)

    def run():
        O = attend()
        if backward:
            torch.autograd.grad(O, (q, k, v), x.dO)

    return run


def standard_attention(p: Problem, q, k, v) -> torch.Tensor:
    """O [B, N, H, d], with S and P [B, H, N, N] as tensors, as a model without a fused kernel has them."""
    S = p.scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if p.mask.causal:
        S = S.masked_fill(~torch.from_numpy(p.mask.seen(p.N_q, p.N_k)).to(S.device), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(S, -1), v)


# ---- what the rows say ----------------------------------------------------------------------------------------------


def peaks(rows: list[dict], way: str, direction: str) -> dict[int, int]:
    """N -> bytes."""
    chosen = (row for row in rows if (row["variant"], row["direction"]) == (way, direction))
    return {row["N"]: row["peak_bytes"] for row in chosen if row["peak_bytes"]}


def exponent(peak: dict[int, int]) -> float | None:
    """The slope of log(bytes) over log(N) between the two largest N: what the growth tends to."""
    if len(peak) < 2:
        return None
    small, large = sorted(peak)[-2:]
    return math.log(peak[large] / peak[small]) / math.log(large / small)


def answer(rows: list[dict]) -> str:
    sentences = []
    for direction, words in DIRECTIONS.items():
        grown = {way: (exponent(peaks(rows, way, direction)), peaks(rows, way, direction)) for way in WAYS}
        grown = {way: both for way, both in grown.items() if both[0] is not None}
        text = ", ".join(f"{way} N^{power:.2f}" for way, (power, _) in grown.items())
        common_N = set.intersection(*(set(peak) for _, peak in grown.values())) if grown else set()
        if STANDARD in grown and common_N and len(grown) > 1:
            N = max(common_N)
            sizes = ", ".join(f"{way} {size(peak[N])}" for way, (_, peak) in grown.items())
            text += f"; at N={N} {sizes}"
            least = min(peak[N] for way, (_, peak) in grown.items() if way != STANDARD)
            text += f": {grown[STANDARD][1][N] / least:.3g} times less"
        sentences.append(f"{words.capitalize()}: {text or 'nothing to compare'}.")
    text = "\n".join([*sentences, f"To compare, {PAPER}."]) + "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    return [claim_1(rows), claim_4(rows)]


def claim_1(rows: list[dict]):
    """Standard attention stores S and P: O(N²) memory, and that limits N."""
    powers = [exponent(peaks(rows, STANDARD, direction)) for direction in DIRECTIONS]
    if None in powers:
        return 1, "not yet tested", "standard attention ran at fewer than two N, and one shows no growth"
    squared = all(near(power, 2) for power in powers)
    why = f"standard attention's memory grows with {_powers(powers)}"
    full = [row["N"] for row in rows if row["variant"] == STANDARD and row["infeasible"]]
    if full and (last := max(peaks(rows, "v2", "fwd+bwd"), default=0)) >= min(full):
        why += f"; at N={min(full)} it does not fit any more, and v2 does up to {last}"
        return 1, "holds" if squared else "holds in part", why
    return 1, "holds in part" if squared else "does not hold", why + "; that it limits N does not show: every N fits"


def claim_4(rows: list[dict]):
    """Forward and backward need O(N) memory."""
    powers = [exponent(peaks(rows, way, direction)) for direction in DIRECTIONS for way in ("v1", "v2")]
    if None in powers:
        return 4, "not yet tested", "v1 or v2 ran at fewer than two N, and one shows no growth"
    linear = [near(power, 1) for power in powers]
    verdict = "holds" if all(linear) else "holds in part" if any(linear) else "does not hold"
    return 4, verdict, f"what v1 and v2 need beside their inputs grows with {_powers(powers)}, forward and backward"


def near(power: float, whole: int) -> bool:
    """Between the two largest N the lower powers still show a little."""
    return abs(power - whole) < 0.1


def _powers(powers: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"N^{power:.2f}" for power in (min(powers), max(powers))))


def table(rows: list[dict]) -> str:
    columns = [
        ("attention", lambda row: row["variant"]),
        ("direction", lambda row: row["direction"]),
        ("N", lambda row: row["N"]),
        ("inputs", lambda row: size(row["input_bytes"])),
        ("peak beside them", lambda row: row["peak_bytes"] and size(row["peak_bytes"])),
        (
            "a position",
            lambda row: row["peak_bytes"] and f"{row['peak_bytes'] / row['N'] / row['B'] / row['H']:,.0f} B",
        ),
        ("gate", lambda row: row["gate"]),
        ("cannot run", lambda row: row["infeasible"]),
    ]
    return tables.table(rows, columns)


def _each(row: dict) -> float:
    return row["peak_bytes"] / (row["N"] * row["B"] * row["H"])


def size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.3g} {unit}"
    return f"{n:,.0f} B"


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """Bytes over N on logarithmic axes; one panel a direction, the slopes 1 and 2 beside the lines."""
    figure = picture.page(_title(rows), picture.setup(rows[-1]), (12, 5.4))
    top = max(row["peak_bytes"] for row in rows if row["peak_bytes"])
    low = min(row["peak_bytes"] for row in rows if row["peak_bytes"])
    for n, (direction, words) in enumerate(DIRECTIONS.items()):
        axes = figure.add_axes((0.07 + 0.49 * n, 0.11, 0.32, 0.62))
        ends = []
        for way, color in WAYS.items():
            if peak := peaks(rows, way, direction):
                N = sorted(peak)
                axes.plot(N, [peak[n] for n in N], marker="o", markersize=5, linewidth=2.2, color=color)
                power = exponent(peak)
                ends.append((N[-1], peak[N[-1]], f"{way}, N^{power:.2f}" if power else way, color))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x := sorted({row["N"] for row in rows}), [f"{N // 1024}k" if N >= 1024 else str(N) for N in x])
        axes.set_ylim(low / 2, top * 2)
        picture.round_ticks(axes, size)
        axes.grid(axis="y")
        axes.set_xlabel("N")
        axes.set_title(f"Peak bytes beside the inputs, {words}")
        picture.label_ends(axes, ends, 0.07)
    return figure


def _title(rows: list[dict]) -> str:
    powers = {way: exponent(peaks(rows, way, "fwd+bwd")) for way in WAYS}
    if None in powers.values():
        return "Memory over N"
    flash = max(powers["v1"], powers["v2"])
    return f"Standard attention's memory grows with N^{powers[STANDARD]:.1f}, FlashAttention's with N^{flash:.1f}"


EXPERIMENT = Experiment(
    name="memory",
    question="How much memory does attention need beside its inputs?",
    fixed="Gaussian input; the peak of what one call allocates, outputs included",
    factor=f"who computes it: {', '.join(WAYS)}",
    varies=("variant", "direction", "N"),
    options=(
        common.integers("--seqlen", help="N, one or several."),
        common.HEAD_DIM,
        click.option("--batch", type=common.SIZE, help="B; 1, on a GPU 16 as in the paper."),
        click.option("--heads", type=common.SIZE, help="H; 1, on a GPU 8 as in the paper."),
        common.CAUSAL,
        common.SEED,
        click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="fp32, on a GPU fp16."),
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
