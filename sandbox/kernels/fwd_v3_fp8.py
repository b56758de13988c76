"""FlashAttention-3, forward, in 8 bits: both products take e4m3, with a scale for each block.  [FA3, 2407.08608, §3.3]

The kernel is hopper/fwd_v3_fp8.cu, FlashAttention-3's as fwd_v3 is.  Q, K and V come in 16 bits and are quantized
first, in one pass (device/quantize.py), or as a Quantized, whose blocks then decide the tile.  What was learned: at
d <= 128 the softmax takes the time, not the products (16 exponentials a cycle beside 8,192 FLOPs), so that each of its
instructions counts.  Exponentials by polynomial, P packed early and a guessed maximum were slower on an H100.
"""

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ..device.hopper import Counter, HopperLaunch, Output, Panels, Shape, shape_of, width
from ..device.quantize import quantize
from ..quantize import HADAMARD, Quantized
from ..variant import Infeasible, Tile, Unsupported, Variant

FILE = Path(__file__).parent / "hopper" / "fwd_v3_fp8.cu"
WARPGROUP_ROWS, MOST_KEYS = 64, 256
Q_BLOCK = WARPGROUP_ROWS  # rows of Q that share a scale; of K and V a tile's keys do
ACCUMULATORS = {2: 208, 3: 132, 4: 80}  # registers a thread has for its tiles, by warpgroups
TILES = (
    *(Tile(128, Bc) for Bc in (64, 96, 128, 160, 192)), *(Tile(192, Bc) for Bc in (64, 96, 128, 160)), Tile(256, 64),
)  # fmt: skip


