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
from .hopper import HEADERS, HopperLaunch, Panels, width
from .launch import addressable

FILE = HEADERS / "quantize.cu"
BLOCKS, AMAX, GIVEN, TRANSPOSE = range(4)  # quantize.cu: Step
NUMBERS, LANES = 64, 4  # that a thread takes, of a row; threads to a row, at most
ROWS, MOST_THREADS = 128, 512  # of a thread block: rows at least, where that is whole blocks; and threads
MOST_IN_A_BOX = 256  # rows, of the copy engine


class Side(ctypes.Structure):
    """Scales of Q, K or V: quantize.cu."""

    _fields_ = [("scale", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in ("N", "H", "blocks", "tiles")]


class Sides(ctypes.Structure):
    _fields_ = [("Q", Side), ("K", Side), ("V", Side), ("heads_q", ctypes.c_int), ("heads_kv", ctypes.c_int)]
    _fields_ += [("flip", ctypes.c_uint32 * (2 * LANES))]


@torch.no_grad()
def quantize(q, k, v, *, scales="block", q_block=Q_BLOCK, kv_block=KV_BLOCK, incoherent=True, seed=0) -> Quantized:
    """As sandbox.quantize.quantize: Q, K, V [B, N, H, d] in fp16 or bf16, d = 64, 128 or 256.

    Raises ValueError or TypeError, naming the argument, before anything is launched.
    """
    check_inputs(q, k, v, scales, q_block, kv_block)
    _check_here(q, k, v)
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
    fresh = new if blocked else q.new_zeros  # largest numbers of heads begin at 0
    found = [fresh(B, heads, n, dtype=torch.float32) for heads, n in ((H, n_q), (H_kv, n_k), (H_kv, n_k))]
    rows = (q_rows, kv_rows, kv_rows)
    sides = [_side(x, scale, n) for x, scale, n in zip((q, k, v), found, rows)]
    heads = (B * H, B * H_kv)

    def go(step):
        defines = {
            "HEAD_DIM": d, "Q_ROWS": q_rows, "KV_ROWS": kv_rows, "Q_BLOCK": q_block if blocked else q_rows,
            "KV_BLOCK": kv_block if blocked else kv_rows, "BF16": int(NAMES[q.dtype] == "bf16"),
            "INCOHERENT": int(incoherent), "STEP": step,
        }  # fmt: skip
        _go(defines, (q, k, v, q8, k8, v8), Sides(*sides, *heads, _flip(d, seed) if incoherent else NO_FLIP))

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
    _go(defines, (v, v, v, to, to, to), Sides(V=_side(v, scale, ROWS), heads_kv=B * H))
    return to


def launch_of(defines: dict[str, int]) -> HopperLaunch:
    """The kernel with this many rows to a thread block, and so on: quantize.cu says what its macros are."""
    return _launch(tuple(defines.items()))


@functools.cache
def _launch(defines: tuple) -> HopperLaunch:
    of = dict(defines)
    d, q_rows, kv_rows, size = of["HEAD_DIM"], of["Q_ROWS"], of["KV_ROWS"], 1 if of["STEP"] == TRANSPOSE else 2
    rows = max(q_rows, kv_rows)
    threads = rows * d // NUMBERS
    of["RESIDENT"] = resident(threads, of["STEP"])
    shared = rows * d * (size + 1) + 2048  # what comes and what leaves; tiles, scales and to align them
    read = [Panels(name, _box(n), width(d * size)) for name, n in (("Q", q_rows), ("K", kv_rows), ("V", kv_rows))]
    written = [Panels(name, _box(n), width(d), written=True) for name, n in (("to_Q", q_rows), ("to_K", kv_rows))]
    parameters = (*read, *written, Panels("to_V", d, width(kv_rows), written=True), Sides)
    return HopperLaunch(FILE, "quantize", threads, shared, of, parameters)


def _go(defines: dict[str, int], tensors: tuple, sides: Sides) -> None:
    """On as many thread blocks as there is room for.  tensors: Q, K, V, and what becomes of them, of V Vᵀ."""
    tiles = sides.heads_q * sides.Q.tiles + sides.heads_kv * (sides.K.tiles + sides.V.tiles)
    launch = launch_of(defines)
    *five, V = (x if x.numel() else x.new_zeros(1, 1, KEYS, max(KEYS, x.shape[3])) for x in tensors)
    room = _multiprocessors(V.device) * launch.defines["RESIDENT"]
    launch(min(tiles, room), *five, V.transpose(1, 2), sides)


def resident(threads: int, step: int) -> int:
    """Thread blocks that a multiprocessor has registers for."""
    if step == TRANSPOSE:
        return 1024 // threads
    return 1 if threads > 384 else 2 if threads > 192 else 640 // threads


def _box(rows: int) -> int:
    return rows if rows <= MOST_IN_A_BOX else rows // 2


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


def _side(x, scale, rows) -> Side:
    N, H = x.shape[1:3]
    return Side(scale.data_ptr(), N, H, scale.shape[2], -(-N // rows))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


NO_FLIP = (ctypes.c_uint32 * (2 * LANES))()


@functools.lru_cache(64)
def _flip(d: int, seed: int) -> ctypes.Array:
    """For each 32 columns, bits 15 - e and 31 - e: whether the signs of the two of pair e change."""
    pairs = (signs(d, seed) < 0).view(-1, 16, 2).tolist()
    return (ctypes.c_uint32 * (2 * LANES))(
        *(sum(low << 15 - e | high << 31 - e for e, (low, high) in enumerate(word)) for word in pairs)
    )


def _check_here(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (torch.float16, torch.bfloat16) or x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}: expected float16 or bfloat16, all three the same")
    if q.shape[-1] not in HADAMARD:
        raise ValueError(f"head_dim d={q.shape[-1]}: expected one of {', '.join(map(str, HADAMARD))}")
