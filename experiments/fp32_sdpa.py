"""Does a readable SIMT kernel keep up with torch's own fp32 attention?

fwd_v2 multiplies fp32 numbers on the CUDA cores, one multiply-add at a time.  torch:sdpa takes whatever backend torch
picks; its fused kernel for fp32 splits each number in two and multiplies on the tensor cores, as 3 products in TF32.
All of them get the same numbers in the same run, and are judged against the same float64 oracle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sandbox import catalog, picture, reference, target
from sandbox.choose import choose_tile
from sandbox.mask import Mask
from sandbox.measure import gate, timing
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile

from . import common, inputs, tables
from .common import Experiment
from .tables import milliseconds

VARIANT = "fwd_v2"
OURS, SDPA, CONTIGUOUS, MATH = f"sandbox:{VARIANT}", "torch:sdpa", "torch:sdpa contiguous", "torch:math"
PROVIDERS = {OURS: picture.VERMILION, SDPA: picture.BLUE, CONTIGUOUS: picture.SKY, MATH: picture.GREY}  # its colour

B, H, D, DTYPE, INPUT = 1, 32, 64, "fp32", "gauss"
SEQLEN = (1024, 4096, 8192, 16384)


# ---- the points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One provider at one N; the tile is ours alone."""

    provider: str
    problem: Problem
    seed: int
    tile: Tile | None = None

    direction, count_bytes = "fwd", False

    def fields(self) -> dict:
        p, tile = self.problem, self.tile
        return {
            "provider": self.provider, "variant": VARIANT if tile else None, "direction": self.direction,
            "dtype": p.dtype, "input": INPUT, "seed": self.seed, "B": p.B, "H": p.H, "N": p.N_q, "d": p.d,
            "Br": tile and tile.Br, "Bc": tile and tile.Bc, "causal": p.mask.causal, "infeasible": None,
        }  # fmt: skip


KEY = ("provider", "direction", "dtype", "input", "seed", "B", "H", "N", "d", "causal")
MEASURED = ("max_error", "gate", "seconds", "ms_p20", "ms_p80", "tflops", "ratio")


def plan(device: Device, seqlen, causal, seed):
    if device.simulated:
        raise ValueError("fp32_sdpa has nothing to time without a GPU: the simulator's time says nothing about one")
    points = []
    for N in seqlen or SEQLEN:
        problem = Problem(B, H, H, N, N, D, DTYPE, mask=Mask(causal))
        tile = choose_tile(problem, device, catalog.find(VARIANT))
        points += [Point(name, problem, seed, tile if name == OURS else None) for name in PROVIDERS]
    return points


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(point: Point) -> dict:
    """Error, time, and speed over torch:sdpa's; max_error is that of O alone, the one output that all of them have."""
    row = dict.fromkeys(MEASURED)
    try:
        row |= measure_ours(point) if point.provider == OURS else measure_torch(point)
    except Infeasible as misfit:  # found by the compiler: too many registers, say
        row |= {"infeasible": misfit.reason}
    except common.OutOfMemory:
        row |= {"infeasible": "does not fit in the GPU's memory"}
    torch.cuda.empty_cache()  # what S and P took is many times what the others take
    return row


def measure_ours(point: Point) -> dict:
    x, O_star = given(point.problem, point.seed)
    what = (catalog.find(VARIANT), point.problem, point.tile, x, target.device())
    verdict = gate.check(*what)
    launch, outputs = gate.prepare(*what)
    launch()
    row = {"gate": "passed" if verdict.passed else f"failed: {verdict.why}", "max_error": error(outputs["O"], O_star)}
    return row | timed(timing.time(verdict), point) if verdict.passed else row


def measure_torch(point: Point) -> dict:
    """A yardstick: its error is on record, but it passes no gate."""
    x, O_star = given(point.problem, point.seed)
    launch = launcher(point.provider, point.problem, x)
    row = {"max_error": error(launch().transpose(1, 2), O_star)}
    sdpa = point.provider == SDPA
    return row | timed(sdpa_timing(point.problem, point.seed) if sdpa else timing.time_launch(launch), point)


def launcher(provider: str, problem: Problem, x: gate.Inputs):
    """A launch of torch's attention on [B, H, N, d]: views of the kernels' tensors, or copies made before."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    if provider == CONTIGUOUS:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()

    def attention():
        return scaled_dot_product_attention(q, k, v, is_causal=problem.mask.causal, scale=problem.scale)

    return sdpa_kernel(SDPBackend.MATH)(attention) if provider == MATH else attention


def timed(t: timing.Timing, point: Point) -> dict:
    return {
        "seconds": t.ms * 1e-3, "ms_p20": t.ms_p20, "ms_p80": t.ms_p80,
        "tflops": point.problem.flops(point.direction) / t.ms * 1e-9,
        "ratio": sdpa_timing(point.problem, point.seed).ms / t.ms,
    }  # fmt: skip


def error(O, O_star) -> float | None:
    return common.finite((O.double() - O_star).abs().max())


@functools.lru_cache(maxsize=1)  # the points of one N follow one another
def given(problem: Problem, seed: int):
    """The inputs that every provider gets, and the oracle's O."""
    x = inputs.make(INPUT, problem, seed)
    return x, reference.forward(problem, x.q, x.k, x.v)[0]