class Scales(ctypes.Structure):
    """What e4m3 is worth: scales.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in "QKV"]
    _fields_ += [(name, ctypes.c_int) for name in ("q_blocks", "q_rows", "kv_blocks")]


def shared_bytes(d: int, tile: Tile, switches: "Switches") -> int:
    """sQ [Br, d], sK and sV [Bc, d] in 8 bits, sO [Br, d] in 16 where it is apart; and 4,096 bytes for barriers and to
    align them all."""
    rows = (1 + 2 * switches.o_apart) * tile.Br + 2 * switches.stages * tile.Bc
    return d * rows + 4096


def accumulators(d: int, tile: Tile, switches: "Switches") -> int:
    """Registers a thread needs for S, P, O and for Q where it is in registers; for a second sum, and 12 to add it."""
    sums = d // 2 + (d // 2 + 12) * switches.two_level
    return tile.Bc // 2 + tile.Bc // 8 + sums + 4 * switches.q_in_registers


@dataclass(frozen=True)
class Switches:
    """What can be turned, one by one; those of fwd_v3 and

    scales      'block': one for 64 rows of Q, and one for a tile's keys of K and of V; 'head', 'tensor'
    incoherent  Q and K are rotated before they are quantized
    two_level   P V of a tile is summed by the tensor cores, which keep some 13 bits, and O in float32
    """

    stages: int = 2
    o_apart: bool = False
    q_in_registers: int = 0  # columns of Q, by 32
    ping_pong: bool = False
    overlap: bool = True
    dynamic: bool = True
    persistent: bool = True
    scales: str = "block"
    incoherent: bool = True
    two_level: bool = False


HOST = ("persistent", "scales", "incoherent")  # switches that the kernel does not see


def chosen(problem, tile, device, **turned) -> Switches:
    """The switches that are used: Q in registers, a tile for O and up to four stages, as they fit; those that are
    `turned` are as they are there."""
    d, two_level = problem.d, turned.get("two_level", False)
    room = ACCUMULATORS[tile.Br // WARPGROUP_ROWS] - accumulators(d, tile, Switches(two_level=two_level))
    found = Switches(q_in_registers=d // 32 if room >= d // 8 else 0)
    choices = [replace(found, stages=n, o_apart=apart) for apart in (True, False) for n in (4, 3, 2)]
    fits = (s for s in choices if shared_bytes(d, tile, s) <= device.shared)
    return replace(next(fits, choices[-1]), **turned)


def fit(problem, tile, device, **turned):
    if problem.dtype == "fp32":
        raise Unsupported("fwd_v3_fp8 quantizes fp16 and bf16, not fp32: fwd_v2 takes fp32")
    if problem.mask.boolean:
        raise Unsupported("fwd_v3_fp8 has no boolean masks: fwd_v2 has them")
    if problem.d not in HADAMARD:
        raise Unsupported(f"fwd_v3_fp8 takes head_dim 64, 128 and 256, not {problem.d}: fwd_v3 takes multiples of 8")
    if device.capability[0] != 9:
        major, minor = device.capability
        raise Unsupported(f"fwd_v3_fp8 needs a Hopper GPU (sm_90), this is sm_{major}{minor}: fwd_v2 runs here")
    if tile.Br not in (128, 192, 256) or tile.Bc % 32 or tile.Bc > MOST_KEYS:
        raise Infeasible(tile, f"fwd_v3_fp8 takes 128, 192 or 256 rows and a multiple of 32 keys up to {MOST_KEYS}")
    switches, d = chosen(problem, tile, device, **turned), problem.d
    if (need := shared_bytes(d, tile, switches)) > device.shared:
        raise Infeasible(tile, f"needs {need:,} B of shared memory, a block has {device.shared:,} B")
    warpgroups = tile.Br // WARPGROUP_ROWS
    if (need := accumulators(d, tile, switches)) > ACCUMULATORS[warpgroups]:
        raise Infeasible(tile, f"needs {need} registers a thread for its tiles, there are {ACCUMULATORS[warpgroups]}")
    if not switches.o_apart and switches.stages * tile.Bc < 2 * tile.Br:
        raise Infeasible(tile, f"O leaves through V's tiles, which hold {switches.stages * tile.Bc // 2} rows of it")


def usual(problem, device, **turned) -> Tile:
    """The fastest tile of sweeps on an H200 and an H100, N from 512 to 16k; with two levels, the largest.

    Under a mask that cuts blocks, narrow ones: 2 to 9 % faster at d = 128.
    """
    d, N_k = problem.d, problem.N_k
    if turned.get("two_level"):
        tile = Tile(192, 64) if d == 64 else Tile(128, 96)
    elif d == 64:
        tile = Tile(256, 64) if N_k <= 1024 else Tile(192, 128) if N_k <= 2048 else Tile(192, 160)
    elif d == 128:
        tile = Tile(192, 96) if N_k <= 1024 or problem.mask.banded else Tile(128, 192)
    else:
        tile = Tile(128, 128)
    fit(problem, tile, device, **turned)
    return tile


def tile_for(problem, device, x: Quantized) -> Tile:
    """The tile of x: its keys are those of a block, where there are blocks.  Raises ValueError where there is none."""
    tile = usual(problem, device)
    if x.scales != "block" or x.kv_block == tile.Bc:
        return tile
    fitting = {}  # keys -> tile
    for keys in range(32, MOST_KEYS + 1, 32):
        for rows in (192, 128, 256):
            try:
                fit(problem, Tile(rows, keys), device)
            except Infeasible:
                continue
            fitting.setdefault(keys, Tile(rows, keys))
    if x.kv_block not in fitting:
        *most, last = map(str, fitting)
        raise ValueError(
            f"kv_block={x.kv_block}: expected {', '.join(most)} or {last} keys, fwd_v3_fp8's tiles for d={problem.d}"
        )
    return fitting[x.kv_block]


def made(problem, tile, switches: Switches, marks: int = 0):
    """[plain, scored]: the kernels of this kind of problem, as fwd_v3's."""
    on = {name.upper(): int(value) for name, value in asdict(switches).items() if name not in HOST}
    defines = {
        "HEAD_DIM": problem.d, "WARPGROUPS": tile.Br // WARPGROUP_ROWS, "TILE_BC": tile.Bc,
        "BF16": int(problem.dtype == "bf16"), "BLOCKED": int(switches.scales == "block"), "WARP_SPECIALIZED": 1,
        "CAPPED": int(problem.softcap > 0), **on,
    }  # fmt: skip
    if marks:
        defines["TRACE"] = marks
    threads = 128 * (defines["WARPGROUPS"] + 1)
    bytes, d = shared_bytes(problem.d, tile, switches), problem.d
    parameters = (
        Panels("Q", WARPGROUP_ROWS, width(d)), Panels("K", tile.Bc, width(d)), Panels("V", d, width(tile.Bc)),
        Panels("O", WARPGROUP_ROWS, written=True), Output("LSE"), Counter(), Output("marks"), Scales, Shape,
    )  # fmt: skip
    made = []
    for scored in (
        defines["CAPPED"],
        1,
    ):  # without a mask the latter takes one that hides nothing: ptxas spills where there is none
        more = {"SCORED": scored, "BANDED": int(problem.mask.banded or scored)}
        made.append(HopperLaunch(FILE, "fwd_v3_fp8", threads, bytes, defines | more, parameters, tile))
    return made


