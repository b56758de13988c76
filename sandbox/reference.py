"""The only oracle: exact attention and its gradients in float64, and how far a kernel may stray from them.
[floor 0: torch alone, on whatever device the tensors are; no numba]

    forward, backward                   the oracle: float64, from the very inputs that a kernel was given
    twin_forward, _backward, _lse       the eager computation in the inputs' dtype: what rounding alone costs
    fp32_allowance_forward, _lse, _backward
                                        4u times the conditioning of each result: what a kernel that sums in fp32 may
                                        add to that; of gradients also what rounding O and dS to the inputs' dtype does

Tensors are q, dO [B, N_q, H, d] and k, v [B, N_k, H_kv, d]; LSE is [B, H, N_q]; ``mask`` is bool, broadcastable to
(B, H, N_q, N_k), True = seen.  Query head h reads key/value head h // group.  A row that sees nothing, or whose every
score is -inf, gives O = 0, LSE = -inf and gradients of 0.  NaN and Inf go where IEEE arithmetic on the *seen* pairs
takes them: what a mask hides contributes nothing, not even 0·NaN.  (A score of +inf makes its row NaN, LSE included:
every softmax that subtracts the maximum meets inf - inf.)

Everything below walks the same chunks: x, some of the B·H_kv key/value heads, g, all query heads that share each of
them, i, some query rows, and j, all keys.  Memory is that of a few tensors of CHUNK elements, whatever N is.

Every public function raises ValueError where a tensor's shape is not the problem's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .problem import Problem

CHUNK = 2**24  # elements of S held at once
UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # unit roundoff
U = UNIT["fp32"]
INF = math.inf

PAIRS = "xgic,xjc->xgij"  # one number for each (query, key)
OVER_KEYS = "xgij,xjc->xgic"  # one vector for each query
OVER_QUERIES = "xgij,xgic->xjc"  # one vector for each key, summed over the query heads that share it


# ------------------------------------------------------------------------------------------------------ the oracle


@torch.no_grad()
def forward(problem: Problem, q, k, v, mask=None):
    """O [B, N_q, H, d] and LSE [B, H, N_q], float64."""
    Q, K, V = _queries(problem, q=q), _keys(problem, k=k), _keys(problem, v=v)
    O, LSE = torch.zeros_like(Q), Q.new_full(Q.shape[:-1], -INF)
    for piece in _pieces(problem, Q, K, mask):
        O[piece.rows] = _sum(OVER_KEYS, piece.P, V[piece.heads], piece.seen)
        LSE[piece.rows] = piece.LSE
    return _as_q(problem, O), _as_lse(problem, LSE)


@torch.no_grad()
def backward(problem: Problem, q, k, v, dO, mask=None):
    """dQ like q, dK like k, dV like v, float64: the closed form of FlashAttention-1 (2205.14135), Appendix B.2."""
    Q, K, V, dO = _queries(problem, q=q), _keys(problem, k=k), _keys(problem, v=v), _queries(problem, dO=dO)
    dQ, dK, dV = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    for piece in _pieces(problem, Q, K, mask):
        dO_i, P, seen = dO[piece.rows], piece.P, piece.seen
        dS = _dS(problem, piece, dO_i, V[piece.heads])
        dQ[piece.rows] = _sum(OVER_KEYS, dS, piece.K, seen)
        dK[piece.heads] += _sum(OVER_QUERIES, dS, piece.Q, seen)
        dV[piece.heads] += _sum(OVER_QUERIES, P, dO_i, seen)
    return _as_q(problem, dQ), _as_k(problem, dK), _as_k(problem, dV)


def _dS(problem, piece, dO, V):
    """scale·P∘(dP - D), through the softcap's slope, 0 where not seen: [x, g, i, j]."""
    D = (dO * _sum(OVER_KEYS, piece.P, V, piece.seen)).sum(-1, keepdim=True)
    dS = piece.P * (torch.einsum(PAIRS, dO, V) - D)
    if problem.softcap:  # d(c·tanh(s/c))/ds = 1 - tanh² = 1 - (S/c)²
        dS = dS * (1 - (piece.S / problem.softcap) ** 2)
    return dS.masked_fill(~piece.seen, 0) * problem.scale


