"""Hypothesis profiles and their seed, and the device that the tests run on; the session's first lines name all three.

HYPOTHESIS_PROFILE  quick, default or ci: how many examples a test draws; ci where CI=true
HYPOTHESIS_SEED     the seed to draw them from; a fresh one each session unless given
"""

import os
import secrets

import pytest
import torch
from child import child
from hypothesis import HealthCheck, is_hypothesis_test, seed, settings

from sandbox import target

EXAMPLES = {"quick": 5, "default": 25, "ci": 300}
CI = os.environ.get("CI", "").lower() in ("1", "true")
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if CI else "default")
SEED = os.environ.setdefault("HYPOTHESIS_SEED", str(secrets.randbits(32)))  # the workers of pytest -n inherit it

if PROFILE not in EXAMPLES:
    pytest.exit(f"HYPOTHESIS_PROFILE={PROFILE!r}: expected one of {', '.join(EXAMPLES)}", returncode=4)
if not SEED.isdecimal():
    pytest.exit(f"HYPOTHESIS_SEED={SEED!r}: expected an integer", returncode=4)
for name, examples in EXAMPLES.items():
    settings.register_profile(
        name, settings.get_profile("default"), max_examples=examples, deadline=None, derandomize=False, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], **({"database": None} if CI else {}),
    )  # fmt: skip
settings.load_profile(PROFILE)


def pytest_report_header(config):
    forced = config.getoption("--hypothesis-seed", None)
    return [
        f"sandbox: target {target.KIND}" + (f", {target.device().name}" if target.KIND == "gpu" else ""),
        f"hypothesis: profile {PROFILE}, {EXAMPLES[PROFILE]} examples; HYPOTHESIS_SEED={forced or SEED}",
    ]


def pytest_sessionstart(session):
    """pytest -q hides the header: the seed is shown all the same."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not reporter.showheader:
        for line in pytest_report_header(session.config):
            reporter.write_line(line)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--hypothesis-seed", None) is None:
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                seed(int(SEED))(item.obj)


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers already share the cores


@pytest.fixture(scope="session")
def device():
    """What the kernels run on: sandbox.variant.Device."""
    return target.device()


@pytest.fixture(scope="session")
def torch_device():
    """Where their tensors live."""
    return target.torch_device()


@pytest.fixture(scope="module")
def compiler():
    """A process that compiles for sm_90a, with a GPU or without: child.py."""
    with child() as pool:
        yield pool


@pytest.fixture(autouse=True)
def prototypes_stay_as_they_were():
    """`--path DIR` of one test is not seen by the next."""
    before = os.environ.get("SANDBOX_PROTOTYPES")
    yield
    os.environ.pop("SANDBOX_PROTOTYPES", None)
    if before is not None:
        os.environ["SANDBOX_PROTOTYPES"] = before
