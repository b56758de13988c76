"""What a trace says: sentences, tables and the timeline.  [floor 3]"""

from __future__ import annotations

from statistics import median

from matplotlib.patches import Patch

from .. import picture, records
from .trace import Hidden, Track, hidden, shares, steps

COLORS = {
    "softmax": picture.ORANGE, "pack": picture.YELLOW, "finish": picture.PURPLE,
    "QK": picture.BLUE, "PV": picture.GREEN,
}  # fmt: skip
WAITS = picture.PALE  # whatever else: waits
TENSOR_FLOPS = 4096  # dense 16-bit FLOPs a cycle of a Hopper multiprocessor


def sentence(name: str, found: Hidden) -> str:
    own, others = f"{found.own:.0%} the warpgroup's own", f"{found.others:.0%} another's"
    return f"{found.either:.0%} of {name}'s softmax runs under products: {own}, {others}"


def table(blocks: list[list[Track]]) -> str:
    """The time of all warpgroups, by state."""
    words = {"QK": "issues Q Kᵀ", "PV": "issues P V", "softmax": "softmax", "pack": "packs P", "finish": "finishes O"}
    rows = [
        (words.get(state, f"waits {state}"), f"{share:.1%}") for state, share in shares(blocks).items() if share >= 5e-4
    ]
    return records.tabulate(rows, ("a warpgroup", "of its time"), "simple", colalign=("left", "right"))


def pace(blocks: list[list[Track]], tile, d: int) -> list[str]:
    """How long a step takes, what tensor cores need for it, and what the change of row blocks costs."""
    within, across = steps(blocks)
    if not within:
        return ["no row block of the trace has two key blocks"]
    least = 4 * tile.Br * tile.Bc * d / TENSOR_FLOPS
    step = median(within)
    said = [f"a step takes {step:,.0f} cycles (median); its products alone, {least:,.0f}: {least / step:.0%}"]
    if across:
        said.append(
            f"from the last step of a row block to the first of the next, {median(across):,.0f} cycles: "
            f"{median(across) / step:.1f} steps"
        )
    return said


def draw(tracks: list[Track], ghz: float, title: str, subtitle: str):
    """One block: some steps from the middle of a row block, and the change from one row block to the next."""
    middle, change = _windows(tracks)
    figure = picture.page(title, subtitle, (12, 2.2 + 1.9 * len(tracks)))
    for n, (window, told) in enumerate(((middle, "within a row block"), (change, "from a row block to the next"))):
        if window is None:
            continue
        height = 0.60 / 2
        ax = figure.add_axes((0.13, 0.10 + (1 - n) * (height + 0.085), 0.85, height))
        _timeline(ax, tracks, window, ghz)
        ax.set_title(told, fontsize=11)
    ax.set_xlabel("µs since the block began")
    shown = [("softmax", "softmax"), ("pack", "P to 16 bits"), ("finish", "O leaves"), ("QK", "Q Kᵀ"), ("PV", "P V")]
    handles = [Patch(color=COLORS[state], label=label) for state, label in shown] + [Patch(color=WAITS, label="waits")]
    figure.legend(handles=handles, ncols=len(handles), loc="upper right", frameon=False, fontsize=9.5,
                  bbox_to_anchor=(0.985, 1 - 0.62 / figure.get_size_inches()[1]))  # fmt: skip
    return figure


def _windows(tracks: list[Track], count: int = 5):
    """[begin, end) of `count` steps halfway through the longest row block, and around the change after it."""
    begins, best, last = [], [], None
    for span in tracks[0].states:
        if span.what == "QK":
            begins.append(span.begin)
        elif span.what in ("for work", "finish") and begins:
            if len(begins) > len(best):
                best, last = begins, span.begin
            begins = []
    best = best or begins
    if len(best) < 2:
        return (tracks[0].states[0].begin, tracks[0].states[-1].end), None
    start = max(0, (len(best) - count) // 2)
    stop = min(len(best) - 1, start + count)
    length = best[stop] - best[start]
    return (best[start], best[stop]), last and (last - length // 2, last + length // 2)


def _timeline(ax, tracks: list[Track], window: tuple[int, int], ghz: float):
    us = 1e-3 / ghz
    ticks, labels = [], []
    for g, track in enumerate(tracks):
        top = -2.4 * g
        for y, spans, label in ((top, track.states, f"warpgroup {g}"), (top - 0.85, track.products, "tensor cores")):
            ticks.append(y)
            labels.append(label)
            for s in spans:
                if s.end <= window[0] or s.begin >= window[1]:
                    continue
                begin, end = max(s.begin, window[0]), min(s.end, window[1])
                products = spans is track.products
                color = COLORS[s.what] if products or s.what not in ("QK", "PV") and s.what in COLORS else WAITS
                lift = 0.2 if products and s.what == "QK" else -0.2 if products else 0  # the two may run at once
                ax.barh(y + lift, (end - begin) * us, left=begin * us, height=0.38 if products else 0.78, color=color,
                        edgecolor="white", linewidth=0.4)  # fmt: skip
    ax.set_yticks(ticks, labels, fontsize=9.5)
    ax.set_xlim(window[0] * us, window[1] * us)
    ax.set_ylim(ticks[-1] - 0.55, ticks[0] + 0.55)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def say(name: str, blocks: list[list[Track]], tile, d: int) -> list[str]:
    """The lines beside the picture."""
    return [sentence(name, hidden(blocks)) + ".", *pace(blocks, tile, d)]
