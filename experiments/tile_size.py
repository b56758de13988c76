"""How large should a tile be?

Traffic falls as 1/(the block that stays on chip), FA1's Theorem 2: N^2 d^2 / M.  Br is that block where Q is outside,
Bc where K/V is.  Larger is better until shared memory ends, or until too few blocks are left to fill the GPU: that is
why the fastest tile need not be the largest, and what choose_tile has to guess.
"""

from __future__ import annotations

import click
import numpy as np

from sandbox import catalog, picture
from sandbox.choose import choose_tile
from sandbox.mask import Mask
from sandbox.measure import formulas
from sandbox.problem import Problem
from sandbox.variant import Device, Tile

from . import common, inputs
from .common import Experiment, count, milliseconds, number, problem_of, ratio, short, total

VARIANTS = ("fwd_v1", "fwd_v2", "bwd_v1", "bwd_v2")


# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, input, variant, seqlen, head_dim, br, bc, batch, heads, causal, seed, dtype, counters):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    N = seqlen or (64 if device.simulated else 512 if real else 4096)
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    problem = Problem(batch, heads, heads, N, N, head_dim or (32 if real else 64), dtype, mask=Mask(causal))
    inputs.check(input, problem)
    sizes = (8, 16, 32) if device.simulated else (16, 32, 64, 128)
    grid = [Tile(Br, Bc) for Br in br or sizes for Bc in bc or sizes]
    points = []
    for name in dict.fromkeys(variant or VARIANTS):
        kernel = catalog.find(name)
        if kernel.direction == "softmax":
            raise ValueError(f"--variant {name}: it has no tile")
        chosen = choose_tile(problem, device, kernel)
        for tile in grid + [chosen] * (chosen not in grid):
            notes = {"chosen": tile == chosen}
            fields = dict(input=input, seed=seed, count_bytes=counters, notes=notes)
            points.append(common.point(kernel, problem, tile, device, **fields))
    if all(misfits := [point.infeasible for point in points if point.tile in grid]):
        raise ValueError(f"no tile fits: {misfits[0]}")
    return points


# ---- what the rows say ----------------------------------------------------------------------------------------------


def stays(row: dict) -> str:
    """The side of the tile that stays on chip while the inner loop runs."""
    return "Br" if row["loop_order"] == "q_outer" else "Bc"


def over_theorem(row: dict) -> float:
    """Accesses over N^2 d^2 / M, where M is what FA1's Algorithm 1 needs for a block this high: 4 d of it."""
    p = problem_of(row)
    return total(row) / formulas.theorem(p, formulas.on_chip(p, row[stays(row)]))["flash"]


def measured(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["variant"] == name and not row["infeasible"] and total(row) is not None]


