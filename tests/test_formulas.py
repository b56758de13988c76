"""The traffic formulas against a walk that goes from tile to tile and ticks off every row it would load or store."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import catalog, target
from sandbox.mask import Mask
from sandbox.measure import formulas, gate
from sandbox.problem import Problem
from sandbox.variant import Tile

sizes = st.integers(0, 40)
windows = st.one_of(st.just((-1, -1)), st.tuples(st.integers(-1, 30), st.integers(-1, 30)))
masks = st.builds(Mask, st.booleans(), st.sampled_from(["bottom_right", "top_left"]), windows)
tiles = st.builds(Tile, st.integers(1, 20), st.integers(1, 20))
of_warpgroups = st.builds(Tile, st.sampled_from([128, 192, 256]), st.integers(1, 20))
counted_here = pytest.mark.skipif(target.KIND != "simulator", reason="accesses are counted on the simulator")


@st.composite
def problems(draw, masks=masks):
    """For the kernels that take any."""
    H_kv = draw(st.integers(1, 2))
    return Problem(
        B=draw(st.integers(0, 2)),
        H=H_kv * draw(st.integers(1, 3)),
        H_kv=H_kv,
        N_q=draw(sizes),
        N_k=draw(sizes),
        d=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(["fp32", "fp16"])),
        mask=draw(masks),
    )


@st.composite
def launches_on_tensor_cores(draw, variant):
    """(problem, tile): fewer heads and one head_dim, since a warp's products take the simulator long."""
    H_kv, (N_q, N_k) = draw(st.integers(1, 2)), draw(st.tuples(sizes, st.integers(0, 70)))
    dtype, mask = draw(st.sampled_from(["fp16", "bf16"])), draw(masks)
    problem = Problem(1, H_kv * draw(st.integers(1, 2)), H_kv, N_q, N_k, 32, dtype, mask=mask)
    return problem, draw(st.sampled_from([tile for tile in variant.tiles if tile.Br * tile.Bc <= 1024]))


class Walker:
    """The blocks of S, and which tiles hold a seen pair, straight from the matrix of seen pairs."""

    def __init__(self, p: Problem, tile: Tile):
        self.p, self.d, self.tile = p, p.d, tile
        self.seen = p.mask.seen(p.N_q, p.N_k)
        rows, keys = np.arange(p.N_q + tile.Br)[:, None], np.arange(p.N_k + tile.Bc)
        lo, hi = (x if abs(x) < p.N_q + p.N_k else 1000 * x for x in p.mask.band(p.N_q, p.N_k))  # or unbounded
        self.band = (keys >= rows + lo) & (keys <= rows + hi)  # past the end, too
        self.row_blocks = [(i, min(i + tile.Br, p.N_q)) for i in range(0, p.N_q, tile.Br)]
        self.key_blocks = [(j, min(j + tile.Bc, p.N_k)) for j in range(0, p.N_k, tile.Bc)]
        self.reads, self.writes = Counter(), Counter()

    def touches(self, rows, keys) -> bool:
        return bool(self.seen[rows[0] : rows[1], keys[0] : keys[1]].any())

    def whole_rows_touch(self, rows, keys) -> bool:
        return bool(self.band[rows[0] : rows[0] + self.tile.Br, keys[0] : keys[1]].any())

    def touch_whole_keys(self, rows, keys) -> bool:
        return bool(self.band[rows[0] : rows[1], keys[0] : keys[0] + self.tile.Bc].any())

    def load(self, block, *arrays):
        self._tick(self.reads, block, arrays)

    def store(self, block, *arrays):
        self._tick(self.writes, block, arrays)

    def _tick(self, counts, block, arrays):
        for array in arrays:
            counts[array] += (block[1] - block[0]) * (1 if array in ("l", "m", "LSE", "L", "D") else self.d)

    def whole(self, block) -> tuple[int, int]:
        """A row block with the rows past the end."""
        return block[0], block[0] + self.tile.Br


def walk_q_outer(w, touches=Walker.touches):
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.load(rows, "Q")
            for keys in w.key_blocks:
                if touches(w, rows, keys):
                    w.load(keys, "K", "V")
            w.store(rows, "O", "LSE")


