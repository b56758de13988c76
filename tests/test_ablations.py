"""Experiments non_matmul and causal_skip: the arrays that count, the control kernel, what is said and refused."""

import json
import math
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import causal_skip, common, non_matmul, tables
from experiments.__main__ import main
from sandbox import catalog, target
from sandbox.algorithms import flash_attention_1_forward, flash_attention_2_forward, standard_attention
from sandbox.mask import Mask
from sandbox.measure import bench, formulas, gate
from sandbox.measure.operations import KINDS, NotCounted, count
from sandbox.problem import Problem
from sandbox.variant import HOPPER, Tile

SIMULATED = target.KIND == "simulator"
sizes = st.integers(1, 13)
SMALL = ["--input", "gauss", "--head-dim", "4", "--no-counters"]


def run(folder, name, *words):
    assert main(["run", name, "--out", str(folder), *map(str, words)]) == 0
    assert (folder / f"{name}.csv").exists() and (folder / f"{name}.png").stat().st_size > 10_000
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# ---- arrays that count ----------------------------------------------------------------------------------------------

A = np.arange(1.0, 13).reshape(3, 4)  # [3, 4]


def in_place(x):
    x[0] += x[1]
    return x


HAND_COUNTED = [
    (lambda x: np.exp(x), {"exp": 12}),
    (lambda x: np.log(x[0]), {"log": 4}),
    (lambda x: np.log(x, out=np.full_like(x, -1), where=x != 1), {"compare": 12, "log": 11}),
    (lambda x: x @ x.T, {"matmul": 2 * 3 * 3 * 4}),
    (lambda x: A @ x.T, {"matmul": 2 * 3 * 3 * 4}),
    (lambda x: 2 * x - x / x[:, :1] + A, {"multiply": 12, "divide": 12, "subtract": 12, "add": 12}),
    (lambda x: x.max(axis=1), {"max": 3 * 3}),
    (lambda x: x.max(), {"max": 11}),
    (lambda x: x.max(axis=1, initial=-np.inf), {"max": 12}),
    (lambda x: x.sum(axis=0), {"sum": 4 * 2}),
    (lambda x: np.maximum(x[0], x[1]), {"max": 4}),
    (lambda x: np.where(x == 1, 0, x), {"compare": 12, "select": 12}),
    (in_place, {"add": 4}),
    (lambda x: x[0, 0] * x[0, 1], {"multiply": 1}),
    (lambda x: np.zeros_like(x), {}),
    (lambda x: np.zeros((0, 3)) @ x, {}),
    (lambda x: x[:0].sum(axis=0), {}),
]


@pytest.mark.parametrize("n", range(len(HAND_COUNTED)))
def test_small_programs_are_counted_by_hand(n):
    program, expected = HAND_COUNTED[n]
    result, done = count(program, A.copy())
    assert {kind: n for kind, n in done.items() if n} == expected and set(done) <= set(KINDS)
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, program(A.copy()))


@pytest.mark.parametrize(
    "program",
    [
        lambda x: np.sqrt(x), lambda x: x**2, lambda x: -x, lambda x: x > 1, lambda x: np.where(x), lambda x: np.sum(x),
        lambda x: np.dot(x, x.T), lambda x: np.einsum("ij->i", x), lambda x: np.concatenate([x, x]),
        lambda x: np.add.accumulate(x), lambda x: np.add.outer(x, x), lambda x: np.multiply.reduce(x),
        lambda x: np.exp(x, dtype=np.float32), lambda x: x.max(axis=1, where=A > 2, initial=0),
        lambda x: np.asarray(x), lambda x: np.array([1.0]).__iadd__(x[0, 0]), lambda x: np.exp(x, out=np.empty((3, 4))),
    ],
)  # fmt: skip
def test_what_nobody_has_said_how_to_count_raises(program):
    with pytest.raises(NotCounted):
        count(program, A.copy())


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x.mean(), lambda x: x.dot(x.T), lambda x: math.exp(x[0, 0]), lambda x: float(x[0, 0]),
        lambda x: np.zeros(4).__setitem__(0, x[0, 0]), lambda x: A[x[0]],
    ],
)  # fmt: skip
def test_there_is_no_other_way_out(program):
    with pytest.raises((AttributeError, TypeError, ValueError, IndexError)):
        count(program, A.copy())


