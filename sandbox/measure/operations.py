"""How many operations on numbers a NumPy program does, by kind: arrays that count.  [floor 3: NumPy alone]

    (O, l, m), done = count(flash_attention_1_forward, Q, K, V, Br=64, Bc=64)
    done["exp"]        how often e^x was taken
    done["matmul"]     2·m·n·k for each product [m, k] @ [k, n]: a multiplication and an addition are two

A counting array is no ndarray but a wrapper with few doors, and what comes through none of them raises: nothing is
missed in silence.  Moving numbers is free: slices, transposes, assignments, new arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

ELEMENTWISE = {  # one for each element of the result
    np.exp: "exp", np.log: "log", np.maximum: "max", np.add: "add", np.subtract: "subtract", np.multiply: "multiply",
    np.true_divide: "divide", np.equal: "compare", np.not_equal: "compare",
}  # fmt: skip
REDUCTIONS = {np.maximum: "max", np.add: "sum"}  # one for each element that meets another
METHODS = {  # of a ufunc: the kinds, and the options that do not change how they are counted, or are looked at
    "__call__": (ELEMENTWISE | {np.matmul: "matmul"}, {"where"}),
    "reduce": (REDUCTIONS, {"axis", "keepdims", "initial"}),
}
FREE = (np.zeros_like, np.empty_like, np.full_like)
GUARDS = ("compare", "select")  # select: an element of np.where
KINDS = ("matmul", *dict.fromkeys((*ELEMENTWISE.values(), *REDUCTIONS.values(), *GUARDS)))


class NotCounted(TypeError):
    """An operation that nobody has said how to count."""


def count(program: Callable, *arrays: np.ndarray, **options) -> tuple[object, Counter]:
    """(what program(*arrays, **options) returns, kind -> operations on what comes from the arrays).

    The results are plain arrays, bit for bit those of a run that does not count; a program returns one or a tuple.
    Raises NotCounted.
    """
    done = Counter()
    results = program(*(Counted(x, done) for x in arrays), **options)
    return tuple(map(_plain, results)) if isinstance(results, tuple) else _plain(results), done


class Counted(np.lib.mixins.NDArrayOperatorsMixin):
    """An array x, and the Counter that operations on it are written to."""

    def __init__(self, x: np.ndarray, done: Counter):
        self.x, self.done = np.asarray(x), done

    # ---- free -------------------------------------------------------------------------------------------------------

    shape = property(lambda self: self.x.shape)
    dtype = property(lambda self: self.x.dtype)
    T = property(lambda self: Counted(self.x.T, self.done))

    def __len__(self):
        return len(self.x)

    def __bool__(self):
        return bool(self.x)

    def __getitem__(self, key):
        return Counted(self.x[key], self.done)

    def __setitem__(self, key, value):
        self.x[key] = _plain(value)

    def __array__(self, *_, **__):
        raise NotCounted("a counting array would become a plain one, and what follows would not be counted")

    # ---- counted ----------------------------------------------------------------------------------------------------

    def max(self, axis=None, **options):
        return np.maximum.reduce(self, axis=axis, **options)

    def sum(self, axis=None, **options):
        return np.add.reduce(self, axis=axis, **options)

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        kind = _kind(ufunc, method, options)
        if not all(isinstance(x, Counted) for x in out):
            raise NotCounted(f"numpy.{ufunc.__name__} writes into a plain array: make it from a counting one")
        inputs, options = [_plain(x) for x in inputs], {name: _plain(value) for name, value in options.items()}
        if out:
            options["out"] = tuple(x.x for x in out)
        result = getattr(ufunc, method)(*inputs, **options)
        self.done[kind] += _operations(ufunc, method, inputs, options, result)
        return out[0] if out else Counted(result, self.done)

    def __array_function__(self, function, types, args, options):
        args, options = [_plain(x) for x in args], {name: _plain(value) for name, value in options.items()}
        if function not in FREE and not (function is np.where and len(args) == 3):
            raise NotCounted(f"numpy.{function.__name__} of {len(args)} arguments: nobody has said how to count it")
        result = function(*args, **options)
        self.done["select"] += result.size if function is np.where else 0
        return Counted(result, self.done)


def _kind(ufunc, method: str, options: dict) -> str:
    """Raises NotCounted."""
    kinds, known = METHODS.get(method, ({}, set()))
    name = f"numpy.{ufunc.__name__}" + (f".{method}" if method != "__call__" else "")
    if ufunc not in kinds:
        raise NotCounted(f"{name}: nobody has said how to count it")
    if strange := set(options) - known:
        raise NotCounted(f"{name} with {', '.join(sorted(strange))}=: nobody has said how to count it")
    return kinds[ufunc]


def _operations(ufunc, method: str, inputs: list, options: dict, result) -> int:
    if ufunc is np.matmul:
        return 2 * np.size(result) * np.shape(inputs[0])[-1]
    if method == "reduce":
        return np.size(inputs[0]) if "initial" in options else max(np.size(inputs[0]) - np.size(result), 0)
    if "where" in options:
        return int(np.count_nonzero(np.broadcast_to(options["where"], np.shape(result))))
    return np.size(result)


def _plain(x):
    return x.x if isinstance(x, Counted) else x
