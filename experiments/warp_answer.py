"""What the rows of warp_partition say: which of them are compared, sentences, claim 8, a table."""

from __future__ import annotations

import math

from sandbox.measure import bench
from sandbox.variant import SIMULATOR

from . import tables
from .tables import agrees, count, milliseconds, problem_of, total

SPLIT_Q, SPLIT_K, V1 = "split-Q", "split-K", "v1"
PAPER = (1.7, 2.0)  # times as fast, v2 over v1: FA2, Figure 4
PEAK = 989  # TFLOP/s of dense 16-bit products, H100 and H200 SXM, NVIDIA's data sheets
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
        ("shared\nread", cell(lambda row: count(row["shared_read_bytes"]))),
        ("shared\nwritten", cell(lambda row: count(row["shared_write_bytes"]))),
        ("bytes\na score", cell(lambda row: per_score(row) and f"{per_score(row):,.0f}")),
        ("more\nthan split-Q", against(per_score)),
        ("global\naccesses", cell(lambda row: count(total(row)))),
        ("formula", cell(lambda row: {True: "= equal", False: "DIFFERS"}.get(agrees(row)))),
        ("time", cell(lambda row: row["seconds"] and milliseconds(row))),
        ("TFLOP/s", cell(lambda row: row["tflops"] and f"{row['tflops']:.0f}")),
        (f"% of\n{PEAK}", cell(lambda row: row["tflops"] and f"{100 * row['tflops'] / PEAK:.0f}")),
        ("split-Q is\ntimes as fast", against(lambda row: row["seconds"])),
        ("max\nerror", cell(lambda row: row["max_error"] and f"{row['max_error']:.1e}")),
        ("gate", cell(lambda row: row["gate"])),
        ("cannot run", cell(lambda row: row["infeasible"])),
    ]
    return tables.table(lines_of(rows), columns)
