"""What docs/prototyping.md shows is so."""

from pathlib import Path

import pytest
import torch

import sandbox
from sandbox import catalog, target
from sandbox.__main__ import main
from sandbox.measure import gate

DOCS = Path(sandbox.__file__).parents[1] / "docs"
EXAMPLE = DOCS / "prototypes" / "softmax_held.py"
GUARD = "            if j < N:\n                Y[i, j] ="


@pytest.fixture(autouse=True)
def forget():
    yield
    catalog._read.cache_clear()


def test_the_example_is_exact(capfd):
    assert main(["check", "softmax_held", "--quick", "--path", str(EXAMPLE.parent)]) == 0
    assert "passed: softmax_held is exact" in capfd.readouterr().out


@pytest.mark.skipif(target.KIND != "simulator", reason="accesses are counted on the simulator")
@pytest.mark.parametrize("columns, accesses", [(16, 2.0), (15, 2.0), (1, 2.0), (64, 2.75)])
def test_the_example_takes_two_accesses_an_element(columns, accesses):
    """4 lanes hold 4 elements each; a longer row takes 3 for what is beyond them."""
    verdict = gate.check_softmax(catalog.load(EXAMPLE), torch.randn(5, columns), target.device())
    assert verdict.passed and verdict.traffic.total == accesses * 5 * columns


@pytest.mark.skipif(target.KIND != "simulator", reason="a GPU writes out of bounds without a word")
@pytest.mark.parametrize(
    "old, new, told",
    [
        (GUARD, "            Y[i, j] =", "Y[i, j] = narrow(exp(rX[e] - shift) / total)"),
        ("if j < N else NEG_INF", "if j < N else ZERO", "Y: all rows, all columns"),
    ],
)
def test_its_mistakes_are_found(capfd, tmp_path, monkeypatch, old, new, told):
    source = EXAMPLE.read_text()
    assert source.count(old) == 1
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))
    (tmp_path / EXAMPLE.name).write_text(source.replace(old, new))
    assert main(["check", "softmax_held", "--seconds", "1"]) == 1
    assert told in (out := capfd.readouterr().out) and "python -m sandbox check softmax_held --problem" in out
    assert told in (DOCS / "prototyping.md").read_text()


def test_the_page_shows_the_example_as_it_is():
    page = (DOCS / "prototyping.md").read_text()
    shown = page.split("```python\n")[1].split("```")[0]
    body = "\n".join(line.removeprefix("        ") for line in EXAMPLE.read_text().splitlines())
    assert shown.strip() in body
