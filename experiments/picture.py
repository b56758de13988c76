"""How our pictures look: one palette that colour-blind readers can tell apart, titles that answer, labels on the thing."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#d9d9d9"

# Okabe and Ito's palette: what an array is, it is in every picture.
ARRAYS = {
    "Q": "#0072B2",
    "K, V": "#56B4E9",
    "O": "#D55E00",
    "l, m, LSE, D": "#F0E442",
    "dO": "#CC79A7",
    "dQ": "#009E73",
    "dK, dV": "#E69F00",
    "S, P": "#999999",
}
MEMBERS = {
    "Q": ("Q",),
    "K, V": ("K", "V"),
    "O": ("O",),
    "l, m, LSE, D": ("l", "m", "LSE", "D"),
    "dO": ("dO",),
    "dQ": ("dQ",),
    "dK, dV": ("dK", "dV"),
    "S, P": ("S", "P"),
}

plt.rcParams.update(
    {
        "figure.dpi": 150, "savefig.dpi": 150, "font.family": "DejaVu Sans", "font.size": 10.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
        "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.axisbelow": True,
        "xtick.color": GREY, "ytick.color": GREY, "text.color": INK, "grid.color": PALE, "grid.linewidth": 0.7,
        "hatch.linewidth": 0.8,
    }
)  # fmt: skip


def page(title: str, subtitle: str, size=(12, 6.6)):
    """A figure whose title is the answer and whose subtitle says where and on what it was measured."""
    figure = plt.figure(figsize=size, facecolor="white")
    figure.text(0.02, 0.985, title, fontsize=15, fontweight="bold", va="top")
    lines = title.count("\n") + 1
    figure.text(0.02, 0.985 - (0.30 * lines + 0.05) / size[1], subtitle, fontsize=10, color=GREY, va="top")
    return figure


def setup(row: dict) -> str:
    """Where a row was measured and on what, for the subtitle."""
    what = {"minilm": "real input (MiniLM)", "gauss": "Gaussian input"}[row["input"]]
    mask = "causal" if row["causal"] else "no mask"
    revision = f"revision {row['revision']}" if row["revision"] else "no revision"
    return f"{row['device']} · {what} · B={row['B']} H={row['H']} d={row['d']} {row['dtype']} · {mask} · {revision}"
