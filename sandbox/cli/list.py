"""list: every kernel, each under the one that it was made from."""

from __future__ import annotations

import json

import click

from ._path import PATH

DIRECTIONS = {"softmax": "Online softmax", "fwd": "Forward", "bwd": "Backward"}


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@PATH
def COMMAND(as_json, path):
    """Every kernel, each under the one that it was made from, and what it changes."""
    from .. import catalog

    if as_json:
        for variant in catalog.variants().values():
            click.echo(json.dumps(_fields(variant)))
        return
    for direction, title in DIRECTIONS.items():
        rows = [row for root in catalog.children(None) if root.direction == direction for row in _branch(root, 0)]
        if rows:
            click.echo(f"{title}\n")
            _show(rows)
    for file, reason in catalog.broken().items():
        click.echo(f"no kernel: {file}\n{_indented(reason)}\n", err=True)


def _fields(variant) -> dict:
    from .. import catalog

    fields = ("name", "direction", "generation", "loop_order", "dtypes", "parent", "delta", "default", "deterministic")
    return {field: getattr(variant, field) for field in fields} | {"file": str(catalog.file_of(variant.name))}


def _branch(variant, depth: int) -> list[tuple[str, str, str]]:
    """(name, what it is, what it changes) of a variant and of all that were made from it."""
    from .. import catalog

    what = [variant.loop_order, " ".join(variant.dtypes)]
    what += [f"the {variant.generation} default"] * variant.default
    what += ["not deterministic"] * (not variant.deterministic)
    what += ["prototype"] * (catalog.file_of(variant.name).parent != catalog.PACKAGE)
    row = "  " * depth + variant.name, ", ".join(filter(None, what)), variant.delta or "(nothing said yet)"
    return [row, *(row for child in catalog.children(variant.name) for row in _branch(child, depth + 1))]


def _show(rows) -> None:
    width = max(len(name) for name, _, _ in rows)
    for name, what, delta in rows:
        click.echo(f"  {name:<{width}}  {what}")
        click.echo(click.wrap_text(delta, 110, " " * (width + 4), " " * (width + 4)))
    click.echo()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
