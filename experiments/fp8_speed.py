"""From which N on does FP8 pay?

The products of FlashAttention-3 in FP8 take e4m3, which tensor cores multiply twice as fast as 16 bits.  But inputs of
16 bits must be quantized first: one pass, which costs the same for each token whatever N is, where attention costs a
token 4·N·d FLOPs.  Tokens and width stay, B·N = 16k and H·d = 2048, as in the papers' benchmarks; what N a sequence
needs before the faster products outweigh the pass is what is asked.

All that is compared at one N is gated, then timed in turns, in the same run: the ratios are of one clock and
temperature.  The pass is gated too: bit for bit what sandbox/quantize.py says.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sandbox import emulator, picture, quantize, target
from sandbox.kernels import fwd_v3, fwd_v3_fp8
from sandbox.mask import Mask
from sandbox.measure import bench, gate, rivals, timing
from sandbox.problem import Problem
from sandbox.variant import SIMULATOR, Device, Infeasible, Tile, Variant

from . import common, inputs
from .common import Experiment, milliseconds

KERNEL, HEADS, FROM_BF16 = "fwd_v3_fp8", "fwd_v3_fp8 scales=head", "fwd_v3_fp8 from bf16"
V3, CUDNN, PASS = "fwd_v3", "torch:cudnn", "quantize"
COLORS = {
    KERNEL: picture.BLUE, HEADS: picture.SKY, FROM_BF16: picture.VERMILION, V3: picture.GREEN, CUDNN: picture.GREY,
}  # fmt: skip
PROVIDERS = (*COLORS, PASS)
OURS = {
    KERNEL: fwd_v3_fp8.VARIANT, HEADS: fwd_v3_fp8.turned(scales="head"), FROM_BF16: fwd_v3_fp8.VARIANT,
    V3: fwd_v3.VARIANT,
}  # fmt: skip
SCALES = {KERNEL: "block", HEADS: "head", FROM_BF16: "block", PASS: "block"}
SEQLEN, EMULATED, TOLD = (512, 1024, 2048, 4096, 8192, 16384), (200,), (4096, 16384)
BUDGET_S = 0.1  # of launches a row
PAPER, NEARLY = (740, 1200), 0.95  # TFLOP/s in FP16 and in FP8, FA3's abstract; how near is near enough
LARGEST = 256  # head dimension: where products outweigh the softmax most

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
        p, tile, variant = self.problem, self.tile, OURS.get(self.provider)
        return {
            "provider": self.provider, "variant": variant.name if variant else self.provider, "direction": "fwd",
            "dtype": "e4m3" if self.provider in (KERNEL, HEADS) else p.dtype, "scales": SCALES.get(self.provider),
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
                        points.append(Point(name, problem, seed, OURS[name].usual(problem, device)))
                    elif name == PASS or not device.simulated:
                        points.append(Point(name, problem, seed))
    return points


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
        tile = variant.usual(problem, device)
        alone = name in (KERNEL, HEADS)
        verdict = gate.check(variant, problem, tile, given(problem, seed), device, quantized=alone)
    except (Infeasible, rivals.Unavailable) as reason:
        return {"infeasible": str(reason)}, None
    except common.OutOfMemory:
        return {"infeasible": "does not fit in the GPU's memory"}, None
    row = {"max_error": common._finite(verdict.max_error), "error_ratio": common._finite(verdict.ratio)}
    if not verdict.passed:
        drawn.cache_clear()  # it may be the inputs that it changed
        return row | {"gate": f"failed: {verdict.why}"}, None
    return row | {"gate": "passed"}, verdict.launch


def gated_pass(problem: Problem, x: gate.Inputs):
    """As `gated`: the pass that comes before the kernel, beside what the reference makes of the same numbers."""
    device = target.device()
    tile = OURS[FROM_BF16].usual(problem, device)
    launcher = OURS[FROM_BF16].launcher(problem, tile, device)
    blocks = {"q_block": fwd_v3_fp8.Q_BLOCK, "kv_block": tile.Bc}
    ours, reference = launcher.quantize(x.q, x.k, x.v), quantize.quantize(x.q, x.k, x.v, **blocks)
    made = {name: y for name, y in vars(ours).items() if isinstance(y, torch.Tensor)}
    wrong = [name for name, y in made.items() if not gate.same_bits(y, getattr(reference, name))]
    row = {"bytes": sum(y.nbytes for y in (x.q, x.k, x.v, *made.values()))}
    if wrong:
        return row | {"gate": f"failed: {', '.join(wrong)} are not what the reference makes of it"}, None
    return row | {"gate": "passed"}, lambda: launcher.quantize(x.q, x.k, x.v)


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
            kernels |= {(variant, problem.kind, variant.usual(problem, device)) for variant in OURS.values()}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: binary(*kernel, device), kernels))


def binary(variant: Variant, problem: Problem, tile: Tile, device: Device):
    if variant.scales:
        return variant.launcher(problem, tile, device).plain.binary()
    return fwd_v3.made(problem, tile, fwd_v3.chosen(problem, tile, device))[0].binary()


# ---- what the rows say ----------------------------------------------------------------------------------------------


def at(rows: list[dict], provider: str, d: int, causal: bool) -> dict[int, dict]:
    """N -> the row, where it was timed, shortest first."""
    ours = [row for row in rows if (row["provider"], row["d"], row["causal"]) == (provider, d, causal)]
    return {row["N"]: row for row in sorted(ours, key=lambda row: row["N"]) if row["seconds"]}


def ratios(rows: list[dict], provider: str, d: int, causal: bool, field="over_v3") -> dict[int, float]:
    return {N: row[field] for N, row in at(rows, provider, d, causal).items() if row[field]}


def pays(rows: list[dict], d: int, causal: bool) -> int | None:
    """The least N from which on FP8 with its quantization is faster than fwd_v3 in bf16."""
    first, found = None, ratios(rows, FROM_BF16, d, causal)
    for N in sorted(found, reverse=True):
        if found[N] < 1 + bench.SAME:
            return first
        first = N
    return first


def dims(rows: list[dict]) -> list[int]:
    """The head dimensions at which there is something to compare."""
    return sorted({row["d"] for row in rows if row["provider"] == FROM_BF16 and row["over_v3"]})


def emulated(rows: list[dict]) -> bool:
    return rows[-1]["device"] == SIMULATOR.name


def answer(rows: list[dict]) -> str:
    lines = [line for d in dims(rows) for line in on_dim(rows, d)] or [on_exactness(rows)]
    text = "\n".join(["From which N on does FP8 pay?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_exactness(rows: list[dict]) -> str:
    judged = [row for row in rows if row["gate"]]
    passed = [row for row in judged if row["gate"] == "passed"]
    text = f"{len(passed)} of {len(judged)} rows pass the gate"
    return text + ("; when FP8 pays, only a GPU can say." if emulated(rows) else "; nothing was timed to compare.")


def on_dim(rows: list[dict], d: int) -> list[str]:
    lines = [
        f"d={d}: with the quantization of bf16 inputs, FP8 is faster than fwd_v3 in bf16 {on_masks(rows, d)}"
        f" (less than {bench.SAME:.0%} does not show)."
    ]
    for N in TOLD:
        both = {c: at(rows, FROM_BF16, d, c).get(N) for c in (False, True)}
        words = [at_one(rows, row) for row in both.values() if row and row["over_v3"]]
        lines += [f"d={d}, N={N}: {'; '.join(words)}."] if words else []
    passes = [row for c in (False, True) for row in at(rows, PASS, d, c).values() if row["share"]]
    if passes:
        N = max(row["N"] for row in passes)
        last = [row for row in passes if row["N"] == N]
        shares = " and ".join(f"{row['share']:.1%} {mask(row)}" for row in last)
        lines.append(
            f"d={d}: quantization takes {shares} of the time from bf16 at N={N}, {milliseconds(last[0])}, at "
            f"{last[0]['gigabytes_per_second']:,.0f} GB/s of what is read and written once."
        )
    change = [
        row["seconds"] / heads[N]["seconds"]
        for c in (False, True) for heads in [at(rows, HEADS, d, c)]
        for N, row in at(rows, KERNEL, d, c).items() if N in heads
    ]  # fmt: skip
    if change:
        lines.append(f"d={d}: with one scale a head, not one a block, the kernel alone has {span(change)} its speed.")
    return lines


def on_masks(rows: list[dict], d: int) -> str:
    """`from N=1024 on with no mask, from N=2048 on causal`."""
    return ", ".join(
        f"{since(pays(rows, d, c), found)} {'causal' if c else 'with no mask'}"
        for c in (False, True) if (found := ratios(rows, FROM_BF16, d, c))
    )  # fmt: skip


def since(first: int | None, found: dict[int, float]) -> str:
    if first is None:
        return f"not even at N={max(found)}"
    return f"from N={first} on" if first > min(found) else f"at every N, from {first} on,"


def at_one(rows: list[dict], row: dict) -> str:
    """How fast it is beside fwd_v3 and cuDNN at one N, under one mask."""
    text = f"{mask(row)} {row['over_v3']:.2f} times the speed of fwd_v3 in bf16"
    alone = at(rows, KERNEL, row["d"], row["causal"]).get(row["N"])
    if alone and alone["over_v3"]:
        text += f", the kernel alone {alone['over_v3']:.2f} times at {alone['tflops']:,.0f} TFLOP/s"
        text += f", {alone['over_cudnn']:.2f} times that of {CUDNN} in bf16" if alone["over_cudnn"] else ""
    return text


def mask(row: dict) -> str:
    return "causal" if row["causal"] else "with no mask"


def span(numbers) -> str:
    least, most = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return f"{least} times" if least == most else f"{least} to {most} times"


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), from the numbers of these rows."""
    if emulated(rows):
        return [(15, "not measurable here", "how fast FP8 is, only a GPU tells")]
    return [claim_15(rows)]


