"""What is measured is kept: rows whole or not at all, tables of what results/ holds, times only after the gate."""

import csv
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sandbox import records, target
from sandbox.mask import Mask
from sandbox.measure import counters, timing
from sandbox.problem import Problem
from sandbox.variant import Tile

ROW = {"variant": "fwd_v2", "N": 64, "device": "simulator", "revision": "abc", "source": "def", "ms": None}


def log(folder):
    return records.Log(folder, "bench", ("variant", "N"))


def test_nothing_is_created_before_the_first_row(tmp_path):
    log(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_point_measured_again_replaces_its_row(tmp_path):
    first = log(tmp_path)
    for row in (ROW, ROW | {"N": 128}, ROW | {"ms": 2.5}):
        first.append(row)
    assert records.read(tmp_path / "bench.jsonl") == [ROW | {"ms": 2.5}, ROW | {"N": 128}]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]


@pytest.mark.parametrize("field, other", [("revision", None), ("source", "123"), ("device", "NVIDIA H200")])
def test_only_rows_of_this_source_and_device_are_found(field, other, tmp_path):
    log(tmp_path).append(ROW)
    assert log(tmp_path).find(ROW | {"ms": 9}) == ROW
    assert log(tmp_path).find(ROW | {field: other}) is None


def test_finish_orders_the_rows_and_writes_them_as_csv(tmp_path):
    rows = [ROW | {"N": n, "versions": {"numpy": "2.4"}} for n in (3, 1, 2)]
    first = log(tmp_path)
    for row in rows:
        first.append(row)
    first.finish(sorted(rows, key=lambda row: row["N"]))
    assert [row["N"] for row in records.read(tmp_path / "bench.jsonl")] == [1, 2, 3]
    with (tmp_path / "bench.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["N"] for row in table] == ["1", "2", "3"]
    assert (table[0]["ms"], json.loads(table[0]["versions"])) == ("", {"numpy": "2.4"})


def test_a_file_that_is_no_record_is_refused_with_its_line(tmp_path):
    (tmp_path / "bench.jsonl").write_text('{"N": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"bench.jsonl, line 2"):
        log(tmp_path)


def test_provenance_names_what_a_number_depends_on(tmp_path, monkeypatch):
    stamp = records.provenance(SimpleNamespace(name="simulator"))
    assert set(stamp) == {"device", "revision", "source", "versions"}
    assert {"python", "numpy", "torch"} <= set(stamp["versions"])
    monkeypatch.setattr(records, "ROOT", tmp_path)  # not a git repository
    monkeypatch.setenv("SANDBOX_REVISION", "")
    assert records.revision.__wrapped__() is None
    monkeypatch.setenv("SANDBOX_REVISION", "abc1234")
    assert records.revision.__wrapped__() == "abc1234"


# ---- the README's tables --------------------------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    folder = tmp_path / "nvidia-h200"
    for n in (64, 1_000_000):
        log(folder).append(ROW | {"N": n, "causal": False, "ms": n / 3})
    path = tmp_path / "README.md"
    path.write_text("# A\n<!-- table:nvidia-h200/bench columns=variant,N,ms causal=false -->\nold\n<!-- end -->\nB\n")
    return path


def records_command(*words):
    return CliRunner().invoke(records.main, list(map(str, words)))


def test_tables_are_checked_then_written(readme):
    stale = records_command("--check", readme)
    assert stale.exit_code == 1 and "nvidia-h200/bench" in stale.output
    assert records_command("--write", readme).exit_code == 0
    text = readme.read_text()
    assert text.startswith("# A\n<!-- table:") and text.endswith("<!-- end -->\nB\n")
    assert "| fwd_v2  | 1,000,000 | 333,333 |" in text and "| fwd_v2  |        64 |    21.3 |" in text
    assert records_command("--check", readme).exit_code == 0


def test_a_table_of_what_is_not_there_is_refused(readme):
    readme.write_text("<!-- table:nvidia-h200/bench N=65 -->\n<!-- end -->\n")
    asked = records_command("--write", readme)
    assert asked.exit_code == 2 and "N=65" in asked.output


def test_one_of_several_values(readme):
    for N, rows in ("64", 1), ("64,1000000", 2), ("1000000,65", 1), ("65,66", 0):
        readme.write_text(f"<!-- table:nvidia-h200/bench columns=N N={N} -->\n<!-- end -->\n")
        asked = records_command("--write", readme)
        assert (asked.exit_code == 0) == (rows > 0) and readme.read_text().count("\n|") == (rows and rows + 2)


def test_the_lineage_names_every_variant_and_its_parent():
    table = records.lineage()
    assert "| `fwd_v2_one_block` |" in table and "| `fwd_v2` " in table


# ---- time and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [None, SimpleNamespace(passed=False, launch=lambda: None)])
def test_nothing_is_timed_that_has_not_passed(verdict):
    with pytest.raises(timing.Ungated):
        timing.time(verdict)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_timed_without_a_gpu():
    with pytest.raises(ValueError, match="no GPU"):
        timing.time(SimpleNamespace(passed=True, launch=lambda: None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_takes_about_as_long_as_its_bytes():
    x = torch.empty(2**28, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    t = timing.time(SimpleNamespace(passed=True, launch=lambda: y.copy_(x)))
    assert t.ms_p20 <= t.ms <= t.ms_p80
    assert 0.2 < 2 * x.numel() / (t.ms * 1e-3) / 1e12 < 20  # TB/s


NCU = """\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","spin_kernel(long)","dram__bytes_read.sum","byte","64"
"0","7","spin_kernel(long)","lts__t_bytes.sum","byte","64"
"1","7","rowsum","dram__bytes_read.sum","byte","1,024"
"1","7","rowsum","dram__bytes_write.sum","byte","32"
"1","7","rowsum","lts__t_bytes.sum","byte","4,096"
"2","7","bwd_v2","dram__bytes_read.sum","byte","2048"
"2","7","bwd_v2","dram__bytes_write.sum","byte","0"
"2","7","bwd_v2","lts__t_bytes.sum","byte","8192"
"3","7","spin_kernel(long)","dram__bytes_read.sum","byte","64"
"4","7","spin_kernel(long)","dram__bytes_read.sum","byte","64"
"5","7","fwd_v2","dram__bytes_read.sum","byte","n/a"
==PROF== Disconnected from process 7
"""
WANTED = counters.Wanted("fwd_v2", "fwd", Problem(1, 2, 1, 8, 9, 4, mask=Mask(True, "top_left", (3, -1))), Tile(4, 4))


def test_counters_are_summed_over_the_kernels_of_each_launch():
    both, none, unreadable = counters.parse(NCU, 3)
    assert both == counters.Counters(3072, 32, 12288, kernels=2) and both.dram_bytes == 3104
    assert none is unreadable is None
    assert counters.parse(NCU, 2) == [None, None]  # a launch of which nothing is known: whose is whose?
    assert counters.parse("==ERROR== no permission\n", 1) == [None]


def test_a_wanted_launch_survives_the_way_to_the_child():
    assert counters.Wanted.of(json.loads(json.dumps(asdict(WANTED)))) == WANTED


@pytest.mark.skipif(target.KIND == "compile", reason="launches")
@pytest.mark.parametrize("name", ["fwd_v1", "bwd_v2"])
def test_the_child_launches_what_is_wanted(name):
    counters._launch(counters.Wanted(name, name[:3], WANTED.problem, WANTED.tile))()


def test_without_ncu_the_reason_is_one_line(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda _: None)
    found, reason = counters.count([WANTED, WANTED])
    assert found == [None, None] and "ncu" in reason and "\n" not in reason


def test_when_ncu_fails_the_reason_is_its_complaint(monkeypatch):
    done = SimpleNamespace(returncode=1, stdout="==PROF== x\n==ERROR== The user has no permission\n", stderr="")
    monkeypatch.setattr(counters.shutil, "which", lambda _: "ncu")
    monkeypatch.setattr(counters.subprocess, "run", lambda *_, **__: done)
    found, reason = counters.count([WANTED])
    assert found == [None] and "The user has no permission" in reason
