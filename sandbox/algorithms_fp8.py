"""FlashAttention-3 in FP8, tile by tile, rounded where the kernel rounds: runnable pseudo-code.  [floor 0: torch]

    flash_attention_3_fp8    2407.08608, section 3.3, with scales of V's blocks folded into the rescaling of O
    flash_attention_16bit    the same loop with 16-bit P and no scale: FlashAttention-2's and -3's arithmetic
    standard_attention       S and P whole, each rounded to 16 bits: the paper's baselines

V_j = σ_j·V̂_j, V̂_j in e4m3.  O is kept in units of σ of the block that was visited last, and P̃ is 2⁸ times P, so that
e4m3 has room for small ones.  Both leave at the end:

    P̃ = 2⁸·exp(S - m)     Õ ← α·(σ_prev/σ_j)·Õ + e4m3(P̃)·V̂_j     l sums P̃ before its rounding
    O = σ_last·Õ / l       LSE = m + ln l - 8·ln 2

A lazy kernel rescales O seldom: m follows the maximum only where it has grown by more than P̃ has room for, and then to
a little above it; and where σ changes m moves by log(σ_j/σ_prev), so that α·(σ_prev/σ_j) is 1, unless P̃ would become
too small for e4m3.

Keys are visited from last to first, as the kernel does.  All rows of all heads go along at once: how many a row block
has changes nothing, but for a lazy kernel, where those of a warpgroup decide together.  The products' terms are exact
in fp32.  How they are summed, a choice of three:

    fp32         every sum rounds as fp32 does
    fp22         a model of Hopper's tensor cores: after every 32 terms the accumulator keeps 13 bits of its mantissa
                 and drops the rest; O is such an accumulator
    two_level    the same, but each tile's product starts at 0 and is then added to O in fp32
"""

from __future__ import annotations

import math

import torch

from .mask import Mask
from .quantize import Quantized, restore_keys, round_e4m3, transpose_keys

INF, LN2 = math.inf, math.log(2)
FULL = Mask()
ACCUMULATE = ("fp32", "fp22", "two_level")
ROOM = 0.8  # powers of 2: a lazy m stays where a maximum is at most so much above it,
FIRST, SLACK = 2.0, 1.0  # else goes above that: of the first block, and of others
MOST_SUNK = 0.5  # powers of 2 that P̃ may lose to V's scales
WARPGROUP_ROWS = 64  # of a lazy kernel, that decide together
TERMS, KEPT = 32, -1 << (23 - 13)  # of one tensor-core instruction in 8 bits; the bits of fp32 that fp22 keeps
ROUND = {
    "e4m3": round_e4m3, "fp16": lambda x: x.half().float(), "bf16": lambda x: x.bfloat16().float(), "fp32": lambda x: x,
}  # fmt: skip


