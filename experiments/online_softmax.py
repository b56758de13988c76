"""What does it save to merge the softmax's maximum and sum into one pass?

Safe softmax walks along a row three times: maximum, sum, result.  The online form finds maximum and sum together, so
that an element takes 3 accesses instead of 4 (Milakov and Gimelshein, 1805.02867: up to 1.3 times faster on a V100).
Every softmax kernel of the catalog takes part, prototypes too.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import torch

from sandbox import catalog, picture, target
from sandbox.measure import formulas, gate, timing
from sandbox.variant import SECONDS_PER_MULTIPLY_ADD, Device

from . import common, tables
from .common import Experiment
from .tables import milliseconds

SAFE, ONLINE, TILED = "softmax_safe", "softmax_online", "softmax_tiled"
PAPER = 1.3  # 1805.02867, abstract: "up to 1.3x"
COLORS = {SAFE: picture.GREY, ONLINE: picture.VERMILION, TILED: picture.BLUE}
OTHERS = (picture.GREEN, picture.PURPLE, picture.ORANGE, picture.SKY)


# ---- the points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One softmax kernel on X [rows, N]."""

    variant: str
    rows: int
    N: int
    dtype: str
    seed: int

    infeasible, count_bytes = None, False

    def fields(self) -> dict:
        return {
            "variant": self.variant, "direction": "softmax", "input": "gauss", "rows": self.rows, "N": self.N,
            "dtype": self.dtype, "seed": self.seed, "Br": None, "Bc": None, "infeasible": None,
        }  # fmt: skip

    def seconds(self) -> float:
        """About how long the simulator takes: some ten operations an element."""
        return 10 * self.rows * self.N * SECONDS_PER_MULTIPLY_ADD


KEY = ("variant", "rows", "N", "dtype", "seed")
MEASURED = (
    "reads_total", "writes_total", "formula_reads_total", "formula_writes_total", "accesses_per_element", "gate",
    "max_error", "seconds", "seconds_p20", "seconds_p80", "gigabytes_per_second",
)  # fmt: skip


