"""What the rows of loop_order say: which kernels it compares, by unit, and what changes from one to the next."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox import catalog
from sandbox.measure import formulas, standard
from sandbox.problem import Problem
from sandbox.variant import Tile

from .tables import gigabytes, milliseconds, number, problem_of, ratio, total
from .units import FMA, TENSOR

ERRATUM = (
    "Erratum.  The article behind this project has the two orders the wrong way round: it puts Q outside in V1 and K/V "
    "outside in V2.  The papers say the reverse.  FlashAttention-1, Algorithm 1, lines 5-8: K/V outside, Q inside, and "
    'O, l, m go to HBM and back at every step.  FlashAttention-2, Algorithm 1 and section 3.2: Q outside ("instead of '
    'the other way round in the original").  Both backward passes keep K/V outside.  The benefits that the article '
    "lists, Q read once and fewer accesses, belong to Q outside."
)


@dataclass(frozen=True)
class Kernels:
    """Those of one unit.

    forward   from v1 to v2; loop: those between which the loops are swapped
    last      what changes alone between the last two of `forward`
    backward  kernel -> how it is told; v2's comes last but for its deterministic twin
    """

    forward: tuple[str, ...]
    loop: tuple[str, str]
    last: str
    backward: dict[str, str]

    @property
    def v2(self) -> dict[str, str]:
        """direction -> v2's kernel."""
        return {"fwd": self.forward[-1], "bwd": tuple(self.backward)[-2]}

    def of(self, direction: str) -> tuple[str, ...]:
        return self.forward if direction == "fwd" else tuple(self.backward)


