"""The picture of tile_size: a map of the tiles of each kernel, in accesses and in milliseconds."""

from __future__ import annotations

import numpy as np

from sandbox import picture

from .tables import ratio, short, total
from .tile_answer import measured, names, over_theorem, stays, tile_of


def draw(rows: list[dict]):
    """A map of the tiles for each variant, in accesses and, where there are any, in milliseconds; theorem beside."""
    maps = [("accesses", total, short)]
    if any(row["seconds"] for row in rows):
        maps.append(("time", lambda row: row["seconds"], lambda s: f"{s * 1e3:.3g}"))
    kernels = [name for name in names(rows) if measured(rows, name)]
    row = (measured(rows, kernels[0]) if kernels else rows)[0]
    subtitle = f"{picture.setup(row)} · N={row['N']}"
    if not kernels:
        return picture.page("No tile runs", subtitle, (12, 1.2))
    title = _title(rows, kernels)
    height = 0.95 + 0.3 * title.count("\n") + 2.95 * len(maps)
    figure = picture.page(title, subtitle, (13, height))
    for line, (what, value, words) in enumerate(maps):
        bottom = (0.85 + 2.95 * (len(maps) - 1 - line)) / height
        for column, name in enumerate(kernels):
            axes = figure.add_axes((0.045 + 0.67 * column / len(kernels), bottom, 0.57 / len(kernels), 2.0 / height))
            _map(axes, _of(rows, name), what, value, words)
            axes.set_ylabel("Br" if column == 0 else "", labelpad=4, rotation=0, va="center", ha="right")
        _curve(figure.add_axes((0.765, bottom, 0.135, 2.0 / height)), rows, kernels, what, value, words)
    key = "boxed: what choose_tile takes" + (" · bold: the least" if len(maps) == 2 else "") + " · empty: does not fit"
    key += " · –: not tried" if any(map(untried, (_of(rows, name) for name in kernels))) else ""
    figure.text(0.045, 0.12 / height, key, fontsize=9.5, color=picture.GREY)
    return figure


def _of(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["variant"] == name]


def untried(rows: list[dict]) -> set[tuple[int, int]]:
    """(Br, Bc) of a map's cells that have no row."""
    everything = {(Br["Br"], Bc["Bc"]) for Br in rows for Bc in rows}
    return everything - {(row["Br"], row["Bc"]) for row in rows}


def _title(rows, kernels) -> str:
    name = next((name for name in kernels if name.startswith("fwd_v2")), kernels[0])
    ours = measured(rows, name)
    held = stays(ours[0])
    small, large = min(ours, key=lambda row: row[held]), max(ours, key=lambda row: row[held])
    fewer = ratio(total(small) / total(large), "fewer accesses", "more accesses")
    title = "The block that stays on chip sets the traffic:"
    title += "\n" if len(name) > 6 else " "
    title += f"{name}, {held} from {small[held]} to {large[held]}, {fewer}"
    timed = [row for row in ours if row["seconds"]]
    if timed:
        best = min(timed, key=lambda row: row["seconds"])
        title += "," + (" " if "\n" in title else "\n")
        title += f"{'yet' if best[held] < large[held] else 'and'} the fastest tile is {tile_of(best)}"
    return title


def _map(axes, rows, what, value, words):
    """Br down, Bc to the right; darker is more."""
    down, across = sorted({row["Br"] for row in rows}), sorted({row["Bc"] for row in rows})
    cells = np.full((len(down), len(across)), np.nan)
    for row in rows:
        if not row["infeasible"] and value(row):
            cells[down.index(row["Br"]), across.index(row["Bc"])] = np.log(value(row))
    low, high = np.nanmin(cells), np.nanmax(cells)
    axes.set_facecolor(picture.PALE)
    axes.imshow(
        cells, cmap="Blues", vmin=low - 0.2 * (high - low + 0.01), vmax=high + 0.25 * (high - low + 0.01), aspect="auto"
    )
    for row in rows:
        y, x = down.index(row["Br"]), across.index(row["Bc"])
        if np.isfinite(cells[y, x]):
            least = cells[y, x] == low and what == "time"
            ink = "white" if cells[y, x] > low + 0.6 * (high - low) and high > low else picture.INK
            axes.text(
                x,
                y,
                words(value(row)),
                ha="center",
                va="center",
                fontsize=9.5,
                color=ink,
                weight="bold" if least else None,
            )
        if row["chosen"]:
            axes.add_patch(picture.frame(x, y))
    for Br, Bc in untried(rows):
        axes.text(across.index(Bc), down.index(Br), "–", ha="center", va="center", fontsize=9.5, color=picture.GREY)
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Bc", labelpad=1)
    axes.set_title(rows[0]["variant"] + (", ms" if what == "time" else ", accesses"))


COLORS = (picture.VERMILION, picture.BLUE, picture.ORANGE, picture.GREEN)


def _curve(axes, rows, kernels, what, value, words):
    """Every tile over the side that stays on chip; the theorem, times a constant, as a dashed line."""
    ends = []
    for name, color in zip(kernels, COLORS * len(kernels)):
        ours = sorted((row for row in measured(rows, name) if value(row)), key=lambda row: row[stays(row)])
        if not ours:
            continue
        x = [row[stays(row)] for row in ours]
        axes.plot(x, [value(row) for row in ours], "o", color=color, markersize=5, alpha=0.8)
        if what == "accesses":
            constant = min(map(over_theorem, ours))
            axes.plot(x, [total(row) * constant / over_theorem(row) for row in ours], "--", color=color, linewidth=1.2)
        last = min((row for row in ours if row[stays(row)] == x[-1]), key=value)
        ends.append((x[-1], value(last), f"{name}, {stays(last)}", color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    sizes = sorted({row[stays(row)] for row in rows})
    axes.set_xticks(sizes, [size if size & (size - 1) == 0 else "" for size in sizes])  # powers of two have room
    picture.round_ticks(axes, words)
    axes.grid(axis="y")
    axes.set_xlabel("rows of the block that stays", labelpad=2)
    axes.set_title("dashed: c·N²d²/M" if what == "accesses" else "ms")
    picture.label_ends(axes, ends, 0.1)
