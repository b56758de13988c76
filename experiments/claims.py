"""Which claims about FlashAttention hold on this device?

Nothing is measured for this table alone.  It runs the experiments that the claims of verdicts.py name, with their
defaults, or takes what is on record of them, and has the rows judge.  An experiment that is not there yet leaves its
claims untested; once it is, it is asked too.
"""

from __future__ import annotations

import importlib
import pkgutil
import textwrap
from pathlib import Path

import click

from sandbox import picture, records, target

from . import common, tables
from .common import Experiment
from .verdicts import CLAIMS, FAILS, HOLDS, IN_PART, NOT_HERE, UNTESTED, V3, VERDICTS, Claim, Evidence, judge

NAME = "claims"
MADE_AT = ("revision", "source")  # of the rows that judge

# ---- the rows that judge --------------------------------------------------------------------------------------------


def others() -> dict:
    """name -> module of every other experiment of this folder."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = {name: importlib.import_module(f"experiments.{name}") for name in found if name not in ("__main__", NAME)}
    return {name: module for name, module in modules.items() if hasattr(module, "EXPERIMENT")}


def add(evidence: Evidence, name: str, module, rows: list[dict]):
    evidence.rows[name] = rows
    evidence.said[name] = module.claims(rows) if hasattr(module, "claims") else []


def measured(out: Path, fresh: bool, force: bool) -> Evidence:
    """The experiments that claims name, with their defaults: from the record of this very source, or run into `out`.

    Of the other experiments, what is on record there has been through the gate too.
    """
    device, there = target.device(), others()
    evidence, stamp = Evidence(device.name), records.provenance(device)
    named = {name for claim in CLAIMS for name in claim.experiments}
    asked = [name for name in there if name in named]
    for n, name in enumerate(asked, 1):
        experiment, options = there[name].EXPERIMENT, defaults(there[name].EXPERIMENT)
        click.echo(f"\n{n} of {len(asked)}, {name}")
        try:
            experiment.plan(device, **options)
        except (ValueError, TypeError) as reason:
            click.echo(f"not here: {reason}")
            evidence.lacking[name] = NOT_HERE, str(reason)
            continue
        rows = common.collect(experiment, out, fresh, force, options)
        common.save_picture(experiment, rows, out)
        add(evidence, name, there[name], rows)
    for name in sorted(there.keys() - named):
        rows = records.read(out / f"{name}.jsonl")
        evidence.rows[name] = [row for row in rows if all(row[field] == stamp[field] for field in records.PROVENANCE)]
    folders = {out.resolve(), (records.RESULTS / device.slug).resolve()}
    rows = [row for folder in folders for row in records.read(folder / "bench.jsonl")]
    evidence.bench = [row for row in rows if row["device"] == device.name]
    return evidence


def defaults(experiment: Experiment) -> dict:
    """Its own options where none is given."""
    command = click.Command(experiment.name)
    for option in experiment.options:
        option(command)
    return command.make_context(experiment.name, []).params


def recorded(folder: Path) -> Evidence:
    """What was measured before.  Raises ValueError where there is nothing, or where it is of several devices."""
    there = others()
    found = {name: records.read(folder / f"{name}.jsonl") for name in there}
    devices = {rows[-1]["device"] for rows in found.values() if rows}
    if len(devices) != 1:
        what = f"rows of {' and of '.join(sorted(devices))}: expected one device" if devices else "no experiment's rows"
        raise ValueError(f"--from {folder}: it holds {what}")
    evidence = Evidence(devices.pop())
    for name, rows in found.items():
        if not rows:
            evidence.lacking[name] = UNTESTED, f"no row of {name} is on record"
            continue
        try:
            add(evidence, name, there[name], common.runs(there[name].EXPERIMENT, rows)[0])
        except KeyError as missing:
            raise ValueError(f"--from {folder}: a row of {name} has no field {missing}, of an older version") from None
    evidence.bench = [row for row in records.read(folder / "bench.jsonl") if row["device"] == evidence.device]
    return evidence


# ---- a run ----------------------------------------------------------------------------------------------------------


def run(out: Path, fresh: bool, force: bool, folder: Path | None) -> bool:
    """Gathers the rows, judges them anew, reports.  False if one of them failed the gate."""
    if folder and fresh:
        raise click.UsageError(f"--fresh measures again, and --from {folder} measures nothing: pass one of them")
    log = records.Log(out, NAME, EXPERIMENT.key)
    evidence = recorded(folder) if folder else measured(out, fresh, force)
    rows = [row_of(claim, evidence, bool(folder)) for claim in CLAIMS]
    for row in rows:
        log.append(row)
    log.finish(rows)
    common.report(EXPERIMENT, rows, out)
    return all([common.all_passed(ours) for ours in evidence.rows.values()])


def row_of(claim: Claim, evidence: Evidence, recorded: bool) -> dict:
    """One claim: its verdict, and where the rows that judge it come from."""
    rows = evidence.of(claim)
    made_at = {name: ", ".join(sorted({row[name] for row in rows if row[name]})) or None for name in MADE_AT}
    return {
        "number": claim.number, "claim": claim.claim, "where": claim.where, "tested_by": claim.tested_by,
        "paper": claim.paper, **judge(claim, evidence), "rows": len(rows), "recorded": recorded,
        "device": evidence.device, **made_at, "time": records.now(),
    }  # fmt: skip


# ---- what the rows say ----------------------------------------------------------------------------------------------


def by_verdict(rows: list[dict]) -> dict[str, list[int]]:
    return {verdict: [row["number"] for row in rows if row["verdict"] == verdict] for verdict in VERDICTS}


def revisions(rows: list[dict]) -> list[str]:
    return sorted({name for row in rows if row["revision"] for name in row["revision"].split(", ")})


def answer(rows: list[dict]) -> str:
    lines = [f"{title(rows)} ({rows[0]['device']})."]
    lines += [f"  {verdict}: {', '.join(map(str, ours))}" for verdict, ours in by_verdict(rows).items() if ours]
    for row in rows:
        if row["verdict"] in (FAILS, IN_PART):
            lines.append(f"  {row['number']} {row['verdict']}: {row['claim']}.")
    if any(row["recorded"] for row in rows):
        lines.append(
            f"The rows that judge were recorded before, at revision {' and '.join(revisions(rows)) or 'unknown'}: they "
            "may differ from one another, and from what this revision would measure."
        )
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    several = len(revisions(rows)) > 1 or any(row["recorded"] for row in rows)

    def wrapped(width: int, *names: str):
        return lambda row: "\n".join(textwrap.fill(row[name], width) for name in names if row[name]) or None

    columns = [
        ("", lambda row: row["number"]),
        ("claim", wrapped(24, "claim")),
        ("the paper", wrapped(19, "where", "paper")),
        ("tested by", wrapped(14, "tested_by")),
        ("here", wrapped(22, "ours")),
        ("verdict", wrapped(14, "verdict")),
        ("why", wrapped(58, "why")),
        *([("revision", wrapped(9, "revision"))] if several else []),
    ]
    return tables.table(rows, columns)


# ---- picture --------------------------------------------------------------------------------------------------------

LOOKS = {  # verdict: its mark and its colour
    HOLDS: ("✓", picture.BLUE), IN_PART: ("◐", picture.YELLOW), FAILS: ("✗", picture.VERMILION),
    NOT_HERE: ("–", picture.SILVER), UNTESTED: ("…", "#f2f2f2"),
}  # fmt: skip
GENERATIONS = {1: "FlashAttention-1, and what it stands on", 7: "FlashAttention-2", V3: "FlashAttention-3"}
WIDTH, LINE = 15.9, 0.33  # inches
CLAIM, PAPER, OURS = 2.5, 7.4, 11.5


def draw(rows: list[dict]):
    """A board: a line for each claim, its verdict by colour and mark, our figure beside the paper's."""
    height = 1.15 + LINE * (len(rows) + 1.2 * len(GENERATIONS))
    where = f"{rows[0]['device']} · revision {' and '.join(revisions(rows)) or 'unknown'}"
    figure = picture.page(title(rows), where + " · recorded before" * rows[0]["recorded"], (WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    y = height - 0.95
    for x, words in ((PAPER, "the paper"), (OURS, "here")):
        axes.text(x, y, words, va="center", fontsize=10.5, fontweight="bold")
    for row in rows:
        if row["number"] in GENERATIONS:
            axes.text(0.3, y, GENERATIONS[row["number"]], va="center", fontsize=12, fontweight="bold")
            y -= LINE
        _line(axes, y, row)
        y -= LINE * (1.2 if row["number"] + 1 in GENERATIONS else 1)
    return figure


def _line(axes, y: float, row: dict):
    mark, color = LOOKS[row["verdict"]]
    ink = picture.GREY if row["verdict"] in (NOT_HERE, UNTESTED) else picture.INK
    axes.axhline(y - LINE / 2, 0.3 / WIDTH, 1 - 0.3 / WIDTH, color=picture.PALE, linewidth=0.7)
    axes.add_patch(picture.box(0.3, y - LINE / 2, 1.8, LINE, color))
    axes.text(0.46, y, mark, ha="center", va="center", fontsize=11, color=picture.ink_on(color))
    axes.text(0.62, y, row["verdict"], va="center", fontsize=9, color=picture.ink_on(color))
    axes.text(CLAIM - 0.1, y, row["number"], ha="right", va="center", fontsize=10, color=picture.GREY)
    axes.text(CLAIM, y, row["claim"], va="center", fontsize=10.5, color=ink)
    paper = ": ".join(filter(None, (row["where"], row["paper"])))
    axes.text(PAPER, y, paper, va="center", fontsize=9.5, color=picture.GREY)
    reason = row["why"].partition(": ")[0].partition("; ")[0]
    here = textwrap.shorten(row["ours"] or reason, 56, placeholder=" …")
    axes.text(OURS, y, here, va="center", fontsize=10 if row["ours"] else 9.5, color=ink)


def title(rows: list[dict]) -> str:
    told = {verdict: len(numbers) for verdict, numbers in by_verdict(rows).items()}
    fail = f"{told[FAILS] or 'none'} fail{'' if told[FAILS] > 1 else 's'}"
    return f"{told[HOLDS]} of {len(rows)} claims about FlashAttention hold here, {told[IN_PART]} in part, {fail}"


EXPERIMENT = Experiment(
    name=NAME,
    question="Which claims about FlashAttention hold on this device?",
    fixed="the rows that the other experiments give with their defaults",
    factor="the claim",
    varies=("number",),
    options=(
        click.option(
            "--from",
            "folder",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Judge what was recorded there before, such as results/nvidia-h200; measure nothing.",
        ),
    ),
    plan=None,  # its points are those of the others
    table=table,
    answer=answer,
    draw=draw,
    key=("number",),
    run=run,
)
