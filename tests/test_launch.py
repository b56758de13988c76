"""What a launch hands to the driver when tensors come and go, and what it costs the host.

The driver is driver.c, so no GPU is needed; on a GPU the same is held against results, and the cost against a limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import struct
import threading
import time
import types
import weakref
from pathlib import Path

import pytest
import torch
from cuda_driver import OnCuda, driver_file_fixture, fake_fixture, number, on_cuda, takes  # noqa: F401
from cuda_sources import microseconds, unloaded_fixture  # noqa: F401

import sandbox
from sandbox import catalog, nvrtc, records, target
from sandbox.__main__ import main
from sandbox.cubin import Report
from sandbox.device import hopper
from sandbox.device import launch as launches
from sandbox.device.hopper import Counter, HopperLaunch, Output, Panels
from sandbox.measure import first, overhead
from sandbox.problem import Problem
from sandbox.variant import SIMULATOR, Infeasible, Tile

SIMULATED = target.KIND == "simulator"
gpu_only = pytest.mark.skipif(SIMULATED, reason="needs a GPU: the simulator launches nothing")
BINARY = nvrtc.Binary(b"\177ELF", Report("saxpy", 32, 0, 0), "sm_90a")
ARRAY, MAP = [8] * 13, 128  # parameters of an array of four dimensions; of a tensor map


@pytest.fixture
def paper(fake, monkeypatch):
    """The driver of C, which every kernel loads on and no kernel runs on."""
    for module in hopper, launches:
        monkeypatch.setattr(module, "SIMULATED", False)
    monkeypatch.setattr(HopperLaunch, "binary", lambda launch: BINARY)
    monkeypatch.setattr(launches.Launch, "compiled", lambda launch, *args: BINARY)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counters = {}
    monkeypatch.setattr(hopper, "_counters", lambda *where: counters.setdefault(where, on_cuda(1)))
    fake.counters = counters
    return fake


def heads(*shape, dtype=torch.bfloat16):
    return on_cuda(*shape, dtype=dtype)


def given(paper, layout: str, n: int | None = None) -> tuple:
    """The arguments of the n-th launch, or of the last: they lie one after another."""
    kept = number(paper, "kept", ctypes.c_ubyte * 4096 * 64)
    n = number(paper, "launches").value - 1 if n is None else n
    return struct.unpack_from("<" + layout, bytes(kept[n]))


# ---- HopperLaunch ---------------------------------------------------------------------------------------------------

LAYOUT = "16Q QQ Q 8i2f"  # a map, an output, a counter, null, a shape


def kernel(written: bool) -> HopperLaunch:
    parameters = Panels("Q", 64, written=written), Output("LSE"), Counter(), Output("marks"), hopper.Shape
    return HopperLaunch(Path("saxpy.cu"), "saxpy", 128, 2048, {}, parameters)


@pytest.fixture
def attend(paper):
    """attend(Q, LSE, grid): a kernel that takes a map, an output, a counter, a pointer that may be null, a shape."""
    takes(paper, MAP, 8, 8, 8, 40)
    launch = kernel(written=True)

    def call(Q, LSE, grid=3):
        B, N, H, d = Q.shape
        shape = hopper.shape_of(Problem(B, H, H, N, N, 128, "bf16"), 1 << 20)
        call.launch(grid, Q, LSE, None, shape)

    call.launch = launch
    return call


def as_map(Q) -> list[int]:
    """What driver.c makes of a tensor [B, N, H, d], as 8-byte numbers."""
    B, N, H, d = Q.shape
    b, n, h, _ = (s * Q.element_size() for s in Q.stride())
    left = 0x5A5A5A5A5A5A5A5A
    return [Q.data_ptr(), d, N, H, B, left, n, h, b, *[left] * 7]


def test_other_tensors_every_call(paper, attend):
    for N, grid in (64, 3), (64, 5), (96, 7), (64, 2):
        Q, LSE = heads(2, N, 4, 128), on_cuda(2, 4, N)
        attend(Q, LSE, grid)
        found = given(paper, LAYOUT)
        assert list(found[:16]) == as_map(Q)
        (counter,) = paper.counters.values()
        assert found[16:19] == (LSE.data_ptr(), counter.data_ptr(), 0) and found[19:22] == (N, N, 4)
        assert list(number(paper, "config", ctypes.c_uint * 7)) == [grid, 1, 1, 128, 1, 1, 2048]
    assert number(paper, "encoded").value == 2  # one map a shape


def test_no_tensor_outlives_its_call(paper, attend):
    Q, LSE = heads(2, 64, 4, 128), on_cuda(2, 4, 64)
    attend(Q, LSE)
    freed = [weakref.ref(Q), weakref.ref(LSE)]
    old = Q.data_ptr()
    kept = Q.data.clone()  # no other tensor gets this place
    del Q, LSE
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    Q, LSE = kept.as_subclass(OnCuda), on_cuda(2, 4, 64)
    attend(Q, LSE)
    assert given(paper, LAYOUT)[0] == Q.data_ptr() != old and given(paper, LAYOUT)[16] == LSE.data_ptr()


def test_other_strides_and_dtypes(paper, attend):
    LSE = on_cuda(2, 4, 64)
    wide = heads(2, 64, 4, 256)
    for Q in (
        heads(2, 64, 4, 128), heads(2, 4, 64, 128).transpose(1, 2), wide[..., :128], wide[:, :, :2],
        heads(2, 64, 4, 128, dtype=torch.float16), heads(2, 64, 4, 128),
    ):  # fmt: skip
        attend(Q, LSE)
        assert list(given(paper, LAYOUT)[:16]) == as_map(Q)
    assert number(paper, "encoded").value == 5


def test_kept_maps_are_bounded(paper, attend, monkeypatch):
    monkeypatch.setattr(hopper, "MOST_LAYOUTS", 3)
    for N in range(2, 20):
        attend(Q := heads(2, N, 4, 128), on_cuda(2, 4, N))
        assert list(given(paper, LAYOUT)[:16]) == as_map(Q) and len(attend.launch._encoded) <= 3


def test_what_cannot_be_copied_is_told_every_time(paper, attend):
    LSE = on_cuda(1, 4, 64)
    good, late = heads(1, 64, 4, 128), heads(1 * 64 * 4 * 128 + 8)[4:-4].view(1, 64, 4, 128)
    for Q in late, good, late:  # the second is of a shape that is known
        if Q is good:
            attend(Q, LSE)
            assert given(paper, LAYOUT)[0] == Q.data_ptr()
        else:
            with pytest.raises(ValueError, match="tensor starts 8 bytes after a multiple of 16"):
                attend(Q, LSE)
    with pytest.raises(ValueError, match="expected one of torch.float8_e4m3fn"):
        attend(good.double(), LSE)
    with pytest.raises(ValueError, match="grid=2147483648: expected 1 to 2147483647 blocks"):
        attend(good, LSE, 2**31)
    assert number(paper, "launches").value == 1


def test_what_is_read_is_cloned_where_it_cannot_be_addressed(paper, attend):
    attend.launch, LSE, seen = kernel(written=False), on_cuda(2, 4, 64), []
    wide = heads(2, 64, 4, 256)
    good, late = wide[..., :128], wide.view(-1)[4:][: 2 * 64 * 4 * 128].view(2, 64, 4, 128)
    for Q in good, late, wide[..., ::2], good[:, :1].expand(2, 64, 4, 128), good:
        attend(Q, LSE)
        address, *sizes = given(paper, LAYOUT)[:16]
        contiguous = torch.empty(Q.shape, dtype=Q.dtype)
        assert (address == Q.data_ptr()) == (Q is good) and address % 16 == 0
        assert sizes == as_map(Q if Q is good else contiguous)[1:]
        seen.append(address)
    assert seen[0] == seen[-1] and number(paper, "launches").value == 5


def test_a_launch_after_one_that_failed(paper, attend):
    Q, LSE = heads(1, 64, 4, 128), on_cuda(1, 4, 64)
    number(paper, "failing").value = 700
    with pytest.raises(nvrtc.CallError, match="made up"):
        attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    attend(Q, LSE)
    assert given(paper, LAYOUT)[0] == Q.data_ptr() and given(paper, LAYOUT)[16] == LSE.data_ptr()
    assert number(paper, "launches").value == 1


def test_the_stream_and_its_counter_are_those_of_the_call(paper, attend, monkeypatch):
    Q, LSE, counters = heads(1, 64, 4, 128), on_cuda(1, 4, 64), []
    for stream in 0xA, 0xB, 0xA:
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream)
        attend(Q, LSE)
        assert number(paper, "stream", ctypes.c_uint64).value == stream
        counters.append(given(paper, LAYOUT)[17])
    assert counters[0] == counters[2] != counters[1]
    own = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **kind: own.append(torch.ones(1)) or own[-1])
    attend(Q, LSE)
    assert given(paper, LAYOUT)[17] == own[0].data_ptr()


class OnSecond(OnCuda):
    device = property(lambda self: torch.device("cuda:1"))

    def get_device(self):
        return 1


def test_on_the_device_of_the_tensors(paper, attend, monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], torch.device(device).index if not isinstance(device, int) else device
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0xA0 + device)
    monkeypatch.setattr(nvrtc.module, "_enter", lambda device: None)
    for kind, stream in (OnSecond, 0xA1), (OnCuda, 0xA0), (OnSecond, 0xA1):
        Q, LSE = (torch.zeros(*n, dtype=torch.float16).as_subclass(kind) for n in ((1, 64, 4, 128), (1, 4, 64)))
        attend(Q, LSE)
        assert number(paper, "stream", ctypes.c_uint64).value == stream and current == [0]
        assert given(paper, LAYOUT)[0] == Q.data_ptr()
        assert given(paper, LAYOUT)[17] == paper.counters[stream - 0xA0, stream].data_ptr()
    with pytest.raises(ValueError, match="LSE is on cuda:0: expected all tensors on one CUDA device"):
        attend(Q, on_cuda(1, 4, 64))
    with pytest.raises(ValueError, match="Q is on cpu: expected all tensors on one CUDA device"):
        attend(torch.zeros(1, 64, 4, 128, dtype=torch.float16), on_cuda(1, 4, 64))


def at_once(paper, call, calls: int = 8, threads: int = 4):
    """call(thread, n) from several threads, while the driver takes its time over every argument."""
    number(paper, "slow").value = 200
    start, errors = threading.Barrier(threads), []

    def run(thread):
        try:
            start.wait()
            for n in range(calls):
                call(thread, n)
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors and number(paper, "launches").value == calls * threads


def test_threads_do_not_meet_in_a_launch(paper, attend):
    sets = [[(heads(1, 16 + t, 4, 128), on_cuda(1, 4, 16 + t)) for _ in range(8)] for t in range(4)]
    at_once(paper, lambda thread, n: attend(*sets[thread][n]))
    found = {(f[0], f[16], f[19]) for f in (given(paper, LAYOUT, n) for n in range(32))}
    assert found == {(Q.data_ptr(), LSE.data_ptr(), Q.shape[1]) for mine in sets for Q, LSE in mine}


def test_sandbox_sync(paper, attend, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    monkeypatch.setattr(nvrtc.module, "SYNC", True)
    attend(heads(1, 64, 4, 128), on_cuda(1, 4, 64))
    assert waits == [1]


# ---- Launch ---------------------------------------------------------------------------------------------------------


def f(X, Y, scale, n):
    """A kernel's signature."""


