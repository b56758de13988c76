"""How long a launch takes on the GPU, with a cold L2.  [floor 3]

Nothing is timed that has not passed the gate in the same run: `time` takes the Verdict, and refuses a failed one.

One sample is:  flush L2 | start event | launch | end event.  The flush also keeps the host's cost out of the figure:
while the GPU still writes the flush buffer, the host enqueues both events and the launch, so that the kernels follow
one another without a gap.  Where one flush is shorter than the host needs, it is repeated.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from time import perf_counter

import torch

SAMPLES = (3, 100)  # at least, at most
BUDGET_S = 0.5  # of launches, between those two
ROUNDS = 10  # in which launches take turns, where several are compared


class Ungated(RuntimeError):
    """A launch that has not passed the gate was to be timed."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the quantiles that 20 % and 80 % of the samples stay below.

    again  by how much the median of the second half of the samples differs from that of the first
    """

    ms: float
    ms_p20: float
    ms_p80: float
    samples: int
    again: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        times, half = torch.tensor(samples, dtype=torch.float64), len(samples) // 2
        ms_p20, ms, ms_p80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        again = torch.quantile(times[half:], 0.5) / torch.quantile(times[:half], 0.5) - 1
        return cls(ms, ms_p20, ms_p80, len(samples), float(again))


def time(verdict, budget_s: float = BUDGET_S) -> Timing:
    """Median and quantiles of verdict.launch.  Raises Ungated unless the verdict passed, ValueError without a GPU."""
    return time_launch(gated(verdict), budget_s)


def gated(verdict):
    """verdict.launch, to be timed.  Raises as `time` does."""
    if verdict is None or not verdict.passed:
        raise Ungated("not timed: nothing is timed that has not passed the gate in the same run")
    if not torch.cuda.is_available():
        raise ValueError("not timed: there is no GPU here, and the simulator's time says nothing about one")
    return verdict.launch


def time_launch(launch, budget_s: float = BUDGET_S) -> Timing:
    """The ungated half of `time`, for yardsticks that are not ours (torch, cuDNN)."""
    return time_together([launch], budget_s, rounds=1)[0]


def time_together(launches: list, budget_s: float = BUDGET_S, rounds: int = ROUNDS) -> list[Timing]:
    """Several launches, ungated, budget_s each: they take turns, so that all meet the same clock and temperature.

    A GPU at its power limit is slower after a second of work than at first; what was timed last would look worse.  It
    is slower, too, after a launch that drew much power: who follows whom is drawn anew in each round.
    """
    turns, shuffled = list(range(len(launches))), random.Random(len(launches)).shuffle
    flushes, samples = [], []
    for launch in launches:
        launch()  # warm: whatever is compiled, allocated or initialised once
        torch.cuda.synchronize()
        flushes.append(_flusher(_host_seconds(launch)))
        first = _sample(flushes[-1], launch)
        samples.append(min(max(SAMPLES[0], int(budget_s / max(first * 1e-3, 1e-6))), SAMPLES[1]))
    times = [[] for _ in launches]
    for done in range(rounds):
        shuffled(turns)
        for n in turns:
            upto = samples[n] * (done + 1) // rounds
            times[n] += [_sample(flushes[n], launches[n]) for _ in range(len(times[n]), upto)]
    return [Timing.of(each) for each in times]


def _sample(flush, launch) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_seconds(launch) -> float:
    """What the host spends to enqueue one launch."""
    begin = perf_counter()
    launch()
    seconds = perf_counter() - begin
    torch.cuda.synchronize()
    return seconds


def _flusher(host_seconds: float):
    """A call that overwrites twice the L2, as often as it takes to outlast the host's enqueueing."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(2 * l2, dtype=torch.int8, device="cuda")
    buffer.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        buffer.zero_()
    end.record()
    end.synchronize()
    once = start.elapsed_time(end) * 1e-3 / 10
    repeats = math.ceil(1 + 2 * host_seconds / once)

    def flush():
        for _ in range(repeats):
            buffer.zero_()

    return flush
