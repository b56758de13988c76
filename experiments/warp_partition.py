"""What does it cost that the warps of a block share rows (split-K) instead of keys (split-Q)?

Two ways to divide S = Q Kᵀ, P̃ V between the W warps of a block.  [FA2, 2307.08691, section 3.3, Figure 3]

    split-K  v1's: each warp has all rows and 1/W of the keys.  Maxima and parts of P̃ V meet in shared memory at every
             step: each warp writes its part of O, all wait, each adds up the W parts of some columns
    split-Q  v2's: each warp has 1/W of the rows and all keys.  No warp waits for what another has computed

fwd_v2_mma_split_k against fwd_v2_mma is that alone: the same tile, as many warps, copies, masks, softmax.  Each is also
timed with the best of a few tiles.  Beside them v1 as a whole on the same instructions, fwd_v1_mma: it has one block a
head, so that a grid of few heads alone may decide; hence the shapes of 132 heads and more, one a multiprocessor.

What passes through shared memory is counted on the simulator, in bytes, per score: a pair of row and key of the mask.
Lanes that ask for the same number, as the four of a row do for its maximum, are counted each.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import click

from sandbox import catalog, picture, target
from sandbox.choose import choose_tile
from sandbox.device import simulator
from sandbox.kernels import fwd_v1_mma, fwd_v2_mma, fwd_v2_mma_split_k
from sandbox.mask import Mask
from sandbox.measure import bench, formulas
from sandbox.problem import Problem
from sandbox.variant import SIMULATOR, Device, Infeasible, Tile

from . import common
from .common import Experiment, milliseconds, problem_of

SPLIT_Q, SPLIT_K, V1 = "split-Q", "split-K", "v1"
VARIANTS = {SPLIT_Q: "fwd_v2_mma", SPLIT_K: "fwd_v2_mma_split_k", V1: "fwd_v1_mma"}
ARRAYS = {"sQ": "Q", "sK": "K", "sV": "V", "sX": "O"}  # of shared memory; sX: parts of O; others: numbers of rows
MOVED = ("Q", "K", "V", "O", "rows")

TOKENS, HIDDEN = 16_384, 2048  # of FA2's grid: batch = TOKENS / N, heads = HIDDEN / d  [section 4.1]
FILLED = 2048, 256  # N, and B·H: more blocks than multiprocessors even with one a head
PAPER = (1.7, 2.0)  # times as fast, v2 over v1: FA2, Figure 4
PEAK = 989  # TFLOP/s of dense 16-bit products, H100 and H200 SXM, NVIDIA's data sheets

# ---- the points -----------------------------------------------------------------------------------------------------


def plan(device: Device, seqlen, head_dim, batch, heads, mask, dtype, seed):
    head_dims = head_dim or (64, 128)
    masks = [causal for causal in (False, True) if mask in ("both", "causal" if causal else "none")]
    points = []
    for d in head_dims:
        for causal in masks:
            for N, B, H in shapes(device, d, seqlen, batch, heads):
                problem = Problem(B, H, H, N, N, d, dtype, mask=Mask(causal))
                points += [
                    common.point(
                        catalog.find(name), problem, tile, device, input="gauss", seed=seed, count_bytes=False,
                        notes={"kernel": kernel, "warps": warps(name, problem, tile, device), "sms": device.sms},
                    )
                    for kernel, name, tile in candidates(problem, device)
                ]  # fmt: skip
    if all(point.infeasible for point in points):
        raise ValueError(f"no tile fits: {points[0].infeasible}")
    return points


def shapes(device: Device, d: int, seqlen, batch, heads) -> list[tuple[int, int, int]]:
    """(N, B, H)."""
    if device.simulated:
        return [(N, batch or 1, heads or 1) for N in seqlen or (128,)]
    H = heads or max(1, HIDDEN // d)
    found = [(N, batch or max(1, TOKENS // N), H) for N in seqlen or (1024, 4096, 16_384)]
    if not (seqlen or batch or heads):
        found.append((FILLED[0], FILLED[1] // H, H))
    return sorted(set(found))


def candidates(problem: Problem, device: Device) -> list[tuple[str, str, Tile]]:
    """(kernel, variant, tile); the first of split-Q and of split-K have one tile and as many warps.

    On a GPU each has others to be at its best: more keys a step, or less shared memory, for more blocks at a time.
    """
    q, k, v1 = VARIANTS.values()
    tile = Tile(64 if problem.d <= 128 else 32, 64)
    longer = Tile(tile.Br, 128)
    found = [(SPLIT_Q, f"{q} rows=16", tile), (SPLIT_K, k, tile)]
    if device.simulated:
        return [*found, (V1, v1, tile)]
    found += [
        (SPLIT_Q, q, usual(fwd_v2_mma.VARIANT, problem, device) or tile),
        (SPLIT_K, f"{k} rows=16", tile),
        (SPLIT_K, k, longer),
    ]
    best = usual(fwd_v1_mma.VARIANT, problem, device) or tile
    return found + [(V1, f"{v1} rows=16", tile), (V1, f"{v1} stages=1 rows=16", tile), (V1, v1, best)]


def usual(kernel, problem: Problem, device: Device) -> Tile | None:
    try:
        return choose_tile(problem, device, kernel)
    except Infeasible:
        return None


def warps(name: str, problem: Problem, tile: Tile, device: Device) -> int:
    """That a block has."""
    kernel, *words = name.split(" ")
    if kernel == VARIANTS[SPLIT_Q]:
        turned = catalog.switches_of(words, fwd_v2_mma.Switches)
        return fwd_v2_mma.chosen(problem, tile, device, **turned).warps(tile.Br)
    return (fwd_v1_mma if kernel == VARIANTS[V1] else fwd_v2_mma_split_k).warps_of(problem.d, tile.Bc)


def measure(point: common.Point) -> dict:
    """As `common.measure`; simulated, with the bytes that pass through shared memory, by array."""
    simulated = target.device().simulated
    with simulator.counting() if simulated else nullcontext() as counted:
        row = common.measure(point)
    if formula := formulas.traffic(VARIANTS[point.notes["kernel"]], point.problem, point.tile):  # switches or not
        row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
    row |= dict.fromkeys(["shared_read_bytes", "shared_write_bytes", *(f"shared_{array}" for array in MOVED)])
    return row | shared_bytes(counted) if simulated and not point.infeasible else row


def shared_bytes(counted) -> dict:
    found = {"shared_read_bytes": 0, "shared_write_bytes": 0, **{f"shared_{array}": 0 for array in MOVED}}
    for way, counts in (("read", counted.shared_reads), ("write", counted.shared_writes)):
        for name, elements in counts.items():
            array = ARRAYS.get(name, "rows")
            size = elements * (2 if array in ("Q", "K", "V") else 4)
            found[f"shared_{way}_bytes"] += size
            found[f"shared_{array}"] += size
    return found


# ---- what the rows say ----------------------------------------------------------------------------------------------

SHAPE = ("d", "causal", "N", "B", "H")


def by_shape(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Shape -> its rows that ran and passed the gate."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["gate"] == "passed":
            found.setdefault(tuple(row[name] for name in SHAPE), []).append(row)
    return dict(sorted(found.items()))


def fastest(rows: list[dict], kernel: str) -> dict | None:
    """Of a kernel's rows; where nothing is timed, the first."""
    rows = [row for row in rows if row["kernel"] == kernel]
    return min(rows, key=lambda row: row["seconds"] or math.inf) if rows else None


