"""What a Launch hands to the driver when tensors come and go, what it refuses, and what it costs the host.

The driver is driver.c, so no GPU is needed; on a GPU the same is held against results, of a HopperLaunch too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import types
import weakref

import pytest
import torch
from cuda_driver import driver_file_fixture, fake_fixture, number, on_cuda, takes  # noqa: F401
from cuda_sources import looks, unloaded_fixture  # noqa: F401
from on_paper import at_once, given, paper_fixture, plain  # noqa: F401

import sandbox
from sandbox import nvrtc, target
from sandbox.cubin import Report
from sandbox.device import launch as launches
from sandbox.problem import Problem
from sandbox.variant import Infeasible, Tile

ARRAY = [8] * 13  # parameters of an array of four dimensions


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


def test_our_part_of_a_launch_is_small(paper, numba):
    """What Python and ctypes take, the driver's own part left out, beside looking at a tensor."""
    X, Y = plain(1, 1, 1, 1), plain(1, 1)
    assert looks(lambda: numba(1, X, Y, 0.5, 2), X) < 16  # 8 to 10


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


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(target.KIND == "simulator", reason="needs a GPU: the simulator launches nothing")
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
