"""CUDA C++ files: compiled, refused and kept on disk without a GPU; where the libraries are looked for."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
from cuda_sources import PTXAS, SAXPY, STEP, cache_fixture, saxpy_fixture, unloaded_fixture  # noqa: F401

from sandbox import nvrtc, target
from sandbox.nvrtc import library

compiler = importlib.import_module("sandbox.nvrtc.compile")  # nvrtc.compile is the function


def compile_saxpy(file: Path, cache: Path, unit: int = 1, **changed) -> tuple[int, str]:
    """(how many binaries were made, not found; a hash of the one returned).  Runs in child processes too."""
    os.environ["SANDBOX_CACHE"] = str(cache)
    with mock.patch.object(compiler, "_compile", wraps=compiler._compile) as made:
        binary = nvrtc.compile(file, "saxpy", {"UNIT": unit}, **changed)
    return made.call_count, hashlib.sha256(binary.cubin).hexdigest()


# ---- compiled -------------------------------------------------------------------------------------------------------


def test_a_kernel_becomes_a_cubin(saxpy, cache):
    binary = nvrtc.compile(saxpy, "saxpy", {"UNIT": 1})
    assert binary.cubin[:4] == b"\x7fELF"
    assert binary.report.entry == "saxpy" and binary.arch == "sm_90a"
    assert 0 < binary.report.registers <= 255 and binary.report.stack == binary.report.spills == 0
    assert [file.suffix for file in cache.iterdir()] == [".cubin"]


def test_a_template_and_its_neighbours(tmp_path, cache):
    """The report is that of the entry, not of the file's other kernels."""
    file = tmp_path / "f.cu"
    file.write_text("template <int N> __global__ void fill(float *x) { x[threadIdx.x] = N; }\n" + PTXAS["a stack"][0])
    binary = nvrtc.compile(file, "fill<3>", {})
    assert binary.report.entry == "_Z4fillILi3EEvPf" and binary.report.stack == 0
    with pytest.raises(nvrtc.Spills, match="1200 of stack"):
        nvrtc.compile(file, "f", {})


