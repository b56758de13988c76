"""roofline: the work by hand, what binds a kernel on made-up devices, what is said of it, and the picture."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from sandbox import catalog, picture, target
from sandbox.mask import Mask
from sandbox.measure import gate, roofline, roofline_report
from sandbox.measure.cases import Rows
from sandbox.measure.roofline import ASKED, DRAM, LEAST, Ceiling, Chip
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Tile

simulated = pytest.mark.skipif(target.KIND != "simulator", reason="counted on the simulator")
P, TILE = Problem(1, 2, 2, 256, 256, 64), Tile(64, 64)


def chip(dram, fma, exp=1e15, tensor=1e15, sms=10) -> Chip:
    """A GPU of these rates."""
    return Chip("made up", sms, *(Ceiling(rate, "by hand") for rate in (dram, fma, tensor, exp)))


def work_of(name, shape=P, tile=TILE, **measured):
    moved = roofline.asked(name, shape, tile)
    return roofline.work(catalog.find(name), shape, tile, {ASKED: sum(map(sum, moved.values())), **measured})


# ------------------------------------------------------------------------------------------------ the work, by hand


def test_work_by_hand():
    work = work_of("fwd_v2")
    assert work.flops == 4 * 64 * 2 * 256**2 and work.exps == 2 * 256**2
    assert work.bytes[LEAST] == 4 * 2 * 256 * (4 * 64 + 1)  # Q, K, V, O and LSE, in two heads
    assert work.bytes[ASKED] == 4 * 2 * 256 * (64 + 4 * 64 + 4 * 64 + 64 + 1)  # K and V for each of 4 row blocks
    assert work.blocks == 2 * 4 and work_of("fwd_v1").blocks == 2
    assert work_of("bwd_v2").flops == 2.5 * work.flops and work_of("bwd_v2", tile=Tile(32, 64)).blocks == 2 * 8
    assert work.intensity(LEAST) == pytest.approx(4 * 256 * 64 / (4 * 257))


def test_bytes_by_array_in_half_precision():
    """O travels in float32 until its last visit."""
    moved = roofline.asked("fwd_v1", replace(P, dtype="fp16"), TILE)
    once = 2 * 256 * 64
    assert moved["Q"] == (2 * 4 * once, 0) and moved["O"] == (0, 2 * once) and moved["O_acc"] == (12 * once, 12 * once)
    assert roofline.asked("softmax_online", Rows(3, 5, "fp16"), None) == {"X": (2 * 2 * 15, 0), "Y": (0, 2 * 15)}
    assert roofline.asked("no_such", P, TILE) is None and roofline.asked("no_such", Rows(3, 5), None) is None


def test_work_of_a_softmax_is_its_exps():
    work = work_of("softmax_online", Rows(8, 64), None)
    assert work.operations == (3 * 8 * 64, "exp") and work.bytes == {LEAST: 8 * 8 * 64, ASKED: 12 * 8 * 64}


@simulated
@pytest.mark.parametrize("name", [name for name, each in roofline.EXPS.items() if each > 1] + ["bwd_v2"])
def test_exps_are_those_that_the_kernel_evaluates(name, device, monkeypatch):
    """Counted in a run, at sizes that leave no lane without an element."""
    variant, taken = catalog.find(name), [0]
    module = importlib.import_module(variant.build.__module__)

    def counting(of):
        def counted(x):
            taken[0] += 1
            return of(x)

        return counted

    monkeypatch.setattr(module, "exp", counting(module.exp))
    monkeypatch.setattr("sandbox.device.softmax.exp", counting(np.exp))
    if variant.direction == "softmax":
        shape, tile = Rows(4, 64), None
        assert gate.check_softmax(variant, torch.randn(4, 64), device).passed
    else:
        shape, tile = Problem(1, 1, 1, 16, 16, 4), Tile(8, 8)
        assert gate.check(variant, shape, tile, gate.gaussian(shape, 0), device).passed
    exps = roofline.work(variant, shape, tile, {}).exps
    elements = exps / roofline.EXPS.get(name, 1)
    assert exps <= taken[0] < exps + 0.6 * elements  # rescaling takes a few more: a row and tile, or a row and lane


@pytest.mark.parametrize("name, visits", [("fwd_v1", True), ("fwd_v2", False), ("bwd_v2", False), ("no_such", False)])
def test_tiles_that_a_mask_empties(name, visits):
    causal = replace(P, mask=Mask(causal=True))
    assert roofline.visits_empty_tiles(name, causal, TILE) == visits
    assert not roofline.visits_empty_tiles(name, P, TILE)
    assert not roofline.visits_empty_tiles(name, causal, Tile(256, 256))  # one tile, and it is seen


# ---------------------------------------------------------------------------------------------------------- the walls


def test_a_compute_bound_device():
    """1 ms of multiply-adds, 0.1 ms of bytes."""
    work = work_of("fwd_v2")
    walls = roofline.walls(work, chip(dram=work.bytes[ASKED] * 1e4, fma=work.flops * 1e3, sms=8))
    assert [wall.name for wall in walls[:2]] == ["fp32 multiply-add", walls[1].name] and walls[0].seconds == 1e-3
    assert walls[1].moved == ASKED and walls[1].seconds == 1e-4 and not walls[1].stands
    text = roofline_report.verdict("fwd_v2", walls, 1.25e-3)
    assert text.startswith("fwd_v2 stands at a wall: it is at 80% of fp32 multiply-add.  It takes 1.25 ms, and 1 ms")
    assert "Tensor cores would move that wall" in text
    text = roofline_report.verdict("fwd_v2", walls, 4e-3)
    assert text.startswith("fwd_v2 stands at no wall: it is at 25% of the nearest") and "shared memory" in text
    text = roofline_report.verdict("fwd_v2", walls, None)
    assert text.startswith("fwd_v2 takes 1 ms at least") and "%" not in text


def test_a_memory_bound_device():
    """What it asks for is no wall, even where it would take longest: what was measured in DRAM is."""
    work = work_of("fwd_v2")
    slow = chip(dram=work.bytes[LEAST] * 1e3, fma=work.flops * 1e6)
    walls = roofline.walls(work, slow)
    assert walls[0].moved == ASKED and roofline.nearest(walls).moved == LEAST
    assert "it is at 50% of DRAM, least bytes possible" in roofline_report.verdict("fwd_v2", walls, 2e-3)
    assert "Only a narrower dtype would move that wall" in roofline_report.verdict("fwd_v2", walls, 2e-3)
    walls = roofline.walls(work_of("fwd_v2", **{DRAM: 3 * work.bytes[LEAST]}), slow)
    assert roofline.nearest(walls).moved == DRAM and roofline.nearest(walls).seconds == pytest.approx(3e-3)
    assert "they are 3.0 x the least possible" in roofline_report.verdict("fwd_v2", walls, 4e-3)
    walls = roofline.walls(work_of("fwd_v2", **{DRAM: work.bytes[LEAST] + 1}), slow)
    assert roofline.nearest(walls).moved == DRAM and "Only a narrower dtype" in roofline_report.verdict("x", walls, 1.0)


def test_a_grid_that_leaves_multiprocessors_idle():
    walls = roofline.walls(work_of("fwd_v1"), chip(dram=1e15, fma=1e9, sms=10))
    wall = roofline.nearest(walls)
    assert wall.name == "fp32 multiply-add on 2 of 10 multiprocessors" and wall.ceiling.rate == 0.2e9
    assert "More blocks would move that wall: 8 multiprocessors have none" in roofline_report.verdict(
        "fwd_v1", walls, 1.0
    )
    assert "multiprocessors" not in roofline.nearest(roofline.walls(work_of("fwd_v1"), chip(1e15, 1e9, sms=2))).name


def test_a_kernel_that_declares_the_tensor_cores():
    variant = replace(catalog.find("fwd_v2"))
    object.__setattr__(variant, "unit", roofline.TENSOR)
    work = roofline.work(variant, replace(P, dtype="fp16"), TILE, {})
    walls = roofline.walls(work, chip(1e15, fma=1e9, tensor=4e9, sms=8))
    assert [(w.name, w.stands) for w in walls if w.of == "FLOP"] == [("tensor cores", True)]
    assert roofline.nearest(walls).ceiling.rate == 4e9


def test_the_exp_unit_is_a_wall_where_its_rate_is_known():
    work, slow = work_of("fwd_v2"), chip(1e15, 1e15, exp=1e3)
    assert roofline.nearest(roofline.walls(work, slow)).name == "exp unit"
    assert "exp unit" not in [wall.name for wall in roofline.walls(work, replace(slow, exp=None))]


def test_datasheets():
    h200, h100 = (roofline.datasheet(name, "bf16") for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
    assert (h200.dram.rate, h100.dram.rate) == (4.8e12, 3.35e12) and h200.name == HOPPER.name and h200.sms == HOPPER.sms
    assert h200.fma.rate == pytest.approx(66.9e12, rel=1e-3) and h200.exp.rate == pytest.approx(4.18e12, rel=1e-3)
    assert h200.tensor.rate == 989.4e12 and roofline.datasheet("NVIDIA H200", "fp32").tensor.rate == 164.9e12
    assert roofline.datasheet("some GPU", "fp32") is None


@pytest.mark.parametrize(
    "x, words", [(67e12, "67 TB"), (999.6, "1,000 B"), (0, "0 B"), (3.549e-3, "3.55 mB"), (8e15, "8,000 TB")]
)
def test_numbers_in_words(x, words):
    assert roofline_report.si(x, "B") == words


# -------------------------------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("seconds", [None, 1e-4])
@pytest.mark.parametrize("name, shape", [("fwd_v1", P), ("bwd_v2", P), ("softmax_tiled", Rows(8, 64))])
def test_the_picture_names_its_roofs_and_points(name, shape, seconds):
    work = work_of(name, shape, TILE, **{DRAM: 10_000})
    walls = roofline.walls(work, roofline.datasheet("NVIDIA H200", "fp32"))
    figure = roofline_report.draw(name, "where, on what", work, walls, seconds)
    figure.canvas.draw()
    (axes,) = figure.axes
    words = " ".join(text.get_text().replace("\n", " ") for text in axes.texts)
    assert (
        "DRAM 4.8 TB/s" in words and "exp unit" in words and "bytes asked for: " in words and "least bytes: " in words
    )
    assert ("of the wall" in words) == (seconds is not None)
    if name == "fwd_v1":
        assert "fp32 multiply-add on 2 of 132 multiprocessors" in words and "tensor cores, TF32 x 3 (not used)" in words
    picture.plt.close(figure)
