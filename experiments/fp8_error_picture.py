"""The picture of fp8_error: Table 3 beside the paper's, and the error over the strength of outliers."""

from __future__ import annotations

from sandbox import picture

from .fp8_error_answer import (
    BLOCKS,
    CHANNELS,
    ENTRIES,
    NEITHER,
    NO_BLOCKS,
    NO_ROTATION,
    PAPER,
    STANDARD8,
    STRENGTHS,
    V3_FP8,
    begins,
    gains,
    of,
    power,
    seeds,
    swept,
)

COLORS = {
    NEITHER: picture.SILVER, NO_BLOCKS: picture.ORANGE, NO_ROTATION: picture.SKY,
    V3_FP8: picture.BLUE, STANDARD8: picture.VERMILION,
}  # fmt: skip
WIDTHS = {NEITHER: 6, NO_BLOCKS: 4, NO_ROTATION: 3, V3_FP8: 1.5}  # drawn in this order: where lines coincide, all show
PANELS = {  # (input, causal): title, label of the axis
    (ENTRIES, False): ("Single entries stick out", "their standard deviation"),
    (CHANNELS, False): ("Channels of K stick out, not of Q", "times"),
    (BLOCKS, True): ("Sizes drift along the sequence", "ends apart, times"),
}


def draw(rows: list[dict]):
    """Table 3 as bars beside the paper's; the error over the strength of outliers, one panel a distribution."""
    last = rows[-1]
    shapes = dict.fromkeys(f"N={row['N']} d={row['d']} ({seeds(row)})" for row in rows if row["input"] == ENTRIES)
    where = [last["device"], "emulated in torch", *shapes]
    where.append(picture.revision(rows))
    panels = [name for name in PANELS if any(swept(rows, *name)[V3_FP8].values())]
    bars = of(rows, "table3")
    width = 0.3 + (5.2 if bars else 0) + 3.6 * len(panels) + (1.2 if panels else 0)
    figure = picture.page(title(rows), " · ".join(where), (max(width, 9), 5.6))
    left = 0.3
    inches = lambda x, w: figure.add_axes((x / max(width, 9), 0.13, w / max(width, 9), 0.58))  # noqa: E731
    if bars:
        _table3(inches(left + 1.2, 3.2), bars)
        left += 5.2
    for n, name in enumerate(panels):
        _sweep(inches(left + 0.3, 3.0), rows, name, first=n == 0, last=n == len(panels) - 1)
        left += 3.6
    return figure


def _table3(axes, bars: dict[str, dict]):
    """Ours as a bar with its spread, the paper's as a mark."""
    for y, (name, row) in enumerate(bars.items()):
        color = COLORS.get(name, picture.GREEN)
        axes.barh(y, row["rmse"], 0.66, color=color)
        axes.plot([row["rmse_least"], row["rmse_most"]], [y, y], color=picture.INK, linewidth=1.2)
        axes.plot([PAPER[name]] * 2, [y - 0.42, y + 0.42], color=picture.INK, linewidth=2)
        axes.text(max(row["rmse_most"], PAPER[name]) * 1.2, y, f"{row['rmse']:.1e}", va="center", fontsize=9.5)
    axes.set_yticks(range(len(bars)), list(bars), color=picture.INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(2e-5, 0.15)
    axes.set_xlabel("RMSE (black: the paper's)")
    axes.set_title("Table 3")


def _sweep(axes, rows: list[dict], name, first: bool, last: bool):
    heading, label = PANELS[name]
    ends = []
    for way, line in swept(rows, *name).items():
        points = sorted((strength, row["row_error"]) for strength, row in line.items())
        axes.plot(*zip(*points), marker="o", markersize=WIDTHS[way] + 1.5, linewidth=WIDTHS[way], color=COLORS[way])
        ends.append((*points[-1], way, COLORS[way]))
    binary = name[0] != ENTRIES
    axes.set_xscale("log" if binary else "symlog", base=2 if binary else 10, **({} if binary else {"linthresh": 3}))
    if not binary:
        axes.set_xticks(STRENGTHS[ENTRIES], [f"{s:g}" for s in STRENGTHS[ENTRIES]])
    axes.set_yscale("log")
    axes.set_ylim(0.03, 15)
    percents = (3, 10, 30, 100, 300, 1000)
    axes.set_yticks([n / 100 for n in percents], [f"{n} %" if first else "" for n in percents])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel(label)
    axes.set_ylabel("error of a row of O" if first else "")
    axes.set_title(heading, fontsize=11)
    if last:
        picture.label_ends(axes, ends, 0.07)


def title(rows: list[dict]) -> str:
    table3, gain = of(rows, "table3"), gains(rows, BLOCKS, True, NO_BLOCKS)
    parts = []
    if table3:
        times = table3[STANDARD8]["rmse"] / table3[V3_FP8]["rmse"]
        parts.append(f"FlashAttention-3 in FP8 has {times:.1f} times less error than plain FP8")
    if gain and (start := begins(gain)):
        parts.append(f"block scales help from sizes {power(start)} apart on")
    return ";\n".join(parts) or "What FP8 costs in accuracy"
