"""What benchmark rows say: tables, warnings and the picture.  [floor 3]"""

from __future__ import annotations

import math

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
    heads += (f"speed over\n{rows[0]['provider']}", "max\nerror", "gate")
    body = []
    for row in rows:
        spread = None if row["ms"] is None else f"{row['ms_p20']:.4g} to {row['ms_p80']:.4g}"
        body.append([
            row["provider"], shape(row), f"{row['Br']}x{row['Bc']}" if row["Br"] else "–", number(row["ms"], "{:.4g}"),
            spread or "–", number(row["tflops"], "{:.1f}"), number(row["of_ceiling"], "{:.0%}"),
            number(row["ratio"], "{:.2f}"), number(row["max_error"], "{:.1e}"), row["gate"] or row["why"] or "–",
        ])  # fmt: skip
    return records.tabulate(body, heads, "simple", disable_numparse=True)


def careful(rows: list[dict]) -> list[str]:
    """A line for each kernel whose two medians differ by more than they may."""
    return [
        f"careful: {row['provider']} {shape(row)}: measured twice, {100 * row['again']:+.1f} % apart"
        for row in rows
        if row["again"] is not None and abs(row["again"]) > bench.SAME
    ]


def compiled(rows: list[dict]) -> str:
    """What the compiler made: once a kernel, dtype, head_dim and tile."""
    heads = ("kernel", "tile", "d", "registers", "spills", "shared", "threads", "blocks a SM", "warps a SM")
    heads += ("compiled in", "from cache in")
    body = [
        (
            row["provider"], f"{row['Br']}x{row['Bc']}", row["d"], row["registers"], row["spills"], row["shared_bytes"],
            row["threads"], row["blocks_per_sm"], row["warps_per_sm"], f"{row['compile_s']:.1f} s",
            f"{row['cached_compile_s']:.2f} s",
        )
        for row in rows
        if row["registers"]
    ]  # fmt: skip
    return records.tabulate(list(dict.fromkeys(body)), heads, "simple", disable_numparse=True)


def draw(rows: list[dict]):
    """TFLOP/s over N, a line a provider; a panel for each d and mask."""
    panels = sorted({(row["d"], row["causal"]) for row in rows})
    names = list(dict.fromkeys(row["provider"] for row in rows))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    first = rows[0]
    where = (
        f"{first['device']} · {first['direction']} · {first['dtype']} · Gaussian input · revision {first['revision']}"
    )
    figure = picture.page(title(rows), where, (12, 1.3 + 3.4 * lines))
    top = max((row["tflops"] for row in rows if row["tflops"]), default=1) * 1.08
    for n, (d, causal) in enumerate(panels):
        height = 3.4 / (1.3 + 3.4 * lines)
        left, bottom = 0.06 + 0.5 * (n % columns), (lines - 1 - n // columns) * height + 0.2 * height
        axes = figure.add_axes((left, bottom, 0.28 if columns == 2 else 0.7, 0.58 * height))
        ends, shown = [], set()
        for name, color in zip(names, COLORS * len(names)):
            mine = {r["N_q"]: r["tflops"] for r in rows if (r["provider"], r["d"], r["causal"]) == (name, d, causal)}
            if mine := {N: y for N, y in sorted(mine.items()) if y}:
                axes.plot(list(mine), list(mine.values()), marker="o", markersize=4, linewidth=2, color=color)
                ends.append((max(mine), mine[max(mine)], f"{name}, {mine[max(mine)]:.0f}", color))
                shown |= set(mine)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(shown), [f"{N // 1024}k" if N >= 1024 else str(N) for N in sorted(shown)])
        axes.minorticks_off()
        axes.set_ylim(0, top)
        axes.grid(axis="y")
        axes.set_title(f"TFLOP/s over N, d={d}, {'causal' if causal else 'full'}")
        picture.label_ends(axes, ends, 0.1)
    return figure


def title(rows: list[dict]) -> str:
    """The first kernel's speed over each rival: the geometric mean over the points that both have."""
    first = rows[0]["provider"]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio"] and row["provider"] != first:
            ratios.setdefault(row["provider"], []).append(1 / row["ratio"])
    told = [f"{math.exp(sum(map(math.log, x)) / len(x)):.2f} x {name}" for name, x in ratios.items()]
    return f"{first.removeprefix('sandbox:')}: " + (", ".join(told) if told else "measured alone")