def names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def answer(rows: list[dict]) -> str:
    lines = [line for name in names(rows) for line in (on_traffic(rows, name), on_time(rows, name)) if line]
    if misfits := [row for row in rows if row["infeasible"]]:
        first = misfits[0]
        why = f"{first['variant']} {_tile(first)}: {first['infeasible']}"
        lines.append(f"{len(misfits)} of {len(rows)} tiles cannot run; {why}.")
    lines.append(
        "To compare, FA1, Figure 2 (middle): traffic and time fall as Bc goes from 64 to 256; then time is flat."
    )
    text = "\n".join(["How large should a tile be?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_traffic(rows: list[dict], name: str) -> str:
    """What each side of the tile does to the accesses, the other one held."""
    ours = measured(rows, name)
    if not ours:
        return f"{name}: no tile runs."
    held = stays(ours[0])
    parts = []
    for side, other in ((held, _other(held)), (_other(held), held)):
        small, large = _span(ours, side, other)
        if small[side] < large[side]:
            fewer = total(small) / total(large)
            words = "changes nothing" if fewer == 1 else "takes " + ratio(fewer, "fewer accesses", "more accesses")
            parts.append(f"{side} from {small[side]} to {large[side]} {words}")
    constants = [over_theorem(row) for row in ours]
    parts.append(f"{min(constants):.1f} to {max(constants):.1f} x N²d²/M, M = 4d·{held}, at every tile")
    return f"{name}: " + "; ".join(parts) + "."


def _span(rows: list[dict], side: str, other: str) -> tuple[dict, dict]:
    """The rows of the smallest and the largest side, where the other side is what most sizes of it run with."""
    lines = [[row for row in rows if row[other] == size] for size in sorted({row[other] for row in rows})]
    line = sorted(max(reversed(lines), key=len), key=lambda row: row[side])
    return line[0], line[-1]


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    return [claim(rows) for claim in (claim_3, claim_10)]


def claim_3(rows: list[dict]):
    """v1 cuts HBM accesses (Theorem 2: N^2 d^2 / M); the saving is what makes it fast."""
    ours = measured(rows, "fwd_v1")
    if not ours:
        return 3, "not asked here", "fwd_v1 was not run"
    floor = formulas.standard(problem_of(ours[0])).total
    below = [row for row in ours if total(row) < floor]
    why = f"fwd_v1 takes fewer accesses than standard attention's floor, {number(floor)}, "
    why += f"at {len(below)} of {len(ours)} tiles"
    constants = [over_theorem(row) for row in ours]
    why += f", and they follow N²d²/M within {max(constants) / min(constants) - 1:.0%}"
    small, large = _span(ours, "Bc", "Br")
    if small["Bc"] < large["Bc"]:
        why += f"; Bc from {small['Bc']} to {large['Bc']} takes "
        why += ratio(total(small) / total(large), "fewer accesses", "more accesses")
        if small["seconds"] and large["seconds"]:
            why += f" and is {ratio(small['seconds'] / large['seconds'], 'faster', 'slower')}"
    return 3, "holds in part" if below else "does not hold with these tiles", why + "; what makes it fast: loop_order"


def claim_10(rows: list[dict]):
    """v2 may choose tile sizes from the sequence length and the resources."""
    behind = {name: slower_by(rows, name) for name in names(rows) if "v2" in name}
    behind = {name: x for name, x in behind.items() if x is not None}
    if not behind:
        return 10, "not measurable here", "only time tells the chooser's tile from the best one"
    why = ", ".join(f"{name} {x:.1%}" for name, x in behind.items())
    verdict = "holds" if max(behind.values()) < 0.05 else "holds in part"
    return 10, verdict, f"the chooser's tile is slower than the best of the sweep by: {why}"


def slower_by(rows: list[dict], name: str) -> float | None:
    """How much slower the chooser's tile is than the fastest one."""
    ours = [row for row in measured(rows, name) if row["seconds"]]
    chosen = [row["seconds"] for row in ours if row["chosen"]]
    return chosen[0] / min(row["seconds"] for row in ours) - 1 if chosen else None


def on_time(rows: list[dict], name: str) -> str | None:
    ours = [row for row in measured(rows, name) if row["seconds"]]
    if not ours:
        return None
    best, chosen = min(ours, key=lambda row: row["seconds"]), [row for row in ours if row["chosen"]]
    text = f"{name} is fastest with {_tile(best)}, {milliseconds(best)}"
    if not chosen:
        return text + "; the chooser's tile did not run."
    behind = slower_by(rows, name)
    return text + f"; the chooser takes {_tile(chosen[0])}, " + (f"{behind:.1%} slower." if behind else "the same.")


def _tile(row: dict) -> str:
    return f"{row['Br']}x{row['Bc']}"


def _other(side: str) -> str:
    return {"Br": "Bc", "Bc": "Br"}[side]


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = [
        ("variant", lambda row: row["variant"]),
        ("Br", lambda row: row["Br"]),
        ("Bc", lambda row: row["Bc"]),
        ("", lambda row: "chosen" if row["chosen"] else ""),
        ("reads", lambda row: count(row["reads_total"])),
        ("writes", lambda row: count(row["writes_total"])),
        ("÷ N²d²/M", lambda row: None if total(row) is None else f"{over_theorem(row):.1f}"),
        *common.OUTCOME,
    ]
    return common.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


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
            _map(axes, [row for row in rows if row["variant"] == name], what, value, words)
            axes.set_ylabel("Br" if column == 0 else "", labelpad=4, rotation=0, va="center", ha="right")
        _curve(figure.add_axes((0.765, bottom, 0.135, 2.0 / height)), rows, kernels, what, value, words)
    key = "boxed: what choose_tile takes" + (" · bold: the least" if len(maps) == 2 else "")
    figure.text(0.045, 0.12 / height, f"{key} · empty: does not fit", fontsize=9.5, color=picture.GREY)
    return figure


def _title(rows, kernels) -> str:
    name = "fwd_v2" if "fwd_v2" in kernels else kernels[0]
    ours = measured(rows, name)
    held = stays(ours[0])
    small, large = min(ours, key=lambda row: row[held]), max(ours, key=lambda row: row[held])
    fewer = ratio(total(small) / total(large), "fewer accesses", "more accesses")
    title = (
        f"The block that stays on chip sets the traffic: {name}, {held} from {small[held]} to {large[held]}, {fewer}"
    )
    timed = [row for row in ours if row["seconds"]]
    if timed:
        best = min(timed, key=lambda row: row["seconds"])
        title += f",\n{'yet' if best[held] < large[held] else 'and'} the fastest tile is {_tile(best)}"
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
    known = {(row["Br"], row["Bc"]) for row in rows}
    for y, x in np.argwhere(np.isnan(cells)):
        if (down[y], across[x]) not in known:
            axes.text(x, y, "not run", ha="center", va="center", fontsize=9.5, color=picture.GREY)
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
    axes.set_xticks(sizes, sizes)
    picture.round_ticks(axes, words)
    axes.grid(axis="y")
    axes.set_xlabel("rows of the block that stays", labelpad=2)
    axes.set_title("dashed: c·N²d²/M" if what == "accesses" else "ms")
    picture.label_ends(axes, ends, 0.1)


EXPERIMENT = Experiment(
    name="tile_size",
    question="How large should a tile be?",
    fixed="input, shape, variant",
    factor="the tile Br x Bc, under the limit of shared memory",
    varies=("variant", "direction", "Br", "Bc"),
    options=(
        common.INPUT,
        click.option("--variant", multiple=True, help=f"One or several; {', '.join(VARIANTS)}."),
        click.option("--seqlen", type=common.SIZE, help="N; 64 simulated, else 4096."),
        common.HEAD_DIM,
        common.integers("--br", help="Br, one or several; 8,16,32 simulated, else 16 to 128."),
        common.integers("--bc", help="Bc, likewise."),
        common.BATCH,
        click.option("--heads", type=common.SIZE, help="H; 1 simulated, else 32."),
        common.CAUSAL,
        common.SEED,
        common.DTYPE,
        common.COUNTERS,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
)
