"""The emulator of Hopper kernels: what it finds in a kernel that was broken on purpose, and that it finds nothing else.

Each defect edits one line of fwd_v3's sources.  It must give wrong numbers or an error in at least one of the ways that
copies, products and threads may be ordered; the unedited sources must be right in all of them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from sandbox import emulator, target
from sandbox.kernels import fwd_v3
from sandbox.mask import Mask
from sandbox.measure import gate
from sandbox.problem import DTYPES, Problem
from sandbox.variant import SIMULATOR, Tile

pytestmark = [
    pytest.mark.skipif(target.KIND != "simulator", reason="a GPU runs the kernel itself: test_hopper.py"),
    pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler on this machine"),
]
ORDERS = [  # when things happen, and who runs first
    dict(late_arrivals=arrivals, late_readers=readers, seed=seed)
    for seed in (0, 1) for arrivals, readers in ((True, False), (False, True), (True, True))
]  # fmt: skip
PROBLEM = Problem(1, 1, 1, 200, 260, 64, "fp16", mask=Mask(causal=True))
TILE = Tile(128, 64)

CU, RING, PRODUCTS, SOFTMAX = "fwd_v3.cu", "pipeline.cuh", "wgmma.cuh", "softmax.cuh"
SCHEDULER, PRODUCERS, ROWS = "scheduler.cuh", "producers.cuh", "rows.cuh"
S_WAIT, O_WAIT = "products_wait<OVERLAP ? 1 : 0>(rS);", "products_wait<0>(rO);"
K_FREE, V_FREE = "release_K(j);", "release_V(j + 1);"
IN_SOFTMAX, Q_FREE = "trace.enter(SOFTMAX);", "if (j == w.first) Q.release(), Q.next();"
NL = "\n        "  # between two statements of a member function

# file, lines as they are, as they should not be, what the emulator says (None: the numbers are wrong)
DEFECTS = {
    "K read before it is there": (CU, f"K.wait();{NL}trace.enter(FOR_TURN), ", "", None),
    "V read before it is there": (CU, f"V.wait();{NL}weigh();{NL}turn", f"weigh();{NL}turn", None),
    "K released while it is read": (CU, f"{S_WAIT}{NL}{IN_SOFTMAX}{NL}{K_FREE}", f"{K_FREE}{NL}{S_WAIT}", None),
    "S read while it is computed": (CU, S_WAIT, "products_wait<2>(rS);", None),
    "P overwritten while it is read": (
        CU, "settled(rS);", "take_P();", None,
    ),
    "V of the next rows before O has left": (
        PRODUCERS, "send_O(O_here, s, O, w), copies_out_read();", "send_O(O_here, s, O, w);", None,
    ),
    "O leaves before it is there": (PRODUCERS, "O_here.wait(), O_here.next();", "", None),
    "O written where V is read": (
        ROWS, "if (!O_APART) named_sync(FIRST_NAME + WARPGROUPS, 128 * WARPGROUPS);", "", None,
    ),
    "O overwritten while it leaves": (ROWS, "if (O_APART && threadIdx.x % 128 == 0) copies_out_read();", "", None),
    "O never waited for": (
        CU, f"turn);{NL}if (threadIdx.x % 128 == 0) copies_out_read();\n", "turn);\n", "never waited for",
    ),
    "Q given back while it is read": (
        CU, f"{S_WAIT}{NL}{IN_SOFTMAX}{NL}{K_FREE}", f"{Q_FREE}{NL}{S_WAIT}{NL}K.release(), K.next();", None,
    ),
    "V kept by a warpgroup without rows": (
        ROWS, f"V.skip();{NL}}}{NL}if (O_APART)", f"}}{NL}if (O_APART)", None,
    ),
    "O awaited from a warpgroup without rows": (
        ROWS, "if (O_APART) return;", "return;", None,
    ),
    "O seen by nobody": (ROWS, "async_fence();", "", None),
    "a tile asked for before its stage is free": (
        PRODUCERS, "ring.acquire(), ask_V(ring, s, map,", "ask_V(ring, s, map,", None,
    ),
    "Q of the next rows too early": (PRODUCERS, "        ring.acquire();\n        if (w.i0", "        if (w.i0", None),
    "Q above the first row": (PRODUCERS, "if (w.i0 + 64 * g >= 0) ask", "if (true) ask", "above the first row"),
    "O above the first row": (PRODUCERS, "w.i0 < 0 ? -w.i0 / 64 * O_PANELS : 0", "0", "above the first row"),
    "O of its own above the first row": (ROWS, "(!BANDED || i0 >= 0)", "true", "above the first row"),
    "Q's phase forgotten": (CU, "j == w.first) Q.release(), Q.next();", "j == w.first) Q.release();", None),
    "a turn that is never passed": (CU, f"weigh();{NL}turn.pass();", "weigh();", "named barrier"),
    "a stage that is never released": (CU, f"{V_FREE}{NL}take_P", f"V.next();{NL}take_P", "nobody can go on"),
    "a stage released too often": (
        RING, "if (threadIdx.x % 32 == 0) barrier_arrive", "barrier_arrive", "nobody can go on",
    ),
    "a parity that never turns": (RING, "stage = 0, parity ^= 1", "stage = 0", None),
    "fewer bytes than arrive": (PRODUCERS, "announce(Bytes)", "announce(Bytes - 128)", "nobody can go on"),
    "8-row groups elsewhere": (PRODUCTS, "descriptor(panel, 16, 8 * width", "descriptor(panel, 16, 4 * width", None),
    "V's keys elsewhere": (PRODUCTS, "NEXT_ROWS = 2048 >> 4", "NEXT_ROWS = 1024 >> 4", None),
    "O not swizzled": (ROWS, "(chunk % CHUNKS ^ r * Width / 128 % CHUNKS) * 16", "chunk % CHUNKS * 16", None),
    "rows and columns of S mistaken": (SOFTMAX, "e / 2 % 2", "e % 2", None),
    "alpha forgotten": (CU, "products_wait<0>(rO), scale_rows(rO, softmax.alpha);", ";", None),
    "keys past the end": (ROWS, "last = shape.N_k - 1 - key", "last = shape.N_k + 99 - key", None),
    "a row block forgotten before all have heard": (
        SCHEDULER, "told.release(), told.next();", "told.next();", "nobody can go on",
    ),
    "a row block replaced while it is read": (PRODUCERS, "deal.next.told.acquire(), deal.draw()", "deal.draw()", None),
    "a counter that is not put back": (SCHEDULER, "*counter = 0", "", "counter was left at"),
    "a product never waited for": (
        CU, "        products_wait<0>(rS);\n        for (; more", "        for (; more", "never waited for",
    ),
    "O finished while it is computed": (CU, "products_wait<0>(rO);\n            release_V", "release_V", None),
    "loader: a stage that others still read": (
        PRODUCERS, "ring.acquire(), ask_K(ring, s, map_", "ask_K(ring, s, map_", None,
    ),
    "loader: a stage of before": (RING, "ring.parity ^= 1;", "", None),
    "loader: another block of K": (CU, "load.K(K.again(), w, j - STAGES)", "load.K(K.again(), w, j - 1)", None),
    "loader: a block of V too few": (PRODUCERS, "V(V_ring, w, w.end - n), V_ring", "V_ring", "nobody can go on"),
    "loader: blocks past the last": (
        PRODUCERS, "if (!mine || j < w.first) return;", "if (!mine) return;", None,
    ),
    "loader: V of the next rows before O has left": (PRODUCERS, "if (!O_APART && asks()) copies_out_read();", "", None),
    "loader: O never leaves": (CU, "load.send_O(done), ", "", None),
    "loader: K of no row block": (PRODUCERS, "if (w.end < 0) return;", "", None),
    "loader: every lane asks": (PRODUCERS, "|| threadIdx.x % 32 == 0", "|| true", None),
    "loader: every warp asks": (PRODUCERS, "!WARP_SPECIALIZED && uniform", "!WARP_SPECIALIZED || uniform", None),
}  # fmt: skip
LOADER = dict(warp_specialized=False, ping_pong=False)  # in turn, it would seldom be too early
APART = (
    "O overwritten while it leaves",
    "O never waited for",
    "Q given back while it is read",
    "O of its own above the first row",
)  # O has its own tile


@pytest.fixture
def sources(tmp_path):
    return shutil.copytree(fwd_v3.FILE.parent, tmp_path / "hopper") / fwd_v3.FILE.name


def verdict(file, order: dict, monkeypatch, problem=PROBLEM, apart=False, **turned) -> gate.Verdict:
    """The gate's on the kernel of that file, run in that order, on scores whose maximum grows from block to block."""
    launch = emulator.launch
    monkeypatch.setattr(fwd_v3, "FILE", file)
    switches = fwd_v3.Switches(2, apart, **turned)  # few stages: whoever is early is too early
    monkeypatch.setattr(fwd_v3, "chosen", lambda *_: switches)
    monkeypatch.setattr(emulator, "launch", lambda *a, **more: launch(*a, **more | order))
    variant = fwd_v3.Variant(**{**vars(fwd_v3.VARIANT), "name": f"{file} {switches}"})  # built anew
    try:
        x = gate.gaussian(problem, 0)
        x.q[..., 0], x.k[..., 0] = 8.0, -0.1 * torch.arange(float(problem.N_k))[:, None]
        return gate.check(variant, problem, TILE, x, SIMULATOR)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_unedited_sources_are_right_in_every_order(sources, monkeypatch, order):
    for apart, problem in ((False, PROBLEM), (True, PROBLEM), (True, Problem(1, 1, 1, 140, 150, 64, "fp16"))):
        for turned in ({}, LOADER, LOADER | {"ping_pong": True, "q_in_registers": 4}):
            found = verdict(sources, order, monkeypatch, problem, apart, **turned)
            assert found.passed, (turned, found.why)


