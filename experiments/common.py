"""What every experiment shares: the points it measures, how a point becomes a row, the run that can be resumed.

An experiment is a file of this folder that ends with one EXPERIMENT; the runner finds it by listing the folder.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from tqdm import tqdm

from sandbox import catalog, records, target
from sandbox.device import simulator
from sandbox.mask import Mask
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
        "max_error": _finite(verdict.max_error),
        "error_ratio": _finite(verdict.ratio),
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


def _finite(x: float) -> float | None:
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
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                rows[id(p)] = p.fields() | measured | stamp | {"time": now}
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
        ahead.compile_all(wanted, device, progress=lambda done, of: bar.reset(of) or bar.update(done))


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


# ---- tables and sentences -------------------------------------------------------------------------------------------


def table(rows: list[dict], columns: list[tuple[str, Callable[[dict], object]]]) -> str:
    """One line a row; columns are (heading, row -> cell), and one whose cells are all None is left out."""
    cells = [[cell(row) for row in rows] for _, cell in columns]
    shown = [n for n, column in enumerate(cells) if any(cell is not None for cell in column)]
    return records.tabulate(
        list(zip(*(cells[n] for n in shown))), [columns[n][0] for n in shown], "simple", missingval="–",
        disable_numparse=True, colalign=["right" if all(map(_numeric, cells[n])) else "left" for n in shown],
    )  # fmt: skip


def _numeric(cell) -> bool:
    return cell is None or str(cell)[:1] in "0123456789+-–×" and "x" not in str(cell)


def count(n: float | None) -> str | None:
    """Elements or bytes in words as short as a table wants: 1,024 · 65.5k · 2.1M."""
    if n is None:
        return None
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if n >= size:
            return f"{n / (1e3 if unit == 'k' else size):,.1f}{unit}"
    return f"{n:,.0f}"


def short(n: float) -> str:
    """Three digits: 830M · 55.2k."""
    power = 9 if n >= 1e9 else 6 if n >= 1e6 else 3 if n >= 1e3 else 0
    return f"{n / 10**power:.3g}" + {9: "G", 6: "M", 3: "k", 0: ""}[power]


def number(n: int) -> str:
    """For a sentence: to the last digit while it can be read."""
    return f"{n:,}" if n < 1e7 else f"{n / 1e9:.3g} G" if n >= 1e9 else f"{n / 1e6:.3g} M"


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def problem_of(row: dict) -> Problem:
    mask = Mask(row["causal"])
    return Problem(row["B"], row["H"], row["H"], row["N"], row["N"], row["d"], row["dtype"], mask=mask)


def total(row: dict) -> int | None:
    """Accesses of a row: counted where they were, else by the formula."""
    for kind in ("", "formula_"):
        if row[f"{kind}reads_total"] is not None:
            return row[f"{kind}reads_total"] + row[f"{kind}writes_total"]
    return None


def agrees(row: dict) -> bool | None:
    """Whether counted and formula totals are equal; None where one of them is missing."""
    pairs = [(row[f"{way}_total"], row[f"formula_{way}_total"]) for way in ("reads", "writes")]
    return None if any(None in pair for pair in pairs) else all(a == b for a, b in pairs)


def ratio(x: float, over: str, under: str) -> str:
    """`1.41 times fewer`, or `1.2 times more` where x is below 1."""
    return f"{x:.3g} times {over}" if x >= 1 else f"{1 / x:.3g} times {under}"


def milliseconds(row: dict) -> str:
    ms = row["seconds"] * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


OUTCOME = (  # the last columns of a table
    ("accesses", lambda row: count(total(row))),
    ("formula", lambda row: {True: "= equal", False: "DIFFERS"}.get(agrees(row))),
    ("DRAM", lambda row: row["dram_bytes"] and gigabytes(row["dram_bytes"])),
    ("L2", lambda row: row["l2_bytes"] and gigabytes(row["l2_bytes"])),
    ("time", lambda row: row["seconds"] and milliseconds(row)),
    ("TFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:.2f}"),
    ("max\nerror", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
    ("gate", lambda row: row["gate"]),
    ("cannot run", lambda row: row["infeasible"]),
)
