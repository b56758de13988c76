"""bench NAME...: how fast, against whom, and what the compiler made of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
from tqdm import tqdm

from ._path import PATH

RIVALS = ("torch:flash", "torch:cudnn")
SIZE = click.IntRange(1, 2**20)


@click.command("bench")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--against", metavar="WHO,...", help="parent, torch:flash, torch:cudnn, torch:efficient, torch:math.")
@click.option("--grid", type=click.Choice(["paper"]), help="18 shapes: d 64, 128, 256; N 1k, 4k, 16k; full, causal.")
@click.option("--seqlen", "N", type=SIZE, multiple=True, help="One or several; 1024, 4096 and 16384.")
@click.option("--head-dim", "d", type=SIZE, default=128, show_default=True)
@click.option("--heads", "H", type=SIZE, help="2048 / head-dim.")
@click.option("--batch", "B", type=SIZE, help="16384 / seqlen.")
@click.option("--causal/--no-causal", default=False, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--tile", metavar="BrxBc", help="Of the kernels named; chosen for each problem.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
@click.option("--save", is_flag=True, help="Also into results/DEVICE/bench.jsonl.")
@click.option("--fresh", is_flag=True, help="Measure again what is on record.")
@click.option("--dry-run", is_flag=True, help="Name the points, and measure nothing.")
@PATH
@click.pass_context
def COMMAND(ctx, names, against, grid, N, d, H, B, causal, dtype, tile, seed, out, save, fresh, dry_run, path):
    """Time the kernels NAME on the same problems as their rivals, in one run, each behind the gate.

    The first NAME is what ratios are relative to.  Exit code 1 where a kernel fails its gate.
    """
    from .. import catalog, records, target
    from ..mask import Mask
    from ..measure import bench
    from ..measure.bench_report import shape
    from ..measure.cases import parse_tile
    from ..problem import Problem

    variants = [catalog.find(name) for name in names]
    providers = who(variants, against)
    tile = parse_tile(tile) if tile else None
    direction = variants[0].direction
    if grid:
        points = bench.grid(dtype, direction, providers, seed)
    else:
        points = []
        for n in sorted(set(N)) or (1024, 4096, 16384):
            heads = H or max(1, bench.PAPER_WIDTH // d)
            problem = Problem(B or max(1, bench.PAPER_TOKENS // n), heads, heads, n, n, d, dtype, mask=Mask(causal))
            points.append(bench.Point(problem, direction, providers, seed, tile))
    if dry_run:
        for point in points:
            click.echo(f"{point.direction} {point.problem}: {', '.join(point.providers)}")
        return
    if target.KIND != "gpu":
        raise click.UsageError(
            "bench needs a GPU: the simulator's time says nothing about one (--dry-run names the points)"
        )
    device = target.device()
    folders = [out, *([records.RESULTS / device.slug] if save else [])]
    rows = run(points, device, folders, fresh)
    report(rows, out)
    failed = [row for row in rows if (row["gate"] or "passed") != "passed"]
    for row in failed:
        click.echo(f"refused: {row['provider']} {shape(row)}, {row['gate']}", err=True)
    ctx.exit(1 if failed else 0)


def who(variants, against: str | None) -> tuple[str, ...]:
    """The providers that these words ask for, ours first.  Raises ValueError with the nearest names."""
    from .. import catalog
    from ..measure import bench, rivals

    directions = {v.direction for v in variants}
    if len(directions) > 1 or "softmax" in directions:
        told = ", ".join(f"{v.name} ({v.direction})" for v in variants)
        raise ValueError(f"NAME: expected forward kernels or backward kernels, all of one kind; got {told}")
    ours = [v.name for v in variants]
    others = []
    for word in ["parent", *RIVALS] if against is None else filter(None, against.split(",")):
        if word == "parent":
            ours += [v.parent for v in variants if v.parent]
        elif word in rivals.NAMES:
            others.append(word)
        elif word in catalog.variants():
            ours.append(word)
        else:
            known = ["parent", *rivals.NAMES, *catalog.variants(variants[0].direction)]
            raise ValueError(f"--against {word!r} is unknown: {catalog.nearest(word, known)}")
    if strange := [name for name in ours if catalog.find(name).direction not in directions]:
        raise ValueError(f"--against {strange[0]}: it is no {variants[0].direction} kernel")
    return tuple(dict.fromkeys([bench.OURS + name for name in ours] + others))


def run(points, device, folders: list[Path], fresh: bool) -> list[dict]:
    """Every row, from the record or measured now; a point whose providers are not all on record is measured whole."""
    from .. import records
    from ..measure import bench

    logs = [records.Log(folder, "bench", bench.KEY) for folder in folders]
    stamp, name = records.provenance(device), bench.run_id()
    stamp["driver"] = stamp["versions"].get("driver")
    rows, done = [], 0
    try:
        with tqdm(total=len(points), unit="point", desc="bench", disable=None) as bar:
            for point in points:
                fields = [point.fields(provider) | stamp for provider in point.providers]
                known = [None if fresh else logs[0].find(row) for row in fields]
                if None in known or len({row["run"] for row in known}) > 1:
                    now = {"run": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                    known = [row | m | now for row, m in zip(fields, bench.measure(point, device), strict=True)]
                for log in logs:
                    for row in known:
                        log.append(row)
                rows += known
                done += 1
                bar.update()
    except KeyboardInterrupt:
        click.echo(
            f"\nstopped: {done} of {len(points)} points are in {logs[0].path}; the same command goes on", err=True
        )
        raise
    return rows


def report(rows: list[dict], out: Path) -> None:
    """Tables, what to be careful of, and the picture."""
    from ..measure import bench_report as told

    click.echo("\n" + told.table(rows) + "\n")
    if any(row["registers"] for row in rows):
        click.echo(told.compiled(rows) + "\n")
    for line in told.careful(rows):
        click.echo(line)
    draft = out / f".bench.{os.getpid()}.png"
    try:
        told.draw(rows).savefig(draft)
        os.replace(draft, out / "bench.png")
    finally:
        draft.unlink(missing_ok=True)
    click.echo("written: " + "  ".join(str(out / f"bench.{end}") for end in ("jsonl", "png")))
