"""python -m sandbox COMMAND: the module sandbox/cli/COMMAND.py, which holds a click.Command named COMMAND."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys

import click

from . import cli
from .cli._run import run


class Commands(click.Group):
    """One command for each file of sandbox/cli; only the file of the one that runs is imported."""

    def list_commands(self, ctx):
        return [m.name for m in pkgutil.iter_modules(cli.__path__) if not m.name.startswith("_")]

    def get_command(self, ctx, name):
        if name not in self.list_commands(ctx):
            return None
        return importlib.import_module(f"{cli.__name__}.{name}").COMMAND

    def resolve_command(self, ctx, args):
        names = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in names:
            near = difflib.get_close_matches(args[0], names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise click.UsageError(f"no command is named {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


@click.command(cls=Commands)
def commands():
    """Exact attention on GPUs: understand it, change it, measure it."""


def main(words=None) -> int:
    """The exit code: 0, 1 where a check failed, 2 on bad input."""
    return run(commands, words, "python -m sandbox")


if __name__ == "__main__":
    sys.exit(main())