def alike(rows: list[dict]) -> dict[tuple, tuple[dict, dict]]:
    """Shape -> (split-Q, split-K) with the same tile and as many warps."""
    found = {}
    for shape, some in by_shape(rows).items():
        for q in (row for row in some if row["kernel"] == SPLIT_Q):
            same = [row for row in some if all(row[name] == q[name] for name in ("Br", "Bc", "warps"))]
            if k := fastest(same, SPLIT_K):
                found[shape] = fastest(same, SPLIT_Q), k
                break
    return found


def best(rows: list[dict], kernel: str) -> dict[tuple, tuple[dict, dict]]:
    """Shape -> (split-Q, that kernel), each with its fastest tile."""
    pairs = {shape: (fastest(some, SPLIT_Q), fastest(some, kernel)) for shape, some in by_shape(rows).items()}
    return {shape: pair for shape, pair in pairs.items() if None not in pair}


def times(pairs: dict) -> dict[tuple, float]:
    """Shape -> how many times as fast the first of a pair is, where both were timed."""
    return {s: other["seconds"] / q["seconds"] for s, (q, other) in pairs.items() if q["seconds"] and other["seconds"]}


def filled(found: dict[tuple, float], rows: list[dict]) -> dict[tuple, float]:
    """Those of at least one head a multiprocessor."""
    return {shape: x for shape, x in found.items() if shape[3] * shape[4] >= rows[-1]["sms"]}


