"""choose_tile: which tile a kernel takes on a device.  (The source article's "dynamic tiling".)

Large tiles read K and V less often (reads fall as 1/Br); small ones leave the grid wide enough to fill the device.
The chooser takes the tile with the least estimated time: waves of blocks x work of a block, where a block's work has
a fixed share a step (barriers, the softmax's reductions) that small tiles pay more often.
"""

from __future__ import annotations

import functools

from .problem import Problem
from .variant import Device, Infeasible, Tile, Variant

SIMULATED = Tile(16, 16)


def choose_tile(problem: Problem, device: Device, variant: Variant) -> Tile:
    """The tile for this problem.  Raises Infeasible where none fits."""
    if device.simulated:
        return SIMULATED
    return _choose(problem.kind, problem.B * problem.H, problem.N_q, problem.N_k, device, variant)


@functools.cache
def _choose(kind: Problem, heads: int, N_q: int, N_k: int, device: Device, variant: Variant) -> Tile:
    fits, reasons = [], []
    for tile in variant.space(kind, device):
        (reasons if isinstance(tile, Infeasible) else fits).append(tile)
    if not fits:
        raise reasons[0]
    return min(fits, key=lambda tile: (_time(tile, heads, N_q, N_k, device, variant), tile))


def _time(tile: Tile, heads: int, N_q: int, N_k: int, device: Device, variant: Variant) -> float:
    """Estimated, in multiply-adds of one block a head column: steps of the longest multiprocessor."""
    Tr, Tc = -(-N_q // tile.Br), -(-N_k // tile.Bc)
    step = (tile.Br + STEP_ROWS) * (tile.Bc + STEP_KEYS)
    if variant.default and variant.generation == "v1" or variant.name in ("fwd_v2_one_block", "fwd_v2_kv_outer"):
        blocks, steps = heads, Tr * Tc  # one block a head
    else:
        blocks, steps = (heads * Tr, Tc) if variant.direction == "fwd" else (heads * Tc, Tr)
    return -(-blocks // device.sms) * steps * step


STEP_ROWS, STEP_KEYS = 16, 24  # fitted to results/nvidia-h200/tile_size
