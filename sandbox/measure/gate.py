"""The gate: a kernel's result against the float64 oracle, within an error that is derived, never picked.  [floor 3]

E is the oracle's low-precision twin, the eager computation in the inputs' dtype; u a dtype's unit roundoff.

fp32        |O - O*| <= 2 max|E - O*| + 4u·(…) elementwise, and so for each gradient; reference.py derives the terms
fp16, bf16  the same, terms with float32's u as a kernel accumulates in it, and one rounding more: u max|O*|.  Without
            the terms a gradient that is exactly 0 (one key: P = 1, dS = 0), and E with it, would allow no error at all;
            they hold what a backward rounds and E does not, or rounds with more luck: O for D, and dS
LSE         float32 whatever the dtype: the fp32 rule

Outputs are poisoned with NaN before the launch, inputs must be the same bits after it.  A second call, with other
numbers in the same memory, refuses what remembers the first; on a GPU those numbers arrive late.  What the oracle gives
for non-finite inputs (NaN, Inf) the kernel must give too; E is then taken where it is finite.

A kernel whose products take e4m3 has a gate of its own: gate_fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from .. import reference
from ..problem import NAMES, Problem
from ..quantize import Quantized, quantize
from ..reference import UNIT
from ..variant import Device, Tile, Variant
from . import gate_fp8
from .traffic import Traffic

TINY = {"fp32": 2.0**-126, "fp16": 2.0**-24, "bf16": 2.0**-126}  # below it no bound is relative


@dataclass(frozen=True)
class Inputs:
    """q, dO [B, N_q, H, d]; k, v [B, N_k, H_kv, d]; mask broadcastable to (B, H, N_q, N_k), True = seen, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    dO: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


@dataclass(frozen=True)
class Verdict:
    """passed   whether every output is within its allowance and no input changed
    max_error  the largest |output - oracle| over all outputs
    ratio      the largest error ÷ allowance; at most 1 where passed
    why        what failed, in a line; empty where passed
    traffic    global accesses of this very launch, counted; None on a GPU
    launch     runs the kernel again on the same tensors, for timing
    excess     output -> error ÷ allowance of each of its elements, for those outputs that failed
    """

    passed: bool
    max_error: float
    ratio: float
    why: str
    traffic: Traffic | None
    launch: Callable[[], None]
    excess: dict[str, torch.Tensor] = field(default_factory=dict)


def gaussian(problem: Problem, seed: int, device: torch.device | str = "cpu") -> Inputs:
    """N(0, 1) in the problem's dtype, the same numbers on every device; a boolean mask sees half of the pairs."""
    g = torch.Generator().manual_seed(seed)

    def draw(n, heads):
        return torch.randn(problem.B, n, heads, problem.d, generator=g).to(problem.torch_dtype).to(device)

    q, k, v, dO = (
        draw(problem.N_q, problem.H), draw(problem.N_k, problem.H_kv), draw(problem.N_k, problem.H_kv),
        draw(problem.N_q, problem.H),
    )  # fmt: skip
    mask = None
    if problem.mask.boolean:
        mask = (torch.rand(problem.B, problem.H, problem.N_q, problem.N_k, generator=g) < 0.5).to(device)
    return Inputs(q, k, v, mask, dO)


def prepare(variant: Variant, problem: Problem, tile: Tile, inputs: Inputs, device: Device):
    """(launch, outputs): a launch without arguments and the tensors it writes, poisoned with NaN until then.

    A backward gets O and LSE from the oracle, so that it is judged alone.  Raises Infeasible where the tile does not
    fit.
    """
    call = _prepare(variant, problem, tile, inputs, device)
    return call.launch, call.outputs


@dataclass(frozen=True)
class _Call:
    """A launch and its tensors: `fixed` must not change, `outputs` are to be written."""

    launch: Callable[[], None]
    fixed: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    stars: tuple[torch.Tensor, torch.Tensor]  # O* and LSE*
    quantized: Quantized | None = None  # of a kernel whose products take e4m3

    def take(self, other: _Call) -> None:
        """The numbers of another call of this problem, outputs poisoned again, in the memory of this one."""
        for mine, theirs in ((self.fixed, other.fixed), (self.outputs, other.outputs)):
            for name, x in mine.items():
                x.copy_(theirs[name])


