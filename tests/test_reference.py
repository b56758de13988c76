"""The oracle against its definition, torch SDPA and autograd, and against laws that need no reference.

Sizes are tiny and drawn by hypothesis; everything is float64, so agreement is to TOLERANCE whatever was drawn.
"""

import math
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from sandbox import reference
from sandbox.mask import ALIGNS
from sandbox.problem import Problem, problem_of

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
NAN, INF = float("nan"), float("inf")
UNTIMED = settings(deadline=None)  # the first call of an operator is slow


@dataclass
class Case:
    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dO: torch.Tensor
    mask: torch.Tensor | None

    def forward(self, **change):
        given = {"q": self.q, "k": self.k, "v": self.v, "mask": self.mask} | change
        return reference.forward(self.problem, **given)

    def backward(self, **change):
        given = {"q": self.q, "k": self.k, "v": self.v, "dO": self.dO, "mask": self.mask} | change
        return reference.backward(self.problem, **given)


@st.composite
def cases(draw, dtype=torch.float32, low=0):
    B, H_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    N_q, N_k, d = draw(st.integers(low, 9)), draw(st.integers(low, 9)), draw(st.integers(1, 8))
    H, side = H_kv * group, st.integers(-1, 4)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, dO = (torch.randn(B, N_q, H, d, generator=random).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, N_k, H_kv, d, generator=random).to(dtype) for _ in range(2))
    shape = draw(st.sampled_from([None, (N_k,), (N_q, N_k), (B, 1, 1, N_k), (H, 1, N_k), (B, H, N_q, N_k)]))
    mask = None if shape is None else torch.rand(shape, generator=random) < draw(st.sampled_from([0.3, 0.8]))
    problem = problem_of(
        q,
        k,
        v,
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(ALIGNS)),
        window=draw(st.one_of(st.just((-1, -1)), st.tuples(side, side))),
        mask=mask,
        softcap=draw(st.sampled_from([0.0, 0.7, 30.0])),
        scale=draw(st.sampled_from([None, 0.3, -1.0])),
    )
    return Case(problem, q, k, v, dO, mask)


def seen_by(case):
    """bool [B, H, N_q, N_k], from the words of attention()'s definition."""
    p = case.problem
    off = p.N_k - p.N_q if p.mask.align == "bottom_right" else 0
    left, right = p.mask.window
    i, j = torch.arange(p.N_q)[:, None], torch.arange(p.N_k)
    seen = torch.ones(p.B, p.H, p.N_q, p.N_k, dtype=torch.bool)
    if p.mask.causal:
        seen = seen & (j <= i + off)
    if left != -1:
        seen = seen & (j >= i + off - left)
    if right != -1:
        seen = seen & (j <= i + off + right)
    return seen if case.mask is None else seen & case.mask


def definition(case, q, k, v):
    """O, LSE: dense, a softmax that subtracts no maximum, differentiable by autograd."""
    p = case.problem
    k, v = (x.repeat_interleave(p.group, dim=2) for x in (k, v))
    S = torch.einsum("bihc,bjhc->bhij", q, k) * p.scale
    S = p.softcap * torch.tanh(S / p.softcap) if p.softcap else S
    weight = seen_by(case) * torch.exp(S)
    l = weight.sum(-1)
    O = torch.einsum("bhij,bjhc->bihc", weight / (l + (l == 0))[..., None], v)
    return O, torch.log(l)


def wide(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def agree(actual, expected, **kw):
    torch.testing.assert_close(actual, expected, **TOLERANCE, **kw)


# ------------------------------------------------------------------------------------ against other expressions of it


@UNTIMED
@given(cases())
def test_forward_is_the_definition(case):
    O, LSE = case.forward()
    expected_O, expected_LSE = definition(case, *wide(case.q, case.k, case.v))
    agree(O, expected_O.detach())
    agree(LSE, expected_LSE.detach())


@UNTIMED
@given(cases())
def test_backward_is_autograd_of_the_definition(case):
    leaves = wide(case.q, case.k, case.v)
    O, _ = definition(case, *leaves)
    for actual, expected in zip(case.backward(), torch.autograd.grad(O, leaves, case.dO.double())):
        agree(actual, expected)


@UNTIMED
@given(cases(low=1))
def test_torch_sdpa(case):
    p, mask, seen = case.problem, case.mask, seen_by(case)
    if p.softcap or not seen.any(-1).all():  # torch has no softcap, and NaN in a row that sees nothing
        mask = seen = seen | ~seen.any(-1, keepdim=True)
        p = problem_of(case.q, case.k, case.v, scale=p.scale, mask=mask)
    leaves = wide(case.q, case.k, case.v)
    O = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=seen, scale=p.scale, enable_gqa=True
    ).transpose(1, 2)
    agree(reference.forward(p, case.q, case.k, case.v, mask)[0], O.detach())
    gradients = reference.backward(p, case.q, case.k, case.v, case.dO, mask)
    for actual, expected in zip(gradients, torch.autograd.grad(O, leaves, case.dO.double())):
        agree(actual, expected)