def walk_v3(w):
    over = -w.p.N_q % w.tile.Br // 64 * 64 if w.p.mask.banded else 0  # rows that the first row block has none of
    starts = range(-over, w.p.N_q, w.tile.Br)
    for _ in range(w.p.B * w.p.H):
        for rows in [(max(i, 0), min(i + w.tile.Br, w.p.N_q)) for i in starts]:
            w.load(rows, "Q")
            seen = [keys for keys in w.key_blocks if w.touches(rows, keys)]
            for keys in seen or w.key_blocks[:1] or [(0, 1)]:
                w.load(keys, "K", "V")
            w.store(rows, "O", "LSE")


def walk_kv_outer(w, skip):
    key_blocks = w.key_blocks or [(0, 0)]
    for _ in range(w.p.B * w.p.H if w.row_blocks else 0):
        visited = set()
        for j, keys in enumerate(key_blocks):
            blind = [rows for rows in w.row_blocks if not any(w.touches(rows, k) for k in key_blocks)]
            visits = [rows for rows in w.row_blocks if not skip or w.touches(rows, keys) or (j == 0 and rows in blind)]
            if not skip or any(w.touches(rows, keys) for rows in w.row_blocks):
                w.load(keys, "K", "V")
            for rows in visits:
                w.load(rows, "Q")
                if rows in visited:
                    w.load(rows, "O", "l", "m")
                visited.add(rows)
                w.store(rows, "O", "l", "m")
        for rows in w.row_blocks:
            w.store(rows, "LSE")


def walk_bwd_v1(w):
    for _ in range(w.p.B * w.p.H_kv):
        for j, keys in enumerate(w.key_blocks or [(0, 0)]):
            w.load(keys, "K", "V")
            for _ in range(w.p.group):
                for rows in w.row_blocks:
                    w.load(rows, "Q", "dO", "O", "LSE")
                    if j > 0:
                        w.load(rows, "dQ")
                    w.store(rows, "dQ")
            w.store(keys, "dK", "dV")


def walk_preprocess(w):
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.load(rows, "O", "dO")
            w.store(rows, "D")


def walk_dkdv(w, add_dQ):
    for _ in range(w.p.B * w.p.H_kv):
        for keys in w.key_blocks:
            w.load(keys, "K", "V")
            for _ in range(w.p.group):
                for rows in w.row_blocks:
                    if w.touches(rows, keys):
                        w.load(rows, "Q", "dO", "LSE", "D")
                        if add_dQ:
                            w.load(rows, "dQ")
                            w.store(rows, "dQ")
            w.store(keys, "dK", "dV")


def walk_bwd_v2(w):
    walk_preprocess(w)
    walk_dkdv(w, add_dQ=True)
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.store(rows, "dQ")  # zeroed by the preprocess kernel
            if w.p.dtype != "fp32":
                w.load(rows, "dQ")
                w.store(rows, "dQ")


def walk_bwd_v2_deterministic(w):
    walk_preprocess(w)
    walk_dkdv(w, add_dQ=False)
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.load(rows, "Q", "dO", "LSE", "D")
            for keys in w.key_blocks:
                if w.touches(rows, keys):
                    w.load(keys, "K", "V")
            w.store(rows, "dQ")


