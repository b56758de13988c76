"""Every algorithm of the papers is standard attention: against the oracle, each other, and laws of softmax."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import reference
from sandbox.algorithms import (
    flash_attention_1_backward,
    flash_attention_1_forward,
    flash_attention_2_backward,
    flash_attention_2_forward,
    online_softmax,
    safe_softmax,
    standard_attention,
)
from sandbox.problem import Problem

UNTIMED = settings(deadline=None)
NAN, INF = np.nan, np.inf
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@dataclass
class Case:
    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray
    dO: np.ndarray
    seen: np.ndarray | None
    scale: float | None
    tile: dict

    @property
    def options(self):
        return {"scale": self.scale, "seen": self.seen}

    def oracle(self):
        """(O, L), (dQ, dK, dV), and for fp32 what each may be off by, as float64 arrays of one head."""
        (N_q, d), N_k = self.Q.shape, len(self.K)
        problem = Problem(1, 1, 1, N_q, N_k, d, scale=self.scale)
        q, k, v, dO = (torch.from_numpy(x)[None, :, None] for x in (self.Q, self.K, self.V, self.dO))
        mask = None if self.seen is None else torch.from_numpy(self.seen)
        results = (
            *reference.forward(problem, q, k, v, mask),
            *reference.backward(problem, q, k, v, dO, mask),
            reference.fp32_allowance_forward(problem, q, k, v, mask),
            reference.fp32_allowance_lse(problem, q, k, mask),
            *reference.fp32_allowance_backward(problem, q, k, v, dO, mask),
        )
        O, L, *rest = (x.numpy()[0, 0] if x.ndim == 3 else x.numpy()[0, :, 0] for x in results)
        return (O, L), rest[:3], rest[3:5], rest[5:]


@st.composite
def cases(draw, dtype=np.float64):
    N_q, N_k, d = draw(st.integers(0, 11)), draw(st.integers(0, 11)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    Q, dO = random.standard_normal((2, N_q, d)).astype(dtype)
    K, V = random.standard_normal((2, N_k, d)).astype(dtype)
    Q *= draw(st.sampled_from([1, 30]))
    density = draw(st.sampled_from([None, 0.2, 0.8]))
    seen = None if density is None else random.random((N_q, N_k)) < density
    tile = {"Br": draw(st.integers(1, 12)), "Bc": draw(st.integers(1, 12))}
    return Case(Q, K, V, dO, seen, draw(st.sampled_from([None, 0.3, -1.0])), tile)


def v1(Q, K, V, **options):
    """O, L."""
    O, l, m = flash_attention_1_forward(Q, K, V, **options)
    return O, np.where(l > 0, m + np.log(np.where(l > 0, l, 1)), -INF)


def v1_gradients(Q, K, V, dO, **options):
    O, l, m = flash_attention_1_forward(Q, K, V, **options)
    return flash_attention_1_backward(Q, K, V, O, dO, l, m, **options)


def v2_gradients(Q, K, V, dO, **options):
    O, L = flash_attention_2_forward(Q, K, V, **options)
    return flash_attention_2_backward(Q, K, V, O, dO, L, **options)


def untiled(Q, K, V, Br, Bc, **options):
    return standard_attention(Q, K, V, **options)


FORWARDS = pytest.mark.parametrize("forward", [untiled, v1, flash_attention_2_forward])
BACKWARDS = pytest.mark.parametrize("backward", [v1_gradients, v2_gradients])


def agree(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, **(tolerance or TOLERANCE))


# ------------------------------------------------------------------------------------------------- against the oracle


@FORWARDS
@UNTIMED
@given(case=cases())
def test_forward(forward, case):
    agree(forward(case.Q, case.K, case.V, **case.tile, **case.options), case.oracle()[0])


@BACKWARDS
@UNTIMED
@given(case=cases())
def test_backward(backward, case):
    agree(
        backward(case.Q, case.K, case.V, case.dO, **case.tile, **case.options), case.oracle()[1], rtol=1e-8, atol=1e-10
    )


@FORWARDS
@UNTIMED
@given(case=cases(np.float32))
def test_forward_in_float32_is_within_the_allowance(forward, case):
    actual = forward(case.Q, case.K, case.V, **case.tile, **case.options)
    expected, _, (O, L), _ = case.oracle()
    roundings = 1 + len(case.K) // case.tile["Bc"] if forward is v1 else 1  # it normalises O for every block of keys
    within(actual, expected, (roundings * O, L))


def test_v1_does_not_drift():
    """Block after block of keys that add nothing: O must not creep away, however many blocks there are."""
    K = np.zeros((4096, 1), np.float32)
    K[0], V = 200, np.full_like(K, 0.7)
    O, l, _ = flash_attention_1_forward(np.ones((1, 1), np.float32), K, V, Br=1, Bc=1)
    assert l == 1 and O == V[0]
    Q = np.linspace(0.5, 1.5, 8, dtype=np.float32)[:, None]
    K[:3] = [[90], [89], [88]]
    O, _, _ = flash_attention_1_forward(Q, K, V, Br=8, Bc=1)
    np.testing.assert_allclose(O, 0.7, rtol=8 * 2.0**-24)


@BACKWARDS
@UNTIMED
@given(case=cases(np.float32))
def test_backward_in_float32_is_within_the_allowance(backward, case):
    actual = backward(case.Q, case.K, case.V, case.dO, **case.tile, **case.options)
    _, expected, _, allowance = case.oracle()
    within(actual, expected, allowance)


def within(actual, expected, allowance):
    for a, e, limit in zip(actual, expected, allowance, strict=True):
        assert a.dtype == np.float32
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        assert (abs(a[finite] - e[finite]) <= limit[finite] + 2.0**-126).all()  # subnormals may be flushed


# -------------------------------------------------------------------------------------------------------------- laws


@FORWARDS
@UNTIMED
@given(case=cases(), Br=st.integers(1, 12), Bc=st.integers(1, 12))
def test_the_tile_changes_nothing(forward, case, Br, Bc):
    arguments = case.Q, case.K, case.V
    agree(forward(*arguments, Br=Br, Bc=Bc, **case.options), forward(*arguments, **case.tile, **case.options))


@UNTIMED
@given(case=cases())
def test_v1_keeps_a_row_s_maximum_and_sum(case):
    _, l, m = flash_attention_1_forward(case.Q, case.K, case.V, **case.tile, **case.options)
    scale = case.Q.shape[1] ** -0.5 if case.scale is None else case.scale
    S = scale * case.Q @ case.K.T
    S = S if case.seen is None else np.where(case.seen, S, -INF)
    top = S.max(axis=1, initial=-INF)
    agree((m, l), (top, np.exp(S - np.where(top == -INF, 0, top)[:, None]).sum(axis=1)))


@FORWARDS
def test_rows_that_see_nothing(forward):
    Q, K, V = np.random.default_rng(0).standard_normal((3, 7, 4))
    seen = np.tri(7, k=-3, dtype=bool)  # rows 0, 1 and 2 are empty, one in the same tile as row 3, which is not
    O, L = forward(Q, K, V, Br=2, Bc=2, seen=seen)
    assert (O[:3] == 0).all() and (L[:3] == -INF).all() and np.isfinite(O).all() and np.isfinite(L[3:]).all()
    K[5:], expected = NAN, (O, L)  # keys that nobody sees
    agree(forward(Q, K, V, Br=2, Bc=2, seen=seen), expected)


@FORWARDS
def test_scores_of_a_thousand_do_not_overflow(forward):
    K = np.array([[1000.0], [1001.0], [-1000.0]])
    O, L = forward(np.ones((1, 1)), K, K, Br=1, Bc=1)
    weight = 1 / (1 + np.e)
    agree((O, L), ([[1000 * weight + 1001 * (1 - weight)]], [1001 - np.log(1 - weight)]))


# ----------------------------------------------------------------------------------------------------------- softmax


@UNTIMED
@given(st.integers(0, 9), st.integers(0, 2**31), st.sampled_from([1.0, 1e4]), st.sampled_from([np.float32, np.float64]))
def test_softmaxes(V, seed, size, dtype):
    x = (size * np.random.default_rng(seed).standard_normal((3, V))).astype(dtype)
    x[x < -size] = -INF
    x[2] = -INF
    expected = torch.softmax(torch.from_numpy(x[:2]).double(), -1).nan_to_num(0).numpy()
    for softmax in (safe_softmax, online_softmax):
        y = softmax(x)
        assert y.dtype == dtype and (y[2] == 0).all()
        np.testing.assert_allclose(y[:2], expected, rtol=30 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)
        shifted = softmax(x + dtype(8))
        np.testing.assert_allclose(shifted, y, rtol=30 * size * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)
