"""What a roofline says: numbers in words, the verdict and the picture.  [floor 3]"""

from __future__ import annotations

import math
import textwrap

from matplotlib.patheffects import withStroke

from .. import picture, records
from .roofline import ASKED, DRAM, LEAST, Wall, Work, nearest

STANDS = 0.5  # from this part of a wall on we say that a kernel stands at it
PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ"), (-9, "n"))


def si(x: float, unit: str) -> str:
    """Three digits and a prefix: 67 TFLOP/s, 3.55 ms."""
    power, prefix = next((one for one in PREFIXES if x >= 10.0 ** one[0]), (0, ""))
    return f"{three(x / 10.0**power)} {prefix}{unit}"


def three(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.95 else f"{x:.3g}"


# ---- tables ---------------------------------------------------------------------------------------------------------


def bytes_table(work: Work, seconds: float | None) -> str:
    heads = ("bytes", "moved", "a second", f"{work.operations[1]} a byte")
    rows = [
        (what, si(n, "B"), si(n / seconds, "B/s") if seconds else "–", three(work.intensity(what)))
        for what, n in work.bytes.items()
    ]
    align = ("left", "right", "right", "right")
    return records.tabulate(rows, heads, "simple", colalign=align, disable_numparse=True)


def walls_table(walls: list[Wall], seconds: float | None) -> str:
    heads = ("wall", "work", "ceiling", "at least", "of its time", "source")
    rows = [
        (
            wall.name, si(wall.amount, wall.of), si(wall.ceiling.rate, f"{wall.of}/s"), si(wall.seconds, "s"),
            f"{wall.seconds / seconds:.1%}" if seconds else "–", wall.ceiling.source,
        )
        for wall in walls
    ]  # fmt: skip
    align = ("left", "right", "right", "right", "right", "left")
    return records.tabulate(rows, heads, "simple", colalign=align, disable_numparse=True)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def headline(name: str, walls: list[Wall], seconds: float | None) -> str:
    wall = nearest(walls)
    if seconds is None:
        return f"{name} takes {si(wall.seconds, 's')} at least, by its nearest wall: {wall.name}"
    share = wall.seconds / seconds
    if share < STANDS:
        return f"{name} stands at no wall: it is at {share:.0%} of the nearest, {wall.name}"
    return f"{name} stands at a wall: it is at {share:.0%} of {wall.name}"


def verdict(name: str, walls: list[Wall], seconds: float | None) -> str:
    """Which wall is the nearest, how far the kernel is from it, and what would move the wall."""
    wall = nearest(walls)
    text = headline(name, walls, seconds) + ".  "
    if seconds is None:
        return f"{text}How far from it the kernel is, only its time can say.  {_sentence(wall.moves)}"
    text += f"It takes {si(seconds, 's')}, and {si(wall.seconds, 's')} at least.  "
    if wall.seconds / seconds < STANDS:
        text += "Most of its time goes where no row of the table looks: shared memory, barriers, latency, other "
        text += "instructions.  "
    return text + _sentence(wall.moves)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


# ---- the picture ----------------------------------------------------------------------------------------------------

MARKS = {ASKED: ("bytes asked for", "s"), LEAST: ("least bytes", "o"), DRAM: ("DRAM bytes measured", "D")}
HALO = [withStroke(linewidth=4, foreground="white")]
BESIDE = {"textcoords": "offset points", "path_effects": HALO}
TERA = 1e12


def draw(name: str, subtitle: str, work: Work, walls: list[Wall], seconds: float | None):
    """Operations a second over operations a byte: the roofs and, below them, the kernel by each count of its bytes."""
    operations, word = work.operations
    title = headline(name, walls, seconds)
    title = title.replace(": ", ":\n") if len(title) > 75 else title
    figure = picture.page(title, subtitle, (12, 6.4))
    axes = figure.add_axes((0.05, 0.1, 0.66, 0.68))
    slope = next(wall.ceiling.rate for wall in walls if wall.moved == LEAST) / TERA
    roofs = {wall: operations / wall.seconds / TERA for wall in walls if wall.moved is None}
    points = {what: work.intensity(what) for what in MARKS if what in work.bytes}
    height = operations / seconds / TERA if seconds else None
    top = max(roofs.values(), default=4 * slope * max(points.values()))  # a GPU may have no ceiling but DRAM's
    low, high = min(points.values()) / 12, 8 * max(*points.values(), top / slope)
    lowest = min(slope * min(points.values()), *roofs.values(), height or math.inf)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(lowest / 15, 2.5 * top))
    axes.grid(True)
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    axes.set_xlabel(f"{word} a byte")
    axes.set_title(f"T{word}/s")
    wall = nearest(walls)
    _slope(axes, slope, top, 3 if wall.moved else 1.8)
    _roofs(axes, slope, roofs, wall, word)
    if seconds:
        roof = operations / wall.seconds / TERA
        _kernel(axes, points, height, points[wall.moved or LEAST], roof, word)
    else:
        _limits(axes, points, slope, min((roofs[wall] for wall in roofs if wall.stands), default=math.inf))
    return figure


