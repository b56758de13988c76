"""The gate of a kernel whose products take e4m3: against what its roundings cost, emulated.  [floor 3]

E is the kernel's algorithm emulated (algorithms_fp8) with its tile and options, on what the reference quantizes
(quantize.py), rounded to O's dtype.

RMSE    sqrt(mean (O - O*)²) <= 1.1 sqrt(mean (E - O*)²), O* the oracle on the inputs as they were in 16 bits
O       |O - E| <= 2u₈·A + S·A + N_k/32·t·A + 2⁻¹⁵·Σ_j |v_j| + u·|E| elementwise, A_i = Σ_j p_ij·|v_j|, on the quantized
        numbers: kernel and emulation round the same P̃, each by u₈ = 2⁻⁴ at most, or by 2⁻¹⁰ where it is subnormal (of
        2⁵ or more that a row's largest has); tensor cores keep 13 bits, t = 2⁻¹³, of the sum of every 32 terms
S       4t·(1 + max_j scale·Σ_c |q_c·k_jc|): what that makes of a score, by reference.py's own derivation for fp32
LSE     |LSE - LSE_E| <= 4t·(1 + max_j scale·Σ_c |q_c·k_jc| + |LSE|), in the same way, and t·(d + d/32)·max_j scale·R_j:
        an instruction aligns its 32 products, and the sum so far, to the largest of them, of which each then loses
        up to t; R_j = (Σ_c (q_c·k_jc)²)^½ is no less than the largest.  Where one channel outweighs all others, that is
        most of it

What is not finite in E must be so in O.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import reference
from ..algorithms_fp8 import TERMS, flash_attention_3_fp8
from ..problem import Problem
from ..quantize import Quantized, dequantize
from ..reference import UNIT, U
from ..variant import Tile

E4M3, TENSOR_CORE, SUBNORMAL = 2.0**-4, 2.0**-13, 2.0**-15
WORSE = 1.1  # than the emulation, at most


def allowances(problem: Problem, tile: Tile, x: Quantized, stars: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """output -> (its emulation, allowed absolute error), like those of gate.py; stars are the oracle's."""
    if not problem.N_k:  # nothing is seen
        return {name: (star, torch.zeros_like(star)) for name, star in zip(("O", "LSE"), stars)}
    options = {"scale": problem.scale, "mask": replace(problem.mask, boolean=False), "softcap": problem.softcap}
    O, LSE = flash_attention_3_fp8(x, Bc=tile.Bc, lazy=True, **options)
    O, LSE = O.to(problem.torch_dtype).double(), LSE.double()
    q, k, v = (y.nan_to_num(0) for y in dequantize(x))
    p = replace(problem, dtype="fp32")
    A, _ = reference.forward(p, q, k, v.abs())
    S = reference.fp32_allowance_forward(p, q, k, v) * (TENSOR_CORE / U)
    total = v.abs().sum(1, keepdim=True).repeat_interleave(problem.group, 2)
    allowed = A * (2 * E4M3 + problem.N_k / TERMS * TENSOR_CORE) + S + SUBNORMAL * total
    allowed += UNIT[problem.dtype] * O.abs().nan_to_num(0) + 2.0**-126
    LSE_allowed = reference.fp32_allowance_lse(p, q, k) * (TENSOR_CORE / U) + 2.0**-126
    largest = (abs(problem.scale) * reference.reach(p, q.square(), k.square())).sqrt()  # |scale|·max_j R_j
    LSE_allowed += TENSOR_CORE * (problem.d + problem.d / TERMS) * largest
    return {"O": (O, allowed), "LSE": (LSE, LSE_allowed)}


def rmse(O: torch.Tensor, E: torch.Tensor, O_star: torch.Tensor) -> tuple[float, float]:
    """Of O, and of E, from O*: where all three are finite; 0 where nothing is."""
    finite = O.isfinite() & E.isfinite() & O_star.isfinite()
    if not finite.any():
        return 0.0, 0.0
    return tuple(float((y.double() - O_star)[finite].square().mean().sqrt()) for y in (O, E))
