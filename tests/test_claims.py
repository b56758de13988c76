"""Experiment claims: seventeen verdicts, each from rows; none where there are no rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from experiments import claims, common, memory, online_softmax, tile_answer, verdicts
from experiments.__main__ import main, names
from experiments.verdicts import CLAIMS, FAILS, HOLDS, IN_PART, NOT_HERE, UNTESTED, VERDICTS, Evidence, judge
from sandbox import catalog, picture, records, target
from sandbox.variant import SIMULATOR

NAMED = sorted({name for claim in CLAIMS for name in claim.experiments})
H200 = "NVIDIA H200"


def by_number(number):
    return next(claim for claim in CLAIMS if claim.number == number)


def read(folder):
    return {row["number"]: row for row in map(json.loads, (folder / "claims.jsonl").read_text().splitlines())}


# ---- stand-ins ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What an experiment would measure; Ctrl-C is pressed at `stops_at`."""

    name: str
    N: int

    infeasible, count_bytes = None, False

    def fields(self):
        return {"variant": self.name, "N": self.N, "Br": 8, "Bc": 8, "infeasible": None}

    def seconds(self):
        return 0.0


class Stand:
    """Experiments of these names, of two points each, that say of claims what they are told to."""

    def __init__(self, monkeypatch, **says):
        self.measured, self.stop_at, self.gate, self.refuses = [], None, {}, {}
        self.modules = {name: self.module(name, said) for name, said in says.items()}
        monkeypatch.setattr(claims, "others", lambda: self.modules)
        monkeypatch.setattr(verdicts, "FIGURES", {3: lambda rows: f"{len(rows)} rows"})
        monkeypatch.setattr(records, "RESULTS", claims.Path("nowhere"))

    def module(self, name, said):
        def plan(device, size):
            if name in self.refuses:
                raise ValueError(self.refuses[name])
            return [Point(name, N) for N in (size, 2 * size)]

        experiment = common.Experiment(
            name, "?", "", "", ("N",), (claims.click.option("--size", default=4),), plan,
            table=str, answer=str, draw=lambda rows: picture.page(name, "", (2, 1)), measure=self.measure,
            key=("variant", "N"),
        )  # fmt: skip
        return SimpleNamespace(EXPERIMENT=experiment, claims=lambda rows: said)

    def measure(self, point):
        if len(self.measured) == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append((point.name, point.N))
        gate = self.gate.get(point.name, "passed")
        return {"gate": gate, "error_ratio": point.N / 16, "seconds": None, "no_counters": None}


LOOPS = [
    (3, "holds in part", "fewer; slower"),
    (6, "holds", "one launch (of three); all of it"),
    (8, "does not show", "no"),
]


@pytest.fixture
def stand(monkeypatch):
    return Stand(monkeypatch, loop_order=LOOPS, tile_size=[(10, "holds", "0 %")], memory=[(1, "not asked here", "?")])


def run(out, *words):
    return main(["run", "claims", "--out", str(out), *map(str, words)])


# ---- the list -------------------------------------------------------------------------------------------------------


def test_every_number_once():
    assert [claim.number for claim in CLAIMS] == list(range(1, 18))
    assert all(claim.claim and claim.where and claim.tested_by for claim in CLAIMS)
    assert all(bool(claim.experiments) != bool(claim.instead) for claim in CLAIMS)
    assert {claim.number for claim in CLAIMS if claim.instead} == set(verdicts.HERE)
    assert set(claims.others()) == set(names()) - {"claims"}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_named_exists_or_is_said_to_be_missing(name):
    if name in claims.others():
        assert callable(claims.others()[name].claims)
        return
    for claim in CLAIMS:
        if name in claim.experiments:
            assert name in judge(claim, Evidence(H200))["why"]


@pytest.mark.parametrize("device", [SIMULATOR.name, H200, "NVIDIA A100-SXM4-80GB"])
def test_nothing_holds_without_a_row(device):
    for claim in CLAIMS:
        found = judge(claim, Evidence(device))
        assert found["verdict"] in (UNTESTED, NOT_HERE) and found["ours"] is None and found["why"]
        assert found["verdict"] == UNTESTED or claim.number == 11


def test_v3_is_waited_for(monkeypatch):
    monkeypatch.setattr(catalog, "generations", lambda: ["v1", "v2"])
    told = {claim.number: judge(claim, Evidence(H200))["why"] for claim in CLAIMS}
    assert [n for n, why in told.items() if why.startswith("v3 is not there yet, nor ")] == list(range(12, 18))
    monkeypatch.setattr(catalog, "generations", lambda: ["v1", "v2", "v3"])
    assert judge(by_number(13), Evidence(H200))["why"] == "waits for pipelining and trace"


# ---- one verdict from several ---------------------------------------------------------------------------------------


