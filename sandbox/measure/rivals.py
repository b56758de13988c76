"""Who a kernel is measured against: torch's own attention, one backend at a time, and Triton's.  [floor 3]

A rival computes the same from the very same tensors; what its backend wants otherwise, such as another layout, is made
ready outside the launch.  It passes no gate of ours, but its error against the oracle is on record.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..problem import Problem

BACKENDS = {
    "torch:flash": SDPBackend.FLASH_ATTENTION,
    "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch:math": SDPBackend.MATH,
}
TRITON = "triton"
NAMES = (*BACKENDS, TRITON)


class Unavailable(ValueError):
    """A rival that cannot run here, or not this problem; the reason in one line."""


def launcher(name: str, problem: Problem, inputs, direction: str) -> tuple[Callable, Callable]:
    """(launch, outputs): a launch without arguments, made once; outputs() gives O, or dQ, dK, dV, as [B, N, H, d].

    The backward is that of autograd alone: its graph is made here.  Raises Unavailable with the reason.
    """
    if direction == "softmax":
        raise Unavailable(f"{name} computes attention, not a softmax alone")
    if not torch.cuda.is_available():
        raise Unavailable(f"{name}: there is no GPU here")
    mask = problem.mask
    if mask.boolean or mask.window != (-1, -1) or problem.softcap or (mask.causal and problem.N_q != problem.N_k):
        raise Unavailable(f"{name}: only full and square causal attention is compared")
    make = _triton if name == TRITON else _torch
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            launch, outputs = make(name, problem, inputs, direction)
            launch()
            torch.cuda.synchronize()
        except Unavailable:
            raise
        except torch.OutOfMemoryError:
            raise Unavailable(f"{name}: does not fit in the GPU's memory") from None
        except Exception as error:  # whatever a library of others may raise
            raise Unavailable(f"{name}: {reason(name, error, told)}") from None
    return launch, outputs


def _torch(name, problem, inputs, direction):
    backward, found = direction != "fwd", {}
    q, k, v = (x.detach().transpose(1, 2).requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v))
    causal, grouped = problem.mask.causal, problem.H != problem.H_kv

    def forward():
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=problem.scale, enable_gqa=grouped)

    if not backward:

        def launch():
            found["O"] = forward()

    else:
        O, dO = forward(), inputs.dO.transpose(1, 2)

        def launch():
            found["dQ"], found["dK"], found["dV"] = torch.autograd.grad(O, (q, k, v), dO, retain_graph=True)

    return launch, lambda: {letter: x.transpose(1, 2) for letter, x in found.items()}


def _triton(name, problem, inputs, direction):
    if direction != "fwd":
        raise Unavailable(f"{name}: has a forward only")
    try:
        from . import rival_triton as its
    except ImportError as error:
        raise Unavailable(f"{name}: is not installed ({error})") from None
    p = problem
    if p.dtype not in its.DTYPES or p.d not in its.TILES or p.N_q != p.N_k or p.scale <= 0:
        sizes = ", ".join(map(str, its.TILES))
        raise Unavailable(f"{name}: has {' and '.join(its.DTYPES)}, head_dim {sizes}, N_q = N_k, a scale above 0")
    q, k, v = inputs.q, inputs.k, inputs.v
    O, LSE = torch.empty_like(q), torch.empty(p.B, p.H, p.N_q, device=q.device)
    return lambda: its.run(q, k, v, O, LSE, p.mask.causal, p.scale), lambda: {"O": O}


def reason(name: str, error: Exception, told: list) -> str:
    """What torch warned of this very backend (it says so for each, a heading first), else the error's first line."""
    lines = [str(w.message).partition(" (Triggered internally")[0].strip() for w in told]
    backend, heading = name.removeprefix("torch:"), "not used because"
    for above, line in itertools.pairwise(lines):
        if heading in above and backend in above.lower() and heading not in line:
            return line[:200]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def versions() -> dict[str, str]:
    """Of what the rivals are made of, beyond torch."""
    found = {}
    if (cudnn := torch.backends.cudnn.version()) is not None:
        found["cudnn"] = str(cudnn)
    with suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found
