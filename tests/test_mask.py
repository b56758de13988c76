"""Mask against the sentence that defines it, and what Mask, Problem and problem_of refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox.mask import ALIGNS, Mask
from sandbox.problem import Problem, problem_of

N = st.integers(0, 12)
BLOCK = st.integers(1, 6)
SIDE = st.integers(-1, 8)
MASKS = st.builds(Mask, st.booleans(), st.sampled_from(ALIGNS), st.tuples(SIDE, SIDE))


def definition(mask, N_q, N_k):
    """bool [N_q, N_k], pair by pair, in the words of attention()'s definition."""
    off = N_k - N_q if mask.align == "bottom_right" else 0
    left, right = mask.window
    seen = np.zeros((N_q, N_k), bool)
    for i in range(N_q):
        for j in range(N_k):
            seen[i, j] = (
                (j <= i + off or not mask.causal)
                and (j >= i + off - left or left == -1)
                and (j <= i + off + right or right == -1)
            )
    return seen


@given(MASKS, N, N)
def test_seen_and_pairs(mask, N_q, N_k):
    expected = definition(mask, N_q, N_k)
    np.testing.assert_array_equal(mask.seen(N_q, N_k), expected)
    assert mask.pairs(N_q, N_k) == expected.sum()


@given(MASKS, N, N)
def test_band_is_an_interval(mask, N_q, N_k):
    lo, hi = mask.band(N_q, N_k)
    assert lo <= hi
    expected = definition(mask, N_q, N_k)
    for i in range(N_q):
        assert [j for j in range(N_k) if i + lo <= j <= i + hi] == list(np.flatnonzero(expected[i]))


