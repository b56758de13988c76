"""explain NAME: why a kernel is as fast as it is: its work, the walls of the GPU, and which one it stands at."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from ._path import PATH

SIZE = click.IntRange(1, 2**20)
RECORDS = ("loop_order", "tile_size", "fp32_sdpa", "bench", "online_softmax")  # under results/, with times of kernels
PATIENCE_S = 20  # a launch that the simulator takes longer for is counted at a small shape instead


@click.command("explain")
@click.argument("name")
@click.option("--seqlen", "N", type=SIZE, default=4096, show_default=True, help="Queries, and keys.")
@click.option("--head-dim", "d", type=SIZE, help="64.")
@click.option("--heads", "H", type=SIZE, help="32; 4 for a softmax.")
@click.option("--batch", "B", type=SIZE, default=1, show_default=True)
@click.option("--causal/--no-causal", default=None, help="No mask.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="fp32, where the kernel has it.")
@click.option("--tile", metavar="BrxBc", help="That of a recorded time, or else chosen.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
@PATH
@click.pass_context
def COMMAND(ctx, name, N, d, H, B, causal, dtype, tile, out, path):
    """Say why the kernel NAME is as fast as it is: its FLOPs, exps and bytes, and the wall that it stands at.

    A softmax kernel gets the scores of that problem: B·H·N rows of N.  On a GPU the kernel is gated and timed; without
    one its time is the one on record, and the walls are an NVIDIA H200's.  Exit code 1 where the gate fails.
    """
    from .. import catalog, records, target
    from ..measure import roofline
    from ..measure import roofline_report as told
    from ..variant import HOPPER

    variant, gpu = catalog.find(name), target.KIND == "gpu"
    device = target.device() if gpu else HOPPER
    shape = posed(variant, N, d, H, B, causal, dtype, tile)
    given, tile = tiles(variant, shape, tile, device)
    notes = []
    try:
        known = timed(variant, shape, tile, device) if gpu else recorded(variant, shape, given, tile, device)
        tile = known.tile
        arrays = roofline.asked(name, shape, tile)
        if arrays is None:
            arrays, how = count(variant, shape, tile)
            notes.append(how)
    except Refused as why:
        click.echo(f"refused: {name}, {why}; python -m sandbox check {name} says more", err=True)
        ctx.exit(1)
    moved = {roofline.ASKED: sum(map(sum, arrays.values()))} if arrays else {}
    work = roofline.work(variant, shape, tile, moved | known.moved)
    chip = roofline.measured(device, shape.dtype) if gpu else roofline.datasheet(device.name, shape.dtype)
    walls = roofline.walls(work, chip)
    if tile and roofline.visits_empty_tiles(name, shape, tile):
        notes.append("it visits every tile, those too that the mask empties: what it multiplies there is no work")
    if chip.exp is None:
        notes.append(f"no wall of the exp unit: the clock of {device.name} is in no table of ours")

    what = f"{shape}" + (f" · tile {tile}" if tile else "")
    seconds, (operations, word) = known.seconds, work.operations
    fast = f"{told.si(seconds, 's')}, {told.si(operations / seconds, word)}/s" if seconds else "not known"
    click.echo(f"{name}: {what}")
    click.echo(f"  device  {device.name}" + ("" if gpu else ", by its datasheet: there is no GPU here"))
    click.echo(f"  time    {fast}: {known.words}")
    if work.flops:
        click.echo(f"  matmul  {told.si(work.flops, 'FLOP')}")
    click.echo(f"  exps    {told.si(work.exps, 'exp')} at least")
    for way, n in (("reads", 0), ("writes", 1)):
        if arrays:
            click.echo(f"  {way:<7} " + ", ".join(f"{a} {told.si(x[n], 'B')}" for a, x in arrays.items() if x[n]))
    for line in (*known.notes, *notes):
        click.echo(f"  note    {line}")
    click.echo(f"\n{told.bytes_table(work, seconds)}\n\n{told.walls_table(walls, seconds)}\n")
    click.echo(textwrap.fill(told.verdict(name, walls, seconds), 118))
    by = "measured walls" if gpu else "walls by datasheet"
    revision = known.revision or records.revision() or "unknown"
    where = f"{device.name}, {by} · {variant.direction} · {what} · revision {revision}"
    write(told.draw(name, where, work, walls, seconds), out / f"explain.{name}.png")


class Refused(Exception):
    """The kernel is wrong: what the gate, or the simulator, says."""


@dataclass(frozen=True)
class Known:
    """What was measured of a launch.

    seconds   None where it was not; words: when and where, or why not
    tile      that it was measured with
    moved     roofline.DRAM and L2 -> bytes, as far as they were measured
    notes     what to be careful of, a line each
    revision  of the measurement, None for the one at hand
    """

    seconds: float | None
    words: str
    tile: object
    moved: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    revision: str | None = None


# ---- what is asked --------------------------------------------------------------------------------------------------


def posed(variant, N, d, H, B, causal, dtype, tile):
    """The Problem, or for a softmax the Rows, of these options.  Raises click.UsageError or ValueError."""
    from ..mask import Mask
    from ..measure.cases import Rows
    from ..problem import Problem

    if dtype and dtype not in variant.dtypes:
        raise click.UsageError(f"--dtype {dtype}: {variant.name} has {', '.join(variant.dtypes)}")
    dtype = dtype or ("fp32" if "fp32" in variant.dtypes else variant.dtypes[0])
    if variant.direction != "softmax":
        H = 32 if H is None else H
        return Problem(B, H, H, N, N, 64 if d is None else d, dtype, mask=Mask(bool(causal)))
    for option, value in (("--tile", tile), ("--head-dim", d), ("--causal", causal)):
        if value is not None:
            raise click.UsageError(f"{option}: {variant.name} is a softmax kernel, which has no such thing")
    return Rows(B * (4 if H is None else H) * N, N, dtype)


def tiles(variant, shape, text, device):
    """(the tile that was given or None, the tile to take).  Raises Infeasible where it does not fit."""
    from ..choose import choose_tile
    from ..measure.cases import parse_tile

    if variant.direction == "softmax":
        return None, None
    if text is None:
        return None, choose_tile(shape, device, variant)
    variant.fit(shape, tile := parse_tile(text), device)
    return tile, tile


# ---- what is known --------------------------------------------------------------------------------------------------


def judged(variant, shape, tile, device):
    """The gate's verdict on Gaussian input.  Raises Refused where it did not pass."""
    from ..device.simulator import SimulatorError
    from ..measure import gate
    from ..measure.cases import Case

    case = Case(shape, tile)
    try:
        if case.softmax:
            verdict = gate.check_softmax(variant, case.make(), device)
        else:
            verdict = gate.check(variant, shape, tile, case.make(), device)
    except SimulatorError as defect:
        raise Refused(f"{shape}: {defect}") from None
    if not verdict.passed:
        raise Refused(f"{shape}: {verdict.why}")
    return verdict


