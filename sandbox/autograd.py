"""attention(): any forward with its generation's backward, as one differentiable function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import catalog, target
from .choose import MEASURED, choose_tile
from .problem import Problem, problem_of
from .variant import SECONDS_PER_MULTIPLY_ADD, Tile

PATIENCE = 120.0  # seconds that a simulated call may take without force=True
MOST_PLANS = 4096  # that are kept
UNBOUNDED = (-1, -1)


def attention(
    q, k, v, *, variant="v2", causal=False, align="bottom_right", window=UNBOUNDED, mask=None, softcap=0.0, scale=None,
    tile=None, return_lse=False, force=False,
):  # fmt: skip
    """Exact attention, softmax(scale · q kᵀ) v, differentiable in q, k and v.

    q        (batch, N_q, heads, head_dim), torch, float32, float16 or bfloat16, any strides >= 0
    k, v     (batch, N_k, heads_kv, head_dim); heads must be a multiple of heads_kv (GQA, MQA)
    variant  a generation ('v1', 'v2': its forward and its backward) or the name of a forward kernel
    causal   row i sees no key after i + off; off = N_k - N_q for align='bottom_right', 0 for 'top_left'
    window   (left, right) keys around i + off, -1 = unbounded
    mask     bool, broadcastable to (batch, heads, N_q, N_k), True = seen
    softcap  c > 0 replaces a score s by c·tanh(s/c)
    scale    1/√head_dim unless given
    tile     (Br, Bc); None: estimated to be the fastest for the problem and the device; 'measured': the fastest of the
             few best estimated, timed at the first call of such a shape (seconds, on these tensors) and kept on disk
    force    simulate a call that is estimated to take longer than two minutes

    Returns O like q; with return_lse also LSE (batch, heads, N_q), float32, natural log, -inf for a row that sees
    nothing (its O and its gradients are 0).  LSE itself is not differentiable.  Gradients of the v2 backward are
    summed by atomic adds unless torch.use_deterministic_algorithms(True) is set.
    Tensors are on the CPU for the simulator, on CUDA for a GPU; see sandbox.target.

    Raises ValueError or TypeError, naming the argument, before anything is launched.
    """
    forward, device = catalog.forward(variant), target.device()
    plan = _plan(forward, device, q, k, v, mask, tile, causal, align, window, softcap, scale)
    problem = plan.problem
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad:
        backward = catalog.backward_of(forward, torch.are_deterministic_algorithms_enabled())
        backward_tile = _tile(tile, problem, device, backward, lambda: _of_backward(plan, q, k, v, mask))
    if device.simulated and not force:
        refuse_if_slow(problem, "fwd" if not needs_grad else "fwd+bwd", forward.pace)
    seen = _seen(q, mask, problem)
    if needs_grad:
        O, LSE = _Attention.apply(q, k, v, seen, plan, device, backward, backward_tile)
    elif forward_ad._current_level >= 0:  # torch says that there is no jvp, should one be asked for
        O, LSE = _Attention.apply(q, k, v, seen, plan, device, None, None)
    else:
        O, LSE = _forward(q, k, v, seen, plan)
    return (O, LSE) if return_lse else O


class Plan(NamedTuple):
    """What was found out about a call of attention(), for all that are like it."""

    problem: Problem
    launch: Callable


_plans: dict[tuple, Plan] = {}


def _plan(forward, device, q, k, v, mask, tile, causal, align, window, softcap, scale) -> Plan:
    """The plan of a call that is checked, or that is like one that was.

    All that a check looks at is in the key; types are, since 1, 1.0 and True are equal and not accepted alike.  What is
    no tensor or cannot be a key is checked every time.  A prototype that was edited is another `forward`.
    """
    try:
        key = (
            forward, device, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            mask is None or (mask.shape, mask.dtype, mask.device), bool(causal), align, window, softcap, scale, tile,
            type(softcap), type(scale), window is UNBOUNDED or _types(window), tile is None or _types(tile),
        )  # fmt: skip
        if (plan := _plans.get(key)) is not None:
            return plan
    except (AttributeError, TypeError):
        key = None
    problem = problem_of(
        q, k, v, causal=causal, align=align, window=window, mask=mask, softcap=softcap, scale=scale
    )  # fmt: skip
    check_place(q, device)
    tile = _tile(tile, problem, device, forward, lambda: _of_forward(problem, q, k, v, mask))
    plan = Plan(problem, forward.launcher(problem, tile, device))
    if key is not None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _types(option) -> tuple:
    return (type(option), *map(type, option)) if isinstance(option, tuple) else (type(option),)


def refuse_if_slow(problem, direction: str, pace: float = SECONDS_PER_MULTIPLY_ADD) -> None:
    """Raises ValueError with the estimated time where simulating takes longer than PATIENCE."""
    from .device.simulator import estimate_seconds

    seconds = estimate_seconds(problem, direction, pace)
    if seconds > PATIENCE:
        raise ValueError(
            f"{problem} would take about {_duration(seconds)} on the simulator, more than {PATIENCE:.0f} s: "
            "force=True (--force) runs it all the same"
        )


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36e3
        else f"{seconds / 3600:.0f} h"
    )


def check_place(q, device) -> None:
    """Raises ValueError where kernels on this device do not take tensors that lie where q does."""
    if q.device.type != target.torch_device().type:
        here = "the simulator takes CPU tensors" if device.simulated else "the GPU kernels take CUDA tensors"
        raise ValueError(f"q is on {q.device}: {here}")


def tile_of(tile, problem, device, variant) -> Tile:
    """The Tile that `tile`, a Tile, a pair or None, stands for.  Raises TypeError or Infeasible."""
    if tile is None:
        return choose_tile(problem, device, variant)
    if isinstance(tile, Tile):
        chosen = tile
    elif isinstance(tile, (tuple, list)) and len(tile) == 2:
        chosen = Tile(*tile)
    else:
        raise TypeError(f"tile={tile!r}: expected a pair (Br, Bc) of integers, None, or in attention() {MEASURED!r}")
    variant.fit(problem, chosen, device)
    return chosen


def _tile(tile, problem, device, variant, tensors: Callable) -> Tile:
    """As tile_of; for 'measured' the fastest on the tensors of a launch."""
    if not isinstance(tile, str) or tile != MEASURED:
        return tile_of(tile, problem, device, variant)
    from .measure.fastest import fastest

    return fastest(problem, variant, device, tensors)


def _seen(q, mask, problem) -> torch.Tensor:
    """The mask [B, H, N_q, N_k], or one that hides nothing."""
    if mask is None:
        return everything(q.device, problem.B, problem.H)
    return mask.expand(problem.B, problem.H, problem.N_q, problem.N_k)


def _of_forward(problem, q, k, v, mask) -> list[torch.Tensor]:
    """What a forward's launch takes, detached; with outputs of its own."""
    q, k, v = (x.detach() for x in (q, k, v))
    return [q, k, v, _seen(q, mask, problem), *_outputs(q)]


