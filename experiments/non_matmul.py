"""What did FlashAttention-2 save by normalising O once instead of at every step?

FA2, section 3.1: a GPU has many more FLOPs for matrix products than for the rest (A100: 312 against 19.5 TFLOP/s), so
one of the rest is 16 times as dear, and v1's diag(l)^-1 at every step is many of them.  Two answers:

    counted    both papers' Algorithm 1 (sandbox/algorithms.py) at real size on arrays that count: no kernel, no GPU
    measured   two pairs of kernels that differ in this alone (without a mask, as v1 visits what a mask empties):
               fwd_v1 -> fwd_v2_kv_outer, where O passes through global memory, and fwd_v2_normalised -> fwd_v2.
               They multiply matrices on the units that do the rest, and divide P by l instead of line 12's two terms,
               one FLOP a score instead of 2d/Bc: little can be saved there, and a GPU says how little
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np

from sandbox import algorithms, catalog, picture, target
from sandbox.measure import bench, gate, operations
from sandbox.problem import Problem
from sandbox.variant import Device, Tile

from . import common, inputs, tables
from .common import Experiment
from .tables import milliseconds, number, total

FA1, FA2 = "FA1 Algorithm 1", "FA2 Algorithm 1"
ALGORITHMS = {FA1: algorithms.flash_attention_1_forward, FA2: algorithms.flash_attention_2_forward}
PAIRS = (("fwd_v1", "fwd_v2_kv_outer"), ("fwd_v2_normalised", "fwd_v2"))
KEYS = (32, 64, 128, 256)  # Bc of the counted tiles; their Br changes nothing a score
SHOWN = 64  # the Bc of the sentences
SECONDS_PER_SCORE = 5e-8  # to count it; measured: 3 to 7 on one core
DEAR = 312 / 19.5
BUILT = ("registers", "blocks_per_sm")

# ---- the points, and their rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm(common.Point):
    """One of the papers' algorithms on one head, to be counted."""

    def seconds(self) -> float:
        return SECONDS_PER_SCORE * self.problem.N_q * self.problem.N_k


def plan(device: Device, input, seqlen, counted_seqlen, head_dim, br, bc, batch, heads, seed, dtype, counters):
    real = (input or ("minilm" if device.simulated else "gauss")) == "minilm"
    input = "minilm" if real else "gauss"
    tile = Tile(br or (32 if device.simulated else 128), bc or (32 if device.simulated else 64))
    heads = heads or (1 if device.simulated else inputs.HEADS if real else 32)
    head = Problem(1, 1, 1, counted_seqlen, counted_seqlen, head_dim or 64)
    counted = [
        Algorithm(name, "fwd", order, head, Tile(64, Bc), "gauss", seed, count_bytes=False)
        for Bc in KEYS
        for name, order in ((FA1, "kv_outer"), (FA2, "q_outer"))
    ]
    run = []
    for N in seqlen or ((64,) if device.simulated else (512,) if real else (1024, 4096, 16384)):
        problem = Problem(batch, heads, heads, N, N, head_dim or (32 if real else 64), dtype)
        inputs.check(input, problem)
        for name in (name for pair in PAIRS for name in pair):
            fields = dict(input=input, seed=seed, count_bytes=counters)
            run.append(common.point(catalog.find(name), problem, tile, device, **fields))
    if all(point.infeasible for point in run):
        raise ValueError(f"tile {tile} fits no kernel: {run[0].infeasible}")
    return counted + run


def measure(point: common.Point) -> dict:
    """An algorithm's operations by kind; or a kernel's gate, then accesses or time, and how many blocks a GPU holds."""
    row = common.empty_row() | dict.fromkeys([*(f"ops_{kind}" for kind in operations.KINDS), *BUILT])
    p, tile = point.problem, point.tile
    if point.variant in ALGORITHMS:
        Q, K, V = np.random.default_rng(point.seed).standard_normal((3, p.N_q, p.d), np.float32)
        _, done = operations.count(ALGORITHMS[point.variant], Q, K, V, Br=tile.Br, Bc=tile.Bc)
        return row | {f"ops_{kind}": done[kind] for kind in operations.KINDS}
    row |= common.measure(point)
    if row["seconds"]:  # one may be slower because fewer of its blocks fit, and not by its arithmetic
        x = inputs.make(point.input, p, point.seed)
        device = target.device()
        run, _ = gate.prepare(catalog.find(point.variant), p, tile, x, device)
        made = bench.made(run, device)
        row |= {name: made[name] for name in BUILT}
    return row