@pytest.fixture
def numba(paper):
    takes(paper, *ARRAY, *[8] * 9, 4, 4)
    return launches.Launch(types.SimpleNamespace(py_func=f), 64, 70_000)


def members(x) -> list[int]:
    size = x.element_size()
    return [0, 0, x.numel(), size, x.data_ptr(), *x.shape, *(s * size for s in x.stride())]


def test_arrays_of_any_strides(paper, numba):
    K = on_cuda(2, 8, 1, 16, dtype=torch.float16)
    for X in K.expand(2, 8, 4, 16), K, K.transpose(1, 3), on_cuda(2, 8, 1, 16, dtype=torch.bfloat16)[:, ::2]:
        Y = on_cuda(5, 3).T
        numba(9, X, Y, 0.5, -3)
        found = given(paper, "13Q 9Q f i")
        assert list(found) == [*members(X), *members(Y), 0.5, -3]
        assert list(number(paper, "config", ctypes.c_uint * 7)) == [9, 1, 1, 64, 1, 1, 70_000]


def test_an_int_is_no_float(paper, numba):
    """Kinds of arguments have launches of their own."""
    X, Y = on_cuda(1, 1, 1, 1), on_cuda(1, 1)
    for scale, code in (0.5, "f"), (7, "i"), (0.25, "f"):
        numba(1, X, Y, scale, 2)
        assert given(paper, f"22Q {code} i")[22:] == (scale, 2)
    with pytest.raises(TypeError, match=r"saxpy takes \[8, 8, .*, 4, 4\]"):
        numba(1, X, Y[0], 0.5, 2)
    numba(1, X, Y, 0.5, 2)
    assert given(paper, "22Q f i")[22:] == (0.5, 2)


