"""One attention problem: its sizes, dtype, scale and mask, what it costs at least.  [floor 0: no GPU, no numba]"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .mask import Mask

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_D = 256
BACKWARD = 2.5  # five matrix products against the forward's two


@dataclass(frozen=True)
class Problem:
    """Sizes as in the papers: B batch, H query heads, H_kv key/value heads, N_q queries, N_k keys, d head_dim.

    dtype    'fp32' | 'fp16' | 'bf16' of Q, K, V and O; every kernel accumulates in fp32
    scale    multiplies Q Kᵀ; 1/√d unless given
    softcap  c > 0 replaces a score s by c·tanh(s/c), after scaling, before masking; 0 is off

    Raises ValueError or TypeError, naming the field, its value and what is accepted.
    """

    B: int
    H: int
    H_kv: int
    N_q: int
    N_k: int
    d: int
    dtype: str = "fp32"
    scale: float | None = None
    mask: Mask = field(default_factory=Mask)
    softcap: float = 0.0

    def __post_init__(self):
        for name in ("B", "H", "H_kv", "N_q", "N_k", "d"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: expected an integer")
            if value < 0:
                raise ValueError(f"{name}={value}: expected a size >= 0")
        if not 1 <= self.d <= MAX_D:
            raise ValueError(f"head_dim d={self.d}: expected 1 to {MAX_D}")
        if self.H_kv == 0 and self.H > 0 or self.H_kv and self.H % self.H_kv:
            raise ValueError(f"heads H={self.H}, H_kv={self.H_kv}: H must be a multiple of H_kv (GQA), H_kv >= 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        scale = 1 / math.sqrt(self.d) if self.scale is None else self.scale
        for name, value in (("scale", scale), ("softcap", self.softcap)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: expected a number")
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}: expected a finite number")
        if self.softcap < 0:
            raise ValueError(f"softcap={self.softcap}: expected c > 0, or 0 for none")
        object.__setattr__(self, "scale", float(scale))
        object.__setattr__(self, "softcap", float(self.softcap))

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.H // self.H_kv if self.H_kv else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def kind(self) -> Problem:
        """What a kernel is compiled for: d, dtype, and whether there are a band, a boolean mask and a softcap.
        Sizes, scale and the band's place are arguments at run time."""
        mask = Mask(causal=self.mask.banded, boolean=self.mask.boolean)
        return Problem(1, 1, 1, 1, 1, self.d, self.dtype, mask=mask, softcap=float(self.softcap > 0))

    def flops(self, direction: str = "fwd") -> float:
        """4·d per seen (i, j) pair and head (a boolean mask is not looked into), x 2.5 backward."""
        pairs = self.mask.pairs(self.N_q, self.N_k)
        return 4.0 * self.B * self.H * pairs * self.d * (BACKWARD if direction == "bwd" else 1)

    def ideal_bytes(self, direction: str = "fwd") -> int:
        """Each input read once and each output written once."""
        q, k = self.B * self.N_q * self.H * self.d, self.B * self.N_k * self.H_kv * self.d
        lse = 4 * self.B * self.H * self.N_q
        if direction == "fwd":  # Q K V -> O LSE
            return self.itemsize * (2 * q + 2 * k) + lse
        return self.itemsize * (4 * q + 4 * k) + lse  # Q K V O dO LSE -> dQ dK dV

    def __str__(self) -> str:
        heads = f"H={self.H}" + (f"/{self.H_kv}" if self.H_kv != self.H else "")
        cap = f" softcap={self.softcap:g}" if self.softcap else ""
        return f"B={self.B} {heads} N={self.N_q}x{self.N_k} d={self.d} {self.dtype} {self.mask}{cap}"


def problem_of(q, k, v, *, causal=False, align="bottom_right", window=(-1, -1), mask=None, softcap=0.0, scale=None):
    """The Problem that tensors q [B, N_q, H, d], k and v [B, N_k, H_kv, d] pose; mask is broadcastable to
    (B, H, N_q, N_k).

    Raises TypeError or ValueError before anything is launched, with a hint where the layout looks swapped.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: expected a torch.Tensor")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 axes (batch, seqlen, heads, head_dim)")
        if x.dtype not in NAMES:
            hint = "; 8 bits need scales: attention_fp8 takes what quantize_fp8 makes" if _of_8_bits(x) else ""
            raise TypeError(f"{name} has dtype {x.dtype}: expected float32, float16 or bfloat16{hint}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}: expected q's, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}: expected q's device, {q.device}")
    B, N_q, H, d = q.shape
    hint = _swapped(q, k)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != B:
            raise ValueError(f"{name} has batch {x.shape[0]}: expected q's, {B}{hint}")
        if x.shape[3] != d:
            raise ValueError(f"{name} has head_dim {x.shape[3]}: expected q's, {d}{hint}")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}: expected k's, {tuple(k.shape)}{hint}")
    N_k, H_kv = k.shape[1:3]
    if H_kv == 0 and H > 0 or H_kv and H % H_kv:
        raise ValueError(f"q has {H} heads, k {H_kv}: heads of q must be a multiple of those of k{hint}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask is {type(mask).__name__}: expected a bool torch.Tensor, True = seen")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}: expected torch.bool, True = seen")
        if mask.device != q.device:
            raise ValueError(f"mask is on {mask.device}: expected q's device, {q.device}")
        try:
            mask.expand(B, H, N_q, N_k)
        except RuntimeError:
            scores = (B, H, N_q, N_k)
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: expected one broadcastable to (B, H, N_q, N_k) = {scores}"
            ) from None
    return Problem(
        B, H, H_kv, N_q, N_k, d, NAMES[q.dtype], scale,
        Mask(causal, align, window, boolean=mask is not None), softcap,
    )  # fmt: skip


def _of_8_bits(x) -> bool:
    return x.dtype.itemsize == 1 and x.is_floating_point()


def _swapped(q, k) -> str:
    """A hint for tensors laid out (batch, heads, seqlen, head_dim), as torch SDPA takes them."""
    heads_first = q.shape[1] < q.shape[2] or k.shape[1] < k.shape[2]
    same_heads = k.shape[1] and q.shape[1] % k.shape[1] == 0
    if heads_first and same_heads:
        return "; the layout looks like (batch, heads, seqlen, head_dim): pass x.transpose(1, 2)"
    return ""