def closed(name, N_q, N_k, d, Bc) -> dict[str, int]:
    """The operations of an algorithm: S scores, and R rows at each step over the keys."""
    S, R = N_q * N_k, N_q * -(-N_k // Bc)
    if name == non_matmul.FA1:
        kinds = dict(exp=S + 2 * R, subtract=S + 2 * R, multiply=S + 3 * R + 2 * R * d, add=R + R * d, divide=R * d)
        kinds |= dict(compare=4 * R, select=4 * R)
    else:
        kinds = dict(exp=S + R, subtract=S + R, multiply=S + R + R * d, add=R + R * d + N_q, divide=N_q * d, log=N_q)
        kinds |= dict(compare=2 * R + 3 * N_q, select=2 * R + 2 * N_q)
    return kinds | dict(max=S, sum=S - R, matmul=4 * S * d)


@pytest.mark.parametrize("name", non_matmul.ALGORITHMS)
@given(N_q=sizes, N_k=sizes, d=sizes, Br=sizes, Bc=sizes)
def test_the_algorithms_are_what_a_closed_formula_says(name, N_q, N_k, d, Br, Bc):
    algorithm = non_matmul.ALGORITHMS[name]
    Q, K, V = (np.random.default_rng(0).standard_normal((n, d), np.float32) for n in (N_q, N_k, N_k))
    results, done = count(algorithm, Q, K, V, Br=Br, Bc=Bc)
    assert {kind: n for kind, n in done.items() if n} == {k: n for k, n in closed(name, N_q, N_k, d, Bc).items() if n}
    for counted, plain in zip(results, algorithm(Q, K, V, Br=Br, Bc=Bc), strict=True):
        assert type(counted) is np.ndarray and counted.dtype == plain.dtype
        np.testing.assert_array_equal(counted, plain)


def test_a_mask_is_counted_too():
    Q, K, V = np.random.default_rng(0).standard_normal((3, 6, 4))
    seen = np.tri(6, k=-1, dtype=bool)  # row 0 sees nothing: no logarithm
    for algorithm, logs in ((flash_attention_1_forward, 0), (flash_attention_2_forward, 5), (standard_attention, 5)):
        options = {} if algorithm is standard_attention else {"Br": 2, "Bc": 3}
        _, without = count(algorithm, Q, K, V, **options)
        results, done = count(algorithm, Q, K, V, seen=seen, **options)
        assert done["log"] == logs and done["select"] - without["select"] == 36
        np.testing.assert_array_equal(results[0], algorithm(Q, K, V, seen=seen, **options)[0])


# ---- the control kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", non_matmul.PAIRS)
def test_a_pair_differs_in_when_O_is_normalised(before, after, torch_device):
    """Eight keys of equal weight and values near the largest float32: their sum overflows, their averages do not."""
    problem, huge = Problem(1, 1, 1, 4, 8, 4), 3e38
    q, k = (torch.zeros(1, N, 1, 4, device=torch_device) for N in (4, 8))
    v = torch.full_like(k, huge)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=torch_device)
    for name, finite in ((before, True), (after, False)):
        O, LSE = torch.empty_like(q), torch.empty(1, 1, 4, device=torch_device)
        with np.errstate(over="ignore"):
            catalog.find(name).launcher(problem, Tile(4, 4), target.device())(problem, q, k, v, seen, O, LSE)
        assert bool(O.isfinite().all()) is finite
        torch.testing.assert_close(LSE, torch.full_like(LSE, math.log(8)))


def test_the_control_moves_what_its_parent_moves():
    variant = catalog.find("fwd_v2_normalised")
    assert (variant.parent, variant.generation, variant.loop_order, variant.default) == (
        "fwd_v2", "v2", "q_outer", False
    )  # fmt: skip
    p = Problem(1, 2, 1, 37, 21, 5, mask=Mask(causal=True))
    assert formulas.traffic("fwd_v2_normalised", p, Tile(8, 4)) == formulas.traffic("fwd_v2", p, Tile(8, 4))