ONE = {
    (HOLDS,): HOLDS, (HOLDS, IN_PART): HOLDS, (IN_PART, HOLDS): IN_PART, (HOLDS, FAILS): IN_PART,
    (FAILS, IN_PART): IN_PART, (FAILS, FAILS, UNTESTED): FAILS, (NOT_HERE, FAILS): FAILS, (UNTESTED, HOLDS): HOLDS,
    (NOT_HERE, UNTESTED): NOT_HERE, (UNTESTED, UNTESTED): UNTESTED,
}  # fmt: skip


@pytest.mark.parametrize("several, one", ONE.items())
def test_together(several, one):
    assert verdicts.together(list(several)) == one


def test_verdicts_are_of_a_fixed_set():
    assert {verdicts.plain(words) for words in (*VERDICTS, *verdicts.LONGER)} == set(VERDICTS)
    with pytest.raises(ValueError, match="'holds a bit': expected one of holds, "):
        verdicts.plain("holds a bit")


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_asks_every_experiment(stand, tmp_path, capsys):
    stand.refuses["memory"] = "nothing to time without a GPU"
    assert run(tmp_path) == 0
    rows = read(tmp_path)
    assert list(rows) == list(range(1, 18)) and {row["verdict"] for row in rows.values()} <= set(VERDICTS)
    told = {n: (row["verdict"], row["ours"]) for n, row in rows.items() if n <= 10}
    assert told == {
        1: (NOT_HERE, None), 2: (UNTESTED, None), 3: (IN_PART, "2 rows"), 4: (NOT_HERE, None),
        5: (HOLDS, "4 of 4 rows pass, at 0.5 of the bound at most"), 6: (HOLDS, "one launch"), 7: (UNTESTED, None),
        8: (FAILS, "no"), 9: (UNTESTED, None), 10: (HOLDS, "0 %"),
    }  # fmt: skip
    assert rows[1]["why"] == rows[4]["why"] == "nothing to time without a GPU"
    assert "loop_order" in rows[7]["why"] and rows[8]["why"] == "no; waits for warp_partition"
    assert {row["device"] for row in rows.values()} == {target.device().name}
    stamp = records.provenance(target.device())
    assert (rows[3]["rows"], rows[3]["revision"], rows[3]["source"]) == (4, stamp["revision"], stamp["source"])
    assert (rows[12]["rows"], rows[12]["revision"]) == (0, None)
    for end in ("jsonl", "csv", "png"):
        assert all((tmp_path / f"{name}.{end}").exists() for name in ("claims", "loop_order", "tile_size"))
    assert not (tmp_path / "memory.jsonl").exists()
    said = capsys.readouterr().out
    assert "not here: nothing to time" in said and "8 does not hold: v2 divides work" in said
    assert "3 of 17 claims about FlashAttention hold here, 1 in part, 1 fails" in said
    assert "holds: 5, 6, 10\n" in said and "recorded before" not in said


