"""bench: kernels and their rivals on the same problems in one run, gated, with a cold L2.  [floor 3]

A row is what definitions call a benchmark row.  Nothing is timed that has not passed the gate on that very problem in
this run; rivals pass no gate, but their error against the same oracle stands beside ours.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import catalog, reference, target
from ..choose import choose_tile
from ..mask import Mask
from ..problem import Problem
from ..variant import Device, Infeasible, Tile
from . import gate, rivals, timing

OURS = "sandbox:"
PAPER_TOKENS, PAPER_WIDTH = 16384, 2048  # B·N, H·d of every point
KEY = ("provider", "direction", "dtype", "B", "H", "H_kv", "N_q", "N_k", "d", "causal", "seed", "tile")
SAME = 0.02  # two medians of one kernel in one run may differ by this much


@dataclass(frozen=True)
class Point:
    """One problem, and who computes it: `sandbox:NAME` or a rival's name."""

    problem: Problem
    direction: str
    providers: tuple[str, ...]
    seed: int = 0
    tile: Tile | None = None  # of our kernels; chosen where None

    def fields(self, provider: str) -> dict:
        p = self.problem
        return {
            "provider": provider, "direction": self.direction, "dtype": p.dtype, "B": p.B, "H": p.H, "H_kv": p.H_kv,
            "N_q": p.N_q, "N_k": p.N_k, "d": p.d, "causal": p.mask.causal, "scales": None, "input": "N(0,1)",
            "seed": self.seed, "tile": str(self.tile) if self.tile and provider.startswith(OURS) else None,
        }  # fmt: skip


