"""What a run says: its table, its answer and its picture, from the rows alone."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import click

from sandbox import catalog, picture


def report(experiment, rows: list[dict], out: Path):
    click.echo("\n" + experiment.table(rows) + "\n")
    for reason in dict.fromkeys(row["no_counters"] for row in rows if row.get("no_counters")):
        click.echo(f"{reason}\n")
    for line in experiment.answer(rows).splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        click.echo(textwrap.fill(line, 118, subsequent_indent=indent))
    drawn = save_picture(experiment, rows, out)
    click.echo(
        "\nwritten: " + "  ".join(str(out / f"{experiment.name}.{end}") for end in ("jsonl", "csv")) + f"  {drawn}"
    )


def save_picture(experiment, rows: list[dict], out: Path) -> Path:
    """NAME.png, or NAME-PART.png, which appears at one instant."""
    part = experiment.part(rows[-1])
    name = f"{experiment.name}-{part}.png" if part else f"{experiment.name}.png"
    draft = out / f".{os.getpid()}.{name}"
    figure = experiment.draw(rows)
    try:
        figure.savefig(draft)
        os.replace(draft, out / name)
    finally:
        picture.plt.close(figure)
        draft.unlink(missing_ok=True)
    return out / name


def like(experiment, last: dict, rows: list[dict]) -> list[dict]:
    """The rows that one run would report: those that differ from its last one in nothing but what varies."""
    same = [name for name in (*experiment.key, "device") if name not in experiment.varies]
    return [row for row in rows if all(row[name] == last[name] for name in same)]


def runs(experiment, rows: list[dict]) -> list[list[dict]]:
    """The last run of each part, first that without a word."""
    parts, found = [experiment.part(row) for row in rows], []
    for part in sorted(set(parts) - {None}):
        ours = [row for row, its in zip(rows, parts) if its in (part, None)]
        found.append(like(experiment, [row for row in ours if experiment.part(row) == part][-1], ours))
    return found


def unit_of(row: dict) -> str | None:
    """As a part: what multiplies, 'tensor' or else ''; None for what is no kernel of ours."""
    kernel = catalog.variants().get(row["variant"].split(" ")[0])
    return ("tensor" if kernel.unit == "tensor" else "") if kernel else None
