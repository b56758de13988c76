"""What each warpgroup of a traced kernel was at: spans, what ran under what, Perfetto's JSON.  [floor 3]

A traced build leaves marks (kernels/hopper/trace.cuh): the multiprocessor's clock and the state that begins there.
Times are in cycles since the block's first mark; the GPU's own nanoseconds, read at both ends, give the cycle's length.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch

STATES = (
    "none", "nanoseconds", "for work", "for Q", "for K", "for turn", "QK", "for V", "PV", "for S", "softmax", "for O",
    "pack", "finish", "end",
)  # fmt: skip
NANOSECONDS, QK, PV, SOFTMAX, PACK, FINISH, END = map(
    STATES.index, ("nanoseconds", "QK", "PV", "softmax", "pack", "finish", "end")
)
WRAP = 1 << 32  # both clocks are read in 32 bits


@dataclass(frozen=True)
class Span:
    """A warpgroup at one thing, or one batch of products under way: [begin, end) in cycles."""

    what: str
    begin: int
    end: int

    @property
    def cycles(self) -> int:
        return self.end - self.begin


@dataclass
class Track:
    """One warpgroup.

    states    what it was at, one span after another
    products  its batches of products, from the first instruction to the moment when they were known to be done
    whole     False where it had more to tell than there was room
    ghz       cycles a nanosecond; None where it is not whole
    """

    states: list[Span] = field(default_factory=list)
    products: list[Span] = field(default_factory=list)
    whole: bool = False
    ghz: float | None = None


def read(marks: torch.Tensor, overlap: bool = True) -> list[list[Track]]:
    """The tracks of each block's warpgroups; marks int32 [blocks, warpgroups, marks, 2] as the kernel left them.

    overlap  False where products are waited for before the softmax, and not after it
    """
    blocks = []
    for block in marks.cpu().to(torch.int64).remainder(WRAP).tolist():
        starts = [track[0][0] for track in block if track[0][1]]
        blocks.append([_track(track, starts[0], overlap) for track in block if track[0][1]] if starts else [])
    return blocks


def _track(marks: list[list[int]], origin: int, overlap: bool) -> Track:
    found, ties = Track(), []
    told = [(when, state) for when, state in marks if state]
    points = []
    for when, state in told:
        if state == NANOSECONDS:
            ties.append(when)
        else:
            since = (when - origin) % WRAP
            points.append((since if since < WRAP // 2 else since - WRAP, state))
    found.states = [Span(STATES[state], a, b) for (a, state), (b, _) in zip(points, points[1:]) if b > a]
    found.whole = bool(points) and points[-1][1] == END
    if found.whole and len(ties) == 4:
        (first, its), (last, its_last) = ties[:2], ties[2:]
        if elapsed := (its_last - its) % WRAP:
            found.ghz = (last - first) % WRAP / elapsed
    qk = pv = None
    for when, state in points:
        if qk is not None and state == SOFTMAX:
            found.products.append(Span("QK", qk, when))
            qk = None
        if pv is not None and (state in (PACK, FINISH) or (state == SOFTMAX and not overlap)):
            found.products.append(Span("PV", pv, when))
            pv = None
        qk = when if state == QK else qk
        pv = when if state == PV else pv
    return found


# ---- what the tracks say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden:
    """How much of the softmax had products of a warpgroup under way beside it: parts of its cycles."""

    own: float  # its own: FlashAttention-3's overlap
    others: float  # another warpgroup's: its ping-pong
    either: float


def hidden(blocks: list[list[Track]]) -> Hidden:
    """Of all softmax spans of all tracks.  ValueError where there are none."""
    total = own = others = either = 0
    for tracks in blocks:
        unions = [_union(track.products) for track in tracks]
        for mine, track in enumerate(tracks):
            rest = _union([s for g, u in enumerate(unions) if g != mine for s in u])
            both = _union(unions[mine] + rest)
            for span in track.states:
                if span.what == "softmax":
                    total += span.cycles
                    own += _covered(span, unions[mine])
                    others += _covered(span, rest)
                    either += _covered(span, both)
    if not total:
        raise ValueError("the trace holds no softmax")
    return Hidden(own / total, others / total, either / total)


def shares(blocks: list[list[Track]]) -> dict[str, float]:
    """State -> its part of all the time that warpgroups spent, in the order of a step."""
    cycles = dict.fromkeys(STATES, 0)
    for tracks in blocks:
        for track in tracks:
            for span in track.states:
                cycles[span.what] += span.cycles
    total = sum(cycles.values())
    return {state: n / total for state, n in cycles.items() if n}


def steps(blocks: list[list[Track]]) -> tuple[list[int], list[int]]:
    """Cycles from one Q Kᵀ to the next: (within a row block, across two of them)."""
    within, across = [], []
    for tracks in blocks:
        for track in tracks:
            last, ended = None, False
            for span in track.states:
                ended |= span.what in ("for work", "finish")
                if span.what == "QK":
                    if last is not None:
                        (across if ended else within).append(span.begin - last)
                    last, ended = span.begin, False
    return within, across


def _union(spans: list[Span]) -> list[Span]:
    merged = []
    for span in sorted(spans, key=lambda s: s.begin):
        if merged and span.begin <= merged[-1].end:
            merged[-1] = Span("", merged[-1].begin, max(merged[-1].end, span.end))
        else:
            merged.append(Span("", span.begin, span.end))
    return merged


def _covered(span: Span, union: list[Span]) -> int:
    covered, n = 0, bisect_right([s.end for s in union], span.begin)
    for other in union[n:]:
        if other.begin >= span.end:
            break
        covered += min(span.end, other.end) - max(span.begin, other.begin)
    return covered


# ---- Perfetto -------------------------------------------------------------------------------------------------------


def perfetto(blocks: list[list[Track]], ghz: float, about: dict) -> dict:
    """Chrome's trace-event format, which Perfetto opens: a process a block, two threads a warpgroup; times in µs."""
    events = []
    for block, tracks in enumerate(blocks):
        for g, track in enumerate(tracks):
            for lane, (title, spans) in enumerate((("", track.states), (", tensor cores", track.products))):
                same = {"pid": block, "tid": 2 * g + lane}
                name = {"name": f"warpgroup {g}{title}"}
                events.append({"name": "thread_name", "ph": "M", **same, "args": name})
                events += [
                    {"name": s.what, "ph": "X", "ts": s.begin / ghz * 1e-3, "dur": s.cycles / ghz * 1e-3, **same}
                    for s in spans
                ]
        events.append({"name": "process_name", "ph": "M", "pid": block, "args": {"name": f"block {block}"}})
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}
