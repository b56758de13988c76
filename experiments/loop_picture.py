"""The picture of loop_order: the two walks through S, accesses by array, and TFLOP/s over N."""

from __future__ import annotations

from sandbox import picture
from sandbox.measure import formulas, standard
from sandbox.variant import Tile

from .loop_answer import Facts, Kernels
from .tables import count, gigabytes, ratio

WALKS = {
    "kv_outer": (
        "K, V outside: FlashAttention-1",
        (("for j:  load K, V", picture.SKY), ("  for i:  load Q, O, l, m; store O, l, m", picture.VERMILION)),
    ),
    "q_outer": (
        "Q outside: FlashAttention-2",
        (("for i:  load Q", picture.BLUE), ("  for j:  load K, V", picture.SKY), ("  store O, LSE", picture.VERMILION)),
    ),
}


def draw(rows: list[dict]):
    facts = Facts.of(rows)
    row = facts.row if facts else rows[0]
    subtitle = f"{picture.setup(row)} · tile {row['Br']}x{row['Bc']}"
    if facts is None:
        return picture.page("Nothing to compare: not every variant ran and passed the gate", subtitle, (12, 1.2))
    longest = max(map(len, (*facts.kernels.forward, *facts.kernels.backward)))
    width = 14.5 + 0.125 * max(0, longest - 20) if facts.timed else 12
    figure = picture.page(_title(facts), subtitle, (width, 7.1))

    def axes(left, bottom, inches, height):
        return figure.add_axes((left / width, bottom, inches / width, height))

    _walk(axes(0.18, 0.44, 2.8, 0.37), "kv_outer")
    _walk(axes(0.18, -0.01, 2.8, 0.37), "q_outer")
    _bars(axes(5.1, 0.47, 5.0 if facts.timed else 6.7, 0.335), facts, "fwd")
    _bars(axes(5.1, 0.09, 5.0 if facts.timed else 6.7, 0.26), facts, "bwd")
    how = "as counted; outlined: the formula" if facts.row["reads_total"] is not None else "by the formula"
    key = f"filled: read, hatched: written, {how}; yellow: l, m, LSE, D; orange: dK, dV; ×: of v2"
    figure.text(4.1 / width, 0.012, key, fontsize=9.5, color=picture.GREY)
    if facts.timed:
        _speed(axes(10.65, 0.47, 2.1, 0.335), rows, facts.kernels, "fwd")
        _speed(axes(10.65, 0.09, 2.1, 0.26), rows, facts.kernels, "bwd")
    return figure


def _title(facts: Facts) -> str:
    fewer = facts.fewer(*facts.kernels.loop)
    title = f"With Q outside, O, l and m stay on chip: {ratio(fewer, 'fewer', 'more')} global accesses"
    if facts.timed:
        faster = facts.faster(facts.kernels.forward[0], facts.kernels.forward[-1])
        what = "row blocks" if facts.loop_alone else "row blocks and warps"
        title += f",\nand {what} run side by side: from v1 to v2, {ratio(faster, 'faster', 'slower')}"
    return title


def _walk(axes, order: str):
    """The tiles of S, and the way that the two loops take through them."""
    n, (head, code) = 4, WALKS[order]
    by_rows = order == "q_outer"
    axes.set(xlim=(-1.2, n + 2.4), ylim=(n + 2.2, -1.6), aspect="equal", anchor="NW")
    axes.axis("off")
    for k in range(n):
        axes.add_patch(picture.box(-0.75, k, 0.55, 1, picture.BLUE, 1 if k == 0 or not by_rows else 0.25))
        axes.add_patch(picture.box(k, -0.75, 1, 0.55, picture.SKY, 1 if k == 0 or by_rows else 0.3))
        for i in range(n):
            on = k == 0  # the first turn of the outer loop
            tile = (i, k) if by_rows else (k, i)
            axes.add_patch(picture.box(*tile, 1, 1, picture.INK, 0.16 if on else 0.06))
        start, end = (0.14, k + 0.5), (n - 0.1, k + 0.5)
        if not by_rows:
            start, end = start[::-1], end[::-1]
        picture.arrow(axes, start, end, picture.INK if k == 0 else picture.SILVER, 2.4 if k == 0 else 1.3)
    axes.text(-0.9, n / 2, "Q, O", rotation=90, ha="right", va="center", fontsize=10, color=picture.BLUE)
    axes.text(n / 2, -0.85, "K, V", ha="center", va="bottom", fontsize=10, color=picture.BLUE)
    axes.text(n + 0.15, n / 2, "tiles\nof S", va="center", fontsize=10, color=picture.GREY)
    axes.text(-1.2, -1.75, head, fontsize=12, fontweight="bold", va="bottom")
    for line, (words, color) in enumerate(code):
        axes.text(-1.2, n + 0.3 + 0.62 * line, words, family="monospace", fontsize=9.5, color=INKS[color], va="top")