def test_arrays_do_not_outlive_their_launch(paper, numba):
    X, Y = on_cuda(1, 1, 1, 1), on_cuda(1, 1)
    numba(1, X, Y, 0.5, 2)
    freed = weakref.ref(X)
    del X
    gc.collect()
    assert freed() is None
    number(paper, "failing").value = 700
    with pytest.raises(nvrtc.CallError):
        numba(1, on_cuda(1, 1, 1, 1), Y, 0.5, 2)
    numba(0, None)  # nothing is launched
    numba(1, X := on_cuda(1, 1, 1, 1), Y, 0.5, 2)
    assert given(paper, "13Q")[4] == X.data_ptr() and number(paper, "launches").value == 2


def test_threads_do_not_meet_in_a_launch_of_numbas(paper, numba):
    sets = [[(on_cuda(t + 1, 1, 1, n + 1), on_cuda(1, 1)) for n in range(4)] for t in range(4)]
    at_once(paper, lambda thread, n: numba(1, *sets[thread][n], 0.5, 10 * thread + n), calls=4)
    found = {given(paper, "13Q 9Q f i", n) for n in range(16)}
    assert found == {
        (*members(X), *members(Y), 0.5, 10 * t + n) for t, mine in enumerate(sets) for n, (X, Y) in enumerate(mine)
    }


