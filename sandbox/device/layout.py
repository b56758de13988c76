"""Layout: which warp owns what in a block that owns keys and walks along the query blocks.  [FA2, Algorithm 2]

Of `warps`, `side` share `rows` keys.  Of Sᵀ a warp has its own keys by some `queries` at a time; of dK and dV, its keys
by `columns`, wide / side; of dQ, to which all keys contribute, rows_dQ x columns_dQ, by `piece` columns at a time.
Of two `roles`, half of the warps have S and dV, the other half dP and dK (halves.py).

Tiles have `wide` columns: d, and zeros where warps could not share those evenly, or only by 16 keys a warp.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from ..problem import Problem
from ..variant import Device, Infeasible, Tile, Unsupported
from .estimate import Pace, lines, nearest, steps_along_rows
from .mma import Shared16
from .sections import heads_a_section

TILES = (
    *(Tile(Br, Bc) for Br in (16, 32) for Bc in (16, 32)),  # where a GPU is simulated, or nearly idle
    *(Tile(Br, Bc) for Br in (32, 64, 128) for Bc in (64, 128, 256)),
)
REGISTERS = 192  # of a thread, for its tiles
RESERVED = 1024  # bytes of shared memory that the system takes of each block


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one; 0 leaves it to `chosen`.

    rows     keys of a warp: 16 or 32
    side     warps that share them, of each role
    roles    of warps: 1, or 2: half of them form S and sum dV, the other half form dP and sum dK
    queries  of a warp at a time: 16 or 32
    blocks   that are to share a multiprocessor, as far as registers go
    barriers a step of one role: 1, where two of sP and sdS (and, where warps share keys, three of sQ and sdO) fit, or 2
    stagger  under no band, key blocks begin at different row blocks: else many add to the same dQ at the same time
    """

    rows: int = 0
    side: int = 0
    roles: int = 0
    queries: int = 0
    blocks: int = 0
    barriers: int = 0
    stagger: bool = True


@dataclass(frozen=True)
class Layout:
    rows: int
    side: int
    roles: int
    queries: int
    columns: int
    warps: int
    rows_dQ: int
    columns_dQ: int
    blocks: int
    barriers: int
    stagger: bool

    @property
    def stages(self) -> int:
        """Tiles of Q and of dO that are on their way or in use."""
        return 3 if self.barriers == 1 and self.side > 1 else 2

    @property
    def wide(self) -> int:
        return self.side * self.columns

    @property
    def scores(self) -> int:
        """Of a warp at a time."""
        return self.rows * self.queries

    @property
    def piece(self) -> int:
        """Columns of dQ: where there are two roles, no more than registers allow beside the code of both."""
        return 16 if self.roles == 2 and self.rows_dQ * self.columns_dQ > 1024 else self.columns_dQ

    def shared(self, problem: Problem, tile: Tile) -> Shared16:
        scores = (tile.Bc * (3 - self.barriers), tile.Br)
        P = dict(sP=scores) if self.side * self.roles > 1 else {}
        W = dict(sW=scores) if self.roles == 2 and problem.softcap > 0 else {}
        keys, rows = (tile.Bc, self.wide), (self.stages * tile.Br, self.wide)
        return Shared16(sK=keys, sV=keys, sQ=rows, sdO=rows, sdS=scores, **P, **W)

    def bytes(self, problem: Problem, tile: Tile) -> int:
        """Of shared memory, with L and D of each query in float32."""
        return self.shared(problem, tile).bytes + 2 * 4 * self.stages * tile.Br

    def registers(self, softcap: bool) -> int:
        """That a thread needs for dK and dV, or one of them, and either Sᵀ and dPᵀ (softcapped: twice as much), or one
        of them and P and dS, or dQ."""
        dKV, S, dQ = (3 - self.roles) * self.rows * self.columns, self.scores, self.rows_dQ * self.piece
        return (dKV + max((4 if softcap and self.roles == 1 else 2) * S, dQ)) // 32


