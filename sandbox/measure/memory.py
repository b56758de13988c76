"""Peak memory of a call: the most bytes of torch tensors that it holds at once beyond what was there.  [floor 3]"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of torch tensors that run() allocates, outputs too: on the GPU where there is one, else on the CPU.

    The GPU's figure is its allocator's, in blocks of 512 bytes; the CPU's follows every allocation.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    profile = torch.profiler.profile(profile_memory=True)
    with _quiet():
        profile.start()
    try:
        run()
    finally:
        with _quiet():
            profile.stop()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _quiet():
    """The profiler tells standard error that it starts and stops; nobody asked."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
