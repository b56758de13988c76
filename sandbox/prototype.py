"""A new kernel from an old one: one file copied, renamed, and left open for one idea.  [floor 3]"""

from __future__ import annotations

import ast
import keyword
import re
from pathlib import Path

from . import catalog, records

HEADER = '''"""What is it?  One line.

Parent {parent}; the one idea: …
"""
'''


def create(name: str, parent: str, folder: Path | None = None) -> Path:
    """Writes FOLDER/NAME.py, a copy of the variant `parent` under that name; its path.  Where the parent has a .cu file
    in the folder `hopper` beside it, so has the copy.

    folder   the package's own kernels unless given; made where it is missing
    The copy has `parent` as its parent, an empty delta, stands for no generation, and imports sandbox by its full name
    outside the package.  Raises ValueError on a name that is taken or none that Python takes, and on an unknown parent.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(f"NAME={name!r}: expected a name that Python takes, such as {_as_name(name)!r}")
    if name in catalog.generations():
        raise ValueError(f"NAME={name!r} is the name of a generation: choose another")
    original = catalog.file_of(parent)
    file = (Path(folder) if folder else catalog.PACKAGE) / f"{name}.py"
    cu = file.parent / catalog.HOPPER / f"{name}.cu"
    taken = [path for path in (file, cu, *(f / file.name for f in catalog.folders())) if path.exists()]
    if taken:
        raise ValueError(f"NAME={name!r} is taken: {taken[0]} exists")
    text = copied(original.read_text(), parent, name, inside=file.parent.resolve() == catalog.PACKAGE)
    file.parent.mkdir(parents=True, exist_ok=True)
    for source in catalog.files_of(parent)[1:]:
        cu.parent.mkdir(exist_ok=True)
        records.write_whole(cu, re.sub(rf"\b{parent}\b", name, source.read_text()))
    records.write_whole(file, text)
    return file


def copied(source: str, parent: str, name: str, inside: bool) -> str:
    """The source of a kernel file, for a new kernel made from it."""
    header = ast.parse(source).body[0]
    if not (isinstance(header, ast.Expr) and isinstance(header.value, ast.Constant)):
        raise ValueError(f"{parent} has no docstring at its head: expected one to replace")
    lines = source.splitlines(keepends=True)
    code = "".join(lines[header.end_lineno :])
    code = re.sub(rf"\b{parent}\b", name, code)
    if not inside:
        code = re.sub(r"^from \.\.(\w)", r"from sandbox.\1", code, flags=re.MULTILINE)
    start = code.index("\nVARIANT = ")
    code, variant = code[:start], code[start:]
    variant = re.sub(r"^    (parent|delta|default)=.*\n", "", variant, flags=re.MULTILINE)
    variant = re.sub(
        r"^(    direction=.*\n)", rf'\1    parent="{parent}",\n    delta="",\n', variant, flags=re.MULTILINE
    )
    return HEADER.format(parent=parent) + code + variant


def _as_name(text: str) -> str:
    """Something like it that is a name."""
    name = re.sub(r"\W", "_", text).strip("_").lower()
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"fwd_{name}".rstrip("_")
