"""Every forward and backward kernel within its derived error of the float64 oracle, over hypothesis's examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import catalog
from sandbox.measure import gate
from sandbox.measure.strategies import cases
from sandbox.variant import Infeasible

KERNELS = [*catalog.variants("fwd"), *catalog.variants("bwd")]


@pytest.mark.parametrize("name", KERNELS)
@given(data=st.data())
def test_exact(name, data, device):
    variant = catalog.find(name)
    case = data.draw(cases(variant))
    try:
        verdict = gate.check(variant, case.problem, case.tile, case.make(), device)
    except Infeasible as reason:
        assert not device.simulated, reason
        return
    assert verdict.passed, f"python -m sandbox check {name} {case}: {verdict.why}"
