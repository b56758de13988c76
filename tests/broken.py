"""Kernels broken on purpose: a real kernel file with a line or two edited, each a mistake that one makes.

`DEFECTS` names each mistake, where it must be refused and in what words, and, where there are such places, where it
does not show: a gate that looks there only would let it pass.
"""

from __future__ import annotations

import linecache
import types
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import kernels
from sandbox.device.simulator import Divergence, Race, SimulatorError, Uninitialised
from sandbox.mask import Mask
from sandbox.problem import Problem
from sandbox.variant import Tile, Variant

TILE = Tile(8, 8)


def edited(name: str, *edits: tuple[str, str]) -> Variant:
    """The VARIANT of kernels/{name}.py after each `old` of (old, new), which occurs once, has become `new`."""
    source = (Path(kernels.__path__[0]) / f"{name}.py").read_text()
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"kernels/{name}.py has {source.count(old)} times, expected once: {old!r}")
        source = source.replace(old, new)
    module, file = types.ModuleType(f"{kernels.__name__}.{name}_edited"), f"<{name}, edited>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # tracebacks show its lines
    exec(compile(source, file, "exec"), module.__dict__)
    return module.VARIANT


@dataclass(frozen=True)
class Defect:
    what: str
    kernel: str
    edits: tuple[tuple[str, str], ...]
    on: Problem  # is refused there
    words: str = ""  # that the verdict then says
    raises: type[SimulatorError] | None = None  # or what the simulator finds; a GPU may never show it
    hidden: tuple[Problem, ...] = field(default=())  # passes there

    @property
    def variant(self) -> Variant:
        return edited(self.kernel, *self.edits)


def problem(N_q, N_k, H=2, H_kv=1, dtype="fp32", softcap=0.0, **mask) -> Problem:
    return Problem(1, H, H_kv, N_q, N_k, 8, dtype, mask=Mask(**mask), softcap=softcap)


RAGGED = problem(17, 19)  # three tiles each way, the last ones short
BARRIER = "cuda.syncthreads()"
NEVER_WRITTEN = "off by inf"

