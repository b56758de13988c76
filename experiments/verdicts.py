"""The claims about FlashAttention that experiment `claims` puts to the test, and how rows judge each of them.

The claims are those of an introductory article on FlashAttention-1 to -3, in our own words, each with the paper behind
it.  An experiment's own `claims(rows)` judges; what no single experiment can judge is judged here.

FA1: 2205.14135; FA2: 2307.08691; FA3: 2407.08608; online softmax: 1805.02867.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sandbox import catalog
from sandbox.measure import formulas, standard
from sandbox.variant import SIMULATOR

from . import loop_answer, memory, online_softmax, tile_answer
from .tables import count, gigabytes, milliseconds, total

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
NOT_HERE, UNTESTED = "not measurable here", "not yet tested"
VERDICTS = (HOLDS, IN_PART, FAILS, NOT_HERE, UNTESTED)
LONGER = {  # what experiments say more precisely: the precision is in their reason too
    "holds for thread blocks": IN_PART, "holds for warps": IN_PART, "does not show": FAILS,
    "does not hold with this tile": FAILS, "does not hold with these tiles": FAILS, "not asked here": UNTESTED,
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """In our words; where it is made; the experiments that test it, the first one foremost; the paper's figure."""

    number: int
    claim: str
    where: str
    experiments: tuple[str, ...]
    paper: str | None = None
    instead: str | None = None  # what tests it, where that is no experiment

    @property
    def tested_by(self) -> str:
        return self.instead or ", ".join(self.experiments)


GATE, BENCH, LAYOUTS = "the gate of every row", "bench", "its layout tests"
CLAIMS = (
    Claim(1, "standard attention stores S and P: O(N²) memory, which limits N", "FA1 §2.2", ("memory",),
          "17,024 MB at N=4096"),
    Claim(2, "merging maximum and sum in one pass is what lets softmax tile", "1805.02867", ("online_softmax",),
          "3 accesses an element, not 4"),
    Claim(3, "v1 saves HBM accesses, not FLOPs, and that makes it fast", "FA1 Theorem 2, Fig. 2",
          ("loop_order", "tile_size"), "40.3 → 4.4 GB, 41.7 → 7.3 ms"),
    Claim(4, "forward and backward need O(N) memory", "FA1 Theorem 1", ("memory",), "836 MB at N=4096"),
    Claim(5, "the result is exact, equal to standard attention", "FA1 Theorem 1", (), instead=GATE),
    Claim(6, "v1 fuses QKᵀ, softmax and PV into one kernel", "FA1 Algorithm 1", ("loop_order",)),
    Claim(7, "v2 swaps the loops: Q is read once, traffic falls", "FA2 Algorithm 1, §3.2", ("loop_order",)),
    Claim(8, "v2 divides work better among thread blocks and warps", "FA2 §3.2, 3.3", ("loop_order", "warp_partition"),
          "about 2 × v1, all in all"),
    Claim(9, "v2 does fewer non-matmul FLOPs", "FA2 §3.1", ("non_matmul",), "each is 16 × dearer"),
    Claim(10, "v2 may choose its tile by N and by the resources", "the article", ("tile_size",)),
    Claim(11, "v2 reaches only 35 % of an H100", "FA3 §1", (), "35 %", BENCH),
    Claim(12, "v3: some warps copy while the others multiply", "FA3 §3.1", ("pipelining",), "570 → 661 TFLOP/s"),
    Claim(13, "v3: softmax hides under GEMMs, in two stages and by ping-pong", "FA3 §3.1, 3.2",
          ("pipelining", "trace"), "582 → 661, 570 → 620–640 TFLOP/s"),
    Claim(14, "v3 is 1.5 to 2.0 times as fast as v2", "FA3 abstract", (), "up to 740 TFLOP/s, 75 %", BENCH),
    Claim(15, "FP8 nearly doubles that", "FA3 abstract", ("fp8_speed",), "close to 1.2 PFLOP/s"),
    Claim(16, "block scales and incoherent processing keep FP8's error small", "FA3 §3.3, Table 3", ("fp8_error",),
          "RMSE 2.4e-2 → 9.1e-3, 2.6 ×"),
    Claim(17, "FP8 needs a layout bridge between its GEMMs, and V K-major", "FA3 §3.3", (), instead=LAYOUTS),
)  # fmt: skip
V3 = 12  # the first claim about it
PEAK = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989}  # TFLOP/s of dense FP16, NVIDIA's data sheets


