"""Why did FlashAttention swap its loops?

fwd_v1 to fwd_v2 changes four things at once: loop, grid, normalisation and skipping.  Two controls take them apart:

    fwd_v2_kv_outer  ->  fwd_v2_one_block    the order of the loops, and nothing else
    fwd_v2_one_block ->  fwd_v2              the grid, and nothing else: one block a head, or one a row block too
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import torch

from sandbox import catalog, picture
from sandbox.mask import Mask
from sandbox.measure import formulas, standard, timing
from sandbox.problem import Problem
from sandbox.variant import Device, Tile

from . import common, inputs
from .common import Experiment, count, gigabytes, milliseconds, number, problem_of, ratio, total

FORWARD = ("fwd_v1", "fwd_v2_kv_outer", "fwd_v2_one_block", "fwd_v2")
BACKWARD = ("bwd_v1", "bwd_v2", "bwd_v2_deterministic")

ERRATUM = (
    "Erratum.  The article behind this project has the two orders the wrong way round: it puts Q outside in V1 and K/V "
    "outside in V2.  The papers say the reverse.  FlashAttention-1, Algorithm 1, lines 5-8: K/V outside, Q inside, and "
    'O, l, m go to HBM and back at every step.  FlashAttention-2, Algorithm 1 and section 3.2: Q outside ("instead of '
    'the other way round in the original").  Both backward passes keep K/V outside.  The benefits that the article '
    "lists, Q read once and fewer accesses, belong to Q outside."
)


# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, input, seqlen, head_dim, br, bc, batch, heads, causal, seed, dtype, counters):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    tile = Tile(br or (32 if device.simulated else 64), bc or (32 if device.simulated else 64))
    seqlen = seqlen or ((64, 128, 192) if device.simulated else (512,) if real else (1024, 2048, 4096, 8192, 16384))
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    points = []
    for N in seqlen:
        problem = Problem(batch, heads, heads, N, N, head_dim or (32 if real else 64), dtype, mask=Mask(causal))
        inputs.check(input, problem)
        common_fields = dict(input=input, seed=seed, count_bytes=counters)
        if not device.simulated:
            points += [
                common.Point(standard.NAME, direction, None, problem, tile, **common_fields)
                for direction in ("fwd", "bwd")
            ]
        for name in FORWARD + BACKWARD:
            points.append(common.point(catalog.find(name), problem, tile, device, **common_fields))
    misfits = [point.infeasible for point in points if point.variant != standard.NAME]
    if all(misfits):
        raise ValueError(f"tile {tile} fits no variant: {misfits[0]}")
    return points


def measure(point: common.Point) -> dict:
    """Standard attention is timed as torch runs it; it is a yardstick, so it passes no gate."""
    if point.variant != standard.NAME:
        return common.measure(point)
    row = common.empty_row()
    floor = formulas.standard(point.problem, point.direction)
    row |= {"formula_reads_total": floor.total_reads, "formula_writes_total": floor.total_writes}
    try:
        x = inputs.make(point.input, point.problem, point.seed)
        row |= common.timed(timing.time_launch(standard.launcher(point.problem, x, point.direction)), point)
    except common.OutOfMemory:
        row |= {"infeasible": "S and P do not fit in the GPU's memory"}
    x = None
    torch.cuda.empty_cache()  # what S and P took is many times what any kernel takes
    return row


# ---- what the rows say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """The rows of one run at its largest N, by variant; standard attention's floor where it was not run."""

    rows: dict[tuple[str, str], dict]
    N: int

    @classmethod
    def of(cls, rows: list[dict]) -> Facts | None:
        """None where there is no N at which every forward variant ran and passed the gate."""
        sound = [row for row in rows if row["gate"] in ("passed", None) and not row["infeasible"]]
        done = [row for row in sound if total(row) is not None]
        for N in sorted({row["N"] for row in done}, reverse=True):
            at_N = {(row["variant"], row["direction"]): row for row in done if row["N"] == N}
            if all((name, "fwd") in at_N for name in FORWARD):
                return cls(at_N, N)
        return None

    def __getitem__(self, variant: str) -> dict:
        return self.rows[variant, variant[:3]]

    def has(self, *variants: str) -> bool:
        return all((variant, variant[:3]) in self.rows for variant in variants)

    @property
    def row(self) -> dict:
        return self["fwd_v2"]

    @property
    def problem(self) -> Problem:
        return problem_of(self.row)

    @property
    def timed(self) -> bool:
        return all(self[name]["seconds"] for name in FORWARD)

    def fewer(self, before: str, after: str) -> float:
        return total(self[before]) / total(self[after])

    def faster(self, before: str, after: str) -> float:
        return self[before]["seconds"] / self[after]["seconds"]


