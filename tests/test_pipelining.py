"""pipelining: what its rows say, from rows made up; that every build is exact is test_hopper's."""

from __future__ import annotations

import json

import pytest

from experiments import pipelining
from sandbox import emulator, target
from sandbox.variant import HOPPER

SPEEDS = {"as it is": 700, "no overlap of QKᵀ and softmax": 630, "with turns (ping-pong)": 693, "without turns": 700}


def rows(speeds=SPEEDS, **fields):
    points = pipelining.plan(HOPPER, None, None, None, None, False, "fp16", 0)
    found = []
    for point in points:
        row = point.fields() | {"gate": "passed", "max_error": 1e-4, "device": "NVIDIA H200", "revision": "abc"}
        speed = speeds.get(row["build"])
        found.append(row | {"tflops": speed and speed - row["Bc"] / 64, "seconds": speed and 1e-3} | fields)
    return found


def test_worth_compares_the_best_tile_of_each_build():
    worth = pipelining.worth(rows())
    assert set(worth) == set(SPEEDS) - {"as it is"}
    assert worth["no overlap of QKᵀ and softmax"] == pytest.approx(628 / 698 - 1)
    assert worth["without turns"] == 0


def test_its_words_name_the_papers_figures_at_its_shape_alone():
    assert "Table 2, on an H100: as it is 661" in pipelining.answer(rows())
    assert "Table 2" not in pipelining.answer(rows(N=4096))


@pytest.mark.parametrize(
    "speeds, verdict",
    [
        (SPEEDS, "holds in part"),
        (SPEEDS | {"without turns": 600}, "holds"),
        (SPEEDS | {"no overlap of QKᵀ and softmax": 710}, "does not hold"),
        ({}, "not measurable here"),
    ],
)
def test_claim_13(speeds, verdict):
    said = {number: (judged, why) for number, judged, why in pipelining.claims(rows(speeds))}
    assert said[13][0] == verdict and said[12][0] == "not measurable here"


@pytest.mark.parametrize("speeds", [SPEEDS, {}])
def test_it_draws(speeds, tmp_path):
    pipelining.draw(rows(speeds)).savefig(tmp_path / "pipelining.png")
    assert (tmp_path / "pipelining.png").stat().st_size > 5000


@pytest.mark.skipif(target.KIND != "simulator", reason="a GPU takes the paper's shape")
@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler on this machine")
def test_emulated_it_is_exact(tmp_path):
    from experiments.__main__ import main

    assert main(["run", "pipelining", "--out", str(tmp_path), "--seqlen", "70"]) == 0
    found = [json.loads(line) for line in (tmp_path / "pipelining.jsonl").read_text().splitlines()]
    assert {row["build"] for row in found} == set(pipelining.BUILDS)
    assert all(row["gate"] == "passed" and row["tflops"] is None for row in found)
