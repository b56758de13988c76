"""The builds of fwd_v3 that pipelining compares, and what their rows say: claims 12 and 13, a table and a picture."""

from __future__ import annotations

from sandbox import picture
from sandbox.measure import bench
from sandbox.variant import SIMULATOR

from . import tables
from .tables import milliseconds

ALL, OVERLAP, SPECIALIZED, PING_PONG = "all on", "no overlap", "no warp specialisation", "no ping-pong"
BUILDS = {  # what differs from all on; stages are as many as fit, but where they are given
    ALL: {},
    OVERLAP: {"overlap": False},
    SPECIALIZED: {"warp_specialized": False},
    PING_PONG: {"ping_pong": False},
    "no overlap, no ping-pong": {"overlap": False, "ping_pong": False},
    "no lazy rescaling": {"lazy": False},
    "no dynamic order": {"dynamic": False},
    "not persistent": {"persistent": False},
    "2 stages": {"stages": 2},
    "3 stages": {"stages": 3},
}
IDEAS = {  # in the words of the answer
    OVERLAP: "overlap of QKᵀ and softmax", SPECIALIZED: "warps that only copy", PING_PONG: "ping-pong",
    "no overlap, no ping-pong": "overlap and ping-pong together",
    "no lazy rescaling": "rescaling O only where it must be", "no dynamic order": "row blocks to whoever is free",
    "not persistent": "blocks that stay", "2 stages": "as many stages as fit, not 2",
    "3 stages": "as many stages as fit, not 3",
}  # fmt: skip

PAPER_SHAPE = {"B": 4, "H": 16, "N": 8448, "d": 128, "dtype": "fp16", "causal": False}
PAPER = {ALL: 661, OVERLAP: 582, SPECIALIZED: 570}  # TFLOP/s on an H100, Table 2
TEXT = (570, (620, 640))  # without and with ping-pong, section 3.1: d=128, N=8k


def of(rows: list[dict], build: str) -> list[dict]:
    return [row for row in rows if row["build"] == build]


def best(rows: list[dict]) -> dict[str, dict]:
    """build -> the row of its fastest tile, where it was timed."""
    timed = {build: [row for row in of(rows, build) if row["tflops"]] for build in BUILDS}
    return {build: max(some, key=lambda row: row["tflops"]) for build, some in timed.items() if some}


def worth(rows: list[dict]) -> dict[str, float]:
    """build -> how much faster all on is: what the idea is worth that it does without."""
    fastest = best(rows)
    if ALL not in fastest:
        return {}
    return {name: fastest[ALL]["tflops"] / row["tflops"] - 1 for name, row in fastest.items() if name != ALL}


def paper(row: dict) -> dict[str, int]:
    """build -> FA3's figure; none at another shape than its own."""
    return PAPER if all(row[field] == value for field, value in PAPER_SHAPE.items()) else {}


def papers_worth(row: dict) -> dict[str, float]:
    return {build: PAPER[ALL] / tflops - 1 for build, tflops in paper(row).items() if build != ALL}


def sound(rows: list[dict]) -> list[str]:
    """The builds that ran, and passed the gate with every tile."""
    gates = {build: {row["gate"] for row in of(rows, build)} - {None} for build in BUILDS}
    return [build for build, seen in gates.items() if seen == {"passed"}]


