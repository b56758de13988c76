"""warp_partition: its points, what passes through shared memory, what its rows say, from rows made up."""

from __future__ import annotations

import json

import pytest

from experiments import common, tables, warp_answer, warp_partition
from experiments.__main__ import main
from experiments.claims import defaults
from experiments.warp_answer import SPLIT_K, SPLIT_Q, V1
from sandbox import picture, target
from sandbox.variant import HOPPER, SIMULATOR

SIMULATED = target.KIND == "simulator"
SPEEDS = {SPLIT_Q: 400, SPLIT_K: 250, V1: 100}  # TFLOP/s


def points(device=HOPPER, **options):
    return warp_partition.plan(device, **defaults(warp_partition.EXPERIMENT) | options)


def rows(device=HOPPER, speeds=SPEEDS, **options):
    """Those of a GPU, all candidates of a kernel as fast as each other, but split-Q with the common tile slower."""
    found = []
    for point in points(device, **options):
        row = point.fields() | common.empty_row() | {"device": device.name, "revision": "abc"}
        row |= dict.fromkeys(
            ["shared_read_bytes", "shared_write_bytes", *(f"shared_{x}" for x in warp_partition.MOVED)]
        )
        if not point.infeasible:
            row |= {"gate": "passed", "max_error": 1e-4, "error_ratio": 0.2}
            own = row["variant"] != "fwd_v2_mma rows=16"
            row["tflops"] = speeds[row["kernel"]] * (1 if own else 0.75)
            row["seconds"] = point.problem.flops("fwd") / row["tflops"] * 1e-12
        found.append(row)
    return found


def said(found) -> str:
    return " ".join(warp_partition.answer(found).split())


# ---- the points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [HOPPER, SIMULATOR], ids=lambda device: device.kind)
def test_the_pair_has_one_tile_and_as_many_warps(device):
    pairs = warp_answer.alike(rows(device))
    assert {shape[:2] for shape in pairs} == {(d, causal) for d in (64, 128) for causal in (False, True)}
    for q, k in pairs.values():
        assert (q["variant"], q["kernel"], k["kernel"]) == ("fwd_v2_mma rows=16", SPLIT_Q, SPLIT_K)
        assert (q["Br"], q["Bc"], q["warps"]) == (k["Br"], k["Bc"], k["warps"]) == (64, 64, 4)


def test_by_default_some_shapes_fill_the_gpu_and_some_do_not():
    heads = {(p.problem.d, p.problem.N_q): p.problem.B * p.problem.H for p in points()}
    assert heads[128, 2048] == heads[64, 2048] == 256
    assert (heads[128, 1024], heads[128, 4096], heads[128, 16_384]) == (256, 64, 16)
    assert not [p for p in points() if p.infeasible] and len(points()) <= 130  # at two seconds or so each


def test_options():
    assert {(p.problem.N_q, p.problem.B, p.problem.H) for p in points(seqlen=(512,))} == {(512, 32, 16), (512, 32, 32)}
    assert {p.problem.mask.causal for p in points(mask="causal")} == {True}
    assert {(p.problem.B, p.problem.H) for p in points(batch=3, heads=5)} == {(3, 5)}
    assert not all(p.infeasible for p in points(head_dim=(256,)))


def test_refused(tmp_path, capfd):
    with pytest.raises(ValueError, match="no tile fits: .* multiples of 32, not 48|no tile fits"):
        points(head_dim=(20,))
    for words, told in ((["--dtype", "fp32"], "fp32"), (["--seqlen", "0"], "--seqlen"), (["--mask", "odd"], "odd")):
        assert main(["run", "warp_partition", "--out", str(tmp_path / "out"), *words]) == 2
        assert told in capfd.readouterr().err and not (tmp_path / "out").exists()


# ---- what rows say --------------------------------------------------------------------------------------------------


def test_speeds_are_compared_alike_at_their_best_and_with_v1():
    found = rows()
    text = said(found)
    assert "Same tile, 64x64, and 4 warps each: split-Q is 1.20 to 1.20 times as fast (1.20 in the mean)" in text
    assert "Each with its best tile: split-Q is 1.60 to 1.60" in text
    assert "v2 is 4.00 to 4.00 times as fast (4.00 in the mean)" in text and "1.7 to 2.0 times as fast" in text
    assert "at least 132 heads" in text and "v2 reaches 400 TFLOP/s, 40% of 989; v1 100, 10%" in text
    assert "only a GPU" not in text
    assert warp_partition.claims(found)[0][:2] == (8, "holds")
    full = warp_answer.filled(warp_answer.times(warp_answer.best(found, V1)), found)
    assert {N for _, _, N, *_ in full} == {1024, 2048}
    table = warp_partition.table(found)
    assert "× 1.20" in table and "× 1.60" in table and "× 4.00" in table


def test_a_partition_that_costs_nothing_does_not_hold():
    assert warp_partition.claims(rows(speeds=SPEEDS | {SPLIT_K: 300}))[0][:2] == (8, "does not hold")


def test_nothing_that_failed_the_gate_is_compared():
    found = [row | {"gate": "failed: O is off"} if row["kernel"] == SPLIT_K else row for row in rows()]
    assert not warp_answer.alike(found) and "split-Q is" not in said(found).partition("What this run")[0]
    assert warp_partition.claims(found)[0][:2] == (8, "not yet tested")
    assert "failed: O is off" in warp_partition.table(found)
    failed = [row | {"gate": "failed: O is off"} for row in rows()]
    assert "Nothing to compare" in said(failed)
    for some in (found, failed):
        picture.plt.close(warp_partition.draw(some))


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run(tmp_path, capfd):
    words = ["--seqlen", "64", "--head-dim", "64", "--batch", "1", "--heads", "1"]
    assert main(["run", "warp_partition", "--out", str(tmp_path), *words]) == 0
    found = [json.loads(line) for line in (tmp_path / "warp_partition.jsonl").read_text().splitlines()]
    assert {row["kernel"] for row in found} == {SPLIT_Q, SPLIT_K, V1}
    assert all(row["gate"] == "passed" for row in found)
    assert (tmp_path / "warp_partition.csv").exists()
    assert (tmp_path / "warp_partition.png").stat().st_size > 10_000
    out = " ".join(capfd.readouterr().out.split())
    assert "gives no figure for the partition alone" in out
    if not SIMULATED:
        assert all(row["seconds"] > 0 and row["shared_read_bytes"] is None for row in found)
        return
    assert "times as many" in out and "8. not measurable here" in out
    q, k = warp_answer.alike(found)[64, False, 64, 1, 1]
    tile, d, W = 64 * 64, 64, 4  # one step of one block
    assert q["shared_K"] == q["shared_V"] == (1 + W) * tile * 2 and q["shared_O"] == 0
    assert k["shared_K"] == (1 + 1) * tile * 2 and k["shared_V"] == (1 + 2) * tile * 2  # V again for each 32 rows
    assert k["shared_O"] == 2 * W * 64 * d * 4
    for row in (q, k):
        assert row["shared_read_bytes"] + row["shared_write_bytes"] == sum(
            row[f"shared_{array}"] for array in warp_partition.MOVED
        )
        assert tables.agrees(row)