def walk_rowsum(w, whole_blocks_of):
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.load(rows, "O", "dO", "LSE")
        w.store((0, -(-w.p.N_q // whole_blocks_of) * whole_blocks_of), "L", "D")


def walk_dkdv_mma(w, add_dQ):
    for _ in range(w.p.B * w.p.H_kv):
        for keys in w.key_blocks:
            w.load(keys, "K", "V")
            for _ in range(w.p.group):
                for rows in w.row_blocks:
                    if w.whole_rows_touch(rows, keys):
                        w.load(rows, "Q", "dO")
                        w.load(w.whole(rows), "L", "D")
                        if add_dQ:
                            w.load(w.whole(rows), "dQ")
                            w.store(w.whole(rows), "dQ")
            w.store(keys, "dK", "dV")


def walk_bwd_v2_mma(w):
    walk_rowsum(w, w.tile.Br)
    walk_dkdv_mma(w, add_dQ=True)
    for _ in range(w.p.B * w.p.H):
        for rows in w.row_blocks:
            w.store(w.whole(rows), "dQ")  # zeroed
            w.load(w.whole(rows), "dQ")  # converted
            w.store(rows, "dQ")


def walk_bwd_v2_mma_deterministic(w):
    """dQ by blocks of 16 rows and 16 keys, where the tile is as small as here."""
    walk_rowsum(w, max(w.tile.Br, 16))
    walk_dkdv_mma(w, add_dQ=False)
    of_dQ = Walker(w.p, Tile(16, 16))
    for _ in range(w.p.B * w.p.H):
        for rows in of_dQ.row_blocks:
            w.load(rows, "Q", "dO")
            for _ in range(4):  # lanes that share a row
                w.load(of_dQ.whole(rows), "L", "D")
            for keys in of_dQ.key_blocks:
                if of_dQ.touch_whole_keys(rows, keys):
                    w.load(keys, "K", "V")
            w.store(rows, "dQ")


WALKS = {
    "fwd_v1": lambda w: walk_kv_outer(w, skip=False),
    "fwd_v1_mma": lambda w: walk_kv_outer(w, skip=False),
    "fwd_v2": walk_q_outer,
    "fwd_v2_one_block": walk_q_outer,
    "fwd_v2_normalised": walk_q_outer,
    "fwd_v2_mma": lambda w: walk_q_outer(w, Walker.touch_whole_keys),
    "fwd_v2_mma_split_k": lambda w: walk_q_outer(w, Walker.touch_whole_keys),
    "fwd_v3": walk_v3,
    "fwd_v2_kv_outer": lambda w: walk_kv_outer(w, skip=True),
    "bwd_v1": walk_bwd_v1,
    "bwd_v2": walk_bwd_v2,
    "bwd_v2_deterministic": walk_bwd_v2_deterministic,
    "bwd_v2_mma": walk_bwd_v2_mma,
    "bwd_v2_mma_deterministic": walk_bwd_v2_mma_deterministic,
}
ON_TENSOR_CORES = [name for name in WALKS if "mma" in name]


def moved(counts) -> dict[str, int]:
    return {array: count for array, count in counts.items() if count}


@pytest.mark.parametrize("name", WALKS)
@given(problem=problems(), data=st.data())
def test_formula_equals_the_walk(name, problem, data):
    tile = data.draw(of_warpgroups if name == "fwd_v3" else tiles)
    walker = Walker(problem, tile)
    WALKS[name](walker)
    formula = formulas.traffic(name, problem, tile)
    assert moved(formula.reads) == moved(walker.reads)
    assert moved(formula.writes) == moved(walker.writes)
    assert formula.total == sum(walker.reads.values()) + sum(walker.writes.values())


def check_counted(name, p, tile):
    """Whatever the numbers in Q, K, V are: the walk depends on the shapes alone."""
    from sandbox.device import simulator

    variant, inputs = catalog.find(name), gate.gaussian(p, seed=0)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(p.B, p.H, 1, 1)
    O, LSE = torch.zeros_like(inputs.q), torch.zeros(p.B, p.H, p.N_q)
    gradients = [inputs.dO, *(torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v))]
    with simulator.counting() as counted:
        variant.launcher(p, tile, target.device())(
            p, inputs.q, inputs.k, inputs.v, seen, O, LSE, *(gradients if variant.direction == "bwd" else [])
        )
    formula = formulas.traffic(name, p, tile)
    assert moved(counted.reads) == moved(formula.reads)
    assert moved(counted.writes) == moved(formula.writes)
    assert (counted.read_bytes, counted.write_bytes) == (formula.read_bytes, formula.write_bytes)


@counted_here
@pytest.mark.parametrize("name", [name for name in WALKS if not catalog.find(name).tiles])  # fwd_v3: test_hopper.py
@given(problem=problems(), tile=tiles)
def test_counted_equals_the_formula(name, problem, tile):
    check_counted(name, problem, tile)


@counted_here
@pytest.mark.parametrize("name", ON_TENSOR_CORES)
@settings(max_examples=min(10, settings.default.max_examples))
@given(data=st.data())
def test_counted_equals_the_formula_on_tensor_cores(name, data):
    check_counted(name, *data.draw(launches_on_tensor_cores(catalog.find(name))))


@counted_here
@pytest.mark.parametrize("N_q, N_k", [(0, 70), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", [name for name in WALKS if name != "fwd_v3"])
def test_counted_without_rows_or_keys(name, N_q, N_k):
    tile = next(iter(catalog.find(name).tiles), Tile(16, 16))
    check_counted(name, Problem(1, 2, 1, N_q, N_k, 32, "fp16"), tile)


@counted_here
@pytest.mark.parametrize("name", formulas.SOFTMAX_READS)
@given(rows=st.integers(0, 9), columns=st.integers(0, 30))
def test_counted_equals_the_formula_for_softmax(name, rows, columns):
    counted = gate.check_softmax(catalog.find(name), torch.zeros(rows, columns), target.device()).traffic
    formula = formulas.softmax(name, rows, columns)
    assert (moved(counted.reads), moved(counted.writes)) == (moved(formula.reads), moved(formula.writes))
    assert (counted.read_bytes, counted.write_bytes) == (formula.read_bytes, formula.write_bytes)


def test_every_formula_is_walked():
    assert set(WALKS) == set(formulas.FORMULAS)


@given(problem=problems(masks=st.just(Mask())).filter(lambda p: p.N_q and p.N_k and p.B), tile=tiles)
def test_the_table_of_the_definitions(problem, tile):
    p, heads = problem, problem.B * problem.H
    Tr, Tc = -(-p.N_q // tile.Br), -(-p.N_k // tile.Bc)

    q_outer = formulas.traffic("fwd_v2", p, tile)
    assert q_outer.reads == {
        "Q": heads * p.N_q * p.d, "K": heads * Tr * p.N_k * p.d, "V": heads * Tr * p.N_k * p.d
    }  # fmt: skip
    assert q_outer.writes == {"O": heads * p.N_q * p.d, "LSE": heads * p.N_q}

    for name in ("fwd_v1", "fwd_v2_kv_outer"):
        kv_outer = formulas.traffic(name, p, tile)
        assert kv_outer.reads == {
            "Q": heads * Tc * p.N_q * p.d, "K": heads * p.N_k * p.d, "V": heads * p.N_k * p.d,
            "O": heads * (Tc - 1) * p.N_q * p.d, "l": heads * (Tc - 1) * p.N_q, "m": heads * (Tc - 1) * p.N_q,
        }  # fmt: skip
        assert kv_outer.writes == {
            "O": heads * Tc * p.N_q * p.d, "l": heads * Tc * p.N_q, "m": heads * Tc * p.N_q, "LSE": heads * p.N_q
        }  # fmt: skip


def test_bytes_count_the_statistics_in_fp32():
    p = Problem(1, 1, 1, 8, 8, 4, dtype="fp16")
    traffic = formulas.traffic("fwd_v2", p, Tile(8, 8))
    assert traffic.read_bytes == 3 * 32 * 2
    assert traffic.write_bytes == 32 * 2 + 8 * 4


def test_no_formula_for_data_dependent_or_unknown_kernels():
    p = Problem(1, 1, 1, 8, 8, 4)
    assert formulas.traffic("my_idea", p, Tile(4, 4)) is None
    assert formulas.traffic("fwd_v2", Problem(1, 1, 1, 8, 8, 4, mask=Mask(boolean=True)), Tile(4, 4)) is None


def test_standard_attention_moves_S_and_P_and_the_theorem_says_when_that_is_worse():
    p = Problem(1, 1, 1, 1024, 1024, 64)
    assert formulas.standard(p).total == 4 * 1024 * 64 + 4 * 1024**2
    assert formulas.standard(p, "bwd").total == 8 * 1024 * 64 + 7 * 1024**2
    accesses = formulas.theorem(p, M=formulas.on_chip(p, 64))
    assert accesses == {"flash": 1024 * 1024 * 64 / 256, "standard": 1024 * 64 + 1024**2}
    # the kernels follow the theorem: twice the block, half the accesses (but for the terms that do not depend on it)
    once = 4 * 1024 * 64 + 1024
    small, large = (formulas.traffic("fwd_v2", p, Tile(Br, 64)).total for Br in (32, 64))
    assert abs((small - once) / (large - once) - 2) < 0.1
