"""How large should a tile be?

Traffic falls as 1/(the block that stays on chip), FA1's Theorem 2: N^2 d^2 / M.  Br is that block where Q is outside,
Bc where K/V is.  Larger is better until shared memory ends, or until too few blocks are left to fill the GPU: that is
why the fastest tile need not be the largest, and what choose_tile has to guess.
"""

from __future__ import annotations

import click

from sandbox import catalog
from sandbox.choose import choose_tile
from sandbox.mask import Mask
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile

from . import common, inputs, tables, units
from .common import Experiment
from .tables import count, total
from .tile_answer import answer, claims, over_theorem  # noqa: F401  (claims: for the claims' table)
from .tile_maps import draw
from .units import FMA, TENSOR

VARIANTS = {FMA: ("fwd_v1", "fwd_v2", "bwd_v1", "bwd_v2"), TENSOR: ("fwd_v1_mma", "fwd_v2_mma", "bwd_v2_mma")}
SMALL = 1024  # pairs in a tile: as large as tiles of the tensor-core kernels are where simulated


# ---- the points -----------------------------------------------------------------------------------------------------


def plan(
    device: Device, input, variant, seqlen, head_dim, br, bc, batch, heads, causal, seed, dtype, counters, unit=None
):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    unit, dtype = units.settle(unit, dtype, variant)
    N = seqlen or (64 if device.simulated else 512 if real else 4096)
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    d = head_dim or (32 if real else 64 if unit == FMA else 128)
    problem = Problem(batch, heads, heads, N, N, d, dtype, mask=Mask(causal))
    inputs.check(input, problem)
    points = []
    for name in dict.fromkeys(variant or VARIANTS[unit]):
        kernel = catalog.find(name)
        if kernel.direction == "softmax":
            raise ValueError(f"--variant {name}: it has no tile")
        chosen = choice(problem, device, kernel)
        for tile in dict.fromkeys([*grid(kernel, device, br, bc), chosen]):
            if tile:
                notes = {"chosen": tile == chosen}
                fields = dict(input=input, seed=seed, count_bytes=counters, notes=notes)
                points.append(common.point(kernel, problem, tile, device, **fields))
    if all(point.infeasible for point in points if not point.notes["chosen"]):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def choice(problem: Problem, device: Device, kernel) -> Tile | None:
    """What choose_tile takes; None where the kernel cannot do this problem, which its rows say."""
    try:
        return choose_tile(problem, device, kernel)
    except Infeasible:
        return None


def grid(kernel, device: Device, br, bc) -> list[Tile]:
    """A kernel's own tiles, or Br x Bc of the sizes asked for and else of the usual ones."""
    own = [tile for tile in kernel.tiles if not device.simulated or tile.Br * tile.Bc <= SMALL]
    if own and not (br or bc):
        return own
    sizes = (8, 16, 32) if device.simulated else (16, 32, 64, 128)
    rows, keys = ({getattr(tile, side): None for tile in own} or sizes for side in ("Br", "Bc"))
    return [Tile(Br, Bc) for Br in br or rows for Bc in bc or keys]


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = [
        ("variant", lambda row: row["variant"]),
        ("Br", lambda row: row["Br"]),
        ("Bc", lambda row: row["Bc"]),
        ("", lambda row: "chosen" if row["chosen"] else ""),
        ("reads", lambda row: count(row["reads_total"])),
        ("writes", lambda row: count(row["writes_total"])),
        ("÷ N²d²/M", lambda row: None if total(row) is None else f"{over_theorem(row):.1f}"),
        *tables.OUTCOME,
    ]
    return tables.table(rows, columns)


EXPERIMENT = Experiment(
    name="tile_size",
    question="How large should a tile be?",
    fixed="input, shape, variant",
    factor="the tile Br x Bc, under the limit of shared memory",
    varies=("variant", "direction", "Br", "Bc"),
    options=(
        common.INPUT,
        click.option("--variant", multiple=True, help="One or several, instead of those of --unit."),
        click.option("--seqlen", type=common.SIZE, help="N; 64 simulated, else 4096."),
        click.option("--head-dim", type=common.SIZE, help="d; 32 for minilm, else 64, or 128 on the tensor cores."),
        common.integers("--br", help="Br, one or several; else the kernel's own, or 16 to 128 (8,16,32 simulated)."),
        common.integers("--bc", help="Bc, likewise."),
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
    part=common.unit_of,
)