@functools.lru_cache(maxsize=1)
def sdpa_timing(problem: Problem, seed: int) -> timing.Timing:
    """Once a run, so that a run that goes on where another one stopped compares with a time of its own."""
    return timing.time_launch(launcher(SDPA, problem, given(problem, seed)[0]))


# ---- what the rows say ----------------------------------------------------------------------------------------------


def timings(rows: list[dict], provider: str) -> dict[int, dict]:
    """N -> the row, where it was timed."""
    return {row["N"]: row for row in rows if row["provider"] == provider and row["seconds"]}


def verdict(rows: list[dict]) -> str | None:
    """None where there is nothing to compare."""
    ours = timings(rows, OURS).values()
    if not ours:
        return None
    keeps_up = [row["ratio"] >= 1 for row in ours]
    return "Yes" if all(keeps_up) else "At some N" if any(keeps_up) else "No"


def answer(rows: list[dict]) -> str:
    ours, sdpa = timings(rows, OURS), timings(rows, SDPA)
    if not ours:
        return f"Nothing to compare: {_why_not(rows)}."
    last = ours[max(ours)]
    text = f"{verdict(rows)}: {_at(ours)} {VARIANT} has {_span(row['ratio'] for row in ours.values())} "
    text += f"the speed of {SDPA}"
    if last["N"] in sdpa:
        theirs = sdpa[last["N"]]
        text += f" (N={last['N']}, tile {_tile(last)}: {last['tflops']:.1f} against {theirs['tflops']:.1f} TFLOP/s, "
        text += f"largest error {last['max_error']:.1e} against {theirs['max_error']:.1e})"
    others = []
    for name in (CONTIGUOUS, MATH):
        rest = timings(rows, name)
        if both := [N for N in ours if N in rest]:
            over = (rest[N]["seconds"] / ours[N]["seconds"] for N in both)
            up_to = f", which ends at N={max(both)}" if max(both) < last["N"] else ""
            others.append(f"{_span(over)} that of {name}{up_to}")
    return text + "".join(f", {words}" for words in others) + "."


def _why_not(rows: list[dict]) -> str:
    row = next(row for row in rows if row["provider"] == OURS)
    return f"at no N {VARIANT} was timed; N={row['N']} {row['infeasible'] or row['gate']}"


def _at(rows: dict[int, dict]) -> str:
    return f"from N={min(rows)} to {max(rows)}" if len(rows) > 1 else f"at N={min(rows)}"


def _span(ratios) -> str:
    ratios = sorted(ratios)
    low, high = f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _tile(row: dict) -> str | None:
    return row["Br"] and f"{row['Br']}x{row['Bc']}"


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = [
        ("provider", lambda row: row["provider"]),
        ("N", lambda row: row["N"]),
        ("tile", _tile),
        ("time", lambda row: row["seconds"] and milliseconds(row)),
        ("p20 to p80", lambda row: row["seconds"] and f"{row['ms_p20']:.4g} to {row['ms_p80']:.4g} ms"),
        ("TFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:.2f}"),
        (f"speed over\n{SDPA}'s", lambda row: row["ratio"] and f"{row['ratio']:.2f}"),
        ("max\nerror of O", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
        ("gate", lambda row: row["gate"]),
        ("cannot run", lambda row: row["infeasible"]),
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """TFLOP/s over N, a line for each provider."""
    subtitle = picture.setup(rows[0])
    if verdict(rows) is None:
        return picture.page("Nothing to compare: fwd_v2 was not timed", subtitle, (12, 1.2))
    figure = picture.page(_title(rows), subtitle, (12, 5.6))
    axes = figure.add_axes((0.05, 0.1, 0.72, 0.64))
    ends, last = [], max(row["N"] for row in rows)
    for name, color in PROVIDERS.items():
        if ours := timings(rows, name):
            N = sorted(ours)
            look = {"linewidth": 2.5 if name == OURS else 2, "linestyle": "--" if name == CONTIGUOUS else "-"}
            axes.plot(N, [ours[n]["tflops"] for n in N], marker="o", color=color, markersize=5, **look)
            up_to = f", to {_thousands(N[-1])}" if N[-1] < last else ""
            ends.append((N[-1], ours[N[-1]]["tflops"], f"{name}{up_to}, {ours[N[-1]]['tflops']:.1f}", color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(x := sorted({row["N"] for row in rows}), [_thousands(N) for N in x])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.grid(axis="y")
    axes.set_xlabel("N")
    axes.set_title("TFLOP/s over N, forward")
    picture.label_ends(axes, ends, 0.06)
    return figure


def _title(rows: list[dict]) -> str:
    ours = timings(rows, OURS)
    does = {"Yes": "keeps up", "At some N": "keeps up at some N", "No": "does not keep up"}[verdict(rows)]
    return f"{VARIANT} {does} with torch's fp32 attention:\n{_span(row['ratio'] for row in ours.values())} its speed"


def _thousands(N: int) -> str:
    return f"{N // 1024}k" if N % 1024 == 0 else str(N)


EXPERIMENT = Experiment(
    name="fp32_sdpa",
    question="Does a readable SIMT kernel keep up with torch's own fp32 attention?",
    fixed=f"Gaussian input, B={B} H={H} d={D} {DTYPE}, forward; the same numbers for all",
    factor=f"who computes it: {', '.join(PROVIDERS)}",
    varies=("provider", "N"),
    options=(
        common.integers("--seqlen", help="N, one or several; 1k, 4k, 8k and 16k unless given."),
        common.CAUSAL,
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
