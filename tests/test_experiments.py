"""The experiments' command line: what it refuses, what it writes, how it goes on after it was cut short."""

import csv
import json

import pytest

from experiments import common, fp32_sdpa, loop_order, tables, tile_size
from experiments.__main__ import main, names
from experiments.loop_answer import ON
from experiments.units import FMA
from sandbox import picture, records, reference, target
from sandbox.mask import Mask
from sandbox.measure import counters, formulas, gate, standard
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Infeasible

KERNELS = (*ON[FMA].forward, *ON[FMA].backward)
SIMULATED = target.KIND == "simulator"
SMALL = ["--input", "gauss", "--head-dim", "5", "--br", "8", "--bc", "4", "--no-counters"]
FIELDS = (
    "variant direction loop_order input B H N d Br Bc causal infeasible reads_Q reads_K reads_V reads_O reads_l "
    "reads_m writes_O writes_l writes_m writes_LSE reads_total writes_total formula_reads_total formula_writes_total "
    "max_error gate seconds tflops device revision"
).split()


def run(*words) -> int:
    return main(["run", *map(str, words)])


def read(folder, name="loop_order"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def kernels(rows):
    return [row for row in rows if row["variant"] != standard.NAME]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_list_names_every_experiment(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("fp32_sdpa", "loop_order", "tile_size"))
    assert names() == sorted(names())


@pytest.mark.parametrize(
    "words, told",
    [
        (["loop_ordr"], "did you mean loop_order?"),
        (["q_x"], "fp32_sdpa, fp8_error, fp8_speed, loop_order"),
        ([], "name an experiment"),
        (["loop_order", "--br", "0"], "--br"),
        (["loop_order", "--seqlen", "12,many"], "12,many"),
        (["loop_order", "--seqlen", "-4"], "--seqlen"),
        (["loop_order", "--seqlen", "99999999999999"], "--seqlen"),
        (["loop_order", "--dtype", "fp64"], "fp64"),
        (["loop_order", "--loops", "2"], "--loops"),
        (["loop_order", "--input", "minilm", "--seqlen", "513"], "513: the minilm input has 512"),
        (["loop_order", "--input", "minilm", "--head-dim", "64"], "--head-dim 64"),
        (["loop_order", "--input", "minilm", "--heads", "5"], "--heads 5"),
        (["loop_order", "--input", "gauss", "--head-dim", "257"], "head_dim d=257"),
        (["loop_order", "--br", "8192", "--seqlen", "8"], "8192x"),
        (["tile_size", "--br", "8192", "--seqlen", "8"], "of shared memory"),
        (["fp32_sdpa", "--dtype", "fp16"], "--dtype"),
        (["tile_size", "--variant", "fwd_v22", "--seqlen", "8"], "did you mean fwd_v"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, told, tmp_path, capsys):
    named = [*words, "--out", tmp_path / "out"] if words and "_" in words[0] else words
    assert run(*named) == 2
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if not line.startswith("sandbox:")]
    assert len(errors) == 1 and told in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("loop_order", "--out", tmp_path / "file" / "out") == 2
    assert "--out" in capsys.readouterr().err
    assert run("loop_order", "--out", tmp_path / "file") == 2


@pytest.mark.skipif(not SIMULATED, reason="nothing is too large for a GPU here")
def test_what_takes_the_simulator_long_asks_for_force(tmp_path, capsys):
    assert run("loop_order", "--input", "gauss", "--seqlen", 8192, "--out", tmp_path) == 2
    assert "--force" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not SIMULATED, reason="there is a GPU here")
def test_what_only_times_wants_a_gpu(tmp_path, capsys):
    assert run("fp32_sdpa", "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert said.out == "" and "without a GPU" in said.err
    assert not (tmp_path / "out").exists()


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--causal", "--heads", "2", "--batch", "2", "--dtype", "fp16", "--unit", "fma"]])
def test_loop_order_counts_what_the_formula_says(more, tmp_path, capsys):
    assert run("loop_order", *SMALL, "--seqlen", "7,18", *more, "--out", tmp_path) == 0
    rows = kernels(read(tmp_path))
    expected = {(name, N) for name in KERNELS for N in (7, 18)}
    assert {(row["variant"], row["N"]) for row in rows} == expected and len(rows) == len(expected)
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert (row["gate"], row["infeasible"]) == ("passed", None)
        if SIMULATED:
            assert row["reads_total"] == row["formula_reads_total"]
            assert row["writes_total"] == row["formula_writes_total"]
            assert row["reads_total"] == sum(row[f"reads_{array}"] for array in common.READ)
            assert row["writes_total"] == sum(row[f"writes_{array}"] for array in common.WRITTEN)
            assert row["seconds"] is row["tflops"] is None
        else:
            assert row["seconds"] > 0 and row["tflops"] > 0 and row["reads_total"] is None
    with (tmp_path / "loop_order.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(read(tmp_path))
    assert (tmp_path / "loop_order.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "Erratum" in said and "Why swap the loops?" in said


def test_minilm_is_real_input(tmp_path):
    assert run("loop_order", "--input", "minilm", "--seqlen", 6, "--no-counters", "--out", tmp_path) == 0
    rows = kernels(read(tmp_path))
    assert {(row["input"], row["d"]) for row in rows} == {("minilm", 32)}
    assert all(row["gate"] == "passed" for row in rows)


def test_tile_size_marks_the_chosen_and_records_what_does_not_fit(tmp_path):
    words = ["--input", "gauss", "--head-dim", "5", "--no-counters", "--seqlen", 12, "--bc", 4, "--out", tmp_path]
    assert run("tile_size", *words, "--br", "8,8192", "--variant", "fwd_v2") == 0
    rows = {(row["Br"], row["Bc"]): row for row in read(tmp_path, "tile_size")}
    assert "232,448 B" in rows[8192, 4]["infeasible"] and rows[8192, 4]["gate"] is None
    assert rows[8, 4]["gate"] == "passed"
    assert [row["gate"] for row in rows.values() if row["chosen"]] == ["passed"]
    if SIMULATED:
        assert rows[8, 4]["reads_total"] == rows[8, 4]["formula_reads_total"]


def test_a_tile_that_the_compiler_refuses_is_one_that_does_not_fit(tmp_path, monkeypatch):
    check = gate.check

    def refused(variant, problem, tile, *what):
        if tile.Br == 8:
            raise Infeasible(tile, "fwd_v2 has 12 B of spills")
        return check(variant, problem, tile, *what)

    monkeypatch.setattr(gate, "check", refused)
    words = ["--input", "gauss", "--head-dim", "5", "--no-counters", "--seqlen", 12, "--bc", 4, "--out", tmp_path]
    assert run("tile_size", *words, "--br", "8,16", "--variant", "fwd_v2") == 0
    rows = {(row["Br"], row["Bc"]): row for row in read(tmp_path, "tile_size")}
    assert (rows[8, 4]["infeasible"], rows[8, 4]["gate"]) == ("fwd_v2 has 12 B of spills", None)
    assert rows[16, 4]["gate"] == "passed"


def test_compiling_is_seen_to_advance(monkeypatch, capsys):
    def compile_all(wanted, device, progress):
        for done in 1, 2:
            progress(done, 3)  # of those that the cache lacks
            assert f"{done}/3" in capsys.readouterr().err

    monkeypatch.setattr(common.ahead, "compile_all", compile_all)
    common._compile([], HOPPER)


def test_a_failed_gate_is_told_and_never_timed(tmp_path, capsys, monkeypatch):
    failed = gate.Verdict(passed=False, max_error=float("nan"), ratio=9.0, why="O is off", traffic=None, launch=None)
    monkeypatch.setattr(gate, "check", lambda *_: failed)
    assert run("loop_order", *SMALL, "--seqlen", 8, "--out", tmp_path) == 1
    assert "failed: O is off" in capsys.readouterr().err
    rows = kernels(read(tmp_path))
    assert all((row["gate"], row["seconds"], row["max_error"]) == ("failed: O is off", None, None) for row in rows)


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The variants that go through the gate, in order; `measured.stop_at` presses Ctrl-C at the n-th."""

    class Measured(list):
        stop_at = None

    measured, check = Measured(), gate.check

    def watched(variant, *args):
        if len(measured) == measured.stop_at:
            raise KeyboardInterrupt
        measured.append(variant.name)
        return check(variant, *args)

    monkeypatch.setattr(gate, "check", watched)
    return measured


def test_a_run_that_was_cut_short_goes_on(tmp_path, measured):
    words = ["loop_order", *SMALL, "--seqlen", 8, "--out", tmp_path]
    everything = KERNELS
    measured.stop_at = 3
    assert run(*words) == 130
    assert [row["variant"] for row in kernels(read(tmp_path))] == list(everything[:3])
    measured.stop_at = None
    assert run(*words) == 0
    assert measured == list(everything)
    assert [row["variant"] for row in kernels(read(tmp_path))] == list(everything)
    assert run(*words) == 0 and len(measured) == 7
    assert run(*words, "--fresh") == 0 and len(measured) == 14
    assert run(*words[:-4], "--seqlen", 9, "--out", tmp_path) == 0 and len(measured) == 21
    assert len(kernels(read(tmp_path))) == 14  # other points do not replace those on record


def test_rows_of_another_revision_are_measured_again(tmp_path, measured):
    words = ["loop_order", *SMALL, "--seqlen", 8, "--out", tmp_path]
    assert run(*words) == 0
    rows = read(tmp_path)
    stale = next(row for row in rows if row["variant"] == "fwd_v2")
    stale["revision"], stale["max_error"] = "0000000", 1.0
    (tmp_path / "loop_order.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*words) == 0
    assert measured[7:] == ["fwd_v2"]
    assert [row["max_error"] for row in read(tmp_path) if row["variant"] == "fwd_v2"] != [1.0]
    assert len(read(tmp_path)) == len(rows)


def test_draw_needs_nothing_but_the_rows(tmp_path, measured, capsys):
    assert main(["draw", "loop_order", "--out", str(tmp_path)]) == 2
    assert run("loop_order", *SMALL, "--seqlen", 8, "--out", tmp_path) == 0
    told = capsys.readouterr().out
    (tmp_path / "loop_order.png").unlink()
    assert main(["draw", "loop_order", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-12:] == told.strip().splitlines()[-12:]
    assert (tmp_path / "loop_order.png").exists() and len(measured) == 7


# ---- what the rows say ----------------------------------------------------------------------------------------------


def fake_rows(points, seconds=None):
    """The rows that these points would give: accesses by the formula, and times by `seconds(point)` on a GPU."""
    for point in points:
        row = point.fields() | common.empty_row() | {"device": "NVIDIA H200", "revision": None, "no_counters": "no ncu"}
        if not row["infeasible"]:
            formula = formulas.standard(point.problem) if point.variant == standard.NAME else None
            formula = formula or formulas.traffic(point.variant, point.problem, point.tile)
            row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
            if seconds:
                took = seconds(point)
                row |= {"gate": "passed", "max_error": 1e-6, "seconds": took, "tflops": 1e-12 / took}
                row |= {"dram_bytes": 4 * formula.total, "l2_bytes": 5 * formula.total}
        yield row


def gpu_plan(module, **options):
    given = dict(input=None, seqlen=None, head_dim=None, br=None, bc=None, batch=1, heads=None, causal=False, seed=0)
    return module.plan(HOPPER, **given | dict(dtype="fp32", counters=True) | options)


def test_the_verdicts_follow_the_numbers():
    slow = {"fwd_v1": 9.0, "fwd_v2_kv_outer": 8.0, "fwd_v2_one_block": 6.0, "fwd_v2": 2.0, standard.NAME: 10.0}
    points = gpu_plan(loop_order, seqlen=(1024,))
    rows = list(fake_rows(points, lambda point: slow.get(point.variant, 5.0)))
    verdicts = {number: verdict for number, verdict, _ in loop_order.claims(rows)}
    assert verdicts == {3: "holds", 6: "holds", 7: "holds", 8: "holds for thread blocks"}
    assert "1.33 times faster" in loop_order.answer(rows) and "3 times faster" in loop_order.answer(rows)

    slow |= {"fwd_v2": 7.0, standard.NAME: 1.0}
    rows = list(fake_rows(points, lambda point: slow.get(point.variant, 5.0)))
    verdicts = {number: verdict for number, verdict, _ in loop_order.claims(rows)}
    assert (verdicts[3], verdicts[8]) == ("holds in part", "does not show")

    # with no backward, and with a kernel that fails the gate
    wide = [row for row in rows if row["direction"] == "fwd"]
    assert "Backward" not in loop_order.answer(wide) and loop_order.draw(wide)
    broken = [row | {"gate": "failed: O is off"} if row["variant"] == "fwd_v1" else row for row in rows]
    assert loop_order.claims(broken) == [] and "Nothing to compare" in loop_order.answer(broken)
    assert loop_order.draw(broken)

    # a tile so flat that re-reading K and V costs more than O, l and m on the way
    rows = list(fake_rows(gpu_plan(loop_order, seqlen=(1024,), br=16, bc=128)))
    assert {number: verdict for number, verdict, _ in loop_order.claims(rows)}[7] == "holds in part"
    assert "times more" in loop_order.answer(rows)


@pytest.mark.parametrize("module, more", [(loop_order, {}), (tile_size, {"variant": None, "seqlen": 4096})])
def test_a_gpu_run_is_reported_too(module, more, tmp_path):
    experiment = module.EXPERIMENT
    rows = list(fake_rows(gpu_plan(module, **more), lambda point: 1e-3 * point.tile.Br / point.tile.Bc))
    common.report(experiment, rows, tmp_path)
    assert (tmp_path / f"{experiment.name}.png").stat().st_size > 10_000
    assert "TFLOP/s" in experiment.table(rows)


def sdpa_rows(speeds):
    """The rows of fp32_sdpa if each provider had that many TFLOP/s; at 16k torch:math has no memory."""
    for point in fp32_sdpa.plan(HOPPER, seqlen=None, causal=False, seed=0):
        row = point.fields() | dict.fromkeys(fp32_sdpa.MEASURED) | {"device": "NVIDIA H200", "revision": None}
        if (row["provider"], row["N"]) == (fp32_sdpa.MATH, 16384):
            yield row | {"infeasible": "does not fit in the GPU's memory"}
            continue
        seconds, base = (point.problem.flops() / speeds[name] * 1e-12 for name in (row["provider"], fp32_sdpa.SDPA))
        row |= {"gate": "passed" if row["variant"] else None, "max_error": 1e-6, "seconds": seconds}
        yield row | {
            "ms_p20": 990 * seconds,
            "ms_p80": 1010 * seconds,
            "tflops": speeds[row["provider"]],
            "ratio": base / seconds,
        }


def test_fp32_sdpa_answers_by_the_numbers(tmp_path):
    speeds = dict(zip(fp32_sdpa.PROVIDERS, (20.0, 40.0, 50.0, 10.0)))
    rows = list(sdpa_rows(speeds))
    assert len(rows) == 16 and {row["Br"] is None for row in rows if row["provider"] != fp32_sdpa.OURS} == {True}
    common.report(fp32_sdpa.EXPERIMENT, rows, tmp_path)
    assert (tmp_path / "fp32_sdpa.png").stat().st_size > 10_000
    said = fp32_sdpa.answer(rows)
    assert said.startswith("No: from N=1024 to 16384 fwd_v2 has 0.50 times the speed of torch:sdpa (N=16384")
    assert "20.0 against 40.0 TFLOP/s" in said
    assert said.endswith(
        "0.40 times that of torch:sdpa contiguous, 2.00 times that of torch:math, which ends at N=8192."
    )
    assert "does not fit" in fp32_sdpa.table(rows)

    assert fp32_sdpa.verdict(list(sdpa_rows(speeds | {fp32_sdpa.SDPA: 20.0}))) == "Yes"
    assert fp32_sdpa.verdict(list(sdpa_rows(speeds | {fp32_sdpa.SDPA: 20.1}))) == "No"
    mixed = [row | {"ratio": 1.01} if row["N"] == 1024 and row["variant"] else row for row in rows]
    assert fp32_sdpa.verdict(mixed) == "At some N"
    failed = [row | {"gate": "failed: O is off", "seconds": None} if row["variant"] else row for row in rows]
    assert "failed: O is off" in fp32_sdpa.answer(failed) and fp32_sdpa.draw(failed)


@pytest.mark.parametrize("causal", [False, True])
def test_torch_computes_the_attention_that_it_is_timed_on(causal, torch_device):
    problem = Problem(1, 2, 2, 33, 33, 8, mask=Mask(causal))
    x = gate.gaussian(problem, 0, torch_device)
    O_star, _ = reference.forward(problem, x.q, x.k, x.v)
    for provider in (fp32_sdpa.SDPA, fp32_sdpa.CONTIGUOUS, fp32_sdpa.MATH):
        O = fp32_sdpa.launcher(provider, problem, x)().transpose(1, 2)
        assert fp32_sdpa.error(O, O_star) < 1e-5


@pytest.mark.skipif(SIMULATED, reason="it wants a GPU")
def test_fp32_sdpa_on_a_gpu(tmp_path):
    assert run("fp32_sdpa", "--seqlen", "100,256", "--causal", "--out", tmp_path) == 0
    rows = read(tmp_path, "fp32_sdpa")
    assert [row["provider"] for row in rows] == 2 * list(fp32_sdpa.PROVIDERS)
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["max_error"] < 1e-4 for row in rows)
    assert {row["ratio"] for row in rows if row["provider"] == fp32_sdpa.SDPA} == {1.0}


def test_hardware_counters_fill_the_rows(tmp_path, monkeypatch):
    points = gpu_plan(loop_order, seqlen=(1024,))
    rows = [row | {"dram_bytes": None, "no_counters": None} for row in fake_rows(points, lambda _: 1e-3)]
    one = counters.Counters(dram_read_bytes=5, dram_write_bytes=2, l2_bytes=9, kernels=1)
    monkeypatch.setattr(counters, "count", lambda wanted: ([one] * (len(wanted) - 1) + [None], "ncu gave up"))
    log = records.Log(tmp_path, "loop_order", loop_order.EXPERIMENT.key)
    common._count_bytes(list(zip(points, rows)), log)
    rows = records.read(tmp_path / "loop_order.jsonl")
    assert {(row["dram_bytes"], row["l2_bytes"], row["no_counters"]) for row in rows[:-1]} == {(7, 9, None)}
    assert (rows[-1]["dram_bytes"], rows[-1]["no_counters"]) == (None, "ncu gave up")


def test_numbers_in_words():
    assert [tables.count(n) for n in (None, 999, 65_536, 2_100_000)] == [None, "999", "65.5k", "2.1M"]
    assert [tables.short(n) for n in (12, 14_848, 830_300_000)] == ["12", "14.8k", "830M"]
    assert tables.ratio(1.5, "fewer", "more") == "1.5 times fewer"
    assert tables.ratio(0.5, "fewer", "more") == "2 times more"
    assert picture.ink_on(picture.YELLOW) == picture.INK and picture.ink_on(picture.BLUE) == "white"
    assert tables.problem_of({"B": 1, "H": 2, "N": 3, "d": 4, "dtype": "fp16", "causal": False}) == Problem(
        1, 2, 2, 3, 3, 4, "fp16"
    )