ON = {
    FMA: Kernels(
        ("fwd_v1", "fwd_v2_kv_outer", "fwd_v2_one_block", "fwd_v2"), ("fwd_v2_kv_outer", "fwd_v2_one_block"), "grid",
        {"bwd_v1": "v1", "bwd_v2": "v2, dQ by atomic adds", "bwd_v2_deterministic": "v2, deterministic"},
    ),
    TENSOR: Kernels(
        ("fwd_v1_mma", "fwd_v2_mma_split_k", "fwd_v2_mma"), ("fwd_v1_mma", "fwd_v2_mma_split_k"), "warps",
        {"bwd_v2_mma": "v2, dQ by atomic adds", "bwd_v2_mma_deterministic": "v2, deterministic"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """The rows of one run at its largest N, by variant; standard attention's floor where it was not run."""

    rows: dict[tuple[str, str], dict]
    N: int
    kernels: Kernels

    @classmethod
    def of(cls, rows: list[dict]) -> Facts | None:
        """None where there is no N at which every forward variant ran and passed the gate."""
        names = {row["variant"] for row in rows}
        kernels = ON[TENSOR if names & set(ON[TENSOR].forward) else FMA]
        sound = [row for row in rows if row["gate"] in ("passed", None) and not row["infeasible"]]
        done = [row for row in sound if total(row) is not None]
        for N in sorted({row["N"] for row in done}, reverse=True):
            at_N = {(row["variant"], row["direction"]): row for row in done if row["N"] == N}
            if all((name, "fwd") in at_N for name in kernels.forward):
                return cls(at_N, N, kernels)
        return None

    def __getitem__(self, variant: str) -> dict:
        return self.rows[variant, variant[:3]]

    def has(self, *variants: str) -> bool:
        return all((variant, variant[:3]) in self.rows for variant in variants)

    @property
    def row(self) -> dict:
        return self[self.kernels.v2["fwd"]]

    @property
    def v1(self) -> dict:
        return self[self.kernels.forward[0]]

    @property
    def loop_alone(self) -> bool:
        """Whether one control differs from the other in nothing else."""
        return self.kernels is ON[FMA]

    @property
    def problem(self) -> Problem:
        return problem_of(self.row)

    @property
    def timed(self) -> bool:
        return all(self[name]["seconds"] for name in self.kernels.forward)

    def fewer(self, before: str, after: str) -> float:
        return total(self[before]) / total(self[after])

    def faster(self, before: str, after: str) -> float:
        return self[before]["seconds"] / self[after]["seconds"]


def thread_blocks(row: dict) -> int:
    alone = catalog.find(row["variant"]).one_block_a_head
    return row["B"] * row["H"] * (1 if alone else -(-row["N"] // row["Br"]))


def answer(rows: list[dict]) -> str:
    facts = Facts.of(rows)
    if facts is None:
        return f"Nothing to compare: at no N every forward variant ran with this tile and passed the gate.\n\n{ERRATUM}"
    parts = [because(facts), on_the_grid(facts) if facts.loop_alone else on_the_warps(facts)]
    if facts.has(*facts.kernels.backward):
        parts.append(backward(facts))
    text = "\n".join(parts) + f"\n\n{ERRATUM}\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def because(facts: Facts) -> str:
    row, (kv, q) = facts.row, (facts[name] for name in facts.kernels.loop)
    fewer = facts.fewer(*facts.kernels.loop)
    before, after = (formulas.traffic(x["variant"], facts.problem, Tile(row["Br"], row["Bc"])) for x in (kv, q))

    def change(*arrays):
        return " become ".join(number(sum(t.of(array) for array in arrays)) for t in (before, after))

    skips = not facts.loop_alone and row["causal"]
    text = (
        f"Why swap the loops?  At N={facts.N}, d={row['d']}, tile {row['Br']}x{row['Bc']}, with Q outside a forward "
        f"takes {number(total(q))} global accesses instead of {number(total(kv))}: {ratio(fewer, 'fewer', 'more')} "
        f"by {'the loop and by skipping tiles that the mask empties' if skips else 'the loop alone'}.  O, l and m stay "
        f"on chip ({change('O', 'l', 'm')}) and Q is read once ({change('Q')}); "
        f"re-reading K and V for every row block ({change('K', 'V')}) costs "
        f"{'less' if fewer > 1 else 'more, with this tile,'} than that."
    )
    if facts.timed:
        faster = facts.faster(*facts.kernels.loop)
        text += f"  In time: {milliseconds(kv)} become {milliseconds(q)}, {ratio(faster, 'faster', 'slower')}"
        text += "." if facts.loop_alone else f"; but {with_the_loop(facts)}."
    return text


def with_the_loop(facts: Facts) -> str:
    """What else changes from v1 to the first kernel with Q outside, on the tensor cores."""
    kv, q = (facts[name] for name in facts.kernels.loop)
    return (
        f"{_blocks(kv, q)} with it, O is normalised once instead of at every step"
        f"{', and tiles that the mask empties are skipped' * facts.row['causal']}: no kernel on the tensor cores takes "
        "these apart; --unit fma does"
    )


def on_the_grid(facts: Facts) -> str:
    one, many = (facts[name] for name in facts.kernels.forward[-2:])
    text = f"The grid alone, {_blocks(one, many)}, "
    if total(one) == total(many):
        text += "moves the same elements"
    else:
        text += f"takes accesses from {number(total(one))} to {number(total(many))}"
    if facts.timed:
        faster = facts.faster(*facts.kernels.forward[-2:])
        return text + f" and takes {milliseconds(one)} to {milliseconds(many)}: {ratio(faster, 'faster', 'slower')}."
    return text + "; what it is worth is time, which the simulator cannot tell."


def on_the_warps(facts: Facts) -> str:
    k, q = (facts[name] for name in facts.kernels.forward[-2:])
    text = "The warps alone, which share keys instead of rows (split-Q instead of split-K), move the same elements"
    if facts.timed:
        faster = facts.faster(*facts.kernels.forward[-2:])
        return text + f" and take {milliseconds(k)} to {milliseconds(q)}: {ratio(faster, 'faster', 'slower')}."
    return text + "; what passes through shared memory, and time: experiment warp_partition."


def backward(facts: Facts) -> str:
    ours = {told: facts[name] for name, told in facts.kernels.backward.items()}
    parts = [f"{number(total(row))} ({told})" for told, row in ours.items()]
    text = f"Backward, K/V outside in all, accesses: {', '.join(parts)}"
    if all(row["seconds"] for row in ours.values()):
        text += f"; {', '.join(map(milliseconds, ours.values()))}"
    return text + "."


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), each from the numbers of these rows."""
    facts = Facts.of(rows)
    return [claim_3(facts), claim_6(facts), claim_7(facts), claim_8(facts)] if facts else []


def claim_3(facts: Facts):
    """v1 cuts HBM accesses, not FLOPs; the saving is what makes it fast."""
    v1, floor = facts.v1, formulas.standard(facts.problem).total
    fewer = floor / total(v1)
    why = f"{v1['variant']} takes {number(total(v1))} accesses, {ratio(fewer, 'fewer', 'more')} than standard "
    why += "attention's floor"
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
    v1, S = facts.v1, 4 * facts.row["B"] * facts.row["H"] * facts.N**2
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
    kv, q = (facts[name] for name in facts.kernels.loop)
    fewer = facts.fewer(*facts.kernels.loop)
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
    before, after = (facts[name] for name in facts.kernels.forward[-2:])
    what = _blocks(before, after) if facts.loop_alone else "split-K becomes split-Q"
    if not facts.timed:
        return 8, "not measurable here", f"{what}, but the simulator has no time"
    faster = facts.faster(*facts.kernels.forward[-2:])
    asked, other = ("thread blocks", "warps") if facts.loop_alone else ("warps", "thread blocks")
    time = f"{milliseconds(before)} become {milliseconds(after)}, {ratio(faster, 'faster', 'slower')}"
    verdict = f"holds for {asked}" if faster > 1.05 else "does not show"
    return 8, verdict, f"{what}, {time}; {other}: not asked here"


def _verdict(*parts: bool) -> str:
    return "holds" if all(parts) else "holds in part" if any(parts) else "does not hold"


def _often(n: float) -> str:
    return "once" if n == 1 else f"{n:.3g} times"


def _blocks(one: dict, many: dict) -> str:
    n = thread_blocks(one)
    return f"{n:,} thread block{'s' * (n != 1)} become{'s' * (n == 1)} {thread_blocks(many):,}"
