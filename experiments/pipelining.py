"""What is each of FlashAttention-3's ideas worth?

FA3 keeps the tensor cores busy while the softmax is taken and while tiles are copied.  Its Table 2 switches two ideas
off, its text a third.  [FA3, 2407.08608, section 4.1, Table 2: fp16, B=4, N=8448, H=16, d=128]  Here each switch of
fwd_v3 is turned alone, on the same problem; every build takes the best of a few tiles, so that none is held back by a
tile that suits another.
"""

from __future__ import annotations

import click

from sandbox import picture, target
from sandbox.kernels import fwd_v3
from sandbox.mask import Mask
from sandbox.measure import gate, timing
from sandbox.nvrtc import CompileError
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile

from . import common, inputs
from .common import Experiment

BUILDS = {  # what is said of a build: its switches
    "as it is": {},
    "no overlap of QKᵀ and softmax": {"overlap": False},
    "with turns (ping-pong)": {"ping_pong": True},
    "without turns": {"ping_pong": False},
    "no overlap, no turns": {"overlap": False, "ping_pong": False},
    "O rescaled at every step": {"lazy": False},
    "every 132nd row block is a block's own": {"dynamic": False},
    "one block a row block": {"persistent": False, "dynamic": False},
    "two stages of K and V": {"stages": 2},
}
SAME = "as it is"
PAPER_SHAPE = {"B": 4, "H": 16, "N": 8448, "d": 128, "dtype": "fp16", "causal": False}
PAPER = {SAME: 661, "no overlap of QKᵀ and softmax": 582}  # TFLOP/s, Table 2
UNBUILT = ("no warp specialisation", 570)  # of Table 2, too: our copies always have warps of their own
TURNS = (570, (620, 640))  # TFLOP/s without and with ping-pong, section 3.1, d=128, N=8k
TILES = (Tile(128, 128), Tile(128, 176))

# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, seqlen, head_dim, batch, heads, causal, dtype, seed):
    small = device.simulated
    B, H = batch or (1 if small else 4), heads or (1 if small else 16)
    N, d = seqlen or (200 if small else 8448), head_dim or (64 if small else 128)
    problem = Problem(B, H, H, N, N, d, dtype, mask=Mask(causal))
    tiles = (Tile(128, 64),) if small else dict.fromkeys((*TILES, fwd_v3.usual(problem, device)))
    points = []
    for name, switches in BUILDS.items():
        for tile in tiles:
            variant = fwd_v3.turned(**switches)
            point = common.point(variant, problem, tile, device, input="gauss", seed=seed, notes={"build": name})
            points.append(point)
    if all(point.infeasible for point in points):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def measure(point) -> dict:
    """The row's measured fields: gate, then time on a GPU."""
    row, device = common.empty_row(), target.device()
    if point.infeasible:
        return row
    variant = fwd_v3.turned(**BUILDS[point.notes["build"]])
    try:
        x = inputs.make(point.input, point.problem, point.seed)
        verdict = gate.check(variant, point.problem, point.tile, x, device)
    except (Infeasible, CompileError) as error:
        return row | {"infeasible": str(error).splitlines()[0]}
    row |= {
        "gate": "passed" if verdict.passed else f"failed: {verdict.why}", "max_error": verdict.max_error,
        "error_ratio": verdict.ratio,
    }  # fmt: skip
    if verdict.passed and not device.simulated:
        row |= common.timed(timing.time(verdict, 0.2), point)
    return row


# ---- what the rows say ----------------------------------------------------------------------------------------------


def best(rows: list[dict]) -> dict[str, dict]:
    """build -> its fastest row."""
    found = {}
    for row in rows:
        if row["tflops"] and row["tflops"] > found.get(row["build"], {"tflops": 0})["tflops"]:
            found[row["build"]] = row
    return found


def worth(rows: list[dict]) -> dict[str, float]:
    """build -> its speed over that of the kernel as it is, less one."""
    fastest = best(rows)
    return {
        b: row["tflops"] / fastest[SAME]["tflops"] - 1 for b, row in fastest.items() if SAME in fastest and b != SAME
    }


def at_the_papers_shape(row: dict) -> bool:
    return all(row[field] == value for field, value in PAPER_SHAPE.items())


