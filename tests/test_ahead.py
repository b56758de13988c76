"""Compiling ahead: it is what a check and a bench take, it is found in the cache, and no process outlives its asker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox import catalog, cubin
from sandbox.cli import watch
from sandbox.measure import ahead, bench
from sandbox.measure.spread import spread
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Tile

FULL = Problem(1, 1, 1, 1, 1, 16, "fp32")
SMALL = ahead.Wanted("softmax_safe", FULL, None)


def of(problem: Problem, name: str = "fwd_v2") -> ahead.Wanted:
    return ahead.Wanted(name, problem.kind, Tile(16, 16))


@pytest.mark.parametrize("name", catalog.variants(prototypes=False))
def test_a_round_has_a_process_for_each_kernel(name):
    variant, wanted = catalog.find(name), set(watch._wanted(name, True, HOPPER))
    assert 0 < len(wanted) <= watch.COMPILED
    for case in spread(variant, HOPPER, quick=True):
        assert (name, case.problem.kind, case.tile) in wanted
    assert {one.name for one in wanted} <= {name, variant.parent}


def compile_then_look(folder: Path, wanted: list, waiting: int) -> tuple[list, list, int]:
    """(what the cache lacked, what it lacks then, processes that are left) of compile_all; from the compile target."""
    os.environ["SANDBOX_CACHE"] = str(folder)
    lacked, processes = ahead.missing(wanted, HOPPER), [ahead.Process() for _ in range(waiting)]
    ahead.compile_all(wanted, HOPPER, processes)
    return lacked, ahead.missing(wanted, HOPPER), len(ahead._alive)


def test_kernels_are_compiled_once_and_found_afterwards(compiler, tmp_path):
    wanted = [SMALL, of(FULL), of(FULL)]
    assert compiler.submit(compile_then_look, tmp_path, wanted, 2).result() == (wanted[:2], [], 0)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(times) == 2 and all(cubin.read(file) for file in times)
    assert compiler.submit(compile_then_look, tmp_path, wanted, 0).result() == ([], [], 0)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


def processes_of(folder: Path, wanted: list, cores: int, most: int) -> list[int]:
    """How many kernels each process compiled, of compile_all; from the compile target."""
    os.environ["SANDBOX_CACHE"], os.cpu_count, ahead.MOST = str(folder), lambda: cores, most
    started, begin = [], ahead.Process.__init__

    def __init__(process):
        begin(process)
        started.append(process)

    ahead.Process.__init__ = __init__
    ahead.compile_all(wanted, HOPPER)
    assert not ahead._alive and not ahead.missing(wanted, HOPPER)
    return [process.compiled for process in started]


def test_a_process_compiles_several(compiler, tmp_path):
    wanted = [of(replace(FULL, d=d)) for d in (5, 6, 7)]
    assert compiler.submit(processes_of, tmp_path, wanted, 2, 2).result() == [2, 1]


def test_a_few_are_left_to_whoever_needs_them(compiler, tmp_path):
    assert compiler.submit(compile_then_look, tmp_path, [SMALL], 0).result() == ([SMALL], [SMALL], 0)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_built_is_not_missing(compiler, tmp_path):
    wanted = [of(FULL, "no_such"), ahead.Wanted("fwd_v2", FULL, Tile(4096, 4096))]
    assert compiler.submit(compile_then_look, tmp_path, wanted, 0).result() == ([], [], 0)


def test_what_does_not_compile_says_why(tmp_path, monkeypatch):
    text = catalog.file_of("fwd_v2").read_text().replace("from ..", "from sandbox.").replace("fwd_v2", "fwd_wrong")
    (tmp_path / "fwd_wrong.py").write_text("print('read')\n" + text.replace("run = Launch(", "run = Lunch("))
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))
    with ahead.Process(str(tmp_path)) as process, pytest.raises(RuntimeError, match="name 'Lunch' is not defined"):
        process.compile(of(FULL, "fwd_wrong"), HOPPER)


def test_a_file_that_refuses_or_raises_wants_nothing():
    assert watch._wanted("no_such", True, HOPPER) == []
    assert ahead.of_spread(catalog.find("fwd_v2"), HOPPER, tile=3, dtype="fp8") == []


def test_compiled_for_timing_is_compiled_for_good(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path))
    bench.compile_seconds.cache_clear()
    seconds = bench.compile_seconds(*SMALL, HOPPER)
    (file,) = tmp_path.iterdir()
    assert cubin.read(file) and 0 < seconds["cached_compile_s"] < seconds["compile_s"]
    assert compiler.submit(compile_then_look, tmp_path, [SMALL], 0).result() == ([], [], 0)


def test_stopping_ends_every_process(monkeypatch):
    started = threading.Event()

    def do(slow):
        if not slow:
            return started.wait()
        with ahead.Process() as process:
            started.set()
            process.compile(SMALL, HOPPER)

    def interrupt(done, of):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ahead.at_once(do, [True, False], interrupt)
    assert not ahead._alive and time.monotonic() - begin < 1


ASKER = """
import sys, time
from sandbox.measure import ahead
from sandbox.variant import HOPPER
process = ahead.Process(sys.argv[1])
print(process._process.pid, flush=True)
time.sleep(600)
"""


def test_a_process_does_not_outlive_its_asker(tmp_path):
    root = Path(__file__).parents[1]
    asker = subprocess.Popen(
        [sys.executable, "-c", ASKER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    process = int(asker.stdout.readline())
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    asker.stdout.close()
    until = time.monotonic() + 60
    while time.monotonic() < until and running(process):
        time.sleep(0.1)
    assert not running(process)


def running(process: int) -> bool:
    """Whether there is such a process; one that has ended but that nobody has waited for is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_of_the_kernels_is_read_before_the_save():
    catalog._read.cache_clear()
    watch._warm_up(HOPPER)
    assert catalog._read.cache_info().currsize == 0
