"""The picture of warp_partition: TFLOP/s by shape; where nothing was timed, bytes through shared memory a score."""

from __future__ import annotations

from sandbox import picture

from .warp_answer import (
    PAPER,
    SPLIT_K,
    SPLIT_Q,
    V1,
    alike,
    best,
    by_shape,
    fastest,
    filled,
    mask_of,
    mean,
    per_score,
    times,
)

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
        for m, kernel in enumerate(NAMES):
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
        for m, kernel in enumerate(NAMES):
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
