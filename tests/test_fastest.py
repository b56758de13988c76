"""attention(tile="measured"): which tiles are timed, on what, how the answer is kept; with a clock that tests set."""

import functools
import types

import pytest
import torch

from sandbox import attention, autograd, catalog, target
from sandbox.choose import FEW, candidates, choose_tile
from sandbox.mask import Mask
from sandbox.measure import fastest, gate, timing
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Infeasible, Tile

PROBLEM = Problem(1, 24, 24, 3000, 3000, 64, "bf16", mask=Mask(True))
OURS = [catalog.find(name) for name in ("fwd_v2_mma", "bwd_v2_mma", "fwd_v2", "fwd_v3")]
PASSED = gate.Verdict(passed=True, max_error=0.0, ratio=0.5, why="", traffic=None, launch=None)
simulated_only = pytest.mark.skipif(target.KIND != "simulator", reason="there is a GPU here")
gpu_only = pytest.mark.skipif(target.KIND == "simulator", reason="there is no GPU to time anything on")


@pytest.mark.parametrize("variant", OURS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("device", [HOPPER, SIMULATOR], ids=lambda device: device.kind)
@pytest.mark.parametrize("d", [64, 256])
def test_candidates_fit_and_the_chosen_one_is_the_first(variant, device, d):
    problem = Problem(1, 24, 24, 3000, 3000, d, "fp32" if variant.name == "fwd_v2" else "bf16", mask=PROBLEM.mask)
    tiles = candidates(problem, device, variant)
    assert tiles[0] == choose_tile(problem, device, variant)
    assert len(tiles) == len(set(tiles)) and (variant.usual or len(tiles) <= FEW)
    assert device.simulated or len(tiles) > 1
    for tile in tiles:
        variant.fit(problem, tile, device)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """ms: {tile: milliseconds}, refused: tiles that the compiler refuses; `timed`: what was; nothing is launched."""
    clock = types.SimpleNamespace(ms={}, refused=(), verdict=PASSED, timed=[])

    def check(variant, problem, tile, inputs, device):
        if tile in clock.refused:
            raise Infeasible(tile, "spills 64 B")
        return clock.verdict

    def time_together(tiles, budget_s):
        clock.timed.append(tiles)
        return [timing.Timing(2.0, clock.ms.get(tile, 1.0), 3.0, 3, 0.0) for tile in tiles]

    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "_found", {})
    monkeypatch.setattr(fastest, "_launch", lambda problem, variant, tile, device, tensors: tile)
    monkeypatch.setattr(torch.cuda, "device", torch.device)  # a context, too
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gate, "check", check)
    monkeypatch.setattr(timing, "time_together", time_together)
    return clock


def ask(problem=PROBLEM, variant=OURS[0]):
    return fastest.fastest(problem, variant, HOPPER, lambda: [torch.empty(0)])


def test_the_fastest_is_timed_once_and_kept(clock, monkeypatch):
    tiles = candidates(PROBLEM, HOPPER, OURS[0])
    clock.ms = {tiles[2]: 0.5}
    assert ask() == tiles[2] and clock.timed == [tiles]
    clock.ms = {tiles[1]: 0.1}
    assert ask() == tiles[2]  # remembered
    fastest._found.clear()
    assert ask() == tiles[2] and len(clock.timed) == 1  # read from the disk, as another process would
    ask(Problem(1, 24, 24, 3001, 3000, 64, "bf16", mask=Mask(True)))
    assert len(clock.timed) == 2
    fastest._found.clear()
    monkeypatch.setattr(fastest, "kernel_hash", lambda name: "edited")
    assert ask() == tiles[1] and len(clock.timed) == 3


@pytest.mark.parametrize("broken", [b"", b"64", b"\xff", b"7x7"])
def test_what_was_kept_and_cannot_be_read_is_timed_again(clock, broken, tmp_path):
    tile = ask()
    (file,) = tmp_path.glob("*.tile")
    assert file.read_text() == str(tile)
    file.write_bytes(broken)
    fastest._found.clear()
    assert ask() == tile and len(clock.timed) == 2 and file.read_text() == str(tile)


