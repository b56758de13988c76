"""What a call costs the host: the time until its kernel is enqueued, not until it is done.  [floor 3: GPU]

A launch is timed as it is made in practice, with other tensors each time, and only behind the gate.  The GPU is waited
for between a few calls and the next, outside the clock: a host that runs ahead of its GPU is blocked when the queue is
full, and would measure the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from .. import autograd, target
from ..choose import choose_tile
from ..problem import Problem
from ..variant import Device, Variant
from . import gate
from .timing import Ungated

KEY = ("what", "dtype", "B", "H", "H_kv", "N_q", "N_k", "d", "causal")
CALLS, SAMPLES = 10, 200  # calls between two waits, far from filling a queue; and how often
SDPA = "torch SDPA"


@dataclass(frozen=True)
class Cost:
    """Microseconds of host time a call: the median over samples, and what 20 % and 80 % of them stay below."""

    us: float
    us_p20: float
    us_p80: float

    @classmethod
    def of(cls, call: Callable[[], object], wait: Callable[[], object]) -> Cost:
        """Of call(); wait() returns when what it enqueued is done.  The first calls, which compile, do not count."""
        found = []
        for sample in range(-3, SAMPLES):
            wait()
            begin = perf_counter()
            for _ in range(CALLS):
                call()
            if sample >= 0:
                found.append((perf_counter() - begin) / CALLS * 1e6)
        wait()
        return cls.median(found)

    @classmethod
    def median(cls, found: Sequence[float]) -> Cost:
        """Of microseconds."""
        us_p20, us, us_p80 = torch.quantile(torch.tensor(found), torch.tensor([0.2, 0.5, 0.8])).tolist()
        return cls(us, us_p20, us_p80)


def measure(variant: Variant, problem: Problem, device: Device) -> list[dict]:
    """Two rows: the launch of a kernel that is built, into outputs that are there; and attention(), which checks its
    arguments, chooses a tile and allocates.  Raises Ungated where the kernel is not exact."""
    tile = choose_tile(problem, device, variant)
    sets = [gate.gaussian(problem, seed, target.torch_device()) for seed in (0, 1)]
    verdict = gate.check(variant, problem, tile, sets[0], device)
    if not verdict.passed:
        raise Ungated(f"{variant.name} on {problem}: {verdict.why}")
    launches = itertools.cycle(gate.prepare(variant, problem, tile, x, device)[0] for x in sets)
    inputs = itertools.cycle((x.q, x.k, x.v) for x in sets)
    calls = {
        f"launch {variant.name}": lambda: next(launches)(),
        f"attention {variant.name}": lambda: autograd.attention(
            *next(inputs), variant=variant.name, causal=problem.mask.causal
        ),
    }
    return [_row(what, problem, call) for what, call in calls.items()]


def yardstick(problem: Problem) -> dict:
    """The row of torch.nn.functional.scaled_dot_product_attention on the same problem."""
    sets = [gate.gaussian(problem, seed, target.torch_device()) for seed in (0, 1)]
    inputs = itertools.cycle([y.transpose(1, 2) for y in (x.q, x.k, x.v)] for x in sets)
    options = {"is_causal": problem.mask.causal, "enable_gqa": problem.group > 1}
    return _row(SDPA, problem, lambda: torch.nn.functional.scaled_dot_product_attention(*next(inputs), **options))


def _row(what: str, p: Problem, call: Callable[[], object]) -> dict:
    return row_of(what, p, Cost.of(call, torch.cuda.synchronize))


def row_of(what: str, p: Problem, cost: Cost) -> dict:
    sizes = {name: getattr(p, name) for name in ("dtype", "B", "H", "H_kv", "N_q", "N_k", "d")}
    return {"what": what, **sizes, "causal": p.mask.causal, **vars(cost)}
