"""Standard attention as torch runs it, one kernel a step, S and P in global memory: the yardstick of claims 3 and 6.
[floor 3]"""

from __future__ import annotations

import torch

from ..problem import Problem

NAME = "standard"  # in the column `variant`; the catalog has no such kernel


def launcher(p: Problem, inputs, direction: str = "fwd"):
    """A launch (no argument) of FA1's Algorithm 0, or of the backward's five products from the stored P (Algorithm 3).

    The layout that torch's products like, and P, are made ready outside the launch.
    """
    Q, K, V = (_heads(x, p.H) for x in (inputs.q, inputs.k, inputs.v))
    hidden = None
    if p.mask.banded:
        hidden = torch.from_numpy(~p.mask.seen(p.N_q, p.N_k)).to(Q.device)

    def probabilities():
        S = torch.baddbmm(Q.new_empty(()), Q, K.mT, beta=0, alpha=p.scale)  # S = scale Q Kᵀ
        if hidden is not None:
            S.masked_fill_(hidden, -torch.inf)
        return torch.softmax(S, -1)  # P

    if direction == "fwd":
        return lambda: torch.bmm(probabilities(), V)  # O = P V

    P, dO = probabilities(), _heads(inputs.dO, p.H)

    def backward():
        dV = torch.bmm(P.mT, dO)
        dP = torch.bmm(dO, V.mT)
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)  # P (dP - rowsum(dP P))
        del dP
        return p.scale * torch.bmm(dS, K), p.scale * torch.bmm(dS.mT, Q), dV

    return backward


def _heads(x: torch.Tensor, H: int) -> torch.Tensor:
    """[B, N, heads, d] -> [B H, N, d], a key/value head once for each query head that it serves."""
    return x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2).flatten(0, 1).contiguous()
