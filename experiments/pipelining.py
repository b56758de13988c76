"""What are FlashAttention-3's ideas worth, each switched off alone?

FA3 keeps the tensor cores busy while tiles are copied and the softmax is taken.  Its Table 2 switches two of its ideas
off, its text a third.  [FA3, 2407.08608, section 4.1, Table 2: fp16, no mask, B=4, N=8448, H=16, d=128]  Here fwd_v3
is built with every switch on, then with one off at a time.  Each build is tuned on its own, over a few tiles and over
where O leaves from (a tile of its own, or V's), so that none is held back by what suits another.

What an idea is worth is the speed with it over the speed without it, less one; it may be nothing, and less.

The builds, and what their rows say, are in pipelining_report.py.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import click

from sandbox import emulator, target
from sandbox.choose import choose_tile
from sandbox.kernels import fwd_v3
from sandbox.kernels.fwd_v3 import Switches
from sandbox.mask import Mask
from sandbox.measure import formulas, gate, timing
from sandbox.nvrtc import CompileError
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile, Variant

from . import common, inputs
from .common import Experiment
from .pipelining_report import BUILDS, PAPER_SHAPE, answer, claims, draw, table

__all__ = ["EXPERIMENT", "claims"]  # what experiments/claims.py looks for

TILES, SMALL = (Tile(128, 128), Tile(192, 80)), (Tile(128, 64),)  # on a GPU, with the usual one; emulated
MOST_STAGES = (4, 3, 2)
BUDGET_S = 0.1  # of launches a point

# ---- the points, and their rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emulated(common.Point):
    """A point that takes the emulator's time, which is not the simulator's."""

    def seconds(self) -> float:
        p = self.problem
        products = 2 * p.B * p.H * p.N_q * p.N_k * p.d
        return 0.0 if self.infeasible else 2 + fwd_v3.VARIANT.pace * products  # it compiles first


def plan(device: Device, seqlen, head_dim, batch, heads, causal, dtype, seed):
    if device.simulated and emulator.compiler() is None:
        raise ValueError("fwd_v3 is emulated where there is no GPU, and that needs a C++ compiler: install g++")
    B, H, N, d = (1, 1, 200, 64) if device.simulated else (PAPER_SHAPE[name] for name in "BHNd")
    B, H, N, d = batch or B, heads or H, seqlen or N, head_dim or d
    problem = Problem(B, H, H, N, N, d, dtype, mask=Mask(causal))
    points = []
    for build, tile, switches in candidates(problem, device):
        notes = {"build": build, **asdict(switches), "own": is_own(problem, tile, switches, device)}
        fields = dict(input="gauss", seed=seed, notes=notes, count_bytes=False)  # ncu's child finds no such variant
        point = common.point(variant_of(switches), problem, tile, device, **fields)
        points.append(Emulated(**vars(point)) if device.simulated else point)
    if all(point.infeasible for point in points):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def candidates(problem: Problem, device: Device) -> list[tuple[str, Tile, Switches]]:
    """Every build with every tile, O apart or not; those that do not fit too."""
    tiles = SMALL if device.simulated else dict.fromkeys((*TILES, choose_tile(problem, device, fwd_v3.VARIANT)))
    found = []
    for build, turned in BUILDS.items():
        for tile in tiles:
            for apart in (False, True):
                staged = [Switches(n, apart) for n in MOST_STAGES]
                fits = (s for s in staged if fwd_v3.shared_bytes(problem.d, tile, s) <= device.shared)
                found.append((build, tile, replace(next(fits, staged[-1]), **turned)))
    return found


def is_own(problem: Problem, tile: Tile, switches: Switches, device: Device) -> bool:
    """Whether attention() takes this very kernel."""
    try:
        own = choose_tile(problem, device, fwd_v3.VARIANT)
    except Infeasible:
        return False
    return tile == own and switches == fwd_v3.chosen(problem, tile, device)


def variant_of(switches: Switches) -> Variant:
    """Named after what is off."""
    turned = asdict(switches)
    off = (f"{name}=False" for name, on in turned.items() if on is False and name != "o_apart")
    return replace(fwd_v3.turned(**turned), name=" ".join(["fwd_v3", *off]))


def switches_of(row: dict) -> Switches:
    return Switches(**{name: row[name] for name in asdict(Switches())})


@functools.lru_cache(maxsize=1)
def drawn(problem: Problem, seed: int) -> gate.Inputs:
    """The same for every build: drawn anew, it is a second or two a point.  The gate sees that none is changed."""
    return inputs.make("gauss", problem, seed)


@functools.lru_cache(maxsize=1)
def refusals(problem: Problem, device: Device) -> dict[tuple[Tile, Switches], str | None]:
    """What speaks against each kernel, if anything.  All are compiled here at once, on every core of the machine."""

    def refusal(kernel) -> str | None:
        tile, switches = kernel
        try:
            variant_of(switches).fit(problem, tile, device)
            fwd_v3.made(problem, tile, switches)[0].binary()
        except (Infeasible, CompileError) as error:
            return str(error).splitlines()[0]

    kernels = list(dict.fromkeys((tile, switches) for _, tile, switches in candidates(problem, device)))
    with ThreadPoolExecutor() as pool:
        return dict(zip(kernels, pool.map(refusal, kernels)))


def measure(point: common.Point) -> dict:
    """The row's measured fields: gate, then accesses where the launch is emulated, else time."""
    row, device, p, tile = common.empty_row(), target.device(), point.problem, point.tile
    if point.infeasible:
        return row
    switches = switches_of(point.notes)
    if not device.simulated and (reason := refusals(p, device)[tile, switches]):
        return row | {"infeasible": reason}
    formula = formulas.traffic("fwd_v3", p, tile)
    row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
    try:
        verdict = gate.check(variant_of(switches), p, tile, drawn(p, point.seed), device)
    except common.OutOfMemory:
        return row | {"infeasible": "does not fit in the GPU's memory"}
    if not verdict.passed:
        drawn.cache_clear()  # it may be the inputs that it changed
    row |= {
        "gate": "passed" if verdict.passed else f"failed: {verdict.why}",
        "max_error": common.finite(verdict.max_error),
        "error_ratio": common.finite(verdict.ratio),
    }
    if verdict.traffic is not None:
        row |= common.counted(verdict.traffic)
    if verdict.passed and not device.simulated:
        row |= common.timed(timing.time(verdict, BUDGET_S), point)
    return row


EXPERIMENT = Experiment(
    name="pipelining",
    question="What are FlashAttention-3's ideas worth, each switched off alone?",
    fixed="input, shape, dtype",
    factor="one switch of fwd_v3 at a time; each build with the best of a few tiles",
    varies=("build", "variant", "stages", "o_apart", "Br", "Bc"),
    options=(
        click.option("--seqlen", type=common.SIZE, help="N; 200 emulated, else the paper's 8448."),
        click.option("--head-dim", type=common.SIZE, help="d; 64 emulated, else 128."),
        click.option("--batch", type=common.SIZE, help="B; 1 emulated, else 4."),
        click.option("--heads", type=common.SIZE, help="H; 1 emulated, else 16."),
        common.CAUSAL,
        click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True),
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=("build", "stages", "o_apart", *common.KEY),
)