def thread_blocks(row: dict) -> int:
    return row["B"] * row["H"] * (-(-row["N"] // row["Br"]) if row["variant"] == "fwd_v2" else 1)


def answer(rows: list[dict]) -> str:
    facts = Facts.of(rows)
    if facts is None:
        return f"Nothing to compare: at no N every forward variant ran with this tile and passed the gate.\n\n{ERRATUM}"
    parts = [because(facts), on_the_grid(facts)]
    if facts.has(*BACKWARD):
        parts.append(backward(facts))
    text = "\n".join(parts) + f"\n\n{ERRATUM}\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def because(facts: Facts) -> str:
    kv, q, row = facts["fwd_v2_kv_outer"], facts["fwd_v2_one_block"], facts.row
    fewer = facts.fewer("fwd_v2_kv_outer", "fwd_v2_one_block")
    before, after = (formulas.traffic(x["variant"], facts.problem, Tile(row["Br"], row["Bc"])) for x in (kv, q))

    def change(*arrays):
        return " become ".join(number(sum(t.of(array) for array in arrays)) for t in (before, after))

    text = (
        f"Why swap the loops?  At N={facts.N}, d={row['d']}, tile {row['Br']}x{row['Bc']}, with Q outside a forward "
        f"takes {number(total(q))} global accesses instead of {number(total(kv))}: {ratio(fewer, 'fewer', 'more')} "
        f"by the loop alone.  O, l and m stay on chip ({change('O', 'l', 'm')}) and Q is read once ({change('Q')}); "
        f"re-reading K and V for every row block ({change('K', 'V')}) costs "
        f"{'less' if fewer > 1 else 'more, with this tile,'} than that."
    )
    if facts.timed:
        faster = facts.faster("fwd_v2_kv_outer", "fwd_v2_one_block")
        text += f"  In time: {milliseconds(kv)} become {milliseconds(q)}, {ratio(faster, 'faster', 'slower')}."
    return text


def on_the_grid(facts: Facts) -> str:
    one, many = facts["fwd_v2_one_block"], facts["fwd_v2"]
    text = f"The grid alone, {_blocks(one, many)}, "
    if total(one) == total(many):
        text += "moves the same elements"
    else:
        text += f"takes accesses from {number(total(one))} to {number(total(many))}"
    if facts.timed:
        faster = facts.faster("fwd_v2_one_block", "fwd_v2")
        return text + f" and takes {milliseconds(one)} to {milliseconds(many)}: {ratio(faster, 'faster', 'slower')}."
    return text + "; what it is worth is time, which the simulator cannot tell."


def backward(facts: Facts) -> str:
    v1, v2, twice = (facts[name] for name in BACKWARD)
    text = (
        f"Backward, K/V outside in both: {number(total(v1))} accesses (v1), {number(total(v2))} (v2, dQ by atomic "
        f"adds), {number(total(twice))} (v2, deterministic)"
    )
    if all(row["seconds"] for row in (v1, v2, twice)):
        text += f"; {milliseconds(v1)}, {milliseconds(v2)}, {milliseconds(twice)}"
    return text + "."


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    facts = Facts.of(rows)
    return [claim_3(facts), claim_6(facts), claim_7(facts), claim_8(facts)] if facts else []


def claim_3(facts: Facts):
    """v1 cuts HBM accesses, not FLOPs; the saving is what makes it fast."""
    v1, floor = facts["fwd_v1"], formulas.standard(facts.problem).total
    fewer = floor / total(v1)
    why = f"fwd_v1 takes {number(total(v1))} accesses, {ratio(fewer, 'fewer', 'more')} than standard attention's floor"
    std = facts.rows.get((standard.NAME, "fwd"))
    if std and std["dram_bytes"] and v1["dram_bytes"]:
        fewer = std["dram_bytes"] / v1["dram_bytes"]
        why += f"; DRAM moved {gigabytes(v1['dram_bytes'])}, against {gigabytes(std['dram_bytes'])}"
    if not std or not std["seconds"] or not v1["seconds"]:
        why += "; whether that makes it fast is not measurable here"
        return 3, "holds in part" if fewer > 1 else "does not hold with this tile", why
    faster = std["seconds"] / v1["seconds"]
    why += f"; {milliseconds(v1)} against {milliseconds(std)}, {ratio(faster, 'faster', 'slower')}"
    return 3, _verdict(fewer > 1, faster > 1), why


def claim_6(facts: Facts):
    """v1 fuses Q K^T, softmax and P V into one kernel."""
    v1, S = facts["fwd_v1"], 4 * facts.row["B"] * facts.row["H"] * facts.N**2
    saved = f"three kernels would pass S and P on in {number(S)} accesses"
    if v1["reads_total"] is None:
        why, fused = f"one launch, given no room for S and P, passes the gate; {saved}", True
        if v1["dram_bytes"]:
            fused = v1["dram_bytes"] < S * facts.problem.itemsize
            why += f", {gigabytes(S * facts.problem.itemsize)}; DRAM moved {gigabytes(v1['dram_bytes'])}"
        return 6, _verdict(v1["gate"] == "passed", fused), why
    known = ("Q", "K", "V", "O", "l", "m", "LSE")
    touched = sum(v1.get(f"{way}_{array}", 0) for way in ("reads", "writes") for array in known)
    holds = touched == total(v1) and v1["gate"] == "passed"
    return 6, "holds" if holds else "does not hold", f"one launch, and all it touches is {', '.join(known)}; {saved}"


def claim_7(facts: Facts):
    """v2 swaps the loops; Q is then read once and traffic falls."""
    kv, q = facts["fwd_v2_kv_outer"], facts["fwd_v2_one_block"]
    fewer = facts.fewer("fwd_v2_kv_outer", "fwd_v2_one_block")
    once = facts.row["B"] * facts.row["H"] * facts.N * facts.row["d"]
    if q["reads_Q"] is not None:
        why = f"Q is read {_often(q['reads_Q'] / once)} with Q outside, {_often(kv['reads_Q'] / once)} with K/V outside"
    else:
        why = "Q is read once, by the formula that the simulator's counts equal"
    why += f"; accesses are {ratio(fewer, 'fewer', 'more')}"
    falls = [fewer > 1]
    for name, field in (("L2", "l2_bytes"), ("DRAM", "dram_bytes")):
        if kv[field] and q[field]:
            why += f"; {name} moved {gigabytes(q[field])}, against {gigabytes(kv[field])}"
            falls.append(q[field] < kv[field])
    verdict = _verdict(q["reads_Q"] in (None, once), *falls)
    return 7, verdict, why + " (of the papers' orders: the article swaps their names)"


def claim_8(facts: Facts):
    """v2 divides work better among thread blocks and warps."""
    one, many = facts["fwd_v2_one_block"], facts["fwd_v2"]
    if not facts.timed:
        return 8, "not measurable here", f"{_blocks(one, many)}, but the simulator has no time"
    faster = facts.faster("fwd_v2_one_block", "fwd_v2")
    verdict = "holds for thread blocks" if faster > 1.05 else "does not show"
    time = f"{milliseconds(one)} become {milliseconds(many)}, {ratio(faster, 'faster', 'slower')}"
    return 8, verdict, f"{_blocks(one, many)}, {time}; warps: not asked here"


def _verdict(*parts: bool) -> str:
    return "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"


def _often(n: float) -> str:
    return "once" if n == 1 else f"{n:.3g} times"


def _blocks(one: dict, many: dict) -> str:
    n = thread_blocks(one)
    return f"{n:,} thread block{'s' * (n != 1)} become{'s' * (n == 1)} {thread_blocks(many):,}"


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    return "\n\n".join(
        common.table([row for row in rows if row["direction"] == direction], _columns(direction))
        for direction in ("fwd", "bwd")
        if any(row["direction"] == direction for row in rows)
    )


def _columns(direction: str):
    reads = {"fwd": ("Q", "K V", "O", "l m"), "bwd": ("Q", "K V", "O", "dO", "dQ", "LSE D")}[direction]
    writes = {"fwd": ("O", "l m LSE"), "bwd": ("dQ", "dK dV", "D")}[direction]
    return [
        ("variant", lambda row: row["variant"]),
        ("loop", lambda row: row["loop_order"]),
        ("N", lambda row: row["N"]),
        *((f"reads\n{group}", _sum("reads", group)) for group in reads),
        *((f"writes\n{group}", _sum("writes", group)) for group in writes),
        *common.OUTCOME,
    ]


def _sum(way: str, group: str):
    def cell(row):
        counts = [row[f"{way}_{array}"] for array in group.split()]
        return None if None in counts else count(sum(counts))

    return cell


# ---- picture --------------------------------------------------------------------------------------------------------

CONTROLS = ("fwd_v2_kv_outer", "fwd_v2_one_block")
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
    width = 14.5 if facts.timed else 12
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
        _speed(axes(10.65, 0.47, 2.1, 0.335), rows, "fwd")
        _speed(axes(10.65, 0.09, 2.1, 0.26), rows, "bwd")
    return figure


def _title(facts: Facts) -> str:
    fewer = facts.fewer("fwd_v2_kv_outer", "fwd_v2_one_block")
    title = f"With Q outside, O, l and m stay on chip: {ratio(fewer, 'fewer', 'more')} global accesses"
    if facts.timed:
        faster = facts.faster("fwd_v1", "fwd_v2")
        title += f",\nand row blocks run side by side: from v1 to v2, {ratio(faster, 'faster', 'slower')}"
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
    names = [name for name in (FORWARD if direction == "fwd" else BACKWARD) if facts.has(name)]
    tile = Tile(facts.row["Br"], facts.row["Bc"])
    v2 = formulas.traffic(f"{direction}_v2", facts.problem, tile).total
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
        for y, step, (before, after) in ((2, "loop", CONTROLS), (3, "grid", (CONTROLS[1], "fwd_v2"))):
            fewer = facts.fewer(before, after)
            words = "no fewer" if fewer == 1 else ratio(fewer, "fewer", "more")
            _bracket(axes, 0.93 * widest, y, f"the {step} alone:\n{words}")
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


def _speed(axes, rows: list[dict], direction: str):
    names = (standard.NAME, *(FORWARD if direction == "fwd" else BACKWARD))
    ends = []
    for name in names:
        ours = [row for row in rows if (row["variant"], row["direction"]) == (name, direction) and row["tflops"]]
        if ours:
            color, dashed = picture.LOOPS[ours[0]["loop_order"]], name in CONTROLS or name == BACKWARD[-1]
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


EXPERIMENT = Experiment(
    name="loop_order",
    question="Why did FlashAttention swap its loops?",
    fixed="input, shape, tile; each control differs from its neighbour in one thing",
    factor="which loop is outside (fwd_v2_kv_outer, fwd_v2_one_block), then the grid (fwd_v2)",
    varies=("variant", "direction", "N"),
    options=(
        common.INPUT,
        common.integers("--seqlen", help="N, one or several; 64,128,192 simulated, else 1k to 16k."),
        common.HEAD_DIM,
        click.option("--br", type=common.SIZE, help="Br, rows of a tile; 32 simulated, else 64."),
        click.option("--bc", type=common.SIZE, help="Bc, keys of a tile; 32 simulated, else 64."),
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
    measure=measure,
)
