"""bench: what it asks of whom, that nothing is timed ungated, what it records, and how it goes on."""

from __future__ import annotations

import json

import pytest
import torch

from sandbox import catalog, picture, records, target
from sandbox.__main__ import main
from sandbox.measure import bench, bench_report, gate, rivals, timing
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Tile

SIMULATED = target.KIND == "simulator"
simulated = pytest.mark.skipif(not SIMULATED, reason="stands in for a GPU, where none is")
FIELDS = (
    "run provider direction dtype B H H_kv N_q N_k d causal scales input seed ms ms_p20 ms_p80 tflops error_ratio "
    "compile_s registers spills device driver versions revision kernel_hash time"
).split()  # of definitions: benchmark rows
SMALL = ["--seqlen", "16", "--seqlen", "24", "--head-dim", "8", "--heads", "1", "--batch", "1", "--dtype", "fp32"]


def told(capfd, *words) -> tuple[int, str, str]:
    return main(list(map(str, words))), *capfd.readouterr()


class Clock:
    """Stands in for timing on a machine that cannot time: who was timed, and how long it is to have taken."""

    def __init__(self, monkeypatch, tmp_path):
        self.timed, self.ms = [], iter(lambda: 2.0, None)
        monkeypatch.setattr(timing, "time", self.time)
        monkeypatch.setattr(timing, "time_launch", lambda launch: self.take("rival"))
        made = {"registers": 9, "spills": 0, "shared_bytes": 64, "threads": 16, "blocks_per_sm": 2, "warps_per_sm": 2}
        monkeypatch.setattr(bench, "made", lambda *what: made)
        monkeypatch.setattr(bench, "compile_seconds", lambda *what: {"compile_s": 3.0, "cached_compile_s": 0.1})
        monkeypatch.setattr(bench, "ceiling", lambda dtype: 10.0)
        monkeypatch.setattr(rivals, "launcher", self.launcher)
        monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
        self.kind = lambda kind: monkeypatch.setattr(target, "KIND", kind)

    def time(self, verdict):
        assert verdict.passed
        return self.take("ours")

    def take(self, who):
        self.timed.append(who)
        ms = next(self.ms)
        return timing.Timing(ms, ms, ms, 3)

    def launcher(self, name, problem, inputs, direction):
        if name == "torch:cudnn":
            raise rivals.Unavailable("torch:cudnn: no cuDNN here")
        return (lambda: None), lambda: {"O": inputs.q} if direction == "fwd" else dict.fromkeys("QKV", inputs.q)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """bench as on a GPU, timed by a clock of ours, computed by the simulator."""
    return Clock(monkeypatch, tmp_path)


def points(*providers, direction="fwd", N=(16,)):
    return [bench.Point(Problem(1, 1, 1, n, n, 8, "fp32"), direction, providers) for n in N]


# ------------------------------------------------------------------------------------------------ what it would measure


def test_the_papers_grid():
    grid = bench.grid("fp16", "fwd", ("sandbox:fwd_v2",))
    problems = [point.problem for point in grid]
    assert len(set(problems)) == 18
    assert all(p.B * p.N_q == 16384 and p.H * p.d == 2048 and p.dtype == "fp16" for p in problems)
    assert {(p.d, p.N_q, p.mask.causal) for p in problems} == {
        (d, N, causal) for d in (64, 128, 256) for N in (1024, 4096, 16384) for causal in (False, True)
    }


def test_dry_run_names_the_points(capfd):
    code, out, _ = told(capfd, "bench", "fwd_v2", "--grid", "paper", "--dry-run", "--against", "parent,torch:cudnn")
    assert code == 0 and len(out.splitlines()) == 18
    assert all(line.endswith("sandbox:fwd_v2, sandbox:fwd_v2_one_block, torch:cudnn") for line in out.splitlines())


