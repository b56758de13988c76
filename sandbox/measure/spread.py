"""The cases that every check begins with: each line looks for a mistake that one makes.  [floor 3]

On the simulator tiles are small, so that every shape has several of them.  On a GPU a kernel takes the tile that
`choose_tile` gives a large problem (the one that is benched), and few kinds of problem, since each is compiled.
"""

from __future__ import annotations

from dataclasses import replace

from ..choose import choose_tile
from ..problem import Problem
from ..variant import Device, Tile, Unsupported, Variant
from .cases import ROW_INPUTS, ROW_LAYOUTS, Case, Rows, parse_problem, parse_tile

QUICK_SIMULATED = [  # problem, tile, input, layout
    ("N_q=17 N_k=19 d=8 H=2 H_kv=1", "8x8", "gauss", "contiguous"),  # ragged both ways, two heads share a key head
    ("N_q=16 N_k=16 d=8 dtype=fp16", "8x8", "gauss", "contiguous"),  # whole tiles only
    ("N_q=17 N_k=17 d=5 causal=bottom_right dtype=bf16", "8x8", "gauss", "contiguous"),
    ("N_q=19 N_k=9 d=8 causal=bottom_right", "8x16", "gauss", "contiguous"),  # the first rows see nothing
    ("N_q=9 N_k=19 d=8 causal=top_left dtype=fp16", "5x7", "gauss", "contiguous"),
    ("N_q=8 N_k=17 d=8", "8x8", "outliers", "contiguous"),  # the last key tile holds one key
    ("N_q=9 N_k=17 d=8", "8x8", "large-logits", "contiguous"),
    ("N_q=17 N_k=9 d=8 H=2 H_kv=2 mask=boolean", "8x8", "gauss", "contiguous"),
    ("N_q=17 N_k=21 d=8 window=3,1 softcap=0.7", "8x8", "gauss", "heads-first"),
    ("N_q=1 N_k=1 d=1", "8x8", "gauss", "contiguous"),
    ("N_q=3 N_k=0 d=8", "8x8", "gauss", "contiguous"),
    ("N_q=0 N_k=3 d=8", "8x8", "gauss", "contiguous"),
]
SIMULATED = QUICK_SIMULATED + [
    *((f"N_q={N_q} N_k={N_k} d=8", "8x8", "gauss", "contiguous") for N_q, N_k in ((7, 9), (8, 15), (9, 16), (15, 7))),
    ("N_q=8 N_k=8 d=8", "16x16", "gauss", "contiguous"),  # one tile, half empty
    ("N_q=33 N_k=31 d=4", "16x16", "gauss", "contiguous"),
    ("N_q=16 N_k=17 d=12 H=4 H_kv=2 dtype=bf16", "16x8", "gauss", "gapped"),
    ("B=2 N_q=9 N_k=9 d=8 H=3 H_kv=1", "8x8", "gauss", "expanded-batch"),
    ("N_q=17 N_k=17 d=8", "8x8", "equal", "contiguous"),
    ("N_q=17 N_k=17 d=8 dtype=bf16", "8x8", "one-hot", "contiguous"),
    ("N_q=9 N_k=17 d=8 dtype=fp16", "8x8", "large-logits", "contiguous"),
    ("N_q=17 N_k=17 d=3 dtype=fp16 softcap=10.0", "8x8", "outliers", "contiguous"),
    ("N_q=9 N_k=17 d=8 scale=-0.3", "8x8", "gauss", "contiguous"),
    ("N_q=9 N_k=17 d=8 scale=0.0", "8x8", "gauss", "contiguous"),
    ("N_q=17 N_k=17 d=8 window=0,0", "8x8", "gauss", "contiguous"),
    ("N_q=17 N_k=19 d=8 align=top_left window=9,-1 dtype=fp16", "8x8", "gauss", "contiguous"),
    ("N_q=16 N_k=16 d=8 causal=bottom_right mask=boolean dtype=bf16", "8x8", "gauss", "contiguous"),
    ("N_q=19 N_k=17 d=8 causal=bottom_right window=3,-1 softcap=0.7", "5x7", "gauss", "gapped"),
    ("B=2 N_q=17 N_k=9 d=20 H=2 H_kv=2", "8x16", "gauss", "heads-first"),
    ("N_q=1 N_k=17 d=8 H=4 H_kv=1 dtype=fp16", "8x8", "gauss", "contiguous"),  # decoding
    ("N_q=17 N_k=1 d=8 dtype=bf16", "8x8", "gauss", "contiguous"),
]

