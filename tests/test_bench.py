"""bench: what it asks of whom, that nothing is timed ungated, what it records, and how it goes on."""

from __future__ import annotations

import json

import pytest
import torch

from sandbox import catalog, picture, records, target
from sandbox.__main__ import main
from sandbox.measure import bench, bench_report, gate, rivals, timing
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Infeasible, Tile

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
        self.timed, self.ms, self.again = [], iter(lambda: 2.0, None), iter(lambda: 0.0, None)
        monkeypatch.setattr(timing, "gated", self.gated)
        monkeypatch.setattr(timing, "time_together", lambda launches: [self.take(launch) for launch in launches])
        made = {"registers": 9, "spills": 0, "shared_bytes": 64, "threads": 16, "blocks_per_sm": 2, "warps_per_sm": 2}
        monkeypatch.setattr(bench, "made", lambda *what: made)
        monkeypatch.setattr(bench, "compile_seconds", lambda *what: {"compile_s": 3.0, "cached_compile_s": 0.1})
        monkeypatch.setattr(bench, "ceiling", lambda dtype: 10.0)
        monkeypatch.setattr(rivals, "launcher", self.launcher)
        monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(target, "KIND", "gpu")
        monkeypatch.setattr(target, "device", lambda: SIMULATOR)
        monkeypatch.setattr(target, "torch_device", lambda: torch.device("cpu"))

    def gated(self, verdict):
        assert verdict.passed
        return "ours"

    def take(self, launch):
        self.timed.append("ours" if launch == "ours" else "rival")
        ms = next(self.ms)
        return timing.Timing(ms, ms, ms, 3, next(self.again))

    def launcher(self, name, problem, inputs, direction):
        if name == "torch:cudnn":
            raise rivals.Unavailable("torch:cudnn: no cuDNN here")
        return (lambda: None), lambda: {"O": inputs.q} if direction == "fwd" else dict.fromkeys("QKV", inputs.q)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """bench as on a GPU, timed by a clock of ours, computed by the simulator."""
    return Clock(monkeypatch, tmp_path)


@pytest.fixture
def run(clock, device, tmp_path):
    """What bench does with points, into tmp_path: (points, fresh=False, folders) -> rows."""
    from sandbox.cli.bench import run

    return lambda points, fresh=False, folders=(tmp_path,): run(points, device, list(folders), fresh)


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
        (["fwd_v22"], "did you mean"),
        (["fwd_v2", "--against", "torch:flsh"], "did you mean torch:flash"),
        (["fwd_v2", "bwd_v2"], "all of one kind"),
        (["softmax_safe"], "expected forward kernels or backward kernels"),
        (["fwd_v2", "--against", "bwd_v2"], "it is no fwd kernel"),
        (["fwd_v2", "--seqlen", "0"], "--seqlen"),
        (["fwd_v2", "--tile", "64"], "64"),
        (["fwd_v2", "--grid", "paper", "--seqlen", "64"], "--seqlen: --grid paper has its own sizes"),
        (["fwd_v2", "--grid", "paper", "--no-causal"], "--causal: --grid paper has its own sizes"),
        (["fwd_v1", "--against", "parent"], "--against parent: fwd_v1 was made from no other kernel"),
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


# ----------------------------------------------------------------------------------------------------- what it measures


@simulated
def test_a_row_has_every_field(run):
    ours, math, cudnn = rows = run(points("sandbox:fwd_v2", "torch:math", "torch:cudnn"))
    for row in rows:
        assert set(FIELDS) <= set(row)
        json.dumps(row, allow_nan=False)
    assert ours["gate"] == "passed" and (ours["ms"], ours["ratio"], ours["Br"]) == (2.0, 1.0, 16)
    assert ours["tflops"] == pytest.approx(4 * 16 * 16 * 8 / 2.0 * 1e-9) and ours["error_ratio"] <= 1
    assert ours["of_ceiling"] == pytest.approx(ours["tflops"] / 10)
    assert len(ours["kernel_hash"]) == 12 and ours["again"] == 0 and ours["registers"] == 9
    assert math["ms"] == 2.0 and math["max_error"] > 0.1 and math["gate"] is None  # q is not its attention
    assert math["over"] == "sandbox:fwd_v2" and math["kernel_hash"] is None
    assert cudnn["ms"] is None and cudnn["why"] == "torch:cudnn: no cuDNN here"
    assert len({row["run"] for row in rows}) == 1
    assert "no cuDNN here" in bench_report.table(rows) and "sandbox:fwd_v2" in bench_report.compiled(rows)
    assert bench_report.title(rows) == "fwd_v2's speed: 1.00 x torch:math"
    picture.plt.close(bench_report.draw(rows))


