"""choose_tile: which tile a kernel takes on a device.  (The source article's "dynamic tiling".)

A block owns some rows (of Q forward, of K and V backward) and walks along the others.  The more it owns, the less
often the others are read; the less, the more blocks there are to fill the device.  The chooser takes the tile of the
least estimated time: waves of blocks x steps of a block x work of a step, where every step has a fixed share of work
(barriers, addresses, the softmax's reductions) that small tiles pay more often.  Kernels on the tensor cores have an
estimate of their own (device/estimate.py), or a table of what sweeps found.

candidates: the few tiles among which a measurement may choose better (measure/fastest.py).
"""

from __future__ import annotations

import functools

from .problem import Problem
from .variant import Device, Infeasible, Tile, Variant

SIMULATED = Tile(16, 16)
MEASURED = "measured"  # in the place of a tile: the fastest of the candidates, by the clock
FEW = 4  # of the tiles that an estimate ranks: the best of them is near the best of all (tests/test_tile_choice.py)


@functools.lru_cache(4096)
def choose_tile(problem: Problem, device: Device, variant: Variant) -> Tile:
    """The tile for this problem.  Raises Infeasible where none fits."""
    if variant.usual is not None:
        return variant.usual(problem, device)
    return candidates(problem, device, variant, 1)[0]


def candidates(problem: Problem, device: Device, variant: Variant, most: int = FEW) -> list[Tile]:
    """choose_tile's tile, and then the next by the same estimate, or neighbours of the first; where it is from a table,
    every other one that fits.  Raises Infeasible where none fits."""
    if variant.nearest is not None:
        return variant.nearest(problem, device, most)
    if variant.usual is not None:
        tiles = [variant.usual(problem, device), *_fitting(problem.kind, device, variant)]
        return list(dict.fromkeys(tiles))
    if device.simulated:
        return [SIMULATED]
    return _ranked(problem.kind, problem.B * problem.H, problem.N_q, problem.N_k, device, variant)[:most]


@functools.cache
def _ranked(kind: Problem, heads: int, N_q: int, N_k: int, device: Device, variant: Variant) -> list[Tile]:
    fits = _fitting(kind, device, variant)
    return sorted(fits, key=lambda tile: (_time(tile, heads, N_q, N_k, device, variant), tile))


def _fitting(kind: Problem, device: Device, variant: Variant) -> list[Tile]:
    fits, reasons = [], []
    for tile in variant.space(kind, device):
        (reasons if isinstance(tile, Infeasible) else fits).append(tile)
    if not fits:
        raise reasons[0]
    return fits


def _time(tile: Tile, heads: int, N_q: int, N_k: int, device: Device, variant: Variant) -> float:
    """Estimated time on the busiest multiprocessor, in multiply-adds a head column."""
    Tr, Tc = -(-N_q // tile.Br), -(-N_k // tile.Bc)
    owned, walked = (tile.Br, tile.Bc) if variant.loop_order == "q_outer" else (tile.Bc, tile.Br)
    if variant.one_block_a_head:
        blocks, steps = heads, Tr * Tc
    else:
        blocks, steps = (heads * Tr, Tc) if variant.loop_order == "q_outer" else (heads * Tc, Tr)
    alone = ALONE if tile.Br * tile.Bc > ALONE_FROM and blocks > device.sms else 1.0
    return -(-blocks // device.sms) * steps * (owned + OWNED) * (walked + WALKED) * alone


# Fitted to a sweep of 16 tiles x 35 shapes on an H200 (fwd_v1, fwd_v2, bwd_v2; d 64, 128; 1-132 heads; N 512-16k):
# the choice was the best tile at each.  What tile_size measured beside it: results/nvidia-h200.
OWNED, WALKED = 22, 12
ALONE, ALONE_FROM = 1.15, 8192  # pairs from which a tile leaves no room for a second block on its multiprocessor
