"""new NAME --from PARENT: a copy of one kernel file, ready for one idea."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ._path import PATH


@click.command("new")
@click.argument("name")
@click.option("--from", "parent", required=True, metavar="PARENT", help="The kernel to start from.")
@click.option(
    "--to", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Put it there, outside the package, instead of into sandbox/kernels.",
)  # fmt: skip
@PATH
def COMMAND(name, parent, to, path):
    """Copy the kernel PARENT to NAME.py: renamed, its parent set, what it changes left for you to say."""
    from .. import prototype

    file = prototype.create(name, parent, to)
    click.echo(f"written: {file}")
    where = f" --path {shlex.quote(str(to))}" if to else ""
    click.echo("say in its header and in its delta what it changes; then")
    click.echo(f"    python -m sandbox check {name}{where}")
    click.echo(f"    python -m sandbox watch {name}{where}")
