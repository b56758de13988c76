"""What a kernel file declares: Variant, Tile, Infeasible, Unsupported; and the Device it is judged on.
[floor 1: no numba]"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .problem import Problem


@dataclass(frozen=True, order=True)
class Tile:
    """Br query rows x Bc key rows: the tile of S that one step works on."""

    Br: int
    Bc: int

    def __post_init__(self):
        for name in ("Br", "Bc"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"tile {name}={value!r}: expected an integer")
            if value < 1:
                raise ValueError(f"tile {name}={value}: expected at least 1")

    def __str__(self) -> str:
        return f"{self.Br}x{self.Bc}"


class Infeasible(ValueError):
    """A tile that cannot run: what it needs, what there is, in one line."""

    def __init__(self, tile: Tile, reason: str):
        super().__init__(f"tile {tile}: {reason}")
        self.tile, self.reason = tile, reason


class Unsupported(Infeasible):
    """A problem or a GPU that no tile of a kernel can do: the reason, and which kernel can, in one line."""

    def __init__(self, reason: str):
        ValueError.__init__(self, reason)
        self.tile, self.reason = None, reason


@dataclass(frozen=True)
class Device:
    """The limits a tile must keep to.  Sizes in bytes and 32-bit registers."""

    name: str
    kind: str  # "gpu" | "simulator"
    sms: int
    shared: int  # shared memory one block may have
    registers: int  # registers one thread may have
    threads: int  # threads one block may have
    capability: tuple[int, int] = (9, 0)

    @property
    def simulated(self) -> bool:
        return self.kind == "simulator"

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")


SIMULATOR = Device("simulator", "simulator", sms=1, shared=232_448, registers=255, threads=1024)
HOPPER = Device("NVIDIA H200", "gpu", sms=132, shared=232_448, registers=255, threads=1024)


SECONDS_PER_MULTIPLY_ADD = (
    1.2e-6  # seconds a multiply-add takes, simulated; measured: 0.5 to 1.5, with all the bookkeeping
)


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel file; equal to itself alone.

    direction   'fwd' | 'bwd' | 'softmax'
    generation  'v1' | 'v2': which backward a forward takes; None for neither
    loop_order  'q_outer' | 'kv_outer'
    parent      the variant this one was made from; delta: the one thing that it changes, in a sentence
    fit         (problem, tile, device) -> None, or raises Infeasible or Unsupported
    build       (problem, tile, device) -> launch(*tensors); compiles on the first launch
    softmax variants have no tile: fit and build take None
    tiles       the tiles that a sweep tries; () where any will do
    usual       (problem, device) -> the tile it takes; or
    nearest     (problem, device, most) -> the tiles of the least estimated time, the one it takes first; without
                either, choose_tile estimates
    unit        what multiplies: 'fma', one number at a time, or 'tensor', the tensor cores
    pace        seconds that a multiply-add of it takes where it is simulated
    scales      'block' | 'head' | 'tensor' where its products take e4m3: what shares a scale (a block is 64 rows of
                Q, or a tile's keys of K or V); None where they take the inputs' dtype
    """

    name: str
    direction: str
    delta: str
    fit: Callable[[Problem, Tile, Device], None]
    build: Callable[[Problem, Tile, Device], Callable]
    parent: str | None = None
    generation: str | None = None
    loop_order: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    default: bool = False  # the forward or backward that its generation's name stands for
    deterministic: bool = True
    one_block_a_head: bool = False  # its grid: heads alone, or heads x row blocks
    tiles: tuple[Tile, ...] = ()
    usual: Callable[[Problem, Device], Tile] | None = None
    nearest: Callable[[Problem, Device, int], list[Tile]] | None = None
    unit: str = "fma"
    pace: float = SECONDS_PER_MULTIPLY_ADD
    scales: str | None = None

    def space(self, problem: Problem, device: Device, sizes=(16, 32, 64, 128)) -> Iterator[Tile | Infeasible]:
        """Every tile of its own, or of sizes x sizes, in order: itself where it fits, its reason where it does not."""
        for tile in self.tiles or (Tile(Br, Bc) for Br in sizes for Bc in sizes):
            try:
                self.fit(problem, tile, device)
                yield tile
            except Infeasible as reason:
                yield reason

    def launcher(self, problem: Problem, tile: Tile, device: Device) -> Callable:
        """What `build` makes, one for all problems of this kind: launch(problem, *tensors).

        fwd      launch(problem, Q, K, V, mask, O, LSE)
        bwd      launch(problem, Q, K, V, mask, O, LSE, dO, dQ, dK, dV)
        softmax  launch(X, Y)
        """
        return _launcher(self, problem, tile, device)


@functools.lru_cache(4096)
def _launcher(variant: Variant, problem: Problem, tile: Tile, device: Device) -> Callable:
    return _built(variant, problem.kind, tile, device)


@functools.cache
def _built(variant: Variant, kind: Problem, tile: Tile, device: Device) -> Callable:
    variant.fit(kind, tile, device)
    launch = variant.build(kind, tile, device)
    if not callable(launch):
        raise TypeError(f"{variant.name}: build returned {type(launch).__name__}: expected a function, the launch")
    return launch
