"""A process that compiles for sm_90a, whatever the tests run on."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context

import pytest


@contextmanager
def child():
    """A process in which the target is sm_90a and no GPU is seen; it does one job at a time."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SANDBOX_TARGET", "compile")
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        environment.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(os.getpid).result()  # it has started, in this environment
    with pool:
        yield pool
        with suppress(BrokenProcessPool):
            pool.submit(os._exit, 0)  # at its usual end Numba would unload each kernel, seconds for a few