@pytest.mark.parametrize("header", ["cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "cuda/std/type_traits"])
def test_cudas_own_headers(header, tmp_path, cache):
    file = tmp_path / "f.cu"
    file.write_text(f'#include <{header}>\nextern "C" __global__ void f(float *x) {{ *x = 1; }}')
    assert nvrtc.compile(file, "f", {}).cubin


def test_headers_in_other_folders(tmp_path, cache):
    (tmp_path / "hopper" / "low").mkdir(parents=True)
    (tmp_path / "one.cuh").write_text("#define ONE 1\n")
    (tmp_path / "hopper" / "low" / "two.cuh").write_text('#include "../one.cuh"\n#define TWO (ONE + ONE)\n')
    file = tmp_path / "hopper" / "f.cu"
    file.write_text(
        '#include "low/two.cuh"\nextern "C" __global__ void f(float *x) { static_assert(TWO == 2); *x = TWO; }'
    )
    assert nvrtc.compile(file, "f", {}).cubin


def test_defines_are_what_they_say(tmp_path, cache):
    file = tmp_path / "f.cu"
    file.write_text('extern "C" __global__ void f(ELEMENT *x) { static_assert(Br == 64 && CAUSAL == 1); *x = Br; }')
    assert nvrtc.compile(file, "f", {"Br": 64, "CAUSAL": True, "ELEMENT": "unsigned short"}).cubin


# ---- refused --------------------------------------------------------------------------------------------------------


def refusal(file: Path, source: str, **changed) -> str:
    file.write_text(source)
    with pytest.raises(nvrtc.CompileError) as caught:
        nvrtc.compile(file, **{"entry": "f", "defines": {}} | changed)
    return str(caught.value)


def test_an_error_shows_its_line_the_log_and_the_options(tmp_path, cache):
    (tmp_path / "f.cuh").write_text("\n\nfloat two() { return z; }\n")
    source = '#include "f.cuh"\nextern "C" __global__ void f(float *x) { *x = Br * y; }'
    told = refusal(tmp_path / "f.cu", source, defines={"Br": 64}, options=("--use_fast_math",))
    assert told.startswith("f.cu: f does not compile (nvrtcCompileProgram: NVRTC_ERROR_COMPILATION)\n")
    assert (
        'f.cuh(3): error: identifier "z" is undefined' in told and 'f.cu(2): error: identifier "y" is undefined' in told
    )
    assert all(word in told for word in ("libnvrtc", "--gpu-architecture=sm_90a", "-DBr=64", "--use_fast_math"))
    assert not cache.exists()


@pytest.mark.parametrize("what", PTXAS)
def test_what_ptxas_only_mentions(what, tmp_path, cache):
    source, why = PTXAS[what]
    told = refusal(tmp_path / "f.cu", source)
    assert re.search(why, told), told
    assert "ptxas info" in told and not cache.exists()


def test_setmaxnreg_with_launch_bounds(tmp_path, cache):
    file = tmp_path / "f.cu"
    file.write_text(PTXAS["setmaxnreg ignored"][0].replace("void f", "void __launch_bounds__(256, 1) f"))
    assert nvrtc.compile(file, "f", {}).report.registers == 232


def test_wgmma_needs_sm_90a(tmp_path, cache):
    source = 'extern "C" __global__ void f() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }'
    told = refusal(tmp_path / "f.cu", source, arch="sm_90")
    assert "'wgmma.fence' not supported on .target 'sm_90'" in told
    assert nvrtc.compile(tmp_path / "f.cu", "f", {}).cubin


def test_another_entry(tmp_path, cache):
    source = 'extern "C" __global__ void __launch_bounds__(64, 1) f() {}\ntemplate <int N> __global__ void g(int n) {}'
    told = refusal(tmp_path / "f.cu", source, entry="h")
    assert told.startswith("f.cu: entry='h' is none of its kernels: f, g\n")


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"defines": {"UNITS": 1}}, r"defines={'UNITS': 1}: saxpy.cu does not use UNITS: did you mean UNIT\?"),
        ({"defines": {"COMMENT": 1}}, "saxpy.cu does not use COMMENT"),
        ({"defines": {"UNIT": 1.5}}, r"defines={'UNIT': 1.5}: expected an int or a str"),
        ({"arch": "compute_90a"}, "arch='compute_90a': expected an architecture of machine code"),
        ({"options": ("-I/elsewhere",)}, "options='-I/elsewhere': expected headers beside the source"),
        ({"options": "-lineinfo"}, "options='-lineinfo': expected a tuple"),
        ({"entry": ""}, "entry='': expected the name of a kernel"),
    ],
)
def test_arguments_that_cannot_be(changed, told, saxpy, cache):
    saxpy.write_text(saxpy.read_text() + "// COMMENT\n/* COMMENT\n*/")
    with pytest.raises((TypeError, ValueError), match=told) as caught:
        nvrtc.compile(saxpy, **{"entry": "saxpy", "defines": {"UNIT": 1}} | changed)
    assert not isinstance(caught.value, nvrtc.CompileError) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="gone.cu"):
        nvrtc.compile(tmp_path / "gone.cu", "f", {})


def test_a_header_outside_the_key_is_not_found(saxpy, cache, tmp_path, monkeypatch):
    """By a macro, or in the working folder: NVRTC could find it, and no key would know of it."""
    monkeypatch.chdir(tmp_path)
    saxpy.write_text('#define HEADER "step.cuh"\n' + SAXPY.replace('"step.cuh"', "HEADER"))
    with pytest.raises(nvrtc.CompileError, match='cannot open source file "step.cuh"'):
        nvrtc.compile(saxpy, "saxpy", {"UNIT": 1})


