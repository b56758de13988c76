"""python -m sandbox: list, new and doctor; prototypes and broken files beside the kernels of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sandbox
from sandbox import catalog, doctor, prototype, target
from sandbox.__main__ import main
from sandbox.emulator import compiler
from sandbox.variant import Tile

ROOT = Path(sandbox.__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of prototypes, found by the catalog."""
    monkeypatch.setenv("SANDBOX_PROTOTYPES", str(tmp_path))
    yield tmp_path
    catalog._read.cache_clear()


def written(folder: Path, name: str, text: str) -> Path:
    (file := folder / f"{name}.py").write_text(text)
    catalog._read.cache_clear()
    return file


def told(capfd, *words) -> tuple[int, str, str]:
    code = main(list(words))
    return code, *capfd.readouterr()


# ------------------------------------------------------------------------------------------------------- the commands


def test_help_names_every_command(capfd):
    code, out, _ = told(capfd, "--help")
    assert code == 0
    assert all(f"\n  {name} " in out for name in ("check", "doctor", "list", "new", "watch"))


@pytest.mark.parametrize("words, hint", [(["chekc"], "did you mean check?"), (["zzz"], "there are")])
def test_an_unknown_command(capfd, words, hint):
    code, out, err = told(capfd, *words)
    assert (code, out) == (2, "") and err.startswith("error: no command is named") and hint in err


def test_list_puts_each_kernel_under_its_parent(capfd):
    code, out, _ = told(capfd, "list")
    lines = out.splitlines()
    depth = {line.split()[0]: len(line) - len(line.lstrip()) for line in lines if line.strip()}
    for name, variant in catalog.variants().items():
        assert depth[name] == (depth[variant.parent] + 2 if variant.parent else 2)
        assert variant.delta.split(",")[0].split(";")[0] in " ".join(out.split())
    assert code == 0