# ----------------------------------------------------------------------------------------- its low-precision twin


@torch.no_grad()
def twin_forward(problem: Problem, q, k, v, mask=None):
    """O like q, in q's dtype: scale, matmul, softcap, masked softmax, matmul, each rounding to that dtype."""
    O = torch.zeros_like(_queries(problem, q.dtype, q=q))
    for rows, _, O_i in _eager(problem, q, k, v, mask, split_rows=True):
        O[rows] = O_i
    return _as_q(problem, O)


def twin_backward(problem: Problem, q, k, v, dO, mask=None):
    """dQ, dK, dV like q, k, v and in their dtype: autograd of ``twin_forward``'s computation.

    As in eager attention, K and V are repeated for each query head and their gradients summed over the group.
    """
    each = replace(problem, H_kv=problem.H)
    k, v = (x.detach().repeat_interleave(problem.group, dim=2) for x in (k, v))
    dO = _queries(each, q.dtype, dO=dO)
    dQ = torch.zeros_like(dO)
    dK, dV = (torch.zeros_like(_keys(each, x.dtype, k=x)) for x in (k, v))
    with torch.enable_grad():
        for rows, leaves, O in _eager(each, q, k, v, mask, split_rows=False):
            dQ[rows], dK[rows[0]], dV[rows[0]] = torch.autograd.grad(O, leaves, dO[rows])
    dK, dV = (_as_k(each, x).unflatten(2, (problem.H_kv, problem.group)).sum(3) for x in (dK, dV))
    return _as_q(each, dQ), dK, dV


@torch.no_grad()
def twin_lse(problem: Problem, q, k, mask=None):
    """LSE [B, H, N_q] computed in fp32 from the widened inputs, as kernels of every dtype do."""
    Q, K = _queries(problem, torch.float32, q=q), _keys(problem, torch.float32, k=k)
    LSE = Q.new_full(Q.shape[:-1], -INF)
    for piece in _pieces(problem, Q, K, mask):
        LSE[piece.rows] = piece.LSE
    return _as_lse(problem, LSE)


def _eager(problem, q, k, v, mask, split_rows):
    """(rows, (Q, K, V), O) for some heads and rows: plain torch in the inputs' dtype, differentiable by autograd."""
    Q, K, V = _queries(problem, q.dtype, q=q), _keys(problem, k.dtype, k=k), _keys(problem, v.dtype, v=v)
    for rows, seen in _chunks(problem, mask, q.device, split_rows):
        leaves = tuple(x.detach().requires_grad_() for x in (Q[rows], K[rows[0]], V[rows[0]]))
        S = _scores(problem, *leaves[:2]).masked_fill(~seen, -INF)
        empty = (S == -INF).all(-1, keepdim=True)
        P = torch.softmax(S.masked_fill(empty, 0), -1).masked_fill(~seen | empty, 0)
        yield rows, leaves, torch.einsum(OVER_KEYS, P, leaves[2])


