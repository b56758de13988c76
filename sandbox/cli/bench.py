"""bench NAME...: how fast, against whom, and what the compiler made of it."""

from __future__ import annotations

import os
from pathlib import Path

import click
from tqdm import tqdm

from ._path import PATH

RIVALS = ("torch:flash", "torch:cudnn")
SEQLEN, HEAD_DIM = (1024, 4096, 16384), 128
SIZE = click.IntRange(1, 2**20)


@click.command("bench")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--against", metavar="WHO,...", help="parent, kernels, torch:flash|cudnn|efficient|math, triton.")
@click.option("--grid", type=click.Choice(["paper"]), help="18 shapes: d 64, 128, 256; N 1k, 4k, 16k; full, causal.")
@click.option("--seqlen", "N", type=SIZE, multiple=True, help="One or several; 1024, 4096 and 16384.")
@click.option("--head-dim", "d", type=SIZE, help=f"{HEAD_DIM} unless given.")
@click.option("--heads", "H", type=SIZE, help="2048 / head-dim.")
@click.option("--batch", "B", type=SIZE, help="16384 / seqlen.")
@click.option("--causal/--no-causal", default=None, help="Full unless given.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16", "e4m3"]), default="fp16", show_default=True,
    help="e4m3: kernels that take it get it ready made, the others bf16.",
)  # fmt: skip
@click.option("--tile", metavar="BrxBc", help="Of every kernel of ours; chosen for each problem.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
@click.option("--save", is_flag=True, help="Also into results/DEVICE/bench.jsonl.")
@click.option("--fresh", is_flag=True, help="Do not go on with a run that was cut short.")
@click.option("--dry-run", is_flag=True, help="Name the points, and measure nothing.")
@PATH
@click.pass_context
def COMMAND(ctx, names, against, grid, N, d, H, B, causal, dtype, tile, seed, out, save, fresh, dry_run, path):
    """Time the kernels NAME on the same problems as their rivals, in one run, each behind the gate.

    The first NAME is what ratios are relative to.  A run that was cut short goes on where it stopped; one that came to
    its end is measured again.  Exit code 1 where a kernel fails its gate.
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
    quantized, dtype = dtype == "e4m3", "bf16" if dtype == "e4m3" else dtype
    if quantized and not any(variant.scales for variant in variants):
        raise click.UsageError(f"--dtype e4m3: {', '.join(names)} quantize nothing, as fwd_v3_fp8 does")
    for variant in variants:
        if dtype not in variant.dtypes:
            raise click.UsageError(f"--dtype {dtype}: {variant.name} has {', '.join(variant.dtypes)}")
    if grid:
        sizes = {"--seqlen": N or None, "--head-dim": d, "--heads": H, "--batch": B, "--causal": causal}
        for option, value in sizes.items():
            if value is not None:
                raise click.UsageError(f"{option}: --grid {grid} has its own sizes and masks")
        points = bench.grid(dtype, direction, providers, seed, tile, quantized)
    else:
        points, d = [], d or HEAD_DIM
        for n in sorted(set(N)) or SEQLEN:
            heads = H or max(1, bench.PAPER_WIDTH // d)
            mask = Mask(bool(causal))
            problem = Problem(B or max(1, bench.PAPER_TOKENS // n), heads, heads, n, n, d, dtype, mask=mask)
            points.append(bench.Point(problem, direction, providers, seed, tile, quantized))
    if dry_run:
        for point in points:
            click.echo(f"{point.direction} {point.problem}: {', '.join(point.providers)}")
        return
    if target.KIND != "gpu":
        raise click.UsageError(
            "bench needs a GPU: the simulator's time says nothing about one (--dry-run names the points)"
        )
    device = target.device()
    for variant in variants if tile else ():
        for point in points:
            variant.fit(point.problem, tile, device)
    folders = [out, *([records.RESULTS / device.slug] if save else [])]
    for folder in folders:
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise click.UsageError(f"--out {folder}: {there.name or there} is no folder that can be written to")
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
    parents = [v.parent for v in variants if v.parent]
    if against is None:
        words = ["parent"] * bool(parents) + list(RIVALS)
    else:
        words = [word.strip() for word in against.split(",") if word.strip()]
    others = []
    for word in words:
        if word == "parent":
            if not parents:
                raise ValueError(f"--against parent: {', '.join(ours)} was made from no other kernel")
            ours += parents
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
    """Every row.  A point is measured whole unless a run that was cut short has all of its rows.

    `ms_before` of a row is the median that is on record for this very kernel, from the run before.
    """
    from .. import records
    from ..measure import bench, rivals

    logs = [records.Log(folder, "bench", bench.KEY) for folder in folders]
    unfinished = folders[0] / "bench.unfinished"  # names the runs that were cut short
    earlier = [] if fresh or not unfinished.exists() else unfinished.read_text().split()
    stamp, name = records.provenance(device), bench.run_id()
    stamp["versions"] = stamp["versions"] | rivals.versions()
    stamp["driver"] = stamp["versions"].get("driver")
    rows, done, resumed = [], 0, 0
    click.echo("compiling in fresh processes, to time it", err=True)
    bench.compile_all(points, device)
    try:
        with tqdm(total=len(points), unit="point", desc="bench", disable=None) as bar:
            for point in points:
                fields = [point.fields(provider) | stamp for provider in point.providers]
                before = [on_record(logs[0], row) for row in fields]
                runs = {row and row["run"] for row in before}
                if len(runs) == 1 and runs <= set(earlier):
                    now, resumed = before, resumed + 1
                else:
                    folders[0].mkdir(parents=True, exist_ok=True)
                    records.write_whole(unfinished, "\n".join([*earlier, name]))
                    same = {"run": name, "time": records.now()}
                    now = [
                        row | measured | {"ms_before": old and old["ms"]} | same
                        for row, measured, old in zip(fields, bench.measure(point, device), before, strict=True)
                    ]
                bench.compare(now)
                for log in logs:
                    for row in now:
                        log.append(row)
                rows += now
                done += 1
                bar.update()
    except KeyboardInterrupt:
        click.echo(
            f"\nstopped: {done} of {len(points)} points are in {logs[0].path}; the same command goes on", err=True
        )
        raise
    unfinished.unlink(missing_ok=True)
    if resumed:
        click.echo(f"{resumed} of {len(points)} points are from a run that was cut short; --fresh measures them again")
    return rows


def on_record(log, row: dict) -> dict | None:
    """The row of that point, if it was measured on this device, from this very source and kernel file."""
    found = log.find(row)
    return found if found and found["kernel_hash"] == row["kernel_hash"] else None


def report(rows: list[dict], out: Path) -> None:
    """Tables, the answer, what to be careful of, and the picture."""
    from ..measure import bench_report as told

    click.echo("\n" + told.table(rows) + "\n")
    if any(row["registers"] for row in rows):
        click.echo(told.compiled(rows) + "\n")
    click.echo(told.title(rows))
    for line in told.careful(rows):
        click.echo(line)
    drawn = out / ("bench-bwd.png" if rows[0]["direction"] == "bwd" else "bench.png")
    draft = out / f".{os.getpid()}.{drawn.name}"
    try:
        told.draw(rows).savefig(draft)
        os.replace(draft, drawn)
    finally:
        draft.unlink(missing_ok=True)
    click.echo(f"written: {out / 'bench.jsonl'}  {drawn}")