# ---- kernels that spill ---------------------------------------------------------------------------------------------

COMPILED, TILE = launches.Launch.compiled, Tile(64, 128)


def g(X, Y, scale, n):
    """Another kernel of that signature."""


@pytest.fixture
def ptxas(paper, monkeypatch):
    """ptxas.found: kernel -> (stack, spills); ptxas.asked: the kernels that were compiled, and how many had run."""
    takes(paper, *ARRAY, *[8] * 9, 4, 4)
    found, asked = {f: (0, 0), g: (0, 0)}, []

    def kernel(function, *kind):
        asked.append((function.__name__, number(paper, "launches").value))
        return nvrtc.Binary(b"\177ELF", Report("saxpy", 255, *found[function]), "sm_90a")

    compiler = types.SimpleNamespace(signature=lambda given: tuple(map(type, given)), kernel=kernel)
    monkeypatch.setattr(sandbox.device, "compile", compiler, raising=False)
    monkeypatch.setattr(launches.Launch, "compiled", COMPILED)
    return types.SimpleNamespace(found=found, asked=asked)


def of(function, **kind):
    return launches.Launch(types.SimpleNamespace(py_func=function), 64, **kind)


def test_a_tile_that_spills_is_infeasible_before_it_is_launched(paper, ptxas):
    given = 1, on_cuda(1, 1, 1, 1), on_cuda(1, 1), 0.5, 2
    for stack, spills in (72, 0), (0, 120), (8, 72):
        ptxas.found[f] = stack, spills
        kernel = of(f, tile=TILE)
        words = f"^tile 64x128: f has {spills} B of spills and {stack} B of stack a thread: take a smaller tile"
        for run in contextlib.nullcontext, launches.compiling, contextlib.nullcontext:
            with pytest.raises(Infeasible, match=words), run():
                kernel(*given)
    assert number(paper, "launches").value == 0 and len(ptxas.asked) == 3
    of(f)(*given)  # its tiles are not to be in registers
    of(g, tile=TILE)(*given)
    ptxas.found[f] = 16, launches.FEW  # few numbers are cheap
    of(f, tile=TILE)(*given)
    assert number(paper, "launches").value == 3


