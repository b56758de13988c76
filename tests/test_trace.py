"""trace: the marks that a traced build leaves, what is made of them, and what is refused."""

import json

import pytest
import torch

from sandbox import emulator, target
from sandbox.__main__ import main
from sandbox.kernels import fwd_v3
from sandbox.mask import Mask
from sandbox.measure import gate, trace, trace_report
from sandbox.problem import Problem
from sandbox.variant import Tile

SIMULATED = target.KIND == "simulator"
TILE = Tile(128, 64)
T = {name: n for n, name in enumerate(trace.STATES)}


def marks(*tracks, room=40):
    """One block: of each warpgroup (cycle, state)..., between ties at 1 GHz."""
    found = torch.zeros(1, len(tracks), room, 2, dtype=torch.int32)
    for g, track in enumerate(tracks):
        first, last = track[0][0], track[-1][0]
        ties = [[(cycle, "nanoseconds"), (5 + cycle - first, "nanoseconds")] for cycle in (first, last)]
        for n, (when, state) in enumerate([*ties[0], *track, *ties[1]]):
            found[0, g, n] = torch.tensor([(when + 2**31) % 2**32 - 2**31, T[state]])
    return found


STEP = [
    (100, "QK"), (110, "for V"), (120, "PV"), (130, "for S"), (200, "softmax"), (280, "for O"), (300, "pack"),
    (310, "end"),
]  # fmt: skip
OTHER = [(100, "for turn"), (220, "QK"), (230, "for S"), (260, "softmax"), (290, "pack"), (310, "end")]


def test_products_are_under_way_until_they_are_known_to_be_done():
    ((track,),) = trace.read(marks(STEP))
    assert track.whole and track.ghz == 1
    assert track.products == [trace.Span("QK", 0, 100), trace.Span("PV", 20, 200)]
    assert [s.what for s in track.states] == [state for _, state in STEP[:-1]]
    ((track,),) = trace.read(marks(STEP), overlap=False)
    assert track.products[1] == trace.Span("PV", 20, 100)


def test_how_much_is_hidden_and_by_whom():
    # warpgroup 0: softmax [100, 180) all under its own P V; warpgroup 1's Q Kᵀ [120, 160) covers half of it.
    # warpgroup 1: softmax [160, 190) under nothing of its own, all under warpgroup 0's P V [20, 200).
    found = trace.hidden(trace.read(marks(STEP, OTHER)))
    assert found.own == pytest.approx(80 / 110)
    assert found.others == pytest.approx((40 + 30) / 110)
    assert found.either == pytest.approx(1)


def test_clocks_wrap():
    moved = [(when + 2**32 - 150, state) for when, state in STEP]
    ((track,),) = trace.read(marks([(when % 2**32, state) for when, state in moved]))
    assert (track.states[0].begin, track.states[-1].end, track.ghz) == (0, 210, 1)


def test_a_track_without_room_says_so():
    ((track,),) = trace.read(marks(STEP)[:, :, :6])
    assert not track.whole and track.ghz is None and [s.what for s in track.states] == ["QK", "for V", "PV"]


def test_steps_within_and_across_row_blocks():
    track = [(0, "QK"), (10, "softmax"), (50, "QK"), (90, "softmax"), (95, "finish"), (120, "QK"), (130, "softmax")]
    within, across = trace.steps(trace.read(marks([*track, (140, "end")])))
    assert (within, across) == ([50], [70])


def test_perfetto_holds_every_span():
    blocks = trace.read(marks(STEP, OTHER))
    made = json.loads(json.dumps(trace.perfetto(blocks, 2.0, {"kernel": "x"})))
    spans = [e for e in made["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == sum(len(t.states) + len(t.products) for t in blocks[0])
    assert {"name": "softmax", "ph": "X", "ts": 0.05, "dur": 0.04, "pid": 0, "tid": 0} in spans


@pytest.mark.skipif(SIMULATED and emulator.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif(not SIMULATED and torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU")
def test_a_traced_build_is_exact_and_tells_every_product(tmp_path):
    device = target.device()
    problem = Problem(1, 3, 3, 200, 260, 64, "fp16", mask=Mask(True))
    left = torch.zeros(device.sms, 2, 512, 2, dtype=torch.int32, device=target.torch_device())
    variant = fwd_v3.traced(left, stages=2)
    verdict = gate.check(variant, problem, TILE, gate.gaussian(problem, 0, target.torch_device()), device)
    assert verdict.passed, verdict.why
    if not SIMULATED:
        left.zero_()
        verdict.launch()
    blocks = [tracks for tracks in trace.read(left) if tracks]
    # blocks of 64 keys that rows 0..63, 64..127, 128..191 and 192..199 see: 2, 3, 4 and 5, in each of three heads
    for g, blocks_seen in ((0, 18), (1, 24)):
        tracks = [tracks[g] for tracks in blocks]
        assert all(track.whole for track in tracks)
        counts = {what: sum(s.what == what for t in tracks for s in t.states) for what in ("softmax", "PV", "finish")}
        assert counts == {"softmax": blocks_seen, "PV": blocks_seen, "finish": 6}
        products = [s.what for t in tracks for s in t.products]
        assert products.count("QK") == products.count("PV") == blocks_seen
    assert 0 <= trace.hidden(blocks).own <= trace.hidden(blocks).either <= 1
    figure = trace_report.draw(blocks[0], 1.0, "title", "subtitle")
    figure.savefig(tmp_path / "trace.png")
    assert sum(trace.shares(blocks).values()) == pytest.approx(1)
    assert trace_report.table(blocks) and len(trace_report.say("fwd_v3", blocks, TILE, 64)) >= 2


@pytest.mark.skipif(SIMULATED and emulator.compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif(not SIMULATED and torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU")
def test_more_blocks_than_there_is_room_for_are_refused():
    device, problem = target.device(), Problem(1, 2, 2, 200, 200, 64, "fp16")
    left = torch.zeros(3, 2, 64, 2, dtype=torch.int32, device=target.torch_device())
    variant = fwd_v3.traced(left, persistent=False)  # four row blocks, a block each
    with pytest.raises(ValueError, match="room for 3 blocks: 4 are launched"):
        gate.check(variant, problem, TILE, gate.gaussian(problem, 0, target.torch_device()), device)
    assert not left.any()


@pytest.mark.parametrize(
    "words, told",
    [
        (["fwd_v2"], "fwd_v2 has no traced build"),
        (["fwd_v4"], "variant='fwd_v4' is unknown"),
        (["fwd_v3", "--marks", "3"], "16<=x<=65536"),
        (["fwd_v3"], "trace needs a GPU"),
        (["fwd_v3", "--switch", "pingpong=1"], "did you mean ping_pong"),
    ],
)
def test_refused(words, told, capfd, tmp_path):
    if told == "trace needs a GPU" and not SIMULATED:
        pytest.skip("here is a GPU")
    assert main(["trace", *words, "--out", str(tmp_path / "x")]) == 2
    assert told in capfd.readouterr().err
    assert not (tmp_path / "x").exists()
