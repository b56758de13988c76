"""tile_size and loop_order with the kernels of the tensor cores: what they count, refuse, say, and leave on record."""

import pytest
from test_experiments import SMALL, fake_rows, gpu_plan, kernels, read, run

from experiments import common, loop_order, tables, tile_size, units
from experiments.__main__ import main
from experiments.loop_answer import ON, Facts
from experiments.units import FMA, TENSOR
from sandbox import catalog, picture, target
from sandbox.measure import gate, standard
from sandbox.variant import HOPPER, Infeasible

SIMULATED = target.KIND == "simulator"
GAUSS = ["--input", "gauss", "--no-counters"]
KERNELS = ON[TENSOR]


@pytest.mark.parametrize(
    "asked, settled",
    [
        ((None, None), (FMA, "fp32")), ((None, "bf16"), (TENSOR, "bf16")), ((TENSOR, None), (TENSOR, "bf16")),
        ((FMA, "fp16"), (FMA, "fp16")), ((None, None, ["fwd_v2_mma"]), (TENSOR, "bf16")),
        ((None, "fp16", ["fwd_v1", "bwd_v2"]), (FMA, "fp16")), ((None, None, ["fwd_v2", "fwd_v2_mma"]), (FMA, "bf16")),
    ],
)  # fmt: skip
def test_unit_and_dtype_follow_from_one_another(asked, settled):
    assert units.settle(*asked) == settled


def test_tensor_cores_take_no_fp32(tmp_path, capsys):
    for name in ("tile_size", "loop_order"):
        assert run(name, "--unit", "tensor", "--dtype", "fp32", "--out", tmp_path / "out") == 2
        assert "--dtype fp32: the kernels of --unit tensor take fp16 and bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_takes_each_kernel_s_own_tiles():
    points = gpu_plan(tile_size, dtype="bf16", variant=None, seqlen=4096)
    assert {point.variant for point in points} == set(tile_size.VARIANTS[TENSOR])
    for name in tile_size.VARIANTS[TENSOR]:
        ours = [point for point in points if point.variant == name]
        assert [point.tile for point in ours] == list(catalog.find(name).tiles)
        assert sum(point.notes["chosen"] for point in ours) == 1
        assert any(point.infeasible for point in ours) and not all(point.infeasible for point in ours)
    points = gpu_plan(tile_size, dtype="bf16", variant=("fwd_v2_mma",), seqlen=64, br=(64, 128))
    assert {point.tile.Br for point in points} >= {64, 128} and {point.tile.Bc for point in points} >= {32, 64, 96}


def test_a_kernel_that_cannot_do_the_problem_says_so_in_its_rows():
    """fwd_v1_mma takes head_dim in multiples of 32."""
    points = gpu_plan(tile_size, dtype="bf16", variant=None, seqlen=512, head_dim=80)
    told = {point.infeasible for point in points if point.variant == "fwd_v1_mma"}
    assert len(told) == 1 and "multiples of 32, not 80" in told.pop()
    assert any(point.notes["chosen"] for point in points if point.variant == "fwd_v2_mma")


def test_what_the_compiler_refuses_cannot_run(tmp_path, monkeypatch):
    """Registers that spill are found when a kernel is compiled, at its first launch."""

    def check(variant, problem, tile, inputs, device):
        raise Infeasible(tile, "spills 64 B of registers")

    monkeypatch.setattr(gate, "check", check)
    words = [*GAUSS, "--seqlen", 16, "--head-dim", 16, "--variant", "fwd_v2_mma", "--out", tmp_path]
    assert run("tile_size", *words) == 0
    rows = read(tmp_path, "tile_size")
    assert rows and all((row["infeasible"], row["gate"]) == ("spills 64 B of registers", None) for row in rows)