HALF, CAUSAL = "d=64 dtype=fp16", "d=64 dtype=bf16 causal=bottom_right"
QUICK_GPU = [
    (f"B=2 N_q=513 N_k=519 H=4 H_kv=2 {HALF}", None, "gauss", "contiguous"),
    (f"N_q=256 N_k=256 H=2 {HALF}", None, "outliers", "contiguous"),
    (f"N_q=128 N_k=257 {HALF}", None, "large-logits", "contiguous"),
    (f"N_q=1 N_k=1 {HALF}", None, "gauss", "contiguous"),
    (f"N_q=3 N_k=0 {HALF}", None, "gauss", "contiguous"),
    (f"N_q=0 N_k=3 {HALF}", None, "gauss", "contiguous"),
    (f"N_q=513 N_k=513 H=2 {CAUSAL}", None, "gauss", "contiguous"),
    (f"N_q=300 N_k=129 {CAUSAL}", None, "gauss", "heads-first"),  # the first rows see nothing
    (f"N_q=129 N_k=300 {CAUSAL.replace('bottom_right', 'top_left')}", None, "gauss", "contiguous"),
]
FLOAT, BOOLEAN = "d=128 dtype=fp32", "d=40 dtype=fp32 mask=boolean"
WINDOW = "d=64 dtype=fp16 window=70,3 softcap=10.0"
GPU = QUICK_GPU + [
    *((f"N_q={N_q} N_k={N_k} {HALF}", None, "gauss", "contiguous")
      for N_q, N_k in ((15, 17), (31, 33), (63, 65), (64, 64), (127, 129), (129, 127), (2000, 2100))),
    (f"N_q=500 N_k=500 {HALF}", None, "equal", "contiguous"),
    (f"N_q=500 N_k=500 {HALF}", None, "one-hot", "contiguous"),
    (f"B=2 N_q=130 N_k=130 {HALF}", None, "gauss", "expanded-batch"),
    (f"N_q=1 N_k=1000 H=8 H_kv=1 {HALF}", None, "gauss", "contiguous"),  # decoding
    (f"N_q=513 N_k=519 H=4 H_kv=2 {FLOAT}", None, "gauss", "gapped"),
    (f"N_q=256 N_k=129 {FLOAT}", None, "large-logits", "contiguous"),
    (f"N_q=300 N_k=290 H=2 H_kv=2 {BOOLEAN}", None, "gauss", "contiguous"),
    (f"N_q=400 N_k=390 {WINDOW}", None, "gauss", "contiguous"),
]  # fmt: skip

BENCHED = {"B": 4, "H": 16, "H_kv": 16, "N_q": 4096, "N_k": 4096}  # whose tile a kernel is checked with on a GPU


def spread(
    variant: Variant, device: Device, *, quick: bool = False, dtype: str | None = None, tile: Tile | None = None
) -> list[Case]:
    """The cases, in order; dtype and tile, where given, are every case's.

    A dtype that the variant has not becomes its first; what it cannot do is left out.  Raises Infeasible where no tile
    fits.
    """
    if variant.direction == "softmax":
        found = [replace(case, problem=_in(case.problem, variant, dtype)) for case in _rows(quick)]
        return list(dict.fromkeys(found))
    if device.simulated and not variant.tiles:
        lines = QUICK_SIMULATED if quick else SIMULATED
    else:
        lines = QUICK_GPU if quick else GPU
    found = []
    for seed, (problem, usual, input, layout) in enumerate(lines):
        problem = _in(parse_problem(problem), variant, dtype)
        try:
            its = tile or (parse_tile(usual) if usual else tile_of(variant, problem, device))
        except Unsupported:
            continue
        found.append(Case(problem, its, input, layout, seed))
    return list(dict.fromkeys(found))


def tile_of(variant: Variant, problem: Problem, device: Device) -> Tile:
    """The tile that a large problem of this kind takes."""
    return choose_tile(replace(problem, **BENCHED), device, variant)


def _in(problem, variant: Variant, dtype: str | None):
    dtype = dtype or (problem.dtype if problem.dtype in variant.dtypes else variant.dtypes[0])
    return replace(problem, dtype=dtype)


def _rows(quick: bool) -> list[Case]:
    shapes = [Rows(5, 17), Rows(9, 129, "fp16"), Rows(4, 8, "bf16")]
    shapes += [Rows(n, m) for n, m in ((0, 0), (0, 9), (9, 0), (1, 1), (17, 33), (8, 128), (3, 127))]
    found = [Case(shape, None, "gauss", "contiguous", seed) for seed, shape in enumerate(shapes)]
    found += [Case(Rows(3, 600, "fp16"), None, "large", "contiguous", 0)]  # whose rounding a wrong m·log2 e would show
    inputs = [(input, layout) for layout in ROW_LAYOUTS for input in ROW_INPUTS]
    step = 3 if quick else 1
    found += [Case(Rows(5, 17, dtype), None, *both) for dtype in ("fp32", "fp16", "bf16") for both in inputs[::step]]
    return found