def timed(variant, shape, tile, device) -> Known:
    """Gated and timed now, on the GPU; DRAM and L2 bytes where ncu is there."""
    import torch

    from ..measure import counters, roofline, timing

    try:
        ms = timing.time(judged(variant, shape, tile, device)).ms
    except torch.OutOfMemoryError:
        raise click.UsageError(f"{shape} does not fit in the GPU's memory") from None
    torch.cuda.empty_cache()  # ncu's child needs room on the GPU
    found, reason = None, "no hardware counters of a softmax kernel: they are read of attention alone"
    if variant.direction != "softmax":
        (found,), reason = counters.count([counters.Wanted(variant.name, variant.direction, shape, tile)])
    moved = {roofline.DRAM: found.dram_bytes, roofline.L2: found.l2_bytes} if found else {}
    return Known(ms * 1e-3, "measured now, behind the gate", tile, moved, () if found else (reason,))


def recorded(variant, shape, given, chosen, device) -> Known:
    """The row under results/ of this kernel, shape, dtype and mask: with the tile given, or else rather the chosen one,
    rather one with hardware counters, rather a late one."""
    from .. import records
    from ..measure import bench, roofline

    folder = records.RESULTS / device.slug
    found = []
    for file in RECORDS:
        for row in records.read(folder / f"{file}.jsonl"):
            tile = tile_of(row)
            if matches(row, variant, shape) and given in (None, tile):
                found.append((tile == chosen, row.get("dram_bytes") is not None, row.get("time") or "", file, row))
    where = f"{records.RESULTS.name}/{device.slug}"
    if not found:
        tile = f" with tile {given}" if given else ""
        return Known(None, f"no such launch{tile} is on record in {where}, and without a GPU nothing is timed", chosen)
    *_, file, row = max(found, key=lambda one: one[:3])
    if "kernel_hash" in row:
        same = row["kernel_hash"] == bench.kernel_hash(variant.name)
    else:
        same = row["source"] == records.source()
    notes = [] if same else ["that row was measured from another source than today's"]
    notes += [row["no_counters"]] if row.get("no_counters") else []
    moved = {roofline.DRAM: row.get("dram_bytes"), roofline.L2: row.get("l2_bytes")}
    moved = {what: n for what, n in moved.items() if n is not None}
    words = f"{where}/{file}.jsonl, revision {row['revision']}"
    return Known(seconds_of(row), words, tile_of(row), moved, tuple(notes), row["revision"])


