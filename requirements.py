"""Says what an interpreter lacks to run this project, one line each, exit code 1; nothing where it lacks nothing.

    python3 requirements.py [MODULE ...]    and these modules too

requirements.txt pins what a set-up installs; here stands which other versions are known to do, for a machine whose
packages are what they are.  Runs on any Python 3, and imports nothing but what it looks for.
"""

import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

OLDEST_PYTHON = (3, 11)
NEEDED = {  # module: (oldest version that was tried, first one that breaks)
    "torch": ((2, 11), None),
    "numpy": ((2, 0), (2, 5)),  # numpy 2.5 has no row_stack, which numba-cuda 0.30 calls
    "numba": ((0, 68), None),
    "numba_cuda": ((0, 30), (0, 31)),  # device/internals.py depends on what it does not promise
    "cuda.bindings": ((13, 0), (14, 0)),
    "click": (None, None),
    "matplotlib": (None, None),
    "tabulate": (None, None),
    "tqdm": (None, None),
    "hypothesis": (None, None),
    "pytest": (None, None),
}


def problems(modules):
    """One line for each module that is missing, too old, too new, or does not import."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return [f"Python {found} is too old: {'.'.join(map(str, OLDEST_PYTHON))} or later is needed"]
    lines = [line for line in map(problem, modules) if line]
    if not lines and not importlib.import_module("torch").cuda.is_available() and problem("greenlet"):
        lines.append(problem("greenlet") + ", for the simulator, since torch finds no usable GPU")
    if not lines and "numba_cuda" not in importlib.import_module("numba.cuda").__file__:
        lines.append("numba.cuda is Numba's own, not numba-cuda's: reinstall " + pin("numba_cuda"))
    return lines


def problem(module):
    """What is wrong with a module, in a line, or None."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0] or error.name == module:
            return f"{module} is missing: {pin(module)} is needed"
        return f"{module} does not import, {error.name} is missing: reinstall {pin(module)}"
    except Exception as error:  # a broken installation may raise anything
        return f"{module} does not import ({type(error).__name__}: {first_line(error)}): reinstall {pin(module)}"
    oldest, breaks = NEEDED.get(module, (None, None))
    version = str(getattr(imported, "__version__", ""))
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if oldest and numbers < oldest:
        return f"{module} {version} is too old: {pin(module)} is needed"
    if breaks and numbers >= breaks:
        return f"{module} {version} is too new, it breaks the rest: {pin(module)} is needed"
    return None


def pin(module):
    """The line of requirements.txt that installs a module."""
    name = module.replace("_", "-").replace(".", "-")
    lines = (Path(__file__).parent / "requirements.txt").read_text().split("\n")
    return next((line.split()[0] for line in lines if re.match(rf"{name}\b(?!-)", line)), name)


def first_line(error):
    return (str(error).splitlines() or [""])[0]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    told = problems([*NEEDED, *sys.argv[1:]])
    for line in told:
        print(f"{sys.executable}: {line}", file=sys.stderr)
    sys.exit(1 if told else 0)
