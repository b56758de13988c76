"""Every kernel there is: the VARIANT of each file in kernels/, and of each prototype.  [floor 3]

A new file appears here, and everywhere, by itself.  Prototypes lie outside the package, in the folders that the
environment variable SANDBOX_PROTOTYPES names (separated like those of PATH), or in ./prototypes.  A file that is no
kernel is kept apart with the reason, and the others work on.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import get_type_hints

from . import kernels
from .variant import Variant

PACKAGE = Path(kernels.__path__[0])
HOPPER = "hopper"  # the folder, beside a kernel's file, of its CUDA C++


class Broken(ValueError):
    """A kernel file that cannot be used: in one line; `reason` is the whole of it, a traceback perhaps."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path.name} is no kernel: {reason.strip().splitlines()[-1]}")
        self.path, self.reason = path, reason


def folders() -> tuple[Path, ...]:
    """Where kernels lie: the package's folder, then those of prototypes."""
    named = os.environ.get("SANDBOX_PROTOTYPES")
    if named is None:
        found = [Path("prototypes")]
    else:
        found = [Path(folder) for folder in named.split(os.pathsep) if folder]
    return (PACKAGE, *dict.fromkeys(folder.resolve() for folder in found if folder.is_dir()))


def _all() -> dict[str, Variant]:
    return {name: variant for name, (variant, _) in _read(folders())[0].items()}


@functools.cache
def _read(folders: tuple[Path, ...]) -> tuple[dict[str, tuple[Variant, Path]], dict[Path, str]]:
    """({name: (variant, file)}, {file: why it is broken})."""
    found, broken = {}, {}
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            if file.name.startswith("_"):
                continue
            try:
                if file.stem in found:
                    raise ValueError(f"the name {file.stem} is taken by {found[file.stem][1].parent.name}/{file.name}")
                found[file.stem] = load(file), file
            except SyntaxError as error:
                broken[file] = "".join(traceback.format_exception_only(error))
            except Exception as error:  # whatever a file's own code may raise
                broken[file] = _from_this_file(error, file)
    return found, broken


def load(file: Path) -> Variant:
    """The VARIANT of one file, imported.

    Raises TypeError or ValueError where it has none, two, or one of another name, and whatever its own code raises.
    """
    tree = ast.parse(file.read_text(), str(file))
    if (count := sum(_makes_a_variant(node) for node in tree.body)) != 1:
        raise ValueError(
            f"it has {count or 'no'} VARIANT{'s' if count > 1 else ''}: expected one VARIANT = Variant(...)"
        )
    if file.parent == PACKAGE:
        module = importlib.import_module(f"{kernels.__name__}.{file.stem}")
    else:
        name = f"prototypes.{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    variant = getattr(module, "VARIANT", None)
    if not isinstance(variant, Variant):
        raise TypeError(f"its VARIANT is {variant!r}: expected a Variant")
    if variant.name != file.stem:
        raise ValueError(f"its VARIANT is named {variant.name!r}: expected {file.stem!r}, like the file")
    return variant


