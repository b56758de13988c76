"""What the experiments feed to the kernels: real queries, keys and values, or Gaussian draws."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from sandbox import target
from sandbox.measure import gate
from sandbox.problem import Problem

NAMES = ("minilm", "gauss")
MINILM = Path(__file__).parent / "data" / "minilm_qkv.npz"
LAYERS, TOKENS, HEADS, HEAD_DIM = 3, 512, 4, 32  # of the file; data/README.md says which


def check(name: str, problem: Problem):
    """Raises ValueError, in one line, where the named input has no such sizes."""
    if name == "gauss":
        return
    for what, wanted, there in (
        ("--batch", problem.B, LAYERS),
        ("--heads", problem.H, HEADS),
        ("--seqlen", max(problem.N_q, problem.N_k), TOKENS),
    ):
        if wanted > there:
            raise ValueError(f"{what} {wanted}: the minilm input has {there}; ask for less, or take --input gauss")
    if problem.d != HEAD_DIM:
        raise ValueError(
            f"--head-dim {problem.d}: the minilm input has {HEAD_DIM}; leave it out, or take --input gauss"
        )


def make(name: str, problem: Problem, seed: int) -> gate.Inputs:
    """Tensors [B, N, H, d] of the problem's sizes and dtype, where the kernels run; dO is always a Gaussian draw.

    minilm   the first N tokens; a batch entry is a layer of the model, a head a head
    gauss    N(0, 1)
    """
    check(name, problem)
    gaussian = gate.gaussian(problem, seed, target.torch_device())
    if name == "gauss":
        return gaussian
    q, k, v = (
        torch.from_numpy(x[: problem.B, :N, :H]).to(target.torch_device(), problem.torch_dtype).contiguous()
        for x, N, H in zip(_minilm(), (problem.N_q, problem.N_k, problem.N_k), (problem.H, problem.H_kv, problem.H_kv))
    )
    return gate.Inputs(q, k, v, dO=gaussian.dO)


@functools.cache
def _minilm() -> tuple[np.ndarray, ...]:
    with np.load(MINILM) as file:
        return file["q"], file["k"], file["v"]
