"""tile_choice: what it asks, what it makes of a tile that cannot run, and that it answers by the numbers."""

import json
import math
from pathlib import Path

import pytest
from test_experiments import read, run

from experiments import common, tile_choice
from sandbox import catalog, target
from sandbox.choose import candidates
from sandbox.mask import Mask
from sandbox.measure import fastest, gate, timing
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Infeasible

RECORDED = Path(__file__).parents[1] / "results/nvidia-h200"
SIMULATED = target.KIND == "simulator"
OPTIONS = dict(variant=(), seqlen=None, head_dim=None, heads=None, mask=None, dtype="bf16", seed=0)


def plan(**options):
    return tile_choice.plan(HOPPER, **OPTIONS | options)


def rows(slower):
    """The rows if the chosen tile were slower by slower(point)."""
    for point in plan():
        behind, row = slower(point), point.fields() | dict.fromkeys(tile_choice.MEASURED)
        row |= {"device": "NVIDIA H200", "revision": "abc", "gate": "passed", "tried": len(point.tiles)}
        best = str(point.chosen) if not behind else str(next(t for t in point.tiles if t != point.chosen))
        row |= {"measured": best, "measured_behind": 0.01}
        yield row | {"behind": behind, "best": best, "tflops": 300.0, "seconds": 1e-3, "ms": {best: 1.0}}


def test_every_tile_that_fits_is_tried_beside_the_chosen_one():
    points = plan()
    assert {point.variant.name for point in points} == set(tile_choice.VARIANTS)
    for point in points:
        assert point.chosen in point.tiles and point.infeasible is None
        assert len(point.tiles) == len(set(point.tiles))
        own = {str(tile) for tile in catalog.find(point.variant.name).tiles}
        assert {str(tile) for tile in point.tiles} | {name for name, _ in point.misfits} == own
        assert [tile for _, _, tile in point.kernels()] == list(point.tiles)
    keys = [tuple(str(point.fields()[name]) for name in tile_choice.KEY) for point in points]
    assert len(set(keys)) == len(keys)


def test_all_pairs_of_what_is_asked_for():
    asked = plan(head_dim=(64, 96), mask="causal", heads=(4,), seqlen=(512, 1000), variant=("fwd_v2_mma",))
    assert [(p.problem.d, p.problem.mask.causal, p.problem.H, p.problem.N_q) for p in asked] == [
        (d, True, 4, N) for d in (64, 96) for N in (512, 1000)
    ]
    with pytest.raises(ValueError, match="softmax_safe: it has no tile"):
        plan(variant=("softmax_safe",))
    with pytest.raises(ValueError, match="multiples of 16, not 40"):
        plan(head_dim=(40,), variant=("fwd_v2_mma", "bwd_v2_mma"))
    unfit, fit = plan(head_dim=(40, 48), heads=(4,), seqlen=(512,), mask="none", variant=("bwd_v2_mma",))
    assert "multiples of 16" in unfit.infeasible and fit.infeasible is None
    assert tile_choice.measure(unfit)["gate"] is None


@pytest.mark.skipif(not SIMULATED, reason="there is a GPU here")
def test_it_wants_a_gpu(tmp_path, capsys):
    assert run("tile_choice", "--out", tmp_path / "out") == 2
    assert "without a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def measured(monkeypatch, device):
    """measure(point) if tiles took so many milliseconds: nothing is launched."""
    passed = gate.Verdict(passed=True, max_error=0.0, ratio=0.5, why="", traffic=None, launch=None)

    def measure(point, ms, refused=(), verdict=passed):
        def check(variant, problem, tile, inputs, device):
            if tile in refused:
                raise Infeasible(tile, "spills 64 B")
            return verdict

        monkeypatch.setattr(gate, "check", check)
        monkeypatch.setattr(tile_choice, "tensors", lambda point: [])
        monkeypatch.setattr(fastest, "_launch", lambda problem, variant, tile, device, tensors: tile)
        monkeypatch.setattr(
            timing, "time_together",
            lambda tiles, budget_s: [timing.Timing(ms(tile), ms(tile), ms(tile), 3, 0.0) for tile in tiles],
        )  # fmt: skip
        return tile_choice.measure(point)

    return measure


