"""What does it cost that the warps of a block share rows (split-K) instead of keys (split-Q)?

Two ways to divide S = Q Kᵀ, P̃ V between the W warps of a block.  [FA2, 2307.08691, section 3.3, Figure 3]

    split-K  v1's: each warp has all rows and 1/W of the keys.  Maxima and parts of P̃ V meet in shared memory at every
             step: each warp writes its part of O, all wait, each adds up the W parts of some columns
    split-Q  v2's: each warp has 1/W of the rows and all keys.  No warp waits for what another has computed

fwd_v2_mma_split_k against fwd_v2_mma is that alone: the same tile, as many warps, copies, masks, softmax.  Each is also
timed with the best of a few tiles.  Beside them v1 as a whole on the same instructions, fwd_v1_mma: it has one block a
head, so that a grid of few heads alone may decide; hence the shapes of 132 heads and more, one a multiprocessor.

What passes through shared memory is counted on the simulator, in bytes, per score: a pair of row and key of the mask.
Lanes that ask for the same number, as the four of a row do for its maximum, are counted each.

What the rows say is in warp_answer.py, the picture in warp_picture.py.
"""

from __future__ import annotations

from contextlib import nullcontext

import click

from sandbox import catalog, target
from sandbox.choose import choose_tile
from sandbox.device import simulator
from sandbox.kernels import fwd_v1_mma, fwd_v2_mma, fwd_v2_mma_split_k
from sandbox.mask import Mask
from sandbox.measure import formulas
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile

from . import common
from .common import Experiment
from .warp_answer import SPLIT_K, SPLIT_Q, V1, answer, claims, table
from .warp_picture import draw

__all__ = ["EXPERIMENT", "claims"]  # what experiments/claims.py looks for

VARIANTS = {SPLIT_Q: "fwd_v2_mma", SPLIT_K: "fwd_v2_mma_split_k", V1: "fwd_v1_mma"}
ARRAYS = {"sQ": "Q", "sK": "K", "sV": "V", "sX": "O"}  # of shared memory; sX: parts of O; others: numbers of rows
MOVED = ("Q", "K", "V", "O", "rows")

TOKENS, HIDDEN = 16_384, 2048  # of FA2's grid: batch = TOKENS / N, heads = HIDDEN / d  [section 4.1]
FILLED = 2048, 256  # N, and B·H: more blocks than multiprocessors even with one a head

# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, seqlen, head_dim, batch, heads, mask, dtype, seed):
    head_dims = head_dim or (64, 128)
    masks = [causal for causal in (False, True) if mask in ("both", "causal" if causal else "none")]
    points = []
    for d in head_dims:
        for causal in masks:
            for N, B, H in shapes(device, d, seqlen, batch, heads):
                problem = Problem(B, H, H, N, N, d, dtype, mask=Mask(causal))
                points += [
                    common.point(
                        catalog.find(name), problem, tile, device, input="gauss", seed=seed, count_bytes=False,
                        notes={"kernel": kernel, "warps": warps(name, problem, tile, device), "sms": device.sms},
                    )
                    for kernel, name, tile in candidates(problem, device)
                ]  # fmt: skip
    if all(point.infeasible for point in points):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def shapes(device: Device, d: int, seqlen, batch, heads) -> list[tuple[int, int, int]]:
    """(N, B, H)."""
    if device.simulated:
        return [(N, batch or 1, heads or 1) for N in seqlen or (128,)]
    H = heads or max(1, HIDDEN // d)
    found = [(N, batch or max(1, TOKENS // N), H) for N in seqlen or (1024, 4096, 16_384)]
    if not (seqlen or batch or heads):
        found.append((FILLED[0], FILLED[1] // H, H))
    return sorted(set(found))


def candidates(problem: Problem, device: Device) -> list[tuple[str, str, Tile]]:
    """(kernel, variant, tile); the first of split-Q and of split-K have one tile and as many warps.

    On a GPU each has others to be at its best: more keys a step, or less shared memory, for more blocks at a time.
    """
    q, k, v1 = VARIANTS.values()
    tile = Tile(64 if problem.d <= 128 else 32, 64)
    longer = Tile(tile.Br, 128)
    found = [(SPLIT_Q, f"{q} rows=16", tile), (SPLIT_K, k, tile)]
    if device.simulated:
        return [*found, (V1, v1, tile)]
    found += [
        (SPLIT_Q, q, usual(fwd_v2_mma.VARIANT, problem, device) or tile),
        (SPLIT_K, f"{k} rows=16", tile),
        (SPLIT_K, k, longer),
    ]
    best = usual(fwd_v1_mma.VARIANT, problem, device) or tile
    return found + [(V1, f"{v1} rows=16", tile), (V1, f"{v1} stages=1 rows=16", tile), (V1, v1, best)]


def usual(kernel, problem: Problem, device: Device) -> Tile | None:
    try:
        return choose_tile(problem, device, kernel)
    except Infeasible:
        return None


def warps(name: str, problem: Problem, tile: Tile, device: Device) -> int:
    """That a block has."""
    kernel, *words = name.split(" ")
    if kernel == VARIANTS[SPLIT_Q]:
        turned = catalog.switches_of(words, fwd_v2_mma.Switches)
        return fwd_v2_mma.chosen(problem, tile, device, **turned).warps(tile.Br)
    return (fwd_v1_mma if kernel == VARIANTS[V1] else fwd_v2_mma_split_k).warps_of(problem.d, tile.Bc)


def measure(point: common.Point) -> dict:
    """As `common.measure`; simulated, with the bytes that pass through shared memory, by array."""
    simulated = target.device().simulated
    with simulator.counting() if simulated else nullcontext() as counted:
        row = common.measure(point)
    if formula := formulas.traffic(VARIANTS[point.notes["kernel"]], point.problem, point.tile):  # switches or not
        row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
    row |= dict.fromkeys(["shared_read_bytes", "shared_write_bytes", *(f"shared_{array}" for array in MOVED)])
    return row | shared_bytes(counted) if simulated and not point.infeasible else row


def shared_bytes(counted) -> dict:
    found = {"shared_read_bytes": 0, "shared_write_bytes": 0, **{f"shared_{array}": 0 for array in MOVED}}
    for way, counts in (("read", counted.shared_reads), ("write", counted.shared_writes)):
        for name, elements in counts.items():
            array = ARRAYS.get(name, "rows")
            size = elements * (2 if array in ("Q", "K", "V") else 4)
            found[f"shared_{way}_bytes"] += size
            found[f"shared_{array}"] += size
    return found


EXPERIMENT = Experiment(
    name="warp_partition",
    question="What does it cost that the warps of a block share rows (split-K) instead of keys (split-Q)?",
    fixed="input, shape, dtype; tile and warps a block, where split-Q and split-K are compared alike",
    factor="what the warps of a block divide: the keys (v1), or the rows (v2); beside them all of v1",
    varies=("kernel", "warps", "variant", "loop_order", "B", "H", "N", "d", "causal", "Br", "Bc"),
    options=(
        common.integers("--seqlen", help="N, one or several; 128 simulated, else 1k, 4k, 16k."),
        common.integers("--head-dim", help="d, one or several, multiples of 32; 64 and 128."),
        click.option("--batch", type=common.SIZE, help="B; 1 simulated, else 16k tokens."),
        click.option("--heads", type=common.SIZE, help="H; 1 simulated, else 2048 / d."),
        click.option("--mask", type=click.Choice(["both", "none", "causal"]), default="both", show_default=True),
        click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="bf16", show_default=True),
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
)
