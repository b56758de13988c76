"""What a kernel is asked: a problem, a tile, the numbers that fill it and how they lie in memory; in words and back.
[floor 3]

The words of a Case are options of `python -m sandbox check`, so that whoever finds a failure can hand it on in a line:

    --problem 'N_q=17 N_k=9 d=8 H=2 H_kv=1 causal=bottom_right dtype=fp32' --tile 8x8 --input gauss --seed 3
    --problem 'rows=5 columns=17 dtype=bf16' --input rising --seed 3
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import target
from ..catalog import nearest
from ..mask import ALIGNS, Mask
from ..problem import DTYPES, Problem
from ..variant import Tile
from .gate import Inputs, gaussian

INF = torch.inf
OTHER_SEED = 2**31  # added to a case's seed: the numbers of its second call


@dataclass(frozen=True)
class Rows:
    """X [rows, columns] of a softmax kernel.  Raises ValueError or TypeError, naming the field."""

    rows: int
    columns: int
    dtype: str = "fp32"

    def __post_init__(self):
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: expected an integer")
            if value < 0:
                raise ValueError(f"{name}={value}: expected a size >= 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def kind(self) -> Problem:
        """What a softmax kernel is compiled for: the dtype alone."""
        return Problem(1, 1, 1, 1, 1, 1, self.dtype)

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {self.dtype}"


@dataclass(frozen=True)
class Case:
    """tile is None for softmax; input is one of INPUTS or ROW_INPUTS, layout one of LAYOUTS or ROW_LAYOUTS.

    Raises ValueError where input or layout is none of them.
    """

    problem: Problem | Rows
    tile: Tile | None
    input: str = "gauss"
    layout: str = "contiguous"
    seed: int = 0

    def __post_init__(self):
        inputs, layouts = (ROW_INPUTS, ROW_LAYOUTS) if self.softmax else (INPUTS, LAYOUTS)
        for name, value, known in (("input", self.input, inputs), ("layout", self.layout, layouts)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: {nearest(value, known)}")

    @property
    def softmax(self) -> bool:
        return isinstance(self.problem, Rows)

    @property
    def overlaps(self) -> bool:
        """Whether several elements lie in one place, so that no second call can bring other numbers."""
        return self.layout.startswith("expanded")

    def make(self, again: bool = False) -> Inputs | torch.Tensor:
        """The tensors, where the kernels run; `again`: other numbers of the same shapes, for a second call."""
        seed = self.seed + OTHER_SEED if again else self.seed
        return _rows(replace(self, seed=seed)) if self.softmax else _attention(replace(self, seed=seed), self.seed)

    def __str__(self) -> str:
        words = [("--problem", format_problem(self.problem)), ("--tile", self.tile), ("--input", self.input)]
        words += [("--layout", self.layout)] * (self.layout != "contiguous") + [("--seed", self.seed)]
        return " ".join(f"{option} {shlex.quote(str(word))}" for option, word in words if word is not None)


# ---- a problem in words ---------------------------------------------------------------------------------------------


def format_problem(problem: Problem | Rows) -> str:
    """`name=value` words, those left out that have their usual value; `parse_problem` reads them."""
    if isinstance(problem, Rows):
        return f"rows={problem.rows} columns={problem.columns} dtype={problem.dtype}"
    p, mask = problem, problem.mask
    words = [f"B={p.B}"] * (p.B != 1)
    words += [f"N_q={p.N_q}", f"N_k={p.N_k}", f"d={p.d}", f"H={p.H}", f"H_kv={p.H_kv}", f"dtype={p.dtype}"]
    words += [f"causal={mask.align}"] * mask.causal
    words += [f"align={mask.align}"] * (not mask.causal and mask.align != ALIGNS[0])
    words += [f"window={mask.window[0]},{mask.window[1]}"] * (mask.window != (-1, -1))
    words += ["mask=boolean"] * mask.boolean
    words += [f"softcap={p.softcap!r}"] * (p.softcap != 0)
    words += [f"scale={p.scale!r}"] * (p.scale != replace(p, scale=None).scale)
    return " ".join(words)


SIZES = ("B", "N_q", "N_k", "d", "H", "H_kv", "rows", "columns")
WORDS = (*SIZES, "dtype", "causal", "align", "window", "mask", "softcap", "scale")


def parse_problem(text: str, softmax: bool = False) -> Problem | Rows:
    """The Problem (or Rows) of such words.  Raises ValueError or TypeError in one line."""
    known = ("rows", "columns", "dtype") if softmax else tuple(w for w in WORDS if w not in ("rows", "columns"))
    words: dict[str, str] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in known:
            raise ValueError(f"problem: {name!r} is unknown: {nearest(name, known)}")
        if not equals or not value:
            raise ValueError(f"problem: {word!r}: expected {name}=VALUE")
        if name in words:
            raise ValueError(f"problem: {name} is given twice")
        words[name] = value
    fields = {name: _number(int, name, words[name]) for name in SIZES if name in words}
    if "dtype" in words:
        fields["dtype"] = words["dtype"]
    needed = ("rows", "columns") if softmax else ("N_q", "N_k", "d")
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"problem={text!r}: expected {', '.join(f'{name}=...' for name in missing)} too")
    if softmax:
        return Rows(**fields)
    H = fields.get("H", fields.get("H_kv", 1))
    fields |= {name: _number(float, name, words[name]) for name in ("softcap", "scale") if name in words}
    return Problem(**{"B": 1, "H_kv": H} | fields | {"H": H, "mask": _mask(words)})


def _mask(words: dict[str, str]) -> Mask:
    if words.get("mask", "boolean") != "boolean":
        raise ValueError(f"problem: mask={words['mask']}: expected boolean")
    if words.get("causal", ALIGNS[0]) not in ALIGNS:
        raise ValueError(f"problem: causal={words['causal']}: expected one of {', '.join(ALIGNS)}")
    if "causal" in words and words.get("align", words["causal"]) != words["causal"]:
        raise ValueError(f"problem: causal={words['causal']} and align={words['align']} differ")
    sides = words.get("window", "-1,-1").split(",")
    if len(sides) != 2:
        raise ValueError(f"problem: window={words['window']}: expected LEFT,RIGHT, -1 for unbounded")
    align = words.get("causal", words.get("align", ALIGNS[0]))
    return Mask("causal" in words, align, tuple(_number(int, "window", side) for side in sides), "mask" in words)


def parse_tile(text: str) -> Tile:
    """`64x32` is Br x Bc.  Raises ValueError."""
    if not (sides := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise ValueError(f"tile={text!r}: expected BrxBc, 64x32 for instance")
    return Tile(*map(int, sides.groups()))


def _number(kind: type, name: str, text: str):
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"problem: {name}={text}: expected {'an integer' if kind is int else 'a number'}") from None


# ---- what fills q, k, v, dO and the mask ----------------------------------------------------------------------------

INPUTS = ("gauss", "equal", "one-hot", "outliers", "large-logits")
LAYOUTS = ("contiguous", "heads-first", "gapped", "expanded-batch")


def _attention(case: Case, place: int) -> Inputs:
    """`place` decides which rows a boolean mask empties, and whether it is broadcast."""
    problem = case.problem
    x = gaussian(problem, case.seed, target.torch_device())
    q, k, v, mask, dO = x.q, x.k, x.v, x.mask, x.dO
    if case.input == "equal":
        q, k = torch.full_like(q, 0.5), torch.full_like(k, -0.25)
    elif case.input == "one-hot":
        q, k, v = ((y == y.amax(-1, keepdim=True)).to(y.dtype) for y in (q, k, v))
    elif case.input == "outliers" and q.numel() and k.numel():
        q, k = q.clone(), k.clone()
        q[..., 0] *= 12
        k[:, ::5] *= 6
    elif case.input == "large-logits":
        reach = (1e4 / max(abs(problem.scale), 1e-3)) ** 0.5
        q, k = (y.sign() * (reach / problem.d**0.5) for y in (q, k))
    if mask is not None and place % 3 == 0 and mask.shape[2]:
        mask = mask.clone()
        mask[:, :, place % mask.shape[2]] = False  # a row that sees nothing
    if mask is not None and place % 3 == 1:
        mask = mask[:1, :1]  # broadcast
    return Inputs(*(laid_out(y, case.layout) for y in (q, k, v)), mask, laid_out(dO, case.layout))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory layout."""
    if layout == "heads-first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gapped":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded-batch":
        return x[:1].expand_as(x)
    return x


