"""CUDA C++ for the tests of sandbox.nvrtc: a kernel that is right, what ptxas only mentions; and their shared fixtures.

A test imports `cache_fixture` and asks for `cache`: its argument hides no import.
"""

from __future__ import annotations

import statistics
import time

import pytest

from sandbox.nvrtc import library, module

SAXPY = """
#include "step.cuh"
extern "C" __global__ void saxpy(const float *x, float *y, float a, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += STEP * UNIT) y[i] += a * x[i];
}
"""
STEP = "#pragma once\n#define STEP (gridDim.x * blockDim.x)\n"
PTXAS = {  # what ptxas takes and only mentions
    "spills": (
        """extern "C" __global__ void __launch_bounds__(1024, 1) f(float *x, int n) {
    float a[128];
    #pragma unroll
    for (int i = 0; i < 128; ++i) a[i] = x[i * n];
    for (int k = 0; k < n; ++k)
        #pragma unroll
        for (int i = 0; i < 128; ++i) a[i] = a[i] * a[(i + 1) % 128] + x[k];
    #pragma unroll
    for (int i = 0; i < 128; ++i) x[i * n] = a[i];
}""",
        r"^f.cu: f has [1-9]\d* bytes of spills and [1-9]\d* of stack a thread, 64 registers",
    ),
    "a stack": (
        """extern "C" __global__ void f(float *x, int n) {
    float a[300];
    for (int i = 0; i < n; ++i) a[i * 7 % 300] = x[i];
    x[0] = a[n];
}""",
        r"^f.cu: f has 0 bytes of spills and 1200 of stack a thread",
    ),
    "a stack below": (
        """__noinline__ float g(float *x, int n) {
    float a[300];
    for (int i = 0; i < n; ++i) a[i * 7 % 300] = x[i];
    return a[n];
}
extern "C" __global__ void f(float *x, int n) { x[0] = g(x, n); }""",
        r"^f.cu: f has 0 bytes of spills and [1-9]\d* of stack a thread",
    ),
    "setmaxnreg ignored": (
        """extern "C" __global__ void f(float *x) {
    if (threadIdx.x < 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    x[threadIdx.x] = 1;
}""",
        r"^f.cu: f: 'setmaxnreg' ignored",
    ),
    "wgmma serialised": (
        """extern "C" __global__ void __launch_bounds__(128, 1) f(float *x, long long a, long long b, int n) {
    float d[4] = {x[0], x[1], x[2], x[3]};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < n; ++i) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
        d[0] += 1;
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}""",
        r"^f.cu: f: wgmma.mma_async instructions are serialized",
    ),
}


@pytest.fixture(name="cache")
def cache_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="saxpy")
def saxpy_fixture(tmp_path):
    """The file; its header beside it."""
    (tmp_path / "step.cuh").write_text(STEP)
    (tmp_path / "saxpy.cu").write_text(SAXPY)
    return tmp_path / "saxpy.cu"


@pytest.fixture(name="unloaded")
def unloaded_fixture():
    """The libraries are looked for anew, and again afterwards."""
    found = library.nvrtc, library.driver, library.headers, module._context
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def microseconds(call, calls: int = 2000, batches: int = 7, clock=time.perf_counter) -> float:
    """The median over batches of a call's mean."""
    taken = []
    for _ in range(batches):
        begin = clock()
        for _ in range(calls):
            call()
        taken.append((clock() - begin) / calls * 1e6)
    return statistics.median(taken)


def looks(call, x, calls: int = 100, batches: int = 25, clock=time.thread_time) -> float:
    """How many looks at a tensor, its dtype, shape, strides and address, take as long as the call, however fast the
    host is just now: the median over batches of both in turn."""

    def look():
        return x.dtype, x.shape, x.stride(), x.data_ptr()

    each = [microseconds(f, calls, 1, clock) for _ in range(batches) for f in (call, look)]
    return statistics.median(own / look for own, look in zip(each[::2], each[1::2], strict=True))
