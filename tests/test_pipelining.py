"""pipelining: its points, what its rows say, from rows made up; emulated, that every build is exact."""

from __future__ import annotations

import json

import pytest
import torch

from experiments import common, pipelining, pipelining_report, tables
from experiments.__main__ import main
from experiments.claims import defaults
from experiments.pipelining_report import ALL, BUILDS, OVERLAP, PING_PONG, SPECIALIZED
from sandbox import emulator, nvrtc, target
from sandbox.kernels import fwd_v3
from sandbox.measure import gate, timing
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Tile, Unsupported

SPEEDS = dict.fromkeys(BUILDS, 640) | {ALL: 700, OVERLAP: 610, PING_PONG: 710, SPECIALIZED: 625, "not persistent": 700}
emulates = pytest.mark.skipif(
    target.KIND != "simulator" or emulator.compiler() is None, reason="needs the simulator and a C++ compiler"
)


def points(device=HOPPER, **options):
    return pipelining.plan(device, **defaults(pipelining.EXPERIMENT) | options)


def rows(speeds=SPEEDS, device="NVIDIA H200", **options):
    """Those of a GPU, where each build is fastest with the fewest keys and O apart."""
    found = []
    for point in points(**options):
        row = (
            point.fields() | common.empty_row() | {"device": device, "revision": "abc", "infeasible": point.infeasible}
        )
        if not point.infeasible:
            row |= {"gate": "passed", "max_error": 1e-4, "error_ratio": 0.2}
            if speed := speeds.get(row["build"]):
                row["tflops"] = speed - row["Bc"] + 80 - 5 * (not row["o_apart"])
                row["seconds"] = point.problem.flops("fwd") / row["tflops"] * 1e-12
        found.append(row)
    return found


def said(found) -> str:
    return " ".join(pipelining.answer(found).split())


# ---- the points -----------------------------------------------------------------------------------------------------


def test_each_build_turns_what_it_is_named_after_and_no_more():
    for point in points():
        switches, turned = pipelining.switches_of(point.notes), BUILDS[point.notes["build"]]
        free = {name for name in ("stages", "o_apart") if name not in turned}
        for name, value in vars(switches).items():
            usual = getattr(fwd_v3.Switches(), name)
            assert name in free or value == turned.get(name, usual), (point.notes["build"], name)
    assert {point.variant for point in points() if point.notes["build"] == OVERLAP} == {"fwd_v3 overlap=False"}


def test_each_build_is_tried_with_the_same_tiles():
    tried = {
        build: {(p.tile, p.notes["o_apart"]) for p in points() if p.notes["build"] == build} for build in BUILDS
    }  # fmt: skip
    assert set(map(frozenset, tried.values())) == {frozenset((t, a) for t in pipelining.TILES for a in (False, True))}
    most = {(p.tile.Bc, p.notes["o_apart"]): p.notes["stages"] for p in points() if p.notes["build"] == ALL}
    assert most == {(128, False): 3, (128, True): 2, (80, False): 4, (80, True): 3}
    assert sum(not point.infeasible for point in points()) <= 40  # at one to two seconds each


def test_what_does_not_fit_is_on_record_with_its_reason():
    misfits = {(p.tile.Bc, p.notes["o_apart"], p.notes["stages"]): p.infeasible for p in points() if p.infeasible}
    assert set(misfits) == {(128, True, 3), (80, False, 2)}
    assert all("of shared memory" in reason or "O leaves through V's tiles" in reason for reason in misfits.values())
    assert "cannot run: 128x128, 3 stages, O apart" in pipelining.table(rows())


def test_by_default_it_is_the_papers_shape():
    row = points()[0].fields()
    assert {name: row[name] for name in pipelining.PAPER_SHAPE} == pipelining.PAPER_SHAPE
    assert [p.notes["build"] for p in points() if p.notes["own"]] == [PING_PONG]  # of d=128


def test_its_variants_have_names_of_their_own_in_no_catalog():
    assert all(not point.count_bytes for point in points())  # whoever counts bytes looks them up by name


@pytest.mark.parametrize(
    "options", [dict(head_dim=64), dict(head_dim=256, causal=True), dict(dtype="bf16", seqlen=100)]
)
def test_other_shapes(options):
    found = rows(**options)
    assert set(pipelining_report.best(found)) >= {*BUILDS} - {"3 stages"}  # there is no room for them beside d=256
    assert not pipelining_report.paper(found[0]) and "Table 2" not in said(found)