def claim_15(rows: list[dict]):
    """FP8 nearly doubles v3's speed, close to 1.2 PFLOP/s: 1.6 times, by the paper's own figures, within 5 %."""
    alone = [row for row in rows if row["provider"] == KERNEL and row["over_v3"]]
    if not alone:
        return 15, "not yet tested", f"{KERNEL} and {V3} were not both timed"
    most, gain = max(alone, key=lambda row: row["tflops"]), [row["over_v3"] for row in alone]
    why = f"up to {most['tflops']:,.0f} TFLOP/s and {max(gain):.2f} × {V3} in bf16; the former at d={most['d']}, "
    why += f"N={most['N']}, {mask(most)}; on inputs that are quantized already"
    if whole := [row["over_v3"] for row in rows if row["provider"] == FROM_BF16 and row["over_v3"]]:
        why += f", and {span(whole)} with their quantization"
    why += f"; the paper's figures are {PAPER[1] / PAPER[0]:.2f} × apart"
    parts = [most["tflops"] >= NEARLY * PAPER[1], max(gain) >= NEARLY * PAPER[1] / PAPER[0]]
    if not all(parts) and all(row["d"] != LARGEST for row in alone):
        why += f"; d={LARGEST} was not measured"
        return 15, "holds in part" if any(parts) else "not yet tested", why
    return 15, "holds" if all(parts) else "holds in part" if any(parts) else "does not hold", why


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = [
        ("provider", lambda row: row["provider"]),
        ("scales", lambda row: row["scales"]),
        ("d", lambda row: row["d"]),
        ("mask", lambda row: "causal" if row["causal"] else "none"),
        ("N", lambda row: row["N"]),
        ("tile", lambda row: row["Br"] and f"{row['Br']}x{row['Bc']}"),
        ("time", lambda row: row["seconds"] and milliseconds(row)),
        ("TFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:,.0f}"),
        (f"over\n{V3}", lambda row: row["over_v3"] and f"{row['over_v3']:.2f}"),
        ("over\ncuDNN", lambda row: row["over_cudnn"] and f"{row['over_cudnn']:.2f}"),
        ("share of\nthe time", lambda row: row["share"] and f"{row['share']:.1%}"),
        ("GB/s", lambda row: row["gigabytes_per_second"] and f"{row['gigabytes_per_second']:,.0f}"),
        ("max\nerror", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
        ("of what is\nallowed", lambda row: row["error_ratio"] and f"{row['error_ratio']:.0%}"),
        ("gate", lambda row: row["gate"]),
        ("cannot run", lambda row: row["infeasible"]),
    ]
    return common.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """TFLOP/s over N, a line a provider: no mask beside causal, a row of panels for each d."""
    last, there = rows[-1], dims(rows)
    where = [last["device"], "Gaussian input", "emulated" if emulated(rows) else f"{last['B'] * last['N']:,} tokens"]
    where.append(f"revision {last['revision']}" if last["revision"] else "no revision")
    if not there:
        figure = picture.page(on_exactness(rows).rstrip("."), " · ".join(where), (12, 4.2))
        _errors(figure.add_axes((0.2, 0.16, 0.75, 0.58)), rows)
        return figure
    height = 1.5 + 3.6 * len(there)
    figure = picture.page(title(rows), " · ".join(where), (12, height))
    for n, d in enumerate(there):
        for left, causal in ((0.05, False), (0.46, True)):
            bottom = height - 1.3 - 3.6 * (n + 1) + 0.75
            axes = figure.add_axes((left, bottom / height, 0.34, 2.5 / height))
            _speeds(axes, rows, d, causal, named=causal)
    return figure


def _speeds(axes, rows: list[dict], d: int, causal: bool, named: bool):
    ends, shown = [], sorted({row["N"] for row in rows if row["d"] == d})
    for name, color in COLORS.items():
        if line := {N: row["tflops"] for N, row in at(rows, name, d, causal).items()}:
            look = {"linewidth": 2.5 if name == FROM_BF16 else 1.8, "linestyle": "--" if name == HEADS else "-"}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4.5, color=color, **look)
            ends.append((max(line), line[max(line)], f"{name}, {line[max(line)]:,.0f}", color))
    if (first := pays(rows, d, causal)) is not None:
        axes.axvline(first, color=picture.PALE, linewidth=6, zorder=0)
        side = "right" if first == max(shown) else "left"
        told = f" pays from {thousands(first)} "
        axes.text(first, 0.02, told, transform=axes.get_xaxis_transform(), fontsize=9.5, ha=side)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [thousands(N) for N in shown])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * max(row["tflops"] or 0 for row in rows if row["d"] == d))
    axes.grid(axis="y")
    axes.set_xlabel("N")
    axes.set_title(f"d={d}, {'causal' if causal else 'no mask'}: TFLOP/s")
    if named:
        picture.label_ends(axes, ends, 0.08)


