"""explain: every kernel, what is on record of it, what is counted, what is timed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from sandbox import catalog, prototype, records, target
from sandbox.__main__ import main
from sandbox.cli import explain
from sandbox.measure import bench, counters, roofline, timing
from sandbox.measure.cases import Rows
from sandbox.measure.roofline import DRAM, L2
from sandbox.problem import Problem
from sandbox.variant import HOPPER, SIMULATOR, Tile

SIMULATED = target.KIND == "simulator"
simulated = pytest.mark.skipif(not SIMULATED, reason="stands in for a GPU, where none is")
SMALL = ["--seqlen", "16", "--head-dim", "8", "--heads", "2", "--tile", "8x8"]
P, CHOSEN = Problem(1, 2, 2, 256, 256, 64), Tile(128, 64)


def told(capfd, *words) -> tuple[int, str, str]:
    return main(["explain", *map(str, words)]), *capfd.readouterr()


# ------------------------------------------------------------------------------------------------- every kernel, told


@simulated
@pytest.mark.parametrize("name", catalog.variants(prototypes=False))
def test_every_kernel_is_explained(capfd, tmp_path, name):
    code, out, _ = told(capfd, name, "--out", tmp_path)
    assert code == 0 and (tmp_path / f"explain.{name}.png").stat().st_size > 10_000
    assert "NVIDIA H200, by its datasheet" in out and "exp unit" in out and "DRAM, least bytes possible" in out
    assert [line for line in out.splitlines() if line.startswith(name + " ")]  # the verdict
    assert ("matmul" in out) == (catalog.find(name).direction != "softmax")
    assert not list(tmp_path.glob(".*"))


@simulated
def test_what_is_on_record_is_told(capfd, tmp_path):
    """fwd_v2's row of tile_size, at its default shape; the figures are those of the row."""
    rows = records.read(records.RESULTS / "nvidia-h200" / "tile_size.jsonl")
    (row,) = [row for row in rows if (row["variant"], row["Br"], row["Bc"]) == ("fwd_v2", 128, 64)]
    _, out, _ = told(capfd, "fwd_v2", "--out", tmp_path)
    time = next(line for line in out.splitlines() if line.startswith("  time"))
    assert f"{row['seconds'] * 1e3:.3g} ms, {row['tflops']:.3g} TFLOP/s" in time
    assert f"results/nvidia-h200/tile_size.jsonl, revision {row['revision']}" in time
    assert "measured from another source" in out and "through DRAM, measured" in out and "through L2" in out


# ---------------------------------------------------------------------------------------------------- what is on record


def row(**fields) -> dict:
    """A row as loop_order and tile_size write it."""
    return {
        "variant": "fwd_v2", "B": 1, "H": 2, "N": 256, "d": 64, "dtype": "fp32", "causal": False, "Br": 64, "Bc": 64,
        "gate": "passed", "seconds": 1e-3, "revision": "abc", "source": records.source(), "time": "2026-01-01",
        "dram_bytes": None, "l2_bytes": None, "no_counters": "no ncu",
    } | fields  # fmt: skip


def benched(**fields) -> dict:
    """The same as bench writes it."""
    names = ("B", "H", "d", "dtype", "causal", "Br", "Bc", "gate", "revision", "source", "time")
    return {name: row()[name] for name in names} | {
        "provider": "sandbox:fwd_v2", "H_kv": 2, "N_q": 256, "N_k": 256, "ms": 2.0, "kernel_hash": "other",
    } | fields  # fmt: skip