def test_what_the_compiler_refuses_is_told_and_the_others_are_compared(measured):
    point = plan(head_dim=(64,), heads=(24,), seqlen=(3000,), mask="none", variant=("fwd_v2_mma",))[0]
    bad, good = [tile for tile in point.tiles if tile != point.chosen][:2]
    row = measured(point, lambda tile: 1.0 if tile in (bad, good) else 1.25, refused=(bad,))
    assert row["misfits"][str(bad)] == "spills 64 B" and str(bad) not in row["ms"]
    assert (row["gate"], row["best"], row["tried"]) == ("passed", str(good), len(point.tiles) - 1)
    assert row["behind"] == 0.25 and row["seconds"] == 1e-3
    few = [tile for tile in point.few if tile != bad]
    assert row["measured"] == str(good if good in few else few[0])
    assert row["measured_behind"] == (0.0 if good in few else 0.25)

    row = measured(point, lambda tile: 1.0, refused=(point.chosen,))
    assert row["behind"] is None and "the chooser's tile did not run" in tile_choice.answer([point.fields() | row])
    assert measured(point, lambda tile: 1.0, refused=point.tiles)["infeasible"] == "no tile runs"


def test_nothing_is_timed_after_a_failed_gate(measured):
    failed = gate.Verdict(passed=False, max_error=1.0, ratio=9.0, why="O is off", traffic=None, launch=None)
    row = measured(plan()[0], lambda tile: 1.0, verdict=failed)
    assert row["gate"].startswith("failed: ") and "O is off" in row["gate"] and row["ms"] is None


def test_it_answers_by_the_numbers(tmp_path):
    found = list(rows(lambda point: 0.0))
    n, ahead = len(tile_choice.SHAPES["fwd"]), len(tile_choice.SHAPES["bwd"])
    assert f"at {n} of {n} shapes, 0.0% slower in the mean; timed once" in tile_choice.answer(found)
    unmeasured = [row | {"measured": None, "measured_behind": None} for row in found]  # as they were recorded once
    assert f"at {n} of {n} shapes, 0.0% slower in the mean." in tile_choice.answer(unmeasured)
    found = list(rows(lambda point: 0.0301 if point.problem.d == 128 else 0.03))
    off = {way: sum(d == 128 for d, *_ in shapes) for way, shapes in tile_choice.SHAPES.items()}
    said = tile_choice.answer(found)
    assert f"at {n - off['fwd']} of {n} shapes" in said and f"at {ahead - off['bwd']} of {ahead} shapes" in said
    assert "3.0% slower than" in said and "furthest at d=128" in said
    assert f"the few that it ranks first: at {n} of {n}." in said
    common.report(tile_choice.EXPERIMENT, found, tmp_path)
    assert (tmp_path / "tile_choice.png").stat().st_size > 10_000
    assert tile_choice.draw([row | {"gate": None, "behind": None} for row in found])


NEARLY_ALL = [("fwd_v2_mma", 0.88, 0.99), ("bwd_v2_mma", 0.9, 0.99), ("fwd_v3", 0.85, 0.95)]


@pytest.mark.parametrize("name, chosen, timed", NEARLY_ALL)
def test_by_what_was_recorded(name, chosen, timed):
    """The chooser as it is now, on the H200's sweeps: so often its tile, and the best of the few, are near the best."""
    variant, ours, few = catalog.find(name), [], []
    for row in map(json.loads, (RECORDED / "tile_choice.jsonl").read_text().splitlines()):
        if row["variant"] == name:
            H, N, mask = row["H"], row["N"], Mask(row["causal"])
            problem = Problem(1, H, H, N, N, row["d"], row["dtype"], mask=mask)
            ms = [row["ms"].get(str(tile), math.inf) for tile in candidates(problem, HOPPER, variant)]
            ours.append(ms[0] / min(row["ms"].values()) - 1)
            few.append(min(ms) / min(row["ms"].values()) - 1)
    assert len(ours) >= 20
    assert sum(x <= tile_choice.NEAR for x in ours) >= chosen * len(ours), sorted(ours)[-5:]
    assert sum(x <= tile_choice.NEAR for x in few) >= timed * len(few), sorted(few)[-5:]


@pytest.mark.skipif(SIMULATED, reason="it wants a GPU")
def test_on_a_gpu(tmp_path):
    words = ["--variant", "fwd_v2_mma", "--head-dim", 64, "--heads", 4, "--seqlen", 512, "--mask", "none"]
    assert run("tile_choice", *words, "--out", tmp_path) == 0
    (row,) = read(tmp_path, "tile_choice")
    assert row["gate"] == "passed" and row["behind"] >= 0 and row["ms"][row["best"]] == min(row["ms"].values())