# ------------------------------------------------------------------------------------------- laws without a reference


@UNTIMED
@given(cases(low=1), st.randoms(use_true_random=False))
def test_permuting_keys_changes_nothing(case, random):
    order = list(range(case.problem.N_k))
    random.shuffle(order)
    seen, free = seen_by(case), problem_of(case.q, case.k, case.v, scale=case.problem.scale)
    free = replace(free, softcap=case.problem.softcap)
    O, LSE = reference.forward(free, case.q, case.k[:, order], case.v[:, order], seen[..., order])
    agree(O, case.forward()[0])
    agree(LSE, case.forward()[1])


@UNTIMED
@given(cases())
def test_linear_in_v(case):
    other = torch.flip(case.v, (3,)).double()
    (O, LSE), (O_other, _) = case.forward(), case.forward(v=other)
    O_sum, LSE_sum = case.forward(v=2 * case.v.double() - 3 * other)
    agree(O_sum, 2 * O - 3 * O_other)
    agree(LSE_sum, LSE)


@UNTIMED
@given(cases(), st.floats(-50, 50))
def test_a_constant_added_to_the_scores_of_a_row_moves_only_lse(case, constant):
    def widened(x, column):
        return torch.cat([x.double(), torch.full_like(x[..., :1], column).double()], -1)

    constant = torch.tensor(constant, dtype=case.q.dtype).item()
    p = replace(case.problem, d=case.problem.d + 1, softcap=0.0)
    plain = reference.forward(p, widened(case.q, 0), widened(case.k, 1), widened(case.v, 0), case.mask)
    moved = reference.forward(p, widened(case.q, constant), widened(case.k, 1), widened(case.v, 0), case.mask)
    agree(moved[0], plain[0])
    agree(moved[1], plain[1] + constant * p.scale)


@UNTIMED
@given(cases(low=1), st.integers(0, 9))
def test_splitting_the_keys_and_merging_by_lse(case, cut):
    seen, free = seen_by(case), replace(problem_of(case.q, case.k, case.v), scale=case.problem.scale)
    free = replace(free, softcap=case.problem.softcap)
    parts = []
    for half in (slice(None, cut), slice(cut, None)):
        k, v = case.k[:, half], case.v[:, half]
        parts.append(reference.forward(replace(free, N_k=k.shape[1]), case.q, k, v, seen[..., half]))
    (O_1, LSE_1), (O_2, LSE_2) = parts
    O, LSE = case.forward()
    agree(torch.logaddexp(LSE_1, LSE_2), LSE)
    base = LSE.masked_fill(LSE == -INF, 0)
    weight_1, weight_2 = ((x - base).exp().transpose(1, 2)[..., None] for x in (LSE_1, LSE_2))
    agree(weight_1 * O_1 + weight_2 * O_2, O)


@UNTIMED
@given(cases(), st.integers(1, 200))
def test_the_chunk_size_changes_nothing(case, chunk):
    p, inputs = case.problem, (case.q, case.k, case.v)

    def everything():
        return [
            *case.forward(),
            *case.backward(),
            reference.fp32_allowance_forward(p, *inputs, case.mask),
            reference.fp32_allowance_lse(p, *inputs[:2], case.mask),
            *reference.fp32_allowance_backward(p, *inputs, case.dO, case.mask),
            reference.twin_forward(p, *inputs, case.mask).double() / 1e6,  # fp32 against a tolerance for float64
        ]

    whole = everything()
    with mock.patch.object(reference, "CHUNK", chunk):
        agree(everything(), whole)


# ------------------------------------------------------------------------------------------------- edges and poison


