"""Roofline: the least time that a launch's work takes on each resource of a GPU, and so which wall it stands at.
[floor 3]

    wall            work            rate
    DRAM            bytes           bandwidth
    multiply-add    matmul FLOPs    of fp32 FMA, or of the tensor cores
    exp             exps            16 a clock and multiprocessor

No kernel is faster than its slowest wall.  [Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009]
Two rows of the table are no walls, and say so: the bytes that a kernel asks of global memory, since L2 absorbs
re-reads, and a unit that the kernel does not use.  No datasheet states a bandwidth of L2, so it is no row at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..mask import Mask
from ..problem import DTYPES, Problem
from ..variant import Device, Tile, Variant
from . import bench, formulas, timing
from .cases import Rows

LEAST, ASKED, DRAM, L2 = "least possible", "asked for", "through DRAM, measured", "through L2, measured"
FMA, TENSOR = "fma", "tensor"  # what multiplies: Variant.unit, where a kernel declares one

# exps that a kernel evaluates for an element of X, or a seen pair; 1 where it is not named
EXPS = {"softmax_safe": 2, "softmax_online": 3, "softmax_tiled": 2, "bwd_v2_deterministic": 2}


# ---- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one launch has to do.

    flops   of matrix products, as Problem.flops counts them: what is recomputed costs time, and is no work
    exps    at least
    bytes   LEAST, ASKED, DRAM, L2 -> bytes; what is not known is not there
    dtype   of the inputs; unit: FMA or TENSOR
    blocks  of its grid, None where the kernel does not declare it: a softmax
    """

    flops: float
    exps: float
    bytes: dict[str, int]
    dtype: str = "fp32"
    unit: str = FMA
    blocks: int | None = None

    @property
    def operations(self) -> tuple[float, str]:
        """What a roofline counts: FLOPs; the exps of a softmax, which multiplies no matrices."""
        return (self.flops, "FLOP") if self.flops else (self.exps, "exp")

    def intensity(self, what: str) -> float:
        """Operations a byte."""
        return self.operations[0] / self.bytes[what]


def work(variant: Variant, shape: Problem | Rows, tile: Tile | None, moved: dict[str, int]) -> Work:
    """moved: ASKED, DRAM, L2 -> bytes, as far as they are known."""
    exps, unit = EXPS.get(variant.name, 1), variant.unit
    if isinstance(shape, Rows):
        elements = shape.rows * shape.columns
        least = 2 * elements * DTYPES[shape.dtype].itemsize  # X -> Y
        return Work(0.0, exps * elements, {LEAST: least, **moved}, shape.dtype, unit)
    p = shape
    pairs = p.B * p.H * p.mask.pairs(p.N_q, p.N_k)
    least = {LEAST: p.ideal_bytes(variant.direction)}
    return Work(p.flops(variant.direction), exps * pairs, least | moved, p.dtype, unit, blocks(variant, p, tile))