def grid(dtype: str, direction: str, providers: tuple[str, ...], seed: int = 0) -> list[Point]:
    """The 18 shapes that attention papers compare: d 64, 128, 256; N 1k, 4k, 16k; full and causal."""
    points = []
    for d in (64, 128, 256):
        for causal in (False, True):
            for N in (1024, 4096, 16384):
                H = PAPER_WIDTH // d
                problem = Problem(PAPER_TOKENS // N, H, H, N, N, d, dtype, mask=Mask(causal))
                points.append(Point(problem, direction, providers, seed))
    return points


MEASURED = (
    "ms", "ms_p20", "ms_p80", "tflops", "of_ceiling", "ratio", "again", "gate", "max_error", "error_ratio", "Br", "Bc",
    "compile_s", "cached_compile_s", "registers", "spills", "shared_bytes", "threads", "blocks_per_sm", "warps_per_sm",
    "kernel_hash", "why",
)  # fmt: skip


def measure(point: Point, device: Device) -> Iterator[dict]:
    """The measured fields of each provider of a point, in order.  `ratio` is its speed over the first provider's.

    A kernel that fails its gate has no time, and `gate` says why; what cannot run at all says so in `why`.
    """
    inputs = gate.gaussian(point.problem, point.seed, target.torch_device())
    first = None
    for provider in point.providers:
        row = dict.fromkeys(MEASURED)
        try:
            measured = ours if provider.startswith(OURS) else rival
            row |= measured(provider, point, inputs, device)
        except (Infeasible, rivals.Unavailable) as reason:
            row["why"] = str(reason)
        except torch.OutOfMemoryError:
            row["why"] = "does not fit in the GPU's memory"
        if row["ms"]:
            row["tflops"] = point.problem.flops(point.direction) / row["ms"] * 1e-9
            row["of_ceiling"] = row["tflops"] / ceiling(point.problem.dtype)
            first = first or row["ms"]
            row["ratio"] = first / row["ms"]
        if target.KIND == "gpu":
            torch.cuda.empty_cache()
        yield row


def ours(provider: str, point: Point, inputs, device: Device) -> dict:
    """Gate, time, time again, and what the compiler made."""
    variant, p = catalog.find(provider.removeprefix(OURS)), point.problem
    tile = point.tile or choose_tile(p, device, variant)
    verdict = gate.check(variant, p, tile, inputs, device)
    row = {
        "gate": "passed" if verdict.passed else f"failed: {verdict.why}", "max_error": _finite(verdict.max_error),
        "error_ratio": _finite(verdict.ratio), "Br": tile.Br, "Bc": tile.Bc, "kernel_hash": kernel_hash(variant.name),
    }  # fmt: skip
    if not verdict.passed:
        return row
    t, again = timing.time(verdict), timing.time(verdict)
    row |= {"ms": t.ms, "ms_p20": t.ms_p20, "ms_p80": t.ms_p80, "again": again.ms / t.ms - 1}
    return row | made(variant, p, tile, inputs, device) | compile_seconds(variant.name, p, tile)


def rival(provider: str, point: Point, inputs, device: Device) -> dict:
    """Time, and its error in O or in the gradients."""
    launch, outputs = rivals.launcher(provider, point.problem, inputs, point.direction)
    launch()
    errors = [float((x.double() - star).abs().max()) for x, star in zip(outputs().values(), stars(point, inputs))]
    t = timing.time_launch(launch)
    return {"ms": t.ms, "ms_p20": t.ms_p20, "ms_p80": t.ms_p80, "max_error": _finite(max(errors))}


def stars(point: Point, inputs) -> tuple:
    """The oracle's O, or its dQ, dK, dV."""
    x = inputs
    if point.direction == "fwd":
        return reference.forward(point.problem, x.q, x.k, x.v)[:1]
    return reference.backward(point.problem, x.q, x.k, x.v, x.dO)


def _finite(x: float) -> float | None:
    return x if x == x and abs(x) != float("inf") else None


# ---- what the compiler made -----------------------------------------------------------------------------------------


def made(variant, p: Problem, tile: Tile, inputs, device: Device) -> dict:
    """Registers, spills, shared memory and occupancy of the launch's largest kernel."""
    from ..device.launch import compiling

    with compiling() as done:
        gate.prepare(variant, p, tile, inputs, device)[0]()
    launch, report = max(done, key=lambda one: one[0].shared)
    blocks = blocks_per_sm(report.registers, launch.threads, launch.shared)
    return {
        "registers": report.registers, "spills": report.spills, "shared_bytes": launch.shared,
        "threads": launch.threads, "blocks_per_sm": blocks, "warps_per_sm": blocks * -(-launch.threads // 32),
    }  # fmt: skip


def blocks_per_sm(registers: int, threads: int, shared: int) -> int:
    """Blocks of a Hopper multiprocessor at once.  [CUDA programming guide, compute capability 9.0]

    Each of its four parts has 16k registers, given to a warp 256 at a time; 227 KiB of shared memory, of which a block
    takes 1 KiB more than it asks for; 64 warps; 32 blocks.
    """
    warps = -(-threads // 32)
    by_registers = 4 * (16_384 // (-(-registers * 32 // 256) * 256)) // warps
    return min(by_registers, 233_472 // (shared + 1024), 64 // warps, 32)


COMPILE = """
import sys, time
import torch
from sandbox import catalog
from sandbox.device.launch import compiling
from sandbox.measure import gate
from sandbox.measure.cases import parse_problem, parse_tile
from sandbox.variant import HOPPER
name, problem, tile = sys.argv[1], parse_problem(sys.argv[2]), parse_tile(sys.argv[3])
variant = catalog.find(name)
launch = variant.launcher(problem, tile, HOPPER)
p, dtype = problem, problem.torch_dtype
def X(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")
Q, K = X(p.B, p.N_q, p.H, p.d, dtype=dtype), X(p.B, p.N_k, p.H_kv, p.d, dtype=dtype)
mask = X(1, 1, 1, 1, dtype=torch.bool).expand(p.B, p.H, p.N_q, p.N_k)
rest = (Q, Q, K, K) if variant.direction == "bwd" else ()
begin = time.perf_counter()
with compiling():
    launch(p, Q, K, K, mask, Q, X(p.B, p.H, p.N_q), *rest)
print(time.perf_counter() - begin)
"""


@functools.cache
def compile_seconds(name: str, p: Problem, tile: Tile) -> dict:
    """Seconds to compile a kernel with an empty cache, and to read it from a full one, each in a fresh process."""
    from .cases import format_problem

    root = str(Path(__file__).parents[2])
    with TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
        path = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {"SANDBOX_CACHE": cache, "SANDBOX_TARGET": "compile", "PYTHONPATH": path}
        seconds = []
        for _ in range(2):
            words = [sys.executable, "-c", COMPILE, name, format_problem(p), str(tile)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} does not compile on its own: {done.stderr.strip().splitlines()[-1:]}")
            seconds.append(float(done.stdout.split()[-1]))
    return {"compile_s": seconds[0], "cached_compile_s": seconds[1]}


@functools.cache
def kernel_hash(name: str) -> str:
    """Of the kernel's own file and of the device tools that it is made with."""
    digest = hashlib.sha256(catalog.file_of(name).read_bytes())
    for file in sorted((Path(__file__).parents[1] / "device").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# ---- the ceiling ----------------------------------------------------------------------------------------------------


@functools.cache
def ceiling(dtype: str) -> float:
    """TFLOP/s of torch's 8192³ matrix product of this dtype, in this run; fp32 without TF32."""
    N = 8192
    a, b = (torch.randn(N, N, device="cuda").to(getattr(torch, gate_dtype(dtype))) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * N**3 / timing.time_launch(lambda: a @ b).ms * 1e-9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def gate_dtype(dtype: str) -> str:
    return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]


def run_id() -> str:
    """Names one process: rows of the same run were measured beside each other."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