def test_a_run_that_was_cut_short_goes_on(stand, tmp_path, capsys):
    stand.stop_at = 3
    assert run(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    everything = [(name, N) for name in stand.modules for N in (4, 8)]
    assert stand.measured == everything[:3]
    assert not (tmp_path / "claims.jsonl").exists()
    stand.stop_at = None
    assert run(tmp_path) == 0 and stand.measured == everything
    assert run(tmp_path) == 0 and stand.measured == everything
    assert run(tmp_path, "--fresh") == 0 and stand.measured == 2 * everything
    stand.modules["online_softmax"] = stand.module("online_softmax", [(2, "holds", "3, not 4")])  # now it is there
    assert run(tmp_path) == 0 and read(tmp_path)[2]["verdict"] == HOLDS
    assert len(read(tmp_path)) == 17


def test_what_no_claim_names_is_not_run_but_counts(stand, tmp_path):
    stand.modules["other"] = stand.module("other", [])
    stamp = records.provenance(target.device())
    write(tmp_path, "other", row("other") | stamp, row("other", gate="failed: old") | stamp | {"source": "x"})
    assert run(tmp_path) == 0 and "other" not in [name for name, _ in stand.measured]
    assert read(tmp_path)[5]["ours"].startswith("7 of 7 rows pass")


def test_what_is_rounded_to_8_bits_is_not_called_exact():
    row = {"variant": "fwd_v3", "N": 8, "gate": "passed", "error_ratio": 0.25, "scales": None}
    rows = {"fp8_speed": [row, row | {"variant": "fwd_v3_fp8", "scales": "block", "error_ratio": 0.9}], "fp8_error": []}
    verdict, why, ours = verdicts.claim_5(verdicts.Evidence("simulator", rows=rows))
    assert (verdict, ours) == (HOLDS, "1 of 1 rows pass, at 0.25 of the bound at most") and "fp8_speed" in why


def test_a_failed_gate_is_not_exact(stand, tmp_path, capsys):
    stand.gate["tile_size"] = "failed: O is off"
    assert run(tmp_path) == 1
    row = read(tmp_path)[5]
    assert (row["verdict"], row["why"]) == (FAILS, "tile_size N=4 failed: O is off")
    assert row["ours"].startswith("4 of 6 rows pass")
    assert "tile_size N=8 tile 8x8 failed: O is off" in capsys.readouterr().err


def test_it_is_drawn_from_its_own_rows(stand, tmp_path, capsys):
    assert run(tmp_path) == 0
    told = capsys.readouterr().out
    (tmp_path / "claims.png").unlink()
    assert main(["draw", "claims", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-8:] == told.strip().splitlines()[-8:]
    assert (tmp_path / "claims.png").stat().st_size > 10_000 and len(stand.measured) == 6


# ---- rows that were recorded before ---------------------------------------------------------------------------------


def write(folder, name, *rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(name, N=4, **fields):
    point = {"variant": name, "N": N, "Br": 8, "Bc": 8, "gate": "passed", "device": H200}
    return point | {"revision": "aaa", "source": "s", "no_counters": None} | fields


def test_from_measures_nothing_and_names_the_revisions(stand, tmp_path, capsys):
    old = row("loop_order", N=2, device="simulator", gate="failed: long ago")  # of another device, before the last
    write(tmp_path / "in", "loop_order", old, row("loop_order"), row("loop_order", N=8))
    write(tmp_path / "in", "tile_size", row("tile_size", revision="bbb"))
    assert run(tmp_path / "out", "--from", tmp_path / "in") == 0
    rows = read(tmp_path / "out")
    assert {row["device"] for row in rows.values()} == {H200} and stand.measured == []
    assert (rows[3]["revision"], rows[3]["rows"], rows[10]["revision"]) == ("aaa, bbb", 3, "bbb")
    assert (rows[5]["verdict"], rows[5]["ours"]) == (HOLDS, "3 of 3 rows pass")
    assert (rows[1]["verdict"], rows[1]["why"]) == (UNTESTED, "no row of memory is on record")
    said = " ".join(capsys.readouterr().out.split())
    assert "recorded before, at revision aaa and bbb: they may differ" in said and "revision" in said


@pytest.mark.parametrize(
    "rows, words, told",
    [
        ({}, [], "no experiment's rows"),
        ({"loop_order": [row("x")], "memory": [row("x", device="simulator")]}, [], "expected one device"),
        ({"loop_order": [row("x")]}, ["--fresh"], "--fresh"),
        ({"loop_order": [{"device": H200}]}, [], "a row of loop_order has no field 'variant'"),
        (None, [], "does not exist"),
    ],
)
def test_from_refuses(stand, tmp_path, capsys, rows, words, told):
    for name, ours in (rows or {}).items():
        write(tmp_path / "in", name, *ours)
    if rows == {}:
        (tmp_path / "in").mkdir()
    assert run(tmp_path / "out", "--from", tmp_path / "in", *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and told in said.err and len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


FOLDERS = sorted(path.parent for path in records.RESULTS.glob("*/loop_order.jsonl"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_committed_can_be_judged(folder, tmp_path):
    assert run(tmp_path, "--from", folder) == 0
    rows = read(tmp_path)
    assert rows[5]["verdict"] == HOLDS and rows[5]["rows"] > 0
    for row in rows.values():
        assert row["verdict"] in VERDICTS and (row["ours"] is None) == (row["verdict"] in (NOT_HERE, UNTESTED))
    assert (tmp_path / "claims.png").stat().st_size > 10_000


# ---- claims that experiments judge by themselves --------------------------------------------------------------------


def memory_rows(standard=lambda N: 4 * N**2 + 64 * N, ours=lambda N: 64 * N):
    """Rows of memory; where a size is None it does not fit."""
    for N in (128, 256, 512):
        for direction in memory.DIRECTIONS:
            for way in memory.WAYS:
                peak = (standard if way == memory.STANDARD else ours)(N)
                yield {"variant": way, "direction": direction, "N": N, "peak_bytes": peak, "infeasible": not peak}


SQUARE, LINE = lambda N: 4 * N**2, lambda N: 64 * N
SIZES = [
    ({}, IN_PART, HOLDS), ({"standard": lambda N: SQUARE(N) if N < 512 else None}, HOLDS, HOLDS),
    ({"standard": LINE}, FAILS, HOLDS), ({"standard": lambda N: LINE(N) if N < 512 else None}, IN_PART, HOLDS),
    ({"ours": SQUARE}, IN_PART, FAILS), ({"standard": lambda N: None, "ours": lambda N: None}, UNTESTED, UNTESTED),
]  # fmt: skip


@pytest.mark.parametrize("sizes, first, fourth", SIZES)
def test_memory_judges_by_the_exponent(sizes, first, fourth):
    said = memory.claims(list(memory_rows(**sizes)))
    assert [(number, verdict) for number, verdict, _ in said] == [(1, first), (4, fourth)]


def softmax_rows(reads, gate="passed", seconds=None):
    taken = {online_softmax.SAFE: 3, online_softmax.ONLINE: reads, online_softmax.TILED: 2}
    for variant, n in taken.items():
        passed = "passed" if variant == online_softmax.SAFE else gate
        yield {
            "variant": variant, "N": 64, "gate": passed, "accesses_per_element": n + 1, "reads_total": n,
            "writes_total": 1, "formula_reads_total": n, "formula_writes_total": 1, "seconds": seconds and n * seconds,
        }  # fmt: skip


def test_online_softmax_judges_by_the_accesses():
    ((number, verdict, why),) = online_softmax.claims(list(softmax_rows(2)))
    assert (number, verdict) == (2, HOLDS) and "3 accesses an element, not 4, counted" in why
    assert "1.50 times faster" in online_softmax.claims(list(softmax_rows(2, seconds=1.0)))[0][2]
    assert online_softmax.claims(list(softmax_rows(3)))[0][1] == IN_PART
    assert online_softmax.claims(list(softmax_rows(2, gate="failed: Y is off")))[0][1] == FAILS
    assert online_softmax.claims([row for row in softmax_rows(2) if "safe" in row["variant"]])[0][1] == UNTESTED


@pytest.mark.skipif(not FOLDERS, reason="nothing is recorded")
def test_traffic_falls_as_Bc_grows():
    rows = records.read(records.RESULTS / "nvidia-h200" / "tile_size.jsonl")
    why = tile_answer.claim_3(rows)[2]
    assert "Bc from 16 to 128 takes" in why and "fewer accesses and is" in why and "times faster" in why


def test_our_figures():
    rows = list(memory_rows())
    assert verdicts.FIGURES[1](rows) == "N^1.96, 1.08 MB at N=512"
    assert verdicts.FIGURES[4](rows) == "N^1.00, 32.8 kB at N=512"
    assert verdicts.FIGURES[2](list(softmax_rows(2))) == "3, not 4"
    assert verdicts.FIGURES[2](list(softmax_rows(2, seconds=1.0))) == "3, not 4; up to 1.50 × faster"


# ---- claims about speed ---------------------------------------------------------------------------------------------


def bench_row(provider, tflops, N=4096, run="a", direction="fwd", dtype="fp16"):
    problem = {"B": 4, "H": 16, "N_q": N, "N_k": N, "d": 128, "causal": False, "device": H200, "revision": "ccc"}
    return problem | {"provider": provider, "tflops": tflops, "run": run, "direction": direction, "dtype": dtype}


def bench(number, *rows, device=H200):
    return judge(by_number(number), Evidence(device, bench=list(rows)))


def test_v2_on_an_h100():
    others = [bench_row("torch:flash", 900, dtype="e4m3"), bench_row("torch:flash", 900, direction="bwd")]
    others += [bench_row("torch:cudnn", 900), bench_row("torch:flash", None, N=1)]
    found = bench(11, bench_row("torch:flash", 347), bench_row("torch:flash", 300, N=1024), *others)
    assert (found["verdict"], found["ours"]) == (HOLDS, "35 %") and "347 of 989 TFLOP/s" in found["why"]
    assert bench(11, bench_row("torch:flash", 450))["verdict"] == FAILS
    assert bench(11, *others)["verdict"] == UNTESTED
    assert bench(11, bench_row("torch:flash", 200), device="NVIDIA A100-SXM4-80GB")["verdict"] == NOT_HERE
    assert bench(11, device=SIMULATOR.name)["verdict"] == NOT_HERE


@pytest.mark.parametrize("v3, verdict", [(750, HOLDS), (600, IN_PART), (400, FAILS)])
def test_v3_over_v2(v3, verdict):
    rows = [bench_row("torch:flash", 347), bench_row("sandbox:fwd_v3", v3)]
    assert bench(14, *rows)["verdict"] == verdict
    assert f"up to {v3} TFLOP/s" in bench(14, *rows)["ours"]
    assert bench(14, rows[0], bench_row("sandbox:fwd_v3", v3, run="b"))["verdict"] == UNTESTED
    assert bench(14, rows[0])["verdict"] == UNTESTED
    fp8 = bench_row("sandbox:fwd_v3_fp8", 1200, dtype="bf16") | {"scales": "block"}  # quantizes what it is given
    assert bench(14, *rows, fp8)["ours"] == bench(14, *rows)["ours"]
