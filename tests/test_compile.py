"""Every kernel compiles for sm_90a, with no GPU, and keeps its registers; its binary is kept on disk, and found again.

The tests run on the simulator or on a GPU; what is compiled here is compiled in child processes, for sm_90a.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from child import child
from hypothesis import settings

from sandbox import catalog
from sandbox.choose import choose_tile
from sandbox.cubin import Report
from sandbox.mask import Mask
from sandbox.problem import DTYPES, Problem
from sandbox.variant import HOPPER, Tile

KERNELS = [name for name, v in catalog.variants().items() if v.direction != "softmax" and not v.tiles]  # test_hopper.py
LONG = settings.default.max_examples >= 300  # the ci profile
FULL, BAND, BOOLEAN, BOTH = Mask(), Mask(causal=True), Mask(boolean=True), Mask(causal=True, boolean=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# ---- every kernel keeps its registers -------------------------------------------------------------------------------


def compile_attention(name: str, problem: Problem, folder: Path) -> tuple[Tile, dict]:
    """The tile that is chosen, and kernel -> what ptxas says of it."""
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    variant, tile = catalog.find(name), choose_tile(problem, HOPPER, catalog.find(name))
    q = torch.empty(problem.B, problem.N_q, problem.H, problem.d, dtype=problem.torch_dtype, device="meta")
    k = torch.empty(problem.B, problem.N_k, problem.H_kv, problem.d, dtype=problem.torch_dtype, device="meta")
    seen = torch.empty(problem.B, problem.H, problem.N_q, problem.N_k, dtype=torch.bool, device="meta")
    O, LSE = torch.empty_like(q), torch.empty(problem.B, problem.H, problem.N_q, device="meta")
    gradients = (q, q, k, k) if variant.direction == "bwd" else ()
    with compiling() as done:
        variant.launcher(problem, tile, HOPPER)(problem, q, k, k, seen, O, LSE, *gradients)
    return tile, {launch.name: report for launch, report in done}


def compile_softmax(name: str, dtype: str, folder: Path) -> dict:
    from sandbox.device.launch import compiling

    os.environ["SANDBOX_CACHE"] = str(folder)
    X = torch.empty(64, 4096, dtype=DTYPES[dtype], device="meta")
    with compiling() as done:
        catalog.find(name).launcher(Problem(1, 1, 1, 1, 1, 1, dtype), None, HOPPER)(X, torch.empty_like(X))
    return {launch.name: report for launch, report in done}


def check(reports: dict, what: str):
    assert reports, f"{what}: nothing was launched"
    for kernel, report in reports.items():
        assert report.stack == 0, f"{kernel}, {what}: {report}"
        assert report.spills == 0, f"{kernel}, {what}: {report}"
        assert 0 < report.registers <= 255, f"{kernel}, {what}: {report}"


CASES = [  # d, H, dtype, mask, softcap; the last is the hungriest
    (64, 32, "fp32", FULL, 0.0),
    (128, 32, "fp16", BAND, 0.0),
    (40, 1, "fp32", BOOLEAN, 0.0),
    (256, 32, "bf16", BOTH, 5.0),
]
CASES = [(name, *case) for name in KERNELS for case in CASES]
if LONG:  # each kernel at each d; kinds, dtypes and heads take turns
    kinds = itertools.cycle([(FULL, 0.0), (BAND, 5.0), (BOOLEAN, 0.0), (BOTH, 5.0), (BAND, 0.0)])
    dtypes, heads = itertools.cycle(DTYPES), itertools.cycle((32, 1, 32, 32, 1, 32, 1))
    sizes = (1, 32, 40, 64, 96, 128, 160, 256)
    CASES += [(name, d, next(heads), next(dtypes), *next(kinds)) for name in KERNELS for d in sizes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{}-d{}-H{}-{}-{}-softcap{:g}".format(*case))
def test_attention_spills_nothing(case, compiler, folder):
    name, d, H, dtype, mask, softcap = case
    problem = Problem(1, H, H, 4096, 4096, d, dtype, mask=mask, softcap=softcap)
    tile, reports = compiler.submit(compile_attention, name, problem, folder).result()
    check(reports, f"{problem}, tile {tile}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", catalog.variants("softmax"))
def test_softmax_spills_nothing(name, dtype, compiler, folder):
    check(compiler.submit(compile_softmax, name, dtype, folder).result(), f"{name}, {dtype}")


# ---- binaries on disk -----------------------------------------------------------------------------------------------


def scale_by(c: float, extra: int = 0):
    """A kernel X *= c, with a constant in its closure."""
    from numba import cuda

    @cuda.jit
    def scale(X, n):
        i = cuda.grid(1)
        if i < n + extra:
            X[i] = c * X[i]

    return scale


def compile_scale(folder: Path, *constants, threads: int = 32) -> tuple[int, bytes]:
    """(how many binaries were made, not found; the last one)."""
    from numba.cuda import types

    from sandbox.device import compile

    os.environ["SANDBOX_CACHE"] = str(folder)
    X = types.Array(types.float32, 1, "A")
    with mock.patch.object(compile, "_compile", wraps=compile._compile) as made:
        binary = compile.kernel(scale_by(*constants or (2.0,)).py_func, (X, types.int32), threads)
    return made.call_count, binary.cubin


def test_another_process_finds_it(compiler, tmp_path):
    made, cubin = compiler.submit(compile_scale, tmp_path).result()
    (file,) = tmp_path.iterdir()
    assert made == 1
    written = file.stat().st_mtime_ns
    with child() as other:
        assert other.submit(compile_scale, tmp_path).result() == (0, cubin)
    assert [f.stat().st_mtime_ns for f in tmp_path.iterdir()] == [written]


def test_two_processes_at_once(compiler, tmp_path):
    with child() as other:
        jobs = [pool.submit(compile_scale, tmp_path) for pool in (compiler, other)]
        cubins = [job.result()[1] for job in jobs]
    assert [file.suffix for file in tmp_path.iterdir()] == [".cubin"]
    made, cubin = compiler.submit(compile_scale, tmp_path).result()
    assert made == 0 and cubin in cubins


@pytest.mark.parametrize("broken", ["empty", "cut short", "another byte", "no header"])
def test_a_broken_file_is_made_again(broken, compiler, tmp_path):
    compiler.submit(compile_scale, tmp_path).result()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut short": whole[:-10],
            "another byte": whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:],
            "no header": whole.partition(b"\n")[2],
        }[broken]
    )
    made, cubin = compiler.submit(compile_scale, tmp_path).result()
    assert made == 1
    assert compiler.submit(compile_scale, tmp_path).result() == (0, cubin)


def test_a_folder_that_cannot_be_written(compiler, tmp_path):
    (tmp_path / "file").touch()
    made, cubin = compiler.submit(compile_scale, tmp_path / "file" / "cache").result()
    assert made == 1 and cubin


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(compiler, tmp_path):
    _, cubin = compiler.submit(compile_scale, tmp_path).result()
    tmp_path.chmod(0o555)
    assert compiler.submit(compile_scale, tmp_path).result() == (0, cubin)
    assert compiler.submit(compile_scale, tmp_path, 3.0).result()[0] == 1
    tmp_path.chmod(0o755)


def test_an_edited_kernel_is_another(compiler, tmp_path):
    for other in ((2.0,), (3.0,), (2.0, 1), (True,)):
        assert compiler.submit(compile_scale, tmp_path, *other).result()[0] == 1, other
        assert compiler.submit(compile_scale, tmp_path, *other).result()[0] == 0, other
    assert compiler.submit(compile_scale, tmp_path, threads=64).result()[0] == 1
    assert compiler.submit(compile_edited, tmp_path).result() == [1, 1, 1, 0]


def compile_edited(folder: Path) -> list[int]:
    """Binaries made for a kernel that calls a function with a global; then with that global, that function edited;
    then for the first again."""
    from numba import cuda
    from numba.cuda import types

    from sandbox.device import compile

    os.environ["SANDBOX_CACHE"] = str(folder)

    def made(c, operator):
        names = {"cuda": cuda, "C": c}
        exec(f"def inner(x):\n    return x {operator} C", names)
        names["inner"] = cuda.jit(device=True)(names["inner"])
        exec("def outer(X):\n    X[0] = inner(X[0])", names)
        with mock.patch.object(compile, "_compile", wraps=compile._compile) as count:
            compile.kernel(names["outer"], (types.Array(types.float32, 1, "A"),), 32)
        return count.call_count

    return [made(2, "+"), made(3, "+"), made(2, "*"), made(2, "+")]


def compile_from_threads(folder: Path) -> tuple[int, int]:
    """(binaries made, different ones returned) by four threads that need one for the first time, at once."""
    from sandbox.device import Launch, compile

    os.environ["SANDBOX_CACHE"] = str(folder)
    launch, X = Launch(scale_by(2.0), 32), torch.empty(8, device="meta")
    start = threading.Barrier(4)

    def get(_):
        start.wait()
        return launch.compiled(X, 8)

    with mock.patch.object(compile, "_compile", wraps=compile._compile) as made, ThreadPoolExecutor(4) as pool:
        cubins = {binary.cubin for binary in pool.map(get, range(4))}
    return made.call_count, len(cubins)


def test_first_compilation_from_threads(compiler, tmp_path):
    assert compiler.submit(compile_from_threads, tmp_path).result() == (1, 1)


def parameters(name: str, folder: Path) -> list[tuple[str, list, list]]:
    """(kernel, what its binary takes, what a launch packs) of each that this variant launches: (offset, bytes)."""
    from sandbox.device import launch
    from sandbox.nvrtc.arguments import Arguments

    found, compiled = [], launch.Launch.compiled

    def look(self, *args):
        binary, table = compiled(self, *args), {}
        for match in re.finditer(rb"\x04\x17\x0c\x00", binary.cubin):  # EIATTR_KPARAM_INFO
            _, number, offset, flags = struct.unpack_from("<IHHI", binary.cubin, match.end())
            table[number] = offset, flags >> 18
        arguments = Arguments([kind() for kind in launch._parameters(args)])
        arguments.fill(launch._packed(args)[1])
        found.append((self.name, [table[n] for n in sorted(table)], [*zip(arguments.offsets, arguments.sizes)]))
        return binary

    with mock.patch.object(launch.Launch, "compiled", look):
        compile_attention(name, Problem(1, 4, 2, 64, 64, 64, "bf16", mask=BOTH), folder)
    return found


@pytest.mark.parametrize("name", ["fwd_v2", "bwd_v2"])
def test_arguments_are_packed_as_the_binary_takes_them(name, compiler, folder):
    found = compiler.submit(parameters, name, folder).result()
    assert len(found) == (1 if name == "fwd_v2" else 3)
    for kernel, takes, packed in found:
        assert takes and takes == packed, kernel


# ---- another numba-cuda ---------------------------------------------------------------------------------------------

MOVED = """
from numba.cuda.np import arrayobj
del arrayobj.populate_array
import sandbox, torch
x = torch.zeros(1, 4, 1, 16)
for variant in "v2", "fwd_v2_mma":
    try:
        sandbox.attention(x, x, x, variant=variant)
    except ValueError as error:
        print(error)
"""


def test_internals_that_have_moved_are_told_in_a_line():
    environment = os.environ | {"SANDBOX_TARGET": "compile", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    root = Path(__file__).parents[1]
    told = subprocess.run(
        [sys.executable, "-c", MOVED], cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    version = importlib.metadata.version("numba-cuda")
    words = f"numba-cuda {version} has no numba.cuda.np.arrayobj.populate_array: expected numba-cuda 0.30, pip install"
    assert len(told) == 2 and all(words in line for line in told), told


def test_the_report_of_a_kernel_that_a_cache_of_nvjitlinks_spared_ptxas():
    """Seen on an H200 where several processes compiled the same kernel at once; `-no-cache` should keep it from us."""
    log = "info    : 32 bytes gmem\ninfo    : Function properties for 'f$B2v1':\n"
    log += "info    : used 30 registers, used 0 barriers, {} stack, 0 bytes smem, 968 bytes cmem[0], {} bytes lmem\n\0"
    assert Report.of("f$B2v1", log.format(0, 0)) == Report("f$B2v1", 30, 0, 0)
    assert Report.of("f$B2v1", log.format(8, 44)) == Report("f$B2v1", 30, 8, 36)
    assert Report.of("g", log.format(0, 0)) is None