@pytest.mark.parametrize("N_q, N_k", [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_lengths_0_and_1(N_q, N_k):
    q, k = torch.randn(2, N_q, 4, 8), torch.randn(2, N_k, 2, 8)
    p = problem_of(q, k, k)
    O, LSE = reference.forward(p, q, k, k)
    assert O.shape == (2, N_q, 4, 8) and LSE.shape == (2, 4, N_q)
    gradients = reference.backward(p, q, k, k, q)
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]
    if N_k == 1:
        agree(O, k.double().repeat_interleave(2, 2))
        agree(gradients[0], torch.zeros_like(O), check_dtype=False)
    else:
        assert (O == 0).all() and (LSE == -INF).all() and all((x == 0).all() for x in gradients)


def test_no_heads_and_many_heads():
    nobody = torch.zeros(1, 3, 0, 4)
    assert reference.forward(problem_of(nobody, nobody, nobody), nobody, nobody, nobody)[0].shape == nobody.shape
    many = torch.randn(1, 2, 70_000, 1)
    O, _ = reference.forward(problem_of(many, many, many, causal=True), many, many, many)
    agree(O[:, 0], many[:, 0].double())


@UNTIMED
@given(cases())
def test_rows_that_see_nothing(case):
    p, empty = case.problem, ~seen_by(case).any(-1)  # [B, H, N_q]
    O, LSE = case.forward()
    assert (LSE[empty] == -INF).all() and torch.isfinite(LSE[~empty]).all()
    rows = empty.transpose(1, 2)
    twin = reference.twin_forward(p, case.q, case.k, case.v, case.mask)
    twin_dQ, *_ = reference.twin_backward(p, case.q, case.k, case.v, case.dO, case.mask)
    allowed = reference.fp32_allowance_backward(p, case.q, case.k, case.v, case.dO, case.mask)
    for x in (O, case.backward()[0], twin, twin_dQ, allowed[0]):
        assert (x[rows] == 0).all() and torch.isfinite(x).all()
    unseen = torch.full_like(case.dO, 1e6) * rows[..., None]
    agree(case.backward(dO=case.dO + unseen), case.backward(dO=case.dO * ~rows[..., None]))


@UNTIMED
@given(cases(), st.sampled_from([NAN, INF, -INF]))
def test_what_a_mask_hides_may_be_anything(case, poison):
    """Poison of keys that no row sees, and of rows that see nothing, reaches nobody."""
    p, seen = case.problem, seen_by(case)
    shape = (p.B, p.H_kv, p.group, p.N_q, p.N_k)
    hidden = ~seen.reshape(shape).any(3).any(2).transpose(1, 2)[..., None]
    empty = ~seen.any(-1).transpose(1, 2)[..., None]
    q, dO = (x.masked_fill(empty, poison) for x in (case.q, case.dO))
    k, v = (x.masked_fill(hidden, poison) for x in (case.k, case.v))
    agree(case.forward(q=q, k=k, v=v), case.forward())
    agree(case.backward(q=q, k=k, v=v, dO=dO), case.backward())
    for allowance in reference.fp32_allowance_backward(p, q, k, v, dO, case.mask):
        assert torch.isfinite(allowance).all()
    agree(reference.twin_lse(p, q, k, case.mask), reference.twin_lse(p, case.q, case.k, case.mask))


@UNTIMED
@given(cases(low=1), st.data(), st.sampled_from([NAN, INF, -INF]))
def test_poison_in_one_key_reaches_just_the_rows_that_see_it(case, data, poison):
    j = data.draw(st.integers(0, case.problem.N_k - 1))
    k, v = case.k.clone(), case.v.clone()
    k[:, j], v[:, j] = NAN, poison
    blind = ~seen_by(case)[..., j]  # [B, H, N_q]
    rows = blind.transpose(1, 2)
    (O, LSE), (clean_O, clean_LSE) = case.forward(k=k, v=v), case.forward()
    agree(LSE[blind], clean_LSE[blind])
    agree(O[rows], clean_O[rows])
    assert LSE[~blind].isnan().all() and O[~rows].isnan().all()
    O, LSE = case.forward(v=v)
    agree(LSE, clean_LSE)
    agree(O[rows], clean_O[rows])
    assert O[~rows].isnan().all() if math.isnan(poison) else (O[~rows] == poison).all()
    agree(case.backward(k=k, v=v)[0][rows], case.backward()[0][rows])


@UNTIMED
@given(st.integers(0, 2**31))
def test_sums_of_anything_over_seen_pairs(seed):
    random = torch.Generator().manual_seed(seed)
    seen = torch.rand(1, 2, 4, 3, generator=random) < 0.7
    W = torch.randint(-1, 2, seen.shape, generator=random).double() * seen
    X = torch.tensor([0.5, -2, NAN, INF, -INF]).double()[torch.randint(0, 5, (1, 3, 2), generator=random)]
    terms = torch.where(seen[..., None], W[..., None] * X[:, None, None], 0)
    agree(reference._sum(reference.OVER_KEYS, W, X, seen), terms.sum(-2), equal_nan=True)


def test_live_infinities():
    q = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    k = torch.tensor([INF, 1.0]).view(1, 2, 1, 1)
    v = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    O, LSE = reference.forward(problem_of(q, k, v), q, k, v)
    assert O.flatten().tolist()[1] == 4 and LSE.flatten().tolist()[1] == -1  # a score of -inf is a weight of 0
    assert O[0, [0, 2]].isnan().all() and LSE[0, 0, [0, 2]].isnan().all()  # inf - inf, 0·inf
    q, k = q[:, 1:2], torch.full_like(k, INF)
    p = problem_of(q, k, v)
    O, LSE = reference.forward(p, q, k, v * NAN)
    assert O.item() == 0 and LSE.item() == -INF  # every score -inf: as good as nothing seen
    assert all((x == 0).all() for x in reference.backward(p, q, k, v * NAN, q))
    assert reference.twin_forward(p, q, k, v).item() == 0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size):
    q, k = torch.full((1, 2, 1, 1), 1.0), torch.tensor([size, size + 1, -size]).view(1, 3, 1, 1)
    O, LSE = reference.forward(problem_of(q, k, k), q, k, k)
    top = torch.tensor([size, size + 1] if size > 0 else [-size]).double()
    agree(LSE[0, 0, 0], torch.logsumexp(top, 0))
    agree(O[0, 0, 0, 0], (torch.softmax(top, 0) * top).sum())


