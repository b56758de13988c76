"""The papers' algorithms, tile by tile, in NumPy: runnable pseudo-code, not an oracle.  [floor 0: NumPy alone]

    standard_attention                     FlashAttention-1, Algorithm 0
    safe_softmax, online_softmax           Milakov & Gimelshein, Algorithms 2 and 3
    flash_attention_1_forward, _backward   FlashAttention-1, Algorithms 1 (with the mask of 2) and 4
    flash_attention_2_forward, _backward   FlashAttention-2, Algorithms 1 and 2

FlashAttention-1 is arXiv 2205.14135, -2 is 2307.08691, Milakov & Gimelshein is 1805.02867.  Comments ``# 5`` are the
papers' line numbers; dropout and its lines are left out.  Arguments live in "HBM", names with i or j "on chip".

One head: Q, O, dO [N_q, d], K, V [N_k, d], l, m, L [N_q], all float64 or all float32; the results have that dtype.
Tiles have Br rows and Bc columns and need not divide N.  ``seen`` [N_q, N_k] is bool, True where row i sees key j;
None shows all.  ``scale`` is 1/√d unless given.  A row that sees nothing gives O = 0, l = 0, m = L = -inf and
gradients of 0, without a warning: the papers leave that case out, and `_base`, `_sum` and `_log` are what it takes.
"""

from __future__ import annotations

import numpy as np

INF = np.inf

# ---------------------------------------------------------------------------------------------- softmax of x [..., V]


def safe_softmax(x):
    """softmax over the last axis of x, in three passes: maximum, sum, division (1805.02867, Algorithm 2)."""
    V = x.shape[-1]
    m = np.full_like(x, -INF, shape=x.shape[:-1])  # 1
    for k in range(V):  # 2
        m = np.maximum(m, x[..., k])  # 3
    d = np.zeros_like(m)  # 5
    for j in range(V):  # 6
        d = d + np.exp(x[..., j] - _base(m))  # 7
    y = np.empty_like(x)
    for i in range(V):  # 9
        y[..., i] = np.exp(x[..., i] - _base(m)) / _sum(d)  # 10
    return y


def online_softmax(x):
    """softmax over the last axis of x, in two passes: the sum d follows the maximum m as it grows (1805.02867,
    Algorithm 3)."""
    V = x.shape[-1]
    m = np.full_like(x, -INF, shape=x.shape[:-1])  # 1
    d = np.zeros_like(m)  # 2
    for j in range(V):  # 3
        m_old, m = m, np.maximum(m, x[..., j])  # 4
        d = d * np.exp(m_old - _base(m)) + np.exp(x[..., j] - _base(m))  # 5
    y = np.empty_like(x)
    for i in range(V):  # 7
        y[..., i] = np.exp(x[..., i] - _base(m)) / _sum(d)  # 8
    return y


# ---------------------------------------------------------------------------------------------------------- attention


def standard_attention(Q, K, V, *, scale=None, seen=None):
    """O, L.  S and P [N_q, N_k] go through HBM whole (2205.14135, Algorithm 0)."""
    S = _scores(Q, K, scale, seen)  # 1: write S to HBM
    m = S.max(axis=1, initial=-INF)
    P = np.exp(S - _base(m)[:, None])  # 2: read S, write P to HBM
    l = P.sum(axis=1)
    return P / _sum(l)[:, None] @ V, _base(m) + _log(l)  # 3


def flash_attention_1_forward(Q, K, V, *, Br=16, Bc=16, scale=None, seen=None):
    """O, l, m.  Keys outside, queries inside: O, l and m travel to HBM and back for each block of keys, and O is
    normalised each time (2205.14135, Algorithm 1; line 9½ is the mask, Algorithm 2's line 11).

    Line 12 divides by l_new, for in fp32 a product with its rounded inverse drifts: once a row's l stands still, every
    further tile multiplies O by the same l·(1/l) ≠ 1, about half a unit roundoff each.
    """
    O = np.zeros_like(Q)  # 2
    l, m = np.zeros_like(Q, shape=len(Q)), np.full_like(Q, -INF, shape=len(Q))
    for j in _blocks(len(K), Bc):  # 5
        Kj, Vj = K[j], V[j]  # 6
        for i in _blocks(len(Q), Br):  # 7
            Qi, Oi, li, mi = Q[i], O[i], l[i], m[i]  # 8
            Sij = _scores(Qi, Kj, scale, _tile(seen, i, j))  # 9, 9½

            m_tile = Sij.max(axis=1)  # 10
            P = np.exp(Sij - _base(m_tile)[:, None])
            l_tile = P.sum(axis=1)

            m_new = np.maximum(mi, m_tile)  # 11
            old, new = np.exp(mi - _base(m_new)), np.exp(m_tile - _base(m_new))
            l_new = old * li + new * l_tile

            O[i] = ((li * old)[:, None] * Oi + new[:, None] * (P @ Vj)) / _sum(l_new)[:, None]  # 12
            l[i], m[i] = l_new, m_new  # 13
    return O, l, m  # 16


