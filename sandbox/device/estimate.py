"""About how long a tile takes: what kernels on the tensor cores compare to choose the tile they usually take.

A block keeps its rows (of Q forward, of K and V backward) and walks along the others, step by step.  In a step a warp
is busy for some clocks, which the warps that share its quarter of a multiprocessor add up, and waits for others, which
they hide; all copies of a multiprocessor pass its one port to L1, a line of 128 bytes at a time.  The more a block
keeps, the less often the others are read; the less, the more blocks there are to fill the multiprocessors with, and
evenly.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from ..problem import Problem
from ..variant import Device, Tile

WAVES = 8  # of blocks, the last of a grid, that are followed one by one
AS_GOOD = 0.01  # of the least time: what estimates cannot tell apart
TOGETHER = 0.22  # of what a warp is busy: how much later a block's barrier is for each other warp in the same quarter


@dataclass(frozen=True)
class Pace:
    """Of a tile; in clocks.

    warps   of a block; blocks: that a multiprocessor has room for
    busy    that a warp is in a step; waits: that it waits in it, where nothing else is there to do
    edges   of a block: before its first step and after its last
    copies  that a block's copies of a step keep the port busy
    grid    of a launch, beside its blocks
    """

    warps: int
    blocks: int
    busy: float
    waits: float
    edges: float
    copies: float = 0
    grid: float = 0

    def step(self, blocks: int) -> float:
        """Clocks of a step, where so many blocks share a multiprocessor."""
        quarter, own = -(-blocks * self.warps // 4), -(-self.warps // 4)  # warps
        alone = self.busy * (1 + TOGETHER * (own - 1)) + self.waits
        return math.hypot(self.busy * quarter, self.copies * blocks, alone)

    def clocks(self, steps: np.ndarray, heads: int, section: int, device: Device) -> float:
        """Of a grid whose blocks have so many steps in each head; so many heads a section, its longest blocks first."""
        blocks, steps = heads * len(steps), np.sort(steps)[::-1]
        if blocks == 0:
            return 0.0
        together = max(1, min(self.blocks, -(-blocks // device.sms)))
        if blocks <= device.sms * together:
            return self.grid + self.at_once(np.repeat(steps, heads), together, device) + self.edges
        begun, left = self.in_turn(steps, heads, max(1, min(section, heads)), together, device)
        # Blocks that share a multiprocessor tend to end together, and the last then come together where they were, not
        # one a multiprocessor: half way between
        shared, apart = np.sort(left.reshape(-1, together))[:, ::-1].T.ravel(), np.sort(left)[::-1]
        last = self.at_once(shared, together, device) + self.at_once(apart, together, device)
        return self.grid + begun + last / 2

    def even(self, steps: np.ndarray, heads: int, device: Device) -> float:
        """Of such a grid at the least: all multiprocessors are full until all end at once."""
        together = max(1, min(self.blocks, -(-heads * len(steps) // device.sms)))
        clocks = float((steps * self.step(together) + self.edges).sum())
        return self.grid + heads * clocks / (device.sms * together)

    def in_turn(self, steps: np.ndarray, heads: int, section: int, together: int, device: Device):
        """When the last block begins, and the steps that are left then in each place, where an edge counts as steps.
        Each block takes the place that is the first to be free; place j is of multiprocessor j // together."""
        slots, step = device.sms * together, self.step(together)
        cost, blocks = np.rint(steps * step + self.edges).astype(np.int64), heads * len(steps)
        waves = WAVES if cost[0] > cost[-1] else 1  # equal ones come wave by wave
        followed = blocks - max(0, blocks // slots - waves) * slots
        sections = min(heads // section, -(-followed // (section * len(cost))))
        clocks = np.concatenate([np.tile(np.repeat(cost, section), sections), np.repeat(cost, heads % section)])
        clocks = clocks[-followed:]
        first = clocks[:slots].reshape(together, -1).T.ravel()  # one a multiprocessor, then a second each
        places, last = (first * slots + np.arange(slots)).tolist(), 0  # when free · slots + j
        heapq.heapify(places)
        for clock in (clocks[slots:] * slots).tolist():
            last = places[0]
            heapq.heapreplace(places, last + clock)
        when, j = np.divmod(places, slots)
        begun = last // slots
        return (heads * cost.sum() - clocks.sum()) / slots + begun, np.maximum(0, when[np.argsort(j)] - begun) / step

    def at_once(self, steps: np.ndarray, together: int, device: Device) -> float:
        """Clocks of the busiest multiprocessor, where all blocks have room: each gets one, then each a second, and so
        on, and those that stay longer have it to themselves."""
        shares = np.zeros((together + 1) * device.sms)
        shares[: len(steps)] = steps
        left = -np.diff(shares.reshape(-1, device.sms), axis=0)  # steps that one, two, ... blocks make together
        return float(max(left.T @ [self.step(n + 1) for n in range(together)]))


def nearest(
    steps: dict[Tile, np.ndarray], paces: dict[Tile, Pace], heads: int, section: int, device: Device, most: int
) -> list[Tile]:
    """The tiles of the least estimated time, in order, so many at most; but of those that an estimate cannot tell from
    the first, the largest comes first.

    steps: of a head's blocks.
    """
    clocks, enough = {}, math.inf  # the time of the last that is asked for, so far
    bounds = {tile: pace.even(steps[tile], heads, device) for tile, pace in paces.items()}
    for tile in sorted(paces, key=bounds.get):
        if bounds[tile] > enough * (1 + AS_GOOD):
            break
        clocks[tile] = paces[tile].clocks(steps[tile], heads, section, device)
        enough = min([math.inf, *sorted(clocks.values())[most - 1 :]])
    as_good = min(clocks.values()) * (1 + AS_GOOD)
    first = max((tile for tile in clocks if clocks[tile] <= as_good), key=lambda t: (t.Br * t.Bc, t))
    return sorted(clocks, key=lambda tile: (tile != first, clocks[tile], tile))[:most]


def steps_along_keys(p: Problem, tile: Tile, first: int = 0) -> np.ndarray:
    """Of each row block of a head: the key blocks that it touches.  first: row of the first, 0 or below."""
    (lo, hi), i0 = p.mask.band(p.N_q, p.N_k), np.arange(first, p.N_q, tile.Br)
    end = np.minimum(p.N_k, np.minimum(i0 + tile.Br, p.N_q) + hi)
    return np.maximum(0, -(-end // tile.Bc) - np.maximum(0, np.maximum(0, i0) + lo) // tile.Bc)


def steps_along_rows(p: Problem, tile: Tile) -> np.ndarray:
    """Of each key block of a key/value head: the row blocks that it touches, in all query heads that share it."""
    (lo, hi), j0 = p.mask.band(p.N_q, p.N_k), np.arange(0, p.N_k, tile.Bc)
    end = np.minimum(p.N_q, np.minimum(j0 + tile.Bc, p.N_k) - lo)
    return p.group * np.maximum(0, -(-end // tile.Br) - np.maximum(0, j0 - hi) // tile.Br)


def registers(warps: int, blocks: int) -> int:
    """That a thread may have where so many blocks of so many warps are to share a multiprocessor: a quarter of it has
    16,384, handed out eight a thread."""
    return min(255, 16_384 // (32 * -(-warps * blocks // 4)) // 8 * 8)


def lines(rows: int, columns: int, warps: int) -> int:
    """That the warps' copies of [rows, columns] ask for, where as many lanes as can share a row's lines of 128 bytes:
    with d = 112 they are two, and each line is asked for in four pieces."""
    chunks = columns // 8  # of 16 bytes
    return rows * chunks // math.gcd(chunks, 8, 4 * warps)
