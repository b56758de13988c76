"""From 16 bits to 8: e4m3 with one scale per tensor, head or block, after incoherent processing.  [floor 0: torch]

    quantize        Q, K, V -> Quantized: e4m3 and scales; V turned into Vᵀ, its keys in the order that the kernel wants
    dequantize      and back, in float32
    rotate, signs   incoherent processing: random signs, then a Hadamard matrix over the head dimension
    transpose_keys  row-major V -> Vᵀ, padded and permuted; restore_keys: and back
    check           whether a Quantized can be trusted, or one line that says why not

What they do is section 3.3 of FlashAttention-3 (2407.08608).  Its block quantization and its incoherent processing
leave Q Kᵀ what it was: the scales multiply S, and (Q M)(K M)ᵀ = Q Kᵀ for an orthogonal M.

e4m3 (torch.float8_e4m3fn) has 3 bits of mantissa: 448 is the largest number, 2⁻⁶ the smallest normal one, 2⁻⁹ the
smallest of all; it has NaN and no Inf.  A number x becomes x·(1/scale), to nearest even, ±448 at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

E4M3 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_MIN = 2.0**-64  # of a scale: neither its inverse overflows nor the ratio of two, see `quantize`
Q_BLOCK, KV_BLOCK = 64, 64  # rows of Q, and keys, that share a scale
KEYS = 16  # inside which V's keys are permuted, and to a multiple of which Vᵀ is padded
SCALES = ("tensor", "head", "block")
NAMES = ("q_scale", "k_scale", "v_scale")
HADAMARD = (64, 128, 256)  # head dimensions that can be rotated


@dataclass(frozen=True)
class Quantized:
    """Q, K, V in e4m3.  A number is worth scale · e4m3.

    q          e4m3 [B, N_q, H, d];  k  e4m3 [B, N_k, H_kv, d]; both rotated where processing was incoherent
    v          e4m3 [B, H_kv, d, N_pad]: what `transpose_keys` makes
    q_scale    fp32 [B, H, n_q];  k_scale, v_scale  fp32 [B, H_kv, n_k]; n = ⌈N / block⌉, 1 unless scales = 'block'
    q_block, kv_block    rows and keys that share a scale; all of them unless scales = 'block'
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    q_block: int
    kv_block: int
    scales: str


@torch.no_grad()
def quantize(q, k, v, *, scales="block", q_block=Q_BLOCK, kv_block=KV_BLOCK, incoherent=True, seed=0) -> Quantized:
    """Q, K, V [B, N, H, d] in fp16, bf16 or fp32, on any device.

    A scale is amax/448 over the finite numbers of its tensor, head or block, and 1 where these are all 0; of a block
    of V the next power of 2, since a kernel has P̃ bear what two blocks' scales differ by, and P̃ of a row's largest
    score, itself a power of 2, then remains one: exact, where one key outweighs all others.  What is not finite becomes
    NaN; rotated, it takes its whole row along.  The last block may have fewer rows.

    A scale is at least 2⁻⁶⁴: numbers below 2⁻⁷⁰ ≈ 1e-21 lose bits, then vanish.  So 1/scale stays finite, and so does
    what O is multiplied by between two blocks of V, for |v| up to 3e10 and a million keys.

    Raises ValueError or TypeError, naming the argument.
    """
    check_inputs(q, k, v, scales, q_block, kv_block)
    q, k, v = q.float(), k.float(), v.float()
    if incoherent:
        sign = signs(q.shape[-1], seed).to(q.device)
        q, k = rotate(q, sign), rotate(k, sign)
    if scales != "block":
        q_block, kv_block = max(1, q.shape[1]), max(1, k.shape[1])
    (q, q_scale), (k, k_scale) = _cast(q, scales, q_block), _cast(k, scales, kv_block)
    v, v_scale = _cast(v, scales, kv_block, power_of_2 if scales == "block" else None)
    return Quantized(q, k, transpose_keys(v), q_scale, k_scale, v_scale, q_block, kv_block, scales)


@torch.no_grad()
def dequantize(x: Quantized):
    """q, k, v [B, N, H, d] in float32; q and k as they were rotated."""
    v = restore_keys(x.v, x.k.shape[1])
    parts = (x.q, x.q_scale, x.q_block), (x.k, x.k_scale, x.kv_block), (v, x.v_scale, x.kv_block)
    return tuple(each.float() * per_row(scale, block, each.shape[1]) for each, scale, block in parts)


