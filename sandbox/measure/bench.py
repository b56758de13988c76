"""bench: kernels and their rivals on the same problems in one run, gated, with a cold L2.  [floor 3]

A row is what definitions call a benchmark row.  Nothing is timed that has not passed the gate on that very problem in
this run; rivals pass no gate, but their error against the same oracle stands beside ours.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import catalog, cubin, reference, target
from ..choose import choose_tile
from ..mask import Mask
from ..problem import DTYPES, Problem
from ..variant import Device, Infeasible, Tile
from . import ahead, gate, locate, rivals, timing

OURS = "sandbox:"
PAPER_TOKENS, PAPER_WIDTH = 16384, 2048  # B·N, H·d of every point
KEY = ("provider", "direction", "dtype", "B", "H", "H_kv", "N_q", "N_k", "d", "causal", "seed", "tile")
SAME = 0.02  # two medians of one kernel may differ by this much


@dataclass(frozen=True)
class Point:
    """One problem, and who computes it: `sandbox:NAME` or a rival's name."""

    problem: Problem
    direction: str
    providers: tuple[str, ...]
    seed: int = 0
    tile: Tile | None = None  # of our kernels; chosen where None
    quantized: bool = False  # kernels whose products take e4m3 get it ready made

    def fields(self, provider: str) -> dict:
        p, ours = self.problem, provider.startswith(OURS)
        scales = catalog.find(provider.removeprefix(OURS)).scales if ours else None
        dtype = "e4m3" if scales and self.quantized else p.dtype
        return {
            "provider": provider, "direction": self.direction, "dtype": dtype, "B": p.B, "H": p.H, "H_kv": p.H_kv,
            "N_q": p.N_q, "N_k": p.N_k, "d": p.d, "causal": p.mask.causal, "scales": scales, "input": "N(0,1)",
            "seed": self.seed, "tile": str(self.tile) if self.tile and ours else None,
            "kernel_hash": kernel_hash(provider.removeprefix(OURS)) if ours else None,
        }  # fmt: skip


