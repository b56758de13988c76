"""What does it save to skip the tiles that a causal mask empties?

A causal mask hides the half of S above its diagonal.  FlashAttention-2 does not visit a tile of which nothing is seen,
and looks at the mask pair by pair only in the tiles that the diagonal cuts.  [FA2, 2307.08691, section 3.1: 1.7 to 1.8
times as fast as the same attention without a mask]  With T tiles a side T(T+1)/2 of T² are left: 2T/(T+1) times fewer,
twice at most, and the diagonal is 2/(T+1) of them.

fwd_v1 and bwd_v1 visit every tile and move all that belongs to it, but they leave out products that would add nothing:
fwd_v1 P V, bwd_v1 all five.
"""

from __future__ import annotations

import click
import numpy as np
from matplotlib.colors import ListedColormap

from sandbox import catalog, picture
from sandbox.mask import Mask
from sandbox.measure import formulas
from sandbox.problem import Problem
from sandbox.variant import Device, Tile

from . import common, inputs, tables
from .common import Experiment
from .tables import milliseconds, number, problem_of, total

SKIPS = {"fwd_v1": False, "fwd_v2": True, "bwd_v1": False, "bwd_v2": True}
PAPER = (1.7, 1.8)  # times as fast, FA2 section 3.1

# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, input, seqlen, head_dim, br, bc, batch, heads, seed, dtype, counters):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    tile = Tile(br or (8 if device.simulated else 64), bc or (8 if device.simulated else 64))
    if not seqlen:
        seqlen = (16, 32, 64, 96) if device.simulated else (128, 256, 512) if real else (1024, 2048, 4096, 8192, 16384)
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    points = []
    for N in seqlen:
        for name, skips in SKIPS.items():
            for causal in (False, True):
                sizes = batch, heads, heads, N, N, head_dim or (32 if real else 64)
                problem = Problem(*sizes, dtype, mask=Mask(causal))
                inputs.check(input, problem)
                fields = dict(input=input, seed=seed, count_bytes=counters, notes=tiles(problem, tile, skips))
                points.append(common.point(catalog.find(name), problem, tile, device, **fields))
    if all(point.infeasible for point in points):
        raise ValueError(f"tile {tile} fits no kernel: {points[0].infeasible}")
    return points


