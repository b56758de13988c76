"""Accesses to global memory, per array, in elements, with bytes beside.  [floor 3]"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Traffic:
    """What a launch reads and writes: array (the papers' letters) -> elements.  An array not named moved nothing."""

    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    read_bytes: int = 0
    write_bytes: int = 0

    @property
    def total_reads(self) -> int:
        return sum(self.reads.values())

    @property
    def total_writes(self) -> int:
        return sum(self.writes.values())

    @property
    def total(self) -> int:
        return self.total_reads + self.total_writes

    def of(self, array: str) -> int:
        """Reads and writes of one array."""
        return self.reads.get(array, 0) + self.writes.get(array, 0)

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes
