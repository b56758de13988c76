"""Attention in 8 bits: attention_fp8() of inputs that are in e4m3 already, and the two steps that lead there.

    quantize_fp8   Q, K, V in 16 bits -> Quantized
    transpose_v    row-major V in e4m3 -> Vᵀ, as a Quantized has it
    attention_fp8  Quantized -> O, LSE

attention(q, k, v, variant="fwd_v3_fp8") takes 16 bits and quantizes inside.
"""

from __future__ import annotations

import functools

import torch

from . import catalog, target
from .autograd import check_place, on, refuse_if_slow, tile_of
from .mask import Mask
from .problem import NAMES, Problem
from .quantize import (
    E4M3,
    HADAMARD,
    KV_BLOCK,
    Q_BLOCK,
    Quantized,
    check,
    check_inputs,
    check_values,
    quantize,
    transpose_keys,
)
from .variant import HOPPER, Variant

KERNEL = "fwd_v3_fp8"


def attention_fp8(
    x: Quantized, *, causal=False, align="bottom_right", window=(-1, -1), softcap=0.0, scale=None,
    dtype=torch.bfloat16, tile=None, return_lse=False, force=False,
):  # fmt: skip
    """Exact attention of e4m3, on a Hopper GPU or emulated; not differentiable.

    x        a Quantized: quantize_fp8 makes it, or you do, of your own e4m3 and scales
    dtype    of O, float16 or bfloat16
    tile     (Br, Bc), where Bc = x.kv_block if x has scales of blocks; chosen unless given
    The others are those of attention().

    Returns O [B, N_q, H, d]; with return_lse also LSE (B, H, N_q), float32, natural log.
    What is NaN in x becomes NaN in every row that sees it.

    Raises ValueError or TypeError, naming the argument, before anything is launched.  That the scales are finite and
    above 0 takes a look at them, for which the GPU is waited for; not while a CUDA graph is captured.
    """
    if not isinstance(x, Quantized):
        raise TypeError(f"x is {type(x).__name__}: expected a Quantized, e4m3 and its scales, as quantize_fp8 makes it")
    device = target.device()
    check(x, values=False)
    check_place(x.q, device)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype={dtype}: expected torch.float16 or torch.bfloat16, for O")
    (B, N_q, H, d), (N_k, H_kv) = x.q.shape, x.k.shape[1:3]
    problem = Problem(B, H, H_kv, N_q, N_k, d, NAMES[dtype], scale, Mask(causal, align, window), softcap)
    for name, y in vars(x).items():
        if torch.is_grad_enabled() and isinstance(y, torch.Tensor) and y.requires_grad:
            raise ValueError(f"{name} requires gradients: {KERNEL} has no backward; expected torch.no_grad()")
    variant = _variant("block" if x.scales == "block" else "head")
    tile = _tile_for(problem, device, x) if tile is None else tile_of(tile, problem, device, variant)
    launcher = variant.launcher(problem, tile, device)
    launcher.check(x)
    if not (x.q.is_cuda and torch.cuda.is_current_stream_capturing()):
        check_values(x)
    if device.simulated and not force:
        refuse_if_slow(problem, "fwd", variant.pace)
    O = torch.empty(x.q.shape, dtype=dtype, device=x.q.device)
    LSE = torch.empty(B, H, N_q, device=x.q.device)
    if N_k == 0:
        O.zero_(), LSE.fill_(-torch.inf)
    elif O.numel():
        with on(x.q.device):
            launcher.attend(problem, x, O, LSE)
    return (O, LSE) if return_lse else O


def quantize_fp8(q, k, v, *, scales="block", q_block=Q_BLOCK, kv_block=None, incoherent=True, seed=0) -> Quantized:
    """Q, K, V in e4m3 with their scales, for attention_fp8.

    q           (batch, N_q, heads, head_dim), float32, float16 or bfloat16, any strides; k, v likewise
    scales      one for each 'block', 'head' or 'tensor'
    q_block     rows of Q that share a scale, a multiple of 64 for attention_fp8
    kv_block    keys that do; None: as many as the tile has that the kernel takes for so many, without a mask
    incoherent  Q and K are rotated against outliers: random signs by `seed`, then a Hadamard matrix

    On a Hopper GPU, for 16 bits, head_dim 64, 128 and 256, and blocks that share a thread block, this is one pass that
    reads the inputs once (device/quantize.py); else the reference in torch (quantize.py).  Both give the same bits.
    Block scales of what is 0 are 1, NaN and Inf become NaN and enter no scale: see quantize.quantize.

    Raises ValueError or TypeError, naming the argument.
    """
    if kv_block is None:
        N_k, _, d = k.shape[1:] if isinstance(k, torch.Tensor) and k.ndim == 4 else (0, 0, 0)
        kv_block = _usual_keys(N_k, d) if d in HADAMARD else KV_BLOCK
    check_inputs(q, k, v, scales, q_block, kv_block)
    options = {"scales": scales, "q_block": q_block, "kv_block": kv_block, "incoherent": incoherent, "seed": seed}
    if _on_hopper(q):
        from .device import quantize as fused

        if fused.takes(q, k, v, scales, q_block, kv_block):
            with on(q.device):
                return fused.quantize(q, k, v, **options)
    return quantize(q, k, v, **options)


def transpose_v(v):
    """Vᵀ (batch, heads, head_dim, N_pad) of a row-major V (batch, N, heads, head_dim) in e4m3, any strides.

    N_pad is N up to a multiple of 16, padded with zeros; inside every 16 the keys stand where the kernel wants them.
    On a Hopper GPU, for head_dim 64, 128 and 256, in one pass; else in torch.  Raises ValueError or TypeError.
    """
    if not isinstance(v, torch.Tensor) or v.dtype != E4M3:
        given = f"has dtype {v.dtype}" if isinstance(v, torch.Tensor) else f"is {type(v).__name__}"
        raise TypeError(f"v {given}: expected a torch.Tensor of {E4M3}")
    if v.ndim != 4:
        raise ValueError(f"v has shape {tuple(v.shape)}: expected 4 axes (batch, seqlen, heads, head_dim)")
    if _on_hopper(v) and v.shape[-1] in HADAMARD:
        from .device import quantize as fused

        with on(v.device):
            return fused.transpose_keys(v)
    return transpose_keys(v)


def _on_hopper(x) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


@functools.cache
def _variant(scales: str) -> Variant:
    return catalog.find(KERNEL if scales == "block" else f"{KERNEL} scales={scales}")


def _usual_keys(N_k: int, d: int) -> int:
    return _variant("block").usual(Problem(1, 1, 1, 1, N_k, d, "bf16"), HOPPER).Bc


def _tile_for(problem, device, x):
    from .kernels.fwd_v3_fp8 import tile_for

    return tile_for(problem, device, x)
