"""Looks for a case that a kernel fails, and for the smallest such case.  [floor 3]

The spread comes first, then what hypothesis draws until the time is up.  A failure is made smaller by the steps of
`simpler` rather than by hypothesis, which cannot begin at a case that it did not draw.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ..device.simulator import SimulatorError
from ..problem import DTYPES
from ..variant import Device, Infeasible, Tile, Variant
from . import gate, locate, strategies
from .cases import Case, Rows
from .spread import spread


@dataclass(frozen=True)
class Failure:
    """kind    what failed, coarsely: outputs' names, an exception's name; the same while a failure is made smaller
    why     in a line
    where   a picture or an account of several lines
    twice   whether it takes a second call
    excess  output -> error ÷ allowance of each element
    lost    whether the GPU can run nothing more in this process
    """

    case: Case
    kind: str
    why: str
    where: str
    twice: bool = False
    excess: dict | None = None
    lost: bool = False


@dataclass
class Report:
    """What a search did: cases passed of the spread and of hypothesis, the largest error ÷ allowance among them,
    why tiles did not fit -> how many, seconds of each part; and where there is a failure, the first and the smallest.
    """

    spread: int = 0
    drawn: int = 0
    ratio: float = 0.0
    spread_s: float = 0.0
    drawn_s: float = 0.0
    shrink_s: float = 0.0
    misfits: dict[str, int] | None = None
    failure: Failure | None = None
    smallest: Failure | None = None


def examine(variant: Variant, case: Case, device: Device, twice: bool = True) -> Failure | float:
    """The failure of one case, or its largest error ÷ allowance.  Raises Infeasible where the tile does not fit.

    twice: the second call is judged too, where the memory layout allows one.
    """
    inputs = case.make()
    again = case.make(again=True) if twice and not case.overlaps else None
    try:
        if case.softmax:
            verdict = gate.check_softmax(variant, inputs, device, again)
        else:
            verdict = gate.check(variant, case.problem, case.tile, inputs, device, again)
    except Infeasible:
        raise
    except SimulatorError as error:
        return Failure(case, type(error).__name__, str(error), locate.finding(error, file_of(variant)))
    except Exception as error:  # whatever a kernel file may do
        why = f"{type(error).__name__}: {_first_line(error)}"
        lost = not device.simulated and locate.context_is_lost(error)
        return Failure(case, type(error).__name__, why, locate.raised(error, file_of(variant)), lost=lost)
    if verdict.passed:
        return verdict.ratio
    second = verdict.why.startswith(gate.AGAIN)
    kind = "again " * second + " ".join(verdict.excess or ["changed"])
    return Failure(case, kind, verdict.why, locate.picture(verdict.excess, case), second, verdict.excess)


def file_of(variant: Variant) -> str:
    """The file that the kernel was read from: of `build`, a function or a class, with switches turned or not."""
    build = variant.build
    return inspect.getfile(build.func if isinstance(build, partial) else build)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


# ---- the search -----------------------------------------------------------------------------------------------------


def search(
    variant: Variant,
    device: Device,
    *,
    seconds: float,
    seed: int,
    quick: bool = False,
    dtype: str | None = None,
    tile: Tile | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> Report:
    """Examines the spread, then, unless quick, what hypothesis draws from `seed` until `seconds` after the start.

    progress(stage, done, of) is called after each case.  Raises Infeasible where the given tile fits no case.
    """
    start, report = time.monotonic(), Report(misfits={})
    listed = spread(variant, device, quick=quick, dtype=dtype, tile=tile)
    failure = None
    for n, case in enumerate(listed):
        failure = _try(report, variant, case, device, twice=True)
        report.spread += failure is None
        progress("spread", n + 1, len(listed))
        if failure:
            break
    report.spread_s = time.monotonic() - start
    if failure is None and sum(report.misfits.values()) == len(listed):
        raise Infeasible(listed[0].tile, next(iter(report.misfits)))
    if failure is None and not quick:
        failure = _draw(report, variant, device, listed, start + seconds, seed, dtype, tile, progress)
        report.drawn_s = time.monotonic() - start - report.spread_s
    if failure:
        begun = time.monotonic()
        report.failure = failure
        report.smallest = shrink(variant, failure, device, 3.0 if quick else 10.0, progress)
        report.shrink_s = time.monotonic() - begun
    return report


def one(variant: Variant, case: Case, device: Device) -> Report:
    """The report of one case, which is its own smallest.  Raises Infeasible where its tile does not fit."""
    outcome = examine(variant, case, device)
    if isinstance(outcome, Failure):
        return Report(failure=outcome, smallest=outcome, misfits={})
    return Report(spread=1, ratio=outcome, misfits={})


def _try(report, variant, case, device, twice) -> Failure | None:
    try:
        outcome = examine(variant, case, device, twice)
    except Infeasible as misfit:
        report.misfits[misfit.reason] = report.misfits.get(misfit.reason, 0) + 1
        return None
    if isinstance(outcome, Failure):
        return outcome
    report.ratio = max(report.ratio, outcome)
    return None


class _Enough(BaseException):
    """Ends hypothesis: no Exception, which it would take for a failure and run again."""


def _draw(report, variant, device, listed, until, start, dtype, tile, progress) -> Failure | None:
    """The first failure that hypothesis draws."""
    found = []
    quiet = settings(
        max_examples=1_000_000, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @seed(start)
    @quiet
    @given(_strategy(variant, device, listed, dtype, tile))
    def examples(case):
        if time.monotonic() > until:
            raise _Enough
        if failure := _try(report, variant, case, device, twice=False):
            found.append(failure)
            raise _Enough
        report.drawn += 1
        progress("hypothesis", report.drawn, 0)

    try:
        examples()
    except _Enough:
        pass
    return found[0] if found else None


def _strategy(variant, device, listed, dtype, tile):
    """Cases for this variant; on a GPU of those kinds only that the spread has had compiled."""
    dtypes = [dtype] if dtype else list(variant.dtypes)
    if variant.direction == "softmax":
        return strategies.row_cases(dtypes=tuple(dtypes))
    if device.simulated:
        of = strategies.builds(variant).filter(lambda build: build[1] in dtypes)
        return strategies.cases(of=of.map(lambda build: (*build[:2], tile or build[2], *build[3:])))
    kinds = {
        (p.d, p.dtype, case.tile, p.mask.banded, p.mask.boolean, p.softcap) for case in listed for p in [case.problem]
    }
    return strategies.cases(of=st.sampled_from(sorted(kinds)))


# ---- smaller --------------------------------------------------------------------------------------------------------


def shrink(
    variant: Variant, failure: Failure, device: Device, seconds: float, progress=lambda stage, done, of: None
) -> Failure:
    """The failure of the smallest case that fails in the same way, as far as `seconds` go."""
    until, tried, smaller = time.monotonic() + seconds, set(), not failure.lost
    while smaller:
        smaller = False
        for case in simpler(failure.case):
            if time.monotonic() > until:
                return failure
            if case in tried or not device.simulated and _kind(case) != _kind(failure.case):  # compiling takes seconds
                continue
            tried.add(case)
            progress("smaller", len(tried), 0)
            try:
                found = examine(variant, case, device, failure.twice)
            except Infeasible:
                continue
            if isinstance(found, Failure) and found.kind == failure.kind:
                failure, smaller = found, not found.lost
                break
    return failure


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect, the boldest first."""
    p = case.problem
    if isinstance(p, Rows):
        yield from (replace(case, problem=replace(p, **{name: n})) for name in ("rows", "columns")
                    for n in _fewer(getattr(p, name)))  # fmt: skip
        yield from (replace(case, problem=replace(p, dtype=dtype)) for dtype in _before(p.dtype))
        yield from _plainer(case)
        return

    def but(**changes):
        return replace(case, problem=replace(p, **changes))

    if p.B > 1:
        yield but(B=1)
    for H, H_kv in ((1, 1), (2, 1), (2, 2)):
        if H * H_kv < p.H * p.H_kv:
            yield but(H=H, H_kv=H_kv)
    for name in ("N_q", "N_k", "d"):
        fewer = _fewer(getattr(p, name), least=1 if name == "d" else 0)
        usual = {"scale": None} if p.scale == replace(p, scale=None).scale else {}
        yield from (but(**{name: n}, **(usual if name == "d" else {})) for n in fewer)
    if p.softcap:
        yield but(softcap=0.0)
    if p.scale != 1 / math.sqrt(p.d):
        yield but(scale=None)
    mask = p.mask
    plainer = {"boolean": False, "window": (-1, -1), "causal": False, "align": "bottom_right"}
    yield from (but(mask=replace(mask, **{k: v})) for k, v in plainer.items() if getattr(mask, k) != v)
    yield from (but(dtype=dtype) for dtype in _before(p.dtype))
    yield from _plainer(case)


def _plainer(case):
    if case.layout != "contiguous":
        yield replace(case, layout="contiguous")
    if case.input != "gauss":
        yield replace(case, input="gauss")
    if case.seed:
        yield replace(case, seed=0)


def _fewer(n: int, least: int = 0):
    """Sizes below n: the least, then ever closer to n."""
    step, found = n - least, []
    while step > 0:
        found.append(n - step)
        step //= 2
    return dict.fromkeys(found)


def _before(dtype: str):
    return list(DTYPES)[: list(DTYPES).index(dtype)]


def _kind(case: Case):
    return case.problem.kind, case.tile