@pytest.mark.parametrize(
    "words, hint",
    [
        (["fwd_v3"], "did you mean"),
        (["fwd_v2", "--against", "torch:flsh"], "did you mean torch:flash"),
        (["fwd_v2", "bwd_v2"], "all of one kind"),
        (["softmax_safe"], "expected forward kernels or backward kernels"),
        (["fwd_v2", "--against", "bwd_v2"], "it is no fwd kernel"),
        (["fwd_v2", "--seqlen", "0"], "--seqlen"),
        (["fwd_v2", "--tile", "64"], "64"),
        ([], "NAME"),
    ],
)
def test_refused(capfd, tmp_path, words, hint):
    code, out, err = told(capfd, "bench", *words, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and hint in err and not (tmp_path / "out").exists()


@simulated
def test_without_a_gpu_it_says_why_not(capfd, tmp_path):
    code, _, err = told(capfd, "bench", "fwd_v2", "--out", tmp_path / "out")
    assert code == 2 and "bench needs a GPU" in err and not (tmp_path / "out").exists()


def test_rivals_say_what_they_lack():
    problem = Problem(1, 1, 1, 16, 16, 8, "fp32")
    x = gate.gaussian(problem, 0)
    reason = "there is no GPU here" if not torch.cuda.is_available() else "computes attention"
    with pytest.raises(rivals.Unavailable, match=reason):
        rivals.launcher("torch:flash", problem, x, "fwd" if not torch.cuda.is_available() else "softmax")


# ----------------------------------------------------------------------------------------------------- what it measures


@simulated
def test_a_row_has_every_field(clock, device, tmp_path):
    from sandbox.cli.bench import run

    rows = run(points("sandbox:fwd_v2", "torch:math", "torch:cudnn"), device, [tmp_path], False)
    ours, math, cudnn = rows
    for row in rows:
        assert set(FIELDS) <= set(row)
        json.dumps(row, allow_nan=False)
    assert ours["gate"] == "passed" and (ours["ms"], ours["ratio"], ours["Br"]) == (2.0, 1.0, 16)
    assert ours["tflops"] == pytest.approx(4 * 16 * 16 * 8 / 2.0 * 1e-9) and ours["error_ratio"] <= 1
    assert ours["of_ceiling"] == pytest.approx(ours["tflops"] / 10)
    assert len(ours["kernel_hash"]) == 12 and ours["again"] == 0 and ours["registers"] == 9
    assert math["ms"] == 2.0 and math["max_error"] > 0.1 and math["gate"] is None  # q is not its attention
    assert cudnn["ms"] is None and cudnn["why"] == "torch:cudnn: no cuDNN here"
    assert len({row["run"] for row in rows}) == 1
    assert "no cuDNN here" in bench_report.table(rows) and "sandbox:fwd_v2" in bench_report.compiled(rows)
    picture.plt.close(bench_report.draw(rows))


@simulated
def test_a_backward_is_compared_by_its_gradients(clock, device):
    (row, rival) = bench.measure(*points("sandbox:bwd_v2", "torch:math", direction="bwd"), device)
    assert row["gate"] == "passed" and rival["max_error"] > 0.1


@simulated
def test_what_fails_its_gate_is_never_timed(capfd, clock, tmp_path, monkeypatch):
    source = catalog.file_of("fwd_v2").read_text().replace("from ..", "from sandbox.").replace("fwd_v2", "fwd_wrong")
    source = source.replace('parent="fwd_wrong_one_block"', 'parent="fwd_v2"').replace("log(l)", "log(l + l)")
    (tmp_path / "fwd_wrong.py").write_text(source)
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))
    clock.kind("gpu")
    monkeypatch.setattr(target, "device", lambda: simulator())
    monkeypatch.setattr(target, "torch_device", lambda: torch.device("cpu"))
    words = [*SMALL, "--tile", "8x8", "--against", "", "--out", tmp_path / "out"]
    code, out, err = told(capfd, "bench", "fwd_wrong", *words)
    assert code == 1 and clock.timed == []
    assert "refused: sandbox:fwd_wrong fwd fp32 B=1 H=1 N=16 d=8 full, failed: LSE is off by 0.693" in err
    rows = [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in rows] == [None, None]


def simulator():
    from sandbox.variant import SIMULATOR

    return SIMULATOR


@simulated
def test_a_run_that_was_cut_short_goes_on(clock, device, tmp_path, monkeypatch):
    """The point at which it stopped is measured whole; what was whole before is not measured again."""
    from sandbox.cli.bench import run

    two = points("sandbox:fwd_v2", "torch:math", N=(16, 24))
    rival, stop = bench.rival, [False, True]

    def interrupted(*what):
        if stop.pop(0):
            raise KeyboardInterrupt
        return rival(*what)

    monkeypatch.setattr(bench, "rival", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(two, device, [tmp_path], False)
    on_record = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["N_q"] for row in on_record] == [16, 16]
    monkeypatch.setattr(bench, "rival", rival)
    monkeypatch.setattr(bench, "run_id", lambda: "the second")
    clock.timed.clear()
    rows = run(two, device, [tmp_path], False)
    assert clock.timed == ["ours", "ours", "rival"]
    assert [row["run"] == "the second" for row in rows] == [False, False, True, True]


@simulated
def test_medians_that_differ_are_told(clock, device):
    clock.ms = iter([2.0, 2.03, 2.0, 2.05])
    apart = [row["again"] for point in points("sandbox:fwd_v2", N=(16, 24)) for row in bench.measure(point, device)]
    assert apart == [pytest.approx(0.015), pytest.approx(0.025)]
    rows = [point.fields("sandbox:fwd_v2") | {"again": x} for point, x in zip(points("x", N=(16, 24)), apart)]
    (line,) = bench_report.careful(rows)
    assert "N=24" in line and "+2.5 % apart" in line


@pytest.mark.skipif(target.KIND == "gpu", reason="the same there, and seen in every row")
def test_seconds_to_compile():
    seconds = bench.compile_seconds("fwd_v2", Problem(1, 1, 1, 64, 64, 16, "fp32"), Tile(16, 16))
    assert 0 < seconds["cached_compile_s"] < 0.3 < seconds["compile_s"] < 60


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [
        (254, 128, 105_472, 2),
        (255, 256, 0, 1),
        (128, 512, 0, 1),
        (32, 64, 0, 32),
        (32, 1024, 0, 2),
        (64, 128, 232_448, 1),
    ],
)
def test_occupancy(registers, threads, shared, blocks):
    assert bench.blocks_per_sm(registers, threads, shared) == blocks
    assert HOPPER.shared + 1024 == 233_472


def test_a_table_of_bench_rows_goes_into_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    rows = [
        p.fields(who) | {"tflops": x}
        for p, xs in zip(points("x", N=(16, 24)), ((1.0, 2.0), (3.0, 4.0)))
        for who, x in zip(("sandbox:fwd_v2", "torch:flash"), xs)
    ]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = records.make_table("bench", ["pivot=provider", "values=tflops", "columns=N_q,causal"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["N_q", "causal", "sandbox:fwd_v2", "torch:flash"]
    assert [line[0] for line in lines[2:]] == ["16", "24"] and [line[2:] for line in lines[2:]] == [
        ["1", "2"],
        ["3", "4"],
    ]