@torch.no_grad()
def flash_attention_3_fp8(
    x: Quantized, *, Bc=128, scale=None, mask=FULL, seen=None, softcap=0.0, exponent=8, P_dtype="e4m3",
    accumulate="fp32", order=-1, lazy=False,
):  # fmt: skip
    """O [B, N_q, H, d] and LSE [B, H, N_q], fp32.

    mask, seen    the band, and a bool tensor broadcastable to [B, H, N_q, N_k]: True = seen
    exponent      P̃ = 2^exponent·P; P_dtype: what P̃ is rounded to
    order         -1 visits keys from last to first, 1 the other way
    lazy          as the kernel does; else O is rescaled at every step

    x may hold other dtypes than e4m3, for what one of the roundings does alone.
    """
    if x.scales == "block" and (Bc % x.kv_block or lazy and Bc != x.kv_block):
        raise ValueError(f"Bc={Bc}: expected {'' if lazy else 'a multiple of '}kv_block={x.kv_block}")
    (B, N_q, H, d), (N_k, H_kv) = x.q.shape, x.k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    Q, K, V = (_heads(y, H_kv) for y in (x.q, x.k, restore_keys(x.v, N_k)))
    q_scale = _rows(x.q_scale, x.q_block, N_q, H_kv).unsqueeze(-1)
    k_scale = _rows(x.k_scale, x.kv_block, N_k, H_kv).unsqueeze(-2)
    lo, hi = mask.band(N_q, N_k)
    i, j = torch.arange(N_q, device=Q.device)[:, None], torch.arange(N_k, device=Q.device)
    if seen is not None:
        seen = seen.expand(B, H, N_q, N_k).unflatten(1, (H_kv, -1))

    O, l, m = torch.zeros_like(Q), torch.zeros_like(Q[..., :1]), torch.full_like(Q[..., :1], -INF)
    sigma = torch.full_like(l, math.nan)  # the unit of O's rows, once they have seen a block
    sunk = torch.zeros_like(l)  # powers of 2 that V's scales have made m larger by
    for j0 in range(0, N_k, Bc)[::order]:
        keys = slice(j0, min(j0 + Bc, N_k))
        band = mask.query_blocks(j0, 1, Bc, N_q, N_k)
        rows = ..., slice(band.start, band.stop), slice(None)  # that see any of these keys
        S = _product(Q[rows], K[..., keys, :].mT, accumulate) * (q_scale[rows] * scale) * k_scale[..., keys]
        if softcap:
            S = softcap * torch.tanh(S / softcap)
        visible = (j[keys] >= i[band.start : band.stop] + lo) & (j[keys] <= i[band.start : band.stop] + hi)
        if seen is not None:
            visible = visible & seen[..., band.start : band.stop, keys]
        if not visible.all():
            S = S.masked_fill(~visible, -INF)

        if lazy:
            begun = _begun(mask, N_q, N_k, j0, i)
            sigma_j = x.v_scale[..., j0 // x.kv_block, None, None, None]
            slack = torch.where(sigma.isnan(), FIRST, SLACK)
            rise = torch.where(begun & ~sigma.isnan(), (sigma_j / sigma).log2(), 0)
            sunk, sigma = (sunk - rise).clamp(min=0), torch.where(begun, sigma_j, sigma)
            lift = torch.where(sunk > MOST_SUNK, sunk, 0)
            sunk, m, l, O = sunk - lift, m - (rise + lift) * LN2, l * (rise + lift).exp2(), O * lift.exp2()

        m_old, top = m[rows], S.amax(-1, keepdim=True)
        if lazy:
            m_new = torch.where(top > m_old + ROOM * LN2, top + slack[rows] * LN2, m_old)
        else:
            m_new = torch.maximum(m_old, top)
        base = m_new.masked_fill(m_new == -INF, 0)
        P_tile = (S - base).exp_().mul_(2.0**exponent)
        alpha = (m_old - base).exp()
        l[rows] = alpha * l[rows] + P_tile.sum(-1, keepdim=True)
        m[rows], O[rows] = m_new, O[rows] * alpha

        step = min(x.kv_block, Bc)
        for b0 in range(keys.start, keys.stop, step)[::order]:  # the tile's blocks of V, each with its scale
            block = slice(b0, min(b0 + step, keys.stop))
            if not lazy:
                sigma_j = x.v_scale[..., b0 // x.kv_block, None, None, None]
                O, sigma = O * torch.where(sigma.isnan(), 1, sigma / sigma_j), sigma_j.expand_as(sigma)
            P_block = ROUND[P_dtype](P_tile[..., block.start - j0 : block.stop - j0])
            O[rows] = _product(P_block, V[..., block, :], accumulate, onto=O[rows])
    O = O / l.masked_fill(l == 0, 1) * sigma.nan_to_num(1)
    LSE = torch.where(l == 0, -INF, m + l.log() - exponent * LN2)
    return O.flatten(1, 2).transpose(1, 2).contiguous(), LSE.flatten(1, 2)[..., 0]


def _begun(mask, N_q, N_k, j0, i):
    """bool [N_q, 1]: whether the warpgroup that row i is in has begun when the keys from j0 on are visited."""
    last = torch.clamp(i // WARPGROUP_ROWS * WARPGROUP_ROWS + WARPGROUP_ROWS, max=N_q) - 1
    return j0 < torch.clamp(last + mask.band(N_q, N_k)[1] + 1, min=1)


def flash_attention_16bit(q, k, v, *, Bc=128, dtype="fp16", order=-1, **options):
    """O and LSE of 16-bit Q, K, V, fp32: S and the sums in fp32, P = exp(S - m) rounded to 16 bits, not normalised."""
    return flash_attention_3_fp8(plain(q, k, v), Bc=Bc, P_dtype=dtype, exponent=0, order=order, **options)


def plain(q, k, v) -> Quantized:
    """Q, K, V as they are, in a Quantized with scales of 1."""
    one = torch.ones(q.shape[0], q.shape[2], 1, device=q.device)
    one_kv = one[:, :1].expand(-1, k.shape[2], 1)
    return Quantized(q, k, transpose_keys(v), one, one_kv, one_kv, max(1, q.shape[1]), max(1, k.shape[1]), "head")


@torch.no_grad()
def standard_attention(q, k, v, *, scale=None, mask=FULL, dtype="fp16", rows=1024):
    """O [B, N_q, H, d], fp32.  Q Kᵀ, S = scale·Q Kᵀ and P = softmax(S) each become `dtype` on the way; P V is not
    rounded, and `rows` of Q at a time change nothing."""
    (N_q, _, d), (N_k, H_kv) = q.shape[1:], k.shape[1:3]
    scale, to = d**-0.5 if scale is None else scale, ROUND[dtype]
    Q, K, V = (_heads(y, H_kv) for y in (q, k, v))
    lo, hi = mask.band(N_q, N_k)
    O, j = torch.zeros_like(Q), torch.arange(N_k, device=q.device)
    for i0 in range(0, N_q, rows):
        i = torch.arange(i0, min(i0 + rows, N_q), device=q.device)[:, None]
        S = to(to(Q[..., i0 : i0 + rows, :] @ K.mT) * scale)
        S = S.masked_fill((j < i + lo) | (j > i + hi), -INF)
        empty = (S == -INF).all(-1, keepdim=True)
        P = to(torch.softmax(S.masked_fill(empty, 0), -1)).masked_fill(empty, 0)
        O[..., i0 : i0 + rows, :] = P @ V
    return O.flatten(1, 2).transpose(1, 2).contiguous()


def _heads(y, H_kv):
    """[B, N, H, d] as [B, H_kv, group, N, d], fp32."""
    return y.float().transpose(1, 2).unflatten(1, (H_kv, -1))


def _rows(scale, block, N, H_kv):
    """Scales [B, H, n] as [B, H_kv, group, N]."""
    return scale.repeat_interleave(block, -1)[..., :N].unflatten(1, (H_kv, -1))


def _product(A, B, accumulate, onto=None):
    """onto + A B, by the rule of that name."""
    if accumulate == "fp32":
        return A @ B if onto is None else onto + A @ B
    if accumulate == "two_level" and onto is not None:
        return onto + _product(A, B, "fp22")
    total = 0 if onto is None else onto
    for k0 in range(0, A.shape[-1], TERMS):
        total = total + A[..., k0 : k0 + TERMS] @ B[..., k0 : k0 + TERMS, :]
        total = (total.view(torch.int32) & KEPT).view(torch.float32)
    return total