def tiles(p: Problem, tile: Tile, skips: bool) -> dict:
    """Of one head's S: all tiles, those that are visited, and those of them in which the mask hides a pair."""
    Tr, Tc = -(-p.N_q // tile.Br), -(-p.N_k // tile.Bc)
    _, hi = p.mask.band(p.N_q, p.N_k)
    visited = full = 0
    for i0 in range(0, p.N_q, tile.Br):
        visited += len(p.mask.key_blocks(i0, tile.Br, tile.Bc, p.N_q, p.N_k)) if skips else Tc
        full += Tc if i0 + hi >= p.N_k - 1 else max(0, i0 + hi + 1) // tile.Bc  # the first row sees the least
    return {"tiles": Tr * Tc, "tiles_visited": visited, "tiles_masked": visited - full}


# ---- what the rows say ----------------------------------------------------------------------------------------------


def both(rows: list[dict], name: str) -> dict[int, tuple[dict, dict]]:
    """N -> the rows of a kernel without and with the mask, where both ran and passed the gate."""
    sound = {(row["N"], row["causal"]): row for row in rows if row["variant"] == name and row["gate"] == "passed"}
    return {N: (sound[N, False], sound[N, True]) for N, causal in sorted(sound) if causal and (N, False) in sound}


def visited(row: dict) -> int:
    return row["tiles_visited"]


def seconds(row: dict) -> float | None:
    return row["seconds"]


def ratios(rows: list[dict], name: str, of) -> dict[int, float]:
    """N -> `of` (visited, total or seconds) without the mask over the same with it; empty where there is none."""
    return {N: of(full) / of(causal) for N, (full, causal) in both(rows, name).items() if of(full) and of(causal)}


def answer(rows: list[dict]) -> str:
    lines = [line for name in SKIPS for line in (on_tiles(rows, name), on_growth(rows, name), on_time(rows, name))]
    if not any(ratios(rows, name, seconds) for name in SKIPS):
        lines.append("What that is worth in time, only a GPU can say.")
    lines.append(f"To compare, FA2, section 3.1, forward: {PAPER[0]} to {PAPER[1]} times as fast as without a mask.")
    lines = [f"  {line}" for line in lines if line]
    return "\n".join(["What does it save to skip what a causal mask empties?", *lines])


def on_tiles(rows: list[dict], name: str) -> str:
    pairs = both(rows, name)
    if not pairs:
        return f"{name}: nothing to compare; at no N it ran and passed the gate both with the mask and without."
    N = max(pairs)
    full, causal = pairs[N]
    text = f"{name} at N={N}, tile {causal['Br']}x{causal['Bc']}: it visits "
    if visited(full) == visited(causal):
        text += f"all {causal['tiles']:,} tiles"
    else:
        text += f"{visited(causal):,} of {causal['tiles']:,} tiles, {ratios(rows, name, visited)[N]:.2f} times fewer"
    text += f", and looks at the mask pair by pair in {causal['tiles_masked']:,}; {number(total(full))} accesses"
    how = {True: "counted", False: "counted, NOT by the formula"}.get(tables.agrees(causal), "by the formula")
    if total(full) == total(causal):
        return f"{text}, as many as without the mask ({how})."
    return f"{text} become {number(total(causal))}, {ratios(rows, name, total)[N]:.2f} times fewer ({how})."


def on_growth(rows: list[dict], name: str) -> str | None:
    """How the ratios go towards 2."""
    pairs = both(rows, name)
    if len(pairs) < 2 or not SKIPS[name]:
        return None
    first, last = min(pairs), max(pairs)
    tiles, accesses = (ratios(rows, name, of) for of in (visited, total))
    cut = {N: causal["tiles_masked"] / visited(causal) for N, (_, causal) in pairs.items()}
    text = f"{name} from N={first} to {last}: tiles {tiles[first]:.2f} to {tiles[last]:.2f} times fewer, accesses "
    text += f"{accesses[first]:.2f} to {accesses[last]:.2f}; of the visited tiles the diagonal cuts {cut[first]:.0%}, "
    return text + f"then {cut[last]:.0%}."


def on_time(rows: list[dict], name: str) -> str | None:
    faster = ratios(rows, name, seconds)
    if not faster:
        return None
    N = max(faster)
    full, causal = both(rows, name)[N]
    text = f"{name} in time at N={N}: {milliseconds(full)} become {milliseconds(causal)}, {faster[N]:.2f} times as fast"
    if not SKIPS[name]:
        return text + "; it leaves out products, not visits."
    if causal["direction"] == "bwd":
        return text + "."
    place = "below" if faster[N] < PAPER[0] else "above" if faster[N] > PAPER[1] else "within"
    return text + f", {place} the paper's span."


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    def against(of):
        """Of a row with the mask, the ratio of the one without to it."""

        def cell(row):
            ratio = ratios(rows, row["variant"], of).get(row["N"]) if row["causal"] else None
            return ratio and f"× {ratio:.2f}"

        return cell

    columns = [
        ("variant", lambda row: row["variant"]),
        ("N", lambda row: row["N"]),
        ("mask", lambda row: "causal" if row["causal"] else "none"),
        ("tiles", lambda row: f"{row['tiles']:,}"),
        ("visited", lambda row: f"{visited(row):,}"),
        ("looked\ninto", lambda row: f"{row['tiles_masked']:,}"),
        ("fewer\ntiles", against(visited)),
        ("fewer\naccesses", against(total)),
        ("times\nas fast", against(seconds)),
        *tables.OUTCOME,
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------

COLORS = dict(zip(SKIPS, (picture.VERMILION, picture.BLUE, picture.ORANGE, picture.GREEN)))
KINDS = {"empty": picture.PALE, "cut": picture.ORANGE, "full": picture.BLUE}
MAPPED = 16  # tiles a side that still read as tiles


def draw(rows: list[dict]):
    """The tiles of S; how many times fewer over N; on a GPU, how many times as fast."""
    names = [name for name in SKIPS if both(rows, name)]
    last = next((row for row in reversed(rows) if row["causal"]), rows[-1])
    where = f"{picture.setup(last).replace('causal', 'no mask and causal')} · tile {last['Br']}x{last['Bc']}"
    if not names:
        return picture.page("Nothing to compare", where, (12, 1.2))
    titled = "fwd_v2" if "fwd_v2" in names else names[0]
    timed = [name for name in names if ratios(rows, name, seconds)]
    title, width = _title(rows, titled), 15.5 if timed else 12
    height = 5.3 + 0.3 * title.count("\n")
    figure = picture.page(title, f"{where} · title: N={max(both(rows, titled))}", (width, height))

    def axes(left, inches):
        return figure.add_axes((left / width, 1.0 / height, inches / width, 3.3 / height))

    _map(axes(0.5, 3.6), rows)
    _fewer(axes(5.2, 5.2), rows, names)
    if timed:
        _faster(axes(12.3, 2.2), rows, timed)
    return figure


def _title(rows: list[dict], name: str) -> str:
    tiles, accesses, faster = (ratios(rows, name, of) for of in (visited, total, seconds))
    N = max(tiles)
    title = f"Skipping what a causal mask empties spares {name} {1 - 1 / tiles[N]:.0%} of its tiles, "
    title += f"{1 - 1 / accesses[N]:.0%} of its accesses"
    if N in faster:
        title += f",\nand makes it {faster[N]:.2f} times as fast (FlashAttention-2: {PAPER[0]} to {PAPER[1]})"
    return title


def _map(axes, rows: list[dict]):
    """Every tile of the largest S whose tiles can still be told apart."""
    sizes = {row["N"]: row for row in rows}
    N = max((N for N, row in sizes.items() if N <= MAPPED * min(row["Br"], row["Bc"])), default=min(sizes))
    Br, Bc = sizes[N]["Br"], sizes[N]["Bc"]
    kind = np.array([[_kind(i, min(i + Br, N), j, min(j + Bc, N)) for j in range(0, N, Bc)] for i in range(0, N, Br)])
    axes.imshow(kind, cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=2, aspect="auto")
    if max(kind.shape) <= 2 * MAPPED:
        axes.hlines(np.arange(kind.shape[0] + 1) - 0.5, -0.5, kind.shape[1] - 0.5, color="white", linewidth=1.5)
        axes.vlines(np.arange(kind.shape[1] + 1) - 0.5, -0.5, kind.shape[0] - 0.5, color="white", linewidth=1.5)
    axes.set(xticks=[], yticks=[], ylabel="rows of Q", xlabel="keys")
    axes.spines[:].set_visible(False)
    axes.set_title(f"The {kind.size:,} tiles of S, N={N}")
    for n, (name, color) in enumerate(KINDS.items()):
        place = {"va": "top", "transform": axes.transAxes}
        axes.text(0.34 * n, -0.115, "■", color=color, fontsize=13, **place)
        axes.text(0.34 * n + 0.065, -0.13, f"{int((kind == n).sum()):,} {name}", fontsize=10, **place)


def _kind(i0: int, i1: int, j0: int, j1: int) -> int:
    """The place in KINDS of the tile of rows i0 to i1 - 1 and keys j0 to j1 - 1."""
    return 2 if j1 - 1 <= i0 else 0 if j0 > i1 - 1 else 1


def _fewer(axes, rows: list[dict], names: list[str]):
    """Over the tiles a side: points are rows, lines what mask and formulas say, also where no kernel ran."""
    tile, sides, ends = Tile(rows[-1]["Br"], rows[-1]["Bc"]), [2**n for n in range(1, 11)], []
    problems = [[_like(rows[-1], side * tile.Bc, causal) for causal in (False, True)] for side in sides]

    def add(name, points, of, color, mark):
        line = [of(full) / of(causal) for full, causal in problems]
        axes.plot(sides, line, color=color, linewidth=1.2)
        axes.plot([N / tile.Bc for N in points], points.values(), mark, color=color, markersize=6)
        ends.append((sides[-1], line[-1], name, color))

    for name in names:
        add(name, ratios(rows, name, total), lambda p: formulas.traffic(name, p, tile).total, COLORS[name], "o")
    if skipping := [name for name in names if SKIPS[name]]:
        points = ratios(rows, skipping[0], visited)
        add("tiles", points, lambda p: tiles(p, tile, skips=True)["tiles_visited"], picture.GREY, "s")
    _over_N(axes, sides, [str(side) if side < 1024 else "1k" for side in sides])
    axes.set_ylim(0.9, 2.3)
    axes.set_xlabel("tiles a side, N/Bc")
    how = "counted" if rows[-1]["reads_total"] is not None else "by the formula"
    axes.set_title(f"Times fewer accesses with the mask (points: {how})")
    picture.label_ends(axes, ends, 0.075)


def _like(row: dict, N: int, causal: bool) -> Problem:
    return problem_of(row | {"N": N, "causal": causal})


def _faster(axes, rows: list[dict], names: list[str]):
    ends = []
    for name in names:
        line = ratios(rows, name, seconds)
        axes.plot(line.keys(), line.values(), "-o", color=COLORS[name], markersize=4, linewidth=2)
        ends.append((max(line), line[max(line)], name, COLORS[name]))
    axes.axhspan(*PAPER, color=picture.PALE, linewidth=0)
    axes.set_ylim(min(0.9, axes.get_ylim()[0]), max(2.3, axes.get_ylim()[1]))
    N = sorted({N for name in names for N in ratios(rows, name, seconds)})
    _over_N(axes, N, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in N])
    axes.set_xlabel("N")
    axes.set_title("Times as fast (grey: FA2)")
    picture.label_ends(axes, ends, 0.075)


def _over_N(axes, ticks: list[int], names: list[str]):
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, names)
    axes.minorticks_off()
    axes.grid(axis="y")


EXPERIMENT = Experiment(
    name="causal_skip",
    question="What does it save to skip the tiles that a causal mask empties?",
    fixed="input, shape, tile, kernel",
    factor="the mask: none, or causal; v1 visits every tile all the same, v2 those that hold a seen pair",
    varies=("variant", "direction", "loop_order", "N", "causal"),
    options=(
        common.INPUT,
        common.integers("--seqlen", help="N, one or several; 16 to 96 simulated, else 1k to 16k."),
        common.HEAD_DIM,
        click.option("--br", type=common.SIZE, help="Br, rows of a tile; 8 simulated, else 64."),
        click.option("--bc", type=common.SIZE, help="Bc, keys of a tile; 8 simulated, else 64."),
        common.BATCH,
        click.option("--heads", type=common.SIZE, help="H; 1 simulated, else 32."),
        common.SEED,
        common.DTYPE,
        common.COUNTERS,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
)