@simulated
def test_from_the_command_line(capfd, clock, tmp_path):
    out, saved = tmp_path / "out", tmp_path / "results" / "simulator"
    words = [*SMALL, "--against", "parent, torch:math", "--save", "--out", out]
    code, said, _ = told(capfd, "bench", "fwd_v2", *words)
    assert code == 0 and "fwd_v2's speed: 1.00 x fwd_v2_one_block, 1.00 x torch:math" in said
    assert sorted(path.name for path in out.iterdir()) == ["bench.jsonl", "bench.png"]
    assert (saved / "bench.jsonl").read_text() == (out / "bench.jsonl").read_text()
    assert len((saved / "bench.jsonl").read_text().splitlines()) == 6


@simulated
def test_a_backward_has_a_picture_of_its_own(capfd, clock, tmp_path):
    for name in "fwd_v2", "bwd_v2":
        assert told(capfd, "bench", name, *SMALL, "--against", "torch:math", "--out", tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-bwd.png", "bench.jsonl", "bench.png"]


@simulated
def test_a_backward_is_compared_by_its_gradients(clock, device):
    (row, rival) = bench.measure(*points("sandbox:bwd_v2", "torch:math", direction="bwd"), device)
    assert row["gate"] == "passed" and rival["max_error"] > 0.1


@simulated
def test_the_oracle_is_asked_once_for_all_rivals(clock, device, monkeypatch):
    asked, stars = [], bench.stars
    monkeypatch.setattr(bench, "stars", lambda *what: asked.append(what) or stars(*what))
    bench.measure(*points("torch:math", "torch:flash", "torch:efficient"), device)
    assert len(asked) == 1


def prototype(tmp_path, monkeypatch, name, *edit):
    """fwd_v2 with an edit, under another name, where kernels are found."""
    source = catalog.file_of("fwd_v2").read_text().replace("from ..", "from sandbox.").replace("fwd_v2", name)
    source = source.replace(f'parent="{name}_one_block"', 'parent="fwd_v2"')
    assert edit[0] in source
    (tmp_path / f"{name}.py").write_text(source.replace(*edit))
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))


@simulated
def test_what_fails_its_gate_is_never_timed(capfd, clock, tmp_path, monkeypatch):
    prototype(tmp_path, monkeypatch, "fwd_wrong", "log(l)", "log(l + l)")
    words = [*SMALL, "--tile", "8x8", "--against", "", "--out", tmp_path / "out"]
    code, out, err = told(capfd, "bench", "fwd_wrong", *words)
    assert code == 1 and clock.timed == [] and "fwd_wrong was not timed" in out
    assert "refused: sandbox:fwd_wrong fwd fp32 B=1 H=1 N=16 d=8 full, failed: LSE is off by 0.693" in err
    rows = [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in rows] == [None, None]


@simulated
def test_what_raises_is_refused_and_the_others_are_measured(clock, device, tmp_path, monkeypatch):
    prototype(tmp_path, monkeypatch, "fwd_raises", "run = Launch(", "run = Lunch(")
    wrong, right = rows = bench.measure(*points("sandbox:fwd_raises", "sandbox:fwd_v2"), device)
    assert wrong["gate"].startswith("failed: NameError: name 'Lunch' is not defined") and right["ms"] == 2.0
    fields = [points("x")[0].fields(provider) for provider in ("sandbox:fwd_raises", "sandbox:fwd_v2")]
    bench.compare(rows := [fields[0] | wrong, fields[1] | right])
    assert [row["ratio"] for row in rows] == [None, None]  # nothing to compare with
    assert bench_report.title(rows) == "fwd_raises was not timed"


@simulated
def test_a_tile_that_the_compiler_refuses_says_why_and_the_others_are_measured(clock, device, monkeypatch):
    check = gate.check

    def refused(variant, problem, tile, *what, **how):
        if variant.name == "fwd_v1":
            raise Infeasible(tile, "fwd_v1 has 12 B of spills")
        return check(variant, problem, tile, *what, **how)

    monkeypatch.setattr(gate, "check", refused)
    no, yes = bench.measure(*points("sandbox:fwd_v1", "sandbox:fwd_v2"), device)
    assert (no["why"], no["gate"], no["ms"]) == ("tile 16x16: fwd_v1 has 12 B of spills", None, None)
    assert (yes["why"], yes["gate"], yes["ms"]) == (None, "passed", 2.0)


