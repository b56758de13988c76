"""attention(): any forward with its generation's backward, as one differentiable function."""

from __future__ import annotations

import contextlib
import functools

import torch

from . import catalog, target
from .choose import choose_tile
from .problem import problem_of
from .variant import SECONDS_PER_MULTIPLY_ADD, Tile

PATIENCE = 120.0  # seconds that a simulated call may take without force=True


def attention(
    q, k, v, *, variant="v2", causal=False, align="bottom_right", window=(-1, -1), mask=None, softcap=0.0, scale=None,
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
    tile     (Br, Bc); chosen for the problem and the device unless given
    force    simulate a call that is estimated to take longer than two minutes

    Returns O like q; with return_lse also LSE (batch, heads, N_q), float32, natural log, -inf for a row that sees
    nothing (its O and its gradients are 0).  LSE itself is not differentiable.  Gradients of the v2 backward are
    summed by atomic adds unless torch.use_deterministic_algorithms(True) is set.
    Tensors are on the CPU for the simulator, on CUDA for a GPU; see sandbox.target.

    Raises ValueError or TypeError, naming the argument, before anything is launched.
    """
    forward = catalog.forward(variant)
    problem = problem_of(
        q, k, v, causal=causal, align=align, window=window, mask=mask, softcap=softcap, scale=scale
    )  # fmt: skip
    device = target.device()
    check_place(q, device)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    backward = catalog.backward_of(forward, deterministic) if needs_grad else None
    tiles = [tile_of(tile, problem, device, x) for x in ([forward, backward] if needs_grad else [forward])]
    if device.simulated and not force:
        refuse_if_slow(problem, "fwd" if not needs_grad else "fwd+bwd", forward.pace)
    seen = everything(q.device) if mask is None else mask
    seen = seen.expand(problem.B, problem.H, *((1, 1) if mask is None else (problem.N_q, problem.N_k)))
    O, LSE = _Attention.apply(q, k, v, seen, problem, device, forward, backward, tiles)
    return (O, LSE) if return_lse else O


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
        raise TypeError(f"tile={tile!r}: expected a pair (Br, Bc) of integers, or None")
    variant.fit(problem, chosen, device)
    return chosen


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen, problem, device, forward, backward, tiles):
        O = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        LSE = torch.empty(problem.B, problem.H, problem.N_q, device=q.device)
        with on(q.device):
            forward.launcher(problem, tiles[0], device)(problem, q, k, v, seen, O, LSE)
        ctx.save_for_backward(q, k, v, seen, O, LSE)
        ctx.call = problem, device, backward, tiles[-1]
        ctx.mark_non_differentiable(LSE)
        return O, LSE

    @staticmethod
    def backward(ctx, dO, _):
        q, k, v, seen, O, LSE = ctx.saved_tensors
        problem, device, backward, tile = ctx.call
        dQ, dK, dV = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        with on(q.device):
            backward.launcher(problem, tile, device)(problem, q, k, v, seen, O, LSE, dO, dQ, dK, dV)
        return dQ, dK, dV, *[None] * 6


def everything(device: torch.device) -> torch.Tensor:
    """True, on this device: a mask that hides nothing.  Made once a stream, as streams do not wait for one another; a
    graph, which any stream may run, has its own."""
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.ones((), dtype=torch.bool, device=device)
    return _everything(device, torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
@torch.inference_mode(False)  # a backward keeps it
def _everything(device: torch.device, stream: int) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool, device=device)


def on(device: torch.device):
    """A context: launches go to this device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
