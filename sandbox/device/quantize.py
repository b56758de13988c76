"""quantize() in one pass on a Hopper GPU, or emulated: 16 bits are read once, e4m3 and scales written.  [floor 1]

kernels/hopper/quantize.cu does bit for bit what sandbox/quantize.py, the reference, says.  Scales that more than a
block share take a pass before, which reads too, and writes the largest number of each head.  A row-major V that is in
e4m3 already is only transposed.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from ..problem import NAMES
from ..quantize import E4M3, HADAMARD, KEYS, KV_BLOCK, Q_BLOCK, Quantized, check_inputs, scale_of, signs
from .hopper import HEADERS, HopperLaunch
from .launch import addressable

FILE = HEADERS / "quantize.cu"
BLOCKS, AMAX, GIVEN, TRANSPOSE = range(4)  # quantize.cu: Step
NUMBERS = 32  # of a row, that a thread takes
MOST_LANES = HADAMARD[-1] // NUMBERS  # to a row
ROWS, MOST_THREADS = 128, 1024  # of a thread block: rows at least, where that is whole blocks; and threads


class Side(ctypes.Structure):
    """Q, K or V on its way: quantize.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("source", "to", "scale")]
    _fields_ += [(name, ctypes.c_longlong) for name in ("batch", "row", "head")]
    _fields_ += [(name, ctypes.c_int) for name in ("N", "H", "blocks", "tiles")]


class Sides(ctypes.Structure):
    _fields_ = [("Q", Side), ("K", Side), ("V", Side), ("heads_q", ctypes.c_int), ("heads_kv", ctypes.c_int)]
    _fields_ += [("flip", ctypes.c_uint32 * MOST_LANES)]


