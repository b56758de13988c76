"""What each kernel must move through global memory, from its loops alone.  [floor 3: no kernel imports this]

The counter (traffic.py) says what a launch did; a formula says what the paper's loops ask for.  They are written apart
and must be equal to the element, for any N_q, N_k, d, Br, Bc, dividing or not.

Two sums over the tiles of S describe a walk; the rest is arithmetic.  Where nothing is masked they are

    K_rows = Tr * N_k    rows of K that a q_outer kernel loads: every row block i streams all keys
    Q_rows = Tc * N_q    rows of Q that a kv_outer kernel loads: every key block j streams all queries

which is the table of definitions.md; a band (causal, window) takes its empty tiles out of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..mask import Mask
from ..problem import Problem
from ..variant import Tile
from .traffic import Traffic

WARPGROUP_ROWS = 64  # of fwd_v3
FP32 = ("LSE", "L", "l", "m", "D", "O_acc", "dQ_acc")  # whatever the inputs are; X_acc is X while it is being summed


@dataclass(frozen=True)
class Walk:
    """The tiles of S that one head's loops visit.

    Tr, Tc        blocks of rows, blocks of keys
    K_rows        sum over row blocks i of the keys in the tiles that i touches
    Q_rows        sum over key blocks j of the rows in the tiles that j touches
    blind_rows    rows in row blocks that touch no tile at all
    blind         such row blocks
    K_seen        keys in key blocks that at least one row block touches
    visits        pairs of a key block and a row block that it touches
    """

    Tr: int
    Tc: int
    K_rows: int
    Q_rows: int
    blind_rows: int
    blind: int
    K_seen: int
    visits: int


def walk(p: Problem, tile: Tile, rounded: bool = False) -> Walk:
    """rounded: of a kernel that compares blocks: it visits a tile, too, that only rows or keys past the end see."""
    Br, Bc, N_q, N_k = tile.Br, tile.Bc, p.N_q, p.N_k
    key_blocks, query_blocks = (_key_blocks, _query_blocks) if rounded else (Mask.key_blocks, Mask.query_blocks)
    Tr, Tc = -(-N_q // Br), -(-N_k // Bc)
    K_rows = Q_rows = blind_rows = blind = K_seen = visits = 0
    for i in range(Tr):
        blocks = key_blocks(p.mask, i * Br, Br, Bc, N_q, N_k)
        K_rows += min(blocks.stop * Bc, N_k) - blocks.start * Bc if blocks else 0
        blind_rows += 0 if blocks else min(Br, N_q - i * Br)
        blind += not blocks
    for j in range(Tc):
        blocks = query_blocks(p.mask, j * Bc, Br, Bc, N_q, N_k)
        Q_rows += min(blocks.stop * Br, N_q) - blocks.start * Br if blocks else 0
        K_seen += min(Bc, N_k - j * Bc) if blocks else 0
        visits += len(blocks)
    return Walk(Tr, Tc, K_rows, Q_rows, blind_rows, blind, K_seen, visits)


def _key_blocks(mask: Mask, i0: int, Br: int, Bc: int, N_q: int, N_k: int) -> range:
    lo, hi = mask.band(N_q, N_k)
    return range(max(0, i0 + lo) // Bc, -(-min(N_k, min(i0 + Br, N_q) + hi) // Bc))


def _query_blocks(mask: Mask, j0: int, Br: int, Bc: int, N_q: int, N_k: int) -> range:
    lo, hi = mask.band(N_q, N_k)
    return range(max(0, j0 - hi) // Br, -(-min(N_q, min(j0 + Bc, N_k) - lo) // Br))


# ---- forward: (reads, writes) of the whole launch ------------------------------------------------------------------


def fwd_q_outer(p: Problem, tile: Tile, rounded: bool = False):
    """fwd_v2, fwd_v2_one_block: Q once, O once; K and V again for every row block."""
    w, heads = walk(p, tile, rounded), p.B * p.H
    reads = {"Q": p.N_q * p.d, "K": w.K_rows * p.d, "V": w.K_rows * p.d}
    writes = {"O": p.N_q * p.d, "LSE": p.N_q}
    return _times(heads, reads), _times(heads, writes)


def fwd_v2_mma(p: Problem, tile: Tile):
    return fwd_q_outer(p, tile, rounded=True)


def fwd_v3(p: Problem, tile: Tile):
    """As fwd_q_outer, but under a band it is the first row block that goes over the edge, by whole warpgroups' rows;
    and one that sees nothing takes a key block all the same; with no key at all, a row."""
    (Br, Bc), Tr, K_rows = (tile.Br, tile.Bc), -(-p.N_q // tile.Br), 0
    before = (Tr * Br - p.N_q) // WARPGROUP_ROWS * WARPGROUP_ROWS if p.mask.banded else 0
    for i in range(Tr):
        first, end = max(0, i * Br - before), (i + 1) * Br - before
        blocks = p.mask.key_blocks(first, end - first, Bc, p.N_q, p.N_k) or range(1)
        K_rows += min(blocks.stop * Bc, max(1, p.N_k)) - blocks.start * Bc
    reads = {"Q": p.N_q * p.d, "K": K_rows * p.d, "V": K_rows * p.d}
    return _times(p.B * p.H, reads), _times(p.B * p.H, {"O": p.N_q * p.d, "LSE": p.N_q})


def fwd_v1(p: Problem, tile: Tile):
    """Every tile is visited; K and V once, while Q, O, l, m pass through global memory at every key block; without
    rows nothing is launched."""
    heads = p.B * p.H if p.N_q else 0
    Tc = max(1, walk(p, tile).Tc)  # with no key at all, one empty visit still writes O = 0
    again = (Tc - 1) * p.N_q  # rows that come back: the first visit starts on chip
    reads = {"Q": Tc * p.N_q * p.d, "K": p.N_k * p.d, "V": p.N_k * p.d, "O_acc": again * p.d, "l": again, "m": again}
    writes = {"O_acc": again * p.d, "O": p.N_q * p.d, "l": Tc * p.N_q, "m": Tc * p.N_q, "LSE": p.N_q}
    return _times(heads, reads), _times(heads, writes)


def fwd_v2_kv_outer(p: Problem, tile: Tile):
    """As fwd_v1, but only where a tile holds a seen pair; a row block that sees nothing is visited once, at j = 0."""
    w, heads = walk(p, tile), p.B * p.H
    rows = w.Q_rows + w.blind_rows
    again = rows - p.N_q
    reads = {"Q": rows * p.d, "K": w.K_seen * p.d, "V": w.K_seen * p.d, "O_acc": again * p.d, "l": again, "m": again}
    writes = {"O_acc": again * p.d, "O": p.N_q * p.d, "l": rows, "m": rows, "LSE": p.N_q}
    return _times(heads, reads), _times(heads, writes)


# ---- backward: Q, dO, O, LSE, D, dQ move once per query head, K, V, dK, dV once per key/value head ------------------


def bwd_v1(p: Problem, tile: Tile):
    """Every tile is visited; dQ passes through global memory, and D = rowsum(dO * O) is formed again at each visit."""
    heads, kv_heads = p.B * p.H, p.B * p.H_kv
    Tc = max(1, walk(p, tile).Tc)
    rows, again = Tc * p.N_q, (Tc - 1) * p.N_q
    reads = _times(heads, {"Q": rows * p.d, "dO": rows * p.d, "O": rows * p.d, "LSE": rows, "dQ_acc": again * p.d})
    reads |= _times(kv_heads, {"K": p.N_k * p.d, "V": p.N_k * p.d})
    writes = _times(heads, {"dQ_acc": again * p.d, "dQ": p.N_q * p.d})
    writes |= _times(kv_heads, {"dK": p.N_k * p.d, "dV": p.N_k * p.d})
    return reads, writes


def bwd_v2(p: Problem, tile: Tile):
    """Preprocess (D, and dQ = 0), then key blocks side by side adding to dQ, then, for 16-bit dtypes, dQ's conversion.

    An atomic add counts as one read and one write.
    """
    w, heads, kv_heads = walk(p, tile), p.B * p.H, p.B * p.H_kv
    once, added = p.N_q * p.d, w.Q_rows * p.d
    convert = once if p.dtype != "fp32" else 0
    reads = _times(heads, {"O": once, "dO": once + w.Q_rows * p.d, "Q": w.Q_rows * p.d, "LSE": w.Q_rows, "D": w.Q_rows})
    reads |= _times(heads, {"dQ_acc": added + convert})
    reads |= _times(kv_heads, {"K": p.N_k * p.d, "V": p.N_k * p.d})
    writes = _times(heads, {"D": p.N_q, "dQ_acc": once + added, "dQ": convert})
    writes |= _times(kv_heads, {"dK": p.N_k * p.d, "dV": p.N_k * p.d})
    return reads, writes


def bwd_v2_deterministic(p: Problem, tile: Tile):
    """Preprocess (D), a key-outer kernel for dK and dV, a query-outer kernel for dQ: everything is read twice over."""
    w, heads, kv_heads = walk(p, tile), p.B * p.H, p.B * p.H_kv
    once = p.N_q * p.d
    reads = _times(heads, {"O": once, "Q": w.Q_rows * p.d + once, "dO": once + w.Q_rows * p.d + once})
    reads |= _times(heads, {"LSE": w.Q_rows + p.N_q, "D": w.Q_rows + p.N_q})
    for array in ("K", "V"):
        reads[array] = (kv_heads * p.N_k + heads * w.K_rows) * p.d
    writes = _times(heads, {"D": p.N_q, "dQ": once}) | _times(kv_heads, {"dK": p.N_k * p.d, "dV": p.N_k * p.d})
    return reads, writes


def bwd_v2_mma(p: Problem, tile: Tile):
    """As bwd_v2, but L and D, and dQ while it is summed, have whole row blocks, and dQ columns of zeros, too."""
    from ..device.layout import wide_of

    w, heads, kv_heads = walk(p, tile, rounded=True), p.B * p.H, p.B * p.H_kv
    once, all_rows = p.N_q * p.d, w.Tr * tile.Br
    wide = wide_of(p.d)
    reads, writes = _rowsum(p, all_rows)
    visited = w.visits * tile.Br  # whole row blocks, past the end too
    reads |= {"Q": w.Q_rows * p.d, "dO": once + w.Q_rows * p.d, "L": visited, "D": visited}
    reads |= {"dQ_acc": (visited + all_rows) * wide}
    writes |= {"dQ_acc": (all_rows + visited) * wide, "dQ": once}
    keys = {"K": p.N_k * p.d, "V": p.N_k * p.d}
    gradients = {"dK": p.N_k * p.d, "dV": p.N_k * p.d}
    return _times(heads, reads) | _times(kv_heads, keys), _times(heads, writes) | _times(kv_heads, gradients)


def bwd_v2_mma_deterministic(p: Problem, tile: Tile):
    """As bwd_v2_deterministic, but L and D have whole row blocks, dQ's kernel has a tile of its own, and there the four
    lanes that share a row read its L and D each."""
    from ..device.layout import chosen_dQ

    of_dQ = chosen_dQ(p, tile)
    rows = Tile(of_dQ.rows * of_dQ.warps, of_dQ.keys)
    w, by_rows = (walk(p, one, rounded=True) for one in (tile, rows))
    heads, kv_heads = p.B * p.H, p.B * p.H_kv
    once, most = p.N_q * p.d, max(tile.Br, rows.Br)
    reads, writes = _rowsum(p, -(-p.N_q // most) * most)
    statistics = w.visits * tile.Br + 4 * by_rows.Tr * rows.Br
    reads |= {"Q": w.Q_rows * p.d + once, "dO": once + w.Q_rows * p.d + once, "L": statistics, "D": statistics}
    keys = (kv_heads * p.N_k + heads * by_rows.K_rows) * p.d
    gradients = {"dK": p.N_k * p.d, "dV": p.N_k * p.d}
    reads, writes = _times(heads, reads), _times(heads, writes | {"dQ": once})
    return reads | {"K": keys, "V": keys}, writes | _times(kv_heads, gradients)


def _rowsum(p: Problem, rows: int):
    """(reads, writes) of one head: L = LSE · log2 e and D = rowsum(dO ∘ O), for so many rows."""
    return {"O": p.N_q * p.d, "dO": p.N_q * p.d, "LSE": p.N_q}, {"L": rows, "D": rows}


FORMULAS: dict[str, Callable] = {
    "fwd_v1": fwd_v1,
    "fwd_v1_mma": fwd_v1,
    "fwd_v2": fwd_q_outer,
    "fwd_v2_one_block": fwd_q_outer,
    "fwd_v2_normalised": fwd_q_outer,
    "fwd_v2_mma": fwd_v2_mma,
    "fwd_v2_mma_split_k": fwd_v2_mma,
    "fwd_v2_kv_outer": fwd_v2_kv_outer,
    "fwd_v3": fwd_v3,
    "bwd_v1": bwd_v1,
    "bwd_v2": bwd_v2,
    "bwd_v2_deterministic": bwd_v2_deterministic,
    "bwd_v2_mma": bwd_v2_mma,
    "bwd_v2_mma_deterministic": bwd_v2_mma_deterministic,
}


def traffic(name: str, p: Problem, tile: Tile) -> Traffic | None:
    """What variant `name` must move; None where no formula knows (a new kernel, or a boolean mask: it is data)."""
    if name not in FORMULAS or p.mask.boolean:
        return None
    return _traffic(p, *FORMULAS[name](p, tile))


SOFTMAX_READS = {"softmax_safe": 3, "softmax_online": 2, "softmax_tiled": 2}  # passes over a row; one of them writes


def softmax(name: str, rows: int, columns: int) -> Traffic | None:
    """Elements that a softmax alone moves, X [rows, columns] -> Y; of float32."""
    if name not in SOFTMAX_READS:
        return None
    n = rows * columns
    return Traffic({"X": SOFTMAX_READS[name] * n}, {"Y": n}, 4 * SOFTMAX_READS[name] * n, 4 * n)


# ---- beside the kernels: the unfused way, and the theorem ----------------------------------------------------------


def standard(p: Problem, direction: str = "fwd") -> Traffic:
    """Standard attention, one kernel per step (FA1 Algorithms 0 and 3), each reading its operands once: its floor.

    forward   S = Q K^T | P = softmax(S) | O = P V
    backward  dV = P^T dO | dP = dO V^T | dS from P and dP | dQ = dS K | dK = dS^T Q
    """
    q, k, s = p.B * p.H * p.N_q * p.d, p.B * p.H_kv * p.N_k * p.d, p.B * p.H * p.N_q * p.N_k
    if direction == "fwd":
        reads, writes = {"Q": q, "K": k, "S": s, "P": s, "V": k}, {"S": s, "P": s, "O": q}
    else:
        reads = {"P": 2 * s, "dO": 2 * q, "V": k, "dP": s, "dS": 2 * s, "K": k, "Q": q}
        writes = {"dV": k, "dP": s, "dS": s, "dQ": q, "dK": k}
    return _traffic(p, reads, writes)


def theorem(p: Problem, M: int) -> dict[str, float]:
    """FA1 Theorem 2, without its constants: accesses of FlashAttention with M elements of on-chip memory, and of
    standard attention.  N^2 d^2 / M against N d + N^2, over all heads."""
    heads = p.B * p.H
    return {
        "flash": heads * p.N_q * p.N_k * p.d**2 / M,
        "standard": heads * ((p.N_q + p.N_k) / 2 * p.d + p.N_q * p.N_k),
    }


def on_chip(p: Problem, block: int) -> int:
    """The M whose block is this: FA1 Algorithm 1 sets Bc = M / 4d, so that K, V, Q and O blocks of that height fit."""
    return 4 * p.d * block


def _times(factor: int, counts: dict[str, int]) -> dict[str, int]:
    return {array: factor * count for array, count in counts.items()}


def _traffic(p: Problem, reads: dict[str, int], writes: dict[str, int]) -> Traffic:
    return Traffic(_letters(reads), _letters(writes), _bytes(p, reads), _bytes(p, writes))


def _letters(counts: dict[str, int]) -> dict[str, int]:
    """X_acc is X."""
    letters = Counter()
    for array, count in counts.items():
        letters[array.removesuffix("_acc")] += count
    return dict(letters)


def _bytes(p: Problem, counts: dict[str, int]) -> int:
    return sum(count * (4 if array in FP32 else p.itemsize) for array, count in counts.items())
