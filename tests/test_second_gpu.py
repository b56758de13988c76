"""Tensors on the second GPU, while the first is current: the same bits as on the first, in whatever order."""

from __future__ import annotations

import pytest
import torch

import sandbox
from sandbox import catalog, target
from sandbox.choose import choose_tile
from sandbox.measure import gate
from sandbox.problem import Problem

SIMULATED = target.KIND == "simulator"
GPUS = 0 if SIMULATED else torch.cuda.device_count()
pytestmark = pytest.mark.skipif(
    GPUS < 2, reason="needs two GPUs: " + ("the simulator has none" if SIMULATED else f"this machine has {GPUS}")
)
FIRST, SECOND = "cuda:0", "cuda:1"
FORWARDS = ["fwd_v3", "fwd_v2", "fwd_v3_fp8", "fwd_v1"]
PROBLEM = Problem(2, 4, 2, 300, 300, 64, "bf16")


@pytest.fixture(autouse=True)
def the_first_stays_current():
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def need(name: str) -> catalog.Variant:
    """The kernel, unless one of the two GPUs cannot run it."""
    variant = catalog.find(name)
    if variant.generation == "v3" and any(torch.cuda.get_device_capability(n)[0] != 9 for n in (0, 1)):
        pytest.skip(f"{name} needs two Hopper GPUs")
    return variant


def inputs(seed: int, where: str, problem: Problem = PROBLEM) -> list[torch.Tensor]:
    x = gate.gaussian(problem, seed, where)
    return [x.q, x.k, x.v]


def attend(name: str, seed: int, where: str, problem: Problem = PROBLEM) -> tuple[torch.Tensor, ...]:
    O, LSE = sandbox.attention(*inputs(seed, where, problem), variant=name, causal=True, return_lse=True)
    assert O.device == LSE.device == torch.device(where)
    return O.cpu(), LSE.cpu()


def same(found, expected) -> bool:
    return all(gate.same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FORWARDS)
def test_attention_and_lse(name):
    """By turns, of shapes that the other has not seen yet."""
    need(name)
    longer = Problem(1, 4, 4, 500, 500, 64, "fp16")
    for seed, problem in enumerate((PROBLEM, longer, PROBLEM)):
        there, here = attend(name, seed, SECOND, problem), attend(name, seed, FIRST, problem)
        assert same(there, here) and here[0].isfinite().all() and here[1].isfinite().all()


@pytest.mark.parametrize("name", FORWARDS)
def test_interleaved_without_waiting(name):
    need(name)
    sets = {where: [inputs(seed, where) for seed in range(6)] for where in (FIRST, SECOND)}
    found = {FIRST: [], SECOND: []}
    for n in range(6):
        for where in (SECOND, FIRST):
            found[where].append(sandbox.attention(*sets[where][n], variant=name))
    assert same([O.cpu() for O in found[SECOND]], [O.cpu() for O in found[FIRST]])


@pytest.mark.parametrize("name", FORWARDS)
def test_the_launch_itself(name):
    """Not through attention(): a kernel that is built, as bench and gate launch it."""
    variant, device, found = need(name), target.device(), []
    tile = choose_tile(PROBLEM, device, variant)
    for where in (SECOND, FIRST, SECOND):
        with torch.cuda.device(where):
            run, outputs = gate.prepare(variant, PROBLEM, tile, gate.gaussian(PROBLEM, 0, where), device)
            run()
            found.append([x.cpu() for x in outputs.values()])
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_a_hopper_launch_goes_where_its_tensors_are():
    variant, device = need("fwd_v3"), target.device()
    tile = choose_tile(PROBLEM, device, variant)
    run, outputs = gate.prepare(variant, PROBLEM, tile, gate.gaussian(PROBLEM, 0, SECOND), device)
    run()  # the first is current
    torch.cuda.synchronize(SECOND)
    here, expected = gate.prepare(variant, PROBLEM, tile, gate.gaussian(PROBLEM, 0, FIRST), device)
    here()
    assert same([x.cpu() for x in outputs.values()], [x.cpu() for x in expected.values()])


@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_gradients(generation):
    """From the second GPU's autograd thread; bit by bit, so by a backward that always gives the same."""
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for where in (SECOND, FIRST):
            x = [y.requires_grad_() for y in inputs(3, where)]
            O = sandbox.attention(*x, variant=generation, causal=True)
            dO = torch.randn(O.shape, generator=torch.Generator().manual_seed(4)).to(O)
            found.append([g.cpu() for g in torch.autograd.grad(O, x, dO)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*found) and all(g.isfinite().all() for g in found[0])


def test_in_8_bits():
    need("fwd_v3_fp8")
    found = []
    for where in (SECOND, FIRST):
        x = sandbox.quantize_fp8(*inputs(5, where))
        found.append(
            [x.q.cpu(), x.v.cpu(), x.k_scale.cpu(), *(y.cpu() for y in sandbox.attention_fp8(x, return_lse=True))]
        )
    assert same(*found)


def test_a_graph_on_the_second():
    need("fwd_v3")
    x = inputs(6, SECOND)
    right = sandbox.attention(*x, variant="fwd_v3")
    with torch.cuda.device(1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            O = sandbox.attention(*x, variant="fwd_v3")
        O.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(O, right)
