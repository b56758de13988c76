"""The softmax kernels against the oracle, and what each moves: 3 reads and 1 write an element, or 2 and 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sandbox import catalog, target
from sandbox.measure import gate
from sandbox.problem import DTYPES, Problem

NAN, INF = math.nan, math.inf
SOFTMAX = catalog.variants("softmax")
# Around the blocks of the simulator (2 rows of 4 lanes; tiles of 4 x 8) and of a GPU (8 of 32; 16 x 128).
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]
COLUMNS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129]
if target.KIND == "gpu":
    ROWS, COLUMNS = [*ROWS, 1000], [*COLUMNS, 4095, 4097, 50257]

every_variant = pytest.mark.parametrize("variant", SOFTMAX.values(), ids=SOFTMAX)


def launch(variant, X, Y, device):
    variant.launcher(Problem(1, 1, 1, 1, 1, 1, gate.NAMES[X.dtype]), None, device)(X, Y)


def softmax(variant, X, device):
    Y = gate.poisoned(X)
    launch(variant, X, Y, device)
    return Y


def passes(variant, X, device):
    verdict = gate.check_softmax(variant, X, device)
    assert verdict.passed, verdict.why
    return verdict


# ------------------------------------------------------------------------------------------------ what a row may hold


def gaussian(X, random):
    return X


def small(X, random):
    return X / 64


def large(X, random):
    return 1e4 * X


def constant(X, random):
    return torch.full_like(X, 3.0)


def far_from_zero(X, random):
    return X + 1000


def rising(X, random):
    return X.sort(-1).values  # the maximum grows at every step


def falling(X, random):
    return X.sort(-1, descending=True).values


def one_hot(X, random):
    return 200 * torch.nn.functional.one_hot(torch.randint(X.shape[1], X.shape[:1], generator=random), X.shape[1])


def some_minus_inf(X, random):
    X = X.masked_fill(torch.rand(X.shape, generator=random) < 0.6, -INF)
    X[torch.rand(X.shape[0], generator=random) < 0.3] = -INF
    return X


def live_non_finite(X, random):
    for value in (NAN, INF, -INF):
        X = X.masked_fill(torch.rand(X.shape, generator=random) < 0.05, value)
    return X


CONTENTS = [gaussian, small, large, constant, far_from_zero, rising, falling, one_hot, some_minus_inf, live_non_finite]


def transposed(X):
    return X.t().contiguous().t()


def gapped(X):
    wide = X.new_full((2 * X.shape[0], 3 * X.shape[1] + 1), NAN)
    wide[::2, 1::3] = X
    return wide[::2, 1::3]


def expanded_rows(X):
    return X[:1].expand(X.shape[0], -1)


def expanded_columns(X):
    return X[:, :1].expand(-1, X.shape[1])


LAYOUTS = [torch.Tensor.contiguous, transposed, gapped, expanded_rows, expanded_columns]


@st.composite
def matrices(draw, contents=CONTENTS):
    rows, columns = draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLUMNS))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    content, layout = draw(st.sampled_from(contents)), draw(st.sampled_from(LAYOUTS))
    assume(columns > 0 or content is not one_hot)
    X = content(torch.randn(rows, columns, generator=random), random)
    return layout(X.to(draw(st.sampled_from(list(DTYPES.values())))).to(target.torch_device()))


# -------------------------------------------------------------------------------------------------------------- exact


@every_variant
@given(X=matrices())
def test_exact(variant, device, X):
    passes(variant, X, device)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_content_and_layout(variant, device, torch_device, dtype):
    """The same, of everything once, whatever hypothesis draws."""
    random = torch.Generator().manual_seed(0)
    for content in CONTENTS:
        for layout in LAYOUTS:
            X = content(torch.randn(5, 17, generator=random), random)
            passes(variant, layout(X.to(dtype).to(torch_device)), device)


@every_variant
@pytest.mark.parametrize("shape", [(0, 0), (0, 9), (9, 0), (1, 1)], ids=str)
def test_nothing_and_next_to_nothing(variant, device, torch_device, shape):
    passes(variant, torch.zeros(shape, device=torch_device), device)


@every_variant
def test_rows_that_are_not_finite(variant, device, torch_device):
    """-inf alone gives 0; a NaN or a +inf anywhere makes its row NaN, and no other."""
    X = torch.randn(6, 21, generator=torch.Generator().manual_seed(0))
    X[1], X[2, 13], X[3, 20], X[4, 5] = -INF, NAN, INF, -INF
    Y = softmax(variant, X.to(torch_device), device).cpu()
    assert (Y[1] == 0).all()
    assert Y[2].isnan().all() and Y[3].isnan().all()
    assert Y[[0, 4, 5]].isfinite().all() and Y[4, 5] == 0


@every_variant
def test_strided_output(variant, device, torch_device):
    """Y takes any strides too, and nothing is written between its elements."""
    X = torch.randn(7, 19, generator=torch.Generator().manual_seed(0)).to(torch_device)
    wide = torch.full((19, 14), NAN, device=torch_device)
    Y = wide.t()[::2]
    launch(variant, X, Y, device)
    assert torch.equal(Y, softmax(variant, X, device))
    assert wide[:, 1::2].isnan().all()


# -------------------------------------------------------------------------------------------- laws without a reference


@pytest.mark.parametrize("name", ["softmax_safe", "softmax_online"])
@given(X=matrices([gaussian]), constant=st.integers(-40, 40))
def test_a_constant_added_to_a_row_changes_no_bit(name, device, X, constant):
    """Of integers, whose differences are exact in every dtype.  softmax_tiled multiplies before it subtracts."""
    X = (8 * X).round().clamp(-40, 40)
    variant = catalog.find(name)
    assert torch.equal(softmax(variant, X, device), softmax(variant, X + constant, device))


@every_variant
@given(X=matrices([gaussian, large]))
def test_runs_give_the_same_bits(variant, device, X):
    assert torch.equal(softmax(variant, X, device), softmax(variant, X, device))


# ------------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.skipif(target.KIND != "simulator", reason="only the simulator counts accesses")
@pytest.mark.parametrize("name, reads", {"softmax_safe": 3, "softmax_online": 2, "softmax_tiled": 2}.items())
@given(X=matrices())
def test_accesses_are_counted_exactly(name, reads, device, X):
    """However ragged, and however often an expanded element is the same one in memory."""
    traffic = passes(catalog.find(name), X, device).traffic
    assert (traffic.reads.get("X", 0), traffic.writes.get("Y", 0)) == (reads * X.numel(), X.numel())
    assert (traffic.total_reads, traffic.total_writes) == (reads * X.numel(), X.numel())
    assert (traffic.read_bytes, traffic.write_bytes) == (reads * X.nbytes, X.nbytes)