# ---- non_matmul -----------------------------------------------------------------------------------------------------


def test_non_matmul_counts_flops_and_accesses(tmp_path, capfd):
    rows = run(tmp_path, "non_matmul", *SMALL, "--seqlen", 12, "--counted-seqlen", 256, "--br", 8, "--bc", 4)
    counted = [row for row in rows if row["variant"] in non_matmul.ALGORITHMS]
    assert {(row["variant"], row["Bc"]) for row in counted} == {
        (name, Bc) for name in non_matmul.ALGORITHMS for Bc in non_matmul.KEYS
    }
    for row in counted:
        expected = closed(row["variant"], 256, 256, 4, row["Bc"])
        assert {kind: row[f"ops_{kind}"] for kind in KINDS} == {kind: expected.get(kind, 0) for kind in KINDS}
        parts = sum(n for kind, n in expected.items() if kind not in ("matmul", "compare", "select"))
        assert non_matmul.flops(row) == pytest.approx(parts / 256**2)
        assert (row["gate"], row["seconds"], row["reads_total"]) == (None, None, None)
    kernels = {row["variant"]: row for row in rows if row["variant"] not in non_matmul.ALGORITHMS}
    assert set(kernels) == {name for pair in non_matmul.PAIRS for name in pair}
    assert all(row["gate"] == "passed" for row in kernels.values())
    said = " ".join(capfd.readouterr().out.split())
    if SIMULATED:
        for before, after in non_matmul.PAIRS:
            assert tables.total(kernels[before]) == tables.total(kernels[after])
        assert all(tables.agrees(row) for row in kernels.values())
        assert "in each pair as many accesses, counted: what changes is arithmetic alone" in said
        assert "only a GPU can say" in said and "9. holds" in said and "not measurable here" in said


def test_non_matmul_says_what_a_timed_kernel_was_built_as(monkeypatch):
    made = create_autospec(bench.made, return_value={"registers": 96, "blocks_per_sm": 2, "spills": 0})
    monkeypatch.setattr(bench, "made", made)
    monkeypatch.setattr(common, "measure", lambda point: common.empty_row() | {"gate": "passed", "seconds": 1e-3})
    point = common.point(catalog.find("fwd_v2"), Problem(1, 1, 1, 8, 8, 4), Tile(8, 8), target.device(), input="gauss")
    row = non_matmul.measure(point)
    assert (row["registers"], row["blocks_per_sm"]) == (96, 2)


def gpu_rows(module, seconds, **options):
    """The rows of a GPU run where each kernel takes seconds(point); algorithms are counted."""
    given = dict(input=None, seqlen=None, head_dim=None, br=None, bc=None, batch=1, heads=None, seed=0, dtype="fp32")
    for point in module.plan(HOPPER, **given, counters=True, **options):
        row = point.fields() | {"device": "NVIDIA H200", "revision": "abc", "no_counters": None}
        if isinstance(point, non_matmul.Algorithm):
            yield row | non_matmul.measure(point)
            continue
        formula, took = formulas.traffic(point.variant, point.problem, point.tile), seconds(point)
        row |= common.empty_row() | {"formula_reads_total": formula.total_reads, "blocks_per_sm": 2}
        row |= {"formula_writes_total": formula.total_writes, "gate": "passed", "max_error": 1e-6, "seconds": took}
        yield row | {"tflops": point.problem.flops(point.direction) / took * 1e-12}