def test_of_several_kernels_none_runs_where_one_spills(paper, ptxas):
    given = on_cuda(1, 1, 1, 1), on_cuda(1, 1)

    def both():
        first, second = of(g, tile=TILE), of(f, tile=TILE)
        return launches.all_or_none(lambda problem, *X: [run(X[0].numel(), *X, 0.5, 2) for run in (first, second)])

    ptxas.found[f], launch = (8, 120), both()
    launch(Problem(1, 1, 1, 0, 1, 16, "fp16"), on_cuda(0, 1, 1, 1), given[1])  # no block: nothing is compiled
    for scale in 1.0, 1.0, -1.0:
        with pytest.raises(Infeasible, match="f has 120 B of spills"):
            launch(Problem(1, 1, 1, 1, 1, 16, "fp16", scale), *given)
    assert number(paper, "launches").value == 0
    ptxas.found[f], launch = (0, 0), both()
    ptxas.asked.clear()
    for calls in 1, 2:
        launch(Problem(1, 1, 1, 1, 1, 16, "fp16"), *given)
        assert ptxas.asked == [("g", 0), ("f", 0)] and number(paper, "launches").value == 2 * calls
    with launches.compiling() as done:
        launch(Problem(1, 1, 1, 1, 1, 16, "fp16"), *given)
    assert [one.name for one, _ in done] == ["g", "f"] and number(paper, "launches").value == 4


def test_other_threads_launch_while_one_compiles(paper, ptxas):
    given = 1, on_cuda(1, 1, 1, 1), on_cuda(1, 1), 0.5, 2
    with launches.compiling() as done:
        other = threading.Thread(target=of(f), args=given)
        other.start()
        other.join()
        of(g)(*given)
    assert [one.name for one, _ in done] == ["g"] and number(paper, "launches").value == 1


# ---- its cost -------------------------------------------------------------------------------------------------------


def test_our_part_of_a_launch_is_small(paper, attend, numba):
    """What Python and ctypes take, the driver's own part left out; the clock stands while others have the processor."""

    class Plain(OnCuda):
        __torch_function__ = torch._C._disabled_torch_function_impl  # which costs more than all of ours

    X, Y, LSE, Q = (
        torch.zeros(n).as_subclass(Plain) for n in ((1, 1, 1, 1), (1, 1), (1, 4, 64), (1, 64, 4, 128))
    )  # fmt: skip
    takes(paper, *ARRAY, *[8] * 9, 4, 4)
    assert microseconds(lambda: numba(1, X, Y, 0.5, 2), calls=500, clock=time.thread_time) < 40
    takes(paper, MAP, 8, 8, 8, 40)
    attend(on_cuda(1, 64, 4, 128), LSE)
    assert microseconds(lambda: attend(Q, LSE), calls=500, clock=time.thread_time) < 40


# ---- measured -------------------------------------------------------------------------------------------------------


def test_the_wait_is_not_counted(monkeypatch):
    now, done = [0.0], []

    def spend(seconds, what):
        now[0] += seconds
        done.append(what)

    monkeypatch.setattr(overhead, "perf_counter", lambda: now[0])
    monkeypatch.setattr(overhead, "SAMPLES", 5)
    cost = overhead.Cost.of(lambda: spend(12e-6, "call"), lambda: spend(1.0, "wait"))
    assert (cost.us, cost.us_p20, cost.us_p80) == pytest.approx((12, 12, 12))
    assert done == (["wait"] + ["call"] * overhead.CALLS) * 8 + ["wait"]


