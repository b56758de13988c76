"""Threads: how a block's threads share its tiles.

A block is TY x TX threads; thread (ty, tx) owns rows ty, ty + TY, … of every tile that it holds in registers, of a
tile of scores (rS, …) columns tx, tx + TX, …, of a tile of head columns (rO, …) quads tx, tx + TX, … if d allows.
The TX threads of a row are neighbours in one warp, so a row of S is reduced by shuffles and a row of P handed over
through shared memory without a block barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..variant import Device, Infeasible, Tile

ACCUMULATORS = 128  # what a thread's tiles take at most, where more rows of threads can bring it down


def ceil(n: int, step: int) -> int:
    """How many steps cover n."""
    return -(-n // step)


@dataclass(frozen=True)
class Threads:
    """How TY x TX threads share tiles of Br query rows, Bc key rows and d columns.

    Tiles are padded, never the data: rows and columns past Br, Bc, d are zeros that no result depends on.
    """

    TY: int
    TX: int
    Br: int
    Bc: int
    d: int
    overhead: int

    @classmethod
    def of(cls, tile: Tile, d: int, device: Device, direction: str = "fwd", overhead: int = 100) -> Threads:
        """The fewest threads that keep a thread's tiles in registers.

        overhead: registers that the kernel needs beside its tiles (addresses, operands in flight), as ptxas reports.
        """
        if device.simulated:
            return cls(4, 4, tile.Br, tile.Bc, d, 0)
        choices = [cls(TY, TX, tile.Br, tile.Bc, d, overhead) for TY, TX in ((16, 8), (16, 16), (32, 16))]
        fits = [t for t in choices if t.registers(direction) <= t.most_registers(device)]
        return next((t for t in fits if t.accumulators(direction) <= ACCUMULATORS), (fits or choices)[-1])

    @property
    def count(self) -> int:
        return self.TY * self.TX

    @property
    def RA(self) -> int:
        """Query rows of a thread."""
        return ceil(self.Br, self.TY)

    @property
    def RB(self) -> int:
        """Keys of a thread, as columns of S."""
        return self.Bc_padded // self.TX

    @property
    def RC(self) -> int:
        """Keys of a thread, as rows of dK and dV."""
        return self.Bc_padded // self.TY

    @property
    def RD(self) -> int:
        """Head columns of a thread."""
        return ceil(self.d, self.TX)

    @property
    def WIDE(self) -> int:
        """Head columns of a thread that lie side by side: 4, so that 16 bytes travel at once, or 1."""
        return 4 if self.RD % 4 == 0 else 1

    @property
    def Br_padded(self) -> int:
        return self.RA * self.TY

    @property
    def Bc_padded(self) -> int:
        step = max(self.TX, self.TY)
        return ceil(self.Bc, step) * step

    @property
    def d_padded(self) -> int:
        return self.RD * self.TX

    def accumulators(self, direction: str) -> int:
        """float32 registers that a thread's tiles take."""
        S, O = self.RA * self.RB, self.RA * self.RD
        return S + O if direction == "fwd" else 2 * S + O + 2 * self.RC * self.RD

    def registers(self, direction: str) -> int:
        """Registers that a thread is expected to need."""
        return self.accumulators(direction) + self.overhead

    def most_registers(self, device: Device) -> int:
        """Registers that a thread of a block this large may have."""
        return min(device.registers, 65_536 // self.count)

    def check(self, tile: Tile, shared_bytes: int, device: Device, direction: str) -> None:
        """Raises Infeasible where shared memory or registers do not suffice."""
        if shared_bytes > device.shared:
            raise Infeasible(tile, f"needs {shared_bytes:,} B of shared memory, a block has {device.shared:,} B")
        need, most = self.registers(direction), self.most_registers(device)
        if not device.simulated and need > most:
            raise Infeasible(tile, f"needs about {need} registers a thread, one of {self.count} has {most}")
