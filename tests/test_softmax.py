"""The softmax kernels against the oracle, and what each moves: 3 reads and 1 write an element, or 2 and 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import catalog, target
from sandbox.measure import gate
from sandbox.measure.cases import ROW_INPUTS, ROW_LAYOUTS, Case, Rows
from sandbox.measure.strategies import row_cases
from sandbox.problem import DTYPES, Problem

NAN, INF = math.nan, math.inf
SOFTMAX = catalog.variants("softmax")


def matrices(inputs=tuple(ROW_INPUTS)):
    """X [rows, columns] of such contents, in any layout and dtype."""
    return row_cases(inputs).map(Case.make)


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


# -------------------------------------------------------------------------------------------------------------- exact


@every_variant
@given(X=matrices())
def test_exact(variant, device, X):
    passes(variant, X, device)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_content_and_layout(variant, device, dtype):
    """The same, of everything once, whatever hypothesis draws."""
    for content in ROW_INPUTS:
        for layout in ROW_LAYOUTS:
            passes(variant, Case(Rows(5, 17, dtype), None, content, layout).make(), device)


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
@given(X=matrices(("gauss",)), constant=st.integers(-40, 40))
def test_a_constant_added_to_a_row_changes_no_bit(name, device, X, constant):
    """Of integers, whose differences are exact in every dtype.  softmax_tiled multiplies before it subtracts."""
    X = (8 * X).round().clamp(-40, 40)
    variant = catalog.find(name)
    assert torch.equal(softmax(variant, X, device), softmax(variant, X + constant, device))


@every_variant
@given(X=matrices(("gauss", "large")))
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