# ---- what fills a softmax's X ---------------------------------------------------------------------------------------


def _one_hot(X, random):
    if not X.shape[1]:
        return X
    return 200 * torch.nn.functional.one_hot(torch.randint(X.shape[1], X.shape[:1], generator=random), X.shape[1])


def _some_minus_inf(X, random):
    X = X.masked_fill(torch.rand(X.shape, generator=random) < 0.6, -INF)
    X[torch.rand(X.shape[0], generator=random) < 0.3] = -INF
    return X


def _live_non_finite(X, random):
    for value in (torch.nan, INF, -INF):
        X = X.masked_fill(torch.rand(X.shape, generator=random) < 0.05, value)
    return X


def _gapped(X):
    wide = X.new_full((2 * X.shape[0], 3 * X.shape[1] + 1), torch.nan)
    wide[::2, 1::3] = X
    return wide[::2, 1::3]


ROW_INPUTS: dict[str, Callable] = {
    "gauss": lambda X, random: X,
    "small": lambda X, random: X / 64,
    "large": lambda X, random: 1e4 * X,
    "constant": lambda X, random: torch.full_like(X, 3.0),
    "far-from-zero": lambda X, random: X + 1000,
    "rising": lambda X, random: X.sort(-1).values,  # the maximum grows at every step
    "falling": lambda X, random: X.sort(-1, descending=True).values,
    "one-hot": _one_hot,
    "some-minus-inf": _some_minus_inf,
    "live-non-finite": _live_non_finite,
}
ROW_LAYOUTS: dict[str, Callable] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda X: X.t().contiguous().t(),
    "gapped": _gapped,
    "expanded-rows": lambda X: X[:1].expand(X.shape[0], -1),
    "expanded-columns": lambda X: X[:, :1].expand(-1, X.shape[1]),
}


def _rows(case: Case) -> torch.Tensor:
    random = torch.Generator().manual_seed(case.seed)
    X = ROW_INPUTS[case.input](torch.randn(case.problem.rows, case.problem.columns, generator=random), random)
    return ROW_LAYOUTS[case.layout](X.to(DTYPES[case.problem.dtype]).to(target.torch_device()))