def test_list_as_json(capfd):
    _, out, _ = told(capfd, "list", "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert set(rows) == set(catalog.variants())
    assert rows["fwd_v2"]["parent"] == "fwd_v2_one_block" and rows["fwd_v2"]["file"].endswith("fwd_v2.py")


# ---------------------------------------------------------------------------------------------------------------- new


@pytest.mark.parametrize("parent", catalog.variants(prototypes=False))
def test_a_copy_is_a_kernel_of_its_own(folder, parent):
    file = prototype.create("my_idea", parent, folder)
    catalog._read.cache_clear()
    copy, original = catalog.find("my_idea"), catalog.find(parent)
    assert catalog.file_of("my_idea") == file
    assert (copy.parent, copy.delta, copy.default) == (parent, "", False)
    for field in ("direction", "generation", "loop_order", "dtypes", "deterministic", "one_block_a_head"):
        assert getattr(copy, field) == getattr(original, field)
    assert "from .." not in file.read_text() and "Parent " + parent in file.read_text()


def test_a_prototype_is_looked_for_every_time(folder, monkeypatch):
    """What the package has is not: no prototype takes its place."""
    prototype.create("my_idea", "fwd_v2", folder)
    catalog._read.cache_clear()
    ours, theirs = catalog.forward("my_idea"), catalog.forward("v2")
    assert catalog.file_of(ours.name).parent == folder and catalog.backward_of(ours) is catalog.backward_of(theirs)
    monkeypatch.setenv("SANDBOX_PROTOTYPES", "")
    with pytest.raises(ValueError, match="my_idea"):
        catalog.forward("my_idea")
    assert catalog.forward("v2") is theirs and catalog.forward(name="fwd_v2") is theirs
    with pytest.raises(TypeError, match=r"variant=\['v2'\]: expected a generation"):
        catalog.forward(["v2"])


def test_a_copy_gives_the_same_bits(folder, torch_device):
    prototype.create("my_idea", "fwd_v2", folder)
    catalog._read.cache_clear()
    q, k, v = torch.randn(3, 1, 9, 2, 8, device=torch_device)
    ours = sandbox.attention(q, k, v, variant="my_idea", tile=Tile(8, 8))
    assert torch.equal(ours, sandbox.attention(q, k, v, variant="fwd_v2", tile=Tile(8, 8)))


@pytest.mark.skipif(target.KIND == "simulator" and compiler() is None, reason="no C++ compiler to emulate it with")
def test_a_copy_of_a_hopper_kernel_takes_its_cuda_along(folder, torch_device):
    prototype.create("my_idea", "fwd_v3", folder)
    catalog._read.cache_clear()
    assert catalog.files_of("my_idea") == [folder / "my_idea.py", folder / "hopper" / "my_idea.cu"]
    assert "my_idea(const __grid_constant__" in (folder / "hopper" / "my_idea.cu").read_text()
    q, k, v = torch.randn(3, 1, 150, 2, 64, device=torch_device).half()
    ours = sandbox.attention(q, k, v, variant="my_idea", tile=Tile(128, 64))
    assert torch.equal(ours, sandbox.attention(q, k, v, variant="fwd_v3", tile=Tile(128, 64)))
    with pytest.raises(ValueError, match="is taken"):
        prototype.create("my_idea", "fwd_v2", folder)


def test_a_copy_in_the_package_imports_as_its_neighbours_do():
    source = (catalog.PACKAGE / "fwd_v2.py").read_text()
    text = prototype.copied(source, "fwd_v2", "my_idea", inside=True)
    assert "from ..device import" in text and 'name="my_idea"' in text and "def my_idea(Q, K" in text
    assert "fwd_v2" not in text.replace('parent="fwd_v2"', "").replace("Parent fwd_v2", "")


def test_new_tells_what_to_do_next(capfd, folder):
    code, out, _ = told(capfd, "new", "my_idea", "--from", "fwd_v2", "--to", str(folder))
    assert code == 0 and (folder / "my_idea.py").exists()
    assert f"python -m sandbox check my_idea --path {folder}" in out


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["2fast", "--from", "fwd_v2"], "NAME='2fast': expected a name that Python takes, such as 'fwd_2fast'"),
        (["class", "--from", "fwd_v2"], "NAME='class'"),
        (["my-idea", "--from", "fwd_v2"], "such as 'my_idea'"),
        (["_idea", "--from", "fwd_v2"], "such as 'idea'"),
        (["v2", "--from", "fwd_v2"], "the name of a generation"),
        (["fwd_v1", "--from", "fwd_v2"], "NAME='fwd_v1' is taken"),
        (["my_idea", "--from", "fwd_2"], "did you mean fwd_v2"),
        (["my_idea"], "Missing option '--from'"),
    ],
)
def test_new_refuses(capfd, folder, words, complaint):
    code, out, err = told(capfd, "new", *words, "--to", str(folder))
    assert (code, out) == (2, "") and complaint in err and err.count("\n") == 1
    assert not list(folder.iterdir())


# --------------------------------------------------------------------------------------------- prototypes, broken files