@pytest.fixture
def on_record(tmp_path, monkeypatch):
    """on_record(file=[rows], ...): what results/nvidia-h200 holds."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")

    def write(**files):
        folder = tmp_path / "results" / HOPPER.slug
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    return write


def found(given=None, chosen=CHOSEN, shape=P, name="fwd_v2"):
    return explain.recorded(catalog.find(name), shape, given, chosen, HOPPER)


def test_a_recorded_time_is_that_of_the_same_launch(on_record):
    other = [row(**{name: x}) for name, x in (("N", 512), ("B", 2), ("H", 4), ("d", 32), ("dtype", "fp16"))]
    other += [row(causal=True), row(variant="fwd_v1"), row(gate="failed: O"), row(seconds=None), benched(H_kv=1)]
    other += [benched(provider="torch:flash"), benched(ms=None), benched(N_k=512)]
    on_record(loop_order=other)
    known = found()
    assert known.seconds is None and known.tile == Tile(128, 64) and "without a GPU nothing is timed" in known.words
    on_record(loop_order=[*other, row()])
    known = found()
    assert (known.seconds, known.tile, known.revision) == (1e-3, Tile(64, 64), "abc")
    assert known.words == "results/nvidia-h200/loop_order.jsonl, revision abc" and known.notes == ("no ncu",)
    assert found(given=Tile(32, 32)).seconds is None and "tile 32x32" in found(given=Tile(32, 32)).words


def test_which_of_several_recorded_times(on_record):
    """The chosen tile before others, hardware counters before none, late before early."""
    on_record(
        tile_size=[row(), row(seconds=2e-3, dram_bytes=7, l2_bytes=9)], loop_order=[row(time="2027", seconds=3e-3)]
    )
    assert found().seconds == 2e-3 and found().moved == {DRAM: 7, L2: 9}
    on_record(bench=[benched(Br=128)])
    assert found().seconds == 2e-3 and found().tile == Tile(128, 64) and found().moved == {}
    assert found(given=Tile(64, 64)).tile == Tile(64, 64)


def test_another_source_is_told(on_record):
    on_record(loop_order=[row(source="old")])
    assert found().notes[0] == "that row was measured from another source than today's"
    on_record(loop_order=[], bench=[benched()])
    assert "another source" in found().notes[0]
    on_record(bench=[benched(kernel_hash=bench.kernel_hash("fwd_v2"), source="old")])  # this kernel is still the same
    assert found().notes == ()


def test_a_recorded_softmax(on_record):
    fields = {"variant": "softmax_online", "rows": 64, "N": 128, "dtype": "fp32", "Br": None, "Bc": None}
    on_record(online_softmax=[row(**fields)])
    assert found(chosen=None, shape=Rows(64, 128), name="softmax_online").seconds == 1e-3
    assert found(chosen=None, shape=Rows(128, 64), name="softmax_online").seconds is None


# ------------------------------------------------------------------------------------------- kernels without a formula


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of prototypes, found by the catalog."""
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))
    yield tmp_path
    catalog._read.cache_clear()


def made(folder, name, parent, old="", new=""):
    """A copy of the parent, in which `old` is `new`."""
    file = prototype.create(name, parent, folder)
    text = file.read_text()
    assert not old or text.count(old) == 1
    file.write_text(text.replace(old, new) if old else text)
    catalog._read.cache_clear()


@simulated
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_bytes_of_a_prototype_are_counted(capfd, folder, dtype):
    """At a shape that is quick to simulate they are those of its parent's formula."""
    made(folder, "my_idea", "fwd_v2")
    outs = [told(capfd, name, *SMALL, "--dtype", dtype, "--out", folder / "out")[1] for name in ("fwd_v2", "my_idea")]
    asked = [next(line for line in out.splitlines() if line.startswith("asked for")) for out in outs]
    assert asked[0] == asked[1] and "counted on the simulator" in outs[1]
    if dtype == "fp32":
        reads = [next(line for line in out.splitlines() if line.startswith("  reads")) for out in outs]
        assert reads[0] == reads[1]


@simulated
@pytest.mark.parametrize("parent", ["fwd_v2", "softmax_online"])
def test_a_large_shape_is_counted_at_a_small_one(capfd, folder, parent):
    made(folder, "my_idea", parent)
    code, out, _ = told(capfd, "my_idea", "--out", folder / "out")
    small = "8x64 fp32: 1.5" if parent == "softmax_online" else "B=1 H=1 N=64x64 d=16 fp32 full: "
    assert code == 0 and f"not known; counted at {small}" in out and "asked for" not in out.split("bytes   ")[1]


