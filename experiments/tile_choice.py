"""How far from the best is the tile that choose_tile takes, on shapes that it was not tuned on?

At each shape every tile of the kernel is timed, in turns, beside the chosen one.  The kernels on the tensor cores were
tuned on others; those below were drawn at random (seed 20261204), and first met when they were recorded.  Each tile
passes the gate at a small shape of its kind first.  Then the few that attention(tile="measured") would time are timed
once more, and by the first times it is said how far from the best is the one that it would take.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import torch

from sandbox import catalog, picture, reference, target
from sandbox.choose import candidates
from sandbox.mask import Mask
from sandbox.measure.fastest import least, time_tiles
from sandbox.measure.timing import Ungated
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile, Variant

from . import common, inputs, tables
from .common import Experiment

SHAPES = {  # (d, causal, B·H, N)
    "fwd": (
        (64, False, 8, 800), (64, False, 37, 5750), (64, False, 15, 600), (64, True, 31, 1400),
        (64, True, 89, 6750), (64, True, 31, 1850), (80, True, 27, 1500), (80, True, 4, 1150),
        (80, True, 10, 800), (128, False, 5, 3550), (128, False, 5, 500), (128, False, 76, 7650),
        (128, True, 29, 850), (128, True, 8, 2250), (128, True, 58, 700), (160, True, 43, 600),
        (160, True, 19, 950), (160, True, 38, 2750), (208, False, 7, 4200), (208, False, 99, 950),
        (208, False, 14, 7900), (256, True, 13, 850), (256, True, 42, 5000), (256, True, 5, 2550),
    ),
    "bwd": (
        (64, False, 5, 1200), (64, False, 51, 2500), (64, False, 28, 2050), (64, True, 4, 4900),
        (64, True, 87, 1550), (64, True, 28, 1000), (128, False, 11, 800), (128, False, 8, 1600),
        (128, False, 24, 1300), (128, True, 11, 4650), (128, True, 113, 4050), (128, True, 106, 2800),
        (176, False, 43, 650), (176, False, 17, 3750), (176, False, 18, 1600), (256, False, 43, 1600),
        (256, False, 94, 6200), (256, False, 112, 2000), (256, True, 12, 1600), (256, True, 37, 500),
        (256, True, 5, 3050),
    ),
}  # fmt: skip
VARIANTS = ("fwd_v2_mma", "fwd_v3", "bwd_v2_mma")
NEAR = 0.03  # of the best: what the chooser is to come within
KEY = ("variant", "direction", "dtype", "B", "H", "N", "d", "causal", "seed")


@dataclass(frozen=True)
class Point:
    """A kernel at a shape; `infeasible` says why it has no tile there, or is None."""

    variant: Variant
    problem: Problem
    seed: int
    tiles: tuple[Tile, ...] = ()
    misfits: tuple[tuple[str, str], ...] = ()  # tile, and why it does not fit
    few: tuple[Tile, ...] = ()  # that would be timed, the chosen one first
    infeasible: str | None = None
    count_bytes: bool = False

    def fields(self) -> dict:
        p, tile = self.problem, self.chosen
        return {
            "variant": self.variant.name, "direction": self.variant.direction, "dtype": p.dtype, "B": p.B, "H": p.H,
            "N": p.N_q, "d": p.d, "causal": p.mask.causal, "seed": self.seed, "Br": tile and tile.Br,
            "Bc": tile and tile.Bc, "infeasible": self.infeasible,
        }  # fmt: skip

    @property
    def chosen(self) -> Tile | None:
        return next(iter(self.few), None)

    def kernels(self) -> list[tuple]:
        return [(self.variant.name, self.problem.kind, tile) for tile in self.tiles]


def plan(device: Device, variant, seqlen, head_dim, heads, mask, dtype, seed):
    if device.simulated:
        raise ValueError("tile_choice has nothing to time without a GPU: the simulator's time says nothing about one")
    points = []
    for kernel in map(catalog.find, dict.fromkeys(variant or VARIANTS)):
        if kernel.direction == "softmax":
            raise ValueError(f"--variant {kernel.name}: it has no tile")
        for d, causal, H, N in shapes(kernel.direction, seqlen, head_dim, heads, mask):
            points.append(point(kernel, Problem(1, H, H, N, N, d, dtype, mask=Mask(causal)), seed, device))
    if all(one.infeasible for one in points):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def shapes(direction: str, seqlen, head_dim, heads, mask):
    """The list above, or all pairs of what is asked for."""
    if not (seqlen or head_dim or heads or mask):
        return SHAPES[direction]
    masks = [causal for causal in (False, True) if mask in (None, "both", "causal" if causal else "none")]
    asked = (head_dim or (80, 112), masks, heads or (4, 24, 132), seqlen or (512, 3000))
    return [(d, causal, H, N) for d in asked[0] for causal in asked[1] for H in asked[2] for N in asked[3]]


def point(kernel: Variant, problem: Problem, seed: int, device: Device) -> Point:
    tiles = list(kernel.space(problem, device))
    fits = [tile for tile in tiles if isinstance(tile, Tile)]
    misfits = tuple((str(m.tile), m.reason) for m in tiles if isinstance(m, Infeasible) and m.tile)
    try:
        few = candidates(problem, device, kernel)
    except Infeasible as reason:
        return Point(kernel, problem, seed, misfits=misfits, infeasible=reason.reason)
    return Point(kernel, problem, seed, tuple(dict.fromkeys([*fits, *few])), misfits, tuple(few))


# ---- what is measured -----------------------------------------------------------------------------------------------

MEASURED = ("gate", "best", "behind", "measured", "measured_behind", "seconds", "tflops", "tried", "ms", "misfits")


def measure(point: Point) -> dict:
    """ms: tile -> milliseconds; behind: the chosen tile's over the least, less 1; measured: the tile that is taken when
    the few are timed, and how far behind that is by `ms`; misfits: tile -> why it cannot run."""
    row = dict.fromkeys(MEASURED) | {"misfits": dict(point.misfits)}
    if point.infeasible:
        return row
    device, given = target.device(), tensors(point)
    try:
        times, misfits = time_tiles(point.problem, point.variant, point.tiles, device, given, point.seed)
        few, _ = time_tiles(point.problem, point.variant, point.few, device, given, point.seed)
    except Ungated as why:
        return row | {"gate": f"failed: {why}"}
    torch.cuda.empty_cache()
    ms = {tile: time.ms for tile, time in times.items()}
    row["misfits"] |= {str(tile): reason for tile, reason in misfits.items()}
    row |= {"gate": "passed", "tried": len(ms)}
    if not ms:
        return row | {"infeasible": "no tile runs"}
    best, measured = min(ms, key=ms.get), least(few) if few else None
    row |= {"best": str(best), "ms": {str(tile): t for tile, t in ms.items()}, "seconds": ms[best] * 1e-3}
    row["tflops"] = point.problem.flops(point.variant.direction) / ms[best] * 1e-9
    row["behind"] = ms[point.chosen] / ms[best] - 1 if point.chosen in ms else None
    return row | ({"measured": str(measured), "measured_behind": ms[measured] / ms[best] - 1} if measured else {})


def tensors(point: Point) -> list[torch.Tensor]:
    """What a launch takes after the problem; O and LSE are the oracle's."""
    p, x = point.problem, inputs.make("gauss", point.problem, point.seed)
    O, LSE = reference.forward(p, x.q, x.k, x.v)
    seen = torch.ones((), dtype=torch.bool, device=x.q.device).expand(p.B, p.H, 1, 1)
    gradients = [x.dO, *(torch.empty_like(y) for y in (x.q, x.k, x.v))] if point.variant.direction == "bwd" else []
    return [x.q, x.k, x.v, seen, O.to(x.q.dtype), LSE.float(), *gradients]


