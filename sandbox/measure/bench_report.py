"""What benchmark rows say: tables, warnings and the picture.  [floor 3]"""

from __future__ import annotations

import math
import textwrap

from .. import picture, records
from . import bench

COLORS = (
    picture.VERMILION, picture.ORANGE, picture.PURPLE, picture.BLUE, picture.SKY, picture.GREEN, picture.GREY,
    picture.SILVER,
)  # fmt: skip


def shape(row: dict) -> str:
    mask = "causal" if row["causal"] else "full"
    return f"{row['direction']} {row['dtype']} B={row['B']} H={row['H']} N={row['N_q']} d={row['d']} {mask}"


def table(rows: list[dict]) -> str:
    def number(x, words):
        return "–" if x is None else words.format(x)

    heads = ("provider", "shape", "tile", "ms", "p20 to p80", "TFLOP/s", "% of\nmatmul")
    heads += (f"speed over\n{rows[0]['provider']}", "max\nerror", "gate, or\nwhy not")
    body = []
    for row in rows:
        spread = None if row["ms"] is None else f"{row['ms_p20']:.4g} to {row['ms_p80']:.4g}"
        told = row["gate"] or (row["why"] or "–").removeprefix(f"{row['provider']}: ")
        body.append([
            row["provider"], shape(row), f"{row['Br']}x{row['Bc']}" if row["Br"] else "–", number(row["ms"], "{:.4g}"),
            spread or "–", number(row["tflops"], "{:.1f}"), number(row["of_ceiling"], "{:.0%}"),
            number(row["ratio"], "{:.2f}"), number(row["max_error"], "{:.1e}"), textwrap.fill(told, 40),
        ])  # fmt: skip
    return records.tabulate(body, heads, "simple", disable_numparse=True)


def careful(rows: list[dict]) -> list[str]:
    """A line for each median that another one of the same kernel differs from by more than it may."""
    lines = []
    for row in rows:
        since = row["ms"] / row["ms_before"] - 1 if row["ms"] and row["ms_before"] else None
        for apart, what in ((row["again"], "one half of the samples from the other"), (since, "since the run before")):
            if apart is not None and abs(apart) > bench.SAME:
                lines.append(f"careful: {row['provider']} {shape(row)}: {what}, {100 * apart:+.1f} %")
    return lines


def compiled(rows: list[dict]) -> str:
    """What the compiler made: once a kernel, tile, head_dim, and mask or none."""
    heads = ("kernel", "tile", "d", "mask", "registers", "spills", "shared", "threads", "blocks a SM", "warps a SM")
    heads += ("compiled in", "from cache in")
    body = [
        (
            row["provider"], f"{row['Br']}x{row['Bc']}", row["d"], "causal" if row["causal"] else "full",
            row["registers"], row["spills"], row["shared_bytes"], row["threads"], row["blocks_per_sm"],
            row["warps_per_sm"], f"{row['compile_s']:.1f} s", f"{row['cached_compile_s']:.3f} s",
        )
        for row in rows
        if row["registers"]
    ]  # fmt: skip
    return records.tabulate(list(dict.fromkeys(body)), heads, "simple", disable_numparse=True, missingval="–")


def draw(rows: list[dict]):
    """TFLOP/s over N, a line a provider; a panel for each d and mask."""
    panels = sorted({(row["d"], row["causal"]) for row in rows})
    names = list(dict.fromkeys(row["provider"] for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    answer = textwrap.fill(title(rows).replace(" x ", "\u00a0x\u00a0"), 96)  # no line ends at an x
    head, high = 0.75 + 0.29 * answer.count("\n"), 3.0  # inches: above the panels, and each of them
    figure = picture.page(answer, setup(rows), (12, head + high * lines))
    height = high / (head + high * lines)
    top = max((row["tflops"] for row in rows if row["tflops"]), default=1) * 1.08
    longest = max(len(name.removeprefix(bench.OURS)) for name in names) + len(f", {top:.0f}")
    wide = min(0.28, 0.435 - 0.0072 * longest) if columns == 2 else 0.7  # a panel leaves room for the names beside it
    for n, (d, causal) in enumerate(panels):
        left, bottom = 0.06 + 0.5 * (n % columns), (lines - 1 - n // columns + 0.17) * height
        axes = figure.add_axes((left, bottom, wide, 0.66 * height))
        ends, shown = [], {row["N_q"] for row in rows if row["tflops"] and (row["d"], row["causal"]) == (d, causal)}
        for name, color in zip(names, COLORS * len(names)):
            mine = {r["N_q"]: r["tflops"] for r in rows if (r["provider"], r["d"], r["causal"]) == (name, d, causal)}
            if mine := {N: y for N, y in sorted(mine.items()) if y}:
                axes.plot(list(mine), list(mine.values()), marker="o", markersize=4, linewidth=2, color=color)
                last = max(mine)
                up_to = f", to {thousands(last)}" if last < max(shown) else ""
                ends.append((last, mine[last], f"{name.removeprefix(bench.OURS)}{up_to}, {mine[last]:.0f}", color))
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(shown), [thousands(N) for N in sorted(shown)])
        axes.minorticks_off()
        axes.set_ylim(0, top)
        axes.grid(axis="y")
        axes.set_xlabel("N", labelpad=1)
        axes.set_title(f"TFLOP/s over N, d={d}, {'causal' if causal else 'full'}")
        picture.label_ends(axes, ends, 0.1)
    return figure


def thousands(N: int) -> str:
    return f"{N // 1024}k" if N % 1024 == 0 else str(N)


def setup(rows: list[dict]) -> str:
    """Where the rows were measured and on what, for the subtitle."""
    first = rows[0]
    shapes = (("B·N", "B", "N_q"), ("H·d", "H", "d"))
    sizes = [(what, {row[x] * row[y] for row in rows}) for what, x, y in shapes]
    sizes = [f"{what}={', '.join(map(str, sorted(values)))}" for what, values in sizes]
    words = (first["device"], first["direction"], first["dtype"], *sizes, "Gaussian input", picture.revision(rows))
    return " · ".join(words) + " · speed: geometric mean"


def title(rows: list[dict]) -> str:
    """The first kernel's speed over each other's: the geometric mean over the points that both have."""
    first = rows[0]["provider"].removeprefix(bench.OURS)
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio"] and row["provider"] != row["over"]:
            ratios.setdefault(row["provider"].removeprefix(bench.OURS), []).append(1 / row["ratio"])
    if not any(row["ms"] for row in rows if row["provider"] == row["over"]):
        return f"{first} was not timed"
    told = [f"{math.exp(sum(map(math.log, x)) / len(x)):.2f} x {name}" for name, x in ratios.items()]
    return f"{first}'s speed: " + ", ".join(told) if told else f"{first}, measured alone"