@simulated
@pytest.mark.parametrize("change", [("log(l)", "log(l + l)"), ("cuda.syncwarp()", "pass")])
def test_a_wrong_kernel_has_no_explanation(capfd, folder, change):
    """By the gate, or by the simulator (a race)."""
    made(folder, "my_idea", "fwd_v2", *change)
    code, out, err = told(capfd, "my_idea", *SMALL, "--out", folder / "out")
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("refused: my_idea, B=1 H=2 N=16x16")
    assert "python -m sandbox check my_idea" in err and not (folder / "out").exists()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """explain as on a GPU, timed by a clock of ours, computed by the simulator: the launches that were timed."""
    launches = []
    monkeypatch.setattr(target, "KIND", "gpu")
    monkeypatch.setattr(target, "device", lambda: SIMULATOR)
    monkeypatch.setattr(target, "torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        timing, "time", lambda verdict: launches.append(verdict) or timing.Timing(2.0, 2.0, 2.0, 3, 0.0)
    )
    monkeypatch.setattr(roofline, "_copy", lambda: 4e12)
    monkeypatch.setattr(bench, "ceiling", lambda dtype: {"fp32": 50.0, "fp16": 700.0}[dtype])
    monkeypatch.setattr(counters, "count", lambda wanted: ([counters.Counters(600, 400, 5000, 1)], ""))
    return launches


@simulated
def test_on_a_gpu_it_is_gated_and_timed(capfd, gpu, tmp_path, monkeypatch):
    code, out, _ = told(capfd, "fwd_v2", *SMALL, "--dtype", "fp16", "--out", tmp_path)
    assert code == 0 and [verdict.passed for verdict in gpu] == [True]
    assert "2 ms, " in out and "measured now, behind the gate" in out and "on record" not in out
    assert "device copy, this run" in out and "50 TFLOP/s" in out and "700 TFLOP/s" in out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert "1 kB" in " ".join(rows["through DRAM, measured"]) and "5 kB" in " ".join(rows["through L2, measured"])
    assert "no wall of the exp unit: the clock of simulator is in no table of ours" in out
    monkeypatch.setattr(counters, "count", lambda wanted: ([None], "no hardware counters: no ncu"))
    _, out, _ = told(capfd, "fwd_v2", *SMALL, "--out", tmp_path)
    assert "note    no hardware counters: no ncu" in out and "through DRAM" not in out


@simulated
def test_on_a_gpu_a_softmax_has_its_bandwidth(capfd, gpu, tmp_path):
    code, out, _ = told(capfd, "softmax_safe", "--seqlen", 16, "--heads", 1, "--out", tmp_path)
    assert code == 0 and "1.02 MB/s" in out and "they are read of attention alone" in out  # 2 x 16 x 16 x 4 B in 2 ms


@simulated
def test_what_fails_its_gate_is_not_timed(capfd, gpu, folder):
    made(folder, "my_idea", "fwd_v2", "log(l)", "log(l + l)")
    code, out, err = told(capfd, "my_idea", *SMALL, "--out", folder / "out")
    assert (code, out, gpu) == (1, "", []) and "LSE is off by 0.693" in err and not (folder / "out").exists()


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "words, hint",
    [
        (["fwd_v22"], "did you mean fwd_v2"),
        (["fwd_v2", "--seqlen", "0"], "--seqlen"),
        (["fwd_v2", "--head-dim", "300"], "head_dim d=300: expected 1 to 256"),
        (["fwd_v2", "--tile", "64"], "expected BrxBc"),
        (["fwd_v2", "--tile", "512x512"], "needs 1,474,560 B of shared memory, a block has 232,448 B"),
        (["fwd_v2", "--dtype", "fp64"], "fp64"),
        (["softmax_safe", "--tile", "8x8"], "--tile: softmax_safe is a softmax kernel"),
        (["softmax_safe", "--head-dim", "8"], "--head-dim: softmax_safe is a softmax kernel"),
        (["softmax_safe", "--no-causal"], "--causal: softmax_safe is a softmax kernel"),
        ([], "NAME"),
    ],
)
def test_refused(capfd, tmp_path, words, hint):
    code, out, err = told(capfd, *words, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and hint in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
