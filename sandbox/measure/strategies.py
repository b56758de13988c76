"""Hypothesis strategies: cases that look for the edges.  [floor 3]"""

from __future__ import annotations

import functools

from hypothesis import strategies as st

from .. import target
from ..mask import Mask
from ..problem import DTYPES, Problem
from ..variant import Infeasible, Tile, Variant
from .cases import INPUTS, LAYOUTS, ROW_INPUTS, ROW_LAYOUTS, Case, Rows

SIMULATED = target.KIND == "simulator"
SEEDS = st.integers(0, 2**20)

# What a kernel is compiled for: (d, dtype, tile).  Free on the simulator; a few seconds each on a GPU, hence few.
GPU_BUILDS = [
    (64, "fp32", Tile(64, 64)), (128, "fp16", Tile(32, 32)), (40, "bf16", Tile(16, 32)), (256, "fp16", Tile(16, 16)),
    (7, "fp32", Tile(24, 17)),
]  # fmt: skip
GPU_MASKS = [(False, False, 0.0), (True, False, 0.0), (False, True, 0.0), (True, False, 15.0)]  # band, boolean, softcap


# The same of kernels that are made for certain tiles only; compiled everywhere.
OWN_BUILDS = [
    (64, "fp16", Tile(192, 64)), (40, "bf16", Tile(128, 64)), (128, "bf16", Tile(128, 80)),
    (256, "fp16", Tile(128, 64)), (128, "fp16", Tile(192, 96)), (64, "bf16", Tile(192, 160)),
    (16, "fp16", Tile(16, 16)), (48, "bf16", Tile(32, 16)), (96, "fp16", Tile(16, 32)), (32, "bf16", Tile(32, 32)),
]  # fmt: skip
DEAREST = 2e-3  # seconds a tile may take, a multiply-add a pair, where it is simulated


@functools.cache
def own_builds(variant: Variant) -> list[tuple]:
    """(d, dtype, tile, banded, boolean, softcap) of those that such a kernel takes."""
    found = []
    for d, dtype, tile in OWN_BUILDS:
        if tile not in variant.tiles or SIMULATED and tile.Br * tile.Bc * variant.pace > DEAREST:
            continue
        for banded, boolean, softcap in GPU_MASKS:
            kind = Problem(1, 1, 1, 1, 1, d, dtype, mask=Mask(causal=banded, boolean=boolean), softcap=softcap)
            try:
                variant.fit(kind, tile, target.device())
                found.append((d, dtype, tile, banded, boolean, softcap))
            except Infeasible:
                continue
    return found


@st.composite
def builds(draw, variant: Variant | None = None):
    """(d, dtype, tile, banded, boolean, softcap)."""
    if variant is not None and variant.tiles:
        return draw(st.sampled_from(own_builds(variant)))
    if not SIMULATED:
        return *draw(st.sampled_from(GPU_BUILDS)), *draw(st.sampled_from(GPU_MASKS))
    d = draw(st.sampled_from([1, 3, 4, 8, 12, 16, 20]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    tile = Tile(*draw(st.sampled_from([(4, 4), (8, 8), (16, 16), (8, 16), (16, 8), (5, 7)])))
    return d, dtype, tile, draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.7, 10.0]))


def sizes(step: int):
    """0, 1 and the neighbours of multiples of a tile's side."""
    most = 3 * step if not SIMULATED else min(3 * step, max(34, 2 * step))
    near = sorted({n for k in (1, 2, 3) for n in (k * step - 1, k * step, k * step + 1) if n <= most + 1} | {0, 1})
    return st.sampled_from(near) | st.integers(0, most)


@st.composite
def masks(draw, banded: bool, boolean: bool):
    align = draw(st.sampled_from(["bottom_right", "top_left"]))
    if not banded:
        return Mask(boolean=boolean)
    width = st.sampled_from([-1, 0, 1, 3, 9])
    window = draw(st.tuples(width, width))
    causal = draw(st.booleans()) or window == (-1, -1)
    return Mask(causal=causal, align=align, window=window, boolean=boolean)


@st.composite
def cases(draw, variant: Variant | None = None, of=None):
    """A Case of forward and backward kernels; `of` draws what it is built for, as `builds` of the variant does."""
    d, dtype, tile, banded, boolean, softcap = draw(builds(variant) if of is None else of)
    H_kv, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3)]))
    N_q, N_k = draw(sizes(tile.Br)), draw(sizes(tile.Bc))
    if draw(st.booleans()):
        N_k = N_q
    scale = draw(st.sampled_from([None, None, 1.0, -0.3, 0.0]))
    B = draw(st.integers(1, 2))
    problem = Problem(B, H_kv * group, H_kv, N_q, N_k, d, dtype, scale, draw(masks(banded, boolean)), softcap)
    return Case(problem, tile, draw(st.sampled_from(INPUTS)), draw(st.sampled_from(LAYOUTS)), draw(SEEDS))


# Around the blocks of the simulator (2 rows of 4 lanes; tiles of 4 x 8) and of a GPU (8 of 32; 16 x 128).
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17] + [1000] * (not SIMULATED)
COLUMNS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129] + [4095, 4097, 50257] * (not SIMULATED)


@st.composite
def row_cases(draw, inputs=tuple(ROW_INPUTS), dtypes=tuple(DTYPES)):
    """A Case of softmax kernels."""
    rows = Rows(draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLUMNS)), draw(st.sampled_from(dtypes)))
    return Case(rows, None, draw(st.sampled_from(inputs)), draw(st.sampled_from(list(ROW_LAYOUTS))), draw(SEEDS))
