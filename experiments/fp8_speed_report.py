"""What the rows of fp8_speed say: from which N on FP8 pays, claim 15, a table and a picture."""

from __future__ import annotations

from sandbox import picture
from sandbox.measure import bench
from sandbox.variant import SIMULATOR

from . import tables
from .tables import milliseconds

KERNEL, HEADS, FROM_BF16 = "fwd_v3_fp8", "fwd_v3_fp8 scales=head", "fwd_v3_fp8 from bf16"
ROW_MAJOR, ROW_MAJOR_HEADS = f"{KERNEL} row-major V", f"{HEADS} row-major V"
TWO_LEVELS = "fwd_v3_fp8 two_level=True"
V3, CUDNN, PASS = "fwd_v3", "torch:cudnn", "quantize"
COLORS = {
    KERNEL: picture.BLUE, HEADS: picture.SKY, FROM_BF16: picture.VERMILION, V3: picture.GREEN, CUDNN: picture.GREY,
}  # fmt: skip
TOLD = 4096, 16384
PAPER, NEARLY = (740, 1200), 0.95  # TFLOP/s in FP16 and in FP8, FA3's abstract; how near is near enough
LARGEST = 256  # head dimension: where products outweigh the softmax most


def at(rows: list[dict], provider: str, d: int, causal: bool) -> dict[int, dict]:
    """N -> the row, where it was timed, shortest first."""
    ours = [row for row in rows if (row["provider"], row["d"], row["causal"]) == (provider, d, causal)]
    return {row["N"]: row for row in sorted(ours, key=lambda row: row["N"]) if row["seconds"]}


def ratios(rows: list[dict], provider: str, d: int, causal: bool, field="over_v3") -> dict[int, float]:
    return {N: row[field] for N, row in at(rows, provider, d, causal).items() if row[field]}


def pays(rows: list[dict], d: int, causal: bool) -> int | None:
    """The least N from which on FP8 with its quantization is faster than fwd_v3 in bf16."""
    first, found = None, ratios(rows, FROM_BF16, d, causal)
    for N in sorted(found, reverse=True):
        if found[N] < 1 + bench.SAME:
            return first
        first = N
    return first


def dims(rows: list[dict]) -> list[int]:
    """The head dimensions at which there is something to compare."""
    return sorted({row["d"] for row in rows if row["provider"] == FROM_BF16 and row["over_v3"]})


def emulated(rows: list[dict]) -> bool:
    return rows[-1]["device"] == SIMULATOR.name


def answer(rows: list[dict]) -> str:
    lines = [line for d in dims(rows) for line in on_dim(rows, d)] or [on_exactness(rows)]
    text = "\n".join(["From which N on does FP8 pay?", *(f"  {line}" for line in lines)])
    text += "\n\nWhat this run says about the article's claims:\n"
    return text + "\n".join(f"  {number}. {verdict}: {why}" for number, verdict, why in claims(rows))


def on_exactness(rows: list[dict]) -> str:
    judged = [row for row in rows if row["gate"]]
    passed = [row for row in judged if row["gate"] == "passed"]
    text = f"{len(passed)} of {len(judged)} rows pass the gate"
    return text + ("; when FP8 pays, only a GPU can say." if emulated(rows) else "; nothing was timed to compare.")


def on_dim(rows: list[dict], d: int) -> list[str]:
    lines = [
        f"d={d}: with the quantization of bf16 inputs, FP8 is faster than fwd_v3 in bf16 {on_masks(rows, d)}"
        f" (less than {bench.SAME:.0%} does not show)."
    ]
    for N in TOLD:
        both = {c: at(rows, FROM_BF16, d, c).get(N) for c in (False, True)}
        words = [at_one(rows, row) for row in both.values() if row and row["over_v3"]]
        lines += [f"d={d}, N={N}: {'; '.join(words)}."] if words else []
    passes = [row for c in (False, True) for row in at(rows, PASS, d, c).values() if row["share"]]
    if passes:
        N = max(row["N"] for row in passes)
        last = [row for row in passes if row["N"] == N]
        shares = " and ".join(f"{row['share']:.1%} {mask(row)}" for row in last)
        lines.append(
            f"d={d}: quantization takes {shares} of the time from bf16 at N={N}, {milliseconds(last[0])}, at "
            f"{last[0]['gigabytes_per_second']:,.0f} GB/s of what is read and written once."
        )
    for other, base, told in (
        (HEADS, KERNEL, "with one scale a head, not one a block, the kernel alone has"),
        (ROW_MAJOR, KERNEL, "from a row-major V in 8 bits, which is transposed first, it has"),
        (ROW_MAJOR_HEADS, HEADS, "from a row-major V and with one scale a head it has"),
        (TWO_LEVELS, KERNEL, "where O is summed in two levels it has"),
    ):
        if change := [ratio for c in (False, True) for ratio in speeds(rows, other, base, d, c)]:
            whose = " of that with Vᵀ" if base == HEADS else ""
            lines.append(f"d={d}: {told} {span(change)} {'the' if whose else 'its'} speed{whose}.")
    return lines