def test_refused(tmp_path, capfd, monkeypatch):
    with pytest.raises(Unsupported, match="multiples of 8"):
        points(head_dim=20)
    with pytest.raises(ValueError, match="no tile fits"):
        points(SIMULATOR, head_dim=20)
    monkeypatch.setattr(emulator, "compiler", lambda: None)
    with pytest.raises(ValueError, match=r"install g\+\+"):
        points(SIMULATOR)
    for words, told in ((["--dtype", "fp32"], "fp32"), (["--seqlen", "0"], "--seqlen")):
        assert main(["run", "pipelining", "--out", str(tmp_path / "out"), *words]) == 2
        assert told in capfd.readouterr().err and not (tmp_path / "out").exists()


# ---- a row ----------------------------------------------------------------------------------------------------------


def verdict(passed):
    return gate.Verdict(passed, 0.25, 0.5 if passed else 9.0, "" if passed else "O is off", None, lambda: None)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A point as a GPU would measure it, with a gate and a compiler of the test's."""
    point = next(point for point in points() if not point.infeasible)

    def measured(passed=True, reason=None, check=None):
        kernel = point.tile, pipelining.switches_of(point.notes)
        times = []
        monkeypatch.setattr(target, "device", lambda: HOPPER)
        monkeypatch.setattr(pipelining, "drawn", type("", (), {"__call__": lambda *_: 0, "cache_clear": lambda _: 0})())
        monkeypatch.setattr(pipelining, "refusals", lambda *_: {kernel: reason})
        monkeypatch.setattr(gate, "check", check or (lambda *_: verdict(passed)))
        monkeypatch.setattr(timing, "time", lambda *of: times.append(of) or timing.Timing(4.0, 3.9, 4.1, 25, 0.0))
        return pipelining.measure(point), times

    return measured


def test_what_passed_is_timed(on_a_gpu):
    row, times = on_a_gpu()
    assert (row["gate"], row["seconds"], len(times)) == ("passed", 4e-3, 1) and times[0][1] == pipelining.BUDGET_S
    assert row["tflops"] == pytest.approx(4 * 4 * 16 * 8448**2 * 128 / 4e-3 * 1e-12)


def test_what_failed_is_not(on_a_gpu):
    row, times = on_a_gpu(passed=False)
    assert (row["gate"], row["seconds"], row["tflops"], times) == ("failed: O is off", None, None, [])


def test_what_spills_never_runs(on_a_gpu):
    row, times = on_a_gpu(reason="fwd_v3 has 224 bytes of spills")
    assert (row["infeasible"], row["gate"], times) == ("fwd_v3 has 224 bytes of spills", None, [])


def test_what_finds_no_room_is_told(on_a_gpu):
    def check(*_):
        raise torch.OutOfMemoryError

    assert "GPU's memory" in on_a_gpu(check=check)[0]["infeasible"]


def test_refusals_are_the_compilers_words(monkeypatch):
    monkeypatch.setattr(pipelining, "TILES", (Tile(192, 64), Tile(192, 176)))
    monkeypatch.setattr(pipelining, "choose_tile", lambda *_: Tile(128, 64))

    def compile(file, entry, defines, folders):
        if defines["WARPGROUPS"] == 3:
            raise nvrtc.CompileError("fwd_v3 spills\nptxas's log")

    monkeypatch.setattr(nvrtc, "compile", compile)
    found = pipelining.refusals(Problem(1, 1, 1, 640, 640, 128, "fp16"), HOPPER)
    assert {reason for (tile, _), reason in found.items() if tile == Tile(128, 64)} == {None}
    assert {reason for (tile, s), reason in found.items() if tile == Tile(192, 64) and s.stages == 3} == {
        "fwd_v3 spills"
    }
    assert all(reason for (tile, _), reason in found.items() if tile == Tile(192, 176))  # never compiled


# ---- what the rows say ----------------------------------------------------------------------------------------------


def test_worth_compares_the_best_tile_of_each_build():
    found = rows()
    row = pipelining_report.best(found)[OVERLAP]
    assert (row["Bc"], row["o_apart"], row["tflops"]) == (80, True, 610)
    worth = pipelining_report.worth(found)
    assert set(worth) == set(BUILDS) - {ALL}
    assert worth[OVERLAP] == pytest.approx(700 / 610 - 1)
    assert worth[PING_PONG] == pytest.approx(700 / 710 - 1)  # below nothing, and said
    assert worth["not persistent"] == 0


def test_its_words():
    text = said(rows())
    assert "All on: 700 TFLOP/s (tile 192x80, 3 stages, O leaves from a tile of its own)." in text
    assert "overlap of QKᵀ and softmax: +14.8%; no overlap: 610 TFLOP/s, tile 192x80; in FA3's Table 2 +13.6%." in text
    assert "ping-pong: -1.4% (does not show); no ping-pong: 710 TFLOP/s" in text
    assert "blocks that stay: +0.0% (does not show)" in text
    assert text.count("all on is such a build itself") == 1
    assert "attention() by itself takes no ping-pong, tile 192x80: 710 TFLOP/s, the fastest here." in text
    assert "warps that only copy: +12.0%; no warp specialisation: 625 TFLOP/s" in text
    assert "192x80; in FA3's Table 2 +16.0%" in text and "no warp specialisation 570" in text
    assert "lifts 570 to 620-640 TFLOP/s, +8.8% to +12.3%" in text
    text = said(rows(SPEEDS | {ALL: 750}))
    assert "5.3% less than the fastest here, all on" in text


