"""overhead [NAME...]: what a launch, a call of attention() and the first one of a process cost the host."""

from __future__ import annotations

from pathlib import Path

import click

from ._path import PATH

NAMES = ("fwd_v3", "fwd_v2")
SIZE = click.IntRange(1, 2**20)


@click.command("overhead")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--seqlen", "N", type=SIZE, default=128, show_default=True, help="Queries, and keys.")
@click.option("--head-dim", "d", type=SIZE, default=64, show_default=True)
@click.option("--heads", "H", type=SIZE, default=4, show_default=True)
@click.option("--batch", "B", type=SIZE, default=1, show_default=True)
@click.option("--causal/--no-causal", default=False, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="bf16", show_default=True)
@click.option("--first", "of_process", is_flag=True, help="And a process's first call, compiled or kept on disk.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
@click.option("--save", is_flag=True, help="Also into results/DEVICE/overhead.jsonl.")
@PATH
def COMMAND(names, N, d, H, B, causal, dtype, of_process, out, save, path):
    """Microseconds of the host for a launch of the forward kernels NAME (fwd_v3 and fwd_v2), and for attention().

    The problem is tiny, so that the GPU waits for the host and not the host for the GPU.
    """
    from .. import catalog, records, target
    from ..mask import Mask
    from ..measure import first, overhead
    from ..problem import Problem

    variants = [catalog.forward(name) for name in names or NAMES]
    problem = Problem(B, H, H, N, N, d, dtype, mask=Mask(causal))
    if target.KIND != "gpu":
        raise click.UsageError("overhead needs a GPU: the simulator launches nothing")
    device = target.device()
    rows = [row for variant in variants for row in overhead.measure(variant, problem, device)]
    rows.append(overhead.yardstick(problem))
    if of_process:
        rows += [row for variant in variants for row in first.measure(variant, problem)]
    for folder in [out, *([records.RESULTS / device.slug] if save else [])]:
        log = records.Log(folder, "overhead", overhead.KEY)
        for row in rows:
            log.append(row | records.provenance(device))
    click.echo(f"{problem} on {device.name}, microseconds of the host a call\n")
    table = [[row["what"], *(f"{row[name]:.1f}" for name in ("us", "us_p20", "us_p80"))] for row in rows]
    click.echo(records.tabulate(table, ["call", "median", "p20", "p80"], colalign=("left", "right", "right", "right")))
    click.echo(f"\nwritten: {out / 'overhead.jsonl'}")
