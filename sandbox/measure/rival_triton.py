"""FlashAttention-2's forward in Triton: what a compiler makes of the same algorithm.
[FA2, 2307.08691, Algorithm 1 and §3.1; floor 3]

A program owns Br rows of Q and walks along the key blocks, as `fwd_v2` does.  Tiles that are seen whole come first, in
a loop without a mask; those that the diagonal or the end of the sequence cuts come last, in a loop that pays for one.
Scores stay unscaled until they enter 2^x, so that scale and log2 e cost one multiply-add.  Which warp does what, and
when a tile is copied, is left to Triton; its tile is the fastest of TILES, timed by triton.autotune for each shape.

Imported only where `triton` is asked for: the rest of the package does not need it.
"""

from __future__ import annotations

import triton
import triton.language as tl

DTYPES = ("fp16", "bf16")
TILES = {  # d -> (Br, Bc, warps, stages of copies in flight)
    64: ((128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3)),
    128: ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
    256: ((64, 64, 8, 2), (128, 32, 8, 3), (128, 64, 8, 2)),
}
LOG2_E, LN_2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)


@triton.jit
def _walk(
    rO, m, l, rQ, K, V, first, end, i, N, scale, Kn, Kd, Vn, Vd, d: tl.constexpr, Bc: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Lines 6 to 11 for keys first .. end: O, m and l after them; m is in units of log2."""
    j, c = tl.arange(0, Bc), tl.arange(0, d)
    K += tl.cast(first, tl.int64) * Kn
    V += tl.cast(first, tl.int64) * Vn
    for j0 in tl.range(first, end, Bc):
        # S = Q Kᵀ  [Br, Bc]
        if MASKED:
            Kt = tl.load(K + c[:, None] * Kd + j[None, :] * Kn, mask=(j0 + j < N)[None, :], other=0.0)
        else:
            Kt = tl.load(K + c[:, None] * Kd + j[None, :] * Kn)
        S = tl.dot(rQ, Kt)
        if MASKED:
            seen = (j0 + j < N)[None, :]
            if CAUSAL:
                seen = seen & (j0 + j[None, :] <= i[:, None])
            S = tl.where(seen, S, float("-inf"))

        # m, P̃ = exp(S - m), l
        m_new = tl.maximum(m, tl.max(S, 1) * scale)
        P = tl.exp2(S * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(P, 1)
        m = m_new

        # O = diag(exp(m_old - m)) O + P̃ V  [Br, d]
        if MASKED:
            rV = tl.load(V + j[:, None] * Vn + c[None, :] * Vd, mask=(j0 + j < N)[:, None], other=0.0)
        else:
            rV = tl.load(V + j[:, None] * Vn + c[None, :] * Vd)
        rO = tl.dot(P.to(rV.dtype), rV, rO * alpha[:, None])
        K += Bc * Kn
        V += Bc * Vn
    return rO, m, l


@triton.jit
def fwd(
    Q, K, V, O, LSE, B, H, group, N, scale, Qb, Qn, Qh, Qd, Kb, Kn, Kh, Kd, Vb, Vn, Vh, Vd, Ob, On, Oh, Od,
    d: tl.constexpr, Br: tl.constexpr, Bc: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One program a row block and head.  Xb, Xn, Xh, Xd are X's strides; scale is in units of log2."""
    Tr = tl.cdiv(N, Br)
    block = tl.program_id(0)
    i0 = (Tr - 1 - block % Tr) * Br  # a causal mask makes the last rows the longest: they start first
    b, h = tl.cast(block // Tr // H, tl.int64), tl.cast(block // Tr % H, tl.int64)
    i, c = i0 + tl.arange(0, Br), tl.arange(0, d)
    rows, inside = tl.cast(i, tl.int64), (i < N)[:, None]

    rQ = tl.load(Q + b * Qb + h * Qh + rows[:, None] * Qn + c[None, :] * Qd, mask=inside, other=0.0)
    K += b * Kb + h // group * Kh
    V += b * Vb + h // group * Vh
    rO = tl.zeros([Br, d], tl.float32)
    m = tl.full([Br], float("-inf"), tl.float32)
    l = tl.zeros([Br], tl.float32)

    end = tl.minimum(i0 + Br, N) if CAUSAL else N
    whole = (i0 + 1 if CAUSAL else N) // Bc * Bc  # keys of the tiles that every row of the block sees whole
    rO, m, l = _walk(rO, m, l, rQ, K, V, 0, whole, i, N, scale, Kn, Kd, Vn, Vd, d, Bc, CAUSAL, False)
    rO, m, l = _walk(rO, m, l, rQ, K, V, whole, end, i, N, scale, Kn, Kd, Vn, Vd, d, Bc, CAUSAL, True)

    # O = diag(l)⁻¹ O,  LSE = m + log l
    at = O + b * Ob + h * Oh + rows[:, None] * On + c[None, :] * Od
    tl.store(at, (rO / l[:, None]).to(O.dtype.element_ty), mask=inside)
    tl.store(LSE + (b * H + h) * N + rows, (m + tl.log2(l)) * LN_2, mask=i < N)


TUNED = {
    d: triton.autotune(
        [triton.Config({"Br": Br, "Bc": Bc}, num_warps=warps, num_stages=stages) for Br, Bc, warps, stages in tiles],
        key=["B", "H", "N", "CAUSAL"],
    )(fwd)
    for d, tiles in TILES.items()
}


def run(q, k, v, O, LSE, causal: bool, scale: float, tile: tuple[int, int, int, int] | None = None) -> None:
    """O and LSE of q [B, N, H, d], k, v [B, N, H_kv, d], any strides; fp16 or bf16.  O like q; LSE [B, H, N], fp32.

    scale is above 0.  tile is one of TILES[d]; None takes the fastest.
    """
    B, N, H, d = q.shape
    strides = [step for x in (q, k, v, O) for step in x.stride()]
    kernel, options = TUNED[d], {}
    if tile:
        Br, Bc, warps, stages = tile
        kernel, options = fwd, {"Br": Br, "Bc": Bc, "num_warps": warps, "num_stages": stages}

    def grid(meta):
        return (triton.cdiv(N, meta["Br"]) * B * H,)

    kernel[grid](
        q, k, v, O, LSE, B, H, H // k.shape[2], N, scale * LOG2_E, *strides, d=d, CAUSAL=causal, **options
    )  # fmt: skip