def _errors(axes, rows: list[dict]):
    """How much of what is allowed each errs, at most."""
    shown = {name: [row["error_ratio"] for row in rows if row["provider"] == name] for name in OURS}
    for y, (name, found) in enumerate(shown.items()):
        most = max((ratio for ratio in found if ratio is not None), default=0)
        axes.barh(y, most, 0.66, color=COLORS[name] if most <= 1 else picture.VERMILION)
        axes.text(most, y, f" {most:.0%}", va="center")
    axes.set_yticks(range(len(shown)), list(shown), color=picture.INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.axvline(1, color=picture.VERMILION, linewidth=2)
    axes.set_xlim(0, 1.2)
    axes.set_xlabel("largest error ÷ what is allowed; the line: the gate")


def title(rows: list[dict]) -> str:
    d = dims(rows)[-1]
    text = f"FP8 pays {on_masks(rows, d)} (d={d})"
    found = {c: ratios(rows, FROM_BF16, d, c) for c in (False, True)}
    N = max(max(each) for each in found.values() if each)
    times = span([each[N] for each in found.values() if N in each])
    return text + f";\nat N={thousands(N)}, quantization included, {times} fwd_v3's speed in bf16"


def thousands(N: int) -> str:
    return f"{N // 1024}k" if N % 1024 == 0 else str(N)


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
