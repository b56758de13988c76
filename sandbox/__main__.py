"""python -m sandbox COMMAND"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import click

from . import cli


class Commands(click.Group):
    """One command for each module of sandbox/cli."""

    def list_commands(self, ctx):
        return sorted(module.name for module in pkgutil.iter_modules(cli.__path__))

    def get_command(self, ctx, name):
        if name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{cli.__name__}.{name}").COMMAND


@click.command(cls=Commands)
def main():
    """Exact attention on GPUs: understand, change and measure it."""


def run(words=None) -> int:
    """The exit code: 0, 1 where a check failed, 2 on bad input (told in one line)."""
    try:
        return main.main(words, prog_name="python -m sandbox", standalone_mode=False) or 0
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return 2
    except (ValueError, TypeError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        return 130


if __name__ == "__main__":
    sys.exit(run())
