"""Which (query, key) pairs are seen, and which tiles of S a mask empties.  [floor 0: no GPU, no numba]

Row i sees key j when ``i + lo <= j <= i + hi`` (the band) and the boolean mask, where there is one, is True.
Causal masks and sliding windows are both bands, so one pair of integers describes any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALIGNS = ("bottom_right", "top_left")


@dataclass(frozen=True)
class Mask:
    """What hides a key from a query.

    causal   row i sees no key after its own position
    align    where position 0 of the queries stands among the keys: ``bottom_right`` puts the last query at the
             last key (off = N_k - N_q), ``top_left`` the first at the first (off = 0); it governs the window too
    window   (left, right): how many keys before and after its own position a row sees; -1 is unbounded
    boolean  whether a boolean tensor, True = seen, accompanies every launch

    Raises ValueError or TypeError on anything else.
    """

    causal: bool = False
    align: str = "bottom_right"
    window: tuple[int, int] = (-1, -1)
    boolean: bool = False

    def __post_init__(self):
        if self.align not in ALIGNS:
            raise ValueError(f"align={self.align!r}: expected one of {', '.join(ALIGNS)}")
        window = self.window
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window={window!r}: expected a pair (left, right) of integers, -1 for unbounded")
        for side, width in zip(("left", "right"), window):
            if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
                raise TypeError(f"window {side}={width!r}: expected an integer, -1 for unbounded")
            if width < -1:
                raise ValueError(f"window {side}={width}: expected a count of keys >= 0, or -1 for unbounded")
        object.__setattr__(self, "window", (int(window[0]), int(window[1])))
        object.__setattr__(self, "causal", bool(self.causal))

    @property
    def banded(self) -> bool:
        return self.causal or self.window != (-1, -1)

    def band(self, N_q: int, N_k: int) -> tuple[int, int]:
        """(lo, hi): row i sees keys i + lo .. i + hi, both included.  Always lo <= hi."""
        off = N_k - N_q if self.align == "bottom_right" else 0
        unbounded = N_q + N_k
        left, right = self.window
        lo = off - left if left >= 0 else -unbounded
        hi = off + right if right >= 0 else unbounded
        return lo, off if self.causal else hi

    def seen(self, N_q: int, N_k: int) -> np.ndarray:
        """bool [N_q, N_k]: the band alone."""
        lo, hi = self.band(N_q, N_k)
        i, j = np.arange(N_q)[:, None], np.arange(N_k)[None, :]
        return (j >= i + lo) & (j <= i + hi)

    def pairs(self, N_q: int, N_k: int) -> int:
        """How many (i, j) the band leaves seen."""
        lo, hi = self.band(N_q, N_k)
        i = np.arange(N_q, dtype=np.int64)
        first, end = np.clip(i + lo, 0, N_k), np.clip(i + hi + 1, 0, N_k)
        return int(np.maximum(end - first, 0).sum())

    def key_blocks(self, i0: int, Br: int, Bc: int, N_q: int, N_k: int) -> range:
        """The key blocks that rows i0 .. i0+Br-1 touch; every other tile of this row block is empty."""
        lo, hi = self.band(N_q, N_k)
        first, end = max(0, i0 + lo), min(N_k, min(i0 + Br, N_q) + hi)
        return range(first // Bc, -(-end // Bc)) if first < end else range(0)

    def query_blocks(self, j0: int, Br: int, Bc: int, N_q: int, N_k: int) -> range:
        """The query blocks that see any of keys j0 .. j0+Bc-1."""
        lo, hi = self.band(N_q, N_k)
        first, end = max(0, j0 - hi), min(N_q, min(j0 + Bc, N_k) - lo)
        return range(first // Br, -(-end // Br)) if first < end else range(0)

    def __str__(self) -> str:
        parts = ["causal"] * self.causal + [f"window={self.window}"] * (self.window != (-1, -1))
        parts += ["boolean"] * self.boolean + [self.align] * (self.banded and self.align != "bottom_right")
        return "+".join(parts) or "full"