def _prepare(variant, problem, tile, inputs, device, quantized=False) -> _Call:
    launcher = variant.launcher(problem, tile, device)
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask
    seen = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask
    seen = seen.expand(problem.B, problem.H, *((1, 1) if mask is None else (problem.N_q, problem.N_k)))
    O_star, LSE_star = reference.forward(problem, q, k, v, mask)
    if variant.direction == "fwd":
        given = {}
        outputs = {"O": poisoned(q), "LSE": torch.full_like(LSE_star, torch.nan, dtype=torch.float32)}
    else:
        given = {"O": O_star.to(q.dtype), "LSE": LSE_star.float(), "dO": inputs.dO}
        outputs = {"dQ": poisoned(q), "dK": poisoned(k), "dV": poisoned(v)}

    fixed, x = {**inputs.named(), **given}, None
    if variant.scales:
        # By the reference, and not by the kernel's own pass, whose mistakes are the kernel's.
        x = quantize(q, k, v, **launcher.options) if problem.N_k else launcher.quantize(q, k, v)
    if quantized:
        fixed = {name: y for name, y in vars(x).items() if isinstance(y, torch.Tensor)}

    def launch():
        if quantized:
            return launcher.attend(problem, x, *outputs.values())
        return launcher(problem, q, k, v, seen, *given.values(), *outputs.values())

    return _Call(launch, fixed, outputs, (O_star, LSE_star), x)


def check(
    variant: Variant, problem: Problem, tile: Tile, inputs: Inputs, device: Device, again: Inputs | None = None,
    quantized: bool = False,
) -> Verdict:  # fmt: skip
    """Runs the variant once and judges it.  Raises Infeasible where the tile does not fit.

    again      other numbers for a second call in the same memory, which `inputs` holds from then on
    quantized  a kernel whose products take e4m3 is given inputs that are quantized already
    """
    call = _prepare(variant, problem, tile, inputs, device, quantized)
    before = {name: x.clone() for name, x in call.fixed.items()}
    with _counting(device) as counted:
        _nothing(call.launch(), call)
    verdict = _verdict(call, call.outputs, before, _allowed_to(problem, tile, inputs, call, variant), _traffic(counted))
    if again is None or not verdict.passed:
        return verdict
    other = _prepare(variant, problem, tile, again, device, quantized)
    with _late(device):
        call.take(other)
        call.launch()
        outputs = {name: x.clone() for name, x in call.outputs.items()}
    call = replace(call, stars=other.stars, quantized=other.quantized)
    second = _verdict(call, outputs, other.fixed, _allowed_to(problem, tile, again, call, variant), verdict.traffic)
    return second if second.passed else replace(second, why=f"{AGAIN}: {second.why}")


AGAIN = "called again with other numbers in the same memory"
LATE_CYCLES = 4_000_000  # some 2 ms


@contextmanager
def _late(device: Device):
    """On a GPU, a stream of its own that is still busy: work on any other stream starts before its inputs are there."""
    if device.simulated:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LATE_CYCLES)
        yield
    torch.cuda.synchronize()


def _nothing(returned, call) -> None:
    if returned is not None:
        what = f"{type(returned).__name__} {list(getattr(returned, 'shape', ''))}".removesuffix(" []")
        raise TypeError(
            f"the launch returned {what}: expected None, results are written into {', '.join(call.outputs)}"
        )


def _allowed_to(problem, tile, inputs, call, variant):
    """output -> (what it is to be, allowed absolute error)."""
    if call.quantized is not None:
        return gate_fp8.allowances(problem, tile, call.quantized, call.stars)
    return _allowances(problem, inputs, *call.stars, variant.direction)


def _verdict(call, outputs, before, allowances, traffic) -> Verdict:
    why = [f"input {name} was changed" for name, x in call.fixed.items() if not same_bits(x, before[name])]
    errors, ratios, excess = [0.0], [0.0], {}
    for name, (star, allowed) in allowances.items():
        if outputs[name].shape != star.shape:
            why.append(f"{name} has shape {tuple(outputs[name].shape)} after the launch: expected {tuple(star.shape)}")
            continue
        error, ratios_here = _judge(outputs[name], star, allowed)
        errors.append(error)
        ratios.append(float(ratios_here.max()) if ratios_here.numel() else 0.0)
        if ratios[-1] > 1:
            why.append(f"{name} is off by {error:.3g}, {ratios[-1]:.3g} x what is allowed")
            excess[name] = ratios_here
    if call.quantized is not None and outputs["O"].shape == call.stars[0].shape:
        found, expected = gate_fp8.rmse(outputs["O"], allowances["O"][0], call.stars[0])
        ratios.append(found / (gate_fp8.WORSE * expected) if expected else torch.inf if found else 0.0)
        if ratios[-1] > 1:
            why.append(f"O's RMSE is {found:.3g}, the emulation's {expected:.3g}: at most {gate_fp8.WORSE} x that")
    return Verdict(not why, max(errors), max(ratios), "; ".join(why), traffic, call.launch, excess)


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """NaN, in like's shape and dtype, contiguous."""
    return torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)