def test_non_matmul_on_a_gpu_says_what_the_time_says(tmp_path):
    took = {"fwd_v1": 0.5, "fwd_v2_kv_outer": 0.498, "fwd_v2_normalised": 0.06, "fwd_v2": 0.05}
    rows = list(gpu_rows(non_matmul, lambda point: took[point.variant], counted_seqlen=256))
    common.report(non_matmul.EXPERIMENT, rows, tmp_path)
    assert (tmp_path / "non_matmul.png").stat().st_size > 10_000
    assert "blocks" in non_matmul.table(rows) and "TFLOP/s" in non_matmul.table(rows)
    said = non_matmul.answer(rows)
    assert "500 ms become 498 ms, 0.4% less, which does not show" in said
    assert "fwd_v2_normalised to fwd_v2 at N=16384, 60 ms become 50 ms, 16.7% less." in said
    assert non_matmul.claims(rows)[0][1] == "holds"

    # slower, and with fewer blocks on a multiprocessor
    rows = [row | {"seconds": 0.066, "blocks_per_sm": 3} if row["variant"] == "fwd_v2" else row for row in rows]
    assert "10.0% more, but a multiprocessor holds 2 and 3 blocks of them" in non_matmul.answer(rows)

    # what would refute the claim
    dear = [row | {"ops_exp": 9 * row["N"] ** 2} if row["variant"] == non_matmul.FA2 else row for row in rows]
    assert non_matmul.claims(dear)[0][1] == "does not hold" and "more with Bc" in non_matmul.answer(dear)
    more = [row | {"formula_reads_total": 10**12} if row["variant"] == "fwd_v2" else row for row in rows]
    assert "NOT arithmetic alone: fwd_v2_normalised takes" in non_matmul.answer(more)

    # a run that was cut short, a kernel that fails the gate
    kernels = [row for row in rows if row["variant"] not in non_matmul.ALGORITHMS]
    assert non_matmul.claims(kernels)[0][1] == "not yet tested"
    assert "Counted: nothing to compare" in non_matmul.answer(kernels) and non_matmul.draw(kernels)
    failed = [row | {"gate": "failed: O is off"} if row["gate"] else row for row in rows]
    assert "Kernels: nothing to compare" in non_matmul.answer(failed) and non_matmul.draw(failed)


def test_occupancy_stands_beside_a_time(monkeypatch):
    point = non_matmul.plan(target.device(), "gauss", (8,), 64, 4, 4, 4, 1, 1, 0, "fp32", False)[-1]
    monkeypatch.setattr(common, "measure", lambda point: common.empty_row() | {"gate": "passed", "seconds": 1.0})
    monkeypatch.setattr(bench, "made", lambda *_: {"registers": 168, "blocks_per_sm": 3, "spills": 0})
    row = non_matmul.measure(point)
    assert (row["registers"], row["blocks_per_sm"], row["ops_exp"]) == (168, 3, None)


# ---- causal_skip ----------------------------------------------------------------------------------------------------


@given(N=st.integers(1, 40), Br=sizes, Bc=sizes, causal=st.booleans())
def test_tiles_are_those_of_the_matrix_of_seen_pairs(N, Br, Bc, causal):
    p = Problem(1, 1, 1, N, N, 1, mask=Mask(causal))
    seen = p.mask.seen(N, N)
    blocks = [seen[i : i + Br, j : j + Bc] for i in range(0, N, Br) for j in range(0, N, Bc)]
    touched, hidden = [bool(block.any()) for block in blocks], [not block.all() for block in blocks]
    kinds = [causal_skip._kind(i, min(i + Br, N), j, min(j + Bc, N)) for i in range(0, N, Br) for j in range(0, N, Bc)]
    for skips in (True, False):
        visited = touched if skips else [True] * len(blocks)
        masked = sum(v and h for v, h in zip(visited, hidden))
        expected = {"tiles": len(blocks), "tiles_visited": sum(visited), "tiles_masked": masked}
        assert causal_skip.tiles(p, Tile(Br, Bc), skips) == expected
    if causal:
        assert kinds == [2 if not hides else 1 if touches else 0 for touches, hides in zip(touched, hidden)]
    by_keys = sum(len(p.mask.query_blocks(j, Br, Bc, N, N)) for j in range(0, N, Bc))
    assert by_keys == sum(touched)  # bwd_v2 walks down, fwd_v2 across