# -------------------------------------------------------------------------------------- what rounding in fp32 costs
#
# First-order error analysis, per row i; u = 2⁻²⁴.  The lengths of sums (d or N terms, in some order) are not counted:
# their random walk is what 2·max|E - O*| stands for.  Write
#
#   A_i  = max over seen j of |scale|·Σ_c |q_ic·k_jc|        G_ij = Σ_c |dO_ic·v_jc|        Ḡ_i = Σ_j p_ij·G_ij
#
# Score     |δs_ij| <= 2u·A_i: the dot product and its scaling, each relative to at most A_i.  The softcap's slope is
#           at most 1, so it does not amplify this, and its own rounding is relative to |s| <= A_i.
# LSE       is 1-Lipschitz in the scores; the rounding of l is u relative, hence absolute in its logarithm; the final
#           sum rounds by u·|LSE|:                          |δLSE_i|  <= 4u·(1 + A_i) + 4u·|LSE_i|
# P         an absolute error of the exponent is a relative error of p; the score enters it twice (s and m or LSE):
#                                                           |δp_ij|   <= 4u·(1 + A_i)·p_ij
# O         is linear in P:                                 |δO_ic|   <= 4u·(1 + A_i)·Σ_j p_ij·|v_jc|
#
# Backward. The kernel is given LSE rounded to fp32, which shifts the exponent by u·|LSE_i|, so p errs relatively by
# 2u·R_i with R_i = 1 + A_i + |LSE_i|.  dP errs by u·G_ij, and D by u·Ḡ_i plus, through the given O, Σ_c |dO_ic·δO_ic|
# <= 2u·(1 + A_i)·Ḡ_i.  With |dP_ij - D_i| <= G_ij + Ḡ_i:
# dV                                                        |δdV_jc|  <= 4u·Σ_i R_i·p_ij·|dO_ic|
# dS                                                        |δdS_ij|  <= 4u·R_i·p_ij·(G_ij + Ḡ_i)
# dQ, dK    are linear in dS:                               |δdQ_ic|  <= |scale|·Σ_j |δdS_ij|·|k_jc|, dK likewise.
# The given O is rounded to the inputs' dtype, of unit u': D errs by u'·Σ_c |dO_ic·o_ic| and dS by p_ij times that.
# In fp32 this is far below the other terms; in 16 bits it is the largest, and eager attention, which keeps P and not
# O for its backward, does not have it.
# In 16 bits dS is rounded before the tensor cores, each by u'·|dS_ij| and independently, so that the errors add as
# squares: dQ gains u'·|scale|·√(Σ_j (dS_ij·k_jc)²), dK likewise.  Eager attention rounds it, too, and 2·max|E - O*|
# nearly always covers it; not with two equal keys, where eager's two roundings cancel and those of a kernel, whose D
# has an error of its own, do not.
# A softcap multiplies dS by 1 - t², t = tanh(s/c), at most 1; its error 2|t|·(1 - t²)·|δs|/c <= |δs|/c is relative to
# p_ij·(G_ij + Ḡ_i), so R_i gains A_i/c.


@torch.no_grad()
def fp32_allowance_forward(problem: Problem, q, k, v, mask=None):
    """4u·(1 + A_i)·Σ_j p_ij·|v_jc|, like O, float64: derived above."""
    Q, K, V = _queries(problem, q=q), _keys(problem, k=k), _keys(problem, v=v).abs()
    allowance = torch.zeros_like(Q)
    for piece in _pieces(problem, Q, K, mask):
        absolute = _sum(OVER_KEYS, piece.P, V[piece.heads], piece.seen)
        allowance[piece.rows] = 4 * U * (1 + _reach(problem, piece)) * absolute
    return _as_q(problem, allowance)


@torch.no_grad()
def fp32_allowance_lse(problem: Problem, q, k, mask=None):
    """4u·(1 + A_i + |LSE_i|), like LSE, float64, and 0 where LSE = -inf: derived above."""
    Q, K = _queries(problem, q=q), _keys(problem, k=k)
    allowance = Q.new_zeros(Q.shape[:-1])
    for piece in _pieces(problem, Q, K, mask):
        size = 1 + _reach(problem, piece)[..., 0] + piece.LSE.abs()
        allowance[piece.rows] = 4 * U * size.masked_fill(piece.LSE == -INF, 0)
    return _as_lse(problem, allowance)


