"""FlashAttention-3, forward, for Hopper: copies, products and softmax run at the same time.  [FA3, 2407.08608, §3]

The kernel is hopper/fwd_v3.cu: producer warps feed rings of K and V tiles by the tensor copy engine (TMA), two to four
warpgroups multiply on the tensor cores (wgmma), taking turns (ping-pong) and computing a tile's softmax while the next
tile's Q Kᵀ is under way (overlap).  Here stand its tiles, its switches, its grid and its arguments.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from ..device.estimate import Pace, nearest, steps_along_keys
from ..device.hopper import Counter, HopperLaunch, Output, Panels, Shape, shape_of
from ..variant import Infeasible, Tile, Unsupported, Variant

FILE = Path(__file__).parent / "hopper" / "fwd_v3.cu"
WARPGROUP_ROWS, MOST_KEYS, PANEL = 64, 256, 64
ACCUMULATORS = {  # registers a thread has for its tiles: warp-specialised or not, by warpgroups
    True: {2: 212, 3: 128, 4: 80}, False: {2: 200, 3: 128, 4: 80},
}  # fmt: skip
TILES = (
    *(Tile(Br, Bc) for Br in (128, 192) for Bc in (64, 80, 96, 112, 128, 144, 160, 176, 192)), Tile(256, 64),
)  # fmt: skip


def padded(d: int) -> int:
    """Head columns that are multiplied: a multiple of 16, the k of one product."""
    return -(-d // 16) * 16


def shared_bytes(d: int, tile: Tile, switches: "Switches") -> int:
    """sQ and, where it is apart, sO [Br, d], sK and sV [Bc, d], in panels of 64 columns; and 3,072 bytes for barriers
    and to align them all."""
    columns = -(-d // PANEL) * PANEL
    rows = (1 + switches.o_apart) * tile.Br + 2 * switches.stages * tile.Bc
    return 2 * columns * rows + 3072


def accumulators(d: int, tile: Tile, switches: "Switches") -> int:
    """Registers a thread needs for S, P and O [64, ·] of its warpgroup, and for Q where it is in registers."""
    return 3 * tile.Bc // 4 + d // 2 + 4 * switches.q_in_registers


CAP = 36  # more, where scores are capped
# (d up to, banded) -> tile -> clocks of a step, of a row block's edges, of a launch: those of 64 and 128 fitted to 284
# sweeps on an H200, those of 96 and 112 as of 128, but for the tiles of which recorded sweeps say more.
CLOCKS = {
    (64, False): {
        (128, 96): (1440, 1500, 9510), (128, 128): (1850, 1400, 10120), (128, 160): (2190, 1480, 10640),
        (192, 64): (1190, 2860, 9220), (192, 96): (1660, 3090, 9820), (192, 128): (2170, 2830, 12040),
        (256, 64): (1520, 3060, 9530),
    },
    (64, True): {
        (128, 64): (1030, 1120, 11320), (128, 80): (1210, 1250, 11460), (128, 160): (2150, 1450, 13440),
        (192, 64): (1240, 1670, 10490), (192, 128): (2180, 2110, 12000), (256, 64): (1620, 710, 11710),
    },
    (96, False): {
        (128, 80): (1450, 1490, 13590), (128, 96): (1690, 1590, 13590), (128, 128): (2170, 1790, 13590),
        (192, 96): (1890, 3550, 11540),
    },
    (96, True): {
        (128, 64): (1260, 1850, 12640), (128, 128): (2230, 2900, 13330), (192, 64): (1720, 2560, 11430),
        (192, 96): (1990, 3010, 11550),
    },
    (112, False): {(128, 128): (2170, 1790, 13590), (192, 80): (1760, 3550, 11540)},
    (128, False): {(128, 128): (2170, 1790, 13590), (192, 80): (1890, 3550, 11540)},
    (128, True): {
        (128, 64): (1260, 1850, 12640), (128, 128): (2230, 2900, 13330), (192, 64): (1720, 2560, 11430),
        (192, 80): (1990, 3010, 11550),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one: that is how the ablations are built.

    stages      tiles of K and of V that are on their way or in use
    o_apart     O has a tile of its own; else it leaves through V's, and the next V waits
    q_in_registers  columns of Q, by 16, that are read from its tile once a row block, and not by every product
    ping_pong   while one warpgroup multiplies, another takes its softmax
    overlap     Q Kᵀ of the next block is under way during the softmax of this one
    dynamic     a block that is free takes the next row block; else each gridDim.x-th is its own
    lazy        O is rescaled only where a row's maximum has grown a lot
    persistent  one block a multiprocessor walks through row blocks; else one block a row block
    warp_specialized  copies have warps of their own; else a warp of those that multiply asks for them, too
    """

    stages: int = 2
    o_apart: bool = False
    q_in_registers: int = 0
    ping_pong: bool = True
    overlap: bool = True
    dynamic: bool = True
    lazy: bool = True
    persistent: bool = True
    warp_specialized: bool = True