def test_a_prototype_appears_by_itself(folder):
    """One file, and it is listed, tested for exactness, and an experiment takes it."""
    prototype.create("my_idea", "fwd_v2", folder)
    environment = os.environ | {"HYPOTHESIS_PROFILE": "quick"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_exactness.py", "-k", "my_idea"]
    tested = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0 and "[100%]" in tested.stdout, tested.stdout
    words = [sys.executable, "-m", "experiments", "run", "tile_size", "--out", str(folder / "out")]
    words += ["--variant", "my_idea", "--seqlen", "16", "--br", "8", "--bc", "8"]
    taken = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert taken.returncode == 0 and "my_idea" in taken.stdout, taken.stderr


MAKES_ONE = "from sandbox.variant import Variant\nVARIANT = Variant()\n"
NO_KERNELS = {
    "no_variant": ("x = 1\n", "no VARIANT: expected one"),
    "two_variants": (
        f"{MAKES_ONE}VARIANT = Variant()\n",
        "it has 2 VARIANTs: expected one",
    ),
    "another_variant": (
        f"{MAKES_ONE}OTHER = Variant()\n",
        "it has 2 VARIANTs: expected one",
    ),
    "wrong_kind": ("VARIANT = 3\n", "its VARIANT is 3: expected a Variant"),
    "raises": ("def f():\n    return 1 / 0\n\nVARIANT = f()\n", "ZeroDivisionError: division by zero"),
    "cannot_be_read": ("VARIANT = (\n", "SyntaxError"),
    "fwd_v2": ("VARIANT = 3\n", "the name fwd_v2 is taken by kernels/fwd_v2.py"),
}


@pytest.mark.parametrize("name", NO_KERNELS)
def test_a_broken_file_is_told_apart(folder, name):
    text, reason = NO_KERNELS[name]
    file = written(folder, name, text)
    assert list(catalog.broken()) == [file] and reason in catalog.broken()[file]
    assert set(catalog.variants()) == set(catalog.variants(prototypes=False))
    if name != "fwd_v2":
        with pytest.raises(catalog.Broken, match=f"{name}.py is no kernel"):
            catalog.find(name)


def test_another_name_than_the_file_s(folder):
    file = prototype.create("my_idea", "fwd_v2", folder)
    other = written(folder, "other_idea", file.read_text())
    assert "named 'my_idea': expected 'other_idea'" in catalog.broken()[other]
    assert catalog.find("my_idea").name == "my_idea"


def test_what_a_file_raised_is_shown_from_its_own_lines_on(capfd, folder):
    file = written(folder, "raises", NO_KERNELS["raises"][0])
    code, _, err = told(capfd, "check", "raises")
    assert code == 2
    assert err.splitlines()[1].strip().startswith(f'File "{file}", line 4') and "return 1 / 0" in err
    assert err.splitlines()[-1] == "error: raises.py is no kernel: ZeroDivisionError: division by zero"
    code, out, err = told(capfd, "list")
    assert code == 0 and "fwd_v2" in out and "ZeroDivisionError" in err


def test_path_adds_a_folder(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("SANDBOX_PROTOTYPES", "")
    prototype.create("my_idea", "softmax_safe", tmp_path)
    assert told(capfd, "list")[1].count("my_idea") == 0
    assert told(capfd, "list", "--path", str(tmp_path))[1].count("my_idea") == 1
    assert told(capfd, "list", "--path", str(tmp_path / "none"))[0] == 2


def test_the_package_has_no_broken_file():
    assert not [file for file in catalog.broken() if file.parent == catalog.PACKAGE]


# -------------------------------------------------------------------------------------------------------------- watch


def test_watch_gives_a_verdict_after_every_save(folder):
    text = prototype.create("my_idea", "softmax_safe", folder).read_text()
    file = written(folder, "my_idea", text.partition("VARIANT")[0] + "VARIANT = (\n")
    words = [sys.executable, "-m", "sandbox", "watch", "my_idea", "--rounds", "2"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as watching:
        said = []
        for line in watching.stdout:
            said.append(line)
            if line.startswith("--- no verdict"):
                file.write_text(text)
    assert "".join(said).count("SyntaxError") == 1
    assert said[-1].startswith("--- passed") and "after the save" in said[-1]


# ------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_nothing_broken_here(capfd):
    code, out, _ = told(capfd, "doctor")
    assert code == 0, out
    for what in ("python", "numba-cuda", "target", "nvvm", "nvrtc", "cache", "compiler", "registers"):
        assert what in out


def test_doctor_tells_the_fix(capfd, folder, monkeypatch):
    written(folder, "raises", NO_KERNELS["raises"][0])
    monkeypatch.setattr(doctor, "NVRTC_SMOKE", "raise SystemExit('NVRTC_ERROR_COMPILATION')")
    monkeypatch.setattr(doctor, "NUMBA_SMOKE", "print('9 registers')")
    code, out, _ = told(capfd, "doctor")
    assert code == 1
    assert "raises.py: ZeroDivisionError" in out and f"fix: mend {folder / 'raises.py'}" in out
    assert "a CUDA C++ kernel to sm_90a fails: NVRTC_ERROR_COMPILATION" in out and "2 broken" in out


def test_doctor_knows_versions_that_break_each_other(monkeypatch):
    said = subprocess.CompletedProcess(
        [], 1, "", "/usr/bin/python: numpy 2.5.2 is too new, it breaks the rest: numpy==2.4.6 is needed\n"
    )
    monkeypatch.setattr(doctor, "_python", lambda *words, environment: said)
    found = [finding for finding in doctor.packages() if finding.state == doctor.BROKEN]
    assert [(f.detail, f.fix) for f in found] == [
        ("numpy 2.5.2 is too new, it breaks the rest", "numpy==2.4.6 is needed")
    ]


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("SANDBOX_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert doctor.cache().state == doctor.NONE and "every process compiles anew" in doctor.cache().detail