@torch.no_grad()
def reach(problem: Problem, q, k, mask=None):
    """A_i = |scale|·max_j Σ_c |q_ic·k_jc|, like LSE, float64, and 0 where LSE = -inf."""
    Q, K = _queries(problem, q=q), _keys(problem, k=k)
    found = Q.new_zeros(Q.shape[:-1])
    for piece in _pieces(problem, Q, K, mask):
        found[piece.rows] = _reach(problem, piece)[..., 0].masked_fill(piece.LSE == -INF, 0)
    return _as_lse(problem, found)


@torch.no_grad()
def fp32_allowance_backward(problem: Problem, q, k, v, dO, mask=None):
    """The allowances of dQ, dK, dV, each of its gradient's shape, float64: derived above."""
    Q, K, V, dO = _queries(problem, q=q), _keys(problem, k=k), _keys(problem, v=v), _queries(problem, dO=dO)
    dQ, dK, dV, dK_squares = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V), torch.zeros_like(K)
    unit = UNIT[problem.dtype]
    for piece in _pieces(problem, Q, K, mask):
        dO_i, V_x, P, seen = dO[piece.rows].abs(), V[piece.heads], piece.P, piece.seen
        O_i = _sum(OVER_KEYS, P, V_x, seen)
        A = _reach(problem, piece)
        R = 1 + A + piece.LSE.abs().unsqueeze(-1) + (A / problem.softcap if problem.softcap else 0)
        error_P = (4 * U * R * P).masked_fill(~seen, 0)
        G = torch.einsum(PAIRS, dO_i, V_x.abs()).masked_fill(~seen, 0)
        error_D = unit * (dO_i * O_i.abs()).sum(-1, keepdim=True)
        error_S = error_P * (G + (P * G).sum(-1, keepdim=True)) + P * error_D
        error_S = error_S.masked_fill_(~seen, 0) * abs(problem.scale)
        dQ[piece.rows] = _sum(OVER_KEYS, error_S, piece.K.abs(), seen)
        dK[piece.heads] += _sum(OVER_QUERIES, error_S, piece.Q.abs(), seen)
        dV[piece.heads] += _sum(OVER_QUERIES, error_P, dO_i, seen)
        if problem.dtype != "fp32":
            squares = (unit * _dS(problem, piece, dO[piece.rows], V_x)) ** 2
            dQ[piece.rows] += _sum(OVER_KEYS, squares, piece.K**2, seen).sqrt()
            dK_squares[piece.heads] += _sum(OVER_QUERIES, squares, piece.Q**2, seen)
    return _as_q(problem, dQ), _as_k(problem, dK + dK_squares.sqrt()), _as_k(problem, dV)


