"""Hypothesis strategies: problems, tiles and inputs that look for the edges."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sandbox import Mask, Problem, target
from sandbox.measure.gate import Inputs, gaussian
from sandbox.variant import Tile

SIMULATED = target.KIND == "simulator"

# What a kernel is compiled for: (d, dtype, tile).  Free on the simulator; a few seconds each on a GPU, hence few.
GPU_BUILDS = [
    (64, "fp32", Tile(64, 64)), (128, "fp16", Tile(32, 32)), (40, "bf16", Tile(16, 32)), (256, "fp16", Tile(16, 16)),
    (7, "fp32", Tile(24, 17)),
]  # fmt: skip
GPU_MASKS = [(False, False, 0.0), (True, False, 0.0), (False, True, 0.0), (True, False, 15.0)]  # band, boolean, softcap

FILLS = ("gauss", "equal", "one-hot", "outliers", "large logits")
LAYOUTS = ("contiguous", "heads first", "gapped", "expanded batch")


@st.composite
def builds(draw):
    """(d, dtype, tile, banded, boolean, softcap)."""
    if not SIMULATED:
        return *draw(st.sampled_from(GPU_BUILDS)), *draw(st.sampled_from(GPU_MASKS))
    d = draw(st.sampled_from([1, 3, 4, 8, 12, 16, 20]))
    dtype = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    tile = Tile(*draw(st.sampled_from([(4, 4), (8, 8), (16, 16), (8, 16), (16, 8), (5, 7)])))
    return d, dtype, tile, draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.7, 10.0]))


def sizes(step: int):
    """0, 1 and the neighbours of multiples of a tile's side."""
    most = 3 * step if not SIMULATED else min(3 * step, 34)
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
def cases(draw):
    """(problem, tile, inputs)."""
    d, dtype, tile, banded, boolean, softcap = draw(builds())
    H_kv, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 3)]))
    N_q, N_k = draw(sizes(tile.Br)), draw(sizes(tile.Bc))
    if draw(st.booleans()):
        N_k = N_q
    scale = draw(st.sampled_from([None, None, 1.0, -0.3, 0.0]))
    B = draw(st.integers(1, 2))
    problem = Problem(B, H_kv * group, H_kv, N_q, N_k, d, dtype, scale, draw(masks(banded, boolean)), softcap)
    fill, layout = draw(st.sampled_from(FILLS)), draw(st.sampled_from(LAYOUTS))
    return problem, tile, filled(problem, fill, layout, draw(st.integers(0, 2**20)))


def filled(problem: Problem, fill: str, layout: str, seed: int) -> Inputs:
    """Inputs of that kind and memory layout."""
    x = gaussian(problem, seed, target.torch_device())
    q, k, v, mask, dO = x.q, x.k, x.v, x.mask, x.dO
    if fill == "equal":
        q, k = torch.full_like(q, 0.5), torch.full_like(k, -0.25)
    elif fill == "one-hot":
        q, k, v = ((y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (q, k, v))
    elif fill == "outliers" and q.numel() and k.numel():
        q, k = q.clone(), k.clone()
        q[..., 0] *= 12
        k[:, ::5] *= 6
    elif fill == "large logits":
        reach = (1e4 / max(abs(problem.scale), 1e-3)) ** 0.5
        q, k = (y.sign() * (reach / problem.d**0.5) for y in (q, k))
    if mask is not None and seed % 3 == 0 and mask.shape[2]:
        mask = mask.clone()
        mask[:, :, seed % mask.shape[2]] = False  # a row that sees nothing
    if mask is not None and seed % 3 == 1:
        mask = mask[:1, :1]  # broadcast
    return Inputs(*(laid_out(y, layout) for y in (q, k, v)), mask, laid_out(dO, layout))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gapped":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded batch":
        return x[:1].expand_as(x)
    return x
