"""The fastest tile, by the clock: what attention(tile="measured") takes.  [floor 3]

An estimate launches nothing, and cannot tell near tiles apart: experiments/tile_choice.py says how far from the best
its choice is.  Where a shape comes again and again, the few that it ranks first are timed once, on the call's own
tensors, and the answer is kept beside the compiled kernels: for this GPU, this kernel and this shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .. import cubin, target
from ..choose import MEASURED, candidates
from ..problem import Problem
from ..variant import Device, Infeasible, Tile, Variant
from . import gate, timing
from .bench import kernel_hash

GATED = dict(B=1, H=2, H_kv=2, N_q=333, N_k=333)
BUDGET_S = 0.03  # of launches of each tile

_found: dict[tuple, Tile] = {}


def fastest(problem: Problem, variant: Variant, device: Device, tensors: Callable[[], Sequence]) -> Tile:
    """The candidate of the least time for this problem, from what was kept, else timed now.

    tensors  what the kernel's launch takes after the problem; asked for only where it is timed.  Its outputs are
             overwritten.

    Raises ValueError where nothing can be timed, Ungated where a tile fails its gate, Infeasible where none runs.
    """
    if device.simulated:
        raise ValueError(
            f"tile={MEASURED!r}: there is no GPU here, and the simulator's time says nothing about one; "
            "expected a pair (Br, Bc), or None"
        )
    if (tile := _found.get((problem, variant, device))) is not None:
        return tile
    tiles = candidates(problem, device, variant)
    file = cubin.file_of(variant.name, (device, problem, kernel_hash(variant.name), tiles)).with_suffix(".tile")
    tile = tiles[0] if len(tiles) == 1 else _kept(file, tiles)
    if tile is None:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"tile={MEASURED!r}: nothing can be timed while a CUDA graph is captured: call it once before, "
                "on tensors of this shape"
            )
        given = tensors()
        with torch.cuda.device(given[0].device):
            times, misfits = time_tiles(problem, variant, tiles, device, given)
        if not times:
            raise Infeasible(tiles[0], misfits[tiles[0]])
        tile = least(times)
        cubin.appear(file, str(tile).encode())
    return _found.setdefault((problem, variant, device), tile)


def _kept(file, tiles: Sequence[Tile]) -> Tile | None:
    try:
        return {str(tile): tile for tile in tiles}.get(file.read_text())
    except (OSError, UnicodeDecodeError):
        return None


def least(times: dict[Tile, timing.Timing]) -> Tile:
    """The tile of the least time, by the quantile that 20 % of the samples stay below.

    On an H200 the shortest launches come in two kinds, a quick and a slower one, and a median may be of either.
    """
    return min(times, key=lambda tile: times[tile].ms_p20)


def time_tiles(
    problem: Problem, variant: Variant, tiles: Sequence[Tile], device: Device, tensors: Sequence, seed: int = 0
) -> tuple[dict[Tile, timing.Timing], dict[Tile, str]]:
    """The time of each tile, in turns on the same tensors; and of each that does not run, the reason.

    Each passes the gate at a small shape of its kind first.  Raises Ungated, naming the tile, where one does not.
    """
    small, passed, misfits = replace(problem, **GATED), [], {}
    given = gate.gaussian(small, seed, target.torch_device())
    for tile in tiles:
        try:
            verdict = gate.check(variant, small, tile, given, device)
        except Infeasible as misfit:  # found by the compiler: too many registers, say
            misfits[tile] = misfit.reason
            continue
        if not verdict.passed:
            raise timing.Ungated(f"{variant.name} with tile {tile} fails its gate: {verdict.why}")
        passed.append(tile)
    times = timing.time_together([_launch(problem, variant, tile, device, tensors) for tile in passed], BUDGET_S)
    return dict(zip(passed, times, strict=True)), misfits


def _launch(problem: Problem, variant: Variant, tile: Tile, device: Device, tensors: Sequence) -> Callable:
    run = variant.launcher(problem, tile, device)
    return lambda: run(problem, *tensors)
