"""Experiments online_softmax and memory: what they count, what they say, what they refuse."""

import json

import pytest

from experiments import memory, online_softmax
from experiments.__main__ import main
from sandbox import catalog, picture, target

SIMULATED = target.KIND == "simulator"
simulated = pytest.mark.skipif(not SIMULATED, reason="counted on the simulator")


def run(folder, name, *words):
    assert main(["run", name, "--out", str(folder), *words]) == 0
    assert (folder / f"{name}.csv").exists() and (folder / f"{name}.png").stat().st_size > 10_000
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@simulated
def test_online_softmax_saves_one_access_in_four(tmp_path, capfd):
    rows = run(tmp_path, "online_softmax", "--seqlen", "5,33", "--rows", "3")
    assert {row["variant"] for row in rows} == set(catalog.variants("softmax"))
    taken = {(row["variant"], row["N"]): row["accesses_per_element"] for row in rows}
    assert {taken["softmax_safe", N] for N in (5, 33)} == {4} and {taken["softmax_online", N] for N in (5, 33)} == {3}
    assert all(row["gate"] == "passed" and row["reads_total"] == row["formula_reads_total"] for row in rows)
    assert "3 accesses an element instead of 4, counted, and equal to the formula" in capfd.readouterr().out


def softmax_row(variant, N, reads, seconds=None, gate="passed"):
    return dict.fromkeys(online_softmax.MEASURED) | {
        "variant": variant, "rows": 8, "N": N, "dtype": "fp32", "gate": gate, "seconds": seconds,
        "reads_total": 8 * N * reads, "writes_total": 8 * N, "formula_reads_total": 8 * N * reads,
        "formula_writes_total": 8 * N, "accesses_per_element": reads + 1,
        "gigabytes_per_second": seconds and 64 * N / seconds * 1e-9, "device": "some GPU", "revision": "abc",
    }  # fmt: skip


def test_online_softmax_says_when_it_is_not_faster():
    rows = [softmax_row(*point) for point in (("softmax_safe", 64, 3, 2e-3), ("softmax_online", 64, 2, 4e-3))]
    assert "0.50 to 0.50 times faster" in online_softmax.answer(rows) and "up to 1.3" in online_softmax.answer(rows)
    picture.plt.close(online_softmax.draw(rows))
    rows[0]["gate"] = "failed: Y is off"
    assert "Nothing to compare" in online_softmax.answer(rows)


@simulated
def test_memory_is_linear_where_standard_attention_is_quadratic(tmp_path, capfd):
    rows = run(tmp_path, "memory", "--seqlen", "32,64", "--head-dim", "4")
    for direction in memory.DIRECTIONS:
        for way in ("v1", "v2"):
            assert memory.exponent(memory.peaks(rows, way, direction)) == pytest.approx(1, abs=0.02)
        assert memory.exponent(memory.peaks(rows, memory.STANDARD, direction)) > 1.8
    out = capfd.readouterr().out
    assert "Forward: standard N^1.9" in out and "17,024 MB become 836 MB" in out


def test_memory_of_a_point_counts_S_and_P():
    """Standard attention's forward holds S and P, and O: at least 2 N² numbers."""
    from sandbox.problem import Problem

    point = memory.Point(memory.STANDARD, "fwd", Problem(1, 2, 2, 64, 64, 4, "fp32"), 0)
    assert memory.measure(point)["peak_bytes"] >= 2 * 2 * 64 * 64 * 4


@pytest.mark.parametrize("name", ["online_softmax", "memory"])
@pytest.mark.parametrize("words, told", [(["--seqlen", "0"], "--seqlen"), (["--dtype", "fp64"], "fp64")])
def test_refused(tmp_path, capfd, name, words, told):
    assert main(["run", name, "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capfd.readouterr().err and not (tmp_path / "out").exists()
