"""The gate passes whoever computes honestly in 16 bits: as the kernels on tensor cores do, in a few lines of torch.

Two inputs once were refused, a few times in a thousand; both are given here by name.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox import reference
from sandbox.measure import gate
from sandbox.measure.cases import INPUTS, Case, parse_problem
from sandbox.measure.strategies import SEEDS, cases
from sandbox.reference import OVER_KEYS, OVER_QUERIES, PAIRS
from sandbox.variant import Tile

BUILDS = st.tuples(
    st.sampled_from([16, 32, 48]), st.sampled_from(["fp16", "bf16"]), st.just(Tile(16, 16)),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.0, 15.0]),
)  # fmt: skip
OVERFLOWS = "N_q=1 N_k=17 d=16 H=2 H_kv=1 dtype=fp16 scale=0.0"  # Q Kᵀ, before it is scaled
CANCELS = "B=2 N_q=33 N_k=2 d=16 H=2 H_kv=1 dtype=fp16"  # eager's error of dQ


def backward(case: Case, low: torch.dtype):
    """dQ, dK, dV: sums in fp32; P and dS in `low` where they enter a product."""
    p, x = case.problem, case.make()
    O = reference._queries(p, torch.float32, O=reference.forward(p, x.q, x.k, x.v, x.mask)[0].to(x.q.dtype))
    Q, dO = (reference._queries(p, torch.float32, x=y) for y in (x.q, x.dO))
    K, V = (reference._keys(p, torch.float32, x=y) for y in (x.k, x.v))
    dQ, dK, dV = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    for piece in reference._pieces(p, Q, K, x.mask):
        dO_i, D = dO[piece.rows], (dO * O)[piece.rows].sum(-1, keepdim=True)
        dS = piece.P * (torch.einsum(PAIRS, dO_i, V[piece.heads]) - D)
        if p.softcap:
            dS = dS * (1 - (piece.S / p.softcap) ** 2)
        dS, P = (y.masked_fill(~piece.seen, 0).to(low).float() for y in (dS, piece.P))
        dQ[piece.rows] = p.scale * torch.einsum(OVER_KEYS, dS, piece.K)
        dK[piece.heads] += p.scale * torch.einsum(OVER_QUERIES, dS, piece.Q)
        dV[piece.heads] += torch.einsum(OVER_QUERIES, P, dO_i)
    gradients = reference._as_q(p, dQ), reference._as_k(p, dK), reference._as_k(p, dV)
    return {name: y.to(x.q.dtype) for name, y in zip(("dQ", "dK", "dV"), gradients)}


def ratios(case: Case, low: torch.dtype):
    """Error ÷ allowance of each gradient, at its worst."""
    x = case.make()
    allowed = gate._allowances(case.problem, x, *reference.forward(case.problem, x.q, x.k, x.v, x.mask), "bwd")
    found = backward(case, low)
    worst = {name: gate._judge(found[name], *allowed[name])[1] for name in found}
    return {name: float(y.max()) if y.numel() else 0.0 for name, y in worst.items()}


@given(case=cases(of=BUILDS))
def test_an_honest_backward_passes(case):
    assert max(ratios(case, case.problem.torch_dtype).values()) <= 1, case


@given(seed=SEEDS, words=st.sampled_from([OVERFLOWS, CANCELS]), numbers=st.sampled_from(INPUTS))
@example(seed=0, words=OVERFLOWS, numbers="large-logits")
@example(seed=37601, words=CANCELS, numbers="equal")
def test_it_passes_where_eager_errs_less_or_overflows(seed, words, numbers):
    case = Case(parse_problem(words), Tile(16, 16), numbers, "contiguous", seed)
    assert max(ratios(case, torch.float16).values()) <= 1, case


@pytest.mark.parametrize("seed", range(4))
def test_one_that_rounds_to_e4m3_is_refused(seed):
    """P and dS with 4 bits: nothing but a rounding is wrong."""
    case = Case(parse_problem("N_q=64 N_k=64 d=32 dtype=fp16"), Tile(16, 16), seed=seed)
    assert min(ratios(case, torch.float8_e4m3fn).values()) > 1