def test_strides_gradients_and_purity():
    q = torch.randn(2, 3, 5, 4).transpose(1, 2).requires_grad_()
    k = torch.randn(1, 1, 3, 4).expand(2, 6, 3, 4)
    before = q.detach().clone(), k.clone()
    p = problem_of(q, k, k, causal=True)
    O, _ = reference.forward(p, q, k, k)
    assert not O.requires_grad and O.is_contiguous() and O.dtype == torch.float64
    agree(O, reference.forward(p, *(x.detach().contiguous() for x in (q, k, k)))[0])
    reference.backward(p, q, k, k, q), reference.twin_backward(p, q, k, k, q)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and q.grad is None


def test_shapes_that_are_not_the_problem_s():
    x = torch.zeros(1, 4, 2, 8)
    p = problem_of(x, x, x)
    for name in ("q", "k", "v"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, 5, 2, 8\).*\(1, 4, 2, 8\)"):
            reference.forward(p, **({"q": x, "k": x, "v": x} | {name: torch.zeros(1, 5, 2, 8)}))
    with pytest.raises(ValueError, match="dO has shape"):
        reference.backward(p, x, x, x, x[:, :3])


# ------------------------------------------------------------------------------------------- the twin, the allowances


def gap(actual, expected):
    return (actual.double() - expected).abs().max().item() if expected.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_twin_rounds_to_its_dtype_and_no_worse(dtype):
    @UNTIMED
    @given(cases(dtype))
    def check(case):
        p, inputs = case.problem, (case.q, case.k, case.v)
        O, twin = case.forward()[0], reference.twin_forward(p, *inputs, case.mask)
        gradients = reference.twin_backward(p, *inputs, case.dO, case.mask)
        largest = 100 * torch.finfo(dtype).eps
        for actual, expected in zip((twin, *gradients), (O, *case.backward())):
            assert actual.dtype == dtype and actual.shape == expected.shape
            assert gap(actual, expected) <= largest * (1 + (expected.abs().max().item() if expected.numel() else 0))

    check()


@UNTIMED
@given(cases(torch.bfloat16))
def test_twin_lse_is_fp32(case):
    LSE, expected = reference.twin_lse(case.problem, case.q, case.k, case.mask), case.forward()[1]
    assert LSE.dtype == torch.float32
    torch.testing.assert_close(LSE.double(), expected, rtol=1e-5, atol=1e-5)


