"""Every kernel there is: the VARIANT of each file in kernels/.  A new file appears here, and everywhere, by itself."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from . import kernels
from .variant import Variant


@functools.cache
def _all() -> dict[str, Variant]:
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(kernels.__path__)):
        variant = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), "VARIANT", None)
        if not isinstance(variant, Variant):
            raise TypeError(f"kernels/{module}.py: expected one VARIANT = Variant(...)")
        if variant.name != module:
            raise ValueError(f"kernels/{module}.py: its VARIANT is named {variant.name!r}, expected {module!r}")
        found[module] = variant
    return found


def variants(direction: str | None = None) -> dict[str, Variant]:
    """name -> Variant, all or those of one direction ('fwd', 'bwd', 'softmax')."""
    return {name: v for name, v in _all().items() if direction in (None, v.direction)}


def find(name: str) -> Variant:
    """The variant of that name.  Raises ValueError with the nearest names."""
    if name in _all():
        return _all()[name]
    raise ValueError(f"variant={name!r} is unknown: {nearest(name, _all())}")


def nearest(name: str, names) -> str:
    """'did you mean …' or, where nothing is near, all names."""
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def generations() -> list[str]:
    return sorted({v.generation for v in _all().values() if v.default and v.generation})


def forward(name: str) -> Variant:
    """The forward kernel that a generation ('v1', 'v2') or a kernel's name stands for.

    Raises TypeError or ValueError, with the nearest names, on anything else; a backward's name is refused.
    """
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
    raise ValueError(f"variant={name!r} is unknown: {nearest(name, names)}")


def backward_of(forward: Variant, deterministic: bool = False) -> Variant:
    """The backward of the forward's generation: its default, or with `deterministic` one that always gives the same
    bits."""
    default = _default("bwd", forward.generation)
    if not deterministic or default.deterministic:
        return default
    return next(v for v in variants("bwd").values() if v.generation == forward.generation and v.deterministic)


def _default(direction: str, generation: str | None) -> Variant:
    return next(v for v in variants(direction).values() if v.generation == generation and v.default)
