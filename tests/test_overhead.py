"""What a call costs the host, as `python -m sandbox overhead` measures it; on a GPU, held against a limit."""

from __future__ import annotations

import os

import pytest
import torch

from sandbox import catalog, records, target
from sandbox.__main__ import main
from sandbox.measure import first, overhead
from sandbox.problem import Problem
from sandbox.variant import SIMULATOR

SIMULATED = target.KIND == "simulator"


def test_the_wait_is_not_counted(monkeypatch):
    now, done = [0.0], []

    def spend(seconds, what):
        now[0] += seconds
        done.append(what)

    monkeypatch.setattr(overhead, "perf_counter", lambda: now[0])
    monkeypatch.setattr(overhead, "SAMPLES", 5)
    cost = overhead.Cost.of(lambda: spend(12e-6, "call"), lambda: spend(1.0, "wait"))
    assert (cost.us, cost.us_p20, cost.us_p80) == pytest.approx((12, 12, 12))
    assert done == (["wait"] + ["call"] * overhead.CALLS) * 8 + ["wait"]


@pytest.mark.skipif(not SIMULATED, reason="measured for real below")
def test_the_command(monkeypatch, tmp_path, capfd):
    assert main(["overhead"]) == 2
    assert "overhead needs a GPU: the simulator launches nothing" in capfd.readouterr().err
    monkeypatch.setattr(target, "KIND", "gpu")
    monkeypatch.setattr(target, "device", lambda: SIMULATOR)
    monkeypatch.setattr(target, "torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(overhead, "SAMPLES", 2), monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(first, "PROCESSES", 1)
    words = ["overhead", "fwd_v2", "--first", "--seqlen", "8", "--head-dim", "8", "--heads", "1", "--dtype", "fp32"]
    for _ in range(2):  # the second time the rows are replaced
        assert main([*words, "--out", str(tmp_path)]) == 0
    assert "launch fwd_v2" in capfd.readouterr().out
    rows = records.read(tmp_path / "overhead.jsonl")
    of_process = [f"first attention fwd_v2, {how}" for how in ("compiled", "kept")]
    assert [row["what"] for row in rows] == ["launch fwd_v2", "attention fwd_v2", overhead.SDPA, *of_process]
    assert all(0 < row["us_p20"] <= row["us"] <= row["us_p80"] and row["device"] == "simulator" for row in rows)
    assert rows[0] | {"B": 1, "H": 1, "N_q": 8, "d": 8, "dtype": "fp32", "causal": False} == rows[0]


@pytest.mark.skipif(SIMULATED, reason="needs a GPU: the simulator launches nothing")
@pytest.mark.parametrize("name, most", [("fwd_v3", 15), ("fwd_v2", 25)])
def test_gpu_cost(name, most, capsys):
    """Microseconds of the host, medians: a launch, and attention() from its arguments to its result.

    Measured up to three times: what else runs on this machine can only add.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other tests take the processor: without -n, or by python -m sandbox overhead")
    variant, problem = catalog.find(name), Problem(1, 4, 4, 128, 128, 64, "bf16")
    if name == "fwd_v3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is no Hopper")
    told = []
    for _ in range(3):
        rows = overhead.measure(variant, problem, target.device())
        told += ["{what}: {us:.1f} us (20-80 %: {us_p20:.1f} to {us_p80:.1f})".format(**row) for row in rows]
        if met := all(row["us"] <= limit for row, limit in zip(rows, (most, 60), strict=True)):
            break
    with capsys.disabled():
        print("", *told, sep="\n")
    assert met, f"expected medians of at most {most} us for a launch and 60 us for attention(): {'; '.join(told)}"