# ---- what the rows say ----------------------------------------------------------------------------------------------

COLORS = {  # of what FLOPs are for
    "exp": picture.VERMILION, "S - m": picture.SKY, "max": picture.ORANGE, "sum": picture.YELLOW,
    "scale": picture.BLUE, "rescale": picture.GREEN, "add": picture.SILVER, "divide": picture.PURPLE,
}  # fmt: skip


def a_score(row: dict) -> dict[str, float]:
    """What for -> FLOPs a score.  Guards for rows that see nothing, which the papers leave out, are none."""
    n = {kind: row[f"ops_{kind}"] / row["N"] ** 2 for kind in operations.KINDS}
    scale = 1  # of the multiplications
    parts = n["exp"], n["subtract"], n["max"], n["sum"], scale, n["multiply"] - scale, n["add"], n["divide"] + n["log"]
    return dict(zip(COLORS, parts))


def flops(row: dict) -> float:
    """Of anything but matrix products, a score."""
    return sum(a_score(row).values())


def matmul(row: dict) -> float:
    return row["ops_matmul"] / row["N"] ** 2


def cost(row: dict) -> float:
    """A score's time in matmul FLOPs, where any other FLOP is as long as 16 of them and nothing overlaps."""
    return matmul(row) + DEAR * flops(row)


def share(row: dict) -> str:
    return f"{DEAR * flops(row) / cost(row):.0%}"


def counted(rows: list[dict]) -> dict[int, tuple[dict, dict]]:
    """Bc -> the rows of FA1 and of FA2; those of one N and d."""
    ours = [row for row in rows if row["variant"] in ALGORITHMS]
    found = {(row["variant"], row["Bc"]): row for row in ours if all(row[name] == ours[-1][name] for name in "Nd")}
    return {Bc: (found[FA1, Bc], found[FA2, Bc]) for name, Bc in found if name == FA1 and (FA2, Bc) in found}


def shown(rows: list[dict]) -> tuple[dict, dict] | None:
    both = counted(rows)
    return both.get(SHOWN) or next(iter(both.values()), None)


def pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(before, after): kernels of a pair on the same problem, where both passed the gate; in order of N."""
    sound = {tuple(row[name] for name in common.KEY): row for row in rows if row["gate"] == "passed"}
    both = [((before, *key[1:]), key) for before, after in PAIRS for key in sound if key[0] == after]
    both = [(sound[before], sound[after]) for before, after in both if before in sound]
    return sorted(both, key=lambda pair: pair[1]["N"])


def timed(rows: list[dict]) -> list[tuple[dict, dict]]:
    return [(before, after) for before, after in pairs(rows) if before["seconds"] and after["seconds"]]


def saved(before: dict, after: dict) -> float:
    return 1 - after["seconds"] / before["seconds"]


def answer(rows: list[dict]) -> str:
    lines = [*(on_counts(rows) if shown(rows) else ["Counted: nothing to compare."]), on_kernels(rows)]
    text = "\n".join(["What did it save to normalise once?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_counts(rows: list[dict]) -> list[str]:
    v1, v2 = shown(rows)
    spared = {Bc: percent(1 - flops(b) / flops(a)) for Bc, (a, b) in counted(rows).items()}
    others = ", ".join(f"{percentage} with Bc={Bc}" for Bc, percentage in spared.items() if Bc != v1["Bc"])
    parts = ", ".join(f"{part} {n:.2f}" for part, n in a_score(v2).items())
    guards = sum(v2[f"ops_{kind}"] for kind in operations.GUARDS) / v2["N"] ** 2
    return [
        f"Counted at N={v1['N']}, d={v1['d']}, Bc={v1['Bc']}: {flops(v2):.2f} non-matmul FLOPs a score instead of "
        f"{flops(v1):.2f}, {spared[v1['Bc']]}" + (f"; {others}" if others else "") + ".",
        f"Of v2's {flops(v2):.2f}: {parts}.  The first five are the softmax; rescale and add are for O and l, d/Bc a "
        "score each, and the add comes free where a matrix unit sums P V onto O.  Guards for rows that see nothing, "
        f"which the papers leave out, would be {guards:.2f} more.",
        f"If each is worth {DEAR:.0f} matmul FLOPs and nothing overlaps, they are {share(v1)} of v1's time and "
        f"{share(v2)} of v2's, and v2 takes {percent(1 - cost(v2) / cost(v1), 'less', 'more')} time.",
    ]


def on_kernels(rows: list[dict]) -> str:
    both = pairs(rows)
    if not both:
        return "Kernels: nothing to compare; of no pair both ran and passed the gate."
    how = "counted" if both[0][0]["reads_total"] is not None else "by the formula"
    text = f"Kernels: in each pair as many accesses, {how}: what changes is arithmetic alone"
    for before, after in both:
        if total(before) != total(after):
            text = f"Kernels: NOT arithmetic alone: {before['variant']} takes {number(total(before))} accesses, "
            text += f"{after['variant']} {number(total(after))}"
    if not timed(rows):
        return text + ".  What that is worth in time, only a GPU can say."
    last = {before["variant"]: (before, after) for before, after in timed(rows)}  # the largest N of each pair
    text += ".  In time: " + "; ".join(in_time(*pair) for pair in last.values())
    return (
        text + f".  They multiply matrices on the units that do the rest: nothing here costs {DEAR:.0f} times as much."
    )


def in_time(before: dict, after: dict) -> str:
    change = saved(before, after)
    text = f"{before['variant']} to {after['variant']} at N={after['N']}, {milliseconds(before)} become "
    text += f"{milliseconds(after)}, {percent(change, 'less', 'more')}"
    if abs(change) < bench.SAME:
        text += f", which does not show (two medians of one kernel may differ by {bench.SAME:.0%})"
    fit = [row["blocks_per_sm"] for row in (before, after)]
    return text + (f", but a multiprocessor holds {fit[0]} and {fit[1]} blocks of them" if fit[0] != fit[1] else "")


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    return [claim_9(rows)]


def claim_9(rows: list[dict]):
    """v2 does fewer non-matmul FLOPs."""
    if not shown(rows):
        return 9, "not yet tested", "the papers' algorithms were not counted"
    v1, v2 = shown(rows)
    holds = all(flops(b) < flops(a) and matmul(b) == matmul(a) for a, b in counted(rows).values())
    why = f"{flops(v2):.2f} a score instead of {flops(v1):.2f}, {percent(1 - flops(v2) / flops(v1))} (d={v1['d']}, "
    why += f"Bc={v1['Bc']}); for matmul {matmul(v2):.0f}, and v1 {matmul(v1):.0f}; "
    why += in_time(*timed(rows)[-1]) if timed(rows) else "what it is worth in time is not measurable here"
    return 9, "holds" if holds else "does not hold", why


def percent(part: float, less: str = "fewer", more: str = "more") -> str:
    return f"{abs(part):.1%} {less if part >= 0 else more}"


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    size = [(name, lambda row, name=name: row[name]) for name in ("variant", "N", "d")]
    size.append(("tile", lambda row: f"{row['Br']}x{row['Bc']}"))
    parts = [(part, lambda row, part=part: f"{a_score(row)[part]:.2f}") for part in COLORS]
    sums = [
        ("FLOPs a score\nbut matmul", lambda row: f"{flops(row):.2f}"),
        ("matmul", lambda row: f"{matmul(row):.0f}"),
        (f"share of time\nat {DEAR:.0f} : 1", share),
    ]
    fit = ("blocks\nan SM", lambda row: row["blocks_per_sm"])
    columns = {True: [*size, *parts, *sums], False: [*size, fit, *tables.OUTCOME]}
    groups = {of: [row for row in rows if (row["variant"] in ALGORITHMS) == of] for of in columns}
    return "\n\n".join(tables.table(group, columns[of]) for of, group in groups.items() if group)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """FLOPs a score by what they are for; their share of the time at 16 : 1; on a GPU, what the kernels save."""
    last = rows[-1]
    where = [last["device"], picture.revision(rows)]
    if not shown(rows):
        return picture.page("Nothing to compare", " · ".join(where), (12, 1.2))
    v1, v2 = shown(rows)
    title = f"With O normalised once, {flops(v2):.1f} non-matmul FLOPs a score, not {flops(v1):.1f} (Bc={v1['Bc']})"
    where.insert(1, f"counted: N={v1['N']} d={v1['d']}, no mask")
    bars = [row for pair in counted(rows).values() for row in pair]
    panels, width, height = [(1.35, 6.4, _parts, bars), (8.0, 3.3, _weights, bars)], 12, 5.6
    if timed(rows):
        old, new = timed(rows)[-1]
        change = percent(saved(old, new), "less time", "more time")
        title += f";\nour {new['variant']} takes {change} than {old['variant']}"
        shape = f"B={new['B']} H={new['H']} d={new['d']} {new['dtype']} tile {new['Br']}x{new['Bc']}"
        where.insert(2, f"timed: {shape}, no mask")
        panels, width, height = [*panels, (12.0, 1.8, _times, rows)], 15.5, 5.9
    figure = picture.page(title, " · ".join(where), (width, height))
    for left, inches, panel, shown_there in panels:
        panel(figure.add_axes((left / width, 0.75 / height, inches / width, 3.85 / height)), shown_there)
    return figure


def _rows_of(axes, bars: list[dict], span: float) -> list[float]:
    """Where each bar stands, those of one Bc together; the axes made ready for them."""
    places = [n // 2 * 2.5 + n % 2 for n in range(len(bars))]
    axes.set(xlim=(0, span), ylim=(places[-1] + 0.6, -0.6))
    axes.tick_params(length=0)
    return places


def _parts(axes, bars: list[dict]):
    span = 1.1 * max(map(flops, bars))
    places = _rows_of(axes, bars, span)
    for y, row in zip(places, bars):
        left = 0
        for part, n in a_score(row).items():
            axes.barh(y, n, 0.84, left, color=COLORS[part], edgecolor="white", linewidth=0.8)
            picture.name_inside(axes, left, n, y, part, COLORS[part], span)
            left += n
        axes.text(left, y, f" {left:.2f}", va="center", fontsize=9.5)
    names = [("" if row["variant"] == FA2 else f"Bc={row['Bc']}   ") + row["variant"][:3] for row in bars]
    axes.set_yticks(places, names, color=picture.INK)
    axes.set_xlabel("FLOPs a score")
    axes.set_title("All but the matrix products, as the papers write them")


def _weights(axes, bars: list[dict]):
    span = 1.2 * max(map(cost, bars))
    for y, row in zip(_rows_of(axes, bars, span), bars):
        axes.barh(y, matmul(row), 0.84, color=picture.PALE, edgecolor="white")
        axes.barh(y, cost(row) - matmul(row), 0.84, matmul(row), color=picture.GREY, edgecolor="white")
        picture.name_inside(axes, 0, matmul(row), y, "matmul", picture.PALE, span)
        axes.text(cost(row), y, f" {share(row)}", va="center", fontsize=9.5)
    axes.set_yticks([])
    axes.set_xlabel("time a score, in matmul FLOPs")
    axes.set_title(f"Their share, at {DEAR:.0f} : 1")


def _times(axes, rows: list[dict]):
    ends = []
    for (name, after), color in zip(PAIRS, (picture.VERMILION, picture.BLUE)):
        line = [(new["N"], 100 * saved(old, new)) for old, new in timed(rows) if old["variant"] == name]
        if line:
            axes.plot(*zip(*line), marker="o", markersize=4, linewidth=2, color=color)
            ends.append((*line[-1], f"to {after}", color))
    axes.axhspan(-100 * bench.SAME, 100 * bench.SAME, color=picture.PALE, alpha=0.6, linewidth=0)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -5), max(high, 10))
    axes.set_xscale("log", base=2)
    axes.set_xticks(x := sorted({row["N"] for row, _ in timed(rows)}), [f"{N // 1024}k" if N >= 1024 else N for N in x])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("N")
    axes.set_title("% of time saved\n(grey: does not show)")
    picture.label_ends(axes, ends, 0.08)


EXPERIMENT = Experiment(
    name="non_matmul",
    question="What did FlashAttention-2 save by normalising once instead of at every step?",
    fixed="input, shape, tile, no mask; each pair of kernels differs in this alone",
    factor="when O is divided by l: at every step (v1), or at the end (v2)",
    varies=("variant", "loop_order", "input", "B", "H", "N", "d", "dtype", "Br", "Bc"),
    options=(
        common.INPUT,
        common.integers("--seqlen", help="N of the kernels, one or several; 64 simulated, else 1k, 4k, 16k."),
        click.option(
            "--counted-seqlen", type=common.SIZE, default=4096, show_default=True, help="N of what is counted."
        ),
        click.option("--head-dim", type=common.SIZE, help="d; 32 for kernels on minilm, else 64."),
        click.option("--br", type=common.SIZE, help="Br of the kernels; 32 simulated, else 128."),
        click.option("--bc", type=common.SIZE, help="Bc of the kernels; 32 simulated, else 64."),
        common.BATCH,
        click.option("--heads", type=common.SIZE, help="H of the kernels; 1 simulated, else 32."),
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
