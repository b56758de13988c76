"""Where a kernel is wrong: a picture of its output in text, or the line of the kernel that the simulator stopped at.
[floor 3]"""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import torch

from .cases import Case

ROWS, COLUMNS = 36, 64  # of a picture, at most
RIGHT, SOME, WRONG, INFINITE = "·", "+", "#", "x"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


# ---- wrong numbers --------------------------------------------------------------------------------------------------


def picture(excess: dict[str, torch.Tensor], case: Case) -> str:
    """Rows x columns of each failed output's worst head, tile borders drawn, and a sentence each.

    excess  output -> error ÷ allowance: O, dQ, dK, dV [B, N, H, d], LSE [B, H, N], Y [rows, columns]
    """
    return "\n\n".join(_one(name, ratios.cpu(), case) for name, ratios in excess.items())


def worst_head(name: str, ratios: torch.Tensor) -> tuple[torch.Tensor, str, str]:
    """(error ÷ allowance [rows, columns] of the worst head, which that is, how many heads are wrong)."""
    if name == "Y":
        return ratios, "", ""
    heads = ratios[..., None] if name == "LSE" else ratios.transpose(1, 2)  # [B, H, N, d or 1]
    B, H = heads.shape[:2]
    worst = int(heads.flatten(2).amax(-1).flatten().argmax())
    wrong = int((heads > 1).flatten(2).any(-1).sum())
    batch = f", batch {worst // H}" if B > 1 else ""
    how_many = "" if B * H == 1 else "; so are all heads" if wrong == B * H else f"; {wrong} of {B * H} heads are wrong"
    return heads[worst // H, worst % H], f" head {worst % H}{batch}", how_many.replace("all heads", "the other heads")


def row_tile(name: str, case: Case) -> int | None:
    """Rows of one tile of this output; None where rows are not tiled."""
    if case.tile is None:
        return None
    return case.tile.Bc if name in ("dK", "dV") else case.tile.Br


def _one(name, ratios, case) -> str:
    ratios, head, others = worst_head(name, ratios)
    step, (N, width) = row_tile(name, case), ratios.shape
    wrong = ratios > 1
    tall, wide = _block(N, ROWS, step), -(-width // COLUMNS)
    each = "" if tall * wide == 1 else f", a mark for {tall} x {wide}"
    tiles = f", row tiles of {step}" if step else ""
    legend = f"{RIGHT} right  {WRONG} wrong" + f"  {SOME} some wrong" * (tall * wide > 1)
    legend += f"  {INFINITE} not finite, or never written" * bool((ratios == torch.inf).any())
    lines = [f"{name}{head}, {N} x {width}{tiles}{each}:   {legend}"]
    for i in range(0, N, tall):
        if step and i and i % step == 0:
            lines.append(" " * 8 + "├" + "─" * -(-width // wide) + "┤")
        marks = [_mark(ratios[i : i + tall, j : j + wide]) for j in range(0, width, wide)]
        lines.append(f"{i:>7} │{''.join(marks)}│")
    return "\n".join([*lines, f"{name}: {sentence(wrong, step)}{others}"])


def _mark(ratios) -> str:
    wrong = ratios > 1
    if not wrong.any():
        return RIGHT
    if not wrong.all():
        return SOME
    return INFINITE if (ratios == torch.inf).any() else WRONG


def _block(N: int, most: int, step: int | None) -> int:
    """Rows of one mark: few enough marks, and no mark across a tile's border."""
    tall = max(1, -(-N // most))
    while step and tall < N and step % tall and tall % step:
        tall += 1
    return tall


def sentence(wrong: torch.Tensor, step: int | None) -> str:
    """Which rows and columns of bool [rows, columns] are wrong, in the terms of row tiles of `step` rows."""
    N, width = wrong.shape
    rows, columns = wrong.any(1).nonzero()[:, 0].tolist(), wrong.any(0).nonzero()[:, 0].tolist()
    what = _ranges("row", rows, N)
    if width > 1:
        what += ", " + _ranges("column", columns, width)
    if not bool(wrong[rows][:, columns].all()):
        what += f" ({int(wrong.sum())} of these {len(rows) * len(columns)} elements)"
    tiles = _in_tiles(rows, N, step) if step else ""
    return what + (f": {tiles}" if tiles else "")


def _ranges(what: str, numbers: list[int], of: int) -> str:
    """`all rows`, `row 3`, `rows 8-15, 19`."""
    if len(numbers) == of:
        return f"all {what}s" if of > 1 else f"the only {what}"
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(words) > 6:
        words = [*words[:4], "…", words[-1]]
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(words)}"


def _in_tiles(rows: list[int], N: int, step: int) -> str:
    """What these rows are among tiles of `step` rows; empty where there is no short way to say it."""
    count, wrong = -(-N // step), set(rows)
    if count == 1:
        return ""
    if len(wrong) == N:
        return "every row tile"
    tiles = sorted({r // step for r in rows})
    whole = [t for t in range(count) if set(range(t * step, min(N, t * step + step))) <= wrong]
    if whole == tiles:
        if len(tiles) == 1:
            (t,) = tiles
            short = f", which has {N - t * step} of {step} rows" if N < (t + 1) * step else ""
            return f"the {_nth(t, count)} row tile{short}"
        if tiles == list(range(count - len(tiles), count)):
            return f"every row tile from the {_nth(tiles[0], count)} on"
        if tiles == list(range(len(tiles))):
            return f"the first {len(tiles)} of {count} row tiles"
        return f"{len(tiles)} of {count} row tiles, each whole"
    places = {r % step for r in rows}
    if len(places) == 1 and len(wrong) > 1:
        (place,) = places
        if wrong == set(range(place, N, step)):
            return f"{_row(place, step)} of every row tile" + (
                " that is full" if N % step and place >= N % step else ""
            )
    lasts = {min(N, t * step + step) - 1 for t in range(count)}
    if wrong == lasts:
        return "the last row of every row tile"
    if len(tiles) == 1:
        return f"in the {_nth(tiles[0], count)} row tile"
    return ""


def _nth(t: int, count: int) -> str:
    if t == count - 1 and t > 1:
        return "last"
    return ORDINALS[t] if t < len(ORDINALS) else f"{t + 1}th"


def _row(place: int, step: int) -> str:
    return "the first row" if place == 0 else "the last row" if place == step - 1 else f"row {place}"


def draw(excess: dict[str, torch.Tensor], case: Case, title: str, path: Path) -> None:
    """The same as a PNG: error ÷ allowance of each failed output's worst head, tile borders drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    figure, all_axes = pyplot.subplots(1, len(excess), squeeze=False, figsize=(2 + 4 * len(excess), 5))
    for axes, (name, ratios) in zip(all_axes[0], excess.items()):
        ratios, head, _ = worst_head(name, ratios.cpu())
        finite = ratios[ratios.isfinite()]
        most = max(10.0, float(finite.max())) if finite.numel() else 10.0
        image = axes.imshow(
            ratios.clamp(1e-3, most).numpy(), norm=LogNorm(1e-3, most), cmap="viridis", aspect="auto",
            interpolation="nearest", extent=(0, ratios.shape[1], ratios.shape[0], 0),
        )  # fmt: skip
        if step := row_tile(name, case):
            for row in range(step, ratios.shape[0], step):
                axes.axhline(row, color="white", linewidth=1)
        axes.set(title=f"{name}{head}", xlabel="column", ylabel="row")
        figure.colorbar(image, ax=axes, label="error ÷ allowance; wrong above 1")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    draft = path.with_name(f".{path.name}")
    try:
        figure.savefig(draft, dpi=120, format="png")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
        pyplot.close(figure)


# ---- what stopped the kernel ----------------------------------------------------------------------------------------


def finding(error: Exception, file: str) -> str:
    """The kernel's lines that the simulator's finding is about; the finding itself names array, element and threads."""
    sites = list(dict.fromkeys(getattr(error, "sites", ()))) or _frames(error, file)[-1:]
    return "\n".join(_line(*site) for site in sites)


def raised(error: Exception, file: str) -> str:
    """The lines of the kernel's file that an exception passed through, and what else it says."""
    lines = [_line(*site) for site in _frames(error, file)]
    more = [line for line in str(error).splitlines() if line.strip()][1:]
    return "\n".join([*lines, *("  " + line for line in more[:12])])


def context_is_lost(error: Exception) -> bool:
    """Whether this is an error after which CUDA runs nothing more in this process."""
    words = ("illegal", "misaligned", "launch failure", "launch_failed", "invalid_address", "device-side assert")
    return any(word in str(error).lower() for word in words)


def _frames(error, file) -> list[tuple[str, int]]:
    return [(file, line) for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]


def _line(file: str, line: int) -> str:
    return f"  {Path(file).name}:{line}   {linecache.getline(file, line).strip()}"
