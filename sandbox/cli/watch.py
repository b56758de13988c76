"""watch NAME: the verdict on a kernel, again after every save of its file.

Each round is a process of its own, so that nothing of an earlier version is left.  The process of the next round is
started at once and waits, everything but the kernels imported: from a save to its verdict nobody waits for imports.
On a GPU the same goes for the processes that compile, one for each kernel that a round takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import click

from ._path import PATH

POLL_S = 0.1
READY = "go\n"
COMPILED = 3  # kernels of a round: of the check two (of a softmax three), and the parent's


@click.command("watch")
@click.argument("name")
@click.option("--bench/--no-bench", default=True, show_default=True, help="On a GPU, time it against its parent too.")
@click.option("--rounds", type=click.IntRange(1), help="End after so many rounds; else on Ctrl-C.")
@click.option("--round", "one_round", is_flag=True, hidden=True)
@PATH
def COMMAND(name, bench, rounds, one_round, path):
    """Check the kernel NAME quickly, and time it where there is a GPU, whenever its file is saved."""
    if one_round:
        code = _round(name, bench)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the verdict need not wait until torch is unloaded, which takes a second
    files = _files_of(name)
    options = [] if bench else ["--no-bench"]
    click.echo(f"watching {', '.join(map(str, files))}; Ctrl-C ends")
    waiting, done, saved = _start(name, options), 0, None
    try:
        while rounds is None or done < rounds:
            if (now := _saved(files)) is None or now == saved:
                time.sleep(POLL_S)
                continue
            since = time.time() if saved is None else max(max(now)[0] / 1e9, time.time() - 60)
            saved = now
            click.echo(f"\n--- round {done + 1}, {time.strftime('%H:%M:%S')}")
            running, waiting = waiting, None
            code = _finish(running)
            verdict = {0: "passed", 1: "FAILED"}.get(code, "no verdict")
            click.echo(
                f"--- {verdict}, {time.time() - since:.1f} s " + ("after the save" if done else "from the start")
            )
            done += 1
            waiting = _start(name, options)
    except KeyboardInterrupt:
        click.echo(f"\nwatched {done} rounds")
    finally:
        for process in (waiting, locals().get("running")):
            if process is not None:
                _kill(process)


def _files_of(name: str) -> list[Path]:
    """The kernel's file, readable or not, and its CUDA C++.  Raises ValueError with the nearest names."""
    from .. import catalog

    for file in catalog.broken():
        if file.stem == name:
            return [file]
    return catalog.files_of(name)


def _saved(files: list[Path]) -> list[tuple[int, int]] | None:
    """When each was saved last, and its size; None while an editor replaces one."""
    try:
        return [(stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files)]
    except FileNotFoundError:
        return None


def _start(name: str, options: list[str]) -> subprocess.Popen:
    """A process that waits for its round; a session of its own, so that Ctrl-C reaches this one alone."""
    command = [sys.executable, "-m", "sandbox", "watch", name, "--round", *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _finish(process: subprocess.Popen) -> int:
    try:
        process.communicate(READY)
    except KeyboardInterrupt:
        _kill(process)
        raise
    return process.returncode


def _kill(process: subprocess.Popen) -> None:
    """Kills a round, and the processes that compile for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- one round, in a process of its own -----------------------------------------------------------------------------


def _round(name: str, bench: bool) -> int:
    from .. import catalog, target
    from ..measure import ahead, search, timing  # noqa: F401  imported while nobody waits
    from .check import COMMAND as check

    device, gpu = target.device(), target.KIND == "gpu"
    with ExitStack() as stack:
        waiting = [stack.enter_context(ahead.Process()) for _ in range(COMPILED * gpu)]
        if gpu:
            _warm_up(device)
        if sys.stdin.readline() != READY:
            return 2
        if gpu:
            ahead.compile_all(_wanted(name, bench, device), device, waiting)
    for file, reason in catalog.broken().items():
        if file.stem == name:
            click.echo(reason)
            return 2
    try:
        check.main([name, "--quick"], prog_name="check", standalone_mode=False)
        code = 0
    except click.exceptions.Exit as verdict:
        code = verdict.exit_code
    if code == 0 and bench:
        click.echo("  not timed: there is no GPU here" if device.simulated else f"  {_bench(name, device)}")
    return code


def _warm_up(device) -> None:
    """A kernel that does nothing is judged on what a check begins with: what that loads on the GPU is there then."""
    from ..measure import gate
    from ..measure.spread import spread
    from ..variant import Tile, Variant

    for direction in ("fwd", "bwd"):
        idle = Variant(
            "idle", direction, "", lambda *_: None, lambda *_: lambda *_: None, usual=lambda *_: Tile(1, 1)
        )  # fmt: skip
        with suppress(RuntimeError):  # no memory, for instance: where it matters it is told
            for case in spread(idle, device, quick=True):
                gate.check(idle, case.problem, case.tile, case.make(), device)


def _wanted(name: str, bench: bool, device) -> list:
    """The kernels that a round takes; where the kernel's file raises, fewer: then the check tells why."""
    from .. import catalog
    from ..measure import ahead
    from ..measure.spread import tile_of

    found = []
    with suppress(Exception):
        variant = catalog.find(name)
        found += ahead.of_spread(variant, device, quick=True)
        if bench and variant.direction != "softmax":
            problem, timed = _timed(variant)
            found += [ahead.Wanted(one.name, problem.kind, tile_of(one, problem, device)) for one in timed]
    return found


def _timed(variant) -> tuple:
    """The problem that a kernel is timed on, and the kernels: it and its parent."""
    from .. import catalog
    from ..measure.spread import BENCHED
    from ..problem import Problem

    dtype = "fp16" if "fp16" in variant.dtypes else variant.dtypes[0]
    parents = [catalog.find(variant.parent)] if variant.parent else []
    return Problem(**BENCHED, d=64, dtype=dtype), [variant, *parents]


def _bench(name: str, device) -> str:
    """A kernel's time beside its parent's, both gated and timed in this run, in a line."""
    from .. import catalog, target
    from ..measure import gate, timing
    from ..measure.spread import tile_of
    from ..variant import Infeasible

    variant = catalog.find(name)
    if variant.direction == "softmax":
        return "not timed: watch times forward and backward kernels only"
    problem, timed = _timed(variant)
    inputs = gate.gaussian(problem, 0, target.torch_device())
    told, times = [], {}
    for one in timed:
        try:
            verdict = gate.check(one, problem, tile_of(one, problem, device), inputs, device)
        except Infeasible as misfit:
            told.append(f"{one.name} not timed: {misfit}")
            continue
        if not verdict.passed:
            told.append(f"{one.name} not timed: {verdict.why}")
            continue
        times[one.name] = timing.time(verdict).ms
        tflops = problem.flops(one.direction) / times[one.name] * 1e-9
        told.append(f"{one.name} {times[one.name]:.3g} ms, {tflops:.3g} TFLOP/s")
    if len(times) == 2:
        mine, its = times.values()
        told.append(f"{its / mine:.2f} x its parent's speed")
    return f"{problem}: " + "; ".join(told)
