"""Every forward and backward kernel within its derived error of the float64 oracle, over hypothesis's examples."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import catalog
from sandbox.measure import gate
from sandbox.measure.strategies import cases
from sandbox.variant import Infeasible

KERNELS = [*catalog.variants("fwd"), *catalog.variants("bwd")]
BY_WARPS = [  # on the tensor cores and simulated, whole warps step by step: an example takes long
    name for name in KERNELS if (v := catalog.find(name)).unit == "tensor" and v.generation != "v3"
]


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in BY_WARPS])
@given(data=st.data())
def test_exact(name, data, device):
    check(name, data, device)


@pytest.mark.parametrize("name", BY_WARPS)
@settings(max_examples=min(100, settings.default.max_examples))
@given(data=st.data())
def test_exact_by_warps(name, data, device):
    check(name, data, device)


def check(name, data, device):
    variant = catalog.find(name)
    case = data.draw(cases(variant))
    try:
        verdict = gate.check(variant, case.problem, case.tile, case.make(), device)
    except Infeasible as reason:
        assert not device.simulated, reason
        return
    assert verdict.passed, f"python -m sandbox check {name} {case}: {verdict.why}"
