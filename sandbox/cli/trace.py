"""trace NAME: what each warpgroup is at, moment by moment: the overlap, seen and measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median

import click

from ._path import PATH

SIZE = click.IntRange(1, 2**20)


@click.command("trace")
@click.argument("name")
@click.option("--seqlen", "N", type=SIZE, default=4096, show_default=True, help="Queries, and keys.")
@click.option("--head-dim", "d", type=SIZE, default=128, show_default=True)
@click.option("--heads", "H", type=SIZE, help="2048 / head-dim.")
@click.option("--batch", "B", type=SIZE, help="16384 / seqlen.")
@click.option("--causal/--no-causal", default=False, show_default=True)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="bf16", show_default=True)
@click.option("--tile", metavar="BrxBc", help="Chosen for the problem.")
@click.option("--switch", "switches", metavar="NAME=N", multiple=True, help="Turn one of the kernel's switches.")
@click.option("--block", type=click.IntRange(0), default=0, show_default=True, help="Which one to draw.")
@click.option("--marks", type=click.IntRange(16, 2**16), default=4096, show_default=True, help="Of a warpgroup.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True)
@PATH
@click.pass_context
def COMMAND(ctx, name, N, d, H, B, causal, dtype, tile, switches, block, marks, out, path):
    """Run a build of the kernel NAME that leaves time stamps, and show what ran under what.

    Writes NAME.trace.json, which ui.perfetto.dev opens, and NAME.trace.png.  The build is behind the gate; since its
    stamps cost some time, it is not timed.  Exit code 1 where it fails.
    """
    import torch

    from .. import catalog, records, target
    from ..choose import choose_tile
    from ..mask import Mask
    from ..measure import bench, gate, trace
    from ..measure import trace_report as told
    from ..measure.cases import parse_tile
    from ..problem import Problem

    variant = catalog.find(name)
    module = sys.modules[variant.build.__module__]
    if (traced := getattr(module, "traced", None)) is None:
        raise click.UsageError(f"{name} has no traced build: its file defines no `traced`, as that of fwd_v3 does")
    turned = catalog.switches_of(switches, module.Switches)
    if target.KIND != "gpu":
        raise click.UsageError("trace needs a GPU: the emulator knows an order of things, but no time")
    device = target.device()
    heads = H or max(1, bench.PAPER_WIDTH // d)
    problem = Problem(B or max(1, bench.PAPER_TOKENS // N), heads, heads, N, N, d, dtype, mask=Mask(causal))
    tile = parse_tile(tile) if tile else choose_tile(problem, device, variant)
    left = torch.zeros(device.sms, tile.Br // 64, marks, 2, dtype=torch.int32, device="cuda")
    if block >= device.sms:
        raise click.UsageError(f"--block {block}: the GPU runs {device.sms} at once, counted from 0")
    verdict = gate.check(traced(left, **turned), problem, tile, gate.gaussian(problem, 0, "cuda"), device)
    if not verdict.passed:
        click.echo(f"refused: {name} on {problem}, {verdict.why}", err=True)
        ctx.exit(1)
    for _ in range(3):  # the clock rises, L2 is as it mostly is
        left.zero_()
        verdict.launch()
    torch.cuda.synchronize()
    blocks = trace.read(left, overlap=bool(turned.get("overlap", True)))
    tracks = [track for one in blocks for track in one]
    rates = [track.ghz for track in tracks if track.ghz]
    if not rates:
        raise click.UsageError(f"--marks {marks}: no warpgroup had room for all of its own; try {4 * marks}")
    ghz = median(rates)
    revision = records.provenance(device)["revision"]
    words = " ".join([str(problem), f"tile {tile}", *switches])
    for line in told.say(name, blocks, tile, problem.d):
        click.echo(line)
    click.echo("\n" + told.table(blocks) + "\n")
    if short := sum(not track.whole for track in tracks):
        click.echo(f"{short} of {len(tracks)} warpgroups had more to tell than --marks {marks}")
    out.mkdir(parents=True, exist_ok=True)
    about = {"kernel": name, "problem": words, "device": device.name, "revision": revision, "ghz": ghz}
    files = [out / f"{name}.trace.json", out / f"{name}.trace.png"]
    records.write_whole(files[0], json.dumps(trace.perfetto(blocks[: block + 1][-1:], ghz, about)))
    title = told.sentence(name, trace.hidden(blocks))
    figure = told.draw(blocks[block], ghz, title, f"{device.name} · {words} · block {block} · revision {revision}")
    draft = out / f".{name}.{os.getpid()}.png"
    try:
        figure.savefig(draft)
        os.replace(draft, files[1])
    finally:
        draft.unlink(missing_ok=True)
    click.echo("written: " + "  ".join(map(str, files)))