@pytest.mark.parametrize("what", DEFECTS)
def test_a_defect_is_found(sources, monkeypatch, what):
    name, line, instead, told = DEFECTS[what]
    text = (sources.parent / name).read_text()
    assert text.count(line) == 1, f"{what}: the line stands there {text.count(line)} times"
    (sources.parent / name).write_text(text.replace(line, instead))
    unmasked = what == "keys past the end" or what.endswith("without rows")
    problem = Problem(1, 1, 1, 140, 150, 64, "fp16") if unmasked else PROBLEM
    turned = LOADER if what.startswith("loader") else {}
    problem = replace(problem, N_q=700) if turned else problem  # more row blocks, more occasions
    problem = replace(problem, N_q=150) if what.endswith("first row") else problem  # a warpgroup has none
    found = []
    for order in ORDERS:
        try:
            found.append(verdict(sources, order, monkeypatch, problem, what in APART, **turned).why)
        except emulator.EmulatorError as error:
            found.append(str(error))
        if found[-1] and (told is None or told in found[-1]):
            return
    pytest.fail(f"{what}: {found}")


def test_what_does_not_compile_is_told_with_its_line(sources):
    sources.write_text(sources.read_text().replace("K.wait();", "K.weight();", 1))
    launch = fwd_v3.made(PROBLEM.kind, TILE, fwd_v3.Switches(2, True))[0]
    with pytest.raises(emulator.EmulatorError, match="(?s)fwd_v3.cu does not compile for the emulator.*weight"):
        emulator.library(sources, "fwd_v3", tuple(launch.defines.items()))