def per_score(row: dict, array: str | None = None) -> float | None:
    """Bytes through shared memory, of one array or of all, for each score that the mask leaves."""
    if row["shared_read_bytes"] is None:
        return None
    p = problem_of(row)
    moved = row[f"shared_{array}"] if array else row["shared_read_bytes"] + row["shared_write_bytes"]
    return moved / (p.B * p.H * p.mask.pairs(p.N_q, p.N_k))


def mean(found: dict[tuple, float]) -> float:
    return math.exp(sum(map(math.log, found.values())) / len(found))


def span(found: dict[tuple, float]) -> str:
    if len(found) == 1:
        return f"{mean(found):.2f} times as fast"
    return f"{min(found.values()):.2f} to {max(found.values()):.2f} times as fast ({mean(found):.2f} in the mean)"


def answer(rows: list[dict]) -> str:
    lines = [*on_shared(rows), *on_time(rows), *on_v1(rows)]
    if not lines:
        lines = ["Nothing to compare: at no shape split-Q and split-K both ran and passed the gate."]
    if not times(alike(rows)):
        lines.append("What that costs in time, only a GPU can say.")
    lines.append("FA2, section 3.3, gives no figure for the partition alone.")
    text = "\n".join(["What does it cost that warps share rows?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_shared(rows: list[dict]) -> list[str]:
    pairs = {shape: pair for shape, pair in alike(rows).items() if per_score(pair[0]) is not None}
    lines = []
    for d in sorted({shape[0] for shape in pairs}):
        shape = max((shape for shape in pairs if shape[0] == d), key=lambda shape: (not shape[1], shape[2]))
        q, k = pairs[shape]
        lines.append(
            f"d={d}, N={q['N']}, tile {q['Br']}x{q['Bc']}, {q['warps']} warps each, {mask_of(q)}: split-K moves "
            f"{per_score(k):,.0f} bytes a score through shared memory, split-Q {per_score(q):,.0f}: "
            f"{per_score(k) / per_score(q):.2f} times as many.  K and V fall from {keys(q):,.0f} to {keys(k):,.0f}, "
            f"but Q grows from {per_score(q, 'Q'):,.0f} to {per_score(k, 'Q'):,.0f}, and parts of O take "
            f"{per_score(k, 'O'):,.0f}."
        )
    return lines


def keys(row: dict) -> float:
    return per_score(row, "K") + per_score(row, "V")


def mask_of(row: dict) -> str:
    return "causal" if row["causal"] else "no mask"


def on_time(rows: list[dict]) -> list[str]:
    lines, pairs = [], alike(rows)
    if same := times(pairs):
        q, k = next(pairs[shape] for shape in same)
        lines.append(
            f"Same tile, {q['Br']}x{q['Bc']}, and {q['warps']} warps each: split-Q is {span(same)} as split-K."
        )
    if apart := times(best(rows, SPLIT_K)):
        lines.append(f"Each with its best tile: split-Q is {span(apart)} as split-K.")
    return lines


def on_v1(rows: list[dict]) -> list[str]:
    pairs = best(rows, V1)
    if not (faster := times(pairs)):
        return []
    lines = [f"v2 ÷ v1, both on the same instructions, each with its best tile: v2 is {span(faster)}."]
    if full := filled(faster, rows):
        lines.append(
            f"Where there are at least {rows[-1]['sms']} heads, so that the grid alone does not decide: {span(full)}."
        )
    lines.append(
        f"To compare, FA2's Figure 4, each as its authors wrote it: {PAPER[0]} to {PAPER[1]} times as fast.  A "
        "finding, not a bar: our v1 has v2's instructions, copies and tuning."
    )
    tops = {kernel: max(row["tflops"] for pair in pairs.values() for row in pair if row["kernel"] == kernel)
            for kernel in (SPLIT_Q, V1)}  # fmt: skip
    lines.append(
        f"At their best v2 reaches {tops[SPLIT_Q]:.0f} TFLOP/s, {tops[SPLIT_Q] / PEAK:.0%} of {PEAK}; v1 "
        f"{tops[V1]:.0f}, {tops[V1] / PEAK:.0%}."
    )
    return lines


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why): whether split-Q divides the work better among warps."""
    pairs = alike(rows)
    if rows[-1]["device"] == SIMULATOR.name:
        more = [per_score(k) / per_score(q) for q, k in pairs.values()]
        why = "only a GPU tells what warps wait for"
        why += f"; split-K moves up to {max(more):.2f} times as many bytes through shared memory" if more else ""
        return [(8, "not measurable here", why)]
    if not (same := times(pairs)):
        return [(8, "not yet tested", "split-Q and split-K were not both timed")]
    why = f"with the same tile split-Q is {span(same)} as split-K, where less than {bench.SAME:.0%} does not show"
    if full := filled(times(best(rows, V1)), rows):
        why += f"; v2 is {span(full)} as v1 where heads fill the GPU"
    return [(8, "holds" if mean(same) >= 1 + bench.SAME else "does not hold", why)]


# ---- table ----------------------------------------------------------------------------------------------------------


def lines_of(rows: list[dict]) -> list[tuple[dict, dict | None]]:
    """(row, the split-Q that it is compared with): those that are alike, then a kernel's best where it is another."""
    found, pairs = [], alike(rows)
    for shape, some in by_shape(rows).items():
        q, k = pairs.get(shape, (None, None))
        top = fastest(some, SPLIT_Q)
        found += [(q, None), (k, q)] if q else []
        found += [(top, None)] if top and top is not q else []
        for kernel in (SPLIT_K, V1):
            row = fastest(some, kernel)
            if row and (row is not k or top is not q):
                found.append((row, top))
    return found + [(row, None) for row in rows if row["gate"] != "passed"]


def table(rows: list[dict]) -> str:
    def cell(words):
        return lambda line: words(line[0])

    def against(of):
        def ratio(line):
            row, q = line
            return f"× {of(row) / of(q):.2f}" if q and of(row) and of(q) else None

        return ratio

    columns = [
        ("d", cell(lambda row: row["d"])),
        ("mask", cell(lambda row: "causal" if row["causal"] else "none")),
        ("N", cell(lambda row: row["N"])),
        ("B·H", cell(lambda row: row["B"] * row["H"])),
        ("warps", cell(lambda row: row["kernel"])),
        ("kernel", cell(lambda row: row["variant"])),
        ("tile", cell(lambda row: f"{row['Br']}x{row['Bc']}")),
        ("warps a\nblock", cell(lambda row: row["warps"])),
        ("shared\nread", cell(lambda row: common.count(row["shared_read_bytes"]))),
        ("shared\nwritten", cell(lambda row: common.count(row["shared_write_bytes"]))),
        ("bytes\na score", cell(lambda row: per_score(row) and f"{per_score(row):,.0f}")),
        ("more\nthan split-Q", against(per_score)),
        ("global\naccesses", cell(lambda row: common.count(common.total(row)))),
        ("formula", cell(lambda row: {True: "= equal", False: "DIFFERS"}.get(common.agrees(row)))),
        ("time", cell(lambda row: row["seconds"] and milliseconds(row))),
        ("TFLOP/s", cell(lambda row: row["tflops"] and f"{row['tflops']:.0f}")),
        (f"% of\n{PEAK}", cell(lambda row: row["tflops"] and f"{100 * row['tflops'] / PEAK:.0f}")),
        ("split-Q is\ntimes as fast", against(lambda row: row["seconds"])),
        ("max\nerror", cell(lambda row: row["max_error"] and f"{row['max_error']:.1e}")),
        ("gate", cell(lambda row: row["gate"])),
        ("cannot run", cell(lambda row: row["infeasible"])),
    ]
    return common.table(lines_of(rows), columns)


# ---- picture --------------------------------------------------------------------------------------------------------

COLORS = {SPLIT_Q: picture.BLUE, SPLIT_K: picture.ORANGE, V1: picture.VERMILION}
NAMES = {
    SPLIT_Q: "split-Q: fwd_v2_mma", SPLIT_K: "split-K: fwd_v2_mma_split_k", V1: "v1, split-K: fwd_v1_mma"
}  # fmt: skip
PARTS = {
    "Q": ("Q", picture.BLUE), "K": ("K", picture.SKY), "V": ("V", picture.GREEN),
    "O": ("parts of O", picture.VERMILION), "rows": ("maxima and sums", picture.YELLOW),
}  # fmt: skip


def draw(rows: list[dict]):
    """TFLOP/s by shape; where nothing was timed, bytes through shared memory a score."""
    last, timed = rows[-1], any(row["seconds"] for row in rows)
    heads, mask = f"B={last['B']} H={last['H']} ", f" · {mask_of(last)}"
    where = picture.setup(last).replace(f"{heads}d={last['d']} ", "" if timed else heads).replace(mask, "")
    if not by_shape(rows):
        return picture.page("Nothing to compare", where, (12, 1.2))
    return _speeds(rows, where) if timed else _bytes(rows, where)


def _bytes(rows: list[dict], where: str):
    pairs = alike(rows).values()
    more = [per_score(k) / per_score(q) for q, k in pairs]
    title = "Warps that share rows move "
    title += f"{min(more):.1f} to {max(more):.1f} times as many bytes through shared memory" if more else "bytes"
    groups = list(by_shape(rows).items())
    height = 2.2 + 1.35 * len(groups)
    figure = picture.page(title, f"{where} · tile {rows[-1]['Br']}x{rows[-1]['Bc']}, as many warps each", (12, height))
    axes = figure.add_axes((0.2, 0.7 / height, 0.75, 1 - 2.0 / height))
    ticks, span = [], 1.12 * max(per_score(row) for _, some in groups for row in some)
    axes.set_xlim(0, span)
    for n, (shape, some) in enumerate(groups):
        for m, kernel in enumerate(VARIANTS):
            if (row := fastest(some, kernel)) is None:
                continue
            y, left = 3.8 * n + m, 0.0
            ticks.append((y, kernel))
            for array, (_, color) in PARTS.items():
                axes.barh(y, per_score(row, array), 0.82, left=left, color=color)
                left += per_score(row, array)
            axes.text(left, y, f"  {left:,.0f}", va="center")
        d, causal, N, *_ = shape
        words = f"d={d}\n{'causal' if causal else 'no mask'}\nN={N}"
        axes.text(-0.25, 3.8 * n + 1, words, transform=axes.get_yaxis_transform(), va="center", linespacing=1.3)
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], color=picture.INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(3.8 * len(groups) - 1.2, -0.7)
    axes.set_xlabel("bytes through shared memory for each score (reads and writes, counted)")
    for n, (name, color) in enumerate(PARTS.values()):
        place = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0.17 * n, 1.02, "■", color=color, fontsize=13, **place)
        axes.text(0.17 * n + 0.022, 1.025, name, fontsize=10, **place)
    return figure