class Launch:
    """launch(problem, Q, K, V, mask, O, LSE) of 16-bit tensors; launch.attend(problem, x, O, LSE) of a Quantized."""

    def __init__(self, problem, tile, device, marks=None, **turned):
        self.tile, self.device, self.marks = tile, device, marks
        self.switches = chosen(problem, tile, device, **turned)
        self.options = {  # of the quantization
            "scales": self.switches.scales, "q_block": Q_BLOCK, "kv_block": tile.Bc,
            "incoherent": self.switches.incoherent,
        }  # fmt: skip
        self.plain, self.scored = made(problem, tile, self.switches, 0 if marks is None else marks.shape[2])

    def __call__(self, problem, Q, K, V, mask, O, LSE):
        if O.numel():
            self.attend(problem, self.quantize(Q, K, V), O, LSE)

    def quantize(self, Q, K, V) -> Quantized:
        if K.shape[1] == 0:  # there is no map of an empty tensor: one key that the mask hides
            K = V = Q.new_zeros(Q.shape[0], 1, K.shape[2], Q.shape[3])
        return quantize(Q, K, V, **self.options)

    def attend(self, problem, x: Quantized, O, LSE):
        """Raises ValueError where x's scales are not what this kernel was built for."""
        tile, switches = self.tile, self.switches
        self.check(x)
        (B, N_q, H, d), N_k = x.q.shape, problem.N_k
        shape = shape_of(problem, 2 * max(1, N_k) * d)
        found = [scale.contiguous() for scale in (x.q_scale, x.k_scale, x.v_scale)]
        scales = Scales(*(s.data_ptr() for s in found), x.q_scale.shape[2], x.q_block, x.k_scale.shape[2])
        blocks = B * H * -(-N_q // tile.Br)
        if switches.persistent:
            blocks = min(self.device.sms, blocks)
        if self.marks is not None and blocks > len(self.marks):
            raise ValueError(f"marks has room for {len(self.marks)} blocks: {blocks} are launched")
        run = self.scored if problem.scale <= 0 else self.plain
        run(blocks, x.q, x.k, x.v.transpose(1, 2), O, LSE, self.marks, scales, shape)

    def check(self, x: Quantized):
        blocked = self.switches.scales == "block"
        if (x.scales == "block") != blocked:
            raise ValueError(f"scales={x.scales!r}: this kernel was built for scales={self.switches.scales!r}")
        if blocked and x.q_block % Q_BLOCK:
            raise ValueError(f"q_block={x.q_block}: expected a multiple of {Q_BLOCK} rows")
        if blocked and x.kv_block != self.tile.Bc:
            raise ValueError(f"kv_block={x.kv_block}: expected {self.tile.Bc} keys, those of tile {self.tile}")


VARIANT = Variant(
    name="fwd_v3_fp8",
    direction="fwd",
    generation="v3",
    loop_order="q_outer",
    parent="fwd_v3",
    delta="both products in e4m3: blocks of Q, K and V have scales, Q and K are rotated against outliers",
    dtypes=("fp16", "bf16"),
    fit=fit,
    build=Launch,
    tiles=TILES,
    usual=usual,
    unit="tensor",
    pace=1e-8,
    scales="block",
)


def turned(**switches) -> Variant:
    """The same kernel with these switches, and else as `chosen`: an ablation."""
    name = " ".join(["fwd_v3_fp8", *(f"{switch}={value}" for switch, value in switches.items())])
    parts = {part: partial(getattr(VARIANT, part), **switches) for part in ("fit", "build", "usual")}
    return replace(VARIANT, name=name, scales=switches.get("scales", "block"), **parts)


def traced(marks, **switches) -> Variant:
    """The same, with time stamps: marks, an int32 tensor [blocks, warpgroups, marks, 2] of zeros, takes them."""
    variant = turned(**switches)
    return replace(variant, build=partial(variant.build, marks=marks))
