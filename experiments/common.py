"""What every experiment shares: the points it measures, how a point becomes a row, the run that can be resumed.

An experiment is a file of this folder that ends with one EXPERIMENT; the runner finds it by listing the folder.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from sandbox import catalog, records, target
from sandbox.device import simulator
from sandbox.measure import ahead, counters, formulas, gate, timing
from sandbox.problem import Problem
from sandbox.variant import Device, Infeasible, Tile

from . import inputs
from .report import report, runs, save_picture, unit_of  # noqa: F401  (for experiments, too)

READ = ("Q", "K", "V", "O", "l", "m", "LSE", "mask", "dO", "dQ", "L", "D")
WRITTEN = ("O", "l", "m", "LSE", "dQ", "dK", "dV", "L", "D")
OutOfMemory = torch.OutOfMemoryError
PATIENCE_S = 120  # a longer run on the simulator asks for --force
POOL_PAYS_S = 8  # a shorter one is not worth starting other processes for
MOST_WORKERS = 3  # each takes about 0.4 GB, of the 2 GB that an experiment may


@dataclass(frozen=True)
class Experiment:
    """One question.

    question   what is asked, in a sentence; fixed: what is the same at every point; factor: the one thing that is not
    varies     the fields of a row that differ between the points of one run
    options    click options of its own, beside --out, --fresh, --force
    plan       (device, **options) -> the points.  Raises ValueError, TypeError or Infeasible on bad input
    table      rows -> text; answer: rows -> the sentences that answer; draw: rows -> a matplotlib figure
    measure    point -> the fields of its row; the points of a simulated run are measured in several processes
    part       row -> the word that its run's picture has beside the experiment's name, or ""; None for a row of all
    run        (out, fresh, force, **options) -> what `run` below returns: instead of a plan, to judge others' rows
    """

    name: str
    question: str
    fixed: str
    factor: str
    varies: tuple[str, ...]
    options: tuple
    plan: Callable[..., list]
    table: Callable[[list[dict]], str]
    answer: Callable[[list[dict]], str]
    draw: Callable[[list[dict]], object]
    measure: Callable[[Point], dict] = None  # by default, the function of this name below
    key: tuple[str, ...] = ()  # by default, what Point.fields names
    part: Callable[[dict], str] = lambda row: ""
    run: Callable[..., bool] = None  # by default, plan and measure

    def __post_init__(self):
        object.__setattr__(self, "measure", self.measure or measure)
        object.__setattr__(self, "key", self.key or KEY)


# ---- a point, and its row -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One variant on one problem with one tile; `infeasible` says why it cannot run, or is None."""

    variant: str
    direction: str
    loop_order: str | None
    problem: Problem
    tile: Tile
    input: str
    seed: int = 0
    infeasible: str | None = None
    count_bytes: bool = True  # on a GPU, by its hardware counters
    notes: dict = field(default_factory=dict, hash=False)  # further fields of the row

    def fields(self) -> dict:
        p = self.problem
        return {
            "variant": self.variant, "direction": self.direction, "loop_order": self.loop_order,
            "input": self.input, "B": p.B, "H": p.H, "N": p.N_q, "d": p.d, "dtype": p.dtype, "causal": p.mask.causal,
            "Br": self.tile.Br, "Bc": self.tile.Bc, "seed": self.seed, **self.notes, "infeasible": self.infeasible,
        }  # fmt: skip

    def kernels(self) -> list[tuple]:
        """(variant, Problem.kind, tile) of what is compiled for it."""
        ours = not self.infeasible and self.variant.split(" ")[0] in catalog.variants()
        return [(self.variant, self.problem.kind, self.tile)] if ours else []

    def seconds(self) -> float:
        """About how long the simulator takes."""
        return 0.0 if self.infeasible else simulator.estimate_seconds(self.problem, self.direction)


KEY = ("variant", "direction", "input", "B", "H", "N", "d", "dtype", "causal", "Br", "Bc", "seed")


def point(variant, problem: Problem, tile: Tile, device: Device, **fields) -> Point:
    """The Point, with the reason where the tile does not fit."""
    try:
        variant.fit(problem, tile, device)
    except Infeasible as misfit:
        fields["infeasible"] = misfit.reason
    return Point(variant.name, variant.direction, variant.loop_order, problem, tile, **fields)