def test_causal_skip_counts_what_was_visited(tmp_path, capfd):
    rows = run(tmp_path, "causal_skip", *SMALL, "--seqlen", "8,16", "--br", 4, "--bc", 2)
    assert {(row["variant"], row["N"], row["causal"]) for row in rows} == {
        (name, N, causal) for name in causal_skip.SKIPS for N in (8, 16) for causal in (False, True)
    }
    assert all(row["gate"] == "passed" for row in rows)
    said = " ".join(capfd.readouterr().out.split())
    if SIMULATED:
        for row in rows:
            assert tables.agrees(row)
            array, height = ("K", row["Bc"]) if row["variant"] == "fwd_v2" else ("Q", row["Br"])
            assert row[f"reads_{array}"] == row["tiles_visited"] * height * row["d"]  # what a visit streams
        assert "fwd_v2 at N=16, tile 4x2: it visits 20 of 32 tiles, 1.60 times fewer" in said
        assert "fwd_v1 at N=16, tile 4x2: it visits all 32 tiles" in said and "as many as without the mask" in said
        assert "only a GPU can say" in said and "1.7 to 1.8" in said


def test_causal_skip_on_a_gpu_says_what_the_time_says(tmp_path):
    def seconds(point):
        faster = {"fwd_v1": 1.1, "fwd_v2": 1.75, "bwd_v1": 1.5, "bwd_v2": 1.9}[point.variant]
        return 0.1 / faster if point.problem.mask.causal else 0.1

    rows = list(
        gpu_rows(
            causal_skip,
            seconds,
        )
    )
    common.report(causal_skip.EXPERIMENT, rows, tmp_path)
    assert (tmp_path / "causal_skip.png").stat().st_size > 10_000
    assert "× 1.75" in causal_skip.table(rows) and "TFLOP/s" in causal_skip.table(rows)
    said = causal_skip.answer(rows)
    assert "fwd_v2 in time at N=16384: 100 ms become 57.1 ms, 1.75 times as fast, within the paper's span" in said
    assert "1.10 times as fast; it leaves out products, not visits" in said and "only a GPU" not in said
    assert "accesses 1.79 to 1.98" in said

    slow = [row | {"seconds": 0.08} if row["variant"] == "fwd_v2" and row["causal"] else row for row in rows]
    assert "1.25 times as fast, below the paper's span" in causal_skip.answer(slow)
    failed = [row | {"gate": "failed: O is off"} if row["variant"] == "fwd_v2" else row for row in rows]
    assert "fwd_v2: nothing to compare" in causal_skip.answer(failed) and causal_skip.draw(failed)
    failed = [row | {"gate": "failed: O is off"} for row in rows]
    assert causal_skip.draw(failed) and causal_skip.table(failed)


def test_a_failed_gate_is_told(tmp_path, capfd, monkeypatch):
    failed = gate.Verdict(passed=False, max_error=float("nan"), ratio=9.0, why="O is off", traffic=None, launch=None)
    monkeypatch.setattr(gate, "check", lambda *_: failed)
    for name, words in (("causal_skip", []), ("non_matmul", ["--counted-seqlen", "64"])):
        assert main(["run", name, "--out", str(tmp_path), *SMALL, "--seqlen", "8", *words]) == 1
        assert "failed: O is off" in capfd.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal_skip", "non_matmul"])
@pytest.mark.parametrize(
    "words, told",
    [
        (["--seqlen", "0"], "--seqlen"),
        (["--dtype", "fp64"], "fp64"),
        (["--causal"], "--causal"),
        (["--input", "minilm", "--head-dim", "64"], "--head-dim 64"),
        (["--input", "gauss", "--head-dim", "257"], "head_dim d=257"),
        (["--br", "8192", "--seqlen", "8"], "of shared memory"),
    ],
)
def test_refused(name, words, told, tmp_path, capfd):
    assert main(["run", name, "--out", str(tmp_path / "out"), *words]) == 2
    said = capfd.readouterr()
    errors = [line for line in said.err.splitlines() if not line.startswith("sandbox:")]
    assert said.out == "" and len(errors) == 1 and told in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SIMULATED, reason="nothing is too large for a GPU here")
@pytest.mark.parametrize(
    "words", [["causal_skip", "--seqlen", "1048576"], ["non_matmul", "--counted-seqlen", "1048576"]]
)
def test_what_takes_long_asks_for_force(words, tmp_path, capfd):
    assert main(["run", *words, "--input", "gauss", "--out", str(tmp_path / "out")]) == 2
    assert "--force" in capfd.readouterr().err and not (tmp_path / "out").exists()