def speeds(rows: list[dict], other: str, base: str, d: int, causal: bool) -> list[float]:
    """How many times the speed of `base` another one has, at every N."""
    found = at(rows, other, d, causal)
    return [row["seconds"] / found[N]["seconds"] for N, row in at(rows, base, d, causal).items() if N in found]


def on_masks(rows: list[dict], d: int) -> str:
    """`from N=1024 on with no mask, from N=2048 on causal`."""
    return ", ".join(
        f"{since(pays(rows, d, c), found)} {'causal' if c else 'with no mask'}"
        for c in (False, True) if (found := ratios(rows, FROM_BF16, d, c))
    )  # fmt: skip


def since(first: int | None, found: dict[int, float]) -> str:
    if first is None:
        return f"not even at N={max(found)}"
    return f"from N={first} on" if first > min(found) else f"at every N, from {first} on,"


def at_one(rows: list[dict], row: dict) -> str:
    """How fast it is beside fwd_v3 and cuDNN at one N, under one mask."""
    text = f"{mask(row)} {row['over_v3']:.2f} times the speed of fwd_v3 in bf16"
    alone = at(rows, KERNEL, row["d"], row["causal"]).get(row["N"])
    if alone and alone["over_v3"]:
        text += f", the kernel alone {alone['over_v3']:.2f} times at {alone['tflops']:,.0f} TFLOP/s"
        text += f", {alone['over_cudnn']:.2f} times that of {CUDNN} in bf16" if alone["over_cudnn"] else ""
    return text


def mask(row: dict) -> str:
    return "causal" if row["causal"] else "with no mask"


def span(numbers) -> str:
    least, most = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return f"{least} times" if least == most else f"{least} to {most} times"


def claims(rows: list[dict]) -> list[tuple[int, str, str]]:
    """(number in the list of claims, verdict, why), from the numbers of these rows."""
    if emulated(rows):
        return [(15, "not measurable here", "how fast FP8 is, only a GPU tells")]
    return [claim_15(rows)]


def claim_15(rows: list[dict]):
    """FP8 nearly doubles v3's speed, close to 1.2 PFLOP/s: 1.6 times, by the paper's own figures, within 5 %."""
    alone = [row for row in rows if row["provider"] == KERNEL and row["over_v3"]]
    if not alone:
        return 15, "not yet tested", f"{KERNEL} and {V3} were not both timed"
    most, gain = max(alone, key=lambda row: row["tflops"]), [row["over_v3"] for row in alone]
    why = f"up to {most['tflops']:,.0f} TFLOP/s and {max(gain):.2f} × {V3} in bf16; the former at d={most['d']}, "
    why += f"N={most['N']}, {mask(most)}; on inputs that are quantized already"
    if whole := [row["over_v3"] for row in rows if row["provider"] == FROM_BF16 and row["over_v3"]]:
        why += f", and {span(whole)} with their quantization"
    why += f"; the paper's figures are {PAPER[1] / PAPER[0]:.2f} × apart"
    parts = [most["tflops"] >= NEARLY * PAPER[1], max(gain) >= NEARLY * PAPER[1] / PAPER[0]]
    if not all(parts) and all(row["d"] != LARGEST for row in alone):
        why += f"; d={LARGEST} was not measured"
        return 15, "holds in part" if any(parts) else "not yet tested", why
    return 15, "holds" if all(parts) else "holds in part" if any(parts) else "does not hold", why


