"""check NAME: prove a kernel exact, or show where it is wrong and on which smallest problem."""

from __future__ import annotations

import os
import secrets
import shlex
import tempfile
from pathlib import Path

import click
from tqdm import tqdm

from ._path import PATH

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@click.command("check")
@click.argument("name")
@click.option("--quick", is_flag=True, help="A short spread of problems only.")
@click.option("--seconds", type=click.FloatRange(0), default=10.0, show_default=True, help="How long to look.")
@click.option("--seed", type=click.IntRange(0), help="Of hypothesis's draws; of the numbers, with --problem.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Every problem in this dtype.")
@click.option("--tile", metavar="BrxBc", help="Every problem with this tile.")
@click.option("--problem", metavar="WORDS", help="This problem alone: 'N_q=17 N_k=9 d=8 causal=bottom_right'.")
@click.option("--input", "fill", default="gauss", show_default=True, help="What fills it; with --problem.")
@click.option("--layout", default="contiguous", show_default=True, help="How it lies in memory; with --problem.")
@click.option("--repeat", type=click.IntRange(2), metavar="N", help="Also run one problem N times: equal bits each.")
@click.option(
    "--sanitize", type=click.Choice(TOOLS), is_flag=False, flag_value="memcheck",
    help="Also run compute-sanitizer (on a GPU).",
)  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write a picture there.")
@PATH
@click.pass_context
def COMMAND(ctx, name, quick, seconds, seed, dtype, tile, problem, fill, layout, repeat, sanitize, out, path):
    """Prove the kernel NAME exact, or show where it is wrong.

    First a spread of shapes, masks, dtypes and inputs, then what hypothesis draws.  A failure is made smaller; the
    command that repeats it is printed.  Exit code 1 where the kernel is wrong.
    """
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "sandbox-hypothesis"))
    from .. import catalog, target
    from ..measure import ahead, search
    from ..measure import sanitize as sanitizer
    from ..measure.cases import Case, parse_problem, parse_tile

    variant, device = catalog.find(name), target.device()
    again = f"python -m sandbox check {name}" + (f" --path {shlex.quote(str(path))}" if path else "")
    tile = parse_tile(tile) if tile else None
    if dtype and dtype not in variant.dtypes:
        raise click.UsageError(f"--dtype {dtype}: {name} has {', '.join(variant.dtypes)}")
    if tile and variant.direction == "softmax":
        raise click.UsageError(f"--tile {tile}: {name} is a softmax kernel, which has no tile")
    if sanitize and (reason := sanitizer.unavailable()):
        raise click.UsageError(f"--sanitize: {reason}")
    if repeat and not variant.deterministic:
        raise click.UsageError(f"--repeat: {name} declares deterministic=False, so its runs may differ in bits")
    if problem is not None and dtype:
        raise click.UsageError("--dtype: --problem has its own dtype=...")
    if problem is None:
        for option, given in (("--input", fill != "gauss"), ("--layout", layout != "contiguous")):
            if given:
                raise click.UsageError(f"{option} belongs to --problem, which is not given")
        seed = secrets.randbits(32) if seed is None else seed
        with Progress() as progress:
            if not device.simulated:
                wanted = ahead.of_spread(variant, device, quick=quick, dtype=dtype, tile=tile)
                ahead.compile_all(wanted, device, progress=lambda done, of: progress("compiling", done, of))
            report = search.search(
                variant, device, seconds=seconds, seed=seed, quick=quick, dtype=dtype, tile=tile, progress=progress
            )
        _tell(report, seed, quick)
    else:
        parsed = parse_problem(problem, variant.direction == "softmax")
        if tile is None and variant.direction != "softmax":
            from ..measure.spread import tile_of

            tile = tile_of(variant, parsed, device)
        report = search.one(variant, Case(parsed, tile, fill, layout, seed or 0), device)
    if report.failure:
        _show(report, name, again, problem is None)
        if out:
            _draw(report.failure, name, out)
        ctx.exit(1)
    passed = True
    if repeat:
        with Progress() as progress:
            differs = sanitizer.repeat(variant, device, repeat, lambda run: progress("repeat", run, repeat))
        click.echo(f"  repeat      {differs or f'{repeat} runs, the same bits each'}")
        passed &= differs is None
    if sanitize:
        clean, text = sanitizer.sanitize(variant, sanitize, device)
        if clean is None:
            raise click.UsageError(f"--sanitize: {sanitize} could not run: {text}")
        click.echo(f"  {sanitize:<11} " + (f"nothing found in {text}" if clean else f"found something\n\n{text}"))
        passed &= clean
    click.echo(
        f"passed: {name} is exact; its largest error was {report.ratio:.2g} of what is allowed" if passed else ""
    )
    ctx.exit(0 if passed else 1)


class Progress:
    """A bar for each stage, on a terminal."""

    def __enter__(self):
        self.stage = self.bar = None
        return self

    def __call__(self, stage: str, done: int, of: int):
        if stage != self.stage:
            self.__exit__()
            self.stage, self.bar = stage, tqdm(total=of or None, desc=stage, leave=False, disable=None, delay=0.3)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def _tell(report, seed, quick):
    click.echo(f"  spread      {report.spread} cases passed, {report.spread_s:.1f} s")
    if not quick and (report.drawn or report.drawn_s):
        click.echo(f"  hypothesis  {report.drawn} cases passed, {report.drawn_s:.1f} s, --seed {seed}")
    for reason, cases in report.misfits.items():
        click.echo(f"  not run     {cases} cases: {reason}")


def _show(report, name, again, searched):
    first, small = report.failure, report.smallest
    where = f"tile {first.case.tile}, " if first.case.tile else ""
    click.echo(f"\nfailed: {name} on {first.case.problem}, {where}{first.case.input}, {first.case.layout}")
    click.echo(f"  {first.why}")
    if first.where:
        click.echo(f"\n{first.where}")
    if first.lost:
        click.echo("\nthe GPU runs nothing more in this process; --sanitize names the access")
    if searched:
        click.echo(f"\nthe smallest problem found in {report.shrink_s:.1f} s: {small.why}")
        click.echo(f"  {again} {small.case}")


def _draw(failure, name, out):
    from ..measure import locate

    if not failure.excess:
        click.echo(f"--out: no picture, since {name} was stopped before its output could be judged", err=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    locate.draw(failure.excess, failure.case, f"{name} on {failure.case.problem}: {failure.why}", out / f"{name}.png")
    click.echo(f"written: {out / f'{name}.png'}")