def _reach(problem, piece):
    """A_i [x, g, i, 1]."""
    S = torch.einsum(PAIRS, piece.Q.abs(), piece.K.abs()) * abs(problem.scale)
    return S.masked_fill(~piece.seen, 0).amax(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------ chunks and layouts


@dataclass
class _Piece:
    """Some heads and rows, and all of their keys."""

    rows: tuple  # their place in [B·H_kv, group, N_q, ...]
    heads: slice  # and in [B·H_kv, N_k, d]
    Q: torch.Tensor  # [x, g, i, d]
    K: torch.Tensor  # [x, j, d]
    seen: torch.Tensor  # bool [x, g, i, j]; no pair of a row that is empty
    S: torch.Tensor  # scaled, capped, -inf where a mask hides
    P: torch.Tensor  # softmax(S), 0 where not seen
    LSE: torch.Tensor  # [x, g, i]


def _pieces(problem, Q, K, mask) -> Iterator[_Piece]:
    """Every row of the problem once, in Q's dtype; none where there are no keys."""
    for rows, seen in _chunks(problem, mask, Q.device):
        Q_i, K_x = Q[rows], K[rows[0]]
        S = _scores(problem, Q_i, K_x).masked_fill_(~seen, -INF)
        m = S.amax(-1, keepdim=True)
        m = m.masked_fill(m == -INF, 0)
        LSE = m + (S - m).exp_().sum(-1, keepdim=True).log()
        seen = seen & (LSE != -INF)
        P = (S - LSE).exp_().masked_fill_(~seen, 0)
        yield _Piece(rows, rows[0], Q_i, K_x, seen, S, P, LSE[..., 0])


def _chunks(problem, mask, device, split_rows=True):
    """(rows, seen): an index into [B·H_kv, group, N_q] and which keys it sees, bool, broadcastable to S."""
    B, H, H_kv, N_q, N_k, group = problem.B, problem.H, problem.H_kv, problem.N_q, problem.N_k, problem.group
    if not B * H * N_q * N_k:
        return
    lo, hi = problem.mask.band(N_q, N_k)
    j = torch.arange(N_k, device=device)
    if mask is not None:
        mask = mask.expand(B, H, N_q, N_k).unflatten(1, (H_kv, group))
    rows = min(N_q, max(1, CHUNK // (group * N_k))) if split_rows else N_q
    heads = max(1, CHUNK // (group * N_k * rows))
    for x0 in range(0, B * H_kv, heads):
        x = torch.arange(x0, min(x0 + heads, B * H_kv), device=device)
        for i0 in range(0, N_q, rows):
            at = slice(i0, i0 + rows)
            i = torch.arange(N_q, device=device)[at, None]
            seen = ((j >= i + lo) & (j <= i + hi))[None, None]
            if mask is not None:
                seen = seen & mask[:, :, :, at][x // H_kv, x % H_kv]
            yield (slice(x0, x0 + heads), slice(None), at), seen


def _scores(problem, Q, K):
    """S = (scale·Q) Kᵀ, capped, not yet masked; each step rounds to Q's dtype.

    The scale comes first, as in eager code for fp16, where Q Kᵀ alone may overflow: a twin of NaN tells no error.
    """
    S = torch.einsum(PAIRS, Q * problem.scale, K)
    return problem.softcap * torch.tanh(S / problem.softcap) if problem.softcap else S


def _sum(equation, W, X, seen):
    """einsum(equation, W, X) over the seen pairs alone; W is 0 elsewhere, so only a non-finite X needs care."""
    if X.isfinite().all():
        return torch.einsum(equation, W, X)
    total = torch.einsum(equation, W, X.nan_to_num(0, 0, 0))
    for value in (math.nan, INF, -INF):
        is_value = (X.isnan() if math.isnan(value) else X == value).to(X)
        for sign in (1, 0, -1):
            meets = torch.einsum(equation, (seen & (W.sign() == sign)).to(X), is_value) > 0
            total = total + torch.where(meets, sign * value, 0.0)
    return total


def _queries(problem, dtype=torch.float64, **named):
    """q or dO [B, N_q, H, d] as [B·H_kv, group, N_q, d]."""
    x = _checked(named, (problem.B, problem.N_q, problem.H, problem.d))
    return x.to(dtype).transpose(1, 2).reshape(problem.B * problem.H_kv, problem.group, problem.N_q, problem.d)


def _keys(problem, dtype=torch.float64, **named):
    """k or v [B, N_k, H_kv, d] as [B·H_kv, N_k, d]."""
    x = _checked(named, (problem.B, problem.N_k, problem.H_kv, problem.d))
    return x.to(dtype).transpose(1, 2).reshape(problem.B * problem.H_kv, problem.N_k, problem.d)


def _checked(named, shape):
    ((name, x),) = named.items()
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected the problem's, {shape}")
    return x


def _as_q(problem, X):
    return X.reshape(problem.B, problem.H, problem.N_q, problem.d).transpose(1, 2).contiguous()


def _as_k(problem, X):
    return X.reshape(problem.B, problem.H_kv, problem.N_k, problem.d).transpose(1, 2).contiguous()


def _as_lse(problem, X):
    return X.reshape(problem.B, problem.H, problem.N_q)