# ---- table ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    columns = [
        ("provider", lambda row: row["provider"]),
        ("scales", lambda row: row["scales"]),
        ("V", lambda row: row["V"]),
        ("sums", lambda row: row["accumulation"]),
        ("d", lambda row: row["d"]),
        ("mask", lambda row: "causal" if row["causal"] else "none"),
        ("N", lambda row: row["N"]),
        ("tile", lambda row: row["Br"] and f"{row['Br']}x{row['Bc']}"),
        ("time", lambda row: row["seconds"] and milliseconds(row)),
        ("TFLOP/s", lambda row: row["tflops"] and f"{row['tflops']:,.0f}"),
        (f"over\n{V3}", lambda row: row["over_v3"] and f"{row['over_v3']:.2f}"),
        ("over\ncuDNN", lambda row: row["over_cudnn"] and f"{row['over_cudnn']:.2f}"),
        ("share of\nthe time", lambda row: row["share"] and f"{row['share']:.1%}"),
        ("GB/s", lambda row: row["gigabytes_per_second"] and f"{row['gigabytes_per_second']:,.0f}"),
        ("max\nerror", lambda row: row["max_error"] and f"{row['max_error']:.1e}"),
        ("of what is\nallowed", lambda row: row["error_ratio"] and f"{row['error_ratio']:.0%}"),
        ("gate", lambda row: row["gate"]),
        ("cannot run", lambda row: row["infeasible"]),
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict]):
    """TFLOP/s over N, a line a provider: no mask beside causal, a row of panels for each d."""
    last, there = rows[-1], dims(rows)
    where = [last["device"], "Gaussian input", "emulated" if emulated(rows) else f"{last['B'] * last['N']:,} tokens"]
    where.append(picture.revision(rows))
    if not there:
        figure = picture.page(on_exactness(rows).rstrip("."), " · ".join(where), (12, 4.2))
        _errors(figure.add_axes((0.2, 0.16, 0.75, 0.58)), rows)
        return figure
    height = 1.5 + 3.6 * len(there)
    figure = picture.page(title(rows), " · ".join(where), (12, height))
    for n, d in enumerate(there):
        for left, causal in ((0.05, False), (0.46, True)):
            bottom = height - 1.3 - 3.6 * (n + 1) + 0.75
            axes = figure.add_axes((left, bottom / height, 0.34, 2.5 / height))
            _speeds(axes, rows, d, causal, named=causal)
    return figure


def _speeds(axes, rows: list[dict], d: int, causal: bool, named: bool):
    ends, shown = [], sorted({row["N"] for row in rows if row["d"] == d})
    for name, color in COLORS.items():
        if line := {N: row["tflops"] for N, row in at(rows, name, d, causal).items()}:
            look = {"linewidth": 2.5 if name == FROM_BF16 else 1.8, "linestyle": "--" if name == HEADS else "-"}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4.5, color=color, **look)
            ends.append((max(line), line[max(line)], f"{name}, {line[max(line)]:,.0f}", color))
    if (first := pays(rows, d, causal)) is not None:
        axes.axvline(first, color=picture.PALE, linewidth=6, zorder=0)
        side = "right" if first == max(shown) else "left"
        told = f" pays from {thousands(first)} "
        axes.text(first, 0.02, told, transform=axes.get_xaxis_transform(), fontsize=9.5, ha=side)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [thousands(N) for N in shown])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * max(row["tflops"] or 0 for row in rows if row["d"] == d))
    axes.grid(axis="y")
    axes.set_xlabel("N")
    axes.set_title(f"d={d}, {'causal' if causal else 'no mask'}: TFLOP/s")
    if named:
        picture.label_ends(axes, ends, 0.08)


def _errors(axes, rows: list[dict]):
    """How much of what is allowed each errs, at most."""
    shown = {name: [row["error_ratio"] for row in rows if row["provider"] == name] for name in COLORS if name != CUDNN}
    for y, (name, found) in enumerate(shown.items()):
        most = max((ratio for ratio in found if ratio is not None), default=0)
        axes.barh(y, most, 0.66, color=COLORS[name] if most <= 1 else picture.VERMILION)
        axes.text(most, y, f" {most:.0%}", va="center")
    axes.set_yticks(range(len(shown)), list(shown), color=picture.INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.axvline(1, color=picture.VERMILION, linewidth=2)
    axes.set_xlim(0, 1.2)
    axes.set_xlabel("largest error ÷ what is allowed; the line: the gate")


def title(rows: list[dict]) -> str:
    d = dims(rows)[-1]
    text = f"FP8 pays {on_masks(rows, d)} (d={d})"
    found = {c: ratios(rows, FROM_BF16, d, c) for c in (False, True)}
    N = max(max(each) for each in found.values() if each)
    times = span([each[N] for each in found.values() if N in each])
    return text + f";\nat N={thousands(N)}, quantization included, {times} fwd_v3's speed in bf16"


def thousands(N: int) -> str:
    return f"{N // 1024}k" if N % 1024 == 0 else str(N)