def _of_backward(plan: Plan, q, k, v, mask) -> list[torch.Tensor]:
    """What a backward's launch takes, detached, with O for dO; with outputs of its own."""
    tensors = _of_forward(plan.problem, q, k, v, mask)
    with on(q.device):
        plan.launch(plan.problem, *tensors)
    O, gradients = tensors[-2], (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return [*tensors, O, *gradients]


def _forward(q, k, v, seen, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    O, LSE = _outputs(q)
    with on(q.device):
        plan.launch(plan.problem, q, k, v, seen, O, LSE)
    return O, LSE


def _outputs(q) -> tuple[torch.Tensor, torch.Tensor]:
    B, N_q, H, d = q.shape
    O = torch.empty(B, N_q, H, d, dtype=q.dtype, device=q.device)
    return O, torch.empty(B, H, N_q, dtype=torch.float32, device=q.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen, plan, device, backward, tile):
        O, LSE = _forward(q, k, v, seen, plan)
        ctx.save_for_backward(q, k, v, seen, O, LSE)
        ctx.call = plan.problem, device, backward, tile
        ctx.mark_non_differentiable(LSE)
        return O, LSE

    @staticmethod
    def backward(ctx, dO, _):
        q, k, v, seen, O, LSE = ctx.saved_tensors
        problem, device, backward, tile = ctx.call
        dQ, dK, dV = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        with on(q.device):
            backward.launcher(problem, tile, device)(problem, q, k, v, seen, O, LSE, dO, dQ, dK, dV)
        return dQ, dK, dV, *[None] * 5


def everything(device: torch.device, B: int, H: int) -> torch.Tensor:
    """True [B, H, 1, 1], on this device: a mask that hides nothing.  Made once a stream, as streams do not wait for one
    another; a graph, which any stream may run, has its own."""
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.ones((), dtype=torch.bool, device=device).expand(B, H, 1, 1)
    return _everything(device, torch._C._cuda_getCurrentRawStream(device.index), B, H)


@functools.lru_cache(256)
@torch.inference_mode(False)  # a backward keeps it
def _everything(device: torch.device, stream: int, B: int, H: int) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool, device=device).expand(B, H, 1, 1)


def on(device: torch.device):
    """A context: launches go to this device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
