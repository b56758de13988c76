"""How rows are told: as tables, and as numbers in sentences."""

from __future__ import annotations

from collections.abc import Callable

from sandbox import records
from sandbox.mask import Mask
from sandbox.problem import Problem


def table(rows: list[dict], columns: list[tuple[str, Callable[[dict], object]]]) -> str:
    """One line a row; columns are (heading, row -> cell), and one whose cells are all None is left out."""
    cells = [[cell(row) for row in rows] for _, cell in columns]
    shown = [n for n, column in enumerate(cells) if any(cell is not None for cell in column)]
    return records.tabulate(
        list(zip(*(cells[n] for n in shown))), [columns[n][0] for n in shown], "simple", missingval="–",
        disable_numparse=True, colalign=["right" if all(map(_numeric, cells[n])) else "left" for n in shown],
    )  # fmt: skip


def _numeric(cell) -> bool:
    return cell is None or str(cell)[:1] in "0123456789+-–×" and "x" not in str(cell)


def count(n: float | None) -> str | None:
    """Elements or bytes in words as short as a table wants: 1,024 · 65.5k · 2.1M."""
    if n is None:
        return None
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if n >= size:
            return f"{n / (1e3 if unit == 'k' else size):,.1f}{unit}"
    return f"{n:,.0f}"


def short(n: float) -> str:
    """Three digits: 830M · 55.2k."""
    power = 9 if n >= 1e9 else 6 if n >= 1e6 else 3 if n >= 1e3 else 0
    return f"{n / 10**power:.3g}" + {9: "G", 6: "M", 3: "k", 0: ""}[power]


def number(n: int) -> str:
    """For a sentence: to the last digit while it can be read."""
    return f"{n:,}" if n < 1e7 else f"{n / 1e9:.3g} G" if n >= 1e9 else f"{n / 1e6:.3g} M"


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def problem_of(row: dict) -> Problem:
    mask = Mask(row["causal"])
    return Problem(row["B"], row["H"], row["H"], row["N"], row["N"], row["d"], row["dtype"], mask=mask)


def total(row: dict) -> int | None:
    """Accesses of a row: counted where they were, else by the formula."""
    for kind in ("", "formula_"):
        if row[f"{kind}reads_total"] is not None:
            return row[f"{kind}reads_total"] + row[f"{kind}writes_total"]
    return None


def agrees(row: dict) -> bool | None:
    """Whether counted and formula totals are equal; None where one of them is missing."""
    pairs = [(row[f"{way}_total"], row[f"formula_{way}_total"]) for way in ("reads", "writes")]
    return None if any(None in pair for pair in pairs) else all(a == b for a, b in pairs)


def ratio(x: float, over: str, under: str) -> str:
    """`1.41 times fewer`, or `1.2 times more` where x is below 1."""
    return f"{x:.3g} times {over}" if x >= 1 else f"{1 / x:.3g} times {under}"


def milliseconds(row: dict) -> str:
    ms = row["seconds"] * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


OUTCOME = (  # the last columns of a table
    ("accesses", lambda row: count(total(row))),
    ("formula", lambda row: {True: "= equal", False: "DIFFERS"}.get(agrees(row))),
    ("DRAM", lambda row: row["dram_bytes"] and gigabytes(row["dram_bytes"])),
    ("L2", lambda row: row["l2_bytes"] and gigabytes(row["l2_bytes"])),
    ("time", lambda row: row["seconds"] and milliseconds(row)),
    ("TFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:.2f}"),
    ("max\nerror", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
    ("gate", lambda row: row["gate"]),
    ("cannot run", lambda row: row["infeasible"]),
)