def _speeds(rows: list[dict], where: str):
    same, faster = times(alike(rows)), times(best(rows, V1))
    title = f"With the same tile, split-Q is {mean(same):.2f} times as fast as split-K" if same else "Warp partition"
    if faster:
        full = filled(faster, rows) or faster
        title += f";\nv2 is {mean(full):.2f} times as fast as v1 on the same instructions"
        title += f" (FlashAttention-2: {PAPER[0]} to {PAPER[1]})"
    shapes = by_shape(rows)
    panels = sorted({(d, causal) for d, causal, *_ in shapes})
    down = -(-len(panels) // 2)
    height = 1.5 + 3.4 * down
    what = "each with its best tile · above v1: v2 ÷ v1"
    figure = picture.page(title, f"{where} · {what}", (12, height))
    top = 1.25 * max(row["tflops"] or 0 for row in rows)
    for n, (d, causal) in enumerate(panels):
        x, y = n % 2, n // 2
        axes = figure.add_axes((0.06 + 0.49 * x, (height - 1.65 - 3.3 * y - 2.4) / height, 0.43, 2.2 / height))
        _panel(axes, {s: some for s, some in shapes.items() if s[:2] == (d, causal)}, faster)
        axes.set_ylim(0, top)
        axes.set_title(f"d={d}, {'causal' if causal else 'no mask'}: TFLOP/s")
    for n, (kernel, name) in enumerate(NAMES.items()):
        figure.text(0.06 + 0.24 * n, 0.02, "■", color=COLORS[kernel], fontsize=13)
        figure.text(0.075 + 0.24 * n, 0.022, name, fontsize=10)
    return figure


def _panel(axes, shapes: dict[tuple, list[dict]], faster: dict[tuple, float]):
    for n, (shape, some) in enumerate(shapes.items()):
        for m, kernel in enumerate(VARIANTS):
            row = fastest(some, kernel)
            if row is None or not row["tflops"]:
                continue
            axes.bar(n + 0.28 * (m - 1), row["tflops"], 0.26, color=COLORS[kernel])
            text = f"{row['tflops']:.0f}" + (f"\n× {faster[shape]:.1f}" if kernel == V1 and shape in faster else "")
            axes.annotate(text, (n + 0.28 * (m - 1), row["tflops"]), (0, 2), textcoords="offset points", ha="center",
                          fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(shapes)), [f"N={_short(N)}\nB·H={B * H}" for _, _, N, B, H in shapes])
    axes.tick_params(axis="x", length=0)


def _short(N: int) -> str:
    return f"{N // 1024}k" if N % 1024 == 0 else str(N)


EXPERIMENT = Experiment(
    name="warp_partition",
    question="What does it cost that the warps of a block share rows (split-K) instead of keys (split-Q)?",
    fixed="input, shape, dtype; tile and warps a block, where split-Q and split-K are compared alike",
    factor="what the warps of a block divide: the keys (v1), or the rows (v2); beside them all of v1",
    varies=("kernel", "warps", "variant", "loop_order", "B", "H", "N", "d", "causal", "Br", "Bc"),
    options=(
        common.integers("--seqlen", help="N, one or several; 128 simulated, else 1k, 4k, 16k."),
        common.integers("--head-dim", help="d, one or several, multiples of 32; 64 and 128."),
        click.option("--batch", type=common.SIZE, help="B; 1 simulated, else 16k tokens."),
        click.option("--heads", type=common.SIZE, help="H; 1 simulated, else 2048 / d."),
        click.option("--mask", type=click.Choice(["both", "none", "causal"]), default="both", show_default=True),
        click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="bf16", show_default=True),
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
)
