"""doctor: what this machine can run, and why not the rest."""

from __future__ import annotations

import click

from ._path import PATH


@click.command("doctor")
@PATH
@click.pass_context
def COMMAND(ctx, path):
    """What this machine can run, why not the rest, and what would mend it; exit code 1 where something is broken."""
    from .. import doctor

    broken = []
    for finding in doctor.findings():
        click.echo(f"{finding.state:<7} {finding.what:<18} {finding.detail}")
        if finding.state == doctor.BROKEN:
            broken.append(finding)
            click.echo(f"{'':<26} fix: {finding.fix}")
    click.echo("\nnothing is broken" if not broken else f"\n{len(broken)} broken; begin with: {broken[0].fix}")
    ctx.exit(1 if broken else 0)
