"""How long the first call of attention() in a process takes: with no compiled kernel on disk, and with them there.
[floor 3]

``python -m sandbox.measure.first PROBLEM`` is such a process.  Its clock starts where torch and sandbox are
imported, the inputs are on the device and nothing is under way, and stops when the result is there: it counts the
imports of the kernel, the compilation or its cubin's way from the disk, and the launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from time import perf_counter

import torch

from .. import target
from ..autograd import attention
from ..problem import DTYPES, Problem
from ..variant import Variant
from .overhead import Cost, row_of

PROCESSES = 3  # of each kind
SIZES = ("B", "H", "H_kv", "N_q", "N_k", "d")


def measure(variant: Variant, problem: Problem) -> list[dict]:
    """Two rows, in microseconds as overhead's.  The kernel is to be exact: ``overhead.measure`` says so."""
    asked = {"variant": variant.name, "dtype": problem.dtype, "causal": problem.mask.causal}
    asked |= {name: getattr(problem, name) for name in SIZES}
    compiled, kept = [], []
    for _ in range(PROCESSES):
        with tempfile.TemporaryDirectory() as cache:
            compiled.append(_first(asked, cache))
            kept.append(_first(asked, cache))
    return [
        row_of(f"first attention {variant.name}, {how}", problem, Cost.median([1e6 * s for s in found]))
        for how, found in (("compiled", compiled), ("kept", kept))
    ]


def _first(asked: dict, cache: str) -> float:
    """Seconds, in a process of its own.  Raises RuntimeError with what it said where it fails."""
    environment = os.environ | {"SANDBOX_CACHE": cache}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the first call in a process fails: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def _here(asked: dict) -> float:
    device = target.torch_device()
    (B, H, H_kv, N_q, N_k, d), dtype = (asked[name] for name in SIZES), DTYPES[asked["dtype"]]
    q, k, v = (torch.randn(B, N, h, d, device=device).to(dtype) for N, h in ((N_q, H), (N_k, H_kv), (N_k, H_kv)))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = perf_counter()
    attention(q, k, v, variant=asked["variant"], causal=asked["causal"])
    wait()
    return perf_counter() - begin


if __name__ == "__main__":
    print(_here(json.loads(sys.argv[1])))