INKS = {picture.SKY: "#1f7fb8", picture.BLUE: picture.BLUE, picture.VERMILION: "#b34e00"}  # dark enough for text


def _bars(axes, facts: Facts, direction: str):
    """Accesses by array: filled as counted, or else as the formula says; outlined by the formula."""
    names = [name for name in facts.kernels.of(direction) if facts.has(name)]
    tile = Tile(facts.row["Br"], facts.row["Bc"])
    v2 = formulas.traffic(facts.kernels.v2[direction], facts.problem, tile).total
    bars = [(formulas.standard(facts.problem, direction), facts.rows.get((standard.NAME, direction)))]
    bars += [(formulas.traffic(name, facts.problem, tile), facts[name]) for name in names]
    widest = max(formula.total for formula, _ in bars)
    span = (1.22 if facts.row["dram_bytes"] is None else 1.5) * widest
    axes.set(xlim=(0, span), ylim=(len(bars) - 0.5, -0.5))
    for y, (formula, row) in enumerate(bars):
        left = 0
        for group, color, written, width, filled in _segments(formula, row):
            look = {"hatch": "////" if written else None, "alpha": 0.45 if y == 0 else 1}
            edge = {"linestyle": ":" if y == 0 else "-", "edgecolor": picture.INK, "linewidth": 0.9}
            axes.barh(y, filled, 0.66, left, color=color, edgecolor="white", linewidth=0, **look)
            axes.barh(y, width, 0.66, left, color="none", **edge)
            picture.name_inside(axes, left, width, y, group, color, span, faint=y == 0)
            left += width
        words = f" {count(formula.total)}, × {formula.total / v2:.2f}"
        if row and row["dram_bytes"]:
            words += f"\n DRAM {gigabytes(row['dram_bytes'])}, L2 {gigabytes(row['l2_bytes'])}"
        axes.text(left, y, words, va="center", fontsize=9.5)
    axes.set_yticks(range(len(bars)), ["standard, unfused:\nat least", *names], color=picture.INK)
    axes.xaxis.set_major_formatter(lambda x, _: count(x).replace(".0", ""))
    axes.xaxis.set_major_locator(picture.few_ticks())
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9.5)
    if direction == "fwd" and facts.row["dram_bytes"] is None:
        alone = facts.loop_alone or not facts.row["causal"]
        steps = {"loop alone" if alone else "loop, skipping": facts.kernels.loop}
        steps[f"{facts.kernels.last} alone"] = facts.kernels.forward[-2:]
        for step, (before, after) in steps.items():
            fewer = facts.fewer(before, after)
            words = "no fewer" if fewer == 1 else ratio(fewer, "fewer", "more")
            _bracket(axes, 0.93 * widest, 1 + names.index(before), f"the {step}:\n{words}")
    axes.set_title(f"{'Forward' if direction == 'fwd' else 'Backward'}: global accesses, in elements, N={facts.N}")


def _segments(formula, row):
    """(group of arrays, its colour, written or read, elements by the formula, elements counted) of one bar."""
    for way in ("reads", "writes"):
        for group, (arrays, color) in picture.GROUPS.items():
            width = sum(getattr(formula, way).get(array, 0) for array in arrays)
            counted = width
            if row and row["reads_total"] is not None:
                counted = sum(row.get(f"{way}_{array}", 0) for array in arrays)
            if width or counted:
                yield group, color, way == "writes", width, counted


def _bracket(axes, x, y, words):
    """From bar y to the next one: what they differ in."""
    tick, far = 0.013 * x, (y + 0.26, y + 0.96)  # below the words of bar y
    axes.plot([x, x + tick, x + tick, x], [far[0], *far, far[1]], color=picture.GREY, linewidth=1.2)
    axes.text(x + 2.5 * tick, y + 0.5, words, va="center", fontsize=9.5, color=picture.GREY)


def _speed(axes, rows: list[dict], kernels: Kernels, direction: str):
    names, whole = (standard.NAME, *kernels.of(direction)), {kernels.of(direction)[0], kernels.v2[direction]}
    ends = []
    for name in names:
        ours = [row for row in rows if (row["variant"], row["direction"]) == (name, direction) and row["tflops"]]
        if ours:
            color, dashed = picture.LOOPS[ours[0]["loop_order"]], name not in {standard.NAME, *whole}
            x, y = [row["N"] for row in ours], [row["tflops"] for row in ours]
            axes.plot(x, y, "--o" if dashed else "-o", color=color, linewidth=2, markersize=4)
            ends.append((x[-1], y[-1], name, color))
    axes.set_xscale("log", base=2)
    axes.set_xticks(x := sorted({row["N"] for row in rows}), [f"{N // 1024}k" if N % 1024 == 0 else N for N in x])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.grid(axis="y")
    axes.set_title("TFLOP/s over N")
    picture.label_ends(axes, ends, 0.08 if direction == "fwd" else 0.1)