def _makes_a_variant(node: ast.stmt) -> bool:
    """Whether this line of a file assigns a Variant(...), or anything to VARIANT."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    makes = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "Variant"
    return makes or any(getattr(target, "id", None) == "VARIANT" for target in targets)


def _from_this_file(error: Exception, file: Path) -> str:
    """The error's traceback from the file's own lines on; its words alone where none is involved."""
    lines = traceback.extract_tb(error.__traceback__)
    start = next((n for n, line in enumerate(lines) if line.filename == str(file)), None)
    words = "".join(traceback.format_exception_only(error))
    if start is None:
        return str(error) if isinstance(error, (TypeError, ValueError)) else words
    return "Traceback (most recent call last):\n" + "".join(traceback.format_list(lines[start:])) + words


def broken() -> dict[Path, str]:
    """Each file that is no kernel, with the reason: words, or the traceback of what it raised."""
    return _read(folders())[1]


def file_of(name: str) -> Path:
    """The file of a variant.  Raises ValueError with the nearest names."""
    find(name)
    return _read(folders())[0][name.split(" ")[0]][1]


def files_of(name: str) -> list[Path]:
    """The file of a variant, and its CUDA C++ where it has some."""
    file = file_of(name)
    cu = file.parent / HOPPER / f"{file.stem}.cu"
    return [file, cu] if cu.exists() else [file]


def variants(direction: str | None = None, prototypes: bool = True) -> dict[str, Variant]:
    """name -> Variant, all or those of one direction ('fwd', 'bwd', 'softmax'), with prototypes or without."""
    return {
        name: v
        for name, (v, file) in _read(folders())[0].items()
        if direction in (None, v.direction) and (prototypes or file.parent == PACKAGE)
    }


def find(name: str) -> Variant:
    """The variant of that name, or with switches turned: 'fwd_v3 ping_pong=0', where its file has `turned`.

    Raises Broken where its file is, or ValueError with the nearest names.
    """
    name, *words = name.split(" ")
    if name not in _all():
        raise _unknown(name, _all())
    if not words:
        return _all()[name]
    module = sys.modules[_all()[name].build.__module__]
    if not hasattr(module, "turned"):
        raise ValueError(f"{' '.join([name, *words])!r}: {name} has no switches, its file defines no `turned`")
    return module.turned(**switches_of(words, module.Switches))


def switches_of(words: Iterable[str], of: type) -> dict:
    """Switches as they are written, NAME=VALUE, each a field of the dataclass `of`.  Raises ValueError on others."""
    kinds, found = get_type_hints(of), {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in kinds:
            raise ValueError(f"switch {word}: {nearest(key, kinds)}")
        value = {"True": "1", "False": "0"}.get(value, value)
        if kinds[key] is not str and not value.isdecimal():
            raise ValueError(f"switch {word}: expected {key}=0, {key}=1 or another number")
        found[key] = bool(int(value)) if kinds[key] is bool else kinds[key](value)
    return found


def _unknown(name: str, names) -> ValueError:
    for file, reason in broken().items():
        if file.stem in (name, f"fwd_{name}") or not names:  # a generation's; none is left: one says why for all
            return Broken(file, reason)
    return ValueError(f"variant={name!r} is unknown: {nearest(name, names)}")


def nearest(name: str, names) -> str:
    """'did you mean …' or, where nothing is near, all names."""
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def children(parent: str | None) -> list[Variant]:
    """The variants made from `parent`; for None those made from none, or from one that is not here."""
    known = _all()
    return [v for v in known.values() if (v.parent if v.parent in known else None) == parent]


def generations() -> list[str]:
    return sorted({v.generation for v in _all().values() if v.default and v.generation})


def _settled(look):
    """What a look finds in the package is found for good: no folder of prototypes takes its place."""
    known: dict[tuple, Variant] = {}

    @functools.wraps(look)
    def find(*key, **options):
        key += tuple(options.values())
        try:
            return known[key]
        except (KeyError, TypeError):  # not yet; not hashable
            variant = look(*key)
        if (PACKAGE / f"{variant.name}.py").is_file():
            known[key] = variant
        return variant

    return find


@_settled
def forward(name: str) -> Variant:
    """The forward kernel that a generation ('v1', 'v2') or a kernel's name stands for.

    Raises TypeError or ValueError, with the nearest names, on anything else; a backward's name is refused.
    """
    if isinstance(name, str) and (variant := _at_once(name)):
        return variant
    if not isinstance(name, str):
        raise TypeError(
            f"variant={name!r}: expected a generation ({', '.join(generations())}) or a forward kernel's name"
        )
    if name in generations():
        return _default("fwd", name)
    names = [*generations(), *variants("fwd")]
    if name in variants("fwd"):
        return _all()[name]
    if name in _all():
        raise ValueError(f"variant={name!r} is a {_all()[name].direction} kernel: expected one of {', '.join(names)}")
    raise _unknown(name, names)


def _at_once(name: str) -> Variant | None:
    """A forward kernel of the package that bears this name or, a generation's, fwd_NAME: by its own file alone, as all
    the others, and numba with them, take most of a second to import."""
    for stem in (name, f"fwd_{name}") if name.isidentifier() else ():
        if (PACKAGE / f"{stem}.py").is_file():
            with suppress(Exception):  # what is wrong with it, a look at all will tell
                variant = load(PACKAGE / f"{stem}.py")
                if variant.direction == "fwd" and (stem == name or variant.default and variant.generation == name):
                    return variant
    return None


@_settled
def backward_of(forward: Variant, deterministic: bool = False) -> Variant:
    """The backward of the forward's generation: its default, or with `deterministic` one that always gives the same
    bits.  Raises ValueError where the generation has none."""
    generations = sorted({v.generation for v in variants("bwd").values()})
    if forward.generation not in generations:
        raise ValueError(
            f"variant={forward.name!r} has no backward: expected a variant of {' or '.join(generations)} "
            "where gradients are needed, or torch.no_grad()"
        )
    default = _default("bwd", forward.generation)
    if not deterministic or default.deterministic:
        return default
    return next(v for v in variants("bwd").values() if v.generation == forward.generation and v.deterministic)


def _default(direction: str, generation: str | None) -> Variant:
    return next(v for v in variants(direction).values() if v.generation == generation and v.default)
