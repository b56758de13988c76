"""The harness is tested too: every kernel broken on purpose is refused, and the same files unedited pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from broken import CACHED_BY_INPUT, DEFECTS, LAUNCH, RAGGED, STALE_OUTPUT, TILE, edited, problem

from sandbox import target
from sandbox.measure import gate

on_simulator = pytest.mark.skipif(target.KIND != "simulator", reason="a GPU may let a race pass")
every_defect = pytest.mark.parametrize(
    "defect", [pytest.param(d, id=d.what, marks=on_simulator if d.raises else ()) for d in DEFECTS]
)


@pytest.fixture(scope="module")
def check(device, torch_device):
    def check(variant, problem, inputs=None):
        inputs = inputs or gate.gaussian(problem, seed=0, device=torch_device)
        return gate.check(variant, problem, TILE, inputs, device)

    return check


@every_defect
def test_refused(check, defect):
    if defect.raises:
        with pytest.raises(defect.raises):
            check(defect.variant, defect.on)
    else:
        verdict = check(defect.variant, defect.on)
        assert not verdict.passed and defect.words in verdict.why


@every_defect
def test_hidden_elsewhere(check, defect):
    """Why the gate is asked about ragged tiles, groups of heads and masks: there the same kernel passes."""
    variant = defect.variant
    for place in defect.hidden:
        assert check(variant, place).passed


CONTROLS = sorted({(d.kernel, p) for d in DEFECTS for p in (d.on, *d.hidden)}, key=str)


@pytest.mark.parametrize("kernel, place", CONTROLS, ids=[f"{kernel}, {place}" for kernel, place in CONTROLS])
def test_the_unedited_source_passes(check, kernel, place):
    verdict = check(edited(kernel), place)
    assert verdict.passed, verdict.why


def test_an_edit_must_find_its_line():
    with pytest.raises(ValueError, match="0 times"):
        edited("fwd_v2", ("no such line", ""))
    with pytest.raises(ValueError, match="2 times"):
        edited("fwd_v2", ("rescale_O(rO, ralpha)", ""))


# ----------------------------------------------------------------------------------------- data that a defect needs


def test_a_forgotten_rescale_shows_only_where_the_maximum_rises(check, torch_device):
    """Equal queries and keys give equal scores: then nothing needs to be rescaled, however many tiles there are."""
    defect = next(d for d in DEFECTS if "not rescaled" in d.what)
    inputs = gate.gaussian(RAGGED, seed=0, device=torch_device)
    level = replace(inputs, q=torch.ones_like(inputs.q), k=torch.ones_like(inputs.k))
    assert check(defect.variant, RAGGED, level).passed
    assert not check(defect.variant, RAGGED, inputs).passed


# ------------------------------------------------------------------------------------- defects of the second call
#
# One check cannot see them: it launches once, on tensors that the kernel meets for the first time.  Two checks do.
# The outputs are poisoned each time, so whatever the second call leaves unwritten is NaN; and the oracle is computed
# anew from what the inputs hold now, so whatever it remembers of the first call is wrong.  `Verdict.launch`, which
# runs the kernel again to time it, judges nothing.


@pytest.fixture
def same_memory(monkeypatch):
    """Outputs of later checks lie where those of earlier ones did, as an allocator may well have it."""
    kept = {}

    def poisoned(like):
        return kept.setdefault((like.shape, like.dtype), torch.empty_like(like).contiguous()).fill_(torch.nan)

    monkeypatch.setattr(gate, "poisoned", poisoned)


def test_stale_output_is_refused(check, same_memory):
    variant = edited("fwd_v2", STALE_OUTPUT)
    assert check(variant, RAGGED).passed
    verdict = check(variant, RAGGED)
    assert not verdict.passed and "O is off by inf" in verdict.why


def test_output_remembered_by_the_address_of_an_input_is_refused(check, torch_device):
    variant, inputs = edited("fwd_v2", CACHED_BY_INPUT), gate.gaussian(RAGGED, seed=0, device=torch_device)
    assert check(variant, RAGGED, inputs).passed
    assert check(variant, RAGGED, inputs).passed  # the same contents: remembered rightly
    inputs.q.copy_(gate.gaussian(RAGGED, seed=1).q)
    verdict = check(variant, RAGGED, inputs)
    assert not verdict.passed and "O is off" in verdict.why and "inf" not in verdict.why


def test_the_unedited_source_passes_call_after_call(check, same_memory, torch_device):
    variant, inputs = edited("fwd_v2", (LAUNCH, LAUNCH)), gate.gaussian(RAGGED, seed=0, device=torch_device)
    for seed in (1, 2):
        inputs.q.copy_(gate.gaussian(RAGGED, seed).q)
        assert check(variant, RAGGED, inputs).passed


# --------------------------------------------------------------------------------------------------- the gate itself


def test_a_verdict_says_what_failed(check):
    verdict = check(edited("fwd_v2", ("rm[a] + log(l)", "rm[a] + log(l + l)")), problem(8, 8))
    assert verdict.ratio > 1 and verdict.max_error == pytest.approx(0.693, abs=1e-3)
    assert verdict.why.startswith("LSE is off by 0.693, ") and verdict.why.endswith(" x what is allowed")


# ------------------------------------------------------------------------------------------------------ softmax alone


def row(*values):
    return torch.tensor([values])


SOFTMAX = {
    "the sum is not rescaled when the maximum rises": (
        "softmax_online", ("l = l * exp(m_old - shift) + ", "l = l + "),
        torch.linspace(-3, 3, 40)[None], torch.linspace(3, -3, 40)[None],
    ),
    "the maximum is not subtracted": (
        "softmax_safe", ("shift = m if m != NEG_INF else ZERO", "shift = ZERO"),
        row(1000.0, 999.0, 0.0), row(3.0, 2.0, 0.0),
    ),
    "a row of -inf is NaN": (
        "softmax_online", ("total = l if l != ZERO else ONE", "total = l"),
        row(-torch.inf, -torch.inf), row(-torch.inf, 0.0),
    ),
    "columns past the end are seen": (
        "softmax_tiled", ("if i < rows and j < columns else NEG_INF", "if i < rows and j < columns else ZERO"),
        torch.zeros(1, 129), torch.zeros(1, 128),
    ),
    "the last column is not written": (
        "softmax_safe", ("        # y_j =", "        N -= 1\n        # y_j ="),
        torch.zeros(1, 7), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel, edit, refused, hidden", SOFTMAX.values(), ids=SOFTMAX)
def test_softmax(device, torch_device, kernel, edit, refused, hidden):
    variant, refused = edited(kernel, edit), refused.to(torch_device)
    verdict = gate.check_softmax(variant, refused, device)
    assert not verdict.passed and "Y is off" in verdict.why
    assert gate.check_softmax(edited(kernel), refused, device).passed
    if hidden is not None:
        assert gate.check_softmax(variant, hidden.to(torch_device), device).passed


def test_softmax_must_not_change_its_input(device, torch_device):
    variant = edited("softmax_safe", ("Y[i, j] = narrow", "X[i, j] = Y[i, j] = narrow"))
    verdict = gate.check_softmax(variant, torch.zeros(3, 9, device=torch_device), device)
    assert not verdict.passed and verdict.why == "input X was changed"