def test_without_a_compiler_it_says_what_to_install(sources, monkeypatch):
    monkeypatch.setattr(emulator, "compiler", lambda: None)
    with pytest.raises(emulator.EmulatorError, match="apt install g"):
        emulator.library(sources, "fwd_v3", ())


def test_a_library_is_kept(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path / "cache"))
    defines = tuple(fwd_v3.made(PROBLEM.kind, TILE, fwd_v3.Switches(2, True))[0].defines.items())
    emulator.library(sources, "fwd_v3", defines)
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    emulator.library.cache_clear()
    emulator.library(sources, "fwd_v3", defines)
    assert [f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir()] == [written]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_numbers_of_sixteen_bits_round_as_torchs(dtype):
    """Every row sees two keys of equal weight: O is the mean of two neighbours among all 65,536 numbers."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    every = every[every.isfinite() & (every.abs() < torch.finfo(every.dtype).max / 2)]
    v = every[: every.numel() // 64 * 64].reshape(1, -1, 1, 64)
    N = v.shape[1]
    problem = Problem(1, 1, 1, N, N, 64, dtype, mask=Mask(window=(0, 1)))
    O, LSE, zero = torch.empty_like(v), torch.empty(1, 1, N), torch.zeros_like(v)
    seen = torch.ones(1, dtype=torch.bool)
    fwd_v3.VARIANT.launcher(problem, TILE, SIMULATOR)(problem, zero, zero, v, seen, O, LSE)
    mean = (v[:, :-1].float() + v[:, 1:].float()) / 2
    assert torch.equal(O[:, :-1], mean.to(v.dtype)) and torch.equal(O[:, -1], v[:, -1])