@simulated
def test_a_kernel_that_takes_the_gpu_down_ends_the_run(clock, monkeypatch):
    monkeypatch.setattr(
        gate, "check", lambda *what, **how: (_ for _ in ()).throw(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"))
    )
    with pytest.raises(ValueError, match="ILLEGAL_ADDRESS; the GPU runs nothing more"):
        bench.measure(*points("sandbox:fwd_v2"), HOPPER)


@simulated
@pytest.mark.parametrize(
    "words, hint",
    [(["--tile", "512x512"], "512x512"), (["--out", "/dev/null/out"], "no folder that can be written to")],
)
def test_refused_on_a_gpu(capfd, clock, tmp_path, words, hint):
    code, out, err = told(capfd, "bench", "fwd_v2", *SMALL, "--out", tmp_path / "out", *words)
    assert (code, out, clock.timed) == (2, "", []) and hint in err and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- what is on record, or not


def cut_short(run, monkeypatch, points):
    """A run that ends at the second point, after its first provider."""
    rival, stop = bench.rival, [False, True]

    def interrupted(*what):
        if stop.pop(0):
            raise KeyboardInterrupt
        return rival(*what)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench, "rival", interrupted)
        run(points)


@simulated
def test_a_run_that_was_cut_short_goes_on(clock, run, capfd, tmp_path, monkeypatch):
    """The point at which it stopped is measured whole; what was whole before is not measured again."""
    two = points("sandbox:fwd_v2", "torch:math", N=(16, 24))
    cut_short(run, monkeypatch, two)
    on_record = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [row["N_q"] for row in on_record] == [16, 16]
    monkeypatch.setattr(bench, "run_id", lambda: "the second")
    clock.timed.clear()
    rows = run(two)
    assert clock.timed == ["ours", "rival"]
    assert [row["run"] == "the second" for row in rows] == [False, False, True, True]
    assert "1 of 2 points are from a run that was cut short" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]


@simulated
def test_an_edited_kernel_is_measured_again(clock, run, monkeypatch):
    two = points("sandbox:fwd_v2", "torch:math", N=(16, 24))
    cut_short(run, monkeypatch, two)
    monkeypatch.setattr(bench, "kernel_hash", lambda name: "edited")
    clock.timed.clear()
    assert {row["kernel_hash"] for row in run(two)} == {"edited", None} and clock.timed == 2 * ["ours", "rival"]


@simulated
def test_a_run_that_came_to_its_end_is_measured_again_and_compared(clock, run, monkeypatch):
    clock.ms, clock.again = iter([2.0, 2.05]), iter([0.015, -0.024])
    monkeypatch.setattr(bench, "run_id", iter(["first", "second"]).__next__)
    (first,), (second,) = run(points("sandbox:fwd_v2")), run(points("sandbox:fwd_v2"))
    assert (first["run"], first["ms_before"], second["run"], second["ms_before"]) == ("first", None, "second", 2.0)
    assert first["again"] == pytest.approx(0.015) and bench_report.careful([first]) == []
    halves, since = bench_report.careful([second])
    assert "N=16 d=8 full: one half of the samples from the other, -2.4 %" in halves
    assert "since the run before, +2.5 %" in since


@simulated
def test_saving_keeps_what_others_measured(run, tmp_path):
    folders = (tmp_path / "out", tmp_path / "results")
    run(points("sandbox:fwd_v2", N=(16, 24)), folders=folders)
    path = tmp_path / "results" / "bench.jsonl"
    old = [json.loads(line) | {"revision": "old"} for line in path.read_text().splitlines()]
    records.write_whole(path, "".join(json.dumps(row) + "\n" for row in old))
    run(points("sandbox:fwd_v2", N=(24, 32)), folders=folders)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["N_q"], row["revision"] == "old") for row in rows] == [(16, True), (24, False), (32, False)]


@pytest.mark.skipif(target.KIND == "gpu", reason="the same there, and seen in every row")
def test_seconds_to_compile():
    seconds = bench.compile_seconds("fwd_v2", Problem(1, 1, 1, 64, 64, 16, "fp32").kind, Tile(16, 16), HOPPER)
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


def test_turns_are_drawn_anew_in_each_round(monkeypatch):
    """Who always follows the same one, on a GPU at its power limit, is always slowed as much."""
    taken = []
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_host_seconds", lambda launch: 0.0)
    monkeypatch.setattr(timing, "_flusher", lambda seconds: None)
    monkeypatch.setattr(timing, "_sample", lambda flush, launch: taken.append(launch()) or 1.0)
    times = timing.time_together([lambda name=name: name for name in "abc"], budget_s=0.02, rounds=10)
    assert [t.samples for t in times] == [20, 20, 20]
    rounds = [taken[start : start + 6 : 2] for start in range(3, 63, 6)]  # after one of each; two samples a turn
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 3
