"""Why did FlashAttention swap its loops?

fwd_v1 to fwd_v2 changes four things at once: loop, grid, normalisation and skipping.  Two controls take them apart:

    fwd_v2_kv_outer  ->  fwd_v2_one_block    the order of the loops, and nothing else
    fwd_v2_one_block ->  fwd_v2              the grid, and nothing else: one block a head, or one a row block too

On the tensor cores the warps' share changes as well, and one control takes that apart, alone:

    fwd_v1_mma         -> fwd_v2_mma_split_k  loop, grid, normalisation and skipping
    fwd_v2_mma_split_k -> fwd_v2_mma          the warps: they share keys instead of rows
"""

from __future__ import annotations

import click
import torch

from sandbox import catalog
from sandbox.mask import Mask
from sandbox.measure import formulas, standard, timing
from sandbox.problem import Problem
from sandbox.variant import Device, Tile

from . import common, inputs, tables, units
from .common import Experiment
from .loop_answer import ON, answer, claims  # noqa: F401  (claims: for the claims' table)
from .loop_picture import draw
from .tables import count
from .units import FMA

# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, input, seqlen, head_dim, br, bc, batch, heads, causal, seed, dtype, counters, unit=None):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    unit, dtype = units.settle(unit, dtype)
    d = head_dim or (32 if real else 64 if unit == FMA else 128)
    size = 64 if not device.simulated and (unit == FMA or d in (32, 64, 128)) else 32  # split-K has no room for 64
    tile = Tile(br or size, bc or (32 if device.simulated else 64))
    simulated = (64, 128, 192) if unit == FMA else (32, 64, 96)
    seqlen = seqlen or (simulated if device.simulated else (512,) if real else (1024, 2048, 4096, 8192, 16384))
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    points = []
    for N in seqlen:
        problem = Problem(batch, heads, heads, N, N, d, dtype, mask=Mask(causal))
        inputs.check(input, problem)
        common_fields = dict(input=input, seed=seed, count_bytes=counters)
        if not device.simulated:
            points += [
                common.Point(standard.NAME, direction, None, problem, tile, **common_fields)
                for direction in ("fwd", "bwd")
            ]
        for name in (*ON[unit].forward, *ON[unit].backward):
            points.append(common.point(catalog.find(name), problem, tile, device, **common_fields))
    misfits = [point.infeasible for point in points if point.variant != standard.NAME]
    if all(misfits):
        raise ValueError(f"tile {tile} fits no variant: {misfits[0]}")
    return points


def measure(point: common.Point) -> dict:
    """Standard attention is timed as torch runs it; it is a yardstick, so it passes no gate."""
    if point.variant != standard.NAME:
        return common.measure(point)
    row = common.empty_row()
    floor = formulas.standard(point.problem, point.direction)
    row |= {"formula_reads_total": floor.total_reads, "formula_writes_total": floor.total_writes}
    try:
        x = inputs.make(point.input, point.problem, point.seed)
        row |= common.timed(timing.time_launch(standard.launcher(point.problem, x, point.direction)), point)
    except common.OutOfMemory:
        row |= {"infeasible": "S and P do not fit in the GPU's memory"}
    x = None
    torch.cuda.empty_cache()  # what S and P took is many times what any kernel takes
    return row


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    return "\n\n".join(
        tables.table([row for row in rows if row["direction"] == direction], _columns(direction))
        for direction in ("fwd", "bwd")
        if any(row["direction"] == direction for row in rows)
    )


def _columns(direction: str):
    reads = {"fwd": ("Q", "K V", "O", "l m"), "bwd": ("Q", "K V", "O", "dO", "dQ", "LSE L D")}[direction]
    writes = {"fwd": ("O", "l m LSE"), "bwd": ("dQ", "dK dV", "L D")}[direction]
    return [
        ("variant", lambda row: row["variant"]),
        ("loop", lambda row: row["loop_order"]),
        ("N", lambda row: row["N"]),
        *((f"reads\n{group}", _sum("reads", group)) for group in reads),
        *((f"writes\n{group}", _sum("writes", group)) for group in writes),
        *tables.OUTCOME,
    ]


def _sum(way: str, group: str):
    def cell(row):
        counts = [row.get(f"{way}_{array}", 0) for array in group.split()]  # a field that older rows lack
        return None if None in counts else count(sum(counts))

    return cell


EXPERIMENT = Experiment(
    name="loop_order",
    question="Why did FlashAttention swap its loops?",
    fixed="input, shape, tile; each control differs from its neighbour in one thing, on the tensor cores the last one",
    factor="which loop is outside (fwd_v2_kv_outer, fwd_v2_one_block), then the grid (fwd_v2) or warps (fwd_v2_mma)",
    varies=("variant", "direction", "N"),
    options=(
        common.INPUT,
        common.integers("--seqlen", help="N, one or several; few simulated, else 1k to 16k."),
        click.option("--head-dim", type=common.SIZE, help="d; 32 for minilm, else 64, or 128 on the tensor cores."),
        click.option("--br", type=common.SIZE, help="Br, rows of a tile; 32 simulated, else 64."),
        click.option("--bc", type=common.SIZE, help="Bc, keys of a tile; 32 simulated, else 64."),
        common.BATCH,
        click.option("--heads", type=common.SIZE, help="H; 1 simulated, else 32."),
        common.CAUSAL,
        common.SEED,
        units.UNIT,
        units.DTYPE,
        common.COUNTERS,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    part=common.unit_of,
)
