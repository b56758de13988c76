"""What was measured: JSON lines point by point, CSV beside them, and the README's tables made from them.  [floor 3]

    python -m sandbox.records --check    says which table of README.md is not what results/ holds, exit code 1
    python -m sandbox.records --write    brings them up to date

A table of README.md stands between two markers; the first says which results it shows:

    <!-- table:nvidia-h200/loop_order columns=variant,N,reads_total,ms N=8192 direction=fwd -->
    ...
    <!-- end -->

`columns` picks and orders the columns, `pivot=provider values=tflops` adds one for each provider, filled with its
TFLOP/s; every other word keeps the rows whose field has that value, or one of several between commas.
`table:variants` is the lineage of the kernels, from the catalog: each variant, its parent and what it changes.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import click
import tabulate as tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PACKAGES = ("numpy", "torch", "numba", "numba-cuda")
PROVENANCE = ("device", "revision", "source")  # a row measured under other values of these is not resumed

tables.MIN_PADDING = 0  # a column is as wide as its words, in every table of ours
tabulate = tables.tabulate


# ---- where a row comes from -----------------------------------------------------------------------------------------


@functools.cache
def revision() -> str | None:
    """What SANDBOX_REVISION names (for a copy whose git knows another commit or none), or the commit, or None.

    The commit is followed by -dirty where sandbox/ or experiments/ differ from it; `source` pins what was measured.
    """
    if named := os.environ.get("SANDBOX_REVISION"):
        return named
    commit = _git("rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if _git("status", "--porcelain", "--", "sandbox", "experiments") else "")


def _git(*words: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()
    return None


@functools.cache
def source() -> str:
    """A hash of sandbox/, which every measurement depends on: it tells two dirty trees apart, and needs no git."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "sandbox").rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, of the packages that a measurement depends on, and of the GPU's driver where there is one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
        found["driver"] = done.stdout.split()[0]
    return found


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def provenance(device) -> dict:
    """The fields that every row ends with."""
    return {"device": device.name, "revision": revision(), "source": source(), "versions": versions()}


# ---- JSON lines, point by point -------------------------------------------------------------------------------------


class Log:
    """FOLDER/NAME.jsonl: one row a point.  A point is named by the fields `key`; measured again, it replaces its row.

    Nothing is created before the first row.  The file changes row by row, each time at one instant, so that a run that
    was cut short leaves whole rows and is resumed by running it again.
    """

    def __init__(self, folder: Path, name: str, key: Iterable[str]):
        self.folder, self.name, self.key = Path(folder), name, tuple(key)
        self.path = self.folder / f"{name}.jsonl"
        self._rows = {self.point(row): row for row in read(self.path)}

    def point(self, row: dict) -> tuple:
        return tuple(json.dumps(row.get(field)) for field in (*self.key, "device"))

    def find(self, row: dict) -> dict | None:
        """The row of that point, if it was measured on this device, at this revision, from this very source."""
        found = self._rows.get(self.point(row))
        return found if found and all(found.get(field) == row.get(field) for field in PROVENANCE) else None

    def append(self, row: dict):
        self._rows[self.point(row)] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def finish(self, rows: list[dict]):
        """Puts these rows last and in this order, and writes FOLDER/NAME.csv: the same rows, one column a field."""
        ours = {self.point(row): row for row in rows}
        self._rows = {point: row for point, row in self._rows.items() if point not in ours} | ours
        self._write()
        rows = [{field: _cell(value) for field, value in row.items()} for row in self._rows.values()]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(field for row in rows for field in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.folder / f"{self.name}.csv", text.getvalue())

    def _write(self):
        write_whole(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self._rows.values()))


def read(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; none where there is no file.  Raises ValueError on a line that is not JSON."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path.name}, line {number}: not JSON; repair the line or delete the file") from None
    return rows


def write_whole(path: Path, text: str):
    """The file appears, or changes, at one instant."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _cell(value):
    return json.dumps(value) if isinstance(value, (dict, list)) else value


# ---- the README's tables --------------------------------------------------------------------------------------------

MARKED = re.compile(r"<!-- table:(?P<what>\S+)(?P<words>[^>]*?) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    """The text with every marked table made anew.  Raises ValueError where a marker asks for what is not there."""

    def fill(match):
        table = make_table(match["what"], match["words"].split())
        return f"<!-- table:{match['what']}{match['words']} -->\n{table}\n<!-- end -->"

    return MARKED.sub(fill, text)


def make_table(what: str, words: list[str]) -> str:
    if what == "variants":
        return lineage()
    options = dict(word.partition("=")[::2] for word in words)
    columns, pivot, values = (options.pop(word, "") for word in ("columns", "pivot", "values"))
    rows = read(RESULTS / f"{what}.jsonl")
    kept = {field: value.split(",") for field, value in options.items()}
    rows = [row for row in rows if all(_shown(row.get(field)).replace(",", "") in kept[field] for field in kept)]
    if not rows:
        raise ValueError(f"table:{what} {' '.join(words)}: no such rows under results/")
    columns = columns.split(",") if columns else list(rows[0])
    if pivot:
        rows, columns = pivoted(rows, columns, pivot, values)
    body = [[_shown(row.get(column)) for column in columns] for row in rows]
    numeric = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    return tabulate(body, columns, "pipe", colalign=["right" if n else "left" for n in numeric], disable_numparse=True)


def pivoted(rows: list[dict], columns: list[str], pivot: str, values: str) -> tuple[list[dict], list[str]]:
    """(rows, columns): one row for all that agree in `columns`, one column more for each value of the field `pivot`."""
    wide: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(json.dumps(row.get(column)) for column in columns)
        wide.setdefault(key, {column: row.get(column) for column in columns})[str(row.get(pivot))] = row.get(values)
    return list(wide.values()), [*columns, *dict.fromkeys(str(row.get(pivot)) for row in rows)]


def lineage() -> str:
    """Each variant of the package, its parent, and the one thing that it changes."""
    from . import catalog

    rows = [
        [f"`{v.name}`", v.direction, v.loop_order or "", f"`{v.parent}`" if v.parent else "", v.delta]
        for v in catalog.variants(prototypes=False).values()
    ]
    return tabulate(rows, ["variant", "direction", "loop order", "made from", "what it changes"], "pipe")


def _shown(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


@click.command()
@click.option("--write/--check", default=False, help="Bring the tables up to date, or only say whether they are.")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=ROOT / "README.md")
def main(write: bool, path: Path):
    """The tables of PATH (README.md) that are made from results/."""
    text = path.read_text()
    try:
        made = with_tables(text)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    stale = [old["what"] for old, new in zip(MARKED.finditer(text), MARKED.finditer(made)) if old[0] != new[0]]
    if write:
        write_whole(path, made)
        click.echo(f"{path.name}: {len(stale)} table(s) brought up to date")
    elif stale:
        raise click.ClickException(
            f"{path.name}: stale table {', '.join(stale)}: run python -m sandbox.records --write"
        )
    else:
        click.echo(f"{path.name}: every table is what results/ holds")


if __name__ == "__main__":
    main()