def plan(device: Device, seqlen, rows, dtype, seed):
    points = []
    for N in seqlen or ((16, 64, 256) if device.simulated else (256, 1024, 4096, 16384, 65536)):
        height = rows or (
            8 if device.simulated else max(1, 2**26 // N)
        )  # on a GPU always as many elements, past its L2
        points += [Point(name, height, N, dtype, seed) for name in catalog.variants("softmax")]
    return points


def measure(point: Point) -> dict:
    """Gate, then accesses where the launch is simulated, else time; useful bytes are one read and one write."""
    row = dict.fromkeys(MEASURED)
    device, n = target.device(), point.rows * point.N
    if formula := formulas.softmax(point.variant, point.rows, point.N):
        row |= {"formula_reads_total": formula.total_reads, "formula_writes_total": formula.total_writes}
    generator = torch.Generator().manual_seed(point.seed)
    X = torch.randn(point.rows, point.N, generator=generator).to(
        target.torch_device(), getattr(torch, NAMES[point.dtype])
    )
    verdict = gate.check_softmax(catalog.find(point.variant), X, device)
    row |= {
        "gate": "passed" if verdict.passed else f"failed: {verdict.why}",
        "max_error": common.finite(verdict.max_error),
    }
    if verdict.traffic is not None:
        row |= {"reads_total": verdict.traffic.total_reads, "writes_total": verdict.traffic.total_writes}
        row |= {"accesses_per_element": verdict.traffic.total / n}
    elif formula:
        row |= {"accesses_per_element": formula.total / n}
    if verdict.passed and not device.simulated:
        t = timing.time(verdict)
        row |= {"seconds": t.ms * 1e-3, "seconds_p20": t.ms_p20 * 1e-3, "seconds_p80": t.ms_p80 * 1e-3}
        row |= {"gigabytes_per_second": 2 * n * X.element_size() / t.ms * 1e-6}
    return row


NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# ---- what the rows say ----------------------------------------------------------------------------------------------


def of(rows: list[dict], name: str) -> dict[int, dict]:
    """N -> the row, where the gate passed."""
    return {row["N"]: row for row in rows if row["variant"] == name and row["gate"] == "passed"}


def accesses(rows: list[dict], name: str) -> list[float]:
    """What an element took at the lengths there are, the least and the most."""
    each = [row["accesses_per_element"] for row in of(rows, name).values() if row["accesses_per_element"]]
    return sorted({min(each), max(each)}) if each else []


def speed(rows: list[dict]) -> dict[int, float]:
    """N -> how many times faster online is than safe; empty where nothing was timed."""
    safe, online = of(rows, SAFE), of(rows, ONLINE)
    return {N: safe[N]["seconds"] / online[N]["seconds"] for N in safe if N in online and safe[N]["seconds"]}


def answer(rows: list[dict]) -> str:
    safe, online = accesses(rows, SAFE), accesses(rows, ONLINE)
    if not safe or not online:
        return "Nothing to compare: safe or online softmax failed the gate."
    text = f"One pass less: {_span(online)} accesses an element instead of {_span(safe)}"
    text += {True: ", counted, and equal to the formula", False: ", counted, and NOT what the formula says"}.get(
        _agree(rows), ", by the formula"
    )
    if times := speed(rows):
        best = max(times, key=times.get)
        text += f".  In time {min(times.values()):.2f} to {times[best]:.2f} times faster, most at N={best}"
        text += f"; the paper: up to {PAPER} on a V100"
    else:
        text += f".  What that is in time, only a GPU can say; the paper: up to {PAPER} times on a V100"
    others = [
        f"{name} takes {_span(accesses(rows, name))}"
        for name in dict.fromkeys(row["variant"] for row in rows)
        if name not in (SAFE, ONLINE) and accesses(rows, name)
    ]
    text += "." + (f"  {'; '.join(others)}." if others else "") + "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), from the numbers of these rows."""
    return [claim_2(rows)]


def claim_2(rows: list[dict]):
    """Softmax does not tile by itself; the online form merges maximum and sum into one pass with a refresh."""
    ours = [row for row in rows if row["variant"] in (ONLINE, TILED)]
    if wrong := [row for row in ours if row["gate"] != "passed"]:
        return 2, "does not hold", f"{wrong[0]['variant']} N={wrong[0]['N']} {wrong[0]['gate']}"
    safe, online = accesses(rows, SAFE), accesses(rows, ONLINE)
    if not safe or not online or not accesses(rows, TILED):
        return 2, "not yet tested", f"it takes {SAFE}, {ONLINE} and {TILED}, each behind the gate"
    why = f"merged element by element or tile by tile it is exact, with {_span(online)} accesses an element, not "
    why += _span(safe) + (", counted" if _agree(rows) else ", by the formula")
    if times := speed(rows):
        why += f"; in time {min(times.values()):.2f} to {max(times.values()):.2f} times faster"
    return 2, "holds" if online[-1] < safe[0] else "holds in part", why


def _agree(rows) -> bool | None:
    known = [agrees for row in rows if (agrees := tables.agrees(row)) is not None]
    return all(known) if known else None


def _span(numbers) -> str:
    return " to ".join(f"{x:.3g}" for x in numbers)


def table(rows: list[dict]) -> str:
    columns = [
        ("kernel", lambda row: row["variant"]),
        ("rows", lambda row: f"{row['rows']:,}"),
        ("N", lambda row: row["N"]),
        ("accesses\nan element", lambda row: row["accesses_per_element"] and f"{row['accesses_per_element']:.3g}"),
        ("formula", lambda row: {True: "= equal", False: "DIFFERS"}.get(tables.agrees(row))),
        ("time", lambda row: row["seconds"] and milliseconds(row)),
        ("useful\nGB/s", lambda row: row["gigabytes_per_second"] and f"{row['gigabytes_per_second']:,.0f}"),
        ("max\nerror", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
        ("gate", lambda row: row["gate"]),
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """Accesses an element, kernel by kernel; beside it, on a GPU, the speed over N."""
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if accesses(rows, name)]
    names.sort(key=lambda name: accesses(rows, name), reverse=True)
    spare = iter(OTHERS * len(names))
    colors = {name: COLORS.get(name) or next(spare) for name in names}
    timed = {name: [row for row in of(rows, name).values() if row["seconds"]] for name in names}
    last = rows[-1]
    where = f"{last['device']} · Gaussian input · {last['dtype']} · {picture.revision(rows)}"
    figure = picture.page(_title(rows), where, (12, 2.0 + 0.55 * max(len(names), 5)))
    wide = not any(timed.values())
    axes = figure.add_axes((0.14, 0.14, 0.8 if wide else 0.32, 0.58))
    for y, name in enumerate(names):
        most = accesses(rows, name)[-1]
        writes = min(1.0, most)
        for left, width, word, alpha in ((0, most - writes, "reads", 1.0), (most - writes, writes, "write", 0.45)):
            axes.barh(y, width, 0.62, left, color=colors[name], alpha=alpha, edgecolor="white")
            axes.text(left + width / 2, y, word, ha="center", va="center", color="white", fontsize=10)
        if (least := accesses(rows, name)[0]) < most:
            axes.plot([least, least], [y - 0.31, y + 0.31], color=picture.INK, linewidth=1.5)
        axes.text(most + 0.05, y, _span(accesses(rows, name)), va="center", fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 4.6)
    axes.set_title(f"Accesses an element, N = {_lengths(rows)}")
    if not wide:
        axes = figure.add_axes((0.58, 0.14, 0.27, 0.58))
        ends = []
        for name in names:
            x, y = [row["N"] for row in timed[name]], [row["gigabytes_per_second"] for row in timed[name]]
            axes.plot(x, y, marker="o", markersize=4, linewidth=2, color=colors[name])
            ends.append((x[-1], y[-1], name, colors[name]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(N) if N < 1024 else f"{N // 1024}k" for N in x])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.grid(axis="y")
        axes.set_title("Useful GB/s over N (one read, one write)")
        picture.label_ends(axes, ends, 0.09)
    return figure


def _title(rows: list[dict]) -> str:
    safe, online = accesses(rows, SAFE), accesses(rows, ONLINE)
    if not safe or not online:
        return "Nothing to compare"
    title = f"Maximum and sum in one pass: {_span(online)} accesses an element instead of {_span(safe)}"
    if times := speed(rows):
        title += f",\n{min(times.values()):.2f} to {max(times.values()):.2f} times faster"
    return title


def _lengths(rows) -> str:
    N = sorted({row["N"] for row in rows})
    return str(N[0]) if len(N) == 1 else f"{N[0]} to {N[-1]}"


EXPERIMENT = Experiment(
    name="online_softmax",
    question="What does it save to merge the softmax's maximum and sum into one pass?",
    fixed="X [rows, N], Gaussian, the same numbers for all",
    factor="the kernel: how often it walks along a row",
    varies=("variant", "N", "rows"),
    options=(
        common.integers("--seqlen", help="N, the length of a row, one or several."),
        click.option("--rows", type=common.SIZE, help="8; on a GPU as many as make 2^26 elements."),
        common.DTYPE,
        common.SEED,
    ),
    plan=plan,
    table=table,
    answer=answer,
    draw=draw,
    measure=measure,
    key=KEY,
)