def empty_row() -> dict:
    """Every field that a measurement fills; None is what this machine cannot."""
    return dict.fromkeys(
        [f"reads_{a}" for a in READ] + [f"writes_{a}" for a in WRITTEN]
        + ["reads_total", "writes_total", "read_bytes", "write_bytes", "formula_reads_total", "formula_writes_total"]
        + ["gate", "max_error", "error_ratio", "seconds", "seconds_p20", "seconds_p80", "tflops"]
        + ["dram_read_bytes", "dram_write_bytes", "dram_bytes", "l2_bytes", "no_counters"]
    )  # fmt: skip


def measure(point: Point) -> dict:
    """The row's measured fields: gate, then traffic where the launch is simulated, else time."""
    row = empty_row()
    if point.infeasible:
        return row
    device, variant, p = target.device(), catalog.find(point.variant), point.problem
    if formula := formulas.traffic(point.variant, p, point.tile):
        row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
    try:
        verdict = gate.check(variant, p, point.tile, inputs.make(point.input, p, point.seed), device)
    except Infeasible as misfit:  # found by the compiler: too many registers, say
        return row | {"infeasible": misfit.reason}
    except OutOfMemory:
        return row | {"infeasible": "does not fit in the GPU's memory"}
    row |= {
        "gate": "passed" if verdict.passed else f"failed: {verdict.why}",
        "max_error": finite(verdict.max_error),
        "error_ratio": finite(verdict.ratio),
    }
    if verdict.traffic is not None:
        row |= counted(verdict.traffic)
    if verdict.passed and not device.simulated:
        row |= timed(timing.time(verdict), point)
    return row


def counted(traffic) -> dict:
    """The fields of a simulated launch's traffic."""
    moved = [
        ({a for a, n in counts.items() if n}, known)
        for counts, known in ((traffic.reads, READ), (traffic.writes, WRITTEN))
    ]
    if strange := set().union(*(arrays - set(known) for arrays, known in moved)):
        raise ValueError(f"no column for the traffic of {', '.join(sorted(strange))}")
    return {
        **{f"reads_{a}": traffic.reads.get(a, 0) for a in READ},
        **{f"writes_{a}": traffic.writes.get(a, 0) for a in WRITTEN},
        "reads_total": sum(traffic.reads.values()), "writes_total": sum(traffic.writes.values()),
        "read_bytes": traffic.read_bytes, "write_bytes": traffic.write_bytes,
    }  # fmt: skip


def timed(t: timing.Timing, point: Point) -> dict:
    return {
        "seconds": t.ms * 1e-3, "seconds_p20": t.ms_p20 * 1e-3, "seconds_p80": t.ms_p80 * 1e-3,
        "tflops": point.problem.flops(point.direction) / t.ms * 1e-9,
    }  # fmt: skip


def finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


