"""python -m experiments list · run NAME --out DIR [options] · draw NAME --out DIR · all"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import click

import experiments
from sandbox import catalog, records
from sandbox.cli._run import run

from . import common, everything

OUT = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out"), show_default=True,
    help="Folder of NAME.jsonl, NAME.csv and NAME.png.",
)  # fmt: skip


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__) if find(module.name))


def find(name: str) -> common.Experiment | None:
    if name not in [module.name for module in pkgutil.iter_modules(experiments.__path__)] or name == "__main__":
        return None
    return getattr(importlib.import_module(f"experiments.{name}"), "EXPERIMENT", None)


class PerExperiment(click.Group):
    """One command for each file of the folder that has an EXPERIMENT."""

    def __init__(self, *args, command, **kwargs):
        super().__init__(*args, **kwargs)
        self.command = command

    def list_commands(self, ctx):
        return names()

    def get_command(self, ctx, name):
        experiment = find(name)
        return self.command(experiment) if experiment else None

    def resolve_command(self, ctx, args):
        if not args[0].startswith("-") and find(args[0]) is None:
            raise click.UsageError(f"no experiment is named {args[0]!r}: {catalog.nearest(args[0], names())}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx, args):
        if not args:
            raise click.UsageError(f"name an experiment: there are {', '.join(names())}")
        return super().parse_args(ctx, args)


def run_command(experiment) -> click.Command:
    @click.pass_context
    def run(ctx, out, fresh, force, **options):
        ctx.exit(0 if common.run(experiment, out, fresh, force, options) else 1)

    options = [
        OUT,
        click.option("--fresh", is_flag=True, help="Measure again what is on record."),
        click.option("--force", is_flag=True, help=f"Run what takes the simulator more than {common.PATIENCE_S} s."),
        *experiment.options,
    ]
    for option in reversed(options):
        run = option(run)
    return click.command(experiment.name, help=experiment.question)(run)


def draw_command(experiment) -> click.Command:
    @click.command(experiment.name, help=f"Report again what is on record of {experiment.name}.")
    @OUT
    def draw(out):
        try:
            rows = records.read(out / f"{experiment.name}.jsonl")
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        if not rows:
            raise click.UsageError(f"nothing is on record in {out}: run {experiment.name} first")
        for last in common.runs(experiment, rows):
            records.Log(out, experiment.name, experiment.key).finish(last)
            common.report(experiment, last, out)

    return draw


@click.group()
def cli():
    """Experiments: each asks one question and writes JSON lines, CSV and a picture that answer it."""


@cli.command(name="list")
def list_command():
    """Name every experiment and its question."""
    width = max(map(len, names())) + 2
    for name in names():
        click.echo(f"{name:<{width}}{find(name).question}")


@cli.command(name="all")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="results/DEVICE unless given.")
@click.option("--only", metavar="WORD", multiple=True, help="Those that have the word in them: bench, say.")
@click.option("--fresh", is_flag=True, help="Again, too, what is on record.")
@click.option("--dry-run", is_flag=True, help="Name the runs, and make none.")
@click.pass_context
def all_command(ctx, out, only, fresh, dry_run):
    """Measure what results/ holds, on the GPU at hand; goes on where it was stopped."""
    if dry_run:
        click.echo("\n".join(everything.wanted(only)))
        return
    ctx.exit(0 if everything.run(out, only, fresh) else 1)


cli.add_command(PerExperiment("run", command=run_command, help="Measure, and report."))
cli.add_command(PerExperiment("draw", command=draw_command, help="Report again from the rows on record."))


def main(words=None) -> int:
    """The exit code: 0, 1 where a kernel failed the gate, 2 on bad input (told in one line)."""
    return run(cli, words, "python -m experiments")


if __name__ == "__main__":
    sys.exit(main())
