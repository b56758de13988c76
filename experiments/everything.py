"""What results/ holds of a GPU, measured on the one at hand: every run is a command of its own, in this order.

    python -m experiments all

A run that ended well at this revision is not made again, one that was cut short goes on where it stopped, and one that
fails does not keep the others from theirs.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from sandbox import records, target

AGAINST = "--grid paper --against torch:flash,torch:cudnn,torch:efficient"
RUNS = (  # of two that draw one picture, the last is the one to be seen
    f"sandbox bench fwd_v3 fwd_v2_mma --dtype fp16 {AGAINST}",
    f"sandbox bench fwd_v3 fwd_v3_fp8 'fwd_v3_fp8 scales=head' fwd_v2_mma --dtype e4m3 {AGAINST}",
    f"sandbox bench bwd_v2_mma --dtype fp16 {AGAINST}",
    f"sandbox bench bwd_v2_mma --dtype bf16 {AGAINST}",
    "sandbox overhead fwd_v3 fwd_v2 fwd_v2_mma fwd_v3_fp8",
    "sandbox overhead fwd_v3 fwd_v2_mma fwd_v3_fp8 --head-dim 128 --first",
    "experiments run pipelining",
    "experiments run fp8_speed",
    "experiments run fp8_error",
    "experiments run tile_choice",
    "experiments run warp_partition",
    "experiments run loop_order",
    "experiments run loop_order --dtype bf16 --seqlen 1024,4096,16384",
    "experiments run tile_size",
    "experiments run tile_size --dtype bf16",
    "experiments run fp32_sdpa",
    "experiments run online_softmax",
    "experiments run non_matmul",
    "experiments run causal_skip",
    "experiments run memory",
    "experiments run claims",
)


def run(out: Path | None, only: tuple[str, ...], fresh: bool) -> bool:
    """Makes the runs that have one of the words `only` in them (all of them, if none is given); False if one failed.

    out  the folder of their rows and pictures, and of runs.jsonl, what ended well and when; results/DEVICE if None

    Raises click.UsageError, before anything runs, without a GPU or where no run has these words.
    """
    commands = wanted(only)
    if target.KIND != "gpu":
        raise click.UsageError("all needs a GPU; what the simulator can count, the experiments do one by one")
    device = target.device()
    out = out or records.RESULTS / device.slug
    log, stamp, failed = records.Log(out, "runs", ("command",)), records.provenance(device), []
    for n, command in enumerate(commands, 1):
        row, heading = {"command": command} | stamp, f"[{n} of {len(commands)}] {command}"
        if not fresh and log.find(row):
            click.echo(f"{heading}: on record")
            continue
        click.echo(f"\n{heading}\n")
        began = time.time()
        if subprocess.run(words(command, out, fresh)).returncode:
            failed.append(command)
            continue
        log.append(row | {"seconds": round(time.time() - began), "time": records.now()})
    for command in failed:
        click.echo(f"failed: {command}", err=True)
    return not failed


def wanted(only: tuple[str, ...]) -> list[str]:
    """Those that have one of these words in them, or all; raises click.UsageError where none has."""
    found = [command for command in RUNS if not only or any(word in command for word in only)]
    if not found:
        raise click.UsageError(f"--only {', '.join(only)}: no run has that in it; all --dry-run names them")
    return found


def words(command: str, out: Path, fresh: bool = False) -> list[str]:
    """What starts that run in a process of its own."""
    again = ["--fresh"] if fresh and " overhead" not in command else []  # which keeps no points
    return [sys.executable, "-m", *shlex.split(command), "--out", str(out), *again]