FORWARD = [
    Defect(
        "the last row of every block is not written", "fwd_v2",
        ((f"{BARRIER}\n        store_O(O[b, :, h], sQ, i0, min(i0 + Br, N_q), ty, tx)",
          f"{BARRIER}\n        store_O(O[b, :, h], sQ, i0, min(i0 + Br, N_q) - 1, ty, tx)"),),
        RAGGED, f"O is {NEVER_WRITTEN}",
    ),
    Defect(
        "the last row block is not written where it is short", "fwd_v2",
        (("        store_O(O[b", "        if i0 + Br <= N_q:\n            store_O(O[b"),),
        RAGGED, f"O is {NEVER_WRITTEN}", hidden=(problem(16, 19),),
    ),
    Defect(
        "LSE is not written", "fwd_v1",
        (("if j == Tc - 1:\n                            LSE", "if j == Tc:\n                            LSE"),),
        RAGGED, f"LSE is {NEVER_WRITTEN}",
    ),
    Defect(
        "a query is overwritten once it has been used", "fwd_v2",
        (("        store_O(O[b",
          "        if thread == 0:\n            Q[b, i0, h, 0] = narrow(ONE)\n        store_O(O[b"),),
        RAGGED, "input q was changed",
    ),
    Defect(
        "padded keys are seen", "fwd_v2",
        (("i0, first, end, N_q, N_k,", "i0, first, end, N_q, N_k + Bc,"),
         ("i0, j + 1, end, N_q, N_k,", "i0, j + 1, end, N_q, N_k + Bc,")),
        RAGGED, "O is off", hidden=(problem(17, 16),),
    ),
    Defect(
        "a key tile that holds a single key is skipped", "fwd_v2",
        (("while j < end:", "while j < end - (N_k % Bc == 1):"),),
        problem(8, 17), "O is off", hidden=(problem(8, 16), RAGGED),
    ),
    Defect(
        "the last row of a full tile is 0", "fwd_v2",
        (("ralpha[a] = ONE / l if l != ZERO else", "ralpha[a] = ONE / l if l != ZERO and (row + 1) % Br else"),),
        RAGGED, "O is off", hidden=(problem(7, 19),),
    ),
    Defect(
        "LSE is off by ln 2", "fwd_v2",
        (("rm[a] + log(l)", "rm[a] + log(l + l)"),),
        RAGGED, "LSE is off by 0.693",
    ),
    Defect(
        "O is not rescaled when the maximum rises", "fwd_v2",
        (("            rescale_O(rO, ralpha)\n            put_P", "            put_P"),),
        RAGGED, "O is off", hidden=(problem(17, 8),),
    ),
    Defect(
        "l is the last tile's alone", "fwd_v1",
        (("rl[a] = l_old + row_sum(rl[a])", "rl[a] = row_sum(rl[a])"),),
        RAGGED, "O is off", hidden=(problem(17, 8),),
    ),
    Defect(
        "the causal mask is off by one", "fwd_v2",
        (("problem.softcap, lo, hi)", "problem.softcap, lo, hi + 1)"),),
        problem(17, 19, causal=True), "O is off", hidden=(RAGGED,),
    ),
    Defect(
        "the causal mask begins at the top left", "fwd_v2",
        (("problem.mask.band(problem.N_q, problem.N_k)", "problem.mask.band(problem.N_q, problem.N_q)"),),
        problem(17, 19, causal=True), "O is off", hidden=(problem(17, 17, causal=True),),
    ),
    Defect(
        "a row that sees nothing is NaN", "fwd_v2",
        (("ralpha[a] = ONE / l if l != ZERO else ZERO", "ralpha[a] = ONE / l"),),
        problem(19, 9, causal=True), f"O is {NEVER_WRITTEN}", hidden=(problem(9, 19, causal=True),),
    ),
    Defect(
        "query heads take the keys of another group", "fwd_v2",
        (("V[b, :, h // group]", "V[b, :, h % V.shape[2]]"),),
        problem(9, 9, H=4, H_kv=2), "O is off", hidden=(problem(9, 9, H=2, H_kv=2), RAGGED),
    ),
    *(
        Defect(
            f"O is 1 + 2⁻⁶ times too large, {dtype}", "fwd_v2",
            (("ralpha[a] = ONE / l", "ralpha[a] = float32(1.015625) / l"),),
            problem(17, 19, dtype=dtype), "O is off",
        )
        for dtype in ("fp32", "fp16")
    ),
    Defect(
        "no barrier between a copy of K and its product with Q", "fwd_v2",
        ((f"{BARRIER}  # K is here; the V of the step before has been read", "pass"),),
        RAGGED, raises=Uninitialised,
    ),
    Defect(
        "no barrier before the next K is copied over this one", "fwd_v2",
        ((f"{BARRIER}  # V is here; K has been read", "pass"),),
        RAGGED, raises=Race,
    ),
    Defect(
        "a barrier, but no wait for the copy of K", "fwd_v2",
        ((f"arrive()\n            {BARRIER}  # K is here", f"{BARRIER}  # K is here"),),
        RAGGED, raises=Race,
    ),
    Defect(
        "a block ends while a copy is on its way", "fwd_v2",
        (("        if j < end:\n            copy_KV", "        if True:\n            copy_KV"),
         (f"        arrive()\n        {BARRIER}  # sQ has been read", f"        {BARRIER}  # sQ has been read")),
        problem(17, 0), raises=SimulatorError,
    ),
    Defect(
        "the lanes of a row do not wait for its P", "fwd_v2",
        (("cuda.syncwarp()", "pass"),),
        RAGGED, raises=Uninitialised,
    ),
    Defect(
        "no barrier after O, l and m are loaded", "fwd_v1",
        ((f"                {BARRIER}  # O, l and m are here; Q has been read\n", ""),),
        RAGGED, raises=Race,
    ),
    Defect(
        "threads past the end return before the last barrier", "fwd_v2",
        (("        # O = diag(l)⁻¹ O,", "        if i0 + ty >= N_q:\n            return\n        # O = diag(l)⁻¹ O,"),),
        RAGGED, raises=Divergence, hidden=(problem(16, 19),),
    ),
]  # fmt: skip