@torch.no_grad()
def quantize(q, k, v, *, scales="block", q_block=Q_BLOCK, kv_block=KV_BLOCK, incoherent=True, seed=0) -> Quantized:
    """As sandbox.quantize.quantize: Q, K, V [B, N, H, d] in fp16 or bf16, d = 64, 128 or 256.

    Raises ValueError or TypeError, naming the argument, before anything is launched.
    """
    check_inputs(q, k, v, scales, q_block, kv_block)
    _check_here(q, k, v)
    q, k, v = (addressable(x) for x in (q, k, v))
    (B, N_q, H, d), (N_k, H_kv) = q.shape, k.shape[1:3]
    blocked = scales == "block"
    if blocked:
        _check_block("q_block", q_block, d), _check_block("kv_block", kv_block, d)
        q_rows, kv_rows = rows_of(q_block, kv_block)
        n_q, n_k = -(-N_q // q_block), -(-N_k // kv_block)
    else:
        q_block, kv_block = max(1, N_q), max(1, N_k)
        q_rows, kv_rows, n_q, n_k = ROWS, ROWS, 1, 1
    new = q.new_empty
    q8, k8 = new(B, N_q, H, d, dtype=E4M3), new(B, N_k, H_kv, d, dtype=E4M3)
    v8 = new(B, H_kv, d, -(-N_k // KEYS) * KEYS, dtype=E4M3)
    found = [q.new_zeros(B, heads, n, dtype=torch.float32) for heads, n in ((H, n_q), (H_kv, n_k), (H_kv, n_k))]

    def go(step):
        defines = {
            "HEAD_DIM": d, "Q_ROWS": q_rows, "KV_ROWS": kv_rows, "Q_BLOCK": q_block if blocked else q_rows,
            "KV_BLOCK": kv_block if blocked else kv_rows, "BF16": int(NAMES[q.dtype] == "bf16"),
            "INCOHERENT": int(incoherent), "STEP": step,
        }  # fmt: skip
        sides = [_side(*one) for one in zip((q, k, v), (q8, k8, v8), found, (q_rows, kv_rows, kv_rows))]
        flip = _flip(d, seed) if incoherent else NO_FLIP
        tiles = B * (H * sides[0].tiles + H_kv * (sides[1].tiles + sides[2].tiles))
        threads = max(q_rows, kv_rows) * d // NUMBERS
        shared = kv_rows * (d + 8) + 2 * NUMBERS * threads + 4 * 16 + 2 * 4 * MOST_THREADS // 32
        launch = _launch(tuple(defines.items()), threads, shared)
        blocks = _multiprocessors(q) * (MOST_THREADS // threads)  # that stay; at d=64 that was slower
        launch(tiles if d == 64 else min(tiles, blocks), Sides(*sides, B * H, B * H_kv, flip))

    if blocked:
        go(BLOCKS)
    else:
        go(AMAX)
        for scale in found:
            amax = scale.amax().expand_as(scale) if scales == "tensor" and scale.numel() else scale
            scale.copy_(scale_of(amax))
        go(GIVEN)
    return Quantized(q8, k8, v8, *found, q_block, kv_block, scales)


@torch.no_grad()
def transpose_keys(v):
    """As sandbox.quantize.transpose_keys: V [B, N, H, d] in e4m3, d = 64, 128 or 256, to Vᵀ, in one pass."""
    (B, N, H, d), v = v.shape, addressable(v)
    defines = {
        "HEAD_DIM": d, "Q_ROWS": ROWS, "KV_ROWS": ROWS, "Q_BLOCK": ROWS, "KV_BLOCK": ROWS, "BF16": 0, "INCOHERENT": 0,
        "STEP": TRANSPOSE,
    }  # fmt: skip
    to, scale = v.new_empty(B, H, d, -(-N // KEYS) * KEYS), v.new_empty(0, 0, 0)
    side = _side(v, to, scale, ROWS)
    launch = _launch(tuple(defines.items()), ROWS * d // NUMBERS, ROWS * (d + 8))
    launch(B * H * side.tiles, Sides(V=side, heads_kv=B * H))
    return to


def takes(q, k, v, scales: str, q_block: int, kv_block: int) -> bool:
    """Whether `quantize` takes these, which the reference takes."""
    try:
        _check_here(q, k, v)
        if scales == "block":
            _check_block("q_block", q_block, q.shape[-1]), _check_block("kv_block", kv_block, q.shape[-1])
    except (TypeError, ValueError):
        return False
    return True


def rows_of(*blocks: int) -> list[int]:
    """Rows of a thread block: as many blocks as there is room for beside the largest."""
    room = max(ROWS, *blocks)
    return [block * (room // block) for block in blocks]


def _check_block(name: str, block: int, d: int) -> None:
    """Raises ValueError where a thread block cannot hold one."""
    most = MOST_THREADS * NUMBERS // d
    if block % 32 or block > most:
        raise ValueError(f"{name}={block}: expected a multiple of 32, up to {most} at d={d}")


def _side(x, to, scale, rows) -> Side:
    (N, H), (batch, row, head) = x.shape[1:3], x.stride()[:3]
    pointers = (x.data_ptr(), to.data_ptr(), scale.data_ptr())
    return Side(*pointers, batch, row, head, N, H, scale.shape[2], -(-N // rows))


def _multiprocessors(x) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


NO_FLIP = (ctypes.c_uint32 * MOST_LANES)()


@functools.lru_cache(64)
def _flip(d: int, seed: int) -> ctypes.Array:
    """For each lane, bits 15 - e and 31 - e: whether the signs of the two columns of its word e change."""
    negative = (signs(d, seed) < 0).view(4, -1, 4, 2)  # chunk of the lane, lane, word, half
    words = negative.transpose(0, 1).flatten(1, 2).tolist()
    return (ctypes.c_uint32 * MOST_LANES)(
        *(sum(low << 15 - e | high << 31 - e for e, (low, high) in enumerate(lane)) for lane in words)
    )


@functools.cache
def _launch(defines, threads: int, shared: int) -> HopperLaunch:
    return HopperLaunch(FILE, "quantize", threads, shared, dict(defines), (Sides,))


def _check_here(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (torch.float16, torch.bfloat16) or x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}: expected float16 or bfloat16, all three the same")
    if q.shape[-1] not in HADAMARD:
        raise ValueError(f"head_dim d={q.shape[-1]}: expected one of {', '.join(map(str, HADAMARD))}")