@given(MASKS, N, N, BLOCK, BLOCK)
def test_blocks_are_exactly_the_tiles_that_see_something(mask, N_q, N_k, Br, Bc):
    seen = definition(mask, N_q, N_k)
    rows, columns = range(0, N_q, Br), range(0, N_k, Bc)
    live = {(i // Br, j // Bc) for i in rows for j in columns if seen[i : i + Br, j : j + Bc].any()}
    assert live == {(i // Br, J) for i in rows for J in mask.key_blocks(i, Br, Bc, N_q, N_k)}
    assert live == {(I, j // Bc) for j in columns for I in mask.query_blocks(j, Br, Bc, N_q, N_k)}


def test_causal_alignments():
    assert Mask(causal=True).seen(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    top_left = Mask(causal=True, align="top_left")
    assert top_left.seen(2, 4).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert Mask(causal=True).seen(3, 1).tolist() == [[False], [False], [True]]


def test_names():
    assert str(Mask()) == "full"
    assert not Mask(boolean=True).banded
    assert str(Mask(True, "top_left", (4, 0), boolean=True)) == "causal+window=(4, 0)+boolean+top_left"


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"align": "left"}, ValueError, ["align='left'", "bottom_right, top_left"]),
        ({"window": 3}, TypeError, ["window=3", "pair"]),
        ({"window": (1, 2, 3)}, TypeError, ["window=(1, 2, 3)", "pair"]),
        ({"window": (1.5, 0)}, TypeError, ["window left=1.5", "integer"]),
        ({"window": (0, True)}, TypeError, ["window right=True", "integer"]),
        ({"window": (0, -2)}, ValueError, ["window right=-2", ">= 0, or -1"]),
    ],
)
def test_mask_refuses(arguments, error, words):
    refuses(lambda: Mask(**arguments), error, words)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"B": -1}, ValueError, ["B=-1", ">= 0"]),
        ({"N_k": 2.0}, TypeError, ["N_k=2.0", "integer"]),
        ({"N_q": True}, TypeError, ["N_q=True", "integer"]),
        ({"d": 0}, ValueError, ["d=0", "1 to 256"]),
        ({"d": 257}, ValueError, ["d=257", "1 to 256"]),
        ({"H": 3, "H_kv": 2}, ValueError, ["H=3", "H_kv=2", "multiple"]),
        ({"H_kv": 0}, ValueError, ["H_kv=0", "H_kv >= 1"]),
        ({"dtype": "fp64"}, ValueError, ["dtype='fp64'", "fp32, fp16, bf16"]),
        ({"scale": "1"}, TypeError, ["scale='1'", "number"]),
        ({"scale": float("nan")}, ValueError, ["scale=nan", "finite"]),
        ({"softcap": -1.0}, ValueError, ["softcap=-1.0", "c > 0, or 0"]),
        ({"softcap": float("inf")}, ValueError, ["softcap=inf", "finite"]),
    ],
)
def test_problem_refuses(change, error, words):
    good = {"B": 1, "H": 2, "H_kv": 2, "N_q": 4, "N_k": 4, "d": 8}
    Problem(**good)
    refuses(lambda: Problem(**good | change), error, words)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": [0.0]}, TypeError, ["q is list", "torch.Tensor"]),
        ({"k": torch.zeros(6, 2, 8)}, ValueError, ["k has shape (6, 2, 8)", "4 axes"]),
        ({"v": torch.zeros(1, 6, 2, 8).double()}, TypeError, ["v has dtype torch.float64", "float32, float16"]),
        ({"k": torch.zeros(1, 6, 2, 8).half()}, TypeError, ["k has dtype torch.float16", "q's, torch.float32"]),
        ({"v": torch.zeros(1, 6, 2, 8, device="meta")}, ValueError, ["v is on meta", "q's device, cpu"]),
        ({"k": torch.zeros(2, 6, 2, 8)}, ValueError, ["k has batch 2", "q's, 1"]),
        ({"k": torch.zeros(1, 6, 2, 9)}, ValueError, ["k has head_dim 9", "q's, 8"]),
        ({"v": torch.zeros(1, 7, 2, 8)}, ValueError, ["v has shape (1, 7, 2, 8)", "k's, (1, 6, 2, 8)"]),
        ({"q": torch.zeros(1, 5, 3, 8)}, ValueError, ["q has 3 heads, k 2", "multiple"]),
        ({"mask": 1}, TypeError, ["mask is int", "True = seen"]),
        ({"mask": torch.ones(5, 6)}, TypeError, ["mask has dtype torch.float32", "torch.bool"]),
        ({"mask": torch.ones(5, 6, device="meta").bool()}, ValueError, ["mask is on meta", "cpu"]),
        ({"mask": torch.ones(6, 5).bool()}, ValueError, ["mask has shape (6, 5)", "(1, 4, 5, 6)"]),
    ],
)
def test_problem_of_refuses(change, error, words):
    good = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)}
    problem_of(**good)
    refuses(lambda: problem_of(**good | change), error, words)


def test_a_swapped_layout_is_a_hint_and_never_an_error():
    heads_first = torch.zeros(1, 8, 100, 16)
    with pytest.raises(ValueError, match=r"transpose\(1, 2\)"):
        problem_of(heads_first, *2 * [torch.zeros(1, 2, 90, 16)])
    decoding = problem_of(torch.zeros(1, 1, 8, 16), *2 * [torch.zeros(1, 100, 2, 16)])
    assert (decoding.N_q, decoding.H, decoding.group) == (1, 8, 4)


@given(MASKS, N, N)
def test_costs(mask, N_q, N_k):
    problem = Problem(2, 6, 3, N_q, N_k, 4, "fp16", mask=mask)
    assert problem.flops() == 4 * 4 * 2 * 6 * definition(mask, N_q, N_k).sum()
    assert problem.flops("bwd") == 2.5 * problem.flops()
    q, k, lse = 2 * 6 * N_q * 4, 2 * 3 * N_k * 4, 2 * 6 * N_q
    assert problem.ideal_bytes() == 2 * (q + k + k + q) + 4 * lse


def refuses(call, error, words):
    """The error names the argument, its value and what is accepted."""
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
