"""--path DIR: the option of every command that names kernels."""

from __future__ import annotations

import os
from pathlib import Path

import click


def add(ctx, param, folder: Path | None) -> Path | None:
    """Kernel files of that folder are found too, by child processes as well."""
    if folder is not None:
        named = os.environ.get("SANDBOX_PROTOTYPES", "prototypes")
        os.environ["SANDBOX_PROTOTYPES"] = os.pathsep.join([str(folder.resolve()), *filter(None, [named])])
    return folder


PATH = click.option(
    "--path", type=click.Path(exists=True, file_okay=False, path_type=Path), callback=add, is_eager=True,
    metavar="DIR", help="Find kernel files in this folder too.",
)  # fmt: skip