def matches(row: dict, variant, shape) -> bool:
    """Whether a row is a gated time of this kernel on this shape; experiments and bench name their fields apart."""
    from ..measure.cases import Rows

    row = {"N_q": row.get("N"), "N_k": row.get("N"), "H_kv": row.get("H"), "columns": row.get("N")} | row
    if isinstance(shape, Rows):
        wanted = {name: getattr(shape, name) for name in ("rows", "columns", "dtype")}
    else:
        wanted = {name: getattr(shape, name) for name in ("B", "H", "H_kv", "N_q", "N_k", "d", "dtype")}
        wanted["causal"] = shape.mask.causal
    who = row.get("variant") or str(row.get("provider")).removeprefix("sandbox:")
    passed = row.get("gate") == "passed" and seconds_of(row)
    return bool(passed) and who == variant.name and all(row.get(name) == value for name, value in wanted.items())


def tile_of(row: dict):
    from ..variant import Tile

    return Tile(row["Br"], row["Bc"]) if row.get("Br") else None


def seconds_of(row: dict) -> float | None:
    return row.get("seconds") or (row["ms"] * 1e-3 if row.get("ms") else None)


def count(variant, shape, tile):
    """(array -> (bytes read, bytes written) or None, in words) of a kernel that no formula knows.

    Counted on the simulator, behind the gate; at a small shape where this one would take long, and that says nothing
    of this one.  Raises Refused.
    """
    from .. import target
    from ..choose import choose_tile
    from ..device import simulator
    from ..measure import roofline
    from ..measure.cases import Rows
    from ..variant import SECONDS_PER_MULTIPLY_ADD, Unsupported

    if target.KIND != "simulator":
        return None, "bytes asked for are not known: no formula knows this kernel, and only the simulator counts them"
    softmax, small = isinstance(shape, Rows), shape
    if softmax and 10 * shape.rows * shape.columns * SECONDS_PER_MULTIPLY_ADD > PATIENCE_S:
        small = replace(shape, rows=8, columns=64)
    if not softmax and simulator.estimate_seconds(shape, variant.direction) > PATIENCE_S:
        small = replace(shape, B=1, H=1, H_kv=1, N_q=64, N_k=64, d=min(shape.d, 16), scale=None)
        try:
            tile = choose_tile(small, target.device(), variant)
        except Unsupported as reason:
            return None, f"bytes asked for are not known: no formula knows this kernel, nor can it be counted: {reason}"
    traffic = judged(variant, small, tile, target.device()).traffic
    if small is shape:
        whole = {"all arrays": (traffic.read_bytes, traffic.write_bytes)}  # an array may travel in two dtypes
        arrays = roofline.by_array(traffic.reads, traffic.writes, 4) if shape.dtype == "fp32" else whole
        return arrays, "bytes asked for were counted on the simulator: no formula knows this kernel"
    times = traffic.bytes / roofline.work(variant, small, tile, {}).bytes[roofline.LEAST]
    return None, f"bytes asked for are not known; counted at {small}: {times:.1f} x the least possible there"


def write(figure, file: Path) -> None:
    """The picture appears, or changes, at one instant."""
    from .. import picture

    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.stem}.{os.getpid()}.png")
    try:
        figure.savefig(draft)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
        picture.plt.close(figure)
    click.echo(f"\nwritten: {file}")