def _slope(axes, slope: float, top: float, width: float):
    """The roof of the memory."""
    start = max(axes.get_xlim()[0], axes.get_ylim()[0] / slope)
    ends = [start, top / slope]
    axes.plot(ends, [slope * x for x in ends], color=picture.BLUE, linewidth=width)
    (x0, y0), (x1, y1) = axes.transData.transform([(x, slope * x) for x in ends])
    look = {"rotation": math.degrees(math.atan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor", "ha": "center"}
    there = ends[0] ** 0.65 * ends[1] ** 0.35
    words = f"DRAM {si(slope * TERA, 'B/s')}"
    axes.annotate(words, (there, slope * there), (-5, 5), color=picture.BLUE, **look, **BESIDE)


def _roofs(axes, slope: float, roofs: dict[Wall, float], nearest: Wall, word: str):
    """Those of the units; dashed where the kernel does not use it."""
    right, ends = axes.get_xlim()[1], []
    for wall, height in roofs.items():
        color = picture.PURPLE if wall.of == "exp" else picture.VERMILION if wall.stands else picture.GREY
        look = {"linestyle": "-" if wall.stands else "--", "linewidth": 3 if wall == nearest else 1.8}
        axes.plot([height / slope, right], [height, height], color=color, **look)
        own = "" if wall.of == word else f", {si(wall.ceiling.rate, wall.of)}/s"
        told = textwrap.fill(f"{wall.name}{own}: {three(height)} T{word}/s", 36)
        ends.append((right, height, told, color))
    picture.label_ends(axes, ends, 0.09)


def _kernel(axes, points: dict[str, float], height: float, x: float, roof: float, word: str):
    """Its points, joined, and how far above them the roof is that it meets first."""
    left, right = min(points.values()), max(points.values())
    axes.plot([left, right], [height, height], color=picture.INK, linewidth=1)
    axes.plot([x, x], [height, roof], color=picture.INK, linewidth=1.2, linestyle=":")
    line = {"arrowstyle": "-", "color": picture.GREY, "linewidth": 0.8, "relpos": (0, 0.5)}
    for level, (what, x) in enumerate(sorted(points.items(), key=lambda one: -one[1])):
        words, mark = MARKS[what]
        look = {"markersize": 8, "markeredgecolor": "white", "zorder": 4 if what == LEAST else 3}
        axes.plot(x, height, mark, color=picture.INK, **look)
        look = {"va": "center", "fontsize": 9.5, "arrowprops": line}
        axes.annotate(f" {words}: {three(x)}", (x, height), (0, -46 - 17 * level), **look, **BESIDE)
    words = f"{three(height)} T{word}/s,\n{height / roof:.0%} of the wall"
    axes.annotate(words, (right, height), (9, -4), va="top", fontweight="bold", **BESIDE)


def _limits(axes, points: dict[str, float], slope: float, roof: float):
    """Where its time is not known: how high it may stand by each count of its bytes, and no point."""
    bottom = axes.get_ylim()[0]
    for n, (what, x) in enumerate(sorted(points.items(), key=lambda one: one[1])):
        axes.plot([x, x], [bottom, min(roof, slope * x)], color=picture.INK, linewidth=1.2, linestyle=":")
        look = {"rotation": 90, "ha": "left" if n else "right", "va": "bottom", "fontsize": 9.5}
        axes.annotate(f"{MARKS[what][0]}: {three(x)}", (x, bottom), (4 if n else -4, 8), **look, **BESIDE)