def per_row(scale, block, N):
    """Scales [B, H, n] as [B, N, H, 1]: one for each row."""
    return scale.repeat_interleave(block, -1)[..., :N].transpose(1, 2).unsqueeze(-1)


def round_e4m3(x):
    """x in float32, at the nearest number of e4m3, ties to even, ±448 at most; NaN where x is not finite."""
    return to_e4m3(x).float()


def to_e4m3(x):
    # What lies past 448 becomes 448 or NaN, as the version of torch has it: it is decided here.
    return x.clamp(-FP8_MAX, FP8_MAX).masked_fill(~x.isfinite(), math.nan).to(E4M3)


def _cast(x, scales, block, rounded=None):
    """e4m3 like x [B, N, H, d], and its scales [B, H, n], rounded if so told."""
    B, N, H, _ = x.shape
    amax = x.abs().masked_fill(~x.isfinite(), 0).amax(-1).transpose(1, 2)  # [B, H, N]
    if scales == "tensor":
        amax = amax.amax().expand(B, H, 1) if amax.numel() else amax.new_zeros(B, H, 1)
    else:
        n = max(1, -(-N // block)) if scales == "head" else -(-N // block)
        padded = amax.new_zeros(B, H, n * block)
        padded[..., :N] = amax
        amax = padded.unflatten(-1, (n, block)).amax(-1)
    scale = scale_of(amax) if rounded is None else rounded(scale_of(amax))
    return to_e4m3(x * per_row(1 / scale, block, N)), scale


def scale_of(amax):
    return torch.where(amax == 0, 1.0, (amax * (1 / FP8_MAX)).clamp(min=SCALE_MIN))


def power_of_2(scale):
    """The next one up; fp32, normal."""
    return (scale.view(torch.int32) + 0x7FFFFF & -0x800000).view(torch.float32)


# ---- incoherent processing ------------------------------------------------------------------------------------------


def signs(d: int, seed: int = 0):
    """±1, fp32 [d]: the same for every head, and on every machine."""
    bits = np.random.PCG64([seed, d]).random_raw(d) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def rotate(x, signs):
    """x·diag(signs)·Hadamard/√d over the last axis, in fp32: an outlier is spread over all d entries.

    Sylvester's matrix, by butterflies between neighbours first, then between pairs, up to halves.
    """
    d = x.shape[-1]
    if d not in HADAMARD:
        raise ValueError(f"head_dim d={d}: incoherent processing has Hadamard matrices of {_words(HADAMARD)}")
    x = x.float() * signs.to(x.device)
    width = 1
    while width < d:
        a, b = x.unflatten(-1, (d // (2 * width), 2, width)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        width *= 2
    return x * d**-0.5


# ---- Vᵀ -------------------------------------------------------------------------------------------------------------
#
# Hopper multiplies e4m3 from shared memory only where the summed index runs fastest, so V is stored transposed.  And P
# leaves the first product in other lanes than the second one reads it from; but P V sums over keys, whose order is
# free.  So V's keys move inside every 16 of them to where P has theirs: key 8a + 2q + b to slot 4q + 2a + b.


def transpose_keys(v):
    """Vᵀ [B, H, d, N_pad] of V [B, N, H, d]: zeros up to a multiple of 16 keys, then permuted; of any dtype."""
    B, N, H, d = v.shape
    groups = -(-N // KEYS)
    vT = v.new_zeros(B, H, d, groups * KEYS)
    vT[..., :N] = v.permute(0, 2, 3, 1)
    return vT.unflatten(-1, (groups, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def restore_keys(vT, N: int):
    """V [B, N, H, d] of Vᵀ."""
    keys = vT.unflatten(-1, (vT.shape[-1] // KEYS, 4, 2, 2)).transpose(-3, -2).flatten(-4)
    return keys[..., :N].permute(0, 3, 1, 2).contiguous()


# ---- what is refused ------------------------------------------------------------------------------------------------


def check(x: Quantized, *, values=True):
    """Raises ValueError or TypeError in one line.  `values` looks into the scales too, which waits for a GPU."""
    for name, axes in (("q", "B, N_q, H, d"), ("k", "B, N_k, H_kv, d"), ("v", "B, H_kv, d, N_pad")):
        tensor = getattr(x, name)
        _check_tensor(name, tensor, f"e4m3 [{axes}]")
        if tensor.dtype != E4M3:
            raise TypeError(f"{name} has dtype {tensor.dtype}: expected {E4M3}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected 4 axes, [{axes}]")
    _check_heads(x.q, x.k)
    if x.scales not in SCALES:
        raise ValueError(f"scales={x.scales!r}: expected one of {', '.join(SCALES)}")
    (B, N_q, H, d), (N_k, H_kv) = x.q.shape, x.k.shape[1:3]
    N_pad = -(-N_k // KEYS) * KEYS
    if x.v.shape != (B, H_kv, d, N_pad):
        hint = "; row-major V is what transpose_v takes" if x.v.shape == x.k.shape else ""
        raise ValueError(
            f"v has shape {tuple(x.v.shape)}: expected Vᵀ, (B, H_kv, d, N_pad) = {(B, H_kv, d, N_pad)}{hint}"
        )
    _check_blocks(x.q_block, x.kv_block)
    for name, block, N in (("q_block", x.q_block, N_q), ("kv_block", x.kv_block, N_k)):
        if x.scales != "block" and block < N:
            raise ValueError(f"{name}={block}: expected all {N} rows, by scales={x.scales!r}")
    for name, heads, N, block in (
        ("q_scale", H, N_q, x.q_block),
        ("k_scale", H_kv, N_k, x.kv_block),
        ("v_scale", H_kv, N_k, x.kv_block),
    ):
        scale, shape = getattr(x, name), (B, heads, -(-N // block) if x.scales == "block" else 1)
        _check_tensor(name, scale, f"fp32 of shape {shape}")
        if scale.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {scale.dtype}: expected torch.float32")
        if scale.shape != shape:
            raise ValueError(f"{name} has shape {tuple(scale.shape)}: expected {shape}, by scales={x.scales!r}")
    _check_devices(x.q, **{name: getattr(x, name) for name in ("k", "v", *NAMES)})
    if values:
        check_values(x)


def check_values(x: Quantized):
    """Raises ValueError where a scale is not finite and above 0; a GPU is waited for, once."""
    scales = {name: getattr(x, name) for name in NAMES}
    bad = {name: ~((scale > 0) & scale.isfinite()) for name, scale in scales.items()}
    if torch.stack([each.any() for each in bad.values()]).any():
        name = next(name for name, each in bad.items() if each.any())
        raise ValueError(f"{name} holds {scales[name][bad[name]][0].item()}: expected finite numbers above 0")


def check_inputs(q, k, v, scales, q_block, kv_block):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "(batch, seqlen, heads, head_dim)")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{name} has dtype {x.dtype}: expected float16, bfloat16 or float32")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 axes (batch, seqlen, heads, head_dim)")
    if k.shape != v.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}: expected k's, {tuple(k.shape)}")
    _check_devices(q, k=k, v=v)
    _check_heads(q, k)
    if scales not in SCALES:
        raise ValueError(f"scales={scales!r}: expected one of {', '.join(SCALES)}")
    _check_blocks(q_block, kv_block)


def _check_devices(q, **others):
    for name, x in others.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}: expected q's device, {q.device}")


def _check_tensor(name, x, expected):
    if not isinstance(x, torch.Tensor):
        there = "missing" if x is None else type(x).__name__
        raise TypeError(f"{name} is {there}: expected a torch.Tensor, {expected}")


def _check_heads(q, k):
    (B, _, H, d), H_kv = q.shape, k.shape[2]
    if (k.shape[0], k.shape[3]) != (B, d):
        raise ValueError(f"k has shape {tuple(k.shape)}: expected q's batch {B} and head_dim {d}")
    if H_kv == 0 and H > 0 or H_kv and H % H_kv:
        raise ValueError(f"q has {H} heads, k {H_kv}: heads of q must be a multiple of those of k")


def _check_blocks(q_block, kv_block):
    for name, block in (("q_block", q_block), ("kv_block", kv_block)):
        if isinstance(block, bool) or not isinstance(block, int):
            raise TypeError(f"{name}={block!r}: expected an integer")
        if block < 1:
            raise ValueError(f"{name}={block}: expected a count of rows >= 1")


def _words(numbers):
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