def test_what_the_compiler_refuses_is_passed_over(clock):
    tiles = candidates(PROBLEM, HOPPER, OURS[0])
    clock.ms, clock.refused = {tiles[0]: 0.1, tiles[2]: 0.5}, (tiles[0],)
    assert ask() == tiles[2] and clock.timed == [tiles[1:]]
    clock.refused = candidates(other := Problem(1, 25, 25, 3000, 3000, 64, "bf16", mask=Mask(True)), HOPPER, OURS[0])
    with pytest.raises(Infeasible, match="spills 64 B"):
        ask(other)


def test_nothing_is_timed_that_fails_its_gate(clock, tmp_path):
    clock.verdict = gate.Verdict(passed=False, max_error=1.0, ratio=9.0, why="O is off", traffic=None, launch=None)
    with pytest.raises(timing.Ungated, match=r"fwd_v2_mma with tile \d+x\d+ fails its gate: O is off"):
        ask()
    assert not clock.timed and not list(tmp_path.iterdir()) and not fastest._found


def test_one_candidate_is_not_timed(clock):
    problem = Problem(1, 24, 24, 3000, 3000, 64, "bf16", softcap=5.0)
    assert ask(problem) == choose_tile(problem, HOPPER, OURS[0]) and not clock.timed


def test_a_folder_that_cannot_be_written_costs_the_next_process_its_time(clock, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path / "file"))
    tile = ask()
    assert ask() == tile and len(clock.timed) == 1


def test_no_time_is_taken_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="while a CUDA graph is captured: call it once before"):
        ask()
    assert not clock.timed


@simulated_only
def test_without_a_gpu_it_says_so_before_anything_is_launched():
    q = torch.zeros(1, 8, 1, 8)
    with pytest.raises(ValueError, match=r"tile='measured': there is no GPU here.*expected a pair"):
        attention(q, q, q, tile="measured")
    with pytest.raises(TypeError, match="tile='fastest': expected a pair"):
        attention(q, q, q, tile="fastest")


@simulated_only
@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_its_forward_and_its_backward_timed_on_its_own_tensors(monkeypatch, masked):
    """Both launches run on what they are given, and what comes out is what any other tile gives."""
    asked, g = [], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8, generator=g, requires_grad=True) for _ in range(3))
    mask = torch.rand(1, 2, 9, 9, generator=g) < 0.7 if masked else None

    def taken(problem, variant, device, tensors):
        tile, given = Tile(8, 4), tensors()
        assert not any(x.requires_grad for x in given)
        assert given[0].data_ptr() == q.data_ptr() and given[3].shape == ((1, 2, 9, 9) if masked else (1, 2, 1, 1))
        variant.launcher(problem, tile, device)(problem, *given)
        assert all(x.isfinite().all() for x in given)
        asked.append(variant.name)
        return tile

    monkeypatch.setattr(fastest, "fastest", taken)
    outs = {}
    for tile in ("measured", (8, 4)):
        monkeypatch.setattr(autograd, "_plans", {})
        for x in (q, k, v):
            x.grad = None
        o = attention(q, k, v, mask=mask, tile=tile)
        o.sum().backward()
        outs[tile] = [o.detach(), q.grad, k.grad, v.grad]
    assert asked == ["fwd_v2", "bwd_v2"]
    assert all(map(torch.equal, outs["measured"], outs[8, 4]))


@gpu_only
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu(causal, monkeypatch, tmp_path):
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path))
    draw = functools.partial(torch.randn, 1, 1500, 6, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (draw(requires_grad=True) for _ in range(3))
    for variant, kept in (("fwd_v2_mma", 2), ("fwd_v2_mma", 2), ("v3", 3)):
        with torch.set_grad_enabled(variant != "v3"):
            o = attention(q, k, v, variant=variant, causal=causal, tile="measured")
        assert len(list(tmp_path.glob("*.tile"))) == kept
        want = attention(q.detach(), k.detach(), v.detach(), variant=variant, causal=causal)
        assert (o - want).abs().max() < 0.02
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        again = attention(q, k, v, variant="v3", causal=causal, tile="measured")
    graph.replay()
    assert torch.equal(again, o)
