"""Bytes that one launch moved through DRAM and L2, from the GPU's own counters.  [floor 3]

Nsight Compute (`ncu`) reads them, and it has to start the program that it watches.  So `count` runs this very module as
a child under ncu; the child builds the launch, puts it through the gate unwatched, and opens the profiler only around
one more launch of it.

    python -m sandbox.measure.counters '{"variant": "fwd_v2", "direction": "fwd", "problem": {"B": 1, ...}, ...}'
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..mask import Mask
from ..problem import Problem
from ..variant import Tile

METRICS = {
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
}
TIMEOUT_S = 300
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Counters:
    """Summed over every kernel of one launch, each started on a cold cache, as ncu does."""

    dram_read_bytes: int
    dram_write_bytes: int
    l2_bytes: int
    kernels: int

    @property
    def dram_bytes(self) -> int:
        return self.dram_read_bytes + self.dram_write_bytes


def count(variant: str, direction: str, problem: Problem, tile: Tile, seed: int = 0) -> tuple[Counters | None, str]:
    """(counters, "") of one launch on Gaussian input, or (None, the reason in one line)."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return None, "no hardware counters: ncu (Nsight Compute) is not on the PATH"
    spec = {
        "variant": variant,
        "direction": direction,
        "problem": asdict(problem),
        "tile": [tile.Br, tile.Bc],
        "seed": seed,
    }
    command = [
        ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
        "--target-processes", "all", "--metrics", ",".join(METRICS.values()),
        sys.executable, "-m", __spec__.name, json.dumps(spec),
    ]  # fmt: skip
    try:
        child = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no hardware counters: ncu ran past {TIMEOUT_S} s"
    counters = parse(child.stdout)
    if child.returncode != 0 or counters is None:
        return None, f"no hardware counters: {_complaint(child.stdout + child.stderr)}"
    return counters, ""


def parse(text: str) -> Counters | None:
    """Sums ncu's CSV (one row per kernel and metric, in base units) over the kernels; None where there is no row."""
    lines = text.splitlines()
    header = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return None
    sums, kernels = dict.fromkeys(METRICS.values(), 0.0), set()
    for row in csv.DictReader(lines[header:]):
        if row.get("Metric Name") not in sums:
            continue
        try:
            sums[row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a": this counter cannot be read here
            return None
        kernels.add(row["ID"])
    if not kernels:
        return None
    return Counters(**{field: round(sums[metric]) for field, metric in METRICS.items()}, kernels=len(kernels))


def _complaint(output: str) -> str:
    """The line of ncu's or the child's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Error" in line]
    return (errors or lines or ["ncu said nothing"])[-1]


def main(spec: str):
    """The child: one gated launch between cudaProfilerStart and cudaProfilerStop."""
    import torch

    spec = json.loads(spec)
    problem = Problem(**{**spec["problem"], "mask": Mask(**spec["problem"]["mask"])})
    launch = _launch(spec["variant"], spec["direction"], problem, Tile(*spec["tile"]), spec["seed"])
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        launch()
        torch.cuda.synchronize()


def _launch(name: str, direction: str, problem: Problem, tile: Tile, seed: int):
    from .. import catalog, target
    from . import gate, standard

    device = target.device()
    inputs = gate.gaussian(problem, seed, target.torch_device())
    if name == standard.NAME:
        return standard.launcher(problem, inputs, direction)
    verdict = gate.check(catalog.find(name), problem, tile, inputs, device)
    if not verdict.passed:
        sys.exit(f"Error: {name} does not pass the gate on {problem}")
    return verdict.launch


if __name__ == "__main__":
    main(sys.argv[1])
