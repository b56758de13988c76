"""What the rows of tile_size say: traffic by the sides of a tile, time, and how far the chooser is from the best."""

from __future__ import annotations

from sandbox.measure import formulas

from .tables import milliseconds, number, problem_of, ratio, total

V1 = "fwd_v1", "fwd_v1_mma"


def stays(row: dict) -> str:
    """The side of the tile that stays on chip while the inner loop runs."""
    return "Br" if row["loop_order"] == "q_outer" else "Bc"


def over_theorem(row: dict) -> float:
    """Accesses over N^2 d^2 / M, where M is what FA1's Algorithm 1 needs for a block this high: 4 d of it."""
    p = problem_of(row)
    return total(row) / formulas.theorem(p, formulas.on_chip(p, row[stays(row)]))["flash"]


def measured(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["variant"] == name and not row["infeasible"] and total(row) is not None]


def names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def answer(rows: list[dict]) -> str:
    lines = [line for name in names(rows) for line in (on_traffic(rows, name), on_time(rows, name)) if line]
    if misfits := [row for row in rows if row["infeasible"]]:
        first = misfits[0]
        why = f"{first['variant']} {tile_of(first)}: {first['infeasible']}"
        lines.append(f"{len(misfits)} of {len(rows)} tiles cannot run; {why}.")
    lines.append(
        "To compare, FA1, Figure 2 (middle): traffic and time fall as Bc goes from 64 to 256; then time is flat."
    )
    text = "\n".join(["How large should a tile be?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_traffic(rows: list[dict], name: str) -> str:
    """What each side of the tile does to the accesses, the other one held."""
    ours = measured(rows, name)
    if not ours:
        return f"{name}: no tile runs."
    held = stays(ours[0])
    parts = []
    for side, other in ((held, _other(held)), (_other(held), held)):
        small, large = _span(ours, side, other)
        if small[side] < large[side]:
            fewer = total(small) / total(large)
            words = "changes nothing" if fewer == 1 else "takes " + ratio(fewer, "fewer accesses", "more accesses")
            parts.append(f"{side} from {small[side]} to {large[side]} {words}")
    constants = [over_theorem(row) for row in ours]
    parts.append(f"{min(constants):.1f} to {max(constants):.1f} x N²d²/M, M = 4d·{held}, at every tile")
    return f"{name}: " + "; ".join(parts) + "."


def _span(rows: list[dict], side: str, other: str) -> tuple[dict, dict]:
    """The rows of the smallest and the largest side, where the other side is what most sizes of it run with."""
    lines = [[row for row in rows if row[other] == size] for size in sorted({row[other] for row in rows})]
    line = sorted(max(reversed(lines), key=len), key=lambda row: row[side])
    return line[0], line[-1]


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    return [claim(rows) for claim in (claim_3, claim_10)]


def claim_3(rows: list[dict]):
    """v1 cuts HBM accesses (Theorem 2: N^2 d^2 / M); the saving is what makes it fast."""
    name = next((name for name in V1 if name in names(rows)), V1[0])
    ours = measured(rows, name)
    if not ours:
        return 3, "not asked here", f"{name} was not run"
    floor = formulas.standard(problem_of(ours[0])).total
    below = [row for row in ours if total(row) < floor]
    why = f"{name} takes fewer accesses than standard attention's floor, {number(floor)}, "
    why += f"at {len(below)} of {len(ours)} tiles"
    constants = [over_theorem(row) for row in ours]
    if len({row["Bc"] for row in ours}) > 1:
        why += f", and they follow N²d²/M within {max(constants) / min(constants) - 1:.0%}"
    small, large = _span(ours, "Bc", "Br")
    if small["Bc"] < large["Bc"]:
        why += f"; Bc from {small['Bc']} to {large['Bc']} takes "
        why += ratio(total(small) / total(large), "fewer accesses", "more accesses")
        if small["seconds"] and large["seconds"]:
            why += f" and is {ratio(small['seconds'] / large['seconds'], 'faster', 'slower')}"
    return 3, "holds in part" if below else "does not hold with these tiles", why + "; what makes it fast: loop_order"


def claim_10(rows: list[dict]):
    """v2 may choose tile sizes from the sequence length and the resources."""
    behind = {name: slower_by(rows, name) for name in names(rows) if "v2" in name}
    behind = {name: x for name, x in behind.items() if x is not None}
    if not behind:
        return 10, "not measurable here", "only time tells the chooser's tile from the best one"
    why = ", ".join(f"{name} {x:.1%}" for name, x in behind.items())
    verdict = "holds" if max(behind.values()) < 0.05 else "holds in part"
    return 10, verdict, f"the chooser's tile is slower than the best of the sweep by: {why}"


def slower_by(rows: list[dict], name: str) -> float | None:
    """How much slower the chooser's tile is than the fastest one."""
    ours = [row for row in measured(rows, name) if row["seconds"]]
    chosen = [row["seconds"] for row in ours if row["chosen"]]
    return chosen[0] / min(row["seconds"] for row in ours) - 1 if chosen else None


def on_time(rows: list[dict], name: str) -> str | None:
    ours = [row for row in measured(rows, name) if row["seconds"]]
    if not ours:
        return None
    best, chosen = min(ours, key=lambda row: row["seconds"]), [row for row in ours if row["chosen"]]
    text = f"{name} is fastest with {tile_of(best)}, {milliseconds(best)}"
    if not chosen:
        return text + "; the chooser's tile did not run."
    behind = slower_by(rows, name)
    return text + f"; the chooser takes {tile_of(chosen[0])}, " + (f"{behind:.1%} slower." if behind else "the same.")


def tile_of(row: dict) -> str:
    return f"{row['Br']}x{row['Bc']}"


def _other(side: str) -> str:
    return {"Br": "Bc", "Bc": "Br"}[side]