# ---- a run ----------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, out: Path, fresh: bool, force: bool, options: dict) -> bool:
    """Plans, measures what is not on record yet, reports.  False if a point failed the gate.

    Raises click.UsageError, before anything is launched or written, on bad input.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise click.UsageError(f"--out {out}: {there.name or there} is no folder that can be written to")
    if experiment.run:
        return experiment.run(out, fresh, force, **options)
    rows = collect(experiment, out, fresh, force, options)
    report(experiment, rows, out)
    return all_passed(rows)


def all_passed(rows: list[dict]) -> bool:
    """Whether no row failed the gate; names those that did."""
    failed = [row for row in rows if row["gate"] not in ("passed", None)]
    for row in failed:
        click.echo(f"{row['variant']} N={row['N']} tile {row['Br']}x{row['Bc']} {row['gate']}", err=True)
    return not failed


def collect(experiment: Experiment, out: Path, fresh: bool, force: bool, options: dict) -> list[dict]:
    """A row for each point of the plan, from the record or measured now; refuses what `run` refuses."""
    device = target.device()
    try:
        points = experiment.plan(device, **options)
        log = records.Log(out, experiment.name, experiment.key)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from None
    stamp = records.provenance(device)
    on_record = [None if fresh else log.find(p.fields() | stamp) for p in points]
    pending = [p for p, row in zip(points, on_record) if row is None]
    seconds = sum(p.seconds() for p in pending) / _workers(pending) if device.simulated else 0
    if seconds > PATIENCE_S and not force:
        raise click.UsageError(f"about {seconds:,.0f} s on the simulator; make it smaller, or pass --force to wait")

    click.echo(f"{experiment.question}\n  fixed   {experiment.fixed}\n  factor  {experiment.factor}")
    click.echo(f"  device  {device.name}" + (": counted and checked, not timed" if device.simulated else ""))
    if len(pending) < len(points):
        click.echo(f"  {len(points) - len(pending)} of {len(points)} points are on record; --fresh measures them again")

    if not device.simulated:
        _compile(pending, device)
    rows = {id(p): row for p, row in zip(points, on_record)}
    try:
        with tqdm(total=len(points), initial=len(points) - len(pending), unit="point", desc=experiment.name) as bar:
            for p, measured in _measured(experiment.measure, pending, device, seconds):
                rows[id(p)] = p.fields() | measured | stamp | {"time": records.now()}
                log.append(rows[id(p)])
                bar.update()
        if not device.simulated:
            _count_bytes([(p, rows[id(p)]) for p in points], log)
    except KeyboardInterrupt:
        done = sum(row is not None for row in rows.values())
        click.echo(f"\nstopped: {done} of {len(points)} points are in {log.path}; the same command goes on", err=True)
        raise
    rows = [rows[id(p)] for p in points]
    log.finish(rows)
    return rows


def _compile(points, device: Device):
    """What the cache lacks of these points, several kernels at once: else each would be compiled where it is timed."""
    wanted = [ahead.Wanted(*kernel) for p in points if hasattr(p, "kernels") for kernel in p.kernels()]
    with tqdm(total=len(set(wanted)), unit="kernel", desc="compiling") as bar:
        ahead.compile_all(wanted, device, progress=partial(_show, bar))


def _show(bar: tqdm, done: int, of: int):
    bar.total, bar.n = of, done
    bar.refresh()


def _count_bytes(measured: list[tuple[Point, dict]], log: records.Log):
    """Fills in what the hardware counters say about the launches that were timed: one child process for all of them."""
    lacking = [(p, row) for p, row in measured if p.count_bytes and row["seconds"] and row["dram_bytes"] is None]
    if not lacking:
        return
    click.echo(f"reading the hardware counters of {len(lacking)} launches", err=True)
    torch.cuda.empty_cache()  # the child needs room on the GPU
    wanted = [counters.Wanted(p.variant, p.direction, p.problem, p.tile, p.seed) for p, _ in lacking]
    found, reason = counters.count(wanted)
    for (_, row), one in zip(lacking, found):
        row["no_counters"] = None if one else reason
        for name in ("dram_read_bytes", "dram_write_bytes", "dram_bytes", "l2_bytes") if one else ():
            row[name] = getattr(one, name)
        log.append(row)


def _workers(points) -> int:
    return max(1, min(os.cpu_count() or 1, len(points), MOST_WORKERS))


def _measured(measure, points, device, seconds):
    """(point, measured) as they come; the longest points start first."""
    if not device.simulated or seconds < POOL_PAYS_S or _workers(points) == 1:
        for p in points:
            yield p, measure(p)
        return
    points = sorted(points, key=lambda p: p.seconds(), reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_workers(points), context, _start_worker) as pool:
        try:
            futures = {pool.submit(measure, p): p for p in points}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C too: nobody waits for what has been started
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)


# ---- options that experiments have in common ------------------------------------------------------------------------


SIZE = click.IntRange(1, 2**20)


class Integers(click.ParamType):
    """`--seqlen 64,128`: positive integers between commas; the option may be repeated too."""

    name = "INT[,INT]"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not an integer, nor several between commas", param, ctx)
        for number in numbers:
            SIZE.convert(number, param, ctx)
        return numbers


def integers(*names, help):
    """An option of several integers: sorted, each once; None where it is not given."""

    def flatten(ctx, param, values):
        return tuple(sorted({n for numbers in values for n in numbers})) or None

    return click.option(*names, type=Integers(), multiple=True, callback=flatten, help=help)


INPUT = click.option("--input", type=click.Choice(inputs.NAMES), help="Real or random; real where nothing is timed.")
HEAD_DIM = click.option("--head-dim", type=SIZE, help="d; 32 for minilm, else 64.")
BATCH = click.option("--batch", type=SIZE, default=1, show_default=True, help="B")
CAUSAL = click.option("--causal/--no-causal", default=False, show_default=True)
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Of the draws (dO is one for minilm too).")
DTYPE = click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
COUNTERS = click.option(
    "--counters/--no-counters", default=True, show_default=True, help="On a GPU, read DRAM and L2 bytes with ncu."
)