BACKWARD = [
    Defect(
        "dV is never written", "bwd_v2",
        (("        store_dKV(dV[b", "        # store_dKV(dV[b"),),
        RAGGED, f"dV is {NEVER_WRITTEN}",
    ),
    Defect(
        "dK stays 0", "bwd_v2",
        (("            dStQ(rdK, sdS, sQ, ty, tx)\n", ""),),
        RAGGED, "dK is off",
    ),
    Defect(
        "dQ is added to what was there before", "bwd_v2",
        (("                dQ_acc[b, i, h, c] = ZERO\n", ""),),
        RAGGED, f"dQ is {NEVER_WRITTEN}",
    ),
    Defect(
        "D is left out of dS", "bwd_v2",
        (("(rdP[a, e] - delta)", "rdP[a, e]"),),
        RAGGED, "dQ is off",
    ),
    Defect(
        "the scale is left out of dS", "bwd_v2",
        (("* slope(s, softcap) * scale if", "* slope(s, softcap) if"),),
        RAGGED, "dQ is off",
    ),
    Defect(
        "the softcap's slope is left out of dS", "bwd_v2",
        (("* slope(s, softcap) * scale if", "* scale if"),),
        problem(9, 9, softcap=1.0), "dQ is off", hidden=(problem(9, 9),),
    ),
    Defect(
        "only the first query head of a group adds to dK and dV", "bwd_v2",
        (("for g in range(group * (end - first)):", "for g in range(end - first):"),),
        RAGGED, "dV is off", hidden=(problem(9, 9, H=1),),
    ),
    Defect(
        "dQ is the last key tile's alone", "bwd_v1",
        (("add_dQ(dQ[b, :, h], dQ_acc[b, :, h], sQ, i0, end, ty, tx)", "store_dQ(dQ[b, :, h], sQ, i0, end, ty, tx)"),),
        RAGGED, "dQ is off", hidden=(problem(17, 8),),
    ),
    Defect(
        "dQ is summed by plain additions", "bwd_v2",
        (("add_dQ = blocks.atomic_add()", "add_dQ = blocks.accumulate()"),
         ("add_dQ(dQ_acc[b, :, h], sQ,", "add_dQ(dQ_acc[b, :, h], dQ_acc[b, :, h], sQ,")),
        RAGGED, raises=Race, hidden=(problem(17, 8, H=1),),
    ),
    Defect(
        "no barrier between P and its product with dO", "bwd_v2",
        ((f"            {BARRIER}\n\n            # dV +=", "            # dV +="),),
        RAGGED, raises=Uninitialised,
    ),
    Defect(
        "dQ takes the place of Q while others still read it", "bwd_v2",
        ((f"            {BARRIER}  # sQ has been read: dQ leaves through it\n", ""),),
        RAGGED, raises=Race,
    ),
]  # fmt: skip

DEFECTS = [*FORWARD, *BACKWARD]

# ------------------------------------------------------------------- right the first time, wrong when called once more

LAUNCH = "    def launch(problem, Q, K, V, mask, O, LSE):\n"

STALE_OUTPUT = (LAUNCH, f"""\
    written = set()

{LAUNCH}\
        if O.data_ptr() in written:
            return
        written.add(O.data_ptr())
""")  # fmt: skip

CACHED_BY_INPUT = (LAUNCH, f"""\
    results = {{}}

{LAUNCH}\
        if Q.data_ptr() in results:
            for x, result in zip((O, LSE), results[Q.data_ptr()]):
                x.copy_(result)
            return
        results[Q.data_ptr()] = O, LSE
""")  # fmt: skip
