"""Bytes that launches moved through DRAM and L2, from the GPU's own counters.  [floor 3]

Nsight Compute (`ncu`) reads them, and it has to start the program that it watches.  So `count` runs this very module as
a child under ncu.  The child makes every launch once unwatched, which compiles it, and once with the profiler open:

    marker | kernels of the first launch | marker | kernels of the second | ...

The marker is a kernel that nobody else launches, by which the launches are told apart in ncu's output.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..mask import Mask
from ..problem import Problem
from ..variant import Infeasible, Tile

METRICS = {
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
}
MARKER = "spin_kernel"  # what torch.cuda._sleep launches
TIMEOUT_S = 540
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Wanted:
    """A launch to be counted, on Gaussian input.  `variant` is a kernel's name, or standard.NAME."""

    variant: str
    direction: str
    problem: Problem
    tile: Tile
    seed: int = 0

    @classmethod
    def of(cls, d: dict) -> Wanted:
        problem = Problem(**d["problem"] | {"mask": Mask(**d["problem"]["mask"])})
        return cls(**d | {"problem": problem, "tile": Tile(**d["tile"])})


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


def count(launches: list[Wanted]) -> tuple[list[Counters | None], str]:
    """The counters of each launch, None where there are none, and then the reason in one line.

    It counts, and judges nothing: what the gate refused has no place here.
    """
    nothing = [None] * len(launches)
    ncu = shutil.which("ncu")
    if ncu is None:
        return nothing, "no hardware counters: ncu (Nsight Compute) is not on the PATH"
    command = [
        ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
        "--target-processes", "all", "--metrics", ",".join(METRICS.values()),
        sys.executable, "-m", __spec__.name, json.dumps([asdict(wanted) for wanted in launches]),
    ]  # fmt: skip
    try:
        child = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return nothing, f"no hardware counters: ncu ran past {TIMEOUT_S} s"
    found = parse(child.stdout, len(launches))
    if all(found):
        return found, ""
    return found, f"no hardware counters: {_complaint(child.stdout + child.stderr)}"


def parse(text: str, launches: int) -> list[Counters | None]:
    """ncu's CSV (a row per kernel and metric, in base units), summed over the kernels behind each marker."""
    lines = text.splitlines()
    header = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    behind: list[dict] = []  # one dictionary a marker: (kernel's ID, metric) -> value
    markers = set()
    for row in csv.DictReader(lines[header:]):
        if row["Metric Value"] is None:  # not a row: ncu's farewell
            continue
        if MARKER in row["Kernel Name"]:
            if row["ID"] not in markers:
                markers.add(row["ID"])
                behind.append({})
        elif behind:
            behind[-1][row["ID"], row["Metric Name"]] = row["Metric Value"]
    found = [_sum(values) for values in behind]
    return found if len(found) == launches else [None] * launches


def _sum(values: dict) -> Counters | None:
    try:
        sums = {
            field: round(sum(float(x.replace(",", "")) for (_, name), x in values.items() if name == metric))
            for field, metric in METRICS.items()
        }
    except ValueError:  # "n/a": this counter cannot be read here
        return None
    kernels = len({kernel for kernel, _ in values})
    return Counters(**sums, kernels=kernels) if kernels else None


def _complaint(output: str) -> str:
    """The line of ncu's or the child's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["ncu said nothing"])[-1][:300]


# ---- the child ------------------------------------------------------------------------------------------------------


def main(launches: str):
    import torch

    for wanted in map(Wanted.of, json.loads(launches)):
        launch = None
        try:
            launch = _launch(wanted)
            launch()
        except (Infeasible, torch.OutOfMemoryError) as error:
            launch = None
            print(f"error: {wanted.variant} {wanted.problem}: {error}".splitlines()[0], file=sys.stderr)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            torch.cuda._sleep(1)
            if launch is not None:
                launch()
            torch.cuda.synchronize()


def _launch(wanted: Wanted) -> Callable[[], object]:
    """The launch on tensors of its own.  What they hold does not change what is moved, so O and LSE are just zeros."""
    import torch

    from .. import catalog, target
    from . import gate, standard

    p, device = wanted.problem, target.torch_device()
    inputs = gate.gaussian(p, wanted.seed, device)
    if wanted.variant == standard.NAME:
        return standard.launcher(p, inputs, wanted.direction)
    launcher = catalog.find(wanted.variant).launcher(p, wanted.tile, target.device())
    q, k, v, dO = inputs.q, inputs.k, inputs.v, inputs.dO
    seen = torch.ones((), dtype=torch.bool, device=device) if inputs.mask is None else inputs.mask
    tensors = [q, k, v, seen.expand(p.B, p.H, *seen.shape[-2:] or (1, 1)), torch.zeros_like(q)]
    tensors.append(torch.zeros(p.B, p.H, p.N_q, device=device))
    if wanted.direction == "bwd":
        tensors += [dO, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
    return lambda: launcher(p, *tensors)


if __name__ == "__main__":
    main(sys.argv[1])
