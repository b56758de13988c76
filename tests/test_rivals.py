"""Rivals: what each says that it cannot do, and that Triton's kernel is exact."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sandbox.measure import gate, rivals
from sandbox.problem import Problem


@pytest.mark.parametrize(
    "name, dtype, direction, cuda, why",
    [
        ("torch:flash", "fp16", "fwd", False, "there is no GPU here"),
        ("torch:flash", "fp16", "softmax", True, "computes attention"),
        ("triton", "fp16", "fwd", False, "there is no GPU here"),
        ("triton", "fp16", "bwd", True, "has a forward only"),
        ("triton", "fp32", "fwd", True, "is not installed|has fp16 and bf16"),
    ],
)
def test_rivals_say_what_they_lack(monkeypatch, name, dtype, direction, cuda, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    problem = Problem(1, 1, 1, 16, 16, 64, dtype)
    with pytest.raises(rivals.Unavailable, match=f"{name}:? ({why})"):
        rivals.launcher(name, problem, gate.gaussian(problem, 0), direction)


def test_the_reason_is_that_of_the_backend_asked_for():
    """torch warns of every backend's reason; those that nobody asked for were only switched off."""
    lines = ["Memory efficient kernel not used because:", "Mem Efficient attention has been runtime disabled."]
    lines += ["Flash attention kernel not used because:", "Expected fp16. (Triggered internally at a.cpp:1.)"]
    lines += ["CuDNN attention kernel not used because:", "cuDNN attention has been runtime disabled."]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for line in lines:
            warnings.warn(line, stacklevel=1)
    error = RuntimeError("No available kernel. Aborting execution.")
    assert rivals.reason("torch:flash", error, told) == "Expected fp16."
    assert rivals.reason("torch:cudnn", error, told) == "cuDNN attention has been runtime disabled."
    assert rivals.reason("triton", error, told) == "No available kernel. Aborting execution."


PROVE = """
import torch
from sandbox import target
from sandbox.mask import Mask
from sandbox.measure import gate, rival_triton
from sandbox.measure.cases import laid_out
from sandbox.problem import Problem
from sandbox.variant import Tile, Variant
gpu = torch.cuda.is_available()
for d, tiles in rival_triton.TILES.items():
    cases = [(tile, N, dtype, layout) for tile in tiles for N, dtype, layout in (
        (130, "fp16", "contiguous"), (129 if gpu else 65, "bf16" if gpu else "fp16", "heads-first"))]
    cases += [(None, 200, "fp16", "gapped"), (None, 1, "bf16", "contiguous")] * gpu  # None: tuned, which takes a GPU
    for tile, N, dtype, layout in cases:
        for causal in (False, True):
            p = Problem(2 if tile == tiles[0] else 1, 2, 1, N, N, d, dtype, mask=Mask(causal))
            x = gate.gaussian(p, 0, target.torch_device())
            x = gate.Inputs(*(laid_out(y, layout) for y in (x.q, x.k, x.v)))
            def launch(p, Q, K, V, mask, O, LSE):
                rival_triton.run(Q, K, V, O, LSE, causal, p.scale, tile)
            variant = Variant("triton", "fwd", "", lambda *what: None, lambda *what: launch)
            verdict = gate.check(variant, p, Tile(1, 1), x, target.device())
            print("passed" if verdict.passed else f"{p}, {layout}, {tile}: {verdict.why}")
"""


def test_triton_passes_our_gate():
    """Its every tile, ragged, causal, two heads to a key head, strided; interpreted where there is no GPU.

    bf16 runs on a GPU alone: Triton's interpreter multiplies bf16 by its bits.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import triton

    of_triton, of_numpy = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, np))
    if not torch.cuda.is_available() and of_triton < (3, 7) and of_numpy >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run on numpy {np.__version__}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    environment |= {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROVE], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) >= 36 and set(lines) == {"passed"}, done.stdout + done.stderr