def grid(
    dtype: str, direction: str, providers: tuple[str, ...], seed: int = 0, tile: Tile | None = None,
    quantized: bool = False,
) -> list[Point]:  # fmt: skip
    """The 18 shapes that attention papers compare: d 64, 128, 256; N 1k, 4k, 16k; full and causal."""
    points = []
    for d in (64, 128, 256):
        for causal in (False, True):
            for N in (1024, 4096, 16384):
                H = PAPER_WIDTH // d
                problem = Problem(PAPER_TOKENS // N, H, H, N, N, d, dtype, mask=Mask(causal))
                points.append(Point(problem, direction, providers, seed, tile, quantized))
    return points


MEASURED = (
    "ms", "ms_p20", "ms_p80", "tflops", "of_ceiling", "again", "gate", "max_error", "error_ratio", "Br", "Bc",
    "compile_s", "cached_compile_s", "registers", "spills", "shared_bytes", "threads", "blocks_per_sm", "warps_per_sm",
    "why",
)  # fmt: skip


def measure(point: Point, device: Device) -> list[dict]:
    """The measured fields of each provider of a point, in order.

    A kernel that fails its gate has no time, and `gate` says why; what cannot run at all says so in `why`.  The others
    are timed together, in turns; `again` is by how much the second half of the samples differs from the first.
    Raises ValueError where a kernel takes the GPU down.
    """
    inputs = gate.gaussian(point.problem, point.seed, target.torch_device())
    oracle = functools.cache(lambda: stars(point, inputs))
    rows, launches = [], []
    for provider in point.providers:
        row, launch = dict.fromkeys(MEASURED), None
        try:
            if provider.startswith(OURS):
                launch, found = ours(provider, point, inputs, device)
            else:
                launch, found = rival(provider, point, inputs, oracle)
            row |= found
        except (Infeasible, rivals.Unavailable) as reason:
            row["why"] = str(reason)
        except torch.OutOfMemoryError:
            row["why"] = "does not fit in the GPU's memory"
        if target.KIND == "gpu":
            torch.cuda.empty_cache()
        rows.append(row)
        launches += [(row, launch, point.fields(provider)["dtype"])] if launch else []
    times = timing.time_together([launch for _, launch, _ in launches])
    for (row, _, dtype), t in zip(launches, times, strict=True):
        row |= {"ms": t.ms, "ms_p20": t.ms_p20, "ms_p80": t.ms_p80, "again": t.again}
        row["tflops"] = point.problem.flops(point.direction) / t.ms * 1e-9
        row["of_ceiling"] = row["tflops"] / ceiling(dtype)
    for row, provider in zip(rows, point.providers, strict=True):
        if row["ms"] and provider.startswith(OURS):
            row |= compile_seconds(provider.removeprefix(OURS), point.problem.kind, Tile(row["Br"], row["Bc"]), device)
    return rows


def compare(rows: list[dict]) -> None:
    """Of the rows of a point: `ratio` is a provider's speed over that of `over`, the first one, in the same run."""
    first = rows[0]
    for row in rows:
        row["over"] = first["provider"]
        row["ratio"] = first["ms"] / row["ms"] if first["ms"] and row["ms"] else None


def ours(provider: str, point: Point, inputs, device: Device) -> tuple[Callable | None, dict]:
    """A gated launch to be timed, None where the gate failed; and what the gate and the compiler found.

    max_error is the largest of all outputs, LSE too.
    """
    variant, p = catalog.find(provider.removeprefix(OURS)), point.problem
    if p.dtype not in variant.dtypes:
        raise rivals.Unavailable(f"{variant.name} has {', '.join(variant.dtypes)}, not {p.dtype}")
    tile = point.tile or choose_tile(p, device, variant)
    row = {"Br": tile.Br, "Bc": tile.Bc}
    try:
        verdict = gate.check(variant, p, tile, inputs, device, quantized=bool(variant.scales) and point.quantized)
    except (Infeasible, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a kernel file may do
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        if not device.simulated and locate.context_is_lost(error):
            raise ValueError(f"{variant.name} on {p}: {why}; the GPU runs nothing more in this process") from None
        return None, row | {"gate": f"failed: {why}"}
    row |= {"max_error": _finite(verdict.max_error), "error_ratio": _finite(verdict.ratio)}
    if not verdict.passed:
        return None, row | {"gate": f"failed: {verdict.why}"}
    return timing.gated(verdict), row | {"gate": "passed"} | made(verdict.launch, device)


def rival(provider: str, point: Point, inputs, oracle) -> tuple[Callable, dict]:
    """A launch to be timed, and its error in O or in the gradients."""
    launch, outputs = rivals.launcher(provider, point.problem, inputs, point.direction)
    errors = [float((x.double() - star).abs().max()) for x, star in zip(outputs().values(), oracle())]
    return launch, {"max_error": _finite(max(errors))}


def stars(point: Point, inputs) -> tuple:
    """The oracle's O, or its dQ, dK, dV."""
    x = inputs
    if point.direction == "fwd":
        return reference.forward(point.problem, x.q, x.k, x.v)[:1]
    return reference.backward(point.problem, x.q, x.k, x.v, x.dO)


def _finite(x: float) -> float | None:
    return x if x == x and abs(x) != float("inf") else None


# ---- what the compiler made -----------------------------------------------------------------------------------------


def made(run, device: Device) -> dict:
    """Registers, shared memory and occupancy of the largest kernel that run() launches, spills of all; only compiles.

    Occupancy is None on a GPU that is no Hopper.
    """
    from ..device.launch import compiling

    with compiling() as done:
        run()
    launch, report = max(done, key=lambda one: one[0].shared)
    blocks = None
    if device.capability[0] == 9:
        blocks = blocks_per_sm(report.registers, launch.threads, launch.shared)
    return {
        "registers": report.registers, "spills": sum(report.spills for _, report in done),
        "shared_bytes": launch.shared, "threads": launch.threads, "blocks_per_sm": blocks,
        "warps_per_sm": blocks and blocks * -(-launch.threads // 32),
    }  # fmt: skip


def blocks_per_sm(registers: int, threads: int, shared: int) -> int:
    """Blocks of a Hopper multiprocessor at once.  [CUDA programming guide, compute capability 9.0]

    Each of its four parts has 16k registers, given to a warp 256 at a time; 227 KiB of shared memory, of which a block
    takes 1 KiB more than it asks for; 64 warps; 32 blocks.
    """
    warps = -(-threads // 32)
    by_registers = 4 * (16_384 // (-(-registers * 32 // 256) * 256)) // warps
    return min(by_registers, 233_472 // (shared + 1024), 64 // warps, 32)


@functools.cache
def compile_seconds(name: str, kind: Problem, tile: Tile, device: Device) -> dict:
    """Seconds to compile a kernel with an empty cache, and then to read it from there, in a process of its own.

    The process has compiled something small before.  kind is Problem.kind, all that a kernel is compiled for.  From
    then on the kernel is in the cache.
    """
    with TemporaryDirectory() as folder, ahead.Process(folder) as process:
        first, cached = process.compile(ahead.Wanted(name, kind, tile), device)
        cubin.adopt(folder)
    return {"compile_s": first, "cached_compile_s": cached}


def compile_all(points: Iterable[Point], device: Device) -> None:
    """compile_seconds of all that these points take, some at a time, before anything is timed."""
    wanted = []
    for point in points:
        for name in (one.removeprefix(OURS) for one in point.providers if one.startswith(OURS)):
            try:
                tile = point.tile or choose_tile(point.problem, device, catalog.find(name))
            except Infeasible:
                continue
            wanted.append((name, point.problem.kind, tile, device))
    ahead.at_once(lambda one: compile_seconds(*one), wanted)  # what does not compile is told where its gate is


@functools.cache
def kernel_hash(name: str) -> str:
    """Of the kernel's own file, of the CUDA C++ beside it, and of the tools that kernels are made with."""
    package, file = Path(__file__).parents[1], catalog.file_of(name)
    files = {file, *file.parent.rglob("*.cu*"), *(package / "kernels").rglob("*.cu*")}
    for folder in ("device", "nvrtc"):
        files |= set((package / folder).glob("*.py"))
    digest = hashlib.sha256()
    for one in sorted(files):
        digest.update(one.read_bytes())
    return digest.hexdigest()[:12]


# ---- the ceiling ----------------------------------------------------------------------------------------------------


@functools.cache
def ceiling(dtype: str) -> float:
    """TFLOP/s of torch's 8192³ matrix product of this dtype, measured once in this run; fp32 without TF32."""
    N = 8192
    if dtype == "e4m3":
        a, one = torch.randn(N, N, device="cuda").to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        product = functools.partial(torch._scaled_mm, a, a.t(), one, one, out_dtype=torch.bfloat16)
        return 2 * N**3 / timing.time_launch(product).ms * 1e-9
    a, b = (torch.randn(N, N, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * N**3 / timing.time_launch(lambda: a @ b).ms * 1e-9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def run_id() -> str:
    """Names one process: rows of the same run were measured beside each other."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