def chosen(problem, tile, device, **turned) -> Switches:
    """The switches that are used: a tile for O and up to four stages, as they fit; else what sweeps on an H100 said.
    Those that are `turned` are as they are there.

    Turns cost more than they bring where the softmax is cheap beside products (d > 64); where it is not, three
    warpgroups gain by them under a mask, and four without.
    """
    d, banded = padded(problem.d), problem.mask.banded
    if d <= 64 and tile.Br == 192:
        found = Switches(ping_pong=banded, q_in_registers=d // 16)
    elif d <= 64:
        found = Switches(ping_pong=not banded)
    else:
        found = Switches(ping_pong=False, q_in_registers=d // 16 if banded and d <= 128 and tile.Br == 128 else 0)
    there = ACCUMULATORS[turned.get("warp_specialized", True)][tile.Br // WARPGROUP_ROWS]
    room = there - accumulators(d, tile, replace(found, q_in_registers=0)) - CAP * (problem.softcap > 0)
    found = replace(found, q_in_registers=max(0, min(found.q_in_registers, room // 4)))
    choices = [replace(found, stages=n, o_apart=apart) for apart in (True, False) for n in (4, 3, 2)]
    fits = (s for s in choices if shared_bytes(d, tile, s) <= device.shared)
    return replace(next(fits, choices[-1]), **turned)


def fit(problem, tile, device, **turned):
    if problem.dtype == "fp32":
        raise Unsupported("fwd_v3 takes fp16 and bf16, not fp32: fwd_v2 takes fp32")
    if problem.mask.boolean:
        raise Unsupported("fwd_v3 has no boolean masks: fwd_v2 has them")
    if problem.d % 8:
        raise Unsupported(f"fwd_v3 takes head_dim in multiples of 8, not {problem.d}: fwd_v2 takes any")
    if device.capability[0] != 9:
        major, minor = device.capability
        raise Unsupported(f"fwd_v3 needs a Hopper GPU (sm_90), this is sm_{major}{minor}: fwd_v2 runs here")
    if tile.Br not in (128, 192, 256) or tile.Bc % 16 or tile.Bc > MOST_KEYS:
        raise Infeasible(tile, f"fwd_v3 takes 128, 192 or 256 rows and a multiple of 16 keys up to {MOST_KEYS}")
    switches, d = chosen(problem, tile, device, **turned), padded(problem.d)
    if (need := shared_bytes(problem.d, tile, switches)) > device.shared:
        raise Infeasible(tile, f"needs {need:,} B of shared memory, a block has {device.shared:,} B")
    there = ACCUMULATORS[switches.warp_specialized][tile.Br // WARPGROUP_ROWS]
    if (need := accumulators(d, tile, switches) + CAP * (problem.softcap > 0)) > there:
        raise Infeasible(tile, f"needs {need} registers a thread for its tiles, there are {there}")
    if not switches.o_apart and switches.stages * tile.Bc < tile.Br:
        raise Infeasible(tile, f"O leaves through V's tiles, which hold {switches.stages * tile.Bc} rows")


def nearest_tiles(problem, device, most) -> list[Tile]:
    """The tile of the least estimated time, the next by it, and neighbours of the first; with a softcap, and of wide
    heads, the one that sweeps found fastest and its neighbours.

    Blocks are few and long, and their waves decide; experiments/tile_choice.py says how near the best that comes.
    """
    d = padded(problem.d)
    if problem.softcap > 0:
        return neighbours(problem, Tile(128, 128 if d <= 128 else 96 if d <= 192 else 64), device)[:most]
    if d > 128:
        found = neighbours(problem, Tile(128, 112 if d <= 192 else 80 if d <= 208 else 64), device)
        if d <= 160:  # few rows have been the fastest with few keys, many with more rows
            found[1:1] = Tile(192, 64), Tile(128, 64)
        return list(dict.fromkeys(found))[:most]
    known, heads = paces(d, problem.mask.banded), problem.B * problem.H
    section = shape_of(problem, 4 * max(1, problem.N_k) * problem.d).section
    tiles = nearest({tile: steps(problem, tile) for tile in known}, known, heads, section, device, min(most, 2))
    return list(dict.fromkeys([*tiles, *neighbours(problem, tiles[0], device)]))[:most]


def neighbours(problem, tile, device) -> list[Tile]:
    """The tile, and those of as many rows that fit, the nearest first.  Raises as `fit` does where it does not."""
    fit(problem, tile, device)
    found = [tile]
    for other in sorted((t for t in TILES if t.Br == tile.Br), key=lambda t: abs(t.Bc - tile.Bc)):
        with suppress(Infeasible):
            fit(problem, other, device)
            found.append(other)
    return list(dict.fromkeys(found))


def steps(problem, tile) -> np.ndarray:
    """Of each row block of a head, as scheduler.cuh has them: its key blocks.  Where only some of its warpgroups have
    rows, the others are faster alone, but not twice as fast."""
    over = -problem.N_q % tile.Br // WARPGROUP_ROWS * WARPGROUP_ROWS  # rows that no warpgroup has
    if problem.mask.banded:
        return steps_along_keys(problem, tile, -over)
    found = steps_along_keys(problem, tile).astype(float)
    found[-1:] *= max(0.5, 1 - over / tile.Br)
    return found


@cache
def paces(d: int, banded: bool) -> dict[Tile, Pace]:
    """Of the tiles that were the best somewhere, d <= 128."""
    clocks = next(clocks for (most, band), clocks in CLOCKS.items() if d <= most and band == banded)
    return {
        Tile(Br, Bc): Pace(warps=4, blocks=1, busy=0, waits=step, edges=edges, grid=grid)
        for (Br, Bc), (step, edges, grid) in clocks.items()
    }


def made(problem, tile, switches: Switches, marks: int = 0):
    """[plain, scored]: the kernels of this kind of problem.  Scored: scores are scaled before the softmax, which capped
    ones always are.

    marks  that each warpgroup leaves, at most (trace.cuh)
    """
    on = {name.upper(): int(value) for name, value in asdict(switches).items() if name != "persistent"}
    defines = {
        "HEAD_DIM": padded(problem.d), "WARPGROUPS": tile.Br // WARPGROUP_ROWS, "TILE_BC": tile.Bc,
        "BF16": int(problem.dtype == "bf16"), "BANDED": int(problem.mask.banded), "CAPPED": int(problem.softcap > 0),
        **on,
    }  # fmt: skip
    if marks:
        defines["TRACE"] = marks
    threads = 128 * (defines["WARPGROUPS"] + switches.warp_specialized)
    bytes = shared_bytes(problem.d, tile, switches)
    parameters = (
        Panels("Q", WARPGROUP_ROWS), Panels("K", tile.Bc), Panels("V", tile.Bc),
        Panels("O", WARPGROUP_ROWS, written=True), Output("LSE"), Counter(), Output("marks"), Shape,
    )  # fmt: skip
    return [
        HopperLaunch(FILE, "fwd_v3", threads, bytes, {**defines, "SCORED": scored}, parameters, tile)
        for scored in (defines["CAPPED"], 1)
    ]


def build(problem, tile, device, marks=None, **turned):
    """marks: None, or an int32 tensor [blocks, warpgroups, marks, 2] of zeros, which a traced build fills."""
    switches = chosen(problem, tile, device, **turned)
    plain, scored = made(problem, tile, switches, 0 if marks is None else marks.shape[2])

    def launch(problem, Q, K, V, mask, O, LSE):
        B, N_q, H, d = Q.shape
        if O.numel() == 0:
            return
        if problem.N_k == 0:  # there is no map of an empty tensor: one key that the mask hides
            K = V = Q.new_zeros(B, 1, problem.H_kv, d)
        shape = shape_of(problem, 4 * max(1, problem.N_k) * d)
        blocks = B * H * -(-N_q // tile.Br)
        if switches.persistent:
            blocks = min(device.sms, blocks)
        if marks is not None and blocks > len(marks):
            raise ValueError(f"marks has room for {len(marks)} blocks: {blocks} are launched")
        run = scored if problem.scale <= 0 else plain
        run(blocks, Q, K, V, O, LSE, marks, shape)

    return launch


VARIANT = Variant(
    name="fwd_v3",
    direction="fwd",
    generation="v3",
    loop_order="q_outer",
    parent="fwd_v2",
    delta="for Hopper's tensor cores: copies, products and softmax overlap, by producer warps, turns and a pipeline",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=build,
    tiles=TILES,
    nearest=nearest_tiles,
    unit="tensor",
    pace=1e-8,
    default=True,
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join(["fwd_v3", *(f"{switch}={value}" for switch, value in switches.items())])
    return replace(VARIANT, name=name, default=False, fit=partial(fit, **switches), build=partial(build, **switches))


def traced(marks, **switches) -> Variant:
    """The same, with time stamps: marks, an int32 tensor [blocks, warpgroups, marks, 2] of zeros, takes them."""
    variant = turned(**switches)
    return replace(variant, build=partial(variant.build, marks=marks))