def answer(rows: list[dict]) -> str:
    lines, fastest = ["What is each of FlashAttention-3's ideas worth?"], best(rows)
    if SAME not in fastest:
        passed = {row["build"] for row in rows if row["gate"] == "passed"}
        lines.append(
            f"  {len(passed)} of {len(BUILDS)} builds passed the gate; what they are worth, only a GPU can say."
        )
        return "\n".join(lines)
    row = fastest[SAME]
    lines.append(f"  fwd_v3 as it is: {row['tflops']:.0f} TFLOP/s with tile {row['Br']}x{row['Bc']}.")
    for build, change in worth(rows).items():
        row = fastest[build]
        lines.append(f"  {build}: {row['tflops']:.0f}, {change:+.1%} (tile {row['Br']}x{row['Bc']}).")
    if at_the_papers_shape(row):
        told = ", ".join(f"{build} {value}" for build, value in PAPER.items())
        lines.append(f"  FA3's Table 2, on an H100: {told}; {UNBUILT[0]} {UNBUILT[1]}, which is not built here.")
        lines.append(f"  FA3's text: turns lift {TURNS[0]} to {TURNS[1][0]}-{TURNS[1][1]}.")
    return "\n".join(lines)


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    change = worth(rows)
    if not change:
        return [(number, "not measurable here", "only a GPU tells what overlaps") for number in (12, 13)]
    overlap = change.get("no overlap of QKᵀ and softmax", 0.0)
    turns = change.get("without turns", 0.0) - change.get("with turns (ping-pong)", 0.0)
    why = f"without the overlap of QKᵀ and softmax {overlap:+.1%}; without turns {turns:+.1%} against with them"
    verdict = "holds" if overlap < -0.02 and turns < -0.02 else "holds in part" if min(overlap, turns) < -0.02 else None
    copies = "warps of their own copy in every build; without them it is not built"
    return [(12, "not measurable here", copies), (13, verdict or "does not hold", why)]


# ---- table and picture ----------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    def paper(row):
        return PAPER.get(row["build"]) if at_the_papers_shape(row) else None

    columns = [
        ("build", lambda row: row["build"]),
        ("tile", lambda row: f"{row['Br']}x{row['Bc']}"),
        ("FA3", paper),
        *common.OUTCOME,
    ]
    return common.table(rows, columns)


def draw(rows: list[dict]):
    """A bar a build; the paper's figures beside it."""
    fastest = best(rows)
    if SAME not in fastest:
        return picture.page(answer(rows).splitlines()[-1].strip(), picture.setup(rows[0]), (12, 1.2))
    builds = [build for build in BUILDS if build in fastest]
    change = worth(rows)
    title = f"fwd_v3: {fastest[SAME]['tflops']:.0f} TFLOP/s; {_dearest(change)}"
    height = 2.1 + 0.5 * len(builds)
    figure = picture.page(title, f"N={rows[0]['N']} · {picture.setup(rows[0])}", (12, height))
    axes = figure.add_axes((0.3, 0.75 / height, 0.66, 1 - 1.85 / height))
    for y, build in enumerate(reversed(builds)):
        x = fastest[build]["tflops"]
        axes.barh(y, x, height=0.62, color=picture.BLUE if build == SAME else picture.ORANGE)
        text = f"{x:.0f}" + (f"  {change[build]:+.1%}" if build in change else "")
        axes.text(8, y, text, va="center", color="white", fontweight="bold")
        if build in PAPER and at_the_papers_shape(fastest[build]):
            axes.plot([PAPER[build]] * 2, [y - 0.4, y + 0.4], color=picture.INK, linewidth=2.5)
            axes.text(PAPER[build] - 6, y + 0.36, f"FA3 {PAPER[build]}", ha="right", va="bottom", fontsize=9)
    axes.set_yticks(range(len(builds)), list(reversed(builds)))
    axes.set_xlim(0, 1.04 * max(row["tflops"] for row in fastest.values()))
    axes.set_xlabel("TFLOP/s, the best tile of each build (black: the paper's, on an H100)")
    return figure


def _dearest(change: dict[str, float]) -> str:
    build = min(change, key=change.get)
    return f"the dearest change: {build}, {change[build]:+.0%}"


EXPERIMENT = Experiment(
    name="pipelining",
    question="What is each of FlashAttention-3's ideas worth?",
    fixed="input, shape, dtype",
    factor="one switch of fwd_v3 at a time; each build with the best of a few tiles",
    varies=("build", "variant", "Br", "Bc"),
    options=(
        click.option("--seqlen", type=common.SIZE, help="N; 200 emulated, else 8448 as in the paper."),
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
    key=("build", *common.KEY),
)