# ---- judging --------------------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """What is on record of one device.

    rows     the rows of each experiment; said: what its claims(rows) makes of them
    lacking  (verdict, why) where an experiment has no rows
    bench    rows of python -m sandbox bench
    """

    device: str
    rows: dict[str, list[dict]] = field(default_factory=dict)
    said: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    lacking: dict[str, tuple[str, str]] = field(default_factory=dict)
    bench: list[dict] = field(default_factory=list)

    def of(self, claim: Claim) -> list[dict]:
        """The rows that judge this claim."""
        if claim.instead == BENCH:
            return [row for row in self.bench if row["provider"] == "torch:flash"]
        names = self.rows if claim.instead == GATE else claim.experiments
        return [row for name in names for row in self.rows.get(name, [])]


def judge(claim: Claim, evidence: Evidence) -> dict:
    """The fields `ours`, `verdict` and `why` of a claim.  Raises ValueError on a verdict that is none of the five."""
    if claim.instead:
        verdict, why, ours = HERE[claim.number](evidence)
        return {"ours": ours, "verdict": verdict, "why": why}
    there = [name for name in claim.experiments if name in evidence.rows or name in evidence.lacking]
    told = {name: told_by(name, claim.number, evidence) for name in there}
    verdicts = [verdict for verdict, _ in told.values()]
    reasons = [f"{name}: {why}" if len(told) > 1 else why for name, (_, why) in told.items()]
    if missing := [name for name in claim.experiments if name not in there]:
        verdicts.append(UNTESTED)
        reasons.append(not_there(claim.number, " and ".join(missing)))
    return {"ours": figure(claim, told, evidence), "verdict": together(verdicts), "why": "; ".join(reasons)}


def figure(claim: Claim, told: dict, evidence: Evidence) -> str | None:
    """Ours, from the first experiment; where there are no words for it, the first clause of its reason."""
    verdict, why = told.get(claim.experiments[0], (UNTESTED, ""))
    if verdict in (NOT_HERE, UNTESTED):
        return None
    if claim.number in FIGURES:
        return FIGURES[claim.number](evidence.rows[claim.experiments[0]])
    return why.partition("; ")[0].partition(" (")[0]


def told_by(name: str, number: int, evidence: Evidence) -> tuple[str, str]:
    """(verdict, why): what one experiment says about a claim, or why it says nothing."""
    if name in evidence.lacking:
        return evidence.lacking[name]
    for claim, verdict, why in evidence.said[name]:
        if claim == number:
            return plain(verdict), why
    return UNTESTED, f"the rows of {name} lack what it compares, or failed the gate"


def plain(verdict: str) -> str:
    """One of the five verdicts.  Raises ValueError on words that are none."""
    verdict = LONGER.get(verdict, verdict)
    if verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r}: expected one of {', '.join([*VERDICTS, *LONGER])}")
    return verdict


def together(verdicts: list[str]) -> str:
    """The first that could tell; but where another one contradicts it, the claim holds in part at most."""
    told = [verdict for verdict in verdicts if verdict not in (NOT_HERE, UNTESTED)]
    if FAILS in told and set(told) != {FAILS}:
        return IN_PART
    return (told or verdicts)[0]


def not_there(number: int, what: str) -> str:
    no_v3 = number >= V3 and "v3" not in catalog.generations()
    return f"v3 is not there yet, nor {what}" if no_v3 else f"waits for {what}"


# ---- what no single experiment judges: evidence -> (verdict, why, our figure) ---------------------------------------


def claim_5(evidence: Evidence):
    """The result is exact: every row of every experiment that went through the gate; 8 bits claim no such thing."""
    exact = {name: [row for row in rows if not row.get("scales")] for name, rows in evidence.rows.items()}
    judged = [row for rows in exact.values() for row in rows if row["gate"]]
    if not judged:
        return UNTESTED, "no row went through the gate", None
    failed = [row for row in judged if row["gate"] != "passed"]
    ours = f"{len(judged) - len(failed):,} of {len(judged):,} rows pass"
    if ratios := [row["error_ratio"] for row in judged if row.get("error_ratio") is not None]:
        ours += f", at {max(ratios):.2g} of the bound at most"
    if failed:
        return FAILS, f"{failed[0]['variant']} N={failed[0]['N']} {failed[0]['gate']}", ours
    names = ", ".join(name for name, rows in exact.items() if rows)
    return HOLDS, f"no row of {names} is further off than rounding may be", ours


def speeds(rows: list[dict], who: str) -> dict[tuple, float]:
    """(run, problem) -> TFLOP/s of the fastest such provider, forward, in half precision; what quantizes is not."""
    found: dict[tuple, float] = {}
    for row in rows:
        half = row["dtype"] in ("fp16", "bf16") and not row.get("scales")
        if row["provider"].startswith(who) and row["direction"] == "fwd" and half:
            key = tuple(row[name] for name in ("run", "dtype", "B", "H", "N_q", "N_k", "d", "causal"))
            found[key] = max(found.get(key, 0), row["tflops"] or 0)
    return {key: tflops for key, tflops in found.items() if tflops}


def claim_11(evidence: Evidence):
    """v2 reaches only 35 % of an H100.  torch's flash backend is FlashAttention-2; up to 40 % is still near enough."""
    if evidence.device == SIMULATOR.name:
        return NOT_HERE, "an H100's speed is not for the simulator to tell", None
    if evidence.device not in PEAK:
        return NOT_HERE, f"it is about an H100, and this is {evidence.device}", None
    tflops = speeds(evidence.bench, "torch:flash")
    if not tflops:
        return UNTESTED, "no bench row of torch:flash: python -m sandbox bench fwd_v2 --grid paper", None
    best, peak = max(tflops.values()), PEAK[evidence.device]
    why = f"torch:flash, which is FlashAttention-2, at its best of {len(tflops)} points: {best:.0f} of {peak} TFLOP/s"
    return HOLDS if best / peak <= 0.4 else FAILS, why, f"{100 * best / peak:.0f} %"