def answer(rows: list[dict]) -> str:
    fastest = best(rows)
    if ALL not in fastest:
        lines = [on_exactness(rows)]
    else:
        lines = [
            f"All on: {speed(fastest[ALL])}.  Less than {bench.SAME:.0%} does not show: that much may two medians of"
            " one kernel differ by.",
            *(on_worth(rows, build) for build in worth(rows)),
            on_own(rows),
        ]
        lines += on_paper(rows[0]) if paper(rows[0]) else []
    text = "\n".join(["What are FlashAttention-3's ideas worth?", *(f"  {line}" for line in lines if line)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_exactness(rows: list[dict]) -> str:
    exact = sound(rows)
    text = f"{len(exact)} of {len(BUILDS)} builds are exact, with every tile that fits"
    ratios = [row["error_ratio"] for row in rows if row["error_ratio"] is not None]
    text += f"; they err by {max(ratios):.0%} of what is allowed at most" if exact and ratios else ""
    if not_exact := [build for build in BUILDS if build not in exact]:
        text += f".  Not so: {', '.join(not_exact)}"
    return text + (".  What they are worth, only a GPU can say." if emulated(rows) else ".")


def emulated(rows: list[dict]) -> bool:
    return rows[-1]["device"] == SIMULATOR.name


def speed(row: dict) -> str:
    apart = "O leaves from a tile of its own" if row["o_apart"] else "O leaves through V's tiles"
    return f"{row['tflops']:.0f} TFLOP/s (tile {row['Br']}x{row['Bc']}, {row['stages']} stages, {apart})"


def on_worth(rows: list[dict], build: str) -> str:
    change, row, on = worth(rows)[build], best(rows)[build], best(rows)[ALL]
    text = f"{IDEAS[build]}: {change:+.1%}"
    text += " (does not show)" if abs(change) < bench.SAME else ""
    text += f"; {build}: {row['tflops']:.0f} TFLOP/s, tile {row['Br']}x{row['Bc']}"
    text += "; all on is such a build itself" if BUILDS[build] == {"stages": on["stages"]} else ""
    theirs = papers_worth(rows[0]).get(build)
    return text + (f"; in FA3's Table 2 {theirs:+.1%}." if theirs is not None else ".")


def on_own(rows: list[dict]) -> str | None:
    """How far what attention() takes is from the fastest build."""
    own = [row for row in rows if row["own"] and row["tflops"]]
    if not own:
        return None
    top = max(best(rows).values(), key=lambda row: row["tflops"])
    text = f"attention() by itself takes {own[0]['build']}, tile {own[0]['Br']}x{own[0]['Bc']}: "
    text += f"{own[0]['tflops']:.0f} TFLOP/s"
    if top["tflops"] <= own[0]["tflops"]:
        return text + ", the fastest here."
    return text + f", {1 - own[0]['tflops'] / top['tflops']:.1%} less than the fastest here, {top['build']}."


def on_paper(row: dict) -> list[str]:
    figures = ", ".join(f"{build} {tflops}" for build, tflops in PAPER.items())
    low, high = (tflops / TEXT[0] - 1 for tflops in TEXT[1])
    return [
        f"FA3's Table 2, on an H100, TFLOP/s: {figures}.",
        f"FA3's text: ping-pong lifts {TEXT[0]} to {TEXT[1][0]}-{TEXT[1][1]} TFLOP/s, {low:+.1%} to {high:+.1%}.",
    ]


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    if emulated(rows):
        return [(number, "not measurable here", "only a GPU tells what overlaps") for number in (12, 13)]
    return [claim_12(rows), claim_13(rows)]


def claim_12(rows: list[dict]):
    """Producer and consumer warps overlap copies with the tensor cores."""
    fastest, change = best(rows), worth(rows)
    if SPECIALIZED not in change:
        return 12, "not yet tested", "not all of these builds were timed: " + ", ".join((ALL, SPECIALIZED))
    without, on = fastest[SPECIALIZED]["tflops"], fastest[ALL]["tflops"]
    why = f"{IDEAS[SPECIALIZED]} {without:.0f} → {on:.0f} TFLOP/s; {change[SPECIALIZED]:+.1%}, "
    why += f"where less than {bench.SAME:.0%} does not show"
    return 12, "holds" if change[SPECIALIZED] >= bench.SAME else "does not hold", why


def claim_13(rows: list[dict]):
    """The softmax of one block hides under the products of the next, and ping-pong between warpgroups."""
    fastest, change = best(rows), worth(rows)
    if not {OVERLAP, PING_PONG} <= change.keys():
        return 13, "not yet tested", "not all of these builds were timed: " + ", ".join((ALL, OVERLAP, PING_PONG))
    on = fastest[ALL]["tflops"]
    parts = [f"{IDEAS[b]} {fastest[b]['tflops']:.0f} → {on:.0f}" for b in (OVERLAP, PING_PONG)]
    why = f"{', '.join(parts)} TFLOP/s; {change[OVERLAP]:+.1%} and {change[PING_PONG]:+.1%}, "
    why += f"where less than {bench.SAME:.0%} does not show"
    shown = [change[build] >= bench.SAME for build in (OVERLAP, PING_PONG)]
    return 13, "holds" if all(shown) else "holds in part" if any(shown) else "does not hold", why


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """A line a build, with its best tile; the tiles that cannot run."""
    lines = [(build, shown(of(rows, build))) for build in BUILDS if of(rows, build)]
    figures, theirs, change = paper(rows[0]), papers_worth(rows[0]), worth(rows)

    def cell(words):
        return lambda line: words(line[1])

    def tried(row):
        some = of(rows, row["build"])
        return f"{sum(other['gate'] is not None for other in some)} of {len(some)}"

    def verdict(line):
        gates = dict.fromkeys(row["gate"] for row in of(rows, line[0]) if row["gate"])
        return next((gate for gate in gates if gate != "passed"), next(iter(gates), "nothing fits"))

    columns = [
        ("build", lambda line: line[0]),
        ("tile", cell(lambda row: f"{row['Br']}x{row['Bc']}")),
        ("stages", cell(lambda row: row["stages"])),
        ("O\napart", cell(lambda row: "yes" if row["o_apart"] else "no")),
        ("tiles\nrun", cell(tried)),
        ("time", cell(lambda row: row["seconds"] and milliseconds(row))),
        ("TFLOP/s", cell(lambda row: row["tflops"] and f"{row['tflops']:.0f}")),
        ("idea is\nworth", lambda line: percent(change.get(line[0]))),
        ("FA3\nTFLOP/s", lambda line: figures.get(line[0])),
        ("FA3:\nworth", lambda line: percent(theirs.get(line[0]))),
        ("max\nerror", cell(lambda row: row["max_error"] and f"{row['max_error']:.1e}")),
        ("of what is\nallowed", cell(lambda row: row["error_ratio"] and f"{row['error_ratio']:.0%}")),
        ("gate", verdict),
    ]
    misfits = dict.fromkeys(misfit(row) for row in rows if row["infeasible"])
    return "\n".join([tables.table(lines, columns), *misfits])


def percent(change: float | None) -> str | None:
    return None if change is None else f"{change:+.1%}"


def misfit(row: dict) -> str:
    where = f"{row['stages']} stages, O {'apart' if row['o_apart'] else 'through V'}"
    return f"cannot run: {row['Br']}x{row['Bc']}, {where}: {row['infeasible']}"


def shown(rows: list[dict]) -> dict:
    """Of a build's rows: the fastest; where none was timed, the furthest off; else any."""
    return max(rows, key=lambda row: (row["tflops"] or 0, row["gate"] is not None, row["error_ratio"] or 0))


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """A bar a build: its TFLOP/s beside the paper's; emulated, how much of what is allowed it errs."""
    fastest = best(rows)
    if ALL in fastest:
        change = worth(rows)
        named = [build for build in (OVERLAP, SPECIALIZED, PING_PONG) if build in change]
        ideas = [f"{IDEAS[build]} {change[build]:+.1%}" for build in named]
        title = f"fwd_v3 with all on: {fastest[ALL]['tflops']:.0f} TFLOP/s" + (";\nworth: " if ideas else "")
        title += ", ".join(ideas)
        builds, fill = [build for build in BUILDS if build in fastest], _speeds
    else:
        builds, fill = [build for build in BUILDS if shown(of(rows, build))["error_ratio"] is not None], _errors
        title = f"{len(sound(rows))} of {len(BUILDS)} builds of fwd_v3 are exact, each idea switched off alone"
    height = 1.9 + 0.29 * title.count("\n") + 0.5 * len(builds)
    figure = picture.page(title, f"{picture.setup(rows[-1])} · N={rows[-1]['N']}", (12, height))
    if builds:
        top = 0.95 + 0.29 * title.count("\n")
        axes = figure.add_axes((0.2, 0.75 / height, 0.77, 1 - (top + 0.75) / height))
        axes.set(yticks=range(len(builds)), ylim=(len(builds) - 0.4, -0.6))
        axes.set_yticklabels(builds, color=picture.INK)
        axes.tick_params(axis="y", length=0)
        fill(axes, rows, builds)
    return figure


def _speeds(axes, rows: list[dict], builds: list[str]):
    fastest, change, figures = best(rows), worth(rows), paper(rows[0])
    axes.set_xlim(0, 1.25 * max(*(row["tflops"] for row in fastest.values()), *figures.values(), 0))
    for y, build in enumerate(builds):
        row, color = fastest[build], picture.BLUE if build == ALL else picture.SKY
        axes.barh(y, row["tflops"], 0.7, color=color)
        text = f"{row['tflops']:.0f}   {row['Br']}x{row['Bc']}, {row['stages']} stages"
        text += ", O apart" if row["o_apart"] else ""
        text += f"   the idea: {change[build]:+.1%}" if build in change else ""
        axes.text(0.01, y, text, transform=axes.get_yaxis_transform(), va="center", color=picture.ink_on(color))
        if build in figures:
            _mark(axes, figures[build], y, f"FA3 {figures[build]}", picture.VERMILION)
        if build == PING_PONG and figures:
            _mark(axes, TEXT[0], y, f"FA3's text {TEXT[0]}, then {TEXT[1][0]}-{TEXT[1][1]}", picture.GREY)
    axes.set_xlabel("TFLOP/s, each build with its best tile" + (" (marks: FA3's, on an H100)" if figures else ""))


def _mark(axes, x: float, y: float, text: str, color: str):
    """A figure of the paper's, and its name beyond the bar where one reads it."""
    axes.plot([x, x], [y - 0.42, y + 0.42], color=color, linewidth=3)
    beyond = max([x, *(bar.get_width() for bar in axes.patches if abs(bar.get_y() + bar.get_height() / 2 - y) < 0.1)])
    axes.annotate(text, (beyond, y), (5, 0), textcoords="offset points", va="center", fontsize=9, color=color)


def _errors(axes, rows: list[dict], builds: list[str]):
    for y, build in enumerate(builds):
        row = max(of(rows, build), key=lambda row: row["error_ratio"] or 0)
        color = picture.BLUE if build in sound(rows) else picture.VERMILION
        axes.barh(y, row["error_ratio"], 0.7, color=color)
        axes.text(row["error_ratio"], y, f" {row['error_ratio']:.0%}", va="center")
    axes.axvline(1, color=picture.VERMILION, linewidth=2)
    axes.set_xlim(0, 1.1 * max(1, *(bar.get_width() for bar in axes.patches)))
    axes.set_xlabel("largest error ÷ what is allowed; the line: the gate")
