"""Which tile each kind of problem takes on the tensor cores, and what ptxas says of its kernels; needs no GPU.

    python tests/spills.py [VARIANT ...] [--d 64,128] [--dtype bf16] [--kind softcap] [--causal 1] [--heads 32]

A sweep of an hour, or of minutes where it asks for less, to be made where such a kernel or the compiler has changed.
Exits with 1 where one spills.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
BY = {"fwd_v2_mma": 16, "fwd_v1_mma": 32, "fwd_v2_mma_split_k": 32, "bwd_v2_mma": 16, "bwd_v2_mma_deterministic": 16}
KINDS = {"plain": {}, "negative": {"scale": -0.3}, "softcap": {"softcap": 5.0}}
OPTIONS = {
    "d": ",".join(map(str, range(16, 257, 16))), "dtype": "bf16,fp16", "kind": ",".join(KINDS), "causal": "0,1",
    "heads": "32,2",  # many blocks, or so few that they are smaller
}  # fmt: skip


def told(job: tuple) -> tuple:
    return job, compiled(*job)


def compiled(name: str, d: int, dtype: str, kind: str, causal: bool, heads: int) -> tuple[bool, str]:
    """(whether nothing spills, the tile and what ptxas says)."""
    import torch

    from sandbox import catalog
    from sandbox.choose import choose_tile
    from sandbox.device.launch import compiling
    from sandbox.mask import Mask
    from sandbox.problem import Problem
    from sandbox.variant import HOPPER, Infeasible

    variant = catalog.find(name)
    problem = Problem(1, heads, heads, 4096, 4096, d, dtype, mask=Mask(causal), **KINDS[kind])
    Q = torch.empty(1, 4096, heads, d, dtype=problem.torch_dtype, device="meta")
    LSE, gradients = torch.empty(1, heads, 4096, device="meta"), (Q, Q, Q, Q) if variant.direction == "bwd" else ()
    try:
        tile = choose_tile(problem, HOPPER, variant)
        with compiling() as done:
            variant.launcher(problem, tile, HOPPER)(problem, Q, Q, Q, None, Q, LSE, *gradients)
    except Infeasible as misfit:
        return False, str(misfit)
    kernels = [f"{launch.name} {report.registers} registers" for launch, report in done]
    return not any(report.spills or report.stack for _, report in done), f"{tile}: {', '.join(kernels)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=list(BY))
    for option, default in OPTIONS.items():
        parser.add_argument(f"--{option}", default=default)
    given = parser.parse_args()
    lists = [getattr(given, option).split(",") for option in OPTIONS]
    os.environ |= {"SANDBOX_TARGET": "compile", "CUDA_VISIBLE_DEVICES": ""}
    jobs = [
        (name, int(d), dtype, kind, causal == "1", int(heads))
        for name, d, dtype, kind, causal, heads in itertools.product(given.variants, *lists)
        if int(d) % BY[name] == 0 and (name == "fwd_v2_mma" or heads == lists[-1][0])
    ]
    all_good = True
    with get_context("spawn").Pool(maxtasksperchild=20) as pool:  # ProcessPoolExecutor may hang where it renews workers
        for n, ((name, d, dtype, kind, causal, _), (good, what)) in enumerate(pool.imap_unordered(told, jobs)):
            all_good &= good
            which = f"{name} d={d} {dtype} {kind} causal={int(causal)}"
            print(f"{n + 1}/{len(jobs)}  {'ok' if good else 'NO'}  {which:55}  {what}", flush=True)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
