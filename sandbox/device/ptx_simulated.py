"""The instructions of ptx.py lane by lane on the simulator: the layout of each, its meetings, what it touches."""

from __future__ import annotations

import numpy as np
from numba import cuda

from . import copies_simulated as copies
from .cuda_simulated import register
from .memory_simulated import SimulatorError
from .scalar import to_bf16

ROW, HALF = np.arange(32) % 16, np.arange(32) // 16  # of a block: the row and the half of it that a lane points at


def _lane() -> int:
    return cuda.threadIdx.x % 32


def _check(tile, row, column):
    if row % 8 or column % 16 or tile.shape[1] % 16:
        raise SimulatorError(f"block ({row}, {column}) of {tile.name}{list(tile.shape)}: rows by 8, columns by 16")


def _word(low, high) -> np.uint32:
    return np.uint32(int(low) | int(high) << 16)


def _halves(word) -> tuple[int, int]:
    return int(word) & 0xFFFF, int(word) >> 16


def _own(lane: int, word: int, trans: bool) -> list[tuple[int, int]]:
    """(row, column) in the 16 x 16 block of the two numbers of a lane's word."""
    g, t = lane // 4, 2 * (lane % 4)
    row, column = 8 * (word % 2), 8 * (word // 2)
    return [(row + t + e, column + g) if trans else (row + g, column + t + e) for e in (0, 1)]


_OWN = {trans: [[_own(lane, w, trans) for w in range(4)] for lane in range(32)] for trans in (False, True)}


@register
def _read(tile, row, column, trans):
    _check(tile, row, column)
    lane = _lane()
    r, c = int(row + ROW[lane]), int(column + 8 * HALF[lane])
    lanes = cuda.exchange([tile[r, c + e] for e in range(8)])
    return tuple(
        _word(*(lanes[r + 16 * (c // 8)][c % 8] for r, c in _OWN[trans][lane][word])) for word in range(4)
    )  # fmt: skip


@register
def _write(tile, row, column, words, trans):
    _check(tile, row, column)
    lane = _lane()
    lanes = cuda.exchange(words)
    if "block" not in lanes:
        block = lanes["block"] = np.empty((16, 16), np.uint16)
        for giver in range(32):
            for word, places in zip(lanes[giver], _OWN[trans][giver]):
                for place, bits in zip(places, _halves(word)):
                    block[place] = bits
    r, c = int(ROW[lane]), int(8 * HALF[lane])
    for e in range(8):
        tile[row + r, column + c + e] = lanes["block"][r, c + e]


def ldmatrix(tile, row, column):
    return _read(tile, row, column, False)


def ldmatrix_right(tile, row, column):
    w0, w1, w2, w3 = _read(tile, row, column, False)
    return w0, w2, w1, w3


def ldmatrix_trans(tile, row, column):
    return _read(tile, row, column, True)


def ldmatrix_trans_right(tile, row, column):
    w0, w1, w2, w3 = _read(tile, row, column, True)
    return w0, w2, w1, w3


def stmatrix(tile, row, column, words):
    _write(tile, row, column, words, False)


def stmatrix_trans(tile, row, column, words):
    _write(tile, row, column, words, True)


def _floats_fp16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def _floats_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


_G, _T = np.arange(32) // 4, 2 * (np.arange(32) % 4)


@register
def _mma(A, B, C, floats):
    lanes, lane = cuda.exchange((A, B)), _lane()
    if "product" not in lanes:
        a, b = np.empty((16, 16), np.uint16), np.empty((16, 8), np.uint16)
        words_a = np.array([lanes[i][0] for i in range(32)], np.uint32)
        words_b = np.array([lanes[i][1] for i in range(32)], np.uint32)
        for e in (0, 1):
            for w in range(4):
                a[_G + 8 * (w % 2), _T + 8 * (w // 2) + e] = words_a[:, w] >> 16 * e & 0xFFFF
            for w in range(2):
                b[_T + 8 * w + e, _G] = words_b[:, w] >> 16 * e & 0xFFFF
        lanes["product"] = floats(a) @ floats(b)
    product, g, t = lanes["product"], lane // 4, 2 * (lane % 4)
    return C[0] + product[g, t], C[1] + product[g, t + 1], C[2] + product[g + 8, t], C[3] + product[g + 8, t + 1]


def mma_fp16(A, B, C):
    return _mma(A, B, C, _floats_fp16)


def mma_bf16(A, B, C):
    return _mma(A, B, C, _floats_bf16)


def pack_fp16(low, high):
    return _word(*np.array([low, high], np.float16).view(np.uint16))


def pack_bf16(low, high):
    return _word(*(int(to_bf16(x)) & 0xFFFF for x in (low, high)))


def copy_chunk(tile, r, X, n, y, x, down, right, seen):
    if x % 8 or right % 8:
        raise SimulatorError(f"a copy to columns {x} + {right} of {tile.name}: expected multiples of 8")
    if seen and (X.strides[1] != X.dtype.itemsize or (X.address | X.strides[0]) % 16):
        raise SimulatorError(f"{X.name}: rows at multiples of 16 bytes expected, strides {X.strides}")
    n += y + down
    copies.copy(tile, r + y + down, x + right, 8, lambda c: X[n, c].view(np.uint16) if seen else 0)


def copy_chunk_at(tile, row, column, X, n, step, seen):
    copy_chunk(tile, row, X, n, 0, column, step, 0, seen)


def store_chunk(X, n, tile, row, column):
    for c in range(column, column + 8):
        X[n, c] = np.uint16(tile[row, c]).view(X.dtype)


def read_chunk(X, n, column):
    numbers = [X[n, column + e].view(np.uint16) for e in range(8)]
    return tuple(_word(*numbers[e : e + 2]) for e in range(0, 8, 2))


def read_four(x, n):
    _check_four(x, n)
    return x[n], x[n + 1], x[n + 2], x[n + 3]


def _check_four(x, n):
    if n % 4 or x.strides != (4,) or x.address % 16:
        raise SimulatorError(f"{x.name}[{n} : +4], strides {x.strides}: 16 bytes at a multiple of 16 expected")


def add_four(x, n, y):
    _check_four(x, n)
    for e in range(4):
        x.atomic_add(n + e, y[e])


def copy_four(x, r, y, n):
    _check_four(y, n)
    copies.copy_line(x, r, 4, lambda e: y[n + e])


def read_two(x, r):
    return x[r], x[r + 1]


def unpack_fp16(word):
    return tuple(np.float32(x) for x in np.array(_halves(word), np.uint16).view(np.float16))


def unpack_bf16(word):
    return tuple((np.array(_halves(word), np.uint32) << 16).view(np.float32))


commit_group, wait_group = copies.commit_group, copies.wait_group


def named_barrier(threads):
    """All the block's threads meet: each of its groups is expected to come as often as the others."""

    @register
    def barrier(name):
        cuda.syncthreads()

    return barrier


def named_any(threads):
    @register
    def met(name, x):
        return bool(cuda.syncthreads_or(x))

    return met


def named_give(threads):
    """All the block's threads meet, whether they give or take."""

    @register
    def give(name, mine):
        cuda.syncthreads()

    return give


def named_take(threads):
    return lambda name, mine: None


def fma(x, y, z):
    """A product of two float32 is exact in float64."""
    return np.float32(np.float64(x) * np.float64(y) + np.float64(z))


def uniform(n):
    return n


def here(x):
    return x