# ---- kept on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children():
    """Two processes."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield pool


def test_another_process_finds_it(saxpy, cache, children):
    made, cubin = compile_saxpy(saxpy, cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert made == 1
    assert children.submit(compile_saxpy, saxpy, cache).result() == (0, cubin)
    assert [f.stat().st_mtime_ns for f in cache.iterdir()] == [written]


def test_two_processes_at_once(saxpy, cache, children):
    jobs = [children.submit(compile_saxpy, saxpy, cache) for _ in range(4)]
    assert len({job.result()[1] for job in jobs}) == 1
    assert [file.suffix for file in cache.iterdir()] == [".cubin"]
    assert compile_saxpy(saxpy, cache)[0] == 0


def test_a_refusal_comes_back_from_a_process(saxpy, cache, children):
    with pytest.raises(nvrtc.CompileError, match="saxpy.cu: saxpy does not compile") as caught:
        children.submit(compile_saxpy, saxpy, cache, unit="?").result()
    assert "error: expected an expression" in str(caught.value)
    error = pickle.loads(pickle.dumps(nvrtc.CallError("cuInit", 100, "no device")))
    assert (str(error), error.code) == ("cuInit: no device", 100)


def test_threads_at_once(saxpy, cache):
    made = []
    threads = [threading.Thread(target=lambda: made.append(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))) for _ in "1234"]
    with mock.patch.object(compiler, "_compile", wraps=compiler._compile) as calls:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls.call_count == 1 and len(made) == 4 and len({binary.cubin for binary in made}) == 1


def test_what_makes_another_binary(saxpy, cache):
    def both() -> tuple[int, int]:
        return compile_saxpy(saxpy, cache)[0], compile_saxpy(saxpy, cache)[0]

    assert both() == (1, 0)
    for changed in {"unit": 2}, {"arch": "sm_80"}, {"options": ("--use_fast_math",)}:
        assert compile_saxpy(saxpy, cache, **changed)[0] == 1, changed
        assert compile_saxpy(saxpy, cache, **changed)[0] == 0, changed
    header = saxpy.with_name("step.cuh")
    header.write_text(STEP + "// edited\n")
    assert both() == (1, 0)
    header.write_text(STEP + '#include "deeper.cuh"\n')
    saxpy.with_name("deeper.cuh").write_text("// a header of a header\n")
    assert both() == (1, 0)
    saxpy.with_name("deeper.cuh").write_text("// edited\n")
    assert both() == (1, 0)
    saxpy.with_name("unrelated.cuh").write_text("// not included\n")
    assert both() == (0, 0)
    saxpy.write_text(SAXPY + "// edited\n")
    assert both() == (1, 0)
    with mock.patch.object(compiler, "_version", lambda: "another NVRTC"):
        assert both() == (1, 0)
    for include in "#include <cuda_fp16.h>", "#define H <cuda_fp16.h>\n # include H":
        saxpy.write_text(f"{include}\n{SAXPY}")
        assert both() == (1, 0)
        with mock.patch.object(compiler, "_headers", lambda: "other headers"):
            assert both() == (1, 0)
    saxpy.write_text(SAXPY)
    with mock.patch.object(compiler, "_headers", lambda: "other headers, of which none is included"):
        assert both() == (0, 0)
    header.write_text(STEP)
    assert both() == (0, 0)


def test_the_versions_that_enter_the_key(tmp_path, monkeypatch):
    (major, minor, size), digest = compiler._version(), compiler._headers()
    assert (major, minor) >= (12, 0) and size == library.nvrtc().path.stat().st_size
    shutil.copytree(library.headers()[0], tmp_path / "include", ignore=shutil.ignore_patterns("thrust", "cub"))
    monkeypatch.setattr(library, "headers", lambda: (tmp_path / "include", tmp_path / "include" / "cccl"))
    assert compiler._headers.__wrapped__() == digest
    for file in tmp_path / "include" / "cuda_fp8.hpp", tmp_path / "include/cccl/cuda/std/__cccl/version.h":
        file.write_text(file.read_text() + "\n")
        assert (edited := compiler._headers.__wrapped__()) != digest, file
        digest = edited


@pytest.mark.parametrize("broken", ["empty", "cut short", "another byte", "no header"])
def test_a_broken_file_is_made_again(broken, saxpy, cache):
    _, cubin = compile_saxpy(saxpy, cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut short": whole[:-10],
            "another byte": whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:],
            "no header": whole.partition(b"\n")[2],
        }[broken]
    )
    assert compile_saxpy(saxpy, cache) == (1, cubin)
    assert compile_saxpy(saxpy, cache) == (0, cubin)


def test_a_folder_that_cannot_be_written(saxpy, tmp_path, cache):
    (tmp_path / "file").touch()
    assert compile_saxpy(saxpy, tmp_path / "file" / "cache") == (1, compile_saxpy(saxpy, cache)[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(saxpy, cache):
    _, cubin = compile_saxpy(saxpy, cache)
    cache.chmod(0o555)
    assert compile_saxpy(saxpy, cache) == (0, cubin)
    assert compile_saxpy(saxpy, cache, unit=2)[0] == 1
    cache.chmod(0o755)


# ---- where the libraries are ----------------------------------------------------------------------------------------


def test_importing_loads_nothing_and_a_hopper_kernel_no_numba():
    code = (
        "import sys, sandbox; from sandbox import catalog, nvrtc; catalog.forward('v3'), catalog.forward('fwd_v3_fp8');"
        "maps = open('/proc/self/maps').read();"
        "print('libnvrtc.so' in maps, 'libnvrtc-builtins' in maps, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3


@pytest.mark.parametrize("get", ["nvrtc", "headers"])
def test_it_says_where_it_looked(get, unloaded, tmp_path, monkeypatch):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "[toolkit]"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(library.glob, "glob", lambda pattern: [])
    with pytest.raises(nvrtc.NotFound) as caught:
        getattr(library, get)()
    name, folder, package = {
        "nvrtc": ("libnvrtc.so.*", "lib64", "nvidia-cuda-nvrtc"),
        "headers": ("cuda_fp16.h", "include", "nvidia-cuda-runtime"),
    }[get]
    told = str(caught.value)
    assert told.startswith(f"{name} is in none of {tmp_path}/[[]toolkit]/") and "\n" not in told
    assert f"/usr/local/cuda/{folder}" in told and f"pip install {package}, or set CUDA_HOME" in told


def test_a_toolkit_will_do(unloaded, tmp_path, monkeypatch, saxpy, cache):
    packaged, headers = library.nvrtc().path, library.headers()[0]
    (tmp_path / "toolkit" / "lib64").mkdir(parents=True)
    for file in packaged.parent.glob("libnvrtc*"):
        (tmp_path / "toolkit" / "lib64" / file.name).symlink_to(file)
    (tmp_path / "toolkit" / "include").symlink_to(headers)
    library.nvrtc.cache_clear(), library.headers.cache_clear()
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert library.nvrtc().path == tmp_path / "toolkit" / "lib64" / packaged.name
    assert library.headers()[0] == tmp_path / "toolkit" / "include"
    assert compile_saxpy(saxpy, cache)[0] == 1


def test_the_newest_of_several(tmp_path, monkeypatch):
    for name in (
        "a/lib/libnvrtc.so.13",
        "b/lib/libnvrtc.so.12",
        "b/lib/libnvrtc.alt.so.14",
        "c/lib/libnvrtc-builtins.so.13.0",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(library, "_places", lambda: [f"{tmp_path}/*"])
    assert library._find("libnvrtc.so.*", ("lib",), "") == tmp_path / "a/lib/libnvrtc.so.13"


def test_a_library_that_does_not_load_or_is_too_old(tmp_path):
    (tmp_path / "libnvrtc.so.13").write_text("no library " * 100)
    with pytest.raises(nvrtc.NotFound, match="libnvrtc.so.13 does not load: .*invalid ELF header"):
        library.Library(tmp_path / "libnvrtc.so.13", "nvrtc", None)
    with pytest.raises(nvrtc.NotFound, match="libnvrtc.* is too old: it has no cuInit"):
        library.Library(library.nvrtc().path, "cu", None)


@pytest.mark.skipif(target._why_no_gpu() is None, reason="there is a GPU here")
def test_without_a_gpu_it_says_so(saxpy, cache, unloaded):
    kernel = nvrtc.Kernel(nvrtc.compile(saxpy, "saxpy", {"UNIT": 1}))
    x = torch.empty(64, 64)
    for use in (
        lambda: kernel.prepare(grid=(1, 1, 1), block=(32, 1, 1), args=[x, x, 2.0, 4096]),
        lambda: nvrtc.TensorMap.tiled(x, (8, 32)),
    ):
        with pytest.raises(nvrtc.NotFound, match="nvrtc compiles here, but there is no GPU to launch on: torch"):
            use()
