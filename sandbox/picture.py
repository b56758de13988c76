"""How our pictures look: colours that colour-blind readers tell apart, titles that answer, labels where they belong."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#d9d9d9"

# Okabe and Ito's palette.
BLUE, SKY, VERMILION, ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
GREEN, PURPLE, YELLOW, SILVER = "#009E73", "#CC79A7", "#F0E442", "#B0B0B0"

# Arrays that are drawn as one, and their colour: the same in every picture.
GROUPS = {
    "Q": (("Q",), BLUE),
    "K, V": (("K", "V"), SKY),
    "O": (("O",), VERMILION),
    "l, m, LSE, D": (("l", "m", "LSE", "L", "D"), YELLOW),
    "dO": (("dO",), PURPLE),
    "dQ": (("dQ",), GREEN),
    "dK, dV": (("dK", "dV"), ORANGE),
    "S, P": (("S", "P", "dS", "dP"), SILVER),
}
LOOPS = {"kv_outer": VERMILION, "q_outer": BLUE, None: GREY}

plt.rcParams.update(
    {
        "figure.dpi": 150, "savefig.dpi": 150, "font.family": "DejaVu Sans", "font.size": 11,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
        "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True,
        "xtick.color": GREY, "ytick.color": GREY, "text.color": INK, "grid.color": PALE, "grid.linewidth": 0.7,
        "hatch.linewidth": 0.8,
    }
)  # fmt: skip


def page(title: str, subtitle: str, size: tuple[float, float]):
    """A figure whose title is the answer and whose subtitle says where and on what it was measured."""
    figure = plt.figure(figsize=size, facecolor="white")
    lines = title.count("\n") + 1
    figure.text(0.02, 1 - 0.15 / size[1], title, fontsize=16, fontweight="bold", va="top", linespacing=1.25)
    figure.text(0.02, 1 - (0.22 + 0.29 * lines) / size[1], subtitle, fontsize=10.5, color=GREY, va="top")
    return figure


def setup(row: dict) -> str:
    """Where a row was measured and on what, for the subtitle."""
    what = {"minilm": "real input (MiniLM)", "gauss": "Gaussian input"}[row["input"]]
    mask = "causal" if row["causal"] else "no mask"
    size = f"B={row['B']} H={row['H']} d={row['d']}"
    return f"{row['device']} · {what} · {size} {row['dtype']} · {mask} · {revision([row])}"


def revision(rows: list[dict]) -> str:
    """At which revision the rows were measured, or at which ones, for the subtitle."""
    names = list(dict.fromkeys(row["revision"] for row in rows if row["revision"]))
    return f"revision {' and '.join(names)}" if names else "no revision"


def box(x, y, width, height, color, alpha=1.0):
    return Rectangle((x, y), width, height, facecolor=to_rgba(color, alpha), edgecolor="white", linewidth=2)


def arrow(axes, tail, head, color=INK, width=1.5):
    line = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", head, tail, arrowprops=line)


def ink_on(color) -> str:
    """Black or white, whichever reads better on this colour."""
    r, g, b, _ = to_rgba(color)
    return INK if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "white"


def name_inside(axes, left, width, y, name, color, span, faint=False):
    """The name in the middle of a bar's segment, where it is wide enough; `span` is what the axis shows."""
    inches = axes.get_window_extent().width / axes.figure.dpi * width / span
    if inches < 0.075 * len(name) + 0.06:
        return
    halo = [withStroke(linewidth=5, foreground=color)] if not faint else []
    ink = INK if faint else ink_on(color)
    axes.text(left + width / 2, y, name, ha="center", va="center", fontsize=9, color=ink, path_effects=halo)


def label_ends(axes, labels, gap=0.05):
    """Names lines at their right ends: labels are (x, y, text, color), moved apart where they would overlap.

    Call it when the limits of the axes are final.
    """
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted((to_axes((x, y))[1], text, color) for x, y, text, color in labels)
    heights, top = [], 1.0
    for end, _, _ in ends:
        heights.append(max(end, heights[-1] + gap) if heights else end)
    for n in reversed(range(len(heights))):  # none above the axes, and each below the one above it
        heights[n] = min(heights[n], top)
        top = heights[n] - gap
    for height, (_, text, color) in zip(heights, ends):
        axes.text(1.02, height, text, color=color, fontsize=10, va="center", transform=axes.transAxes)


def few_ticks():
    return MaxNLocator(5)


def frame(x, y):
    """Around a cell of a map."""
    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=VERMILION, linewidth=2.5)


def round_ticks(axes, words):
    """1, 2, 5, 10, ... on a logarithmic y axis whose limits are final."""
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-12, 18) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [words(tick) for tick in ticks])
    axes.minorticks_off()