@UNTIMED
@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]).flatmap(cases))
def test_allowances_are_their_formulas(case):
    p, seen, u = case.problem, seen_by(case), 2.0**-24
    q, dO = case.q.double(), case.dO.double()
    k, v = (x.double().repeat_interleave(p.group, 2) for x in (case.k, case.v))
    LSE = case.forward()[1]
    S = p.scale * torch.einsum("bihc,bjhc->bhij", q, k)
    S = p.softcap * torch.tanh(S / p.softcap) if p.softcap else S
    P = torch.where(seen, torch.exp(S - LSE[..., None]), 0.0)
    reach = torch.where(seen, torch.einsum("bihc,bjhc->bhij", q.abs(), k.abs()) * abs(p.scale), 0.0)
    A = reach.max(-1).values if p.N_k else torch.zeros_like(LSE)
    sees = seen.any(-1)

    O = 4 * u * (1 + A).transpose(1, 2)[..., None] * torch.einsum("bhij,bjhc->bihc", P, v.abs())
    agree(reference.fp32_allowance_forward(p, case.q, case.k, case.v, case.mask), O)
    agree(reference.fp32_allowance_lse(p, case.q, case.k, case.mask), torch.where(sees, 4 * u * (1 + A + LSE.abs()), 0))

    R = 1 + A + torch.where(sees, LSE.abs(), 0) + (A / p.softcap if p.softcap else 0)
    G = torch.einsum("bihc,bjhc->bhij", dO.abs(), v.abs())
    error_P = 4 * u * R[..., None] * P
    O_star = torch.einsum("bhij,bjhc->bihc", P, v)
    error_D = reference.UNIT[p.dtype] * (dO.abs() * O_star.abs()).sum(-1).transpose(1, 2)[..., None]
    error_S = abs(p.scale) * (error_P * (G + (P * G).sum(-1, keepdim=True)) + P * error_D)
    expected = (
        torch.einsum("bhij,bjhc->bihc", error_S, k.abs()),
        torch.einsum("bhij,bihc->bjhc", error_S, q.abs()).unflatten(2, (p.H_kv, p.group)).sum(3),
        torch.einsum("bhij,bihc->bjhc", error_P, dO.abs()).unflatten(2, (p.H_kv, p.group)).sum(3),
    )
    if p.dtype != "fp32":  # dS is rounded, too
        D = (dO * O_star).sum(-1).transpose(1, 2)[..., None]
        dS = P * (torch.einsum("bihc,bjhc->bhij", dO, v) - D) * (1 - (S / p.softcap) ** 2 if p.softcap else 1)
        squares = (reference.UNIT[p.dtype] * p.scale * dS) ** 2
        rounding_dQ = torch.einsum("bhij,bjhc->bihc", squares, k**2)
        rounding_dK = torch.einsum("bhij,bihc->bjhc", squares, q**2).unflatten(2, (p.H_kv, p.group)).sum(3)
        expected = (expected[0] + rounding_dQ.sqrt(), expected[1] + rounding_dK.sqrt(), expected[2])
    agree(reference.fp32_allowance_backward(p, case.q, case.k, case.v, case.dO, case.mask), expected)


@UNTIMED
@given(cases(), st.sampled_from([1.0, 30.0]))
def test_allowances_cover_honest_rounding(case, size):
    """Eager fp32, which they are not fitted to, on mild and on steep softmaxes."""
    case.q *= size
    p, inputs = case.problem, (case.q, case.k, case.v)
    O, LSE = case.forward()
    floor = 2.0**-126  # below the normal numbers of fp32 nothing is relative
    pairs = [
        (reference.twin_forward(p, *inputs, case.mask), O, reference.fp32_allowance_forward(p, *inputs, case.mask)),
        *zip(
            reference.twin_backward(p, *inputs, case.dO, case.mask),
            case.backward(),
            reference.fp32_allowance_backward(p, *inputs, case.dO, case.mask),
        ),
    ]
    for actual, expected, allowance in pairs:
        assert ((actual.double() - expected).abs() <= allowance + floor).all()
    sees = LSE > -INF
    error = (reference.twin_lse(p, case.q, case.k, case.mask) - LSE).abs()[sees]
    assert (error <= reference.fp32_allowance_lse(p, case.q, case.k, case.mask)[sees]).all()


def test_allowances_reject_a_key_too_many_and_half_precision():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 1, 32) for _ in range(3))
    p = problem_of(q, k, v, causal=True)
    O, allowance = reference.forward(p, q, k, v)[0], reference.fp32_allowance_forward(p, q, k, v)
    shifted = replace(p, mask=replace(p.mask, causal=False, window=(-1, 1)))
    for wrong in (reference.forward(shifted, q, k, v)[0], reference.twin_forward(p, q.half(), k.half(), v.half())):
        assert ((wrong.double() - O).abs() > 10 * allowance).any()
