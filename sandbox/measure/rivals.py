"""Who a kernel is measured against: torch's own attention, one backend at a time.  [floor 3]

A rival computes the same from the very same tensors; what its backend wants otherwise, such as another layout, is made
ready outside the launch.  It passes no gate of ours, but its error against the oracle is on record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

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
NAMES = tuple(BACKENDS)


class Unavailable(ValueError):
    """A rival that cannot run here, or not this problem; the reason in one line."""


def launcher(name: str, problem: Problem, inputs, direction: str) -> tuple[Callable, Callable]:
    """(launch, outputs): a launch without arguments; outputs() gives O, or dQ, dK, dV, as [B, N, H, d].

    The backward is that of autograd alone: its graph is made here.  Raises Unavailable with the reason.
    """
    if direction == "softmax":
        raise Unavailable(f"{name} computes attention, not a softmax alone")
    if not torch.cuda.is_available():
        raise Unavailable(f"{name}: there is no GPU here")
    mask = problem.mask
    if mask.boolean or mask.window != (-1, -1) or problem.softcap or (mask.causal and problem.N_q != problem.N_k):
        raise Unavailable(f"{name}: only full and square causal attention is compared")
    backward, found = direction != "fwd", {}
    q, k, v = (x.detach().transpose(1, 2).requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v))
    grouped = problem.H != problem.H_kv

    def forward():
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(
                q, k, v, is_causal=mask.causal, scale=problem.scale, enable_gqa=grouped
            )  # fmt: skip

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            O = forward()
            torch.cuda.synchronize()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise Unavailable(f"{name}: S and P do not fit in the GPU's memory") from None
            raise Unavailable(f"{name}: {_reason(error, told)}") from None
    if not backward:

        def launch():
            found["O"] = forward()

    else:
        dO = inputs.dO.transpose(1, 2)

        def launch():
            found["dQ"], found["dK"], found["dV"] = torch.autograd.grad(O, (q, k, v), dO, retain_graph=True)

    return launch, lambda: {letter: x.transpose(1, 2) for letter, x in found.items()}


def _reason(error: RuntimeError, told: list) -> str:
    """What torch warned of before it gave up, else the error's first line."""
    words = [str(w.message).partition(" (Triggered internally")[0].strip() for w in told]
    words = [line for line in words if "not used because" not in line or not line.endswith("because:")]
    return (words[-1] if words else str(error).strip().splitlines()[0])[:200]