def flash_attention_1_backward(Q, K, V, O, dO, l, m, *, Br=16, Bc=16, scale=None, seen=None):
    """dQ, dK, dV.  P is recomputed from l and m, D for each tile anew (2205.14135, Algorithm 4)."""
    tau = _tau(Q, scale)
    dQ, dK, dV = np.zeros_like(Q), np.zeros_like(K), np.zeros_like(V)  # 5
    for j in _blocks(len(K), Bc):  # 6
        Kj, Vj = K[j], V[j]  # 7
        dKj, dVj = np.zeros_like(Kj), np.zeros_like(Vj)  # 8
        for i in _blocks(len(Q), Br):  # 9
            Qi, Oi, dOi, dQi, li, mi = Q[i], O[i], dO[i], dQ[i], l[i], m[i]  # 10
            Sij = _scores(Qi, Kj, tau, _tile(seen, i, j))  # 11, 12
            Pij = np.exp(Sij - _base(mi)[:, None]) / _sum(li)[:, None]  # 13
            dVj += Pij.T @ dOi  # 16
            dPij = dOi @ Vj.T  # 17
            Di = (dOi * Oi).sum(axis=1)  # 19
            dSij = Pij * (dPij - Di[:, None])  # 20
            dQ[i] = dQi + tau * dSij @ Kj  # 21
            dKj += tau * dSij.T @ Qi  # 22
        dK[j], dV[j] = dKj, dVj  # 24
    return dQ, dK, dV  # 26


def flash_attention_2_forward(Q, K, V, *, Br=16, Bc=16, scale=None, seen=None):
    """O, L.  Queries outside, keys inside: O stays on chip, unnormalised until its last block (2307.08691,
    Algorithm 1; the inverse that line 10 prints on the rescaling of O is a misprint)."""
    O, L = np.empty_like(Q), np.empty_like(Q, shape=len(Q))  # 2
    for i in _blocks(len(Q), Br):  # 3
        Qi = Q[i]  # 4
        Oi = np.zeros_like(Qi)  # 5
        li, mi = np.zeros_like(Qi, shape=len(Qi)), np.full_like(Qi, -INF, shape=len(Qi))
        for j in _blocks(len(K), Bc):  # 6
            Kj, Vj = K[j], V[j]  # 7
            Sij = _scores(Qi, Kj, scale, _tile(seen, i, j))  # 8

            m_old, mi = mi, np.maximum(mi, Sij.max(axis=1))  # 9
            P = np.exp(Sij - _base(mi)[:, None])
            alpha = np.exp(m_old - _base(mi))
            li = alpha * li + P.sum(axis=1)

            Oi = alpha[:, None] * Oi + P @ Vj  # 10
        O[i] = Oi / _sum(li)[:, None]  # 12, 14
        L[i] = _base(mi) + _log(li)  # 13, 15
    return O, L  # 17


def flash_attention_2_backward(Q, K, V, O, dO, L, *, Br=16, Bc=16, scale=None, seen=None):
    """dQ, dK, dV.  Keys outside still; one vector L instead of l and m, D computed once (2307.08691, Algorithm 2)."""
    tau = _tau(Q, scale)
    dQ, dK, dV = np.zeros_like(Q), np.empty_like(K), np.empty_like(V)  # 3
    D = (dO * O).sum(axis=1)  # 4
    for j in _blocks(len(K), Bc):  # 5
        Kj, Vj = K[j], V[j]  # 6
        dKj, dVj = np.zeros_like(Kj), np.zeros_like(Vj)  # 7
        for i in _blocks(len(Q), Br):  # 8
            Qi, dOi, Li, Di = Q[i], dO[i], L[i], D[i]  # 9
            Sij = _scores(Qi, Kj, tau, _tile(seen, i, j))  # 10
            Pij = np.exp(Sij - _base(Li)[:, None])  # 11
            dVj += Pij.T @ dOi  # 12
            dPij = dOi @ Vj.T  # 13
            dSij = Pij * (dPij - Di[:, None])  # 14
            dQ[i] += tau * dSij @ Kj  # 15: load, update, write back
            dKj += tau * dSij.T @ Qi  # 16
        dK[j], dV[j] = dKj, dVj  # 18
    return dQ, dK, dV  # 20


# --------------------------------------------------------------------------------------------------------------- parts


def _blocks(N, size):
    """Slices of 0 .. N-1, the last one shorter where size does not divide N."""
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


def _tile(seen, i, j):
    return None if seen is None else seen[i, j]


def _tau(Q, scale):
    return Q.shape[1] ** -0.5 if scale is None else scale


def _scores(Q, K, scale, seen):
    """S = scale·Q Kᵀ, -inf where a key is not seen."""
    S = _tau(Q, scale) * (Q @ K.T)
    return S if seen is None else np.where(seen, S, -INF)


def _base(m):
    """What to subtract from a score before exp: its maximum, or 0 while nothing is seen, as -inf - -inf is NaN."""
    return np.where(m == -INF, 0, m)


def _sum(l):
    """What to divide by: the sum of exponentials, or 1 while nothing is seen, as 0/0 is NaN."""
    return np.where(l == 0, 1, l)


def _log(l):
    """ln l, or -inf where nothing is seen."""
    return np.log(l, out=np.full_like(l, -INF), where=l != 0)