def _allowances(problem, inputs, O_star, LSE_star, direction):
    """output -> (oracle, allowed absolute error)."""
    q, k, v, mask, dO = inputs.q, inputs.k, inputs.v, inputs.mask, inputs.dO
    if direction == "fwd":
        E, LSE_E = reference.twin_forward(problem, q, k, v, mask), reference.twin_lse(problem, q, k, mask)
        terms = reference.fp32_allowance_forward(problem, q, k, v, mask)
        LSE_terms = reference.fp32_allowance_lse(problem, q, k, mask)
        return {
            "O": (O_star, _allowed(problem.dtype, O_star, E, terms)),
            "LSE": (LSE_star, _allowed("fp32", LSE_star, LSE_E, LSE_terms)),
        }
    stars = reference.backward(problem, q, k, v, dO, mask)
    twins = reference.twin_backward(problem, q, k, v, dO, mask)
    terms = reference.fp32_allowance_backward(problem, q, k, v, dO, mask)
    return {
        name: (star, _allowed(problem.dtype, star, E, term))
        for name, star, E, term in zip(("dQ", "dK", "dV"), stars, twins, terms)
    }


def _allowed(dtype, star, E, terms):
    """The gate's right-hand side, like star; terms are those of fp32 arithmetic."""
    error = (E.double() - star).abs()
    twin = error[error.isfinite()].max() if error.isfinite().any() else star.new_zeros(())
    finite = star[star.isfinite()]
    rounding = UNIT[dtype] * finite.abs().max() if dtype != "fp32" and finite.numel() else 0.0
    return 2 * twin + rounding + (0.0 if terms is None else terms.nan_to_num(0)) + TINY[dtype]


def _judge(output, star, allowed) -> tuple[float, torch.Tensor]:
    """(largest error, error ÷ allowance of each element); inf where one side is not finite and the other differs."""
    out = output.double()
    same = (out == star) | (out.isnan() & star.isnan())
    rounded = star.to(output.dtype).double()
    same |= rounded.isinf() & (out == rounded)  # an output may overflow its dtype where the oracle, rounded, does
    error = torch.where(same, 0.0, (out - star).abs()).nan_to_num(torch.inf, posinf=torch.inf)
    return float(error.max()) if error.numel() else 0.0, error / allowed


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit by bit, NaN included."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _counting(device: Device):
    if not device.simulated:
        return nullcontext()
    from ..device.simulator import counting

    return counting()


def _traffic(counted) -> Traffic | None:
    if counted is None:
        return None
    return Traffic(dict(counted.reads), dict(counted.writes), counted.read_bytes, counted.write_bytes)


# ---- softmax alone: X [rows, columns] -> Y, each row by itself; a row of -inf gives 0 -------------------------------
#
# fp16, bf16  max|Y - Y*| <= 2 max|E - Y*| + u max|Y*|
# fp32        |Y - Y*| <= 2 max|E - Y*| + 3u·(3 + a_i + Σ_j y_j·a_j)·y_i elementwise, a = |x| + |max x|
#
# The latter to first order: e^(x - m) is 2^((x - m)·log2 e) or 2^(x·log2 e - m·log2 e).  The products round by u·|x|
# and u·|m|, their difference by u·|x - m|, log2 e itself by u·|x - m|, all together by at most 3u·a; 2 to the power of
# it by 2 ulp, 4u.  That is an error of e^(x - m) relative to itself, which y_i meets once above its division and,
# averaged with weights y_j, once below; the division rounds by u.  How long the sum is, and how often an online one is
# rescaled, is not counted: 2 max|E - Y*| stands for it.


def check_softmax(variant: Variant, X: torch.Tensor, device: Device, again: torch.Tensor | None = None) -> Verdict:
    """Runs a softmax variant once on X [rows, columns] and judges Y; with `again`, a second time, as `check` does."""
    dtype = NAMES[X.dtype]
    launcher = variant.launcher(Problem(1, 1, 1, 1, 1, 1, dtype), None, device)
    Y = poisoned(X)
    call = _Call(lambda: launcher(X, Y), {"X": X}, {"Y": Y}, ())
    before = {"X": X.clone()}
    with _counting(device) as counted:
        _nothing(call.launch(), call)
    verdict = _verdict(call, call.outputs, before, _softmax_allowances(X, dtype), _traffic(counted))
    if again is None or not verdict.passed:
        return verdict
    with _late(device):
        X.copy_(again)
        Y.fill_(torch.nan)
        call.launch()
        outputs = {"Y": Y.clone()}
    second = _verdict(call, outputs, {"X": again}, _softmax_allowances(again, dtype), verdict.traffic)
    return second if second.passed else replace(second, why=f"{AGAIN}: {second.why}")


def _softmax_allowances(X, dtype):
    star, m = _softmax(X.double())
    terms = None
    if dtype == "fp32":
        a = torch.where(star > 0, X.double().abs() + m.abs(), 0)
        terms = 3 * UNIT[dtype] * (3 + a + (star * a).sum(-1, keepdim=True)) * star
    return {"Y": (star, _allowed(dtype, star, _softmax(X)[0], terms))}


def _softmax(X):
    """Y, and the maximum of each row; each step rounds to X's dtype."""
    m = X.amax(-1, keepdim=True) if X.numel() else X[:, :1]
    e = (X - m.masked_fill(m == -torch.inf, 0)).exp()
    l = e.sum(-1, keepdim=True)
    return e / l.masked_fill(l == 0, 1), m
