"""python -m experiments all: the runs are commands that exist; they go on, are skipped, and fail, one by one."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import click
import pytest

import sandbox.__main__ as sandbox_cli
from experiments import everything
from experiments.__main__ import PerExperiment, main, run_command
from sandbox import records, target
from sandbox.variant import HOPPER

EXPERIMENTS = PerExperiment("run", command=run_command)


@pytest.mark.parametrize("command", everything.RUNS)
def test_every_run_is_a_command(command, tmp_path):
    module, verb, *words = shlex.split(command)
    if verb == "bench":
        assert sandbox_cli.main([verb, *words, "--out", str(tmp_path), "--dry-run"]) == 0
        return
    group, name = (sandbox_cli.commands, verb) if module == "sandbox" else (EXPERIMENTS, words.pop(0))
    group.get_command(None, name).make_context(name, [*words, "--out", str(tmp_path)]).close()  # parses its options


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """run(only, fresh) -> (whether all went well, the commands that were started); `fails` are words of some."""

    def run(only=(), fresh=False, fails=()):
        started = []

        def start(words):
            assert words[:2] == [sys.executable, "-m"] and words[words.index("--out") + 1] == str(tmp_path)
            started.append(" ".join(words[2:]))
            return SimpleNamespace(returncode=int(any(word in started[-1] for word in fails)))

        monkeypatch.setattr(target, "KIND", "gpu")
        monkeypatch.setattr(target, "device", lambda: replace(HOPPER, kind="gpu"))
        monkeypatch.setattr(subprocess, "run", start)
        return everything.run(tmp_path, only, fresh), started

    records.revision(), records.source(), records.versions()  # asked of git and others before they are replaced
    return run


def test_a_run_that_ended_well_is_not_made_again(gpu, tmp_path, capsys):
    well, started = gpu(only=("loop_order", "overhead"), fails=("--dtype bf16",))
    asked = [run for run in everything.RUNS if "loop_order" in run or "overhead" in run]
    assert not well and [words.split(" --out")[0] for words in started] == asked
    assert "failed: experiments run loop_order --dtype bf16" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["command"] for row in rows] == asked[:-1]
    assert all(row["revision"] == records.revision() and row["time"] and row["seconds"] >= 0 for row in rows)

    well, started = gpu(only=("loop_order", "overhead"))
    assert well and len(started) == 1 and "bf16" in started[0] and "--fresh" not in started[0]
    assert gpu(only=("loop_order", "overhead")) == (True, [])
    well, started = gpu(only=("loop_order", "overhead"), fresh=True)
    assert well and [words.endswith("--fresh") for words in started] == [False, False, True, True]


def test_no_run_has_that_word(gpu):
    with pytest.raises(click.UsageError, match="--only tile_chioce: no run has that in it"):
        gpu(only=("tile_chioce",))


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(target, "KIND", "simulator")
    assert main(["all", "--out", str(tmp_path / "out")]) == 2
    assert "all needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["all", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == list(everything.RUNS)