# ---- what the rows say ----------------------------------------------------------------------------------------------


def judged(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["gate"] == "passed" and row["behind"] is not None]


def near(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["behind"] <= NEAR]


def untuned(row: dict) -> bool:
    return (row["d"], row["causal"], row["B"] * row["H"], row["N"]) in SHAPES[row["direction"]]


def shape(row: dict) -> str:
    heads = row["B"] * row["H"]
    return f"d={row['d']} {'causal' if row['causal'] else 'full'}, N={row['N']}, {heads} heads"


def answer(rows: list[dict]) -> str:
    lines = [line for name in dict.fromkeys(row["variant"] for row in rows) if (line := on(rows, name))]
    if missing := [row for row in rows if row["gate"] == "passed" and row["behind"] is None]:
        lines.append(f"{missing[0]['variant']}, {shape(missing[0])}: the chooser's tile did not run.")
    return "\n".join(["How far from the best is the tile that choose_tile takes?", *(f"  {line}" for line in lines)])


def on(rows: list[dict], name: str) -> str | None:
    ours = judged([row for row in rows if row["variant"] == name])
    if not ours:
        return None
    worst, mean = max(ours, key=lambda row: row["behind"]), sum(row["behind"] for row in ours) / len(ours)
    text = f"{name}: within {NEAR:.0%} of the best of all tiles at {len(near(ours))} of {len(ours)} shapes, {mean:.1%} "
    text += "slower in the mean"
    if worst["behind"]:
        text += f"; furthest at {shape(worst)}: {worst['Br']}x{worst['Bc']} is {worst['behind']:.1%} slower than "
        text += worst["best"]
    if all(row.get("measured") for row in ours):
        timed = sum(row["measured_behind"] <= NEAR for row in ours)
        text += f"; timed once, the best of the few that it ranks first: at {timed} of {len(ours)}"
    return text + "."


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def table(rows: list[dict]) -> str:
    columns = [
        ("variant", lambda row: row["variant"]),
        ("d", lambda row: row["d"]),
        ("mask", lambda row: "causal" if row["causal"] else "none"),
        ("N", lambda row: row["N"]),
        ("B·H", lambda row: row["B"] * row["H"]),
        ("tiles\nrun", lambda row: row["tried"]),
        ("chosen", lambda row: row["Br"] and f"{row['Br']}x{row['Bc']}"),
        ("best", lambda row: row["best"]),
        ("slower\nby", lambda row: percent(row["behind"])),
        ("measured", lambda row: row.get("measured")),
        ("slower\nby", lambda row: percent(row.get("measured_behind"))),
        ("best's\nTFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:.0f}"),
        ("gate", lambda row: row["gate"]),
        ("cannot run", lambda row: row["infeasible"]),
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """A bar for each shape: by how much the chosen tile is slower than the best; the line that it is to stay below.
    Shapes that the chooser may have been tuned on since they were measured, only where there are no others."""
    ours = judged(rows)
    ours = [row for row in ours if untuned(row)] or ours
    where = f"{rows[-1]['device']} · {rows[-1]['dtype']} · Gaussian input · {picture.revision(ours or rows[-1:])}"
    if not ours:
        return picture.page("Nothing to compare: no tile ran and passed the gate", where, (12, 1.2))
    names = list(dict.fromkeys(row["variant"] for row in ours))
    title = f"The chooser's tile is within {NEAR:.0%} of the best\nat {len(near(ours))} of {len(ours)} shapes"
    if all(map(untuned, ours)):
        title += " that it was not tuned on"
    height = 1.9 + 0.27 * (len(ours) + 1.5 * len(names))
    figure, widest = picture.page(title, where, (11, height)), max(0.05, *(row["behind"] for row in ours))
    axes = figure.add_axes((2.9 / 11, 0.55 / height, 5.2 / 11, 1 - 1.7 / height))
    y, ticks, over = 0.0, [], {"facecolor": "white", "edgecolor": "none", "pad": 0}  # of the dashed line
    for name in names:
        axes.text(0, y, f" {name}", va="center", fontweight="bold", fontsize=11, bbox=over)
        for row in (row for row in ours if row["variant"] == name):
            y += 1
            color = picture.BLUE if row["behind"] <= NEAR else picture.VERMILION
            axes.barh(y, 100 * row["behind"], 0.66, color=color)
            if row.get("measured"):
                axes.plot(100 * row["measured_behind"], y, "o", color=picture.INK, markersize=4, zorder=3)
            words = f"  {row['behind']:.1%}  {row['Br']}x{row['Bc']}"
            words += f", best {row['best']}" if row["behind"] else ", the best"
            axes.text(100 * row["behind"], y, words, va="center", fontsize=9.5, bbox=over, zorder=2)
            ticks.append((y, shape(row)))
        y += 1.5
    axes.axvline(100 * NEAR, color=picture.GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.set(xlim=(0, 100 * widest * 1.05), ylim=(y - 0.9, -0.7))
    axes.set_yticks([at for at, _ in ticks], [words for _, words in ticks], color=picture.INK, fontsize=9.5)
    axes.tick_params(length=0)
    dots = '; dots: attention(tile="measured")' if any(row.get("measured") for row in ours) else ""
    axes.set_xlabel(f"slower than the best of all tiles, %; dashed: the bar{dots}")
    return figure


EXPERIMENT = Experiment(
    name="tile_choice",
    question="How far from the best is the tile that choose_tile takes, on shapes that it was not tuned on?",
    fixed="input, shape, kernel",
    factor="the tile: the chosen one, and every other one that fits",
    varies=("variant", "direction", "B", "H", "N", "d", "causal"),
    options=(
        click.option("--variant", multiple=True, help=f"One or several; {', '.join(VARIANTS)}."),
        common.integers("--seqlen", help="N; with any of these four, all their pairs instead of the usual shapes."),
        common.integers("--head-dim", help="d, one or several; else 80,112."),
        common.integers("--heads", help="H, one or several; else 4,24,132."),
        click.option("--mask", type=click.Choice(["none", "causal", "both"]), help="Else both."),
        click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="bf16", show_default=True),
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
