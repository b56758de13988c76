"""compute-sanitizer over a few launches, and runs that must give the same bits.  [floor 3: GPU]

The sanitizer has to start the program that it watches, so this very module runs as its child.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .. import target
from ..problem import Problem
from ..variant import Device, Infeasible, Variant
from . import gate
from .cases import Case, format_problem, parse_problem, parse_tile
from .spread import spread

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # the child's exit code where the sanitizer found something
TIMEOUT_S = 540
ROOT = Path(__file__).parents[2]
MOST = 140  # queries or keys of a case: under a sanitizer everything is slow


def unavailable() -> str | None:
    """Why this machine cannot sanitize, in a line."""
    if target.KIND != "gpu":
        return "there is no GPU here; the simulator looks for races and for accesses out of bounds in every check"
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
    return None


def sanitize(variant: Variant, tool: str, device: Device) -> tuple[bool | None, str]:
    """(whether the tool found nothing, its report); None where it could not run."""
    cases = [case for case in spread(variant, device, quick=True) if _small(case)]
    told = [[format_problem(case.problem), str(case.tile or ""), case.input, case.layout, case.seed] for case in cases]
    command = [
        "compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND),
        sys.executable, "-m", __spec__.name, variant.name, json.dumps(told),
    ]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation each: its ends are watched
    try:
        child = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return None, f"{tool} ran past {TIMEOUT_S} s"
    output = child.stdout + child.stderr
    if child.returncode == 0:
        return True, f"{len(cases)} launches"
    return (False if child.returncode == FOUND else None), "\n".join(output.splitlines()[:40])


def _small(case: Case) -> bool:
    return not isinstance(case.problem, Problem) or max(case.problem.N_q, case.problem.N_k) <= MOST


def main(name: str, told: str) -> None:
    """The child: every case launched once, judged by the sanitizer alone."""
    from .. import catalog

    variant, device = catalog.find(name), target.device()
    softmax = variant.direction == "softmax"
    for problem, tile, *rest in json.loads(told):
        case = Case(parse_problem(problem, softmax), parse_tile(tile) if tile else None, *rest)
        try:
            if softmax:
                gate.check_softmax(variant, case.make(), device)
            else:
                gate.prepare(variant, case.problem, case.tile, case.make(), device)[0]()
        except Infeasible:
            continue
        torch.cuda.synchronize()


# ---- the same bits every time ---------------------------------------------------------------------------------------


def repeat(variant: Variant, device: Device, runs: int, progress: Callable[[int], None]) -> str | None:
    """What differs among that many runs of one problem, in a line; None where all bits are equal.

    Every second run on a GPU shares it with matrix products on another stream.  progress(run) is called after each.
    Raises ValueError for a variant that does not promise equal bits.
    """
    if not variant.deterministic:
        raise ValueError(f"{variant.name} declares deterministic=False: its runs may differ in their last bits")
    case = spread(variant, device, quick=True)[0]
    if device.simulated and isinstance(case.problem, Problem):
        case = replace(case, problem=replace(case.problem, N_q=9, N_k=9))
    if case.softmax:
        X = case.make()
        outputs = {"Y": gate.poisoned(X)}
        launcher = variant.launcher(case.problem.kind, None, device)

        def launch():
            launcher(X, outputs["Y"])
    else:
        launch, outputs = gate.prepare(variant, case.problem, case.tile, case.make(), device)
    other = None if device.simulated else torch.cuda.Stream()
    busy = None if device.simulated else torch.randn(2048, 2048, device="cuda")
    first = None
    for run in range(runs):
        for x in outputs.values():
            x.fill_(torch.nan)
        if other and run % 2:
            with torch.cuda.stream(other):
                busy @ busy
        launch()
        if first is None:
            first = {name: x.clone() for name, x in outputs.items()}
        for name, x in outputs.items():
            if not gate.same_bits(x, first[name]):
                elements = int((x != first[name]).sum())
                return f"{name} of run {run + 1} differs from the first in {elements} elements, on {case}"
        progress(run + 1)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