def test_the_table_has_a_line_a_build():
    lines = {line.split("  ")[0]: line.split() for line in pipelining.table(rows()).splitlines()}
    assert set(lines) >= set(BUILDS)
    assert {"192x80", "610", "+14.8%", "582", "+13.6%", "passed"} <= set(lines[OVERLAP])
    assert {"192x80", "625", "+12.0%", "570", "+16.0%", "passed"} <= set(lines[SPECIALIZED])
    assert not {"582", "570"} & set(pipelining.table(rows(seqlen=4096)).split())


def test_a_failed_tile_is_told_though_another_passed():
    found = rows()
    bad = next(row for row in found if row["build"] == OVERLAP)
    bad |= {"gate": "failed: O is off", "tflops": None, "seconds": None, "max_error": None, "error_ratio": None}
    assert "failed: O is off" in pipelining.table(found) and OVERLAP not in pipelining_report.sound(found)
    assert not common.all_passed(found)
    assert pipelining_report.best(found)[OVERLAP]["tflops"] == 610


@pytest.mark.parametrize(
    "speeds, verdict",
    [
        (SPEEDS, "holds in part"),
        (SPEEDS | {PING_PONG: 660}, "holds"),
        (SPEEDS | {OVERLAP: 695}, "does not hold"),
        (SPEEDS | {OVERLAP: None}, "not yet tested"),
        ({}, "not yet tested"),
    ],
)
def test_claim_13(speeds, verdict):
    judged = {number: (verdict, why) for number, verdict, why in pipelining.claims(rows(speeds))}
    assert judged[13][0] == verdict
    if verdict == "holds":
        assert judged[13][1].startswith("overlap of QKᵀ and softmax 610 → 700, ping-pong 660 → 700 TFLOP/s; +14.8%")


@pytest.mark.parametrize(
    "speeds, verdict",
    [(SPEEDS, "holds"), (SPEEDS | {SPECIALIZED: 695}, "does not hold"), ({ALL: 700}, "not yet tested")],
)
def test_claim_12(speeds, verdict):
    judged = {number: (verdict, why) for number, verdict, why in pipelining.claims(rows(speeds))}
    assert judged[12][0] == verdict
    if verdict == "holds":
        assert judged[12][1].startswith("warps that only copy 625 → 700 TFLOP/s; +12.0%")


def test_emulated_nothing_is_claimed():
    found = rows({}, device=SIMULATOR.name)
    assert {verdict for _, verdict, _ in pipelining.claims(found)} == {"not measurable here"}
    assert "10 of 10 builds are exact" in said(found) and "only a GPU can say" in said(found)


@pytest.mark.parametrize("speeds", [SPEEDS, {ALL: 700}, {OVERLAP: 600}, {}])
@pytest.mark.parametrize("options", [{}, {"seqlen": 4096}])
def test_it_draws(speeds, options, tmp_path):
    pipelining.draw(rows(speeds, **options)).savefig(tmp_path / "pipelining.png")
    assert (tmp_path / "pipelining.png").stat().st_size > 10_000


def test_it_reports_where_nothing_passed():
    found = [row | {"gate": row["gate"] and "failed: NaN", "max_error": None, "error_ratio": None} for row in rows({})]
    assert pipelining.table(found) and pipelining.draw(found)
    assert "0 of 10 builds are exact" in said(found) and "Not so: all on" in said(found)


# ---- emulated -------------------------------------------------------------------------------------------------------


@emulates
def test_emulated_it_is_exact_and_goes_on_where_it_stopped(tmp_path, capfd):
    words = ["run", "pipelining", "--out", str(tmp_path), "--seqlen", "70"]
    assert main(words) == 0
    found = [json.loads(line) for line in (tmp_path / "pipelining.jsonl").read_text().splitlines()]
    assert {row["build"] for row in found} == set(BUILDS)
    assert all(row["gate"] == "passed" and row["tflops"] is None and row["seconds"] is None for row in found)
    assert all(tables.agrees(row) for row in found)
    assert (tmp_path / "pipelining.csv").exists() and (tmp_path / "pipelining.png").stat().st_size > 10_000
    capfd.readouterr()
    assert main(words) == 0
    assert f"{len(found)} of {len(found)} points are on record" in capfd.readouterr().out