def test_runs_of_both_units_share_a_folder(tmp_path, capsys):
    """Each has its rows and its picture, and is reported again; what is counted is what the formula says."""
    assert run("loop_order", *SMALL, "--seqlen", 9, "--out", tmp_path) == 0
    words = ["--unit", "tensor", *GAUSS, "--causal", "--seqlen", 20, "--head-dim", 32, "--br", 16, "--out", tmp_path]
    assert run("loop_order", *words) == 0
    rows = kernels(read(tmp_path))
    assert {row["variant"] for row in rows} == {
        *ON[FMA].forward,
        *ON[FMA].backward,
        *KERNELS.forward,
        *KERNELS.backward,
    }
    for row in rows:
        assert (row["gate"], row["infeasible"]) == ("passed", None)
        assert not SIMULATED or tables.agrees(row)
    said = capsys.readouterr().out
    assert "by the loop and by skipping tiles that the mask empties" in said and "The warps alone" in said

    pictures = [tmp_path / name for name in ("loop_order.png", "loop_order-tensor.png")]
    for one in pictures:
        one.unlink()
    assert main(["draw", "loop_order", "--out", str(tmp_path)]) == 0
    assert all(one.exists() for one in pictures)
    told = capsys.readouterr().out
    assert told.count("Why swap the loops?") == 2 and "The grid alone" in told and "The warps alone" in told
    assert len(kernels(read(tmp_path))) == len(rows)


@pytest.mark.skipif(not SIMULATED, reason="accesses are counted on the simulator")
def test_a_simulated_sweep_counts_what_the_formula_says(tmp_path):
    words = [*GAUSS, "--dtype", "fp16", "--seqlen", 20, "--head-dim", 32, "--br", 16, "--bc", 32, "--out", tmp_path]
    assert run("tile_size", *words) == 0
    rows = read(tmp_path, "tile_size")
    assert {row["variant"] for row in rows} == set(tile_size.VARIANTS[TENSOR])
    assert all(row["gate"] == "passed" and tables.agrees(row) and row["Br"] * row["Bc"] <= 1024 for row in rows)
    assert (tmp_path / "tile_size-tensor.png").exists()


@pytest.mark.parametrize("module, more", [(loop_order, {}), (tile_size, {"variant": None, "seqlen": 4096})])
def test_a_gpu_run_is_reported_too(module, more, tmp_path):
    rows = list(fake_rows(gpu_plan(module, dtype="bf16", **more), lambda point: 1e-3 * point.tile.Br / point.tile.Bc))
    common.report(module.EXPERIMENT, rows, tmp_path)
    assert (tmp_path / f"{module.EXPERIMENT.name}-tensor.png").stat().st_size > 10_000


def test_the_verdicts_follow_the_numbers():
    slow = {"fwd_v1_mma": 9.0, "fwd_v2_mma_split_k": 6.0, "fwd_v2_mma": 2.0, standard.NAME: 10.0}
    points = gpu_plan(loop_order, dtype="bf16", seqlen=(1024,))
    rows = list(fake_rows(points, lambda point: slow.get(point.variant, 5.0)))
    verdicts = {number: verdict for number, verdict, _ in loop_order.claims(rows)}
    assert (verdicts[7], verdicts[8]) == ("holds", "holds for warps")
    said = loop_order.answer(rows)
    assert "1.5 times faster; but 32 thread blocks become 512 with it" in said and "3 times faster" in said
    assert Facts.of(rows).kernels is KERNELS and "(v2, deterministic)" in said and "(v1)" not in said
    slow["fwd_v2_mma"] = 5.9
    rows = list(fake_rows(points, lambda point: slow.get(point.variant, 5.0)))
    assert {number: verdict for number, verdict, _ in loop_order.claims(rows)}[8] == "does not show"


def test_all_kernels_of_a_comparison_take_its_usual_tile():
    for d in (32, 64, 96, 128, 256):
        points = gpu_plan(loop_order, dtype="bf16", seqlen=(1024,), head_dim=d)
        assert [point.infeasible for point in points if point.infeasible] == []
    assert {point.problem.dtype for point in loop_order.plan(HOPPER, None, None, None, None, None, 1, None, False, 0,
                                                             None, False, TENSOR)} == {"bf16"}  # fmt: skip


def test_names_at_the_ends_of_lines_do_not_overlap():
    axes = picture.page("", "", (4, 3)).add_axes((0.1, 0.1, 0.5, 0.8))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    picture.label_ends(axes, [(1, 0.96, "a", "k"), (1, 1.0, "b", "k"), (1, 0.9, "c", "k"), (1, 0.1, "d", "k")], 0.1)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights == pytest.approx({"d": 0.1, "c": 0.8, "a": 0.9, "b": 1.0})
    picture.plt.close("all")
