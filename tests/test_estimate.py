"""The estimate by which kernels on the tensor cores choose their tile: its steps are those counted; what it obeys."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import catalog
from sandbox.choose import choose_tile
from sandbox.device import estimate, layout
from sandbox.device.estimate import Pace
from sandbox.kernels import fwd_v2_mma, fwd_v3
from sandbox.mask import Mask
from sandbox.measure import formulas
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Tile

sizes = st.integers(0, 70)
masks = st.builds(
    Mask, st.booleans(), st.sampled_from(["bottom_right", "top_left"]),
    st.one_of(st.just((-1, -1)), st.tuples(st.integers(-1, 30), st.integers(-1, 30))),
)  # fmt: skip
tiles = st.builds(Tile, st.integers(1, 20), st.integers(1, 20))


@given(N_q=sizes, N_k=sizes, mask=masks, tile=tiles, group=st.integers(1, 3))
def test_steps_are_the_tiles_that_the_walk_visits(N_q, N_k, mask, tile, group):
    p = Problem(1, group, 1, N_q, N_k, 16, "fp16", mask=mask)
    walk = formulas.walk(p, tile, rounded=True)
    rows, keys = estimate.steps_along_keys(p, tile), estimate.steps_along_rows(p, tile)
    assert (len(rows), len(keys)) == (walk.Tr, walk.Tc)
    assert keys.sum() == group * walk.visits
    assert (rows == 0).sum() == walk.blind
    if tile.Bc == 1:
        assert rows.sum() == walk.K_rows


@given(N_q=st.integers(0, 900), N_k=st.integers(0, 900), mask=masks)
def test_steps_of_fwd_v3_are_those_of_its_scheduler(N_q, N_k, mask):
    """Under a band the first row block goes over the edge, by whole warpgroups; else the last, with less to do."""
    p, tile = Problem(1, 1, 1, N_q, N_k, 64, "fp16", mask=mask), Tile(192, 80)
    (lo, hi), Tr = mask.band(N_q, N_k), -(-N_q // 192)
    before, found = (192 * Tr - N_q) // 64 * 64, fwd_v3.steps(p, tile)
    if mask.banded:
        rows = [range(max(0, i), min(N_q, i + 192)) for i in range(-before, N_q, 192)]
        seen = [(max(0, block[0] + lo), min(N_k, block[-1] + hi + 1)) for block in rows]
        assert found.tolist() == [max(0, -(-end // 80) - first // 80) for first, end in seen]
    else:
        whole = -(-N_k // 80)
        last = whole * {0: 1, 64: 2 / 3, 128: 1 / 2}[before]
        assert found == pytest.approx([whole] * (Tr - 1) + [last] * min(Tr, 1))


paces = st.builds(
    Pace, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.floats(10, 1e4), st.floats(0, 1e3), st.floats(0, 1e4)
)


@given(
    pace=paces, steps=st.lists(st.integers(0, 40), max_size=9), heads=st.integers(0, 400), section=st.integers(1, 400)
)  # fmt: skip
def test_more_to_do_takes_no_less_time(pace, steps, heads, section):
    steps = np.array(sorted(steps, reverse=True), dtype=int)
    clocks = pace.clocks(steps, heads, section, HOPPER)
    assert clocks >= 0 and (clocks > 0 or pace.edges == 0 or not heads * len(steps) or not steps.any())
    assert pace.step(1) >= pace.busy and pace.step(2) >= pace.step(1)
    longest = max(steps, default=0) * pace.busy * (heads > 0)
    work = heads * steps.sum() * pace.busy * pace.warps / (4 * HOPPER.sms)
    assert (
        clocks >= 0.999 * longest and clocks >= 0.999 * work
    )  # no faster than its longest block, or its four quarters


@given(
    found=st.dictionaries(st.sampled_from(fwd_v2_mma.TILES), paces, min_size=1, max_size=6), N=st.integers(1, 3000),
    causal=st.booleans(), heads=st.integers(1, 200),
)  # fmt: skip
def test_the_quickest_is_as_good_as_any_and_the_largest_of_those(found, N, causal, heads):
    problem = Problem(1, heads, heads, N, N, 64, "bf16", mask=Mask(causal))
    steps = {tile: estimate.steps_along_keys(problem, tile) for tile in found}
    clocks = {tile: pace.clocks(steps[tile], heads, heads, HOPPER) for tile, pace in found.items()}
    assert all(pace.even(steps[tile], heads, HOPPER) <= clocks[tile] * 1.001 for tile, pace in found.items())
    as_good = [tile for tile in found if clocks[tile] <= min(clocks.values()) * (1 + estimate.AS_GOOD)]
    first = max(as_good, key=lambda t: (t.Br * t.Bc, t))
    for most in (1, 3):
        others = sorted((tile for tile in found if tile != first), key=lambda t: (clocks[t], t))
        assert estimate.nearest(steps, found, heads, heads, HOPPER, most) == [first, *others][:most]


def test_equal_blocks_come_in_waves():
    pace, one = Pace(4, 1, 300.0, 100.0, 0.0), np.full(1, 10)
    alone = pace.clocks(one, 1, 1, HOPPER)
    assert pace.clocks(one, 132, 132, HOPPER) == alone
    assert pace.clocks(one, 133, 133, HOPPER) == pytest.approx(2 * alone)


def test_the_last_blocks_share_a_multiprocessor_or_have_one_each():
    """Of 2 x 132 places, all free at once, the last two blocks take those of one multiprocessor, or of two."""
    pace, one = Pace(4, 2, 300.0, 150.0, 0.0), np.full(1, 1000)
    wave = pace.clocks(one, 264, 264, HOPPER)
    last = pace.clocks(one, 266, 266, HOPPER) - wave
    assert wave == pytest.approx(1000 * pace.step(2))
    assert last == pytest.approx(1000 * (pace.step(2) + pace.step(1)) / 2)


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=9), heads=st.integers(1, 60), section=st.integers(1, 60),
    sms=st.integers(3, 12),
)  # fmt: skip
def test_blocks_come_in_turn_section_by_section(steps, heads, section, sms):
    """Each goes to the multiprocessor that is the first to be free; long grids are even but for their end."""
    pace, device = Pace(4, 1, 300.0, 100.0, 50.0), replace(HOPPER, sms=sms)
    steps, busy = np.array(steps), [0.0] * sms
    for first in range(0, heads, section):
        for n in sorted(steps, reverse=True):
            for _ in range(first, min(heads, first + section)):
                busy[busy.index(min(busy))] += n * pace.step(1) + pace.edges
    clocks, total = pace.clocks(steps, heads, section, device), sum(busy)
    if heads * len(steps) < estimate.WAVES * sms:
        assert clocks == pytest.approx(max(busy))
    longest = max(steps) * pace.step(1) + pace.edges
    assert total / sms <= clocks * 1.001 and clocks <= (total / sms + longest) * 1.001


@given(pace=paces, steps=st.lists(st.integers(0, 40), min_size=1, max_size=9), heads=st.integers(1, 9))
def test_blocks_that_are_all_there_at_once_share_as_they_come(pace, steps, heads):
    """The i-th goes to multiprocessor i mod sms; a step takes as long as so many as are left there make it."""
    steps, device = np.array(sorted(steps, reverse=True)), replace(HOPPER, sms=heads * len(steps) // pace.blocks + 1)
    blocks, slowest = sorted(np.repeat(steps, heads), reverse=True), 0.0
    for first in range(device.sms):
        left, clocks, done = blocks[first :: device.sms], 0.0, 0
        while left:
            clocks += (left[-1] - done) * pace.step(len(left))
            done = left.pop()
        slowest = max(slowest, clocks)
    assert pace.clocks(steps, heads, heads, device) == pytest.approx(slowest + pace.edges)


def test_copies_of_all_blocks_pass_one_port():
    pace = Pace(4, 2, 10.0, 0.0, 0.0, 1000.0)
    assert pace.step(2) == pytest.approx(2 * pace.step(1), rel=1e-3)


@pytest.mark.parametrize(("d", "asked"), [(16, 1), (48, 3), (64, 1), (96, 3), (112, 7), (128, 2), (256, 4)])
def test_lines_that_copies_ask_for(d, asked):
    """A row of d numbers has d / 64 lines; the lanes that share it are a power of 2 of 16 bytes each."""
    assert estimate.lines(64, d, 4) == 64 * asked
    assert estimate.lines(64, 128, 1) == 64 * 4  # four lanes share a row where there are 32 in all


def test_registers_of_a_thread():
    """[CUDA programming guide: a quarter of a multiprocessor has 16,384 registers, a warp takes them 256 at a time]"""
    assert [estimate.registers(*args) for args in ((4, 1), (4, 2), (8, 1), (4, 3), (6, 2), (6, 3), (8, 2))] == [
        255, 255, 255, 168, 168, 96, 128
    ]  # fmt: skip


def choice(name, d, causal, heads, N, **more):
    problem = Problem(1, heads, heads, N, N, d, "bf16", mask=Mask(causal), **more)
    return choose_tile(problem, HOPPER, catalog.find(name))


def test_few_blocks_are_small_and_many_large():
    for d in (64, 128):
        small, large = (choice("fwd_v2_mma", d, False, heads, N) for heads, N in ((4, 512), (64, 4096)))
        assert small.Br < large.Br
        small, large = (choice("bwd_v2_mma", d, True, heads, N) for heads, N in ((4, 512), (64, 4096)))
        assert small.Bc < large.Bc
    for d in (32, 64, 96, 128):
        for causal in (False, True):
            small, large = (choice("fwd_v3", d, causal, heads, 1500) for heads in (8, 300))
            assert (small.Br, large.Br) == (128, 192)


@pytest.mark.parametrize("name", ["fwd_v2_mma", "bwd_v2_mma", "bwd_v2_mma_deterministic"])
@pytest.mark.parametrize("d", [16, 48, 80, 112, 192, 256])
def test_every_shape_has_a_tile_with_registers_to_spare(d, name):
    for causal in (False, True):
        for heads, N in ((1, 1), (1, 0), (3, 130), (24, 3000), (700, 64)):
            tile, kind = choice(name, d, causal, heads, N), Problem(1, 1, 1, 1, 1, d, "bf16", mask=Mask(causal))
            if name == "fwd_v2_mma":
                assert tile in fwd_v2_mma.paces(kind, HOPPER)
            else:
                spare = layout.chosen(kind, tile, HOPPER).registers(False) <= layout.REGISTERS - 24
                known = layout.largest(name, "bwd_v2", kind, HOPPER), Tile(128, 64), Tile(64, 64)
                assert spare or tile in known  # these spill nothing: tests/test_bwd_v2_mma.py, tests/spills.py


def test_a_softcap_takes_what_it_took():
    assert choice("fwd_v2_mma", 64, False, 64, 4096, softcap=5.0) == Tile(128, 64)
    assert choice("fwd_v2_mma", 64, False, 2, 512, softcap=5.0) == Tile(64, 64)
    assert choice("bwd_v2_mma", 64, False, 2, 512, softcap=5.0) == Tile(64, 128)


def test_a_choice_is_made_once_for_each_kind_of_kernel():
    fwd_v2_mma.paces.cache_clear()
    for N in (1000, 1001, 1002):
        choice("fwd_v2_mma", 128, True, 7, N)
    assert fwd_v2_mma.paces.cache_info().misses == 1