def claim_14(evidence: Evidence):
    """v3 is 1.5 to 2.0 times as fast as v2, and reaches 740 TFLOP/s: each at its best, torch:flash being v2."""
    v3, v2 = speeds(evidence.bench, "sandbox:fwd_v3"), speeds(evidence.bench, "torch:flash")
    times = [v3[key] / v2[key] for key in v3 if key in v2]
    if not times:
        return UNTESTED, not_there(14, "its bench rows"), None
    parts = [max(times) >= 1.5, max(v3.values()) >= 740]
    ours = f"{min(times):.2f} to {max(times):.2f} ×, up to {max(v3.values()):.0f} TFLOP/s"
    return HOLDS if all(parts) else IN_PART if any(parts) else FAILS, f"over torch:flash, {len(times)} points", ours


def claim_17(evidence: Evidence):
    """A matter of layout: no row shows it."""
    return UNTESTED, not_there(17, LAYOUTS), None


HERE = {5: claim_5, 11: claim_11, 14: claim_14, 17: claim_17}


# ---- our figure: the rows of a claim's first experiment -> text ------------------------------------------------------


def grown(*ways: str):
    """The largest exponent of N, and the most bytes at the largest N, forward and backward."""

    def figure(rows) -> str:
        peaks = [memory.peaks(rows, way, "fwd+bwd") for way in ways]
        power = max(memory.exponent(peak) for peak in peaks)
        N = max(set.intersection(*map(set, peaks)))
        return f"N^{power:.2f}, {memory.size(max(peak[N] for peak in peaks))} at N={N}"

    return figure


def merged(rows) -> str:
    safe, online = (online_softmax.accesses(rows, name) for name in (online_softmax.SAFE, online_softmax.ONLINE))
    times = online_softmax.speed(rows).values()
    return f"{max(online):.3g}, not {min(safe):.3g}" + (f"; up to {max(times):.2f} × faster" if times else "")


def saved(rows) -> str:
    facts = loop_answer.Facts.of(rows)
    v1, std = facts.v1, facts.rows.get((standard.NAME, "fwd"), {})
    text = f"{count(formulas.standard(facts.problem).total)} → {count(total(v1))} accesses"
    if std.get("dram_bytes") and v1["dram_bytes"]:
        text = f"{gigabytes(std['dram_bytes'])} → {gigabytes(v1['dram_bytes'])}"
    return text + (f", {milliseconds(std)} → {milliseconds(v1)}" if std.get("seconds") and v1["seconds"] else "")


def fused(rows) -> str:
    facts = loop_answer.Facts.of(rows)
    v1, S = facts.v1, 4 * facts.row["B"] * facts.row["H"] * facts.N**2
    if v1["dram_bytes"]:
        return f"{gigabytes(v1['dram_bytes'])}; S and P alone: {gigabytes(S * facts.problem.itemsize)}"
    return f"{count(total(v1))} accesses; S and P alone: {count(S)}"


def swapped(rows) -> str:
    facts = loop_answer.Facts.of(rows)
    return f"{facts.fewer(*facts.kernels.loop):.2f} × fewer accesses"


def side_by_side(rows) -> str:
    facts = loop_answer.Facts.of(rows)
    return f"{facts.faster(*facts.kernels.forward[-2:]):.2f} × faster by the {facts.kernels.last}"


def chosen(rows) -> str:
    behind = [tile_answer.slower_by(rows, name) for name in tile_answer.names(rows) if "v2" in name]
    return f"the chooser within {max(slower for slower in behind if slower is not None):.1%} of the best"


FIGURES = {
    1: grown(memory.STANDARD), 2: merged, 3: saved, 4: grown("v1", "v2"), 6: fused, 7: swapped, 8: side_by_side,
    10: chosen,
}  # fmt: skip