def wide_of(d: int) -> int:
    """Columns that warps share evenly: sevenths, as of 112, only one warp could have, by 16 rows, which spilled."""
    return d if d <= 96 else 32 * -(-d // 32) if d <= 192 else 256


def layouts(d: int, tile: Tile, s: Switches):
    """Those that share a tile evenly.  The first reads least from shared memory."""
    wide = wide_of(d)
    choices = product((32, 16), range(1, wide // 16 + 1), (32, 16), (32, 16), (1, 2))
    for rows, side, queries, rows_dQ, barriers in choices:
        warps, now = tile.Bc // rows * side * s.roles, (rows, side, queries, barriers)
        if any(wanted not in (0, value) for wanted, value in zip((s.rows, s.side, s.queries, s.barriers), now)):
            continue
        if s.roles == 2 and (barriers == 1 or wide > d):  # it has barriers of its own, and copies no zeros
            continue
        if tile.Bc % rows or tile.Br % (side * queries) or wide % (16 * side):
            continue
        if tile.Br % rows_dQ or warps * rows_dQ % tile.Br or wide % (16 * (across := warps * rows_dQ // tile.Br)):
            continue
        blocks = s.blocks or max(1, 8 // warps)
        shares = rows, side, s.roles, queries, wide // side, warps, rows_dQ, wide // across
        a = Layout(*shares, blocks, barriers, s.stagger)
        if a.columns_dQ // a.piece not in (2, 3):  # of so few NVVM unrolls the loop, which takes too many registers
            yield a


def chosen(problem: Problem, tile: Tile, device: Device, **turned) -> Layout | None:
    """The layout that is used: of one role; of two for wide heads, where a warp has more scores then, which takes less
    reading for each."""
    s, two = Switches(**turned), None
    one = _first(problem, tile, device, replace(s, roles=1)) if s.roles != 2 else None
    if s.roles == 2 or s.roles == 0 and one and problem.d > 128:
        two = _first(problem, tile, device, replace(s, roles=2, queries=s.queries or 32))
    if one and two and (one.scores >= two.scores or two.bytes(problem, tile) > room(device, two)):
        return one
    return two or one


def _first(problem: Problem, tile: Tile, device: Device, s: Switches) -> Layout | None:
    """The first whose tiles fit in registers, with as many blocks, and as few barriers, as shared memory allows."""
    found = [
        a for a in layouts(problem.d, tile, s) if a.registers(problem.softcap > 0) <= REGISTERS and a.warps <= 8
    ]  # fmt: skip
    if not found:
        return None
    alike = [a for a in found if replace(a, barriers=found[0].barriers) == found[0]]
    most = [found[0].blocks] if s.blocks else range(found[0].blocks, 0, -1)
    fits = (replace(a, blocks=n) for n in most for a in alike)
    return next((a for a in fits if a.bytes(problem, tile) <= room(device, a)), alike[-1])


def room(device: Device, a: Layout) -> int:
    """Bytes of shared memory that each of the blocks on a multiprocessor has."""
    return (device.shared + RESERVED) // a.blocks - RESERVED


def check(name: str, other: str, problem: Problem, tile: Tile, device: Device, **turned) -> None:
    """Raises Unsupported or Infeasible where kernel `name` cannot run, naming the `other` that can."""
    if problem.dtype == "fp32":
        raise Unsupported(f"{name} takes fp16 and bf16, not fp32: {other} takes fp32")
    if problem.mask.boolean:
        raise Unsupported(f"{name} has no boolean masks: {other} has them")
    if problem.d % 16:
        raise Unsupported(f"{name} takes head_dim in multiples of 16, not {problem.d}: {other} takes any")
    if device.capability[0] < 9:
        major, minor = device.capability
        raise Unsupported(f"{name} needs sm_90 (stmatrix), this is sm_{major}{minor}: {other} runs here")
    if (a := chosen(problem, tile, device, **turned)) is None:
        warps = f"8 warps of 16 or 32 keys, with {REGISTERS} registers for tiles in each"
        raise Infeasible(tile, f"cannot be shared evenly by at most {warps}")
    if (need := a.bytes(problem, tile)) > (have := room(device, a)):
        raise Infeasible(tile, f"needs {need:,} B of shared memory, each of {a.blocks} blocks has {have:,} B")


def nearest_tiles(name: str, other: str, problem: Problem, device: Device, most: int, **turned) -> list[Tile]:
    """The tiles of the least estimated time, of the largest that fits and those that leave registers to spare: ptxas
    has others spill.  Raises Unsupported."""
    tile = largest(name, other, problem, device, **turned)
    if device.simulated or problem.softcap > 0:
        return [tile]
    heads, known = problem.B * problem.H_kv, paces(name, other, problem.kind, device)
    steps = {tile: steps_along_rows(problem, tile) for tile in known}
    section = heads_a_section(heads, 8 * problem.N_q * problem.d * problem.group)
    return nearest(steps, known, heads, section, device, most)


def largest(name: str, other: str, problem: Problem, device: Device, **turned) -> Tile:
    """The largest tile that fits.  Raises Unsupported."""
    small = [Tile(32, 16), Tile(16, 16), Tile(64, 16), Tile(32, 32)]
    for tile in small if device.simulated else [Tile(64, 128), Tile(64, 64), Tile(32, 64)]:
        try:
            check(name, other, problem, tile, device, **turned)
            return tile
        except Unsupported:
            raise
        except Infeasible as found:
            reason = found.reason
    raise Unsupported(f"{name} takes no head_dim {problem.d} ({reason}): {other} does")


@cache
def paces(name: str, other: str, problem: Problem, device: Device) -> dict[Tile, Pace]:
    """Of the largest tile that fits, of 128 x 64, of 64 x 64 where d > 64, of 32 x 32 where d > 128, and of others with
    24 registers a thread to spare."""
    usual, found = [largest(name, other, problem, device), Tile(128, 64)], {}
    usual += [Tile(64, 64)] * (problem.d > 64) + [Tile(32, 32)] * (problem.d > 128)
    for tile in (*usual, *(tile for tile in TILES if tile.Br * tile.Bc <= 16_384)):
        with suppress(Infeasible):
            check(name, other, problem, tile, device)
            if tile in usual or chosen(problem, tile, device, roles=1).registers(False) <= REGISTERS - 24:
                found[tile] = pace(problem, tile, device)
    return found


def pace(problem: Problem, tile: Tile, device: Device) -> Pace:
    """Of one role.  Fitted to all tiles of bwd_v2_mma at 48 shapes on an H200, bf16: d 32 to 256, N 512 to 8 Ki, 4 to
    100 heads."""
    a = chosen(problem, tile, device, roles=1)
    d, Br, Bc = a.wide, tile.Br, tile.Bc
    parts = Br // (a.side * a.queries)  # of a step, in each of which a warp scores its queries
    scores = 4 * (a.rows + a.queries) * d  # bytes of shared memory that it reads for Sᵀ and dPᵀ, then for dV and dK
    own = 4 * a.side * a.queries * a.columns + 4 * (a.side - 1) * a.rows * a.queries
    reads = a.warps * (parts * (scores + own) + 2 * Bc * (a.rows_dQ + a.columns_dQ)) + 2 * Bc * Br * min(2, a.side)
    busy = 32 * a.barriers + 153 * parts + (0.0103 * Br * Bc * d + 0.0191 * reads + 0.115 * Br * d) / a.warps
    busy *= 1 + 0.06 * (a.barriers - 1) * math.log2(a.side)  # warps that share keys wait for more others, twice a step
    return Pace(a.warps, a.blocks, busy, 0, 4240 + 0.434 * Bc * d, 2.31 * 2 * lines(Br, d, a.warps))


@dataclass(frozen=True)
class LayoutOfdQ:
    """Where dQ has a kernel of its own: a block of `warps` owns `rows` rows of Q in each, and walks by so many keys."""

    rows: int
    warps: int
    keys: int
    blocks: int

    def shared(self, d: int) -> Shared16:
        rows, keys = (self.rows * self.warps, d), (2 * self.keys, d)
        return Shared16(sQ=rows, sdO=rows, sK=keys, sV=keys)


def chosen_dQ(problem: Problem, tile: Tile) -> LayoutOfdQ:
    if tile.Br * tile.Bc <= 1024:  # where a GPU is simulated
        return LayoutOfdQ(16, 1, 16, 1)
    return LayoutOfdQ(32, 4, 32, 2) if problem.d <= 128 else LayoutOfdQ(16, 8, 32, 1)