def blocks(variant: Variant, p: Problem, tile: Tile) -> int:
    """Thread blocks of its grid, as it declares them: heads, or heads x the blocks of rows or keys that they own.

    A backward may own rows in one of its kernels and keys in another: it is granted the larger number.
    """
    Tr, Tc = -(-p.N_q // tile.Br), -(-p.N_k // tile.Bc)
    owned = 1 if variant.one_block_a_head else Tr if variant.direction == "fwd" else max(Tr, Tc)
    return p.B * p.H * owned


def asked(name: str, shape: Problem | Rows, tile: Tile | None) -> dict[str, tuple[int, int]] | None:
    """array -> (bytes read, bytes written) that variant `name` must ask of global memory; None without a formula."""
    if isinstance(shape, Rows):
        if (moved := formulas.softmax(name, shape.rows, shape.columns)) is None:
            return None
        return by_array(moved.reads, moved.writes, DTYPES[shape.dtype].itemsize)
    if name not in formulas.FORMULAS:
        return None
    return by_array(*formulas.FORMULAS[name](shape, tile), shape.itemsize)


def by_array(reads: dict[str, int], writes: dict[str, int], itemsize: int) -> dict[str, tuple[int, int]]:
    """array -> (bytes read, bytes written), from elements."""
    size = {array: 4 if array in formulas.FP32 else itemsize for array in (*reads, *writes)}
    moved = {array: (reads.get(array, 0) * size[array], writes.get(array, 0) * size[array]) for array in size}
    return {array: both for array, both in moved.items() if any(both)}


def visits_empty_tiles(name: str, p: Problem, tile: Tile) -> bool:
    """Whether its loops go, by its formula, where the mask leaves no pair to be seen."""
    w, moved = formulas.walk(p, tile), asked(name, p, tile)
    some_empty = w.K_rows < w.Tr * p.N_k
    return some_empty and moved is not None and moved == asked(name, replace(p, mask=Mask()), tile)


# ---- the ceilings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """The most of something a second, and who says so."""

    rate: float
    source: str


@dataclass(frozen=True)
class Chip:
    """The ceilings of one GPU; None where nobody says."""

    name: str
    sms: int
    dram: Ceiling
    fma: Ceiling
    tensor: Ceiling | None
    exp: Ceiling | None


# Hopper with 132 multiprocessors, by NVIDIA's datasheets (SXM, dense) and the H100 whitepaper: 1.98 GHz boost clock,
# 128 FMA lanes a multiprocessor.  exp2: 16 a clock [CUDA programming guide, arithmetic instructions, 9.0].
# fp32 on tensor cores takes three products in TF32, as torch's fused attention takes them.
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
SMS, CLOCK = 132, 1.98e9
TENSOR_CORES = {"fp32": 494.7e12 / 3, "fp16": 989.4e12, "bf16": 989.4e12}


def datasheet(name: str, dtype: str) -> Chip | None:
    """The ceilings that NVIDIA states for the GPU of that name; None for one that is not in this table."""
    if name not in BANDWIDTH:
        return None
    return Chip(
        name,
        SMS,
        dram=Ceiling(BANDWIDTH[name], "datasheet"),
        fma=Ceiling(SMS * 128 * 2 * CLOCK, "datasheet"),
        tensor=Ceiling(TENSOR_CORES[dtype], "datasheet, TF32 / 3" if dtype == "fp32" else "datasheet"),
        exp=Ceiling(SMS * 16 * CLOCK, "16 a clock, at 1.98 GHz"),
    )


def measured(device: Device, dtype: str) -> Chip:
    """The ceilings of the GPU at hand: what torch reaches in this very run, and the datasheet for the rest."""
    sheet = datasheet(device.name, dtype)
    tensor = sheet and sheet.tensor
    if dtype != "fp32":
        tensor = Ceiling(bench.ceiling(dtype) * 1e12, "torch's matmul, this run")
    fma = Ceiling(bench.ceiling("fp32") * 1e12, "torch's fp32 matmul, this run")
    return Chip(device.name, device.sms, Ceiling(_copy(), "device copy, this run"), fma, tensor, sheet and sheet.exp)


def _copy() -> float:
    """Bytes a second, read and written, of a copy from device memory to device memory."""
    a, b = (torch.zeros(2**30, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * a.numel() / timing.time_launch(lambda: a.copy_(b)).ms * 1e3


# ---- the walls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wall:
    """The least time that some work takes on one resource.

    amount  of bytes ('B'), FLOPs ('FLOP') or exps ('exp'); of: which
    moved   LEAST, ASKED or DRAM: which bytes; None for a unit
    stands  whether it binds the kernel; where it does not, `name` says why
    moves   what would move that wall, in a sentence
    """

    name: str
    amount: float
    of: str
    ceiling: Ceiling
    moved: str | None = None
    stands: bool = True
    moves: str = ""

    @property
    def seconds(self) -> float:
        return self.amount / self.ceiling.rate


def walls(work: Work, chip: Chip) -> list[Wall]:
    """Every wall for which there are work and a ceiling; that of the longest time first."""
    found = [*_memory(work, chip), *_products(work, chip)]
    if chip.exp:
        moves = "fewer exps would move that wall, or polynomials in place of some, as in FlashAttention-4"
        found.append(Wall("exp unit", work.exps, "exp", chip.exp, moves=moves))
    return sorted((wall for wall in found if wall.amount), key=lambda wall: -wall.seconds)


def _memory(work: Work, chip: Chip) -> Iterator[Wall]:
    least = work.bytes[LEAST]
    moves = "only a narrower dtype would move that wall: each input is read once and each output written once"
    yield Wall("DRAM, least bytes possible", least, "B", chip.dram, LEAST, moves=moves)
    if ASKED in work.bytes:
        name = "DRAM, bytes asked for (no wall: L2 absorbs re-reads)"
        yield Wall(name, work.bytes[ASKED], "B", chip.dram, ASKED, stands=False)
    if DRAM in work.bytes:
        if (times := work.bytes[DRAM] / least) >= 1.1:
            moves = f"fewer bytes would move that wall: they are {times:.1f} x the least possible"
        yield Wall("DRAM, bytes measured", work.bytes[DRAM], "B", chip.dram, DRAM, moves=moves)


def _products(work: Work, chip: Chip) -> Iterator[Wall]:
    """The unit that multiplies, all of it and as much as the grid reaches; the tensor cores where they are not it."""
    cores = "tensor cores" + (", TF32 x 3" if work.dtype == "fp32" else "")
    used = work.unit == TENSOR
    name, ceiling = (cores, chip.tensor) if used else ("fp32 multiply-add", chip.fma)
    moves = "only fewer products would move that wall: tiles that a mask empties, or a narrower dtype"
    if not used and chip.tensor:
        moves = f"tensor cores would move that wall: {chip.tensor.rate / chip.fma.rate:.1f} x as many products a second"
        yield Wall(f"{cores} (not used)", work.flops, "FLOP", chip.tensor, stands=False)
    if ceiling:
        yield Wall(name, work.flops, "FLOP", ceiling, moves=moves)
    if ceiling and work.blocks is not None and work.blocks < chip.sms:
        reached = Ceiling(ceiling.rate * work.blocks / chip.sms, ceiling.source)
        moves = f"more blocks would move that wall: {chip.sms - work.blocks} multiprocessors have none"
        where = f"{name} on {work.blocks} of {chip.sms} multiprocessors"
        yield Wall(where, work.flops, "FLOP", reached, moves=moves)


def nearest(walls: list[Wall]) -> Wall:
    """The wall that binds first."""
    return max((wall for wall in walls if wall.stands), key=lambda wall: wall.seconds)