@pytest.mark.skipif(not SIMULATED, reason="measured for real below")
def test_the_command(monkeypatch, tmp_path, capfd):
    assert main(["overhead"]) == 2
    assert "overhead needs a GPU: the simulator launches nothing" in capfd.readouterr().err
    monkeypatch.setattr(target, "KIND", "gpu")
    monkeypatch.setattr(target, "device", lambda: SIMULATOR)
    monkeypatch.setattr(target, "torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(overhead, "SAMPLES", 2), monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(first, "PROCESSES", 1)
    words = ["overhead", "fwd_v2", "--first", "--seqlen", "8", "--head-dim", "8", "--heads", "1", "--dtype", "fp32"]
    for _ in range(2):  # the second time the rows are replaced
        assert main([*words, "--out", str(tmp_path)]) == 0
    assert "launch fwd_v2" in capfd.readouterr().out
    rows = records.read(tmp_path / "overhead.jsonl")
    of_process = [f"first attention fwd_v2, {how}" for how in ("compiled", "kept")]
    assert [row["what"] for row in rows] == ["launch fwd_v2", "attention fwd_v2", overhead.SDPA, *of_process]
    assert all(0 < row["us_p20"] <= row["us"] <= row["us_p80"] and row["device"] == "simulator" for row in rows)
    assert rows[0] | {"B": 1, "H": 1, "N_q": 8, "d": 8, "dtype": "fp32", "causal": False} == rows[0]


@gpu_only
@pytest.mark.parametrize("name, most", [("fwd_v3", 15), ("fwd_v2", 25)])
def test_gpu_cost(name, most, capsys):
    """Microseconds of the host, medians: a launch, and attention() from its arguments to its result.

    Measured up to three times: what else runs on this machine can only add.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other tests take the processor: without -n, or by python -m sandbox overhead")
    variant, problem = catalog.find(name), Problem(1, 4, 4, 128, 128, 64, "bf16")
    if name == "fwd_v3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is no Hopper")
    told = []
    for _ in range(3):
        rows = overhead.measure(variant, problem, target.device())
        told += ["{what}: {us:.1f} us (20-80 %: {us_p20:.1f} to {us_p80:.1f})".format(**row) for row in rows]
        if met := all(row["us"] <= limit for row, limit in zip(rows, (most, 60), strict=True)):
            break
    with capsys.disabled():
        print("", *told, sep="\n")
    assert met, f"expected medians of at most {most} us for a launch and 60 us for attention(): {'; '.join(told)}"


@gpu_only
@pytest.mark.parametrize("variant", ["v2", "v3"])
def test_gpu_results_follow_the_tensors(variant):
    """Freed and moved, of other shapes and strides, from several threads at once."""
    if variant == "v3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is no Hopper")

    def inputs(seed, N=300, H_kv=4):
        g = torch.Generator().manual_seed(seed)
        shapes = (2, N, 4, 64), (2, N, H_kv, 64), (2, N, H_kv, 64)
        return [torch.randn(s, generator=g).half().cuda() for s in shapes]

    def right(seed, **sizes):
        q, k, v = (x.transpose(1, 2).float() for x in inputs(seed, **sizes))
        gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **gqa).transpose(1, 2)

    def close(O, seed, **sizes):
        assert torch.allclose(O.float(), right(seed, **sizes), atol=5e-3)

    held = []
    for seed in range(8):
        x = inputs(seed)
        close(sandbox.attention(*x, variant=variant), seed)
        held += x[: seed % 3]  # so that addresses change
        del x
        torch.cuda.empty_cache()
    q, k, v = inputs(1, H_kv=1)
    close(sandbox.attention(q, k, v, variant=variant), 1, H_kv=1)
    close(sandbox.attention(q, k.expand_as(q), v.expand_as(q), variant=variant), 1, H_kv=1)
    close(sandbox.attention(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2)), variant=variant), 2)
    close(sandbox.attention(*inputs(3, N=77), variant=variant), 3, N=77)
    O = sandbox.attention(*(x.bfloat16() for x in inputs(3, N=77)), variant=variant)
    assert O.dtype == torch.bfloat16 and torch.allclose(O.float(), right(3, N=77), atol=3e-2)

    sets, wrong = [[inputs(10 * t + n) for n in range(8)] for t in range(4)], []
    expected = [[sandbox.attention(*x, variant=variant) for x in mine] for mine in sets]
    torch.cuda.synchronize()

    def run(t):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = [sandbox.attention(*x, variant=variant) for x in sets[t]]
                torch.cuda.current_stream().synchronize()
                wrong.extend(n for n, (O, star) in enumerate(zip(found, expected[t])) if not torch.equal(O, star))

    threads = [threading.Thread(target=run, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
