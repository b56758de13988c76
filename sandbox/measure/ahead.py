"""Kernels compiled before they are needed, several at once, by processes that leave them in the cache.  [floor 3]

Most of a compilation is Numba's Python, so that threads would wait for one another.  A process compiles some kernels,
one by one, and ends: its start takes as long as one of them.  It sees no GPU, takes nothing of one, and reads the
kernels' files when it is asked, not before.  What does not compile there is compiled again by whoever needs it, and
told there.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from .. import catalog, target
from ..cubin import Missing, only_kept
from ..problem import Problem
from ..variant import Device, Tile, Variant
from .cases import format_problem, parse_problem, parse_tile
from .spread import spread

ROOT = Path(__file__).parents[2]
WORTH = 3  # kernels from which it is quicker to start processes than to compile one after the other
MOST = 12  # kernels of a process: each leaves something in its memory
DONE = "\x1e"  # begins the line that says how long one took


class Wanted(NamedTuple):
    """A kernel to be compiled: its name, Problem.kind, which is all that it is compiled for, and its tile, if any."""

    name: str
    kind: Problem
    tile: Tile | None


def of_spread(variant: Variant, device: Device, **asked) -> list[Wanted]:
    """What spread(variant, device, **asked) takes; nothing where the kernel's file refuses or raises."""
    try:
        return [Wanted(variant.name, case.problem.kind, case.tile) for case in spread(variant, device, **asked)]
    except Exception:  # whatever a kernel file may do: its check tells
        return []


def missing(wanted: Iterable[Wanted], device: Device) -> list[Wanted]:
    """Those that the cache lacks.  What cannot be built at all is not among them."""
    from ..device.launch import compiling

    found = []
    for one in dict.fromkeys(wanted):
        try:
            with compiling(), only_kept():
                _launch(one, device, target.torch_device())()
        except Missing:
            found.append(one)
        except Exception:  # whatever a kernel file may do: its check tells
            continue
    return found


def compile_all(
    wanted: Iterable[Wanted], device: Device, waiting: Iterable[Process] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:  # fmt: skip
    """Compiles what the cache lacks, some at a time: by the processes that wait, then by new ones; all have ended then.

    Few kernels are left to whoever needs them, unless processes wait.
    """
    waiting, lacking, idle = list(waiting), missing(wanted, device), queue.SimpleQueue()
    if not waiting and len(lacking) < WORTH:
        return
    for process in waiting:
        idle.put(process)

    def compile(one):
        try:
            process = idle.get_nowait()
        except queue.Empty:
            process = Process()
        try:
            process.compile(one, device)
        except BaseException:
            process.end()
            raise
        if process.compiled < MOST:
            idle.put(process)
        else:
            process.end()

    try:
        at_once(compile, lacking, progress)
    finally:
        while not idle.empty():
            idle.get().end()


def at_once(do: Callable, things: Iterable, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """do(thing) of each, as many at a time as half the cores; whatever it raises is let go."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        begun = [pool.submit(do, thing) for thing in dict.fromkeys(things)]
        try:
            for n, one in enumerate(as_completed(begun)):
                one.exception()
                progress(n + 1, len(begun))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_alive):
                process.end()
            raise


# ---- a process, as whoever asks sees it -----------------------------------------------------------------------------

_alive: set[Process] = set()


class Process:
    """A process that imports all it needs and waits, to compile kernels: ``with Process() as p: p.compile(...)``.

    cache  the folder that the kernel is kept in, if not the usual one
    It ends with the block, and by itself when this process does.
    """

    def __init__(self, cache: str | None = None):
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
        path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {"SANDBOX_TARGET": "compile", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        environment |= {"SANDBOX_CACHE": cache} if cache else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.compiled = 0
        _alive.add(self)

    def compile(self, wanted: Wanted, device: Device) -> tuple[float, float]:
        """Seconds that it took, and then from the cache.  Raises RuntimeError where it does not compile, and ends."""
        name, kind, tile = wanted
        with suppress(BrokenPipeError):  # it ended before it was asked, and says why
            self._process.stdin.write(json.dumps([name, format_problem(kind), tile and str(tile), asdict(device)]))
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.startswith(DONE):
                self.compiled += 1
                first, cached = json.loads(line[len(DONE) :])
                return first, cached
            said += [line.strip()] * bool(line.strip())
        raise RuntimeError(f"{name} does not compile on its own: {said[-1:]}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        _alive.discard(self)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()


# ---- the process itself ---------------------------------------------------------------------------------------------


def main() -> None:
    """Compiles the kernel that a line of stdin names, then that of the next line."""
    asked = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    try:
        from ..device import compile, hopper  # noqa: F401  imported while nobody waits

        compile.warm_up()
        while True:
            name, problem, tile, device = json.loads(asked.get())
            device = Device(**device | {"capability": tuple(device["capability"])})
            compile.capability = device.capability
            wanted = Wanted(name, parse_problem(problem), parse_tile(tile) if tile else None)
            seconds = [_seconds(wanted, device) for _ in range(2)]
            print(f"\n{DONE}{json.dumps(seconds)}", flush=True)
    except BaseException:  # whatever a kernel file may do
        sys.stdout.flush()
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(1)  # at once: there is a thread that reads, and torch takes its time


def _listen(asked: queue.SimpleQueue) -> None:
    """Hands on what is asked; ends the process when whoever asks has ended or wants no more."""
    for line in iter(sys.stdin.readline, ""):
        asked.put(line)
    os._exit(1)


def _seconds(wanted: Wanted, device: Device) -> float:
    from ..device.launch import compiling

    launch = _launch(wanted, device, "meta")
    begin = time.perf_counter()
    with compiling():
        launch()
    return time.perf_counter() - begin


def _launch(wanted: Wanted, device: Device, where: torch.device | str) -> Callable[[], None]:
    """The smallest launch of this kernel, built anew, on tensors of any content."""
    variant, p = catalog.find(wanted.name), wanted.kind

    def X(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=where)

    variant.fit(p, wanted.tile, device)
    launch = variant.build(p, wanted.tile, device)
    if variant.direction == "softmax":
        return lambda: launch(X(1, 1, dtype=p.torch_dtype), X(1, 1, dtype=p.torch_dtype))
    Q, K = X(p.B, p.N_q, p.H, p.d, dtype=p.torch_dtype), X(p.B, p.N_k, p.H_kv, p.d, dtype=p.torch_dtype)
    mask, LSE = X(p.B, p.H, p.N_q, p.N_k, dtype=torch.bool), X(p.B, p.H, p.N_q)
    rest = (Q, Q, K, K) if variant.direction == "bwd" else ()
    return lambda: launch(p, Q, K, K, mask, Q, LSE, *rest)


if __name__ == "__main__":
    main()
